package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

//go:embed lua/acquire.lua
var acquireSource string

//go:embed lua/maintain.lua
var maintainSource string

//go:embed lua/heartbeat.lua
var heartbeatSource string

//go:embed lua/release.lua
var releaseSource string

// The scripts; each takes the queue and the inflight key.
var (
	acquireScript   = redis.NewScript(2, acquireSource)
	maintainScript  = redis.NewScript(2, maintainSource)
	heartbeatScript = redis.NewScript(2, heartbeatSource)
	releaseScript   = redis.NewScript(2, releaseSource)
)

// What the scripts answer; see their headers.
const (
	acquireFull     = 0
	acquireTaken    = 1
	acquireMaintain = 2

	heartbeatRejoined = 0
	releaseDone       = 1
)

const (
	// abandonAfter is how long an acquire may be on its way before nobody waits for its answer any more,
	// not even to give the token back. It is the longest time-out that the API server has for a webhook.
	abandonAfter = 30 * time.Second

	// unlockTimeout bounds the freeing of a lock, which nobody waits for.
	unlockTimeout = 3 * time.Second

	// lockPatience is for how long lock servers that do not answer are tried again.
	lockPatience = 2 * time.Second

	// lockRetryLeast and lockRetryMost bound the wait for somebody else's maintenance.
	lockRetryLeast = 5 * time.Millisecond
	lockRetryMost  = 25 * time.Millisecond
)

// semaphoreID names a semaphore: a namespace, and the key that its pods share.
type semaphoreID struct{ namespace, key string }

func (id semaphoreID) String() string { return id.namespace + "/" + id.key }

// The keys in Redis. The braces are a Redis Cluster hash tag: all keys of a script lie in one slot.
func (id semaphoreID) queueKey() string    { return "queue/{" + id.String() + "}" }
func (id semaphoreID) inflightKey() string { return "inflight/{" + id.String() + "}" }
func (id semaphoreID) lockKey() string     { return "lock/{" + id.String() + "}" }

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

// newLocker makes the lock of the chosen mode.
func newLocker(c sharedConfig) locker {
	if c.lockMode == lockModeEtcd {
		return newEtcdLock(c.etcdAddresses, c.etcd)
	}
	return newRedlock(c.redisAddresses, c.redis)
}

// fullError says that all tokens are in use.
type fullError struct {
	id            semaphoreID
	inUse, length int
}

func (e *fullError) Error() string {
	return fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", e.id, e.inUse, e.length)
}

// semaphores are the counting semaphores in one Redis server.
type semaphores struct {
	address        string
	pool           *redis.Pool
	locks          locker // nil where nothing is acquired
	staleThreshold time.Duration
	log            *slog.Logger

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
		log:            log,
		repairs:        map[semaphoreID]*repairing{},
	}
}

// close waits for what goes on in the background, at most until ctx is done, and closes all connections.
func (s *semaphores) close(ctx context.Context) error {
	done := make(chan error, 1)
	go func() {
		s.background.Wait()
		var err error
		if s.locks != nil {
			err = s.locks.close()
		}
		done <- err
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = fmt.Errorf("tokens may have been left to go stale, and locks to expire: %w", ctx.Err())
	}
	return errors.Join(err, s.pool.Close())
}

// timeToLive is how long unused keys are kept: a day, or ten stale thresholds if that is longer.
func (s *semaphores) timeToLive() int {
	return int(max(24*time.Hour, 10*s.staleThreshold) / time.Second)
}

// ping asks whether the Redis server answers.
func (s *semaphores) ping(ctx context.Context) error {
	_, err := s.do(ctx, func(c redis.Conn) (any, error) { return redis.DoContext(c, ctx, "PING") })
	return err
}

// do runs a command on a connection of its own and names the server in its error.
func (s *semaphores) do(ctx context.Context, command func(redis.Conn) (any, error)) (any, error) {
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to queue Redis %s: %w", s.address, err)
	}
	defer conn.Close()
	reply, err := command(conn)
	if err != nil {
		return nil, fmt.Errorf("queue Redis %s: %w", s.address, err)
	}
	return reply, nil
}

