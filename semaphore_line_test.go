package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// A pause makes Redis forget nothing: when it ends, a pod that came meanwhile gets a
// token at once, even if no command had come for long before the pause.
func TestPauseOfAnIdleSemaphore(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	giveBack(t, s, id, acquire(t, s, id, 2))
	r.Shift(t, id, -10*time.Minute)
	_, _, err := s.setOverride(t.Context(), id, override{note: "upgrade"}, time.Minute)
	rig.Must(t, err)
	w := newWaiter(s, id, 2)
	_, a, err := w.acquireOnce(t.Context(), joinLine)
	if text := waitingText(id, 2, 1, waitEnd{}, a); err != nil || a.status != acquireFull || !strings.Contains(text, "paused until ") ||
		!strings.Contains(text, ": upgrade; 0 in use, 1st in line") {
		t.Fatalf("got %s, %v", text, err)
	}
	_, _, err = s.clearOverride(t.Context(), id)
	rig.Must(t, err)
	if _, a, err = w.acquireOnce(t.Context(), a.place.arrival); err != nil || a.status != acquireTaken {
		t.Errorf("after the pause: got %+v, %v", a, err)
	}
}

// A pod that does not wait gets the token that the line leaves to it, though the free
// ones are kept for the line.
func TestTokenBeyondTheLine(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	tokens := []string{acquire(t, s, id, 3), acquire(t, s, id, 3), acquire(t, s, id, 3)}
	for range 3 {
		_, a, err := newWaiter(s, id, 1).acquireOnce(t.Context(), joinLine)
		if err != nil || a.status != acquireFull {
			t.Fatalf("got %+v, %v", a, err)
		}
	}
	giveBack(t, s, id, tokens[0])
	giveBack(t, s, id, tokens[1]) // kept for the first and the second, once a length is lent to them
	acquire(t, s, id, 5)
	wantFullError(t, s, id, 5, 2)
}

// Waiters are served in order and by wake-ups: ten polls would take more than twenty
// seconds.
func TestLineIsServedInOrder(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	var tokens []string
	var done []<-chan error
	for range 10 {
		token, d := queueUp(t, context.Background(), s, id, 1, r)
		tokens, done = append(tokens, token), append(done, d)
	}
	start := time.Now()
	for i, token := range tokens {
		giveBack(t, s, id, holder)
		wantDone(t, done[i])
		r.WantInflight(t, id, token)
		r.WantLine(t, id, tokens[i+1:]...)
		holder = token
	}
	rig.WantWithin(t, time.Since(start), 10*time.Second, "serving ten waiters")
}

// A free token is kept for the line. A waiter that is gone blocks no pod.
func TestNobodyOvertakesTheLine(t *testing.T) {
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	s, id := testSemaphores(t, r.Address), freshID()
	holder := acquire(t, s, id, 1)
	first, leave := standInLine(t, r, s, id, true)
	giveBack(t, s, id, holder)
	r.WantCounts(t, id, 1, 0)

	a := w.admit(t, rig.Review(t, id, 1))
	want := fmt.Sprintf("no semaphore available: %s has 0 of 1 tokens in use; 1 waiting in line", id)
	if a.Allowed || a.Message != want {
		t.Fatalf("got %+v, want %s", a, want)
	}
	a2, err := s.runAcquire(context.Background(), id, acquireRequest{token: uuid.NewString(), length: 1, arrival: joinLine})
	if err != nil || a2.status != acquireFull || a2.place.position != 2 {
		t.Fatalf("got %+v, %v, want the second place", a2, err)
	}
	r.Do(t, "ZREM", id.waitersKey(), r.MustLine(t, id)[1])
	r.WantLine(t, id, first)

	leave() // without a release, like a killed pod
	r.Unseen(t, id, first, linePatience+time.Second)
	w.wantAdmitted(t, id, 1)
	r.WantLine(t, id)
}

// A gate that does not know yet that a pod gave up puts it in line again. When it asks for
// the pod, Redis takes the pod out, and calls the pod that it has held back.
func TestPodThatGaveUpCallsTheNext(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	gaveUp := acquireRequest{token: "gave-up", length: 1, arrival: joinLine, wait: waitEnd{time.Minute, whenWaitedFail}}
	place := []placeRequest{{gaveUp.token, 1, 0, 1, 1, "", gaveUp.wait}}
	keep := func() {
		t.Helper()
		_, err := s.refreshPlaces(t.Context(), id, 0, nil, place)
		rig.Must(t, err)
	}
	ask := func() {
		t.Helper()
		if a, err := s.runAcquire(t.Context(), id, gaveUp); err != nil || a.status != acquireGaveUp {
			t.Fatalf("the pod was answered %+v, %v", a, err)
		}
	}
	keep()
	ask()
	_, err := s.runAcquire(t.Context(), id, acquireRequest{token: "next", length: 1, arrival: joinLine})
	rig.Must(t, err)
	called, woken := make(calls, 10), newSubscription(s.queue, id, slog.New(slog.DiscardHandler))
	woken.add(called, id, "next")
	go woken.receiveRetrying(t.Context())
	<-called // the subscription
	keep()
	giveBack(t, s, id, holder)
	ask()
	select {
	case token := <-called:
		if token != "next" {
			t.Errorf("called %q", token)
		}
	case <-time.After(10 * time.Second):
		t.Error("the next pod was not called")
	}
	ask()
	keep()
	giveBack(t, s, id, gaveUp.token)
	rig.Must(t, gaveUpNote(r, id, gaveUp.token, false))
}

