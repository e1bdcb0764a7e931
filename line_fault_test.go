package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// Where Redis has lost all, those in line neither take what the holders have, nor lose their order.
func TestEmptiedRedisWithALine(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	first, done := queueUp(t, context.Background(), s, id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	third, _ := queueUp(t, t.Context(), s, id, 1, r)
	r.Do(t, "DEL", id.queueKey(), id.inflightKey(), id.waitersKey(), id.seenKey(), id.namesKey(), id.stateKey())
	r.WantLine(t, id, first, second, third)
	r.WantCounts(t, id, 0, 0)
	if rejoined, err := s.heartbeat(context.Background(), id, holder, "", 0); err != nil || !rejoined {
		t.Fatalf("rejoined %t, %v", rejoined, err)
	}
	giveBack(t, s, id, holder)
	wantDone(t, done)
	r.WantLine(t, id, second, third)
	r.WantCounts(t, id, 0, 1)
}

// A waiter that asks again in the second in which it joined notices, too, that Redis has lost its data.
func TestRedisEmptiedInTheSecondOfJoining(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	r.Do(t, "DEL", id.queueKey(), id.inflightKey(), id.namesKey(), id.stateKey())
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: uuid.NewString(), length: 1, arrival: fmt.Sprint(r.Now(t)+1, "000000")}) // as if in this very second
	if err != nil || a.status != acquireFull || a.doubt == 0 {
		t.Errorf("%+v, %v: want to be told to wait for who holds the token", a, err)
	}
}

// A holder that comes back tells that Redis has lost its data: what others hold is not given to pods that are new, and what was made free
// before is no longer.
func TestHolderTellsOfALoss(t *testing.T) {
	for name, newcomers := range map[string]int{"first": 0, "after two that are new": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphore(t)
			var holders []string
			for range 4 {
				holders = append(holders, acquire(t, s, id, 4))
			}
			r.Do(t, "DEL", id.keys()...)
			for range newcomers {
				acquire(t, s, id, 4)
			}
			for i, holder := range holders {
				if rejoined, err := s.heartbeat(t.Context(), id, holder, "", time.Minute); err != nil || !rejoined {
					t.Fatalf("rejoined %t, %v", rejoined, err)
				}
				r.WantCounts(t, id, 0, newcomers+i+1)
				_, _, err := s.acquire(t.Context(), id, "", 4, time.Second)
				var full *fullError
				if !errors.As(err, &full) || newcomers+i+1 < 4 && !strings.Contains(refusal(full), "; Redis was away or has lost data, in ") {
					t.Errorf("%d are back: %v, %+v; want to be told to wait for the others", i+1, err, full)
				}
			}
		})
	}
}

// The first heartbeat of a pod whose token is gone tells nothing of others: a pod that is new gets what is missing.
func TestLateStartTellsOfNoLoss(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 2)
	r.Do(t, "DEL", id.keys()...)
	if rejoined, err := s.heartbeat(t.Context(), id, token, "", 0); err != nil || !rejoined {
		t.Fatalf("rejoined %t, %v", rejoined, err)
	}
	acquire(t, s, id, 2)
	r.WantCounts(t, id, 0, 2)
}

// What is missing while Redis was never away, and has not lost its data, is replaced at once.
func TestMissingTokensAreReplaced(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	_, done := queueUp(t, t.Context(), s, id, 1, r)
	r.Do(t, "DEL", id.inflightKey())
	wantDone(t, done)
}

// A waiter that cannot be called is not overtaken.
func TestDeafWaiterIsServed(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	_, done := queueUp(t, context.Background(), deafSemaphores(t, r.Address), id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	giveBack(t, s, id, holder)
	wantDone(t, done)
	r.WantLine(t, id, second)
}

// It subscribes anew.
func TestDeafWaiterSubscribesAnew(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	token, _ := queueUp(t, t.Context(), deafSemaphores(t, r.Address), id, 1, r)
	rig.Eventually(t, 20*time.Second, func() error {
		n, err := redis.Values(r.Control.Do("PUBSUB", "NUMSUB", id.channel(token)))
		if err == nil && n[1] != int64(1) {
			err = fmt.Errorf("%d subscriptions", n[1])
		}
		return err
	})
}

// Pods of one key that disagree about the length: one whose own length is used up keeps nobody from what is free.
func TestLineOfDifferentLengths(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	short, _ := queueUp(t, t.Context(), s, id, 1, r)
	for range 2 {
		done := make(chan error, 1)
		w := newWaiter(s, id, 3)
		go func() { done <- w.waitOnly(context.Background()) }()
		wantDone(t, done)
	}
	r.WantCounts(t, id, 0, 3)
	r.WantLine(t, id, short)
}

// While the lock is held by somebody who is gone, a waiter says so, once, and does not hammer the servers.
func TestWaiterAndADeadLockHolder(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	_, err := s.locks.tryLock(context.Background(), id.lockKey(), time.Hour)
	rig.Must(t, err)
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--expiration-seconds=3600")
	line := p.WantLog(t, "no token yet, to be retried")
	if want := id.lockKey() + " is held by another; it frees itself 1h0m0s after it was taken: "; !strings.HasPrefix(line["error"].(string), want) {
		t.Errorf("logged %q, want %q", line["error"], want)
	}
	rig.Eventually(t, 20*time.Second, func() error {
		if n := r.CommandCalls(t)["set"]; n < 6 {
			return fmt.Errorf("tried %d times", n)
		}
		return nil
	})
	if n := len(p.Log.Lines(t, "no token yet, to be retried")); n != 1 {
		t.Errorf("said %d times", n)
	}
	r.WantLine(t, id, token) // it has its place all the same
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	r.WantLine(t, id)
}

// A waiter that is told to end while Redis hangs tries for its grace period, and says what becomes of its place.
func TestWaiterEndsWhileRedisHangs(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	acquire(t, s, id, 1)
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--termination-grace-period-seconds=3")
	r.WantLine(t, id, token)
	r.Pause(t)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 1)
	if text := p.WantLog(t, "failed")["error"].(string); !strings.HasPrefix(text, "the line of "+id.String()+" not left within the grace period, it forgets this pod within seconds") {
		t.Errorf("logged %q", text)
	}
}
