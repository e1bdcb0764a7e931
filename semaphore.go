package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

//go:embed lua/semaphore.lua
var commonSource string

//go:embed lua/acquire.lua
var acquireSource string

//go:embed lua/maintain.lua
var maintainSource string

//go:embed lua/heartbeat.lua
var heartbeatSource string

//go:embed lua/release.lua
var releaseSource string

// scriptKeys is how many keys each script takes: all of a semaphore.
const scriptKeys = 6

var (
	acquireScript   = redis.NewScript(scriptKeys, commonSource+acquireSource)
	maintainScript  = redis.NewScript(scriptKeys, commonSource+maintainSource)
	heartbeatScript = redis.NewScript(scriptKeys, commonSource+heartbeatSource)
	releaseScript   = redis.NewScript(scriptKeys, commonSource+releaseSource)
)

// The statuses that the scripts answer; see their headers.
const (
	statusLate = -1

	acquireFull   = 0
	acquireTaken  = 1
	acquireRepair = 2

	heartbeatRejoined = 0

	releaseDone = 1
	releaseLeft = 2
)

// semaphoreID names a semaphore: a namespace, and the key that its pods share.
type semaphoreID struct{ namespace, key string }

func (id semaphoreID) String() string { return id.namespace + "/" + id.key }

// The keys in Redis. The braces are a Redis Cluster hash tag: all keys of a script lie in one slot.
func (id semaphoreID) queueKey() string    { return "queue/{" + id.String() + "}" }
func (id semaphoreID) inflightKey() string { return "inflight/{" + id.String() + "}" }
func (id semaphoreID) waitersKey() string  { return "waiters/{" + id.String() + "}" }
func (id semaphoreID) seenKey() string     { return "seen/{" + id.String() + "}" }
func (id semaphoreID) namesKey() string    { return "names/{" + id.String() + "}" }
func (id semaphoreID) stateKey() string    { return "state/{" + id.String() + "}" }
func (id semaphoreID) lockKey() string     { return "lock/{" + id.String() + "}" }

// channel is where a waiter is called when a token is free for it.
func (id semaphoreID) channel(token string) string { return id.waitersKey() + "/" + token }

// keys are those of the scripts, in their order.
func (id semaphoreID) keys() []any {
	return []any{id.queueKey(), id.inflightKey(), id.waitersKey(), id.seenKey(), id.namesKey(), id.stateKey()}
}

// semaphores are the counting semaphores in one Redis server.
type semaphores struct {
	address           string
	pool              *redisPool
	clock             serverClock // of that server
	locks             locker
	heartbeatInterval time.Duration
	staleThreshold    time.Duration
	log               *slog.Logger

	mu      sync.Mutex
	repairs map[semaphoreID]*repair  // those that this process does
	watched map[semaphoreID]struct{} // see watch
	strays  time.Time                // until when a command may still come whose connection broke

	background sync.WaitGroup // of repairs, watches, and tokens that are given back
	closing    context.Context
	stop       func()        // ends closing
	releasing  chan struct{} // has room for as many as may be given back at once
}

func newSemaphores(c sharedConfig, locks locker, maxIdle int, log *slog.Logger) *semaphores {
	closing, stop := context.WithCancel(context.Background())
	return &semaphores{
		address:           c.queueRedisAddress,
		pool:              newRedisPool(c.queueRedisAddress, c.redis, maxIdle, redisReadTimeout),
		locks:             locks,
		heartbeatInterval: c.heartbeatInterval,
		staleThreshold:    c.staleThreshold,
		log:               log,
		repairs:           map[semaphoreID]*repair{},
		watched:           map[semaphoreID]struct{}{},
		closing:           closing,
		stop:              stop,
		releasing:         make(chan struct{}, 4),
	}
}

// close waits for what goes on in the background, at most until ctx is done, and closes all connections.
func (s *semaphores) close(ctx context.Context) error {
	s.stop()
	return errors.Join(s.closeLocks(ctx), s.pool.Close())
}

// closeLocks is close for all but the connections to the queue Redis: from now on nothing can be repaired.
func (s *semaphores) closeLocks(ctx context.Context) error {
	done := make(chan error, 1)
	go func() {
		s.background.Wait()
		done <- s.locks.close()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("tokens may have been left to go stale, and locks to expire: %w", ctx.Err())
	}
}

// timeToLive is for how many seconds the keys of a semaphore with holders or waiters outlive their last use.
func (s *semaphores) timeToLive() int {
	return int(max(24*time.Hour, 10*s.staleThreshold) / time.Second)
}

// attemptTimeout is after how long a command that is not answered is asked again, on another connection: two seconds, or half
// of a shorter heartbeat interval, but not less than one. Scripts rely on it; see "back" in semaphore.lua.
func (s *semaphores) attemptTimeout() time.Duration {
	return min(max(s.heartbeatInterval/2, time.Second), 2*time.Second)
}

// errUnanswered is in the error of a command that may have been run, as its answer did not come; errUnreached in that of one that
// was not sent, as the server did not answer the connection.
var (
	errUnanswered = errors.New("no answer")
	errUnreached  = errors.New("no answer to a connection")
)