// Redis knows of the last thousand pods that gave up.
func TestNotesOfPodsThatGaveUpAreBounded(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	r.Do(t, "HSET", id.stateKey(), "gaveUp", 999)
	r.Do(t, "HSET", id.namesKey(), "gaveUp/0", "old", "old/gaveUp", "60 gaveUp/0")
	place := []placeRequest{{"new", 1, 0, 1, 1, "", waitEnd{time.Minute, whenWaitedFail}}}
	_, err := s.refreshPlaces(t.Context(), id, 0, nil, place)
	rig.Must(t, err)
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: "new", length: 1, arrival: joinLine, wait: place[0].ends})
	if err != nil || a.status != acquireGaveUp {
		t.Fatalf("got %+v, %v", a, err)
	}
	rig.Must(t, gaveUpNote(r, id, "old", false))
	rig.Must(t, gaveUpNote(r, id, "new", true))
}

// calls receives the events of a subscription: "" for wake, else the token.
type calls chan string

func (c calls) wake()                  { c <- "" }
func (c calls) tokenFree(token string) { c <- token }

// Redis drops a waiter that does not poll for some seconds, even if its connection is
// open.
func TestSilentWaiterIsDropped(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	silent, _ := standInLine(t, r, s, id, true)
	giveBack(t, s, id, holder)
	wantFullError(t, s, id, 1, 0)
	r.Unseen(t, id, silent, linePatience+time.Second)
	acquire(t, s, id, 1)
	r.WantLine(t, id)
	if n := r.Do(t, "ZCARD", id.seenKey()); n != int64(0) {
		t.Errorf("%d waiters are still in the set of times seen", n)
	}
}

// wantPassed gives a token back while first, which does not ask, is the first in line. The
// second must get it. first keeps its place, and is the first again when it asks.
func wantPassed(t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, holder, first string) {
	t.Helper()
	second, done := queueUp(t, t.Context(), s, id, 1, r)
	third, _ := queueUp(t, t.Context(), s, id, 1, r)
	start := time.Now()
	giveBack(t, s, id, holder)
	wantDone(t, done)
	rig.WantWithin(t, time.Since(start), 5*time.Second, "a token for the second in line")
	r.WantLine(t, id, first, third)
	if a, err := s.runAcquire(t.Context(), id, acquireRequest{token: first, length: 1, arrival: joinLine}); err != nil ||
		a.status != acquireFull || a.place.position != 1 {
		t.Errorf("got %+v, %v, want the first place", a, err)
	}
	giveBack(t, s, id, second)
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: first, length: 1, arrival: joinLine})
	if err != nil || a.status != acquireTaken {
		t.Errorf("got %+v, %v, want a token for the pod that was passed", a, err)
	}
}

// Others pass a waiter that has not asked for some seconds, even if its connection is
// open.
func TestSilentWaiterIsPassed(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	first, _ := standInLine(t, r, s, id, true)
	r.Unseen(t, id, first, linePass+time.Second)
	wantPassed(t, r, s, id, holder, first)
}

// Others pass a waiter whose connections are closed as soon as it misses its call.
func TestUnheardWaiterIsPassed(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	first, leave := standInLine(t, r, s, id, true)
	leave()
	start := time.Now()
	wantPassed(t, r, s, id, holder, first)
	rig.WantWithin(t, time.Since(start), time.Second, "the turn of the second in line")
}

// More waiters than Redis looks at once have died. The next gets its token all the same.
func TestManyUnheardWaitersArePassed(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	seedLine(t, r, s, id, 1, 250, 0)
	first, _ := standInLine(t, r, s, id, false) // notes the reign
	r.Do(t, "EVAL", `local time = redis.call('TIME')
	for _, token in ipairs(redis.call('ZRANGE', KEYS[1], 0, 249)) do
		redis.call('HSET', KEYS[2], token, '+1')
		redis.call('ZADD', KEYS[3], time[1] + time[2] / 1000000, token)
	end`, 3, id.waitersKey(), id.namesKey(), id.seenKey())
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: first, length: 1, arrival: joinLine})
	if err != nil || a.status != acquireTaken {
		t.Errorf("got %+v, %v, want a token", a, err)
	}
}

