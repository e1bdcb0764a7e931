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
	"github.com/google/uuid"
)

//go:embed lua/line.lua
var lineSource string

//go:embed lua/acquire.lua
var acquireSource string

//go:embed lua/maintain.lua
var maintainSource string

//go:embed lua/heartbeat.lua
var heartbeatSource string

//go:embed lua/release.lua
var releaseSource string

// The scripts. The heartbeat takes the queue and the inflight key, the others all keys.
var (
	acquireScript   = redis.NewScript(4, lineSource+acquireSource)
	maintainScript  = redis.NewScript(4, lineSource+maintainSource)
	heartbeatScript = redis.NewScript(2, heartbeatSource)
	releaseScript   = redis.NewScript(4, lineSource+releaseSource)
)

// What the scripts answer; see their headers.
const (
	acquireFull     = 0
	acquireTaken    = 1
	acquireMaintain = 2

	heartbeatRejoined = 0

	releaseDone = 1
	releaseLeft = 2
)

// waiterPatience is for how long a waiter keeps its place without asking again. It is more than two polls.
const waiterPatience = 10 * time.Second

// abandonAfter is how long an acquire may be on its way before nobody waits for its answer any more, not even to give the
// token back. It is the longest time-out that the API server has for a webhook.
const abandonAfter = 30 * time.Second

// semaphoreID names a semaphore: a namespace, and the key that its pods share.
type semaphoreID struct{ namespace, key string }

func (id semaphoreID) String() string { return id.namespace + "/" + id.key }

// The keys in Redis. The braces are a Redis Cluster hash tag: all keys of a script lie in one slot.
func (id semaphoreID) queueKey() string    { return "queue/{" + id.String() + "}" }
func (id semaphoreID) inflightKey() string { return "inflight/{" + id.String() + "}" }
func (id semaphoreID) waitersKey() string  { return "waiters/{" + id.String() + "}" }
func (id semaphoreID) seenKey() string     { return "seen/{" + id.String() + "}" }
func (id semaphoreID) lockKey() string     { return "lock/{" + id.String() + "}" }

// channel is where a waiter is called when a token is free for it.
func (id semaphoreID) channel(token string) string { return id.waitersKey() + "/" + token }

// with puts the keys that the scripts take before their arguments.
func (id semaphoreID) with(args ...any) []any {
	return append([]any{id.queueKey(), id.inflightKey(), id.waitersKey(), id.seenKey()}, args...)
}

// errLockTaken is what a locker answers when somebody else holds the lock.
var errLockTaken = errors.New("lock taken")

// locker is a distributed lock.
type locker interface {
	// tryLock tries once to take the named lock, which frees itself after expiration. Its errors are
	// errLockTaken, if somebody else holds the lock, or that the lock servers are out of reach, or ctx's.
	// An attempt that fails leaves nothing behind. unlock frees the lock if it is still held.
	tryLock(ctx context.Context, name string, expiration time.Duration) (unlock func(context.Context) error, err error)
	close() error
}

// serverErrors are the errors of several servers, on one line.
type serverErrors []error

func (e serverErrors) Unwrap() []error { return e }

