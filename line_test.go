package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// First come, first served, and by the event: ten polls would take more than twenty seconds.
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
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("ten waiters were served within %s", took)
	}
}

// Several free tokens call as many waiters.
func TestRefillServesSeveral(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	lost := []string{acquire(t, s, id, 3), acquire(t, s, id, 3)}
	acquire(t, s, id, 3)
	_, first := queueUp(t, context.Background(), s, id, 3, r)
	_, second := queueUp(t, context.Background(), s, id, 3, r)
	third, _ := queueUp(t, t.Context(), s, id, 3, r)
	r.Do(t, "ZREM", id.inflightKey(), lost[0], lost[1])
	wantDone(t, first)
	wantDone(t, second)
	r.WantLine(t, id, third)
	r.WantCounts(t, id, 0, 3)
}

// What is free is kept for those in line; a waiter that is gone blocks nobody.
func TestNobodyOvertakesTheLine(t *testing.T) {
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	s, id := testSemaphores(t, r.Address), freshID()
	holder := acquire(t, s, id, 1)
	first, leave := stand(t, r, s, id, true)
	giveBack(t, s, id, holder)
	r.WantCounts(t, id, 1, 0)

	a := w.admit(t, rig.Review(t, id, 1))
	if want := fmt.Sprintf("no semaphore available: %s has 0 of 1 tokens in use; 1 waiting in line", id); a.Allowed || a.Message != want {
		t.Fatalf("answered %+v, want %s", a, want)
	}
	a2, err := s.runAcquire(context.Background(), id, acquireRequest{uuid.NewString(), 1, joinLine, ""})
	if err != nil || a2.status != acquireFull || a2.place.position != 2 {
		t.Fatalf("got %+v, %v, want to be second", a2, err)
	}
	r.Do(t, "ZREM", id.waitersKey(), r.MustLine(t, id)[1])
	r.WantLine(t, id, first)

	leave() // without a word, as a pod that is killed
	r.Unseen(t, id, first, 15*time.Second)
	w.wantAdmitted(t, id, 1)
	r.WantLine(t, id)
}

// A waiter that does not ask for some seconds is dropped, even if its connection stands.
func TestSilentWaiterIsDropped(t *testing.T) {
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	silent, _ := stand(t, r, s, id, true)
	giveBack(t, s, id, holder)
	wantFullError(t, s, id, 1, 0)
	r.Unseen(t, id, silent, 15*time.Second)
	acquire(t, s, id, 1)
	r.WantLine(t, id)
	if n := r.Do(t, "ZCARD", id.seenKey()); n != int64(0) {
		t.Errorf("%d are still noted as seen", n)
	}
}

// Who was dropped by mistake, or with the data of Redis, finds its place again.
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

// A stale token is reclaimed by those who wait, though nobody asks for admission.
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

// Those at the front of the line ask again when a token goes stale, not some seconds later.
func TestPollsWhenATokenGoesStale(t *testing.T) {
	w := &waiter{length: 2}
	for range 100 {
		at := place{position: 2, staleIn: time.Second}
		if d := w.untilPoll(acquireReply{inUse: 2, place: at}); d < time.Second || d > time.Second+staleJitter {
			t.Errorf("second in line: polls after %s", d)
		}
		at.position = 3
		if d := w.untilPoll(acquireReply{place: at}); d < pollLeast || d > pollMost {
			t.Errorf("third in line: polls after %s", d)
		}
	}
}

// While somebody else has the lock, or the lock server is away, a waiter goes on asking.
func TestWaiterOutlivesTheLock(t *testing.T) {
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
	said := make(chan string, 100)
	done := make(chan error, 1)
	w := newWaiter(s, id, 1)
	w.say = func(text string) { said <- text }
	go func() { done <- w.waitOnly(context.Background()) }()
	rig.Eventually(t, 20*time.Second, func() error {
		if queue, inflight, err := r.Counts(id); queue+inflight != 0 || err != nil {
			t.Fatalf("repaired without the lock: %d, %d, %v", queue, inflight, err)
		}
		if n := locks.CommandCalls(t)["set"]; n < 3 {
			return fmt.Errorf("the lock was tried %d times", n)
		}
		return nil
	})
	locks.Stop()
	rig.Eventually(t, 20*time.Second, func() error {
		select {
		case text := <-said:
			if strings.Contains(text, "lock Redis "+locks.Address) {
				return nil
			}
			return errors.New(text)
		default:
			return errors.New("nothing said")
		}
	})
	rig.Must(t, locks.Start())
	_ = unlock(context.Background())
	wantDone(t, done)
}

// Over with ctx, wherever it is.
func TestWaitEndsWithItsContext(t *testing.T) {
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	ctx, cancel := context.WithCancel(context.Background())
	_, done := queueUp(t, ctx, s, id, 1, r)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestWaitingText(t *testing.T) {
	for want, c := range map[string]struct {
		length int
		a      acquireReply
	}{
		"waiting for a token of shop/web: 3 of 3 in use, 2nd in line, 41 s":     {3, acquireReply{inUse: 3, place: place{position: 2, waited: 41 * time.Second}}},
		"waiting for a token of shop/web: 0 of 1 in use, 1st in line, 0 s":      {1, acquireReply{inUse: 0, place: place{position: 1}}},
		"waiting for a token of shop/web: 4 of 3 in use, 13th in line, 119 s":   {3, acquireReply{inUse: 4, place: place{position: 13, waited: 119 * time.Second}}},
		"waiting for a token of shop/web: 1 of 1 in use, 23rd in line, 2 min":   {1, acquireReply{inUse: 1, place: place{position: 23, waited: 2 * time.Minute}}},
		"waiting for a token of shop/web: 1 of 1 in use, 101st in line, 26 h":   {1, acquireReply{inUse: 1, place: place{position: 101, waited: 26*time.Hour + time.Minute}}},
		"waiting for a token of shop/web: 1 of 1 in use, 111th in line, 90 min": {1, acquireReply{inUse: 1, place: place{position: 111, waited: 90 * time.Minute}}},
		"waiting for a token of shop/web: 2 of 2 in use, 1st in line, 5 s; in use by web-b (4 h), web-a (11 s)": {2,
			acquireReply{inUse: 2, holders: []holder{{"web-b", 4 * time.Hour}, {"web-a", 11 * time.Second}}, place: place{position: 1, waited: 5 * time.Second}}},
		"waiting for a token of shop/web: 0 of 1 in use, 1st in line, 5 s; Redis was away or has lost data, in 20 s it is known who is gone": {1,
			acquireReply{doubt: 20 * time.Second, place: place{position: 1, waited: 5 * time.Second}}},
	} {
		if got := waitingText(testID, c.length, c.a); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
