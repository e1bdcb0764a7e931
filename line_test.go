package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// line are the tokens that are waited for, the first in line first.
func (s *redisServer) line(id semaphoreID) ([]string, error) {
	return redis.Strings(s.control.Do("ZRANGE", id.waitersKey(), 0, -1))
}

// wantLine waits until exactly these wait, in this order.
func (s *redisServer) wantLine(t *testing.T, id semaphoreID, want ...string) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		got, err := s.line(id)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("in line are %v, want %v", got, want)
		}
		return err
	})
}

// newWaiter is a waiter of this process, with a token of its own, that says nothing.
func newWaiter(s *semaphores, id semaphoreID, length int) *waiter {
	return &waiter{semaphores: s, id: id, token: uuid.NewString(), length: length, expiration: 10 * time.Second,
		note: func(string) {}, log: slog.New(slog.DiscardHandler)}
}

// waitOnly is wait without what it returns besides the error.
func (w *waiter) waitOnly(ctx context.Context) error {
	_, _, err := w.wait(ctx)
	return err
}

// queueUp starts a waiter in this process and waits until it is in line; the channel has what became of it.
func queueUp(t *testing.T, ctx context.Context, s *semaphores, id semaphoreID, length int, r *redisServer) (token string, done <-chan error) {
	t.Helper()
	before, err := r.line(id)
	must(t, err)
	result := make(chan error, 1)
	w := newWaiter(s, id, length)
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		result <- w.waitOnly(ctx)
	}()
	t.Cleanup(func() { // before the semaphores are closed
		cancel()
		<-ended
	})
	r.wantLine(t, id, append(before, w.token)...)
	return w.token, result
}

func wantDone(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(20 * time.Second):
		t.Fatal("still waiting")
	}
}

func giveBack(t *testing.T, s *semaphores, id semaphoreID, token string) {
	t.Helper()
	_, err := s.release(context.Background(), id, token, uuid.NewString())
	must(t, err)
}

// First come, first served, and by the event: ten polls would take more than twenty seconds.
func TestLineIsServedInOrder(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
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
		if got := r.inflight(t, id); !slices.Equal(got, []string{token}) {
			t.Fatalf("in flight is %v, want waiter %d, %s", got, i, token)
		}
		r.wantLine(t, id, tokens[i+1:]...)
		holder = token
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("ten waiters were served within %s", took)
	}
}

// Several free tokens call as many waiters.
func TestRefillServesSeveral(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	lost := []string{acquire(t, s, id, 3), acquire(t, s, id, 3)}
	acquire(t, s, id, 3)
	_, first := queueUp(t, context.Background(), s, id, 3, r)
	_, second := queueUp(t, context.Background(), s, id, 3, r)
	third, _ := queueUp(t, t.Context(), s, id, 3, r)
	r.do(t, "ZREM", id.inflightKey(), lost[0], lost[1])
	wantDone(t, first)
	wantDone(t, second)
	r.wantLine(t, id, third)
	r.wantCounts(t, id, 0, 3)
}

// stand puts somebody in line, reachable or not, who never comes.
func stand(t *testing.T, r *redisServer, s *semaphores, id semaphoreID, reachable bool) (token string, leave func()) {
	t.Helper()
	token = uuid.NewString()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if reachable {
		c := &calls{ring: make(chan struct{}, 1)}
		go func() { _ = (&waiter{semaphores: s, id: id, token: token}).hear(ctx, c) }()
		<-c.ring
	}
	var full *fullError
	if err := s.claim(ctx, id, 1, time.Second, claim{token: token, arrival: joinLine}); !errors.As(err, &full) {
		t.Fatalf("got %v", err)
	}
	return token, func() {
		cancel()
		eventually(t, 10*time.Second, func() error {
			n, err := redis.Values(r.control.Do("PUBSUB", "NUMSUB", id.channel(token)))
			if err == nil && n[1] != int64(0) {
				err = errors.New("still subscribed")
			}
			return err
		})
	}
}

// What is free is kept for those in line; a waiter that is gone blocks nobody.
func TestNobodyOvertakesTheLine(t *testing.T) {
	r := commonRedis(t)
	w := startWebhook(t, testConfig(r.address))
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	first, leave := stand(t, r, s, id, true)
	giveBack(t, s, id, holder)
	r.wantCounts(t, id, 1, 0)

	a := w.admit(t, review(t, id, 1))
	if want := fmt.Sprintf("no semaphore available: %s has 0 of 1 tokens in use, and 1 waiting in line", id); a.allowed || a.message != want {
		t.Fatalf("answered %+v, want %s", a, want)
	}
	var full *fullError
	err := s.claim(context.Background(), id, 1, time.Second, claim{token: uuid.NewString(), arrival: joinLine})
	if !errors.As(err, &full) || full.position != 2 {
		t.Fatalf("got %v, want to be second", err)
	}
	r.do(t, "ZREM", id.waitersKey(), r.mustLine(t, id)[1])
	r.wantLine(t, id, first)

	leave() // without a word, as a pod that is killed
	r.unseen(t, id, first, 6*time.Second)
	w.wantAdmitted(t, id, 1)
	r.wantLine(t, id)
}

// unseen makes it so long ago that a waiter asked last.
func (s *redisServer) unseen(t *testing.T, id semaphoreID, token string, ago time.Duration) {
	t.Helper()
	now, err := redis.Ints(s.do(t, "TIME"), nil)
	must(t, err)
	s.do(t, "ZADD", id.seenKey(), now[0]-seconds(ago), token)
}

func (s *redisServer) mustLine(t *testing.T, id semaphoreID) []string {
	t.Helper()
	tokens, err := s.line(id)
	must(t, err)
	return tokens
}