// run runs a script and returns its status and the rest of its answer. An attempt that is not answered within attemptTimeout is
// repeated on another connection, with twice the time, and one whose connection breaks, after a moment, until ctx is done. Redis
// refuses an attempt that it sees after its time: when run returns, nothing of it is under way any more, but for an attempt whose
// connection broke; see straying. It may return that long after ctx is done.
func (s *semaphores) run(ctx context.Context, script *redis.Script, id semaphoreID, args ...any) (status int, rest []any, err error) {
	late, sent := 0, false
	pause := newBackoff(10*time.Millisecond, 500*time.Millisecond)
	for timeout := s.attemptTimeout(); ; {
		start := time.Now()
		status, rest, err = s.attempt(ctx, timeout, script, id, args)
		sent = sent || errors.Is(err, errUnanswered)
		switch {
		case err == nil && status == statusLate && late < 3: // the answer tells the time
			late++
			continue
		case err == nil && status == statusLate:
			err = fmt.Errorf("queue Redis %s: refused as too late, again and again: its clock jumps, or commands take seconds to arrive", s.address)
		case (errors.Is(err, errUnanswered) || errors.Is(err, errUnreached)) && hasTime(ctx):
			if time.Since(start) >= timeout {
				timeout *= 2
				continue
			}
			if sleep(ctx, pause.next()) == nil {
				continue
			}
		}
		if err != nil && sent && !errors.Is(err, errUnanswered) {
			err = fmt.Errorf("%w (and %w before)", err, errUnanswered)
		}
		return status, rest, err
	}
}

// mayStray notes that a command whose connection broke may still come until its deadline.
func (s *semaphores) mayStray(deadline time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if deadline.After(s.strays) {
		s.strays = deadline
	}
}

// straying is for how long a command may still come to Redis though its connection broke: something between may have closed the one
// and yet send on the other.
func (s *semaphores) straying() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Until(s.strays)
}

// hasTime reports whether ctx leaves the time for another attempt.
func hasTime(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() == nil && (!ok || time.Until(deadline) > 10*time.Millisecond)
}

// attempt runs a script once. It is not cut off by the end of ctx, but takes no more time than ctx has.
func (s *semaphores) attempt(ctx context.Context, timeout time.Duration, script *redis.Script, id semaphoreID, args []any) (int, []any, error) {
	deadline := time.Now().Add(timeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		var network net.Error
		if errors.As(err, &network) && network.Timeout() {
			err = fmt.Errorf("%w: %w", errUnreached, err)
		}
		return 0, nil, fmt.Errorf("connect to queue Redis %s: %w", s.address, err)
	}
	defer conn.Close()
	all := append(id.keys(), s.clock.at(deadline), seconds(s.heartbeatInterval), seconds(s.staleThreshold), s.timeToLive())
	values, err := redis.Values(script.DoContext(ctx, conn, append(all, args...)...))
	var answered redis.Error
	switch {
	case errors.As(err, &answered):
		return 0, nil, fmt.Errorf("queue Redis %s: %w", s.address, err)
	case err != nil:
		if script != releaseScript {
			s.mayStray(deadline)
		}
		return 0, nil, fmt.Errorf("%w of queue Redis %s: %w", errUnanswered, s.address, err)
	}
	var status int
	var micros int64
	if values, err = redis.Scan(values, &status, &micros); err != nil {
		return 0, nil, fmt.Errorf("queue Redis %s: unexpected answer: %w", s.address, err)
	}
	s.clock.observe(micros)
	return status, values, nil
}

// ping asks whether the Redis server answers.
func (s *semaphores) ping(ctx context.Context) error {
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		return fmt.Errorf("connect to queue Redis %s: %w", s.address, err)
	}
	defer conn.Close()
	if _, err := redis.DoContext(conn, ctx, "PING"); err != nil {
		return fmt.Errorf("queue Redis %s: %w", s.address, err)
	}
	return nil
}

// maintain reclaims, refills and trims. newcomer says that the caller was not in line before: it does not wait for tokens that Redis
// may have lost.
func (s *semaphores) maintain(ctx context.Context, id semaphoreID, length int, newcomer bool) error {
	_, rest, err := s.run(ctx, maintainScript, id, length, yesNo(newcomer))
	var reclaimed, refilled, trimmed int
	if err == nil {
		_, err = redis.Scan(rest, &reclaimed, &refilled, &trimmed)
	}
	if err != nil {
		return fmt.Errorf("maintain %s: %w", id, err)
	}
	if reclaimed+refilled+trimmed > 0 {
		s.log.Info("maintained", "namespace", id.namespace, "key", id.key, "length", length,
			"reclaimed", reclaimed, "refilled", refilled, "trimmed", trimmed)
	}
	return nil
}

// yesNo is how the scripts take a yes or no.
func yesNo(yes bool) string {
	if yes {
		return "1"
	}
	return "0"
}

// heartbeat keeps a token in flight, or puts it back there (rejoined) if it had been reclaimed or lost.
func (s *semaphores) heartbeat(ctx context.Context, id semaphoreID, token string) (rejoined bool, err error) {
	status, _, err := s.run(ctx, heartbeatScript, id, token)
	if err != nil {
		return false, fmt.Errorf("heartbeat %s: %w", id, err)
	}
	return status == heartbeatRejoined, nil
}
