package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestAcquireUntilFull(t *testing.T) {
	r, s, id := newSemaphore(t)
	var tokens []string
	for range 3 {
		tokens = append(tokens, acquire(t, s, id, 3))
	}
	r.WantCounts(t, id, 0, 3)
	got := r.Inflight(t, id)
	slices.Sort(got)
	slices.Sort(tokens)
	if !slices.Equal(got, tokens) {
		t.Errorf("in flight are %v, handed out were %v", got, tokens)
	}
	wantFullError(t, s, id, 3, 3)
}

func TestReleaseReturnsATokenOnce(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 2)
	for attempt, want := range []int{releaseDone, 0, 0} {
		status, err := s.release(context.Background(), id, token)
		rig.Must(t, err)
		if status != want {
			t.Errorf("attempt %d: answered %d", attempt, status)
		}
	}
	r.WantCounts(t, id, 2, 0)
}

func TestHeartbeatScoresByServerClock(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	r.MakeStale(t, id, token)
	rejoined, err := s.heartbeat(context.Background(), id, token, "", 0)
	rig.Must(t, err)
	if rejoined {
		t.Error("a token in flight is said to have rejoined")
	}
	now, err := redis.Ints(r.Do(t, "TIME"), nil)
	rig.Must(t, err)
	score, err := redis.Int(r.Do(t, "ZSCORE", id.inflightKey(), token), nil)
	rig.Must(t, err)
	if now[0]-score > 5 || score > now[0] {
		t.Errorf("score is %d, the server's time %d", score, now[0])
	}
}

// A token that was reclaimed while its pod was paused has become a fresh one: neither the late heartbeat nor the
// late release of the first pod touches the second pod's.
func TestLateHeartbeatAndRelease(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	first := acquire(t, s, id, 1)
	r.MakeStale(t, id, first)
	second := acquire(t, s, id, 1)
	if first == second {
		t.Fatalf("token %s was handed out twice", first)
	}
	rejoined, err := s.heartbeat(ctx, id, first, "", 0)
	rig.Must(t, err)
	if !rejoined {
		t.Error("the late heartbeat did not rejoin")
	}
	r.WantCounts(t, id, 0, 2)
	wantFullError(t, s, id, 1, 2)

	_, err = s.release(ctx, id, first)
	rig.Must(t, err)
	wantFullError(t, s, id, 1, 1)
	r.WantCounts(t, id, 0, 1)
	r.WantInflight(t, id, second)
	status, err := s.release(ctx, id, first)
	rig.Must(t, err)
	if status != 0 {
		t.Errorf("the late release answered %d", status)
	}
	if _, err = s.release(ctx, id, second); err != nil {
		t.Fatal(err)
	}
	acquire(t, s, id, 1)
	wantFullError(t, s, id, 1, 1)
}

// A rejoining token takes a free one out of the queue: what runs is counted.
func TestHeartbeatTakesFreeToken(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 3)
	r.Do(t, "DEL", id.queueKey(), id.inflightKey())
	maintain(t, s, id, 3)
	r.WantCounts(t, id, 3, 0)
	if _, err := s.heartbeat(context.Background(), id, token, "", 0); err != nil {
		t.Fatal(err)
	}
	r.WantCounts(t, id, 2, 1)
}

// Length lowered and raised: never more in use than the length of the admission at hand.
func TestLengthChanges(t *testing.T) {
	r, s, id := newSemaphore(t)
	tokens := []string{acquire(t, s, id, 5), acquire(t, s, id, 5), acquire(t, s, id, 5)}
	r.WantCounts(t, id, 2, 3)

	wantFullError(t, s, id, 2, 3)
	r.WantCounts(t, id, 2, 3) // those of length 5 may still come

	acquire(t, s, id, 4)
	wantFullError(t, s, id, 4, 4)
	wantFullError(t, s, id, 2, 4)

	for _, token := range tokens { // one is left
		_, err := s.release(context.Background(), id, token)
		rig.Must(t, err)
	}
	acquire(t, s, id, 2)
	wantFullError(t, s, id, 2, 2)
	r.WantCounts(t, id, 3, 2)

	r.ForgetLength(t, id) // nobody has asked for 5 for some minutes
	wantFullError(t, s, id, 2, 2)
	maintain(t, s, id, 2)
	r.WantCounts(t, id, 0, 2)
}

