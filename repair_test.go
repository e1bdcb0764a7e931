package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// stalled is for how long a line may stand still while there is something to repair: the longest poll, and a lock server's time-out.
const stalled = pollMost + 4*time.Second

// What is repaired is what is there when the repair is done, and not what was there when it was found to be needed: whatever
// happens in between, all tokens are there afterwards.
func TestRepairIsWhole(t *testing.T) {
	ctx := context.Background()
	const length = 4
	for _, c := range []struct {
		name            string
		stale           int // when it is found that something is to be repaired
		between         func(t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, tokens []string)
		queue, inflight int // afterwards
	}{
		{"nothing", 1, func(*testing.T, *rig.Redis, *semaphores, semaphoreID, []string) {}, 1, 3},
		{"another goes stale", 1, func(t *testing.T, r *rig.Redis, _ *semaphores, id semaphoreID, tokens []string) {
			r.MakeStale(t, id, tokens[2])
		}, 2, 2},
		{"all others go stale", 1, func(t *testing.T, r *rig.Redis, _ *semaphores, id semaphoreID, tokens []string) {
			for _, token := range tokens {
				r.MakeStale(t, id, token)
			}
		}, 4, 0},
		{"the stale one comes back", 1, func(t *testing.T, _ *rig.Redis, s *semaphores, id semaphoreID, tokens []string) {
			_, err := s.heartbeat(ctx, id, tokens[0], "", 0)
			rig.Must(t, err)
		}, 0, 4},
		{"the stale one is given back, and another goes stale", 1, func(t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, tokens []string) {
			giveBack(t, s, id, tokens[0])
			r.MakeStale(t, id, tokens[1])
		}, 2, 2},
		{"somebody else repairs it, and another goes stale", 1, func(t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, tokens []string) {
			maintain(t, s, id, length)
			r.MakeStale(t, id, tokens[1])
		}, 2, 2},
		{"somebody repairs it for a smaller length", 2, func(t *testing.T, _ *rig.Redis, s *semaphores, id semaphoreID, _ []string) {
			maintain(t, s, id, 1)
		}, 2, 2},
		{"somebody repairs it for a greater length", 2, func(t *testing.T, _ *rig.Redis, s *semaphores, id semaphoreID, _ []string) {
			maintain(t, s, id, length+2)
		}, 4, 2}, // those of the greater length may still come
		{"a free token is lost, and another goes stale", 1, func(t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, tokens []string) {
			giveBack(t, s, id, tokens[3])
			r.Do(t, "DEL", id.queueKey())
			r.MakeStale(t, id, tokens[1])
		}, 3, 1},
		{"a token in flight is lost, and another goes stale", 1, func(t *testing.T, r *rig.Redis, _ *semaphores, id semaphoreID, tokens []string) {
			r.Do(t, "ZREM", id.inflightKey(), tokens[3])
			r.MakeStale(t, id, tokens[1])
		}, 3, 1},
	} {
		for _, newcomer := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, newcomer=%t", c.name, newcomer), func(t *testing.T) {
				r, s, id := newSemaphore(t)
				var tokens []string
				for range length {
					tokens = append(tokens, acquire(t, s, id, length))
				}
				for i := range c.stale {
					r.MakeStale(t, id, tokens[i])
				}
				a, err := s.runAcquire(ctx, id, acquireRequest{token: uuid.NewString(), length: length})
				rig.Must(t, err)
				if a.status != acquireRepair || a.stale != c.stale {
					t.Fatalf("answered %+v, want a repair with %d stale", a, c.stale)
				}
				c.between(t, r, s, id, tokens)
				rig.Must(t, s.maintain(ctx, id, length, newcomer))
				queue, inflight, err := r.Counts(id)
				rig.Must(t, err)
				if queue != c.queue || inflight != c.inflight {
					t.Errorf("%d free and %d in flight, want %d and %d", queue, inflight, c.queue, c.inflight)
				}
			})
		}
	}
}

