package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"strings"
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

//go:embed lua/keep.lua
var keepSource string

//go:embed lua/hold.lua
var holdSource string

// scriptKeys is how many keys each script takes: all of a semaphore.
const scriptKeys = 6

var (
	acquireScript   = newScript("acquire", commonSource, acquireSource)
	maintainScript  = newScript("maintain", commonSource, maintainSource)
	heartbeatScript = newScript("heartbeat", commonSource, heartbeatSource)
	releaseScript   = newScript("release", commonSource, releaseSource)
	keepScript      = newScript("keep", commonSource, keepSource)
	holdScript      = newScript("hold", commonSource, holdSource)
)

// script is one that Redis runs. What is sent is made when it is first wanted: that takes 25 KB of memory, and a sidecar sends two or three.
type script struct {
	name string
	made func() *redis.Script
}

func newScript(name string, sources ...string) *script {
	return &script{name, sync.OnceValue(func() *redis.Script { return redis.NewScript(scriptKeys, strings.Join(sources, "")) })}
}

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

// semaphores are the counting semaphores in a queue.
type semaphores struct {
	address           queueAddress
	queue             queue
	outages           outages
	locks             locker
	heartbeatInterval time.Duration
	staleThreshold    time.Duration
	log               *slog.Logger
	metrics           *metrics // nil for a sidecar

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
		queue:             newQueue(c.queueRedisAddress, c.redis, maxIdle, log),
		locks:             locks,
		heartbeatInterval: c.heartbeatInterval,
		staleThreshold:    c.staleThreshold,
		log:               log,
		repairs:           map[semaphoreID]*repair{},
		watched:           map[semaphoreID]struct{}{},
		closing:           closing,
		outages:           outages{parts: map[int]outage{}},
		stop:              stop,
		releasing:         make(chan struct{}, 4),
	}
}

// close waits for what goes on in the background, at most until ctx is done, and closes all connections.
func (s *semaphores) close(ctx context.Context) error {
	s.stop()
	return errors.Join(s.closeLocks(ctx), s.queue.close())
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

// maintain reclaims, refills and trims. newcomer says that the caller was not in line before: it does not wait for tokens that Redis
// may have lost.
func (s *semaphores) maintain(ctx context.Context, id semaphoreID, length int, newcomer bool) error {
	var reclaimed, refilled, trimmed int
	var err error
	for left := 1; left > 0 && err == nil; { // many stale tokens take more than one command, so that none holds Redis for long
		var rest []any
		var r, f, t int
		if _, rest, err = s.run(ctx, maintainScript, id, length, yesNo(newcomer)); err == nil {
			_, err = redis.Scan(rest, &r, &f, &t, &left)
		}
		reclaimed, refilled, trimmed = reclaimed+r, refilled+f, trimmed+t
	}
	s.metrics.repair(reclaimed, refilled, trimmed)
	if reclaimed+refilled+trimmed > 0 {
		s.log.Info("maintained", "namespace", id.namespace, "key", id.key, "length", length,
			"reclaimed", reclaimed, "refilled", refilled, "trimmed", trimmed)
	}
	if err != nil {
		return fmt.Errorf("maintain %s: %w", id, err)
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

// heartbeat keeps a token in flight, or puts it back there (rejoined) if it had been reclaimed or lost. It tells which pod has it, and
// for how long.
func (s *semaphores) heartbeat(ctx context.Context, id semaphoreID, token string, pod podName, held time.Duration) (rejoined bool, err error) {
	status, _, err := s.run(ctx, heartbeatScript, id, token, pod, seconds(held))
	if err != nil {
		return false, fmt.Errorf("heartbeat %s: %w", id, err)
	}
	return status == heartbeatRejoined, nil
}
