package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// sentinelsAskedEvery is how often a process with many connections asks whether there is another primary by now. During a
	// failover by hand, the old one takes writes for some seconds more, which are lost.
	sentinelsAskedEvery = time.Second

	// sentinelsSettle is for how long after a look-up any other process asks as often. Two Sentinels can each promote a replica at
	// the same time; the one that loses takes writes until it is made a replica of the other, some ten seconds later.
	sentinelsSettle = 20 * time.Second
)

// sentinelQueue is a queue of a primary and its replicas: the primary is the one that the Sentinels name.
type sentinelQueue struct {
	oneServer // checks and part
	address   queueAddress
	settings  redisSettings
	maxIdle   int
	watchful  bool       // always asks every sentinelsAskedEvery
	limit     logLimiter // of lines about Sentinels that do not answer
	log       *slog.Logger
	discovery *discovery

	mu      sync.Mutex
	primary *queueServer // nil: not known yet
	epoch   int          // of the Sentinel that named it
	doubted bool         // a command has failed since it was known to be one
	checked time.Time    // when it was last found to be one
	asked   time.Time    // when the Sentinels were asked last
}

func newSentinelQueue(address queueAddress, settings redisSettings, maxIdle int, log *slog.Logger) *sentinelQueue {
	q := &sentinelQueue{address: address, settings: settings, maxIdle: maxIdle, watchful: maxIdle > 1, log: log}
	q.discovery = newDiscovery(q.look)
	return q
}

// find implements queue.
func (q *sentinelQueue) find(ctx context.Context, _ semaphoreID) (*queueServer, error) {
	primary, certain := q.known()
	if certain {
		return primary, nil
	}
	if err := q.discovery.wait(ctx); err != nil {
		return nil, fmt.Errorf("queue Redis %s: %w", q.address, err)
	}
	primary, _ = q.known()
	return primary, nil
}

// primaries implements queue.
func (q *sentinelQueue) primaries(ctx context.Context) ([]*queueServer, error) {
	primary, err := q.find(ctx, semaphoreID{})
	return []*queueServer{primary}, err
}

// known returns the primary, if it is known, and whether it need not be looked up first.
func (q *sentinelQueue) known() (primary *queueServer, certain bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	certain = q.primary != nil && !q.doubted
	watch := q.watchful || time.Since(q.checked) < sentinelsSettle
	if certain && watch && time.Since(q.asked) > sentinelsAskedEvery {
		q.discovery.start()
	}
	return q.primary, certain
}

// failed implements queue.
func (q *sentinelQueue) failed(server *queueServer, _ semaphoreID, err error) {
	q.discovery.noteFailed(err)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.doubted = q.doubted || server == q.primary
}

// at implements queue; there are no redirections here.
func (q *sentinelQueue) at(string) *queueServer {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.primary
}

// close implements queue.
func (q *sentinelQueue) close() error {
	q.discovery.close()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.primary == nil {
		return nil
	}
	return q.primary.close()
}

// look asks the Sentinels, and the server that they name whether it is a primary. While that one does not answer, it goes on asking
// them: they may find out that it is gone.
func (q *sentinelQueue) look(ctx context.Context, note func(error)) error {
	q.mu.Lock()
	q.asked = time.Now()
	known, doubted, epoch := "", q.doubted, q.epoch
	if q.primary != nil {
		known = q.primary.address
	}
	q.mu.Unlock()

	checks := newRoleChecks(q.settings)
	for ctx.Err() == nil {
		named, err := q.ask(ctx)
		switch {
		case err != nil && known == "":
			note(err)
			_ = sleep(ctx, lookupPause)
			continue
		case err != nil:
			q.warn(err)
			named = sentinelAnswer{known, epoch}
		}
		// A Sentinel that was cut off for a while may be the only one that answers, and name a primary of before.
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

// sentinelAnswer is what a Sentinel says: the higher the epoch, the newer it is.
type sentinelAnswer struct {
	address string
	epoch   int
}

// ask returns what the best informed of the Sentinels says. Its error says why none has answered.
func (q *sentinelQueue) ask(ctx context.Context) (best sentinelAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, askAgain)
	defer cancel()
	best.epoch = -1
	err = fanOut(ctx, q.address.servers, q.askOne, func(a sentinelAnswer) (enough bool) {
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

func (q *sentinelQueue) askOne(ctx context.Context, sentinel string) (a sentinelAnswer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("asking Sentinel %s: %w", sentinel, err)
		}
	}()
	conn, err := dialRedis(ctx, sentinel, q.settings.ofSentinels(), askAgain)
	if err != nil {
		return a, err
	}
	defer conn.Close()
	known, err := redis.StringMap(conn.DoContext(ctx, "SENTINEL", "MASTER", q.address.name))
	if err != nil {
		return a, err
	}
	if a.epoch, err = strconv.Atoi(known["config-epoch"]); err != nil {
		return a, fmt.Errorf("unexpected answer: %w", err)
	}
	// In a failover that it leads, it names here the new one first.
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

// warn logs that no Sentinel answers, now and then.
func (q *sentinelQueue) warn(err error) {
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
		q.log.Warn("the queue has another primary", "queueRedis", q.address.text, "primary", named.address, "before", q.primary.address)
		_ = q.primary.close()
	}
	q.primary = server
}