// More stale tokens than one command reclaims are all reclaimed, and what they held is told of no more; a live one stays.
func TestRepairOfManyStaleTokens(t *testing.T) {
	const many = 1200
	r, s, id := newSemaphore(t)
	live := acquire(t, s, id, many+1)
	r.Do(t, "DEL", id.namesKey())
	for range many {
		token := uuid.NewString()
		rig.Must(t, r.Control.Send("ZADD", id.inflightKey(), 1, token))
		rig.Must(t, r.Control.Send("HSET", id.namesKey(), token+"/pod", "1 web-1"))
	}
	r.Do(t, "") // waits for all of it
	maintain(t, s, id, many+1)
	r.WantInflight(t, id, live)
	if n := r.Do(t, "HLEN", id.namesKey()); n != int64(0) {
		t.Errorf("%d pods are told of that have no token any more", n)
	}
	if n := r.State(t, id, "reclaimed"); n != many {
		t.Errorf("%d were reclaimed, by Redis's own count, want %d", n, many)
	}
}

// withLocker are the semaphores of one process with another lock.
func withLocker(t *testing.T, address string, locks locker) *semaphores {
	t.Helper()
	s := testSemaphores(t, address)
	rig.Must(t, s.locks.close())
	s.locks = locks
	return s
}

// dyingPods are pods in line, with connections of their own, each of which dies as soon as it holds its token: what it holds is
// reclaimed by those who wait.
type dyingPods struct {
	id      semaphoreID
	waiting []*waiter
	done    []chan error
}

func startDyingPods(t *testing.T, r *rig.Redis, id semaphoreID, pods, length int, newLocker func() locker) *dyingPods {
	t.Helper()
	d := &dyingPods{id: id}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var wg sync.WaitGroup
	var tokens []string
	for range pods {
		w, done := newWaiter(withLocker(t, r.Address, newLocker()), id, length), make(chan error, 1)
		t.Cleanup(wg.Wait) // before its semaphores are closed
		t.Cleanup(cancel)
		wg.Go(func() { done <- w.waitOnly(ctx) })
		tokens = append(tokens, w.token)
		r.WantLine(t, id, tokens...)
		d.waiting, d.done = append(d.waiting, w), append(d.done, done)
	}
	return d
}

// wantNext waits for the first in line to be served.
func (d *dyingPods) wantNext(within time.Duration) (token string, err error) {
	start := time.Now()
	select {
	case err = <-d.done[0]:
	case <-time.After(within):
		return "", fmt.Errorf("%s has stood still for %s, with %d in line", d.id, time.Since(start), len(d.waiting))
	}
	token = d.waiting[0].token
	d.waiting, d.done = d.waiting[1:], d.done[1:]
	return token, err
}

// One lock server of three hangs, and one holder after the other dies: each line goes on, whether many stand in it or one.
func TestLinesWithALockServerThatHangs(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	locks := redlockServers{rig.StartRedis(t), rig.StartRedis(t), rig.StartRedis(t)}
	var lines []*dyingPods
	for _, pods := range []int{5, 4, 4, 3, 1, 1} {
		const length = 2
		s, id := withLocker(t, r.Address, locks.newLocker()), freshID()
		holders := []string{acquire(t, s, id, length), acquire(t, s, id, length)}
		lines = append(lines, startDyingPods(t, r, id, pods, length, locks.newLocker))
		r.MakeStale(t, id, holders[0])
	}
	locks.pause(t, 1)
	var wg sync.WaitGroup
	for _, line := range lines {
		wg.Go(func() {
			for len(line.waiting) > 0 {
				token, err := line.wantNext(stalled)
				if err == nil {
					err = r.TryMakeStale(line.id, token)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// hangingLocker takes as long to fail as a lock may, until its servers are back.
type hangingLocker struct {
	locker
	back chan struct{} // closed then
}

func (l *hangingLocker) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	select {
	case <-l.back:
		return l.locker.tryLock(ctx, name, expiration)
	case <-time.After(2 * etcdTimeout):
		return nil, errors.New("no answer")
	}
}

// While the lock servers hang, nothing is reclaimed; it is soon after they are back. One that waits alone asks on as often as ever:
// Redis would take its silence for an outage of its own.
func TestLineAfterLockServersHung(t *testing.T) {
	t.Parallel()
	for _, waiting := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d in line", waiting), func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphore(t)
			holder := acquire(t, s, id, 1)
			back := make(chan struct{})
			line := startDyingPods(t, r, id, waiting, 1, func() locker { return &hangingLocker{redlockServers{r}.newLocker(), back} })
			r.MakeStale(t, id, holder)
			if token, err := line.wantNext(15 * time.Second); err == nil {
				t.Errorf("%s was served without the lock", token)
			}
			close(back)
			if _, err := line.wantNext(stalled); err != nil {
				t.Error(err)
			}
		})
	}
}
