package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

const (
	// unlockTimeout bounds an unlock. It runs in the background.
	unlockTimeout = 3 * time.Second

	// repairTimeout bounds a repair (lock and script), and before it the wait for a slot.
	repairTimeout = 10 * time.Second

	// lockPatience is how long an acquire retries lock servers that do not answer.
	lockPatience = 4 * time.Second

	// lockRetryLeast and lockRetryMost bound the pause while another process repairs.
	lockRetryLeast = 5 * time.Millisecond
	lockRetryMost  = 25 * time.Millisecond

	// doubtEvery is the time between two repairs of a semaphore whose holders may be gone,
	// unless half an interval is shorter. Redis would take lineQuiet for another silence. See
	// repairAfterDoubt.
	doubtEvery = lineQuiet - time.Second
)

// acquireRequest has the arguments of the acquire script.
type acquireRequest struct {
	token   string // the name of the new token; it is used once only, so that a retry is safe
	length  int
	tokens  int    // that it needs, all or none; zero is one
	arrival string // empty: does not wait; joinLine: joins the line; else the arrival of the last reply
	ahead   int64  // microseconds that its place is before its arrival: first its head start, then as in the last reply
	pod     podName
	takenAs string // the name under which the webhook took the token for this pod, or empty

	unstarted time.Duration // after this time, the token is stale if no pod confirms it; zero: the stale threshold
	limit     limit         // that the caller knows, in case that Redis has lost it
	wait      waitEnd       // of a waiter
}

// joinLine is the arrival of a waiter that joins the line now.
const joinLine = "0"

// acquireReply is the reply of the acquire script.
type acquireReply struct {
	status int // acquireTaken, acquireRepair, acquireFull or acquireGaveUp

	// With acquireTaken:
	agreed int  // the greatest length that others asked for lately, or 0
	beyond bool // the token is beyond the length, as the wait was over

	// With acquireRepair:
	stale    int  // the number of stale tokens; if it is 0, tokens are missing
	newcomer bool // see maintain

	// With acquireFull or acquireGaveUp:
	inUse   int
	waiters int
	holders []holder // some of them
	setting setting
	place   place // of a waiter

	// doubt is not zero after a start, an outage or a data loss of Redis: only after this
	// time does Redis know which holders or waiters are gone.
	doubt time.Duration
}

// place is where a waiter stands.
type place struct {
	position  int           // 1 for the first
	arrival   string        // when it joined; goes into its next request
	ahead     int64         // microseconds that its place is before that; goes into its next request
	waited    time.Duration // since its arrival
	freeIn    time.Duration // until a token may come free for it: one goes stale, or others are passed
	reachable bool          // Redis delivered a message to its subscription
}

// wish is what a pod asks for, as the scripts take it: LENGTH, or LENGTH*TOKENS.
func wish(length, tokens int) string {
	if tokens > 1 {
		return fmt.Sprintf("%d*%d", length, tokens)
	}
	return strconv.Itoa(length)
}

// parseWish parses what the scripts keep of a waiter: its wish, with a sign. The length is
// 0 if it is no wish.
func parseWish(text string) (length, tokens int) {
	asks, needs, several := strings.Cut(strings.TrimLeft(text, "+-"), "*")
	length, _ = parseDigits(asks)
	tokens, _ = parseDigits(needs)
	if !several || tokens < 1 || tokens > maxTokens {
		tokens = 1
	}
	return length, tokens
}

// runAcquire runs the acquire script once.
func (s *semaphores) runAcquire(ctx context.Context, id semaphoreID, q acquireRequest) (acquireReply, error) {
	unstarted := ""
	if q.unstarted > 0 {
		unstarted = strconv.Itoa(seconds(q.unstarted))
	}
	wait, then := "", ""
	if q.wait.after > 0 {
		wait, then = strconv.Itoa(seconds(q.wait.after)), q.wait.then
	}
	status, rest, err := s.run(ctx, acquireScript, id, wish(q.length, q.tokens), q.token, q.arrival, q.pod, q.takenAs, unstarted,
		q.limit, q.ahead, wait, then)
	if err != nil {
		return acquireReply{}, fmt.Errorf("acquire %s: %w", id, err)
	}
	a, err := parseReply(status, rest)
	if err != nil {
		return acquireReply{}, fmt.Errorf("acquire %s: unexpected answer of queue Redis %s: %w", id, s.address, err)
	}
	return a, nil
}

