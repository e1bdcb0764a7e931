package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
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

// claim is how somebody asks for a token.
type claim struct {
	token   string // the name that it gets; nobody else ever uses it, so that asking again is safe
	arrival string // empty: does not wait; joinLine: joins the line; else what the last *fullError said
	once    bool   // one attempt, as the caller asks again anyway: errLockTaken, too, is for the caller

	// expectMissing: tokens that are missing are not replaced, but answered with errMissing.
	expectMissing bool
}

// errMissing says that tokens are missing without being stale: Redis has lost them, or the length has been raised.
var errMissing = errors.New("tokens are missing, and whoever may hold them has a heartbeat interval to come back")

// joinLine is the arrival of a waiter that joins the line now.
const joinLine = "0"

// fullError says that all tokens are in use, or are kept for those who wait in line.
type fullError struct {
	id             semaphoreID
	inUse, length  int
	waiters        int // how many wait in line
	ownPlaceInLine     // for who waits
}

// ownPlaceInLine is where a waiter stands.
type ownPlaceInLine struct {
	position int           // 1 for the first
	arrival  string        // when it joined, for its next claim
	waited   time.Duration // since then
	staleIn  time.Duration // when the token in flight that has gone longest without a heartbeat will be stale
	deaf     bool          // it could not be called
}

func (e *fullError) Error() string {
	text := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", e.id, e.inUse, e.length)
	if e.waiters > 0 {
		text += fmt.Sprintf(", and %d waiting in line", e.waiters)
	}
	return text
}

// acquire takes a token of a semaphore of that length, and repairs the semaphore before, where needed, under a lock that
// may be held for expiration. Its errors are those of claim; with an error, no token is held, or is given back in the
// background.
func (s *semaphores) acquire(ctx context.Context, id semaphoreID, length int, expiration time.Duration) (string, error) {
	token := uuid.NewString()
	if err := s.claim(ctx, id, length, expiration, claim{token: token}); err != nil {
		return "", err
	}
	return token, nil
}

// claim is acquire for a token with a name. Its errors are *fullError, or that Redis or the lock servers are out of reach, or
// ctx's; and, where the claim says so, errLockTaken and errMissing.
func (s *semaphores) claim(ctx context.Context, id semaphoreID, length int, expiration time.Duration, c claim) error {
	var lockFailing time.Time // since when
	var last error            // why the lock was not to be had
	retry := newBackoff(50*time.Millisecond, 500*time.Millisecond)
	for {
		start := time.Now()
		a, err := s.take(ctx, id, length, c)
		switch {
		case err != nil || a.missing == nil:
		case c.expectMissing && a.stale == 0:
			return fmt.Errorf("%s: %w", id, errMissing)
		default:
			a, err = s.repairOrWait(ctx, id, length, *a.missing, expiration, c)
		}
		if errors.Is(err, errLockTaken) {
			err = fmt.Errorf("%s is held by another; it frees itself %s after it was taken: %w", id.lockKey(), expiration, err)
		}
		var wait time.Duration
		var unlocked *lockError
		switch {
		case err != nil && ctx.Err() != nil && last != nil: // tells more than that this attempt was cut off
			return fmt.Errorf("%w (%w)", last, context.Cause(ctx))
		case err != nil && c.once:
			return err
		case errors.Is(err, errLockTaken): // somebody else is doing our work
			last, wait = err, lockRetryLeast+rand.N(lockRetryMost-lockRetryLeast)
		case errors.As(err, &unlocked): // the lock servers may be back in a moment
			if lockFailing.IsZero() {
				lockFailing = start
			}
			if time.Since(lockFailing) > lockPatience {
				return err
			}
			last, wait = err, retry.next()
		case err != nil:
			return err
		case a.taken:
			return nil
		case a.full != nil:
			a.full.id, a.full.length = id, length
			return a.full
		}
		if sleep(ctx, wait) != nil {
			if last == nil {
				last = fmt.Errorf("acquire %s: it is being repaired all the time", id)
			}
			return fmt.Errorf("%w (%w)", last, context.Cause(ctx))
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
func (s *semaphores) repairOrWait(ctx context.Context, id semaphoreID, length, missing int, expiration time.Duration, c claim) (acquired, error) {
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
	a, r.err = s.repair(ctx, id, length, missing, expiration, c)
	return a, r.err
}

// acquired is the answer of the acquire script: that the token is taken, or how many are missing before one can be, or that
// all are in use.
type acquired struct {
	taken   bool
	missing *int
	stale   int
	full    *fullError
}

// take runs the acquire script. The script is not bound to ctx: one that has been sent may be run by a
// server that is merely slow long after ctx is done, and then somebody has to be there to give back the token.
func (s *semaphores) take(ctx context.Context, id semaphoreID, length int, c claim) (acquired, error) {
	type outcome struct {
		acquired
		err error
	}
	done := make(chan outcome, 1)
	start := time.Now()
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		s.outage.note(start, err, s.heartbeatInterval)
		return acquired{}, fmt.Errorf("acquire %s: connect to queue Redis %s: %w", id, s.address, err)
	}
	s.background.Go(func() {
		a, err := parseAcquired(acquireScript.Do(conn, id.with(length, seconds(s.threshold()), s.timeToLive(),
			c.token, c.arrival, seconds(waiterPatience))...))
		s.outage.note(start, err, s.heartbeatInterval)
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
			if o := <-done; o.taken {
				s.giveBack(id, c.token)
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
		a.full, err = parseFull(rest)
	case acquireTaken:
		a.taken = true
	case acquireMaintain:
		a.missing = new(int)
		_, err = redis.Scan(rest, a.missing, &a.stale)
	default:
		err = fmt.Errorf("acquire answered status %d", status)
	}
	return a, err
}

func parseFull(values []any) (*fullError, error) {
	full := new(fullError)
	rest, err := redis.Scan(values, &full.inUse, &full.waiters)
	if err != nil || len(rest) == 0 {
		return full, err
	}
	var waited, staleIn, reachable int
	_, err = redis.Scan(rest, &full.position, &full.arrival, &waited, &staleIn, &reachable)
	full.deaf = reachable == 0
	full.waited, full.staleIn = time.Duration(waited)*time.Second, time.Duration(staleIn)*time.Second
	return full, err
}

// repair maintains under the lock and takes a token before it unlocks: where pods of one key disagree on the
// length, each would otherwise undo the repair of the others before they could use it.
func (s *semaphores) repair(ctx context.Context, id semaphoreID, length, missing int, expiration time.Duration, c claim) (acquired, error) {
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
	return s.take(ctx, id, length, c)
}