// acquire takes a token of a semaphore of that length, and repairs the semaphore before, where needed, under a lock that
// may be held for expiration. Its errors are *fullError, or that Redis or the lock servers are out of reach, or ctx's;
// with an error, no token is held, or is given back in the background.
func (s *semaphores) acquire(ctx context.Context, id semaphoreID, length int, expiration time.Duration) (string, error) {
	var lockFailing time.Time // since when
	var last error            // why the lock was not to be had
	retry := newBackoff(50*time.Millisecond, 500*time.Millisecond)
	for {
		start := time.Now()
		a, err := s.take(ctx, id, length)
		if err == nil && a.missing != nil {
			a, err = s.repairOrWait(ctx, id, length, *a.missing, expiration)
		}
		var wait time.Duration
		var unlocked *lockError
		switch {
		case err != nil && ctx.Err() != nil && last != nil: // tells more than that this attempt was cut off
			return "", fmt.Errorf("%w (%w)", last, context.Cause(ctx))
		case errors.Is(err, errLockTaken): // somebody else is doing our work
			err = fmt.Errorf("%s is held by another; it frees itself %s after it was taken: %w", id.lockKey(), expiration, err)
			last, wait = err, lockRetryLeast+rand.N(lockRetryMost-lockRetryLeast)
		case errors.As(err, &unlocked): // the lock servers may be back in a moment
			if lockFailing.IsZero() {
				lockFailing = start
			}
			if time.Since(lockFailing) > lockPatience {
				return "", err
			}
			last, wait = err, retry.next()
		case err != nil:
			return "", err
		case a.token != "":
			return a.token, nil
		case a.missing == nil:
			return "", &fullError{id, a.inUse, length}
		}
		if sleep(ctx, wait) != nil {
			if err == nil {
				err = fmt.Errorf("acquire %s: it is being repaired all the time", id)
			}
			return "", fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
	}
}

// lockError says that a lock could not be tried.
type lockError struct {
	id  semaphoreID
	err error
	own bool // the caller's context ended
}

func (e *lockError) Error() string { return fmt.Sprintf("lock %s: %v", e.id, e.err) }
func (e *lockError) Unwrap() error { return e.err }

// repairing is a repair that others of this process wait for.
type repairing struct {
	done chan struct{} // closed at its end
	err  error
}

// repairOrWait repairs, unless this process is doing so already: then it waits for the end of that. In that case it answers
// that the lock was not to be had, if that was so, and otherwise that there is something to be repaired: ask again.
func (s *semaphores) repairOrWait(ctx context.Context, id semaphoreID, length, missing int, expiration time.Duration) (acquired, error) {
	s.mu.Lock()
	r, other := s.repairs[id]
	if !other {
		r = &repairing{done: make(chan struct{})}
		s.repairs[id] = r
	}
	s.mu.Unlock()
	if other {
		select {
		case <-r.done:
			var unlocked *lockError
			if errors.Is(r.err, errLockTaken) || errors.As(r.err, &unlocked) && !unlocked.own {
				return acquired{}, r.err
			}
			return acquired{missing: &missing}, nil
		case <-ctx.Done():
			return acquired{}, fmt.Errorf("acquire %s: wait for its repair: %w", id, context.Cause(ctx))
		}
	}
	defer func() {
		s.mu.Lock()
		delete(s.repairs, id)
		s.mu.Unlock()
		close(r.done)
	}()
	var a acquired
	a, r.err = s.repair(ctx, id, length, missing, expiration)
	return a, r.err
}

// acquired is the answer of the acquire script: a token, or how many are missing before one can be taken,
// or that all are in use.
type acquired struct {
	token   string
	missing *int
	inUse   int
}

// take runs the acquire script. The script is not bound to ctx: one that has been sent may be run by a
// server that is merely slow long after ctx is done, and then somebody has to be there to give back the token.
func (s *semaphores) take(ctx context.Context, id semaphoreID, length int) (acquired, error) {
	type outcome struct {
		acquired
		err error
	}
	done := make(chan outcome, 1)
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		return acquired{}, fmt.Errorf("acquire %s: connect to queue Redis %s: %w", id, s.address, err)
	}
	s.background.Go(func() {
		a, err := parseAcquired(acquireScript.Do(conn, id.queueKey(), id.inflightKey(), length, seconds(s.staleThreshold), s.timeToLive()))
		conn.Close() // before the answer, so that the next command finds it in the pool
		done <- outcome{a, err}
	})
	select {
	case o := <-done:
		if o.err != nil {
			return acquired{}, fmt.Errorf("acquire %s: queue Redis %s: %w", id, s.address, o.err)
		}
		return o.acquired, nil
	case <-ctx.Done():
		s.background.Go(func() {
			if o := <-done; o.token != "" {
				s.giveBack(id, o.token)
			}
		})
		return acquired{}, fmt.Errorf("acquire %s: no answer of queue Redis %s: %w", id, s.address, context.Cause(ctx))
	}
}