// Pods of one key that disagree about the length make progress all the same.
func TestDisagreementOnLength(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	errs := make(chan error, 20)
	for i := range 20 {
		wg.Go(func() {
			for range 10 {
				token, _, err := s.acquire(ctx, id, "", 20+i, 10*time.Second)
				if err == nil {
					_, err = s.release(ctx, id, token)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	if _, inflight, err := r.Counts(id); err != nil || inflight != 0 {
		t.Errorf("%d in flight, %v", inflight, err)
	}
}

func TestMaintainIsIdempotent(t *testing.T) {
	r, s, id := newSemaphore(t)
	for _, token := range []string{acquire(t, s, id, 5), acquire(t, s, id, 5)} {
		r.MakeStale(t, id, token)
	}
	acquire(t, s, id, 5) // a free one
	r.WantCounts(t, id, 2, 3)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if err := s.maintain(context.Background(), id, 5, true); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r.WantCounts(t, id, 4, 1)
}

func TestLargestLength(t *testing.T) {
	r, s, id := newSemaphore(t)
	acquire(t, s, id, maxLength)
	r.WantCounts(t, id, 255, 1) // made in small portions, as they are needed
	for range 300 {
		acquire(t, s, id, maxLength)
	}
	if _, inflight, err := r.Counts(id); err != nil || inflight != 301 {
		t.Errorf("%d in flight, %v", inflight, err)
	}
}

// Any use renews the expiry of all keys, so that nothing stays for ever; without holders and waiters they stay for minutes.
func TestKeysExpire(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	var token string
	wantRenewed := func(use string, most int) {
		t.Helper()
		for _, key := range id.keys() {
			ttl, err := redis.Int(r.Do(t, "TTL", key), nil)
			rig.Must(t, err)
			if ttl != -2 && (ttl < most-60 || ttl > most) {
				t.Errorf("%s: %s has a time to live of %d", use, key, ttl)
			}
			r.Do(t, "EXPIRE", key, 100)
		}
	}
	acquire(t, s, id, 4)
	token = acquire(t, s, id, 4)
	wantRenewed("acquire", 86400)
	_, err := s.heartbeat(ctx, id, token, "", 0)
	rig.Must(t, err)
	wantRenewed("heartbeat", 86400)
	_, err = s.release(ctx, id, token)
	rig.Must(t, err)
	wantRenewed("release", 86400)
	maintain(t, s, id, 4)
	wantRenewed("maintain", 86400)
	_, err = s.release(ctx, id, r.Inflight(t, id)[0])
	rig.Must(t, err)
	wantRenewed("the last release", 300)

	s.staleThreshold = 4 * 24 * time.Hour
	if got := s.timeToLive(); got != 40*86400 {
		t.Errorf("time to live with a stale threshold of four days is %d s", got)
	}
}

// Once the lock is free and nothing is wrong, no lock is taken.
func TestLockOnlyForRepair(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 3)
	s.locks.(*redlock).pools[0].Close() // from here on, locking fails
	acquire(t, s, id, 3)
	token := acquire(t, s, id, 3)
	wantFullError(t, s, id, 3, 3)

	r.MakeStale(t, id, token)
	_, _, err := s.acquire(context.Background(), id, "", 3, 10*time.Second)
	if err == nil || !strings.Contains(err.Error(), "lock Redis "+r.Address) {
		t.Errorf("got %v, want the lock server out of reach", err)
	}
}

// While another maintains, an admission waits; it is never refused for it.
func TestWaitsForAnothersMaintenance(t *testing.T) {
	r, s, id := newSemaphore(t)
	unlock, err := s.locks.tryLock(context.Background(), id.lockKey(), 10*time.Second)
	rig.Must(t, err)

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, _, err = s.acquire(ctx, id, "", 1, 10*time.Second)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want the deadline exceeded", err)
	}
	done := make(chan error)
	go func() {
		_, _, err := s.acquire(context.Background(), id, "", 1, 10*time.Second)
		done <- err
	}()
	rig.Must(t, unlock(context.Background()))
	rig.Must(t, <-done)
	r.WantCounts(t, id, 0, 1)
}

func TestWrongAnswersOfScripts(t *testing.T) {
	one := int64(1)
	for _, c := range []struct {
		status int
		rest   []any
	}{{7, nil}, {acquireFull, nil}, {acquireFull, []any{one, one}}, {acquireFull, []any{one, one, one, one}}, {acquireFull, []any{"x", one, one}}, {acquireRepair, nil}} {
		if a, err := parseReply(c.status, c.rest); err == nil {
			t.Errorf("%d %v was taken for %+v", c.status, c.rest, a)
		}
	}
}

// Many admissions of one process that find the same to be repaired take the lock once.
func TestOneRepairPerProcess(t *testing.T) {
	r, s, id := newSemaphore(t)
	counted := &countingLocker{locker: s.locks}
	s.locks = counted
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if _, _, err := s.acquire(context.Background(), id, "", 100, 10*time.Second); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r.WantCounts(t, id, 0, 100)
	if n := counted.tried.Load(); n > 5 {
		t.Errorf("the lock was tried %d times", n)
	}
}