// After a restart of Redis, waiters have yet to subscribe. None is passed for that.
func TestNoWaiterIsPassedAfterARestart(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	holder := acquire(t, s, id, 1)
	first, _ := standInLine(t, r, s, id, true)
	second, _ := standInLine(t, r, s, id, true)
	r.Stop()
	rig.Must(t, r.Start())
	giveBack(t, s, id, holder)
	for i, token := range []string{second, first} {
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token: token, length: 1, arrival: joinLine})
		if want := []int{acquireFull, acquireTaken}[i]; err != nil || a.status != want {
			t.Errorf("got %+v, %v, want status %d", a, err, want)
		}
	}
}

// A waiter that was dropped by mistake, or lost with the data of Redis, returns to its
// place.
func TestPlaceInLineIsKept(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	holder := acquire(t, s, id, 1)
	first, firstDone := queueUp(t, context.Background(), s, id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	third, _ := queueUp(t, t.Context(), s, id, 1, r)
	r.Do(t, "ZREM", id.waitersKey(), first)
	r.WantLine(t, id, first, second, third)
	r.Do(t, "DEL", id.waitersKey(), id.seenKey(), id.namesKey())
	r.WantLine(t, id, first, second, third)
	r.Stop()
	rig.Must(t, r.Start())
	r.Do(t, "DEL", id.waitersKey(), id.seenKey(), id.namesKey())
	r.WantLine(t, id, first, second, third)
	giveBack(t, s, id, holder)
	wantDone(t, firstDone)
	r.WantLine(t, id, second, third)
}

// A waiter with a head start stands before those that came up to so long before it, and
// behind those with the same head start. One that was moved to the front stays there. All
// places are the same after a loss of data.
func TestHeadStartInLine(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	holder := acquire(t, s, id, 1)
	done := map[string]<-chan error{}
	wait := func(headStart time.Duration) string {
		w := newWaiter(s, id, 1)
		w.headStart = headStart
		done[w.token] = w.start(t, t.Context())
		r.WantLineLength(t, id, len(done))
		return w.token
	}
	loseLine := func() { r.Do(t, "DEL", id.waitersKey(), id.seenKey(), id.namesKey()) }
	a, b, c, d := wait(0), wait(600*time.Second), wait(0), wait(600*time.Second)
	r.WantLine(t, id, b, d, a, c)
	loseLine()
	r.WantLine(t, id, b, d, a, c)
	old := acquireRequest{token: uuid.NewString(), length: 1, arrival: fmt.Sprint(r.Now(t)-700) + "000000"}
	rig.Must(t, errOf(s.runAcquire(t.Context(), id, old)))
	r.WantLine(t, id, old.token, b, d, a, c)
	rig.Must(t, errOf(s.release(t.Context(), id, old.token, "")))

	for _, want := range []bool{true, true, false} { // again, it changes nothing
		token := c
		if !want {
			token = old.token
		}
		if ok, err := s.moveFirst(t.Context(), id, token); ok != want || err != nil {
			t.Errorf("got %t, %v, want %t", ok, err, want)
		}
		r.WantLine(t, id, c, b, d, a)
	}
	r.Do(t, "ZREM", id.seenKey(), c)
	rig.Eventually(t, 20*time.Second, func() error { return errOf(redis.Float64(r.Do(t, "ZSCORE", id.seenKey(), c), nil)) })
	loseLine()
	r.WantLine(t, id, c, b, d, a)
	for _, token := range []string{c, b, d} {
		giveBack(t, s, id, holder)
		wantDone(t, done[token])
		holder = token
	}
	r.WantLine(t, id, a)
}

// Waiters reclaim a stale token, even without new admissions.
func TestWaitersReclaim(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token, done := queueUp(t, context.Background(), s, id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	r.MakeStale(t, id, holder)
	wantDone(t, done)
	r.WantInflight(t, id, token)
	r.WantLine(t, id, second)
}

// Waiters at the front of the line poll when a token goes stale, not some seconds later.
// While more are in use than the length, so many have to go stale.
func TestPollsWhenATokenGoesStale(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	var holders []string
	for range 5 {
		holders = append(holders, acquire(t, s, id, 5))
	}
	ask := func(token string) time.Duration {
		t.Helper()
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token: token, length: 3, arrival: joinLine})
		rig.Must(t, err)
		if a.status != acquireFull {
			t.Fatalf("got %+v, want a place in line", a)
		}
		return a.place.freeIn
	}
	line := []string{uuid.NewString(), uuid.NewString(), uuid.NewString(), uuid.NewString()}
	for _, token := range line {
		ask(token)
	}
	for stale, holder := range holders[:3] {
		r.Do(t, "ZADD", id.inflightKey(), r.Now(t)-seconds(s.staleThreshold)+10, holder)
		want := s.staleThreshold
		if stale == 2 {
			want = 11 * time.Second
		}
		if d := ask(line[2]); d < want-5*time.Second || d > want+time.Second {
			t.Errorf("with %d that go stale in 10 s, the third in line may have a token in %s", stale+1, d)
		}
		if stale < 2 {
			r.MakeStale(t, id, holder)
			ask(line[2]) // nothing to repair: as many as the length are left
		}
	}
	if d := ask(line[3]); d != pollMost {
		t.Errorf("the fourth in line asks again in %s", d)
	}
	for range 100 {
		at := place{position: 2, freeIn: time.Second}
		if d := untilPoll(acquireReply{place: at}); d < time.Second || d > time.Second+freeJitter {
			t.Errorf("the second in line polls after %s", d)
		}
		at.freeIn = pollMost
		if d := untilPoll(acquireReply{place: at}); d < pollLeast || d > pollMost {
			t.Errorf("the third in line polls after %s", d)
		}
	}
}

