package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// sentinelPollInterval is the interval at which a process with many connections asks
	// for a new primary. During a manual failover, the old primary takes writes for some
	// seconds more, and these are lost.
	sentinelPollInterval = time.Second

	// sentinelSettleTime is the time after a look-up in which every process polls. Two
	// Sentinels can each promote a replica at the same time. The losing replica takes
	// writes until the Sentinels demote it, some ten seconds later.
	sentinelSettleTime = 20 * time.Second
)

// sentinelQueue is a queue on the primary that Sentinels name.
type sentinelQueue struct {
	oneServer // for checks and part
	address   queueAddress
	settings  redisSettings
	maxIdle   int
	polls     bool       // asks every sentinelPollInterval at all times
	limit     logLimiter // of lines about unanswered queries to Sentinels
	log       *slog.Logger
	discovery *discovery

	mu      sync.Mutex
	primary *queueServer // nil: not known yet
	epoch   int          // configuration epoch in which the Sentinels named it
	doubted bool         // a command has failed since the last successful check
	checked time.Time    // last time that the server said that it is a primary
	polled  time.Time    // last query to the Sentinels
}

func newSentinelQueue(address queueAddress, settings redisSettings, maxIdle int, log *slog.Logger) *sentinelQueue {
	q := &sentinelQueue{address: address, settings: settings, maxIdle: maxIdle, polls: maxIdle > 1, log: log}
	q.discovery = newDiscovery(q.lookUp)
	return q
}

// find implements tokenServers.
func (q *sentinelQueue) find(ctx context.Context, _ semaphoreID) (*queueServer, error) {
	primary, certain := q.current()
	if certain {
		return primary, nil
	}
	if err := q.discovery.wait(ctx); err != nil {
		return nil, fmt.Errorf("queue Redis %s: %w", q.address, err)
	}
	primary, _ = q.current()
	return primary, nil
}

// primaries implements tokenServers.
func (q *sentinelQueue) primaries(ctx context.Context) ([]*queueServer, error) {
	primary, err := q.find(ctx, semaphoreID{})
	return []*queueServer{primary}, err
}

// current returns the known primary, and whether it can be used without a look-up.
func (q *sentinelQueue) current() (primary *queueServer, certain bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	certain = q.primary != nil && !q.doubted
	polls := q.polls || time.Since(q.checked) < sentinelSettleTime
	if certain && polls && time.Since(q.polled) > sentinelPollInterval {
		q.discovery.start()
	}
	return q.primary, certain
}

// failed implements tokenServers.
func (q *sentinelQueue) failed(server *queueServer, _ semaphoreID, err error) {
	q.discovery.noteFailed(err)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.doubted = q.doubted || server == q.primary
}

// at implements tokenServers. A Sentinel group has no redirections.
func (q *sentinelQueue) at(string) *queueServer {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.primary
}

// close implements tokenServers.
func (q *sentinelQueue) close() error {
	q.discovery.close()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.primary == nil {
		return nil
	}
	return q.primary.close()
}

// lookUp asks the Sentinels for the primary, and that server whether it is one. While the
// server does not answer, lookUp keeps asking the Sentinels: they may start a failover.
func (q *sentinelQueue) lookUp(ctx context.Context, note func(error)) error {
	q.mu.Lock()
	q.polled = time.Now()
	known, doubted, epoch := "", q.doubted, q.epoch
	if q.primary != nil {
		known = q.primary.address
	}
	q.mu.Unlock()

	checks := newRoleChecks(q.settings)
	for ctx.Err() == nil {
		named, err := q.askSentinels(ctx)
		switch {
		case errors.Is(ctx.Err(), context.Canceled): // the queue is closed
			return ctx.Err()
		case err != nil && known == "":
			note(err)
			_ = sleep(ctx, lookupPause)
			continue
		case err != nil:
			q.warnNoSentinel(err)
			named = sentinelAnswer{known, epoch}
		}
		// The only Sentinel that answers may have been cut off for a while, and name an
		// old primary.
		if !doubted && (named.address == known || named.epoch < epoch) {
			return nil
		}
		checks.start(ctx, named.address)
		checked, err := checks.wait(ctx)
		if err == nil && checked == named.address {
			q.adopt(named)
			return nil
		}
		note(err)
	}
	return ctx.Err()
}

// sentinelAnswer is the primary that a Sentinel names. The higher the epoch, the newer
// the answer.
type sentinelAnswer struct {
	address string
	epoch   int
}

// askSentinels returns the answer with the highest epoch. Its error says why no Sentinel
// has answered.
func (q *sentinelQueue) askSentinels(ctx context.Context) (best sentinelAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, requeryAfter)
	defer cancel()
	best.epoch = -1
	err = fanOut(ctx, q.address.servers, q.askSentinel, func(a sentinelAnswer) (enough bool) {
		if a.epoch > best.epoch {
			best = a
		}
		return false
	})
	if best.epoch >= 0 {
		err = nil
	}
	return best, err
}

func (q *sentinelQueue) askSentinel(ctx context.Context, sentinel string) (a sentinelAnswer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("asking Sentinel %s: %w", sentinel, err)
		}
	}()
	conn, err := dialRedis(ctx, sentinel, q.settings.ofSentinels(), requeryAfter)
	if err != nil {
		return a, err
	}
	defer conn.Close()
	master, err := redis.StringMap(conn.DoContext(ctx, "SENTINEL", "MASTER", q.address.name))
	if err != nil {
		return a, err
	}
	if a.epoch, err = strconv.Atoi(master["config-epoch"]); err != nil {
		return a, fmt.Errorf("unexpected answer: %w", err)
	}
	// A Sentinel that leads a failover names the new primary in this answer first.
	named, err := redis.Strings(conn.DoContext(ctx, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", q.address.name))
	if err == nil && len(named) != 2 {
		err = fmt.Errorf("unexpected answer %q", named)
	}
	if err != nil {
		return a, err
	}
	a.address = q.address.scheme() + net.JoinHostPort(named[0], named[1])
	return a, nil
}

// warnNoSentinel logs, at a limited rate, that no Sentinel answers.
func (q *sentinelQueue) warnNoSentinel(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.limit.allow(); ok {
		q.log.Warn("no Sentinel answers, going on with the primary that is known", "queueRedis", q.address.text,
			"primary", q.primary.address, "error", err.Error())
	}
}

// adopt makes a server the primary.
func (q *sentinelQueue) adopt(named sentinelAnswer) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.doubted, q.checked, q.epoch = false, time.Now(), named.epoch
	if q.primary != nil && q.primary.address == named.address {
		return
	}
	server := newQueueServer(named.address, q.settings, q.maxIdle)
	if q.primary != nil {
		q.settings.counts.failedOver()
		q.log.Warn("the queue has another primary", "queueRedis", q.address.text, "primary", named.address,
			"before", q.primary.address)
		_ = q.primary.close()
	}
	q.primary = server
}