func parseReply(status int, rest []any) (a acquireReply, err error) {
	a.status = status
	switch status {
	case acquireTaken:
		_, err = redis.Scan(rest, &a.agreed, &a.beyond)
	case acquireRepair:
		_, err = redis.Scan(rest, &a.stale, &a.newcomer)
	case acquireFull, acquireGaveUp:
		var doubt, waited, freeIn, reachable int
		var holders, set []any
		rest, err = redis.Scan(rest, &a.inUse, &a.waiters, &doubt, &holders, &set)
		if err == nil {
			a.holders, err = parseHolders(holders)
		}
		if err == nil {
			a.setting, err = parseSetting(set)
		}
		if err == nil && len(rest) > 0 {
			_, err = redis.Scan(rest, &a.place.position, &a.place.arrival, &waited, &freeIn, &reachable, &a.place.ahead)
		}
		a.doubt = time.Duration(doubt) * time.Second
		a.place.waited = time.Duration(waited) * time.Second
		a.place.freeIn = time.Duration(freeIn) * time.Millisecond
		a.place.reachable = reachable == 1
	default:
		err = fmt.Errorf("unknown status %d", status)
	}
	return a, err
}

// fullError says that all tokens are in use or reserved for the line.
type fullError struct {
	id                     semaphoreID
	inUse, length, waiters int
	holders                []holder
	doubt                  time.Duration
	setting                setting
}

func (e *fullError) Error() string {
	return fmt.Sprintf("all tokens of %s are in use, or kept for its line", e.id)
}

// acquire takes a token for a pod that does not wait; pod may be empty. If no pod
// confirms the token within s.unstarted, it is stale. If needed, acquire first repairs
// the semaphore, under a lock that may be held for expiration. set is the limit that the
// caller knows. agreed is the greatest length that others asked for lately, or 0. Its
// errors are *fullError, ctx's, or that Redis or the lock servers are unreachable. With
// an error, no token is held, or it is given back in the background.
func (s *semaphores) acquire(ctx context.Context, id semaphoreID, pod podName, length int, set limit,
	expiration time.Duration) (token string, agreed int, err error) {
	q := acquireRequest{token: uuid.NewString(), length: length, pod: pod, unstarted: s.unstarted, limit: set}
	unsettled := false // an attempt may have taken a token, or may yet take it
	defer func() {
		if err != nil && unsettled {
			s.giveBackLater(id, q.token)
		}
	}()
	var lockFailing time.Time // since when the lock servers fail
	var last error            // why the repair is not done yet
	retry := newBackoff(50*time.Millisecond, 500*time.Millisecond)
	for {
		a, err := s.runAcquire(ctx, id, q)
		if _, stray := s.stray(q.token); stray || errors.Is(err, errUnanswered) {
			unsettled = true
		}
		switch {
		case err != nil:
			if last != nil && !hasTime(ctx) { // says more than err
				err = fmt.Errorf("%w (%w)", last, cmp.Or(context.Cause(ctx), context.DeadlineExceeded))
			}
			return "", 0, err
		case a.status == acquireTaken:
			return q.token, a.agreed, nil
		case a.status == acquireFull:
			if a.doubt > 0 {
				s.repairAfterDoubt(id, length, expiration, a.doubt)
			}
			return "", 0, &fullError{id, a.inUse, length, a.waiters, a.holders, a.doubt, a.setting}
		}
		start := time.Now()
		err = s.repair(ctx, id, length, expiration, a.newcomer)
		var wait time.Duration
		var unlocked *lockError
		switch {
		case err == nil:
			last = fmt.Errorf("acquire %s: other processes kept repairing it", id)
		case ctx.Err() != nil:
			if last == nil || !errors.Is(err, ctx.Err()) {
				last = err
			}
			return "", 0, fmt.Errorf("%w (%w)", last, context.Cause(ctx))
		case errors.Is(err, errLockTaken) || errors.Is(err, errTooMany): // another repair runs, here or elsewhere
			last, wait = err, lockRetryLeast+rand.N(lockRetryMost-lockRetryLeast)
		case errors.As(err, &unlocked): // the lock servers may be back in a moment
			if lockFailing.IsZero() {
				lockFailing = start
			}
			if time.Since(lockFailing) > lockPatience {
				return "", 0, err
			}
			last, wait = err, retry.next()
		default:
			return "", 0, err
		}
		if sleep(ctx, wait) != nil {
			return "", 0, fmt.Errorf("%w (%w)", last, context.Cause(ctx))
		}
	}
}

// lockError says that the lock servers failed, not that the lock is taken.
type lockError struct {
	id  semaphoreID
	err error
}

func (e *lockError) Error() string { return fmt.Sprintf("lock %s: %v", e.id, e.err) }
func (e *lockError) Unwrap() error { return e.err }

// repairStage is what a repair waits for.
type repairStage = atomic.Int32

const (
	repairQueue int32 = iota
	repairSlot
	repairLock
)