// While another process has the lock, or the lock server is down, a waiter keeps polling.
func TestWaiterPollsWithoutTheLock(t *testing.T) {
	t.Parallel()
	locks := rig.StartRedis(t)
	r := rig.CommonRedis(t)
	c := testConfig(r.Address)
	c.redisAddresses = []string{locks.Address}
	s := newSemaphores(c.settings, newLocker(c.settings, lockConnections), 1, slog.New(slog.DiscardHandler))
	defer s.close(context.Background())
	id := freshID()
	unlock, err := s.locks.tryLock(context.Background(), id.lockKey(), time.Minute)
	rig.Must(t, err)
	reports := make(chan string, 100)
	done := make(chan error, 1)
	w := newWaiter(s, id, 1)
	w.report = func(text string) { reports <- text }
	go func() { done <- w.waitOnly(context.Background()) }()
	rig.Eventually(t, 20*time.Second, func() error {
		if queue, inflight, err := r.Counts(id); queue+inflight != 0 || err != nil {
			t.Fatalf("repaired without the lock: %d, %d, %v", queue, inflight, err)
		}
		if n := locks.CommandCalls(t)["set"]; n < 3 {
			return fmt.Errorf("%d attempts to take the lock, want 3", n)
		}
		return nil
	})
	locks.Stop()
	rig.Eventually(t, 20*time.Second, func() error {
		select {
		case text := <-reports:
			if strings.Contains(text, "lock Redis "+locks.Address) {
				return nil
			}
			return errors.New(text)
		default:
			return errors.New("nothing reported")
		}
	})
	rig.Must(t, locks.Start())
	_ = unlock(context.Background())
	wantDone(t, done)
}

// A waiter ends with its context, in whichever state it is.
func TestWaitEndsWithItsContext(t *testing.T) {
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	ctx, cancel := context.WithCancel(context.Background())
	_, done := queueUp(t, ctx, s, id, 1, r)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context canceled", err)
	}
}

