package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
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

	// lockPatience is how long an acquire retries after lock servers have failed. An attempt
	// may take longer than that, on a starved node or during an election of etcd.
	lockPatience = 4 * time.Second

	// lockRetryLeast and lockRetryMost bound the pause while another process repairs.
	lockRetryLeast = 5 * time.Millisecond
	lockRetryMost  = 25 * time.Millisecond

	// doubtEvery is the time between two repairs of a semaphore whose holders may be gone,
	// unless half an interval is shorter. Redis would take lineQuiet for another silence. See
	// repairAfterDoubt.
	doubtEvery = lineQuiet - time.Second

	// doubtPatience is how long these repairs are retried while they fail: a failover of Redis
	// or of the lock servers ends sooner.
	doubtPatience = 2 * time.Minute
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
	occupancy
	place place // of a waiter
}

// occupancy is how a semaphore is used, as the scripts tell it to those that have to wait.
type occupancy struct {
	inUse, waiters int
	length         int      // that counts for the caller
	holders        []holder // some of them
	setting        setting
	holds          holds

	// doubt is not zero after a start, an outage or a data loss of Redis: only after this
	// time does Redis know which holders or waiters are gone.
	doubt time.Duration
}

// parseOccupancy parses what occupancy in semaphore.lua returns. rest is what follows it.
func parseOccupancy(list []any) (o occupancy, rest []any, err error) {
	var doubt int
	var holders, set []any
	var holds string
	rest, err = redis.Scan(list, &o.inUse, &o.waiters, &o.length, &doubt, &holders, &set, &holds)
	if err == nil {
		o.holders, err = parseHolders(holders)
	}
	if err == nil {
		o.setting, err = parseSetting(set)
	}
	o.doubt, o.holds = time.Duration(doubt)*time.Second, parseHolds(holds)
	return o, rest, err
}

// startsIn estimates when the pod at a position in line starts. It is not ok where too little
// is known.
func (o occupancy) startsIn(position, tokens int) (wait time.Duration, ok bool) {
	if o.doubt > 0 {
		return 0, false
	}
	var known usedTokens
	for _, h := range o.holders {
		known.add(h.held, h.tokens)
	}
	return o.holds.forecast(known, o.inUse).startsIn(o.length, position-1, tokens)
}

// holds are how long the last pods of a semaphore had their tokens, in order of length.
type holds []time.Duration

// holdsLeast is the number of holds from which the program draws conclusions.
const holdsLeast = 5

// The number of holds that the scripts keep, and their codes; see addHold in semaphore.lua.
const (
	holdsMost           = 64
	holdFirst, holdLast = 33, 126
	holdStep            = 0.16
)

// parseHolds parses what the scripts keep of the last holds, to about 8 %. It leaves out
// what another client may have written.
func parseHolds(text string) (h holds) {
	for _, code := range []byte(text[max(0, len(text)-holdsMost):]) {
		if holdFirst <= code && code <= holdLast {
			h = append(h, time.Duration(math.Exp(float64(code-holdFirst)*holdStep)*float64(time.Second)))
		}
	}
	slices.Sort(h)
	return h
}

// mean returns the mean of the holds.
func (h holds) mean() time.Duration {
	var sum time.Duration
	for _, d := range h {
		sum += d
	}
	return sum / time.Duration(max(1, len(h)))
}

// ninth returns the time that nine of ten holds do not exceed; there must be some.
func (h holds) ninth() time.Duration { return h[(9*len(h)+9)/10-1] }

// usedTokens are some of the tokens in use.
type usedTokens struct {
	pods, tokens int
	ages         []time.Duration // for each token of a pod of which it is known, how long the pod has had it
}

// add adds the tokens of a pod. Another client may have written any number of tokens.
func (u *usedTokens) add(held time.Duration, tokens int) {
	tokens = max(1, min(tokens, maxTokens))
	u.pods, u.tokens = u.pods+1, u.tokens+tokens
	if held != heldUnknown {
		u.ages = append(u.ages, slices.Repeat([]time.Duration{held}, tokens)...)
	}
}

// forecast says when tokens come free.
type forecast struct {
	left []time.Duration // in order: how long some tokens in use may still be held, all as likely; empty: not known
	used int             // all tokens in use
	each float64         // tokens that a holder has, in the mean
	mean time.Duration   // for which a pod has its tokens
	lag  float64         // of the pods that take a token one after the other: 1/2 if all have it for one time; 0 if by chance
}

// agesMost bounds the work of a forecast, and forecastMost what it may say.
const (
	agesMost     = 20
	forecastMost = 365 * 24 * time.Hour
)