func parseAcquired(reply any, err error) (acquired, error) {
	values, err := redis.Values(reply, err)
	if err != nil {
		return acquired{}, err
	}
	var status int
	rest, err := redis.Scan(values, &status)
	if err != nil {
		return acquired{}, err
	}
	var a acquired
	switch status {
	case acquireFull:
		_, err = redis.Scan(rest, &a.inUse)
	case acquireTaken:
		_, err = redis.Scan(rest, &a.token)
	case acquireMaintain:
		a.missing = new(int)
		_, err = redis.Scan(rest, a.missing)
	default:
		err = fmt.Errorf("acquire answered status %d", status)
	}
	return a, err
}

// repair maintains under the lock and takes a token before it unlocks: where pods of one key disagree on the
// length, each would otherwise undo the repair of the others before they could use it.
func (s *semaphores) repair(ctx context.Context, id semaphoreID, length, missing int, expiration time.Duration) (acquired, error) {
	unlock, err := s.locks.tryLock(ctx, id.lockKey(), expiration)
	if errors.Is(err, errLockTaken) {
		return acquired{}, err
	}
	if err != nil {
		return acquired{}, &lockError{id, err, ctx.Err() != nil}
	}
	defer s.background.Go(func() { // the pod need not wait for it
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unlockTimeout)
		defer cancel()
		if err := unlock(ctx); err != nil {
			s.log.Warn("lock left to expire", "namespace", id.namespace, "key", id.key, "error", err.Error())
		}
	})
	if err := s.maintain(ctx, id, length, missing); err != nil {
		return acquired{}, err
	}
	return s.take(ctx, id, length)
}

// maintain reclaims, refills and trims, with so many fresh tokens.
func (s *semaphores) maintain(ctx context.Context, id semaphoreID, length, missing int) error {
	args := []any{id.queueKey(), id.inflightKey(), length, seconds(s.staleThreshold), s.timeToLive()}
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

// release gives a token back, under the name fresh; released tells whether it was in flight. To retry, call
// it with the same names.
func (s *semaphores) release(ctx context.Context, id semaphoreID, token, fresh string) (released bool, err error) {
	status, err := redis.Int(s.do(ctx, func(c redis.Conn) (any, error) {
		return releaseScript.DoContext(ctx, c, id.queueKey(), id.inflightKey(), token, fresh, s.timeToLive())
	}))
	if err != nil {
		return false, fmt.Errorf("release %s: %w", id, err)
	}
	return status == releaseDone, nil
}

// releaseWithin releases a token and retries until it is released or ctx is done; then the error is that of the
// last attempt.
func (s *semaphores) releaseWithin(ctx context.Context, id semaphoreID, token string) (released bool, err error) {
	fresh := uuid.NewString()
	for retry := newBackoff(50*time.Millisecond, time.Second); ; {
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		released, err = s.release(attempt, id, token, fresh)
		cancel()
		if err == nil {
			return released, nil
		}
		if sleep(ctx, retry.next()) != nil {
			return false, err
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

func seconds(d time.Duration) int { return int(d / time.Second) }

// sleep waits for d, or until ctx is done, whose error it returns.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// backoff doubles from first to most; each wait is jittered by up to half, so that what failed together does
// not return together.
type backoff struct{ wait, most time.Duration }

func newBackoff(first, most time.Duration) *backoff { return &backoff{first, most} }

func (b *backoff) next() time.Duration {
	wait := b.wait
	b.wait = min(2*b.wait, b.most)
	return wait - rand.N(wait/2+1)
}