func TestWaitingText(t *testing.T) {
	for want, c := range map[string]struct {
		length int
		a      acquireReply
	}{
		"waiting for a token of shop/web: 3 of 3 in use, 2nd in line, 41 s": {3,
			acquireReply{occupancy: occupancy{inUse: 3}, place: place{position: 2, waited: 41 * time.Second}}},
		"waiting for a token of shop/web: 0 of 1 in use, 1st in line, 0 s": {1,
			acquireReply{occupancy: occupancy{inUse: 0}, place: place{position: 1}}},
		"waiting for a token of shop/web: 4 of 3 in use, 13th in line, 119 s": {3,
			acquireReply{occupancy: occupancy{inUse: 4}, place: place{position: 13, waited: 119 * time.Second}}},
		"waiting for a token of shop/web: 1 of 1 in use, 23rd in line, 2 min": {1,
			acquireReply{occupancy: occupancy{inUse: 1}, place: place{position: 23, waited: 2 * time.Minute}}},
		"waiting for a token of shop/web: 1 of 1 in use, 101st in line, 26 h": {1,
			acquireReply{occupancy: occupancy{inUse: 1}, place: place{position: 101, waited: 26*time.Hour + time.Minute}}},
		"waiting for a token of shop/web: 1 of 1 in use, 111th in line, 90 min": {1,
			acquireReply{occupancy: occupancy{inUse: 1}, place: place{position: 111, waited: 90 * time.Minute}}},
		"waiting for a token of shop/web: 2 of 2 in use, 1st in line, 5 s; in use by web-b (4 h), web-a (11 s)": {2,
			acquireReply{occupancy: occupancy{inUse: 2,
				holders: []holder{{name: "web-b", held: 4 * time.Hour}, {name: "web-a", held: 11 * time.Second}}},
				place: place{position: 1, waited: 5 * time.Second}}},
		"waiting for a token of shop/web: 0 of 1 in use, 1st in line, 5 s; " +
			"Redis has just started, was away or has lost data: in 20 s it knows which holders are gone": {1,
			acquireReply{occupancy: occupancy{doubt: 20 * time.Second}, place: place{position: 1, waited: 5 * time.Second}}},
	} {
		if got := waitingText(testID, c.length, 1, waitEnd{}, c.a); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// quickRecoveryLine is a semaphore whose holders rejoin, or count as gone, within
// seconds.
func quickRecoveryLine(t *testing.T) *lineUp {
	t.Helper()
	r, s, id := newSemaphore(t)
	s.heartbeatInterval = time.Second
	return &lineUp{r: r, s: s, id: id}
}

// beat sends a heartbeat for a holder that Redis reclaimed or lost. The token must
// rejoin, and leave the line.
func (l *lineUp) beat(t *testing.T, token string) {
	t.Helper()
	rejoined, err := l.s.heartbeat(context.Background(), l.id, token, "", "", 0, 1)
	rig.Must(t, err)
	if !rejoined {
		t.Fatalf("%s was in flight before the heartbeat", token)
	}
	if slices.Contains(l.r.MustLine(t, l.id), token) {
		t.Errorf("%s is in flight and in line", token)
	}
}

// wantNoOvertaking fails if a new pod gets a token. It tries a pod that does not wait,
// and one that joins the line.
func (l *lineUp) wantNoOvertaking(t *testing.T, length int) {
	t.Helper()
	token, _, err := l.s.acquire(context.Background(), l.id, "", length, limit{}, 10*time.Second)
	var full *fullError
	if !errors.As(err, &full) {
		t.Fatalf("a pod that does not wait got token %q, %v; %d holders, %d in line",
			token, err, len(l.holding), len(l.waiting))
	}
	l.join(t, length)
}

// wantDrainedWithoutOvertaking is wantDrained while new pods come, as many as later.
func (l *lineUp) wantDrainedWithoutOvertaking(t *testing.T, length, later int) {
	t.Helper()
	for l.wantServed(t); len(l.holding) > 0; l.wantServed(t) {
		if later > 0 {
			later--
			l.wantNoOvertaking(t, length)
		}
		l.giveBack(t)
	}
	if len(l.waiting) > 0 {
		t.Errorf("%d pods still wait", len(l.waiting))
	}
}

// backup has the dumps of a semaphore's keys.
type backup map[string][]byte

func (l *lineUp) backup(t *testing.T) backup {
	t.Helper()
	b := backup{}
	for _, key := range l.id.keys() {
		dump, err := redis.Bytes(l.r.Control.Do("DUMP", key))
		if !errors.Is(err, redis.ErrNil) {
			rig.Must(t, err)
			b[key.(string)] = dump
		}
	}
	return b
}

// restore sets the keys back, as if Redis had lost its last writes.
func (l *lineUp) restore(t *testing.T, b backup) {
	t.Helper()
	rig.Must(t, l.r.Control.Send("MULTI"))
	rig.Must(t, l.r.Control.Send("DEL", l.id.keys()...))
	for key, dump := range b {
		rig.Must(t, l.r.Control.Send("RESTORE", key, 0, dump))
	}
	l.r.Do(t, "EXEC")
}

// With one token too many in flight, for any reason, the line keeps its order and is
// still served.
func TestOneTooManyInFlightKeepsTheOrder(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		length  int // of the waiters
		disturb func(t *testing.T, l *lineUp)
	}{
		"a holder comes back late": {2, func(t *testing.T, l *lineUp) {
			late := l.holding[0]
			l.r.MakeStale(t, l.id, late.token)
			p := l.waiting[0]
			wantDone(t, p.done)
			l.waiting, l.holding = l.waiting[1:], append(l.holding[1:], p, late)
			l.beat(t, late.token)
		}},
		"Redis has lost all": {2, func(t *testing.T, l *lineUp) {
			var tokens []string
			rig.Eventually(t, 20*time.Second, func() error { // until no pod in line asks before both
				l.r.Do(t, "DEL", l.id.keys()...)
				tokens = nil
				for range 2 { // the first acquires cannot know of the loss
					token, _, err := l.s.acquire(t.Context(), l.id, "", 2, limit{}, 10*time.Second)
					if err != nil {
						return err
					}
					tokens = append(tokens, token)
				}
				return nil
			})
			for _, token := range tokens {
				l.holding = append(l.holding, linePod{token: token, length: 2})
			}
			for _, p := range l.holding[:2] {
				l.beat(t, p.token)
			}
		}},
		"the length was lowered": {1, func(*testing.T, *lineUp) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := quickRecoveryLine(t)
			l.hold(t, 2)
			l.hold(t, 2)
			l.join(t, c.length, c.length, c.length, c.length)
			c.disturb(t, l)
			l.wantState(t)
			l.wantDrainedWithoutOvertaking(t, c.length, 3)
		})
	}
}

