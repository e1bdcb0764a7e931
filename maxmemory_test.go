package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// While Redis is full, holders are counted, those too that have to be put back, and tokens are given back. Admissions fail, and say
// why.
func TestFullRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	w := startWebhook(t, testConfig(r.Address))
	var tokens []string
	var holders []*rig.Process
	for range 3 {
		token := acquire(t, s, id, 4)
		p := rig.StartSidecar(t, r.Address, id, token)
		p.WantLog(t, heldText)
		tokens, holders = append(tokens, token), append(holders, p)
	}
	waiting := uuid.NewString() // holds its token already, but its app has not started
	rig.InPod(t, waiting)
	waiter := rig.StartWaitingSidecar(t, r.Address, id, waiting, 4)
	waiter.WantLog(t, heldText)
	tokens = append(tokens, waiting)

	empty := r.Fill(t)
	r.Do(t, "ZREM", id.inflightKey(), tokens[0])
	at := r.Now(t)
	wantBeats := func(tokens ...string) {
		t.Helper()
		rig.Eventually(t, 10*time.Second, func() error {
			for _, token := range tokens {
				if last := r.LastHeartbeat(t, id, token); last <= at+1 {
					return fmt.Errorf("the last heartbeat of %s was at %d, Redis was full at %d", token, last, at)
				}
			}
			return nil
		})
	}
	wantBeats(tokens...)
	holders[0].WantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	for _, id := range []semaphoreID{id, freshID()} {
		status, text, err := w.post(context.Background(), rig.Review(t, id, 5), "2s")
		if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, "OOM") {
			t.Errorf("%s: answered %d %s, %v", id, status, text, err)
		}
	}
	for _, p := range holders[:2] {
		p.Signal(t, syscall.SIGTERM)
		p.WantExit(t, 0)
		p.WantLog(t, "token given back")
	}
	r.WantInflight(t, id, tokens[2:]...)
	at = r.Now(t)
	wantBeats(tokens[2:]...)
	for _, p := range holders {
		if failed := p.Log.Lines(t, "heartbeat failed, to be retried"); len(failed) != 0 {
			t.Errorf("logged %v", failed)
		}
	}

	empty()
	w.wantAdmitted(t, id, 4)
	w.wantAdmitted(t, id, 4)
	w.wantFull(t, id, 4, 4)
	w.wantAdmitted(t, freshID(), 1)
}

// Waiters cannot ask while Redis is full, though heartbeats come: they keep their places, and what was given back meanwhile is theirs.
func TestLineOfAFullRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	w := startWebhook(t, testConfig(r.Address))
	token := acquire(t, s, id, 2)
	rig.StartSidecar(t, r.Address, id, token).WantLog(t, heldText)
	gone := acquire(t, s, id, 2)
	first, firstDone := queueUp(t, context.Background(), s, id, 2, r)
	second, _ := queueUp(t, t.Context(), s, id, 2, r)
	third, _ := queueUp(t, t.Context(), s, id, 2, r)
	empty := r.Fill(t)
	giveBack(t, s, id, gone)
	rig.Eventually(t, 30*time.Second, func() error { // waiters that do not ask for so long are gone
		asked, err := redis.Strings(r.Do(t, "ZRANGE", id.seenKey(), -1, -1, "WITHSCORES"), nil)
		rig.Must(t, err)
		if now := fmt.Sprint(r.Now(t) - 11); asked[1] > now {
			return fmt.Errorf("%v asked last, now it is %d", asked, r.Now(t))
		}
		return nil
	})
	r.WantLine(t, id, first, second, third)
	empty()
	if a := w.admit(t, rig.Review(t, id, 2)); a.Allowed {
		t.Error("a pod that does not wait took the token that was given back")
	}
	joined := queueLast(t, s, id, 2)
	wantDone(t, firstDone)
	r.WantInflight(t, id, token, first)
	rig.Eventually(t, 10*time.Second, func() error {
		if got := r.MustLine(t, id); !slices.Equal(got, []string{second, third, joined}) {
			return fmt.Errorf("in line are %v, want %v", got, []string{second, third, joined})
		}
		return nil
	})
}

// queueLast asks once for a place in line.
func queueLast(t *testing.T, s *semaphores, id semaphoreID, length int) (token string) {
	t.Helper()
	token = uuid.NewString()
	a, err := s.runAcquire(context.Background(), id, acquireRequest{token, length, joinLine, ""})
	rig.Must(t, err)
	if a.status != acquireFull {
		t.Fatalf("got %+v, want to stand in line", a)
	}
	return token
}
