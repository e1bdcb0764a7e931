package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// unlockTimeout bounds the freeing of a lock, which nobody waits for.
	unlockTimeout = 3 * time.Second

	// lockPatience is for how long lock servers that do not answer are tried again.
	lockPatience = 2 * time.Second

	// lockRetryLeast and lockRetryMost bound the wait for somebody else's maintenance.
	lockRetryLeast = 5 * time.Millisecond
	lockRetryMost  = 25 * time.Millisecond
)

// fullError says that all tokens are in use.
type fullError struct {
	id            semaphoreID
	inUse, length int
}

func (e *fullError) Error() string {
	return fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", e.id, e.inUse, e.length)
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
			if last == nil {
				last = fmt.Errorf("acquire %s: it is being repaired all the time", id)
			}
			return "", fmt.Errorf("%w (%w)", last, context.Cause(ctx))
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