// rollBack serves the first in line, then undoes that in Redis. It returns the holder.
func (l *lineUp) rollBack(t *testing.T, waiting ...int) (holder linePod) {
	t.Helper()
	former := acquire(t, l.s, l.id, 1)
	token, unsubscribe := standInLine(t, l.r, l.s, l.id, true)
	l.join(t, waiting...)
	giveBack(t, l.s, l.id, former)
	b := l.backup(t)
	a, err := l.s.runAcquire(t.Context(), l.id, acquireRequest{token: token, length: 1, arrival: joinLine})
	rig.Must(t, err)
	if a.status != acquireTaken {
		t.Fatalf("the first in line got %+v", a)
	}
	unsubscribe()
	l.restore(t, b)
	wantFullError(t, l.s, l.id, 1, 0) // the free token is kept for the line
	return linePod{token: token, length: 1}
}

// Redis loses its last writes, a taken token among them. Its holder rejoins and leaves
// the line, so it keeps no second token from the others.
func TestRolledBackTake(t *testing.T) {
	t.Parallel()
	for name, disturb := range map[string]func(t *testing.T, l *lineUp){
		"and that it was given back before": func(t *testing.T, l *lineUp) {
			l.hold(t, 1)
			l.join(t, 1, 1, 1)
			former, b := l.holding[0], l.backup(t)
			l.giveBack(t)
			l.wantServed(t)
			l.restore(t, b)
			l.beat(t, l.holding[0].token)
			l.holding = append(l.holding, former)
		},
		"nothing else": func(t *testing.T, l *lineUp) {
			holder, next := l.rollBack(t, 1, 1, 1), l.waiting[0]
			l.beat(t, holder.token)
			l.holding = append(l.holding, holder)
			if slices.Contains(l.r.Inflight(t, l.id), next.token) { // it asked between the two
				wantDone(t, next.done)
				l.holding, l.waiting = append(l.holding, next), l.waiting[1:]
			}
		},
		"and another was served before the holder was back": func(t *testing.T, l *lineUp) {
			holder, next := l.rollBack(t, 1, 1, 1), l.waiting[0]
			l.r.Unseen(t, l.id, holder.token, linePatience+time.Second)
			wantDone(t, next.done)
			l.beat(t, holder.token)
			l.holding, l.waiting = []linePod{next, holder}, l.waiting[1:]
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := quickRecoveryLine(t)
			disturb(t, l)
			l.wantState(t)
			l.wantDrainedWithoutOvertaking(t, 1, 2)
		})
	}
}

// After Redis lost all data, new pods do not take the tokens of live holders, even before
// all waiters are back.
func TestNewPodsAfterALossOfData(t *testing.T) {
	t.Parallel()
	l := quickRecoveryLine(t)
	l.s.heartbeatInterval = 30 * time.Second
	l.hold(t, 1)
	l.join(t, 1, 1, 1)
	l.r.Do(t, "DEL", l.id.keys()...)
	rig.Eventually(t, 20*time.Second, func() error {
		if len(l.r.MustLine(t, l.id)) == 0 {
			return errors.New("no waiter is back in line")
		}
		return nil
	})
	wantFullError(t, l.s, l.id, 1, 0)
	a, err := l.s.runAcquire(t.Context(), l.id, acquireRequest{token: uuid.NewString(), length: 1, arrival: joinLine})
	rig.Must(t, err)
	if a.status != acquireFull {
		t.Errorf("a later waiter got %+v", a)
	}
}

// standing has the times of a pod that stood in line and got its token. Between admitted
// and ended, and between back and gone, its token is certainly in use.
type standing struct{ came, inLine, asked, admitted, ended, back, gone time.Time }

// holdsAll reports whether the token is in use all the time between two times.
func (s standing) holdsAll(from, to time.Time) bool {
	return s.admitted.Before(from) && s.ended.After(to) || s.back.Before(from) && s.gone.After(to)
}