// A waiter that does not ask for some seconds is dropped, even if its connection stands.
func TestSilentWaiterIsDropped(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	silent, _ := stand(t, r, s, id, true)
	giveBack(t, s, id, holder)
	wantFullError(t, s, id, 1, 0)
	r.unseen(t, id, silent, waiterPatience+time.Second)
	acquire(t, s, id, 1)
	r.wantLine(t, id)
	if n := r.do(t, "ZCARD", id.seenKey()); n != int64(0) {
		t.Errorf("%d are still noted as seen", n)
	}
}

// Who was dropped by mistake, or with the data of Redis, finds its place again.
func TestPlaceInLineIsKept(t *testing.T) {
	r := startRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	first, firstDone := queueUp(t, context.Background(), s, id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	third, _ := queueUp(t, t.Context(), s, id, 1, r)
	r.do(t, "ZREM", id.waitersKey(), first)
	r.wantLine(t, id, first, second, third)
	r.do(t, "DEL", id.waitersKey(), id.seenKey())
	r.wantLine(t, id, first, second, third)
	r.stop()
	must(t, r.start())
	r.do(t, "DEL", id.waitersKey(), id.seenKey())
	r.wantLine(t, id, first, second, third)
	giveBack(t, s, id, holder)
	wantDone(t, firstDone)
	r.wantLine(t, id, second, third)
}

// A stale token is reclaimed by those who wait, though nobody asks for admission.
func TestWaitersReclaim(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	token, done := queueUp(t, context.Background(), s, id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	r.makeStale(t, id, holder)
	wantDone(t, done)
	if got := r.inflight(t, id); !slices.Equal(got, []string{token}) {
		t.Errorf("in flight is %v, want %s", got, token)
	}
	r.wantLine(t, id, second)
}

// Those at the front of the line ask again when a token goes stale, not some seconds later.
func TestPollsWhenATokenGoesStale(t *testing.T) {
	w := &waiter{length: 2}
	for range 100 {
		at := ownPlaceInLine{position: 2, staleIn: time.Second}
		if d := w.untilPoll(&fullError{inUse: 2, length: 2, ownPlaceInLine: at}); d < time.Second || d > time.Second+staleJitter {
			t.Errorf("second in line: polls after %s", d)
		}
		at.position = 3
		if d := w.untilPoll(&fullError{ownPlaceInLine: at}); d < pollLeast || d > pollMost {
			t.Errorf("third in line: polls after %s", d)
		}
	}
}

// While somebody else has the lock, or the lock server is away, a waiter goes on asking.
func TestWaiterOutlivesTheLock(t *testing.T) {
	locks := startRedis(t)
	r := commonRedis(t)
	c := testConfig(r.address)
	c.redisAddresses = []string{locks.address}
	s := newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), 1, slog.New(slog.DiscardHandler))
	defer s.close(context.Background())
	id := freshID()
	unlock, err := s.locks.tryLock(context.Background(), id.lockKey(), time.Minute)
	must(t, err)
	said := make(chan string, 100)
	done := make(chan error, 1)
	w := newWaiter(s, id, 1)
	w.note = func(text string) { said <- text }
	go func() { done <- w.waitOnly(context.Background()) }()
	eventually(t, 20*time.Second, func() error {
		if queue, inflight, err := r.counts(id); queue+inflight != 0 || err != nil {
			t.Fatalf("repaired without the lock: %d, %d, %v", queue, inflight, err)
		}
		if n := commandCalls(t, locks)["set"]; n < 3 {
			return fmt.Errorf("the lock was tried %d times", n)
		}
		return nil
	})
	locks.stop()
	eventually(t, 20*time.Second, func() error {
		select {
		case text := <-said:
			if strings.Contains(text, "lock Redis "+locks.address) {
				return nil
			}
			return errors.New(text)
		default:
			return errors.New("nothing said")
		}
	})
	must(t, locks.start())
	_ = unlock(context.Background())
	wantDone(t, done)
}

// Over with ctx, wherever it is.
func TestWaitEndsWithItsContext(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	acquire(t, s, id, 1)
	ctx, cancel := context.WithCancel(context.Background())
	_, done := queueUp(t, ctx, s, id, 1, r)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestWaitingText(t *testing.T) {
	for want, e := range map[string]fullError{
		"waiting for a token of shop/web: 3 of 3 in use, 2nd in line, 41 s":     {inUse: 3, length: 3, ownPlaceInLine: ownPlaceInLine{position: 2, waited: 41 * time.Second}},
		"waiting for a token of shop/web: 0 of 1 in use, 1st in line, 0 s":      {inUse: 0, length: 1, ownPlaceInLine: ownPlaceInLine{position: 1}},
		"waiting for a token of shop/web: 4 of 3 in use, 13th in line, 119 s":   {inUse: 4, length: 3, ownPlaceInLine: ownPlaceInLine{position: 13, waited: 119 * time.Second}},
		"waiting for a token of shop/web: 1 of 1 in use, 23rd in line, 2 min":   {inUse: 1, length: 1, ownPlaceInLine: ownPlaceInLine{position: 23, waited: 2 * time.Minute}},
		"waiting for a token of shop/web: 1 of 1 in use, 101st in line, 26 h":   {inUse: 1, length: 1, ownPlaceInLine: ownPlaceInLine{position: 101, waited: 26*time.Hour + time.Minute}},
		"waiting for a token of shop/web: 1 of 1 in use, 111th in line, 90 min": {inUse: 1, length: 1, ownPlaceInLine: ownPlaceInLine{position: 111, waited: 90 * time.Minute}},
	} {
		e.id = testID
		if got := e.waiting(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