func (e serverErrors) Error() string {
	var texts []string
	for _, err := range e {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

// unanswered is the error of an attempt that was given up before the lock servers had answered.
func unanswered(kind string, addresses []string, cause error) error {
	var errs serverErrors
	for _, a := range addresses {
		errs = append(errs, fmt.Errorf("lock %s %s: no answer yet: %w", kind, a, cause))
	}
	return errs
}

// newLocker makes the lock of the chosen mode; maxIdle is how many connections to each Redis server are kept.
func newLocker(c sharedConfig, maxIdle int) locker {
	if c.lockMode == lockModeEtcd {
		return newEtcdLock(c.etcdAddresses, c.etcd)
	}
	return newRedlock(c.redisAddresses, c.redis, maxIdle)
}

// semaphores are the counting semaphores in one Redis server.
type semaphores struct {
	address        string
	pool           *redis.Pool
	locks          locker
	staleThreshold time.Duration
	log            *slog.Logger

	heartbeatInterval time.Duration
	outage            outage

	// repairs are the semaphores that this process is repairing.
	mu      sync.Mutex
	repairs map[semaphoreID]*repairing

	// background are acquires that nobody waits for and the releases of what they took.
	background sync.WaitGroup
}

func newSemaphores(c sharedConfig, locks locker, maxIdle int, log *slog.Logger) *semaphores {
	return &semaphores{
		address:        c.queueRedisAddress,
		pool:           newRedisPool(c.queueRedisAddress, c.redis, maxIdle, abandonAfter),
		locks:          locks,
		staleThreshold: c.staleThreshold,

		heartbeatInterval: c.heartbeatInterval,
		log:               log,
		repairs:           map[semaphoreID]*repairing{},
	}
}

// close waits for what goes on in the background, at most until ctx is done, and closes all connections.
func (s *semaphores) close(ctx context.Context) error {
	return errors.Join(s.closeLocks(ctx), s.pool.Close())
}

// closeLocks is close for all but the connections to the queue Redis: from now on nothing can be acquired.
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

// timeToLive is how long unused keys are kept: a day, or ten stale thresholds if that is longer.
func (s *semaphores) timeToLive() int {
	return int(max(24*time.Hour, 10*s.staleThreshold) / time.Second)
}

// outage is what is known of the last time that Redis was out of reach. The tokens in flight could not be kept alive then: they
// are not stale before their holders had the time to come back.
type outage struct {
	mu     sync.Mutex
	since  time.Time     // the first attempt that failed, if the last one did
	lasted time.Duration // how long the last outage was
	until  time.Time     // when all holders should be back
}

// note notes the outcome of an attempt. Holders try again at least every holderRetry.
func (o *outage) note(start time.Time, err error, heartbeatInterval time.Duration) {
	if errors.Is(err, context.Canceled) { // nobody wanted to know
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() {
		o.since = start
	}
	if err != nil {
		return
	}
	if lasted := time.Since(o.since); lasted > 2*holderRetry {
		o.lasted, o.until = lasted, time.Now().Add(heartbeatInterval+2*holderRetry)
	}
	o.since = time.Time{}
}

// threshold is the stale threshold, and after an outage that much more.
func (s *semaphores) threshold() time.Duration {
	s.outage.mu.Lock()
	defer s.outage.mu.Unlock()
	if time.Now().Before(s.outage.until) {
		return s.staleThreshold + s.outage.lasted.Round(time.Second)
	}
	return s.staleThreshold
}

// ping asks whether the Redis server answers.
func (s *semaphores) ping(ctx context.Context) error {
	_, err := s.do(ctx, func(c redis.Conn) (any, error) { return redis.DoContext(c, ctx, "PING") })
	return err
}

// do runs a command on a connection of its own and names the server in its error.
func (s *semaphores) do(ctx context.Context, command func(redis.Conn) (any, error)) (any, error) {
	start := time.Now()
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		s.outage.note(start, err, s.heartbeatInterval)
		return nil, fmt.Errorf("connect to queue Redis %s: %w", s.address, err)
	}
	defer conn.Close()
	reply, err := command(conn)
	s.outage.note(start, err, s.heartbeatInterval)
	if err != nil {
		return nil, fmt.Errorf("queue Redis %s: %w", s.address, err)
	}
	return reply, nil
}

// maintain reclaims, refills and trims, with so many fresh tokens.
func (s *semaphores) maintain(ctx context.Context, id semaphoreID, length, missing int) error {
	args := id.with(length, seconds(s.threshold()), s.timeToLive())
	for range missing {
		args = append(args, uuid.NewString())
	}
	counts, err := redis.Ints(s.do(ctx, func(c redis.Conn) (any, error) { return maintainScript.DoContext(ctx, c, args...) }))
	if err != nil {
		return fmt.Errorf("maintain %s: %w", id, err)
	}
	if len(counts) != 3 {
		return fmt.Errorf("maintain %s: answered %d counts", id, len(counts))
	}
	s.log.Info("maintained", "namespace", id.namespace, "key", id.key, "length", length,
		"reclaimed", counts[0], "refilled", counts[1], "trimmed", counts[2])
	return nil
}

// heartbeat keeps a token in flight, or puts it back there (rejoined) if it had been reclaimed or lost.
func (s *semaphores) heartbeat(ctx context.Context, id semaphoreID, token string) (rejoined bool, err error) {
	status, err := redis.Int(s.do(ctx, func(c redis.Conn) (any, error) {
		return heartbeatScript.DoContext(ctx, c, id.queueKey(), id.inflightKey(), token, s.timeToLive())
	}))
	if err != nil {
		return false, fmt.Errorf("heartbeat %s: %w", id, err)
	}
	return status == heartbeatRejoined, nil
}

// release gives a token back, under the name fresh, or leaves the line of those who wait; status is releaseDone, releaseLeft,
// or zero if there was nothing to do. To retry, call it with the same names.
func (s *semaphores) release(ctx context.Context, id semaphoreID, token, fresh string) (status int, err error) {
	status, err = redis.Int(s.do(ctx, func(c redis.Conn) (any, error) {
		return releaseScript.DoContext(ctx, c, id.with(token, fresh, s.timeToLive())...)
	}))
	if err != nil {
		return 0, fmt.Errorf("release %s: %w", id, err)
	}
	return status, nil
}

// releaseWithin releases a token and retries until it is released or ctx is done; then the error is that of the
// last attempt.
func (s *semaphores) releaseWithin(ctx context.Context, id semaphoreID, token string) (status int, err error) {
	fresh := uuid.NewString()
	for retry := newBackoff(50*time.Millisecond, time.Second); ; {
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		status, err = s.release(attempt, id, token, fresh)
		cancel()
		if err == nil {
			return status, nil
		}
		if sleep(ctx, retry.next()) != nil {
			return 0, err
		}
		s.log.Warn("release failed, to be retried", "namespace", id.namespace, "key", id.key, "token", token, "error", err.Error())
	}
}

// giveBack releases a token that nobody will use.
func (s *semaphores) giveBack(id semaphoreID, token string) {
	ctx, cancel := context.WithTimeout(context.Background(), abandonAfter)
	defer cancel()
	log := s.log.With("namespace", id.namespace, "key", id.key, "token", token)
	if _, err := s.releaseWithin(ctx, id, token); err != nil {
		log.Error("unused token left to go stale", "staleThreshold", s.staleThreshold.String(), "error", err.Error())
		return
	}
	log.Info("unused token given back")
}

// giveBackLater is giveBack in the background; close waits for it.
func (s *semaphores) giveBackLater(id semaphoreID, token string) {
	s.background.Go(func() { s.giveBack(id, token) })
}