// forecast makes a forecast from what is known of the tokens in use. What is left of each is
// taken from the holds that are longer than its age. If there is none, it is half of that.
func (h holds) forecast(known usedTokens, used int) (f forecast) {
	if len(h) < holdsLeast {
		return f
	}
	ages := known.ages
	slices.Sort(ages)
	for n := min(agesMost, len(ages)); len(f.left) < n*len(h); {
		age := ages[len(f.left)/len(h)*len(ages)/n]
		longer := h[sort.Search(len(h), func(i int) bool { return h[i] > age }):]
		for i := range h { // as many for each age
			left := age / 2
			if len(longer) > 0 {
				left = longer[i*len(longer)/len(h)] - age
			}
			f.left = append(f.left, left)
		}
	}
	slices.Sort(f.left)
	f.used, f.mean, f.each = used, h.mean(), float64(known.tokens)/float64(max(1, known.pods))
	spread := 0.0
	for _, d := range h {
		spread += math.Pow(float64(d-f.mean)/float64(f.mean), 2) / float64(len(h))
	}
	f.lag = max(0, 1-spread) / 2
	return f
}

// freed estimates how many tokens have come free after a time, if a pod takes each of them,
// and not more than length are in use.
func (f forecast) freed(after time.Duration, length int) (n float64) {
	again := min(1, float64(length)/float64(f.used))
	for _, left := range f.left {
		if left > after {
			break
		}
		n += 1 + again*max(0, float64(after-left)/float64(f.mean)-f.lag)
	}
	return n * float64(f.used) / float64(len(f.left))
}

// startsIn estimates when a pod starts that has some pods before it in line. Each of them is
// taken to need as many tokens as a holder has. It is ok as freeIn.
func (f forecast) startsIn(length, before, tokens int) (wait time.Duration, ok bool) {
	each := max(1, min(f.each, float64(length)))
	return f.freeIn(length, int(math.Round(float64(before)*each))+max(1, tokens))
}

// freeIn estimates when the last of the next tokens comes free, if the pods in line take
// those before it. It is not ok where too little is known, or if so many are free.
func (f forecast) freeIn(length, tokens int) (wait time.Duration, ok bool) {
	most := f.used - length + tokens
	if len(f.left) == 0 || length <= 0 || most <= 0 {
		return 0, false
	}
	least, wait := time.Duration(0), f.mean
	for range 60 { // each halves the error, once it is bounded
		switch {
		case wait > forecastMost:
			return 0, false
		case f.freed(wait, length) < float64(most)-0.5:
			least, wait = wait, 2*wait
		case wait-least < time.Second/10:
			return wait, true
		default:
			if middle := (least + wait) / 2; f.freed(middle, length) < float64(most)-0.5 {
				least = middle
			} else {
				wait = middle
			}
		}
	}
	return wait, true
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
		var waited, freeIn, reachable int
		a.occupancy, rest, err = parseOccupancy(rest)
		if err == nil && len(rest) > 0 {
			_, err = redis.Scan(rest, &a.place.position, &a.place.arrival, &waited, &freeIn, &reachable, &a.place.ahead)
		}
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
	id     semaphoreID
	length int
	occupancy
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
	var lockFailed time.Time // when the lock servers failed first, after they answered last
	var last error           // why the repair is not done yet
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
			return "", 0, &fullError{id, length, a.occupancy}
		}
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
			lockFailed = time.Time{}
		case errors.As(err, &unlocked): // the lock servers may be back in a moment
			if lockFailed.IsZero() {
				lockFailed = time.Now()
			}
			if time.Since(lockFailed) > lockPatience {
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
// dead holder would ever be reclaimed. If Redis or this process hangs meanwhile, the doubt
// begins anew.
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
		last := time.Now() // Redis had a command since
		over := last.Add(doubt)
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
			began := time.Now()
			err := s.repair(ctx, id, length, expiration, false)
			cancel()
			now = time.Now()
			if err != nil { // if the lock is taken, too: it may be one that was left to expire
				if now.Sub(last) > doubtPatience {
					s.log.Warn("tokens of dead holders may stay in use until the next admission",
						"namespace", id.namespace, "key", id.key, "error", err.Error())
					return
				}
				if now.After(over) { // repair once more, at least
					over = now
				}
				continue
			}
			if now.Sub(last) > min(lineQuiet, s.timing().lateAfter()) { // Redis may have seen a silence
				over = now.Add(max(doubt, s.timing().lateAfter()+time.Second))
			}
			last = began
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