// Some pods are paused until their tokens are reclaimed, and come back late. No pod that
// came after another stood in line gets its token before that one.
func TestNobodyOvertakesWhilePodsArePaused(t *testing.T) {
	t.Parallel()
	const length, pods, over = 3, 14, 15 * time.Second
	r, _, id := newSemaphore(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	var all []standing
	var rounds, late atomic.Int64
	pod := func(s *semaphores) error {
		var inLine time.Time
		w := newWaiter(s, id, length)
		w.report = func(text string) { // its place, or an error
			if inLine.IsZero() && strings.HasPrefix(text, "waiting for a token") {
				inLine = time.Now()
			}
		}
		came := time.Now()
		asked, _, err := w.wait(ctx)
		if err != nil {
			return err
		}
		stood := standing{came: came, inLine: inLine, asked: asked, admitted: time.Now()}
		defer func() {
			mu.Lock()
			defer mu.Unlock()
			all = append(all, stood)
		}()
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
		stood.ended = time.Now()
		if rounds.Add(1)%10 == 0 {
			if err := r.TryMakeStale(id, w.token); err != nil {
				return err
			}
			if err := sleep(ctx, pollMost+time.Second); err != nil {
				return err
			}
			rejoined, err := s.heartbeat(ctx, id, w.token, "", "", 0, 1)
			if err != nil {
				return err
			}
			stood.back = time.Now()
			if rejoined {
				late.Add(1)
			}
			if err := sleep(ctx, 200*time.Millisecond); err != nil {
				return err
			}
			stood.gone = time.Now()
		}
		_, err = s.release(ctx, id, w.token, "")
		return err
	}
	var wg sync.WaitGroup
	end := time.Now().Add(over)
	for range pods {
		s := testSemaphores(t, r.Address)
		wg.Go(func() {
			for time.Now().Before(end) {
				if err := pod(s); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	overtaken := 0
	var longest time.Duration
	for _, first := range all {
		longest = max(longest, first.admitted.Sub(first.came))
		if first.inLine.IsZero() {
			continue
		}
		for _, second := range all {
			if second.came.Before(first.inLine) || second.admitted.After(first.asked) {
				continue
			}
			inUse := 1 // with the second's
			for _, other := range all {
				if other.holdsAll(second.asked, second.admitted) {
					inUse++
				}
			}
			if inUse >= length { // it left none to the first
				overtaken++
			}
		}
	}
	t.Logf("%d pods, %d back late, the longest wait was %s", len(all), late.Load(), longest)
	if overtaken > 0 || late.Load() == 0 {
		t.Errorf("overtaken %d times, with %d pods back late", overtaken, late.Load())
	}
}

// measuredLine runs the commands whose cost is measured, on a semaphore with a line.
type measuredLine struct {
	r  *rig.Redis
	s  *semaphores
	id semaphoreID
}

// at returns the token of a waiter by its index in line: 0 is the first, -1 the last.
func (a measuredLine) at(t *testing.T, place int) string {
	t.Helper()
	tokens, err := redis.Strings(a.r.Do(t, "ZRANGE", a.id.waitersKey(), place, place), nil)
	rig.Must(t, err)
	return tokens[0]
}

// poll sends the poll of the waiter at an index in line.
func (a measuredLine) poll(t *testing.T, place int) {
	t.Helper()
	token := a.at(t, place)
	arrival, err := redis.String(a.r.Do(t, "ZSCORE", a.id.waitersKey(), token), nil)
	rig.Must(t, err)
	a.ask(t, token, arrival)
}

func (a measuredLine) ask(t *testing.T, token, arrival string) {
	t.Helper()
	_, err := a.s.runAcquire(t.Context(), a.id, acquireRequest{token: token, length: maxLength, arrival: arrival})
	rig.Must(t, err)
}

// A command costs the same in a line of ten and in one of ten thousand. No command wakes
// all waiters with a free token, and none drops all waiters that are gone.
func TestCostOfALongLine(t *testing.T) {
	t.Parallel()
	const free, short, long, rounds = 5_000, 10, 10_000, 5
	r, s, _ := newSemaphoreOn(t, rig.StartRedis(t))
	for _, line := range []struct {
		name          string
		silent        time.Duration
		called, ratio int
	}{
		{"alive", 0, 16 + 1, 20}, // 16 waiters, and the check of the polling waiter's own subscription
		{"gone", linePatience + time.Second, 16 + 1, 60},
	} {
		many := measuredLine{r, s, freshID()}
		seedLine(t, r, s, many.id, free, long, line.silent)
		for _, c := range []struct {
			name string
			do   func(t *testing.T, a measuredLine)
		}{
			{"the last polls", func(t *testing.T, a measuredLine) { a.poll(t, -1) }},
			{"the fifth polls", func(t *testing.T, a measuredLine) { a.poll(t, 4) }},
			{"the first takes its token", func(t *testing.T, a measuredLine) { a.poll(t, 0) }},
			{"another joins", func(t *testing.T, a measuredLine) { a.ask(t, uuid.NewString(), joinLine) }},
			{"an admission", func(t *testing.T, a measuredLine) { a.ask(t, uuid.NewString(), "") }},
			{"the last leaves", func(t *testing.T, a measuredLine) { giveBack(t, s, a.id, a.at(t, -1)) }},
			{"a repair", func(t *testing.T, a measuredLine) { maintain(t, s, a.id, maxLength) }},
			{"a holder comes back late", func(t *testing.T, a measuredLine) {
				_, err := s.heartbeat(context.Background(), a.id, uuid.NewString(), "", "", 0, 1)
				rig.Must(t, err)
			}},
		} {
			t.Run(c.name+", those in line are "+line.name, func(t *testing.T) {
				var few, lots, published []int
				for range rounds { // alternately, so that other load disturbs both alike
					a := measuredLine{r, s, freshID()}
					seedLine(t, r, s, a.id, short/2, short, line.silent)
					few = append(few, costDuring(t, r, func() { c.do(t, a) }).micros)

					r.AllUnseen(t, many.id, line.silent)
					cost := costDuring(t, r, func() { c.do(t, many) })
					lots = append(lots, cost.micros)
					published = append(published, cost.published)
				}
				if n := median(published); n > line.called { // includes the occasional publishes of Sentinels
					t.Errorf("published %d messages, want at most %d", n, line.called)
				}
				t.Logf("%d µs with %d in line, %d µs with %d", median(few), short, median(lots), long)
				if rig.Timed && median(lots) > line.ratio*median(few) {
					t.Errorf("%d µs with %d in line, %d µs with %d: more than %d times as much",
						median(few), short, median(lots), long, line.ratio)
				}
			})
		}
	}
}

// In a long line, all waiters with a free token still get it in order: each that takes
// its token wakes the next.
func TestLongLineIsServedInAChain(t *testing.T) {
	t.Parallel()
	const free, waiting = 300, 600
	r, s, id := newSemaphore(t)
	tokens := seedLine(t, r, s, id, free, waiting, 0)
	conn, err := dialRedis(t.Context(), r.Address, redisSettings{}, time.Minute)
	rig.Must(t, err)
	defer conn.Close()
	calls := redis.PubSubConn{Conn: conn}
	pattern := strings.NewReplacer("{", `\{`, "}", `\}`).Replace(id.channel("*"))
	rig.Must(t, calls.PSubscribe(pattern)) // on behalf of all waiters
	if _, ok := calls.Receive().(redis.Subscription); !ok {
		t.Fatal("not subscribed")
	}

	last := acquireRequest{token: uuid.NewString(), length: maxLength, arrival: joinLine}
	a, err := s.runAcquire(t.Context(), id, last) // wakes the first waiters
	rig.Must(t, err)
	if a.status != acquireFull || a.place.position != waiting+1 {
		t.Fatalf("got %+v, want the last place", a)
	}
	// On a starved machine, Redis may seem to have been away. The last in line asks again then,
	// as waiters do, but too seldom for a line without a chain.
	go func() {
		for sleep(t.Context(), 5*time.Second) == nil {
			_, _ = s.runAcquire(t.Context(), id, last)
		}
	}()
	var served []string
	holds := map[string]bool{}
	begun := time.Now()
	for len(served) < free {
		if time.Since(begun) > 2*time.Minute {
			t.Fatalf("%d were served in two minutes", len(served))
		}
		m, ok := calls.ReceiveWithTimeout(time.Minute).(redis.Message)
		if !ok {
			t.Fatalf("no more wake-ups after %d served", len(served))
		}
		token := strings.TrimPrefix(m.Channel, id.channel(""))
		if string(m.Data) != yourTurn || holds[token] { // several holders woke the same waiter
			continue
		}
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token: token, length: maxLength, arrival: joinLine})
		rig.Must(t, err)
		if a.status != acquireTaken {
			t.Fatalf("number %d was woken, and got %+v", len(served)+1, a)
		}
		holds[token] = true
		served = append(served, token)
		if len(served)%20 == 0 { // keeps the waiters from being dropped as silent
			r.AllUnseen(t, id, 0)
		}
	}
	if !slices.Equal(served, tokens[:free]) {
		t.Error("the waiters were not served in order")
	}
	r.WantCounts(t, id, 0, free)
	if got := r.MustLine(t, id); len(got) != waiting-free+1 || !slices.Equal(got[:len(got)-1], tokens[free:]) {
		t.Error("the remaining waiters lost their places")
	}
}