// repair repairs a semaphore. If this process repairs it already, repair waits for that.
// The end of ctx does not end the repair. Its errors are errLockTaken, *lockError,
// errTooMany, ctx's, or that Redis is unreachable. For newcomer, see maintain.
func (s *semaphores) repair(ctx context.Context, id semaphoreID, length int, expiration time.Duration,
	newcomer bool) error {
	r := s.repairs.join(id, new(repairStage), func(stage *repairStage) error {
		ctx := context.WithoutCancel(ctx)
		free, err := s.takeRepairSlot(ctx, stage, id)
		if err != nil {
			return err
		}
		defer free()
		return s.repairLocked(ctx, stage, id, length, expiration, newcomer)
	})
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
	}
	switch r.state.Load() {
	case repairSlot:
		return fmt.Errorf("repairs: %w (%w)", errTooMany, context.Cause(ctx))
	case repairLock:
		return &lockError{id, unanswered(s.locks.servers(), context.Cause(ctx))}
	}
	return unanswered([]string{"queue Redis " + s.address.text}, context.Cause(ctx))
}

// takeRepairSlot waits until a repair may begin. The caller must call free at its end.
// Its error is errTooMany.
func (s *semaphores) takeRepairSlot(ctx context.Context, stage *repairStage,
	id semaphoreID) (free func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, repairTimeout)
	defer cancel()
	server, err := s.queue.find(ctx, id)
	if err != nil { // the script retries until the queue is back
		return func() {}, nil
	}
	stage.Store(repairSlot)
	if free, err = server.repairs.take(ctx); err != nil {
		err = fmt.Errorf("repairs: %w", err)
	}
	return free, err
}

// repairLocked takes the lock and repairs the semaphore.
func (s *semaphores) repairLocked(ctx context.Context, stage *repairStage, id semaphoreID, length int,
	expiration time.Duration, newcomer bool) error {
	ctx, cancel := context.WithTimeout(ctx, repairTimeout)
	defer cancel()
	stage.Store(repairLock)
	unlock, err := s.locks.tryLock(ctx, id.lockKey(), expiration)
	s.metrics.lock(err)
	if errors.Is(err, errLockTaken) {
		return fmt.Errorf("%s is held by another; it frees itself %s after it was taken: %w",
			id.lockKey(), expiration, err)
	}
	if err != nil {
		return &lockError{id, err}
	}
	stage.Store(repairQueue)
	taken := time.Now()
	defer s.background.Go(func() { // the pod does not wait for it
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unlockTimeout)
		defer cancel()
		if err := unlock(ctx); err != nil {
			s.log.Warn("lock left to expire", "namespace", id.namespace, "key", id.key, "error", err.Error())
		}
		s.metrics.unlocked(time.Since(taken))
	})
	return s.maintain(ctx, id, length, newcomer)
}

// repairAfterDoubt repairs a semaphore when the doubt is over and live holders are back.
// Until then it repairs often enough that Redis sees no further silence. Otherwise, where
// pods are created seldom, each admission would find a new silence, and no token of a
// dead holder would ever be reclaimed.
func (s *semaphores) repairAfterDoubt(id semaphoreID, length int, expiration, doubt time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.afterDoubt[id]; ok {
		return
	}
	s.afterDoubt[id] = struct{}{}
	s.background.Go(func() {
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.afterDoubt, id)
		}()
		over := time.Now().Add(doubt)
		every := min(doubtEvery, s.heartbeatInterval/2) // Redis takes a longer pause for another silence
		for now := time.Now(); now.Before(over.Add(every)); now = time.Now() {
			pause := every
			if left := over.Sub(now); left > 0 {
				pause = min(every, left)
			}
			select {
			case <-time.After(pause):
			case <-s.closing.Done():
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), repairTimeout)
			err := s.repair(ctx, id, length, expiration, false)
			cancel()
			if errors.Is(err, errTooMany) { // repair once more, at least
				if now := time.Now(); now.After(over) {
					over = now
				}
			} else if err != nil && !errors.Is(err, errLockTaken) {
				s.log.Warn("tokens of dead holders may stay in use until the next admission",
					"namespace", id.namespace, "key", id.key, "error", err.Error())
				return
			}
		}
	})
}

// maintain reclaims, refills and trims. A newcomer was not in line before the last
// silence of Redis: for it, Redis refills without waiting for holders whose tokens it may
// have lost.
func (s *semaphores) maintain(ctx context.Context, id semaphoreID, length int, newcomer bool) error {
	var reclaimed, refilled, trimmed int
	var err error
	for left := 1; left > 0 && err == nil; { // one command reclaims a portion, so that none blocks Redis for long
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

// yesNo encodes a bool for the scripts.
func yesNo(yes bool) string {
	if yes {
		return "1"
	}
	return "0"
}
