package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// wantSettled waits until holders have had the time to come back, and fails if others are in use than these meanwhile.
func wantSettled(t *testing.T, s *rig.Redis, id semaphoreID, quiet time.Duration, tokens ...string) {
	t.Helper()
	rig.Eventually(t, 20*time.Second, func() error {
		s.WantInflight(t, id, tokens...)
		if since := s.Now(t) - s.State(t, id, "resumed"); since <= seconds(quiet)+1 {
			return fmt.Errorf("%d s after the outage", since)
		}
		return nil
	})
}

// After an outage that lasted longer than the threshold, live holders keep their tokens, though those who ask first were started
// during it and know of nothing. Who died meanwhile is found out.
func TestHoldersOutliveAnOutage(t *testing.T) {
	t.Parallel()
	const interval = 2 * time.Second
	r, s, id := newSemaphore(t)
	holders, others := rig.StartProxy(t, r.Address), rig.StartProxy(t, r.Address)
	flag := "--heartbeat-interval-seconds=2"
	var live []string
	var beats []*rig.Process
	for range 3 {
		token := acquire(t, s, id, 3)
		p := rig.StartSidecar(t, holders.Address, id, token, flag)
		p.WantLog(t, heldText)
		live, beats = append(live, token), append(beats, p)
	}
	holders.Cut()
	others.Cut()
	for _, p := range beats {
		p.WantLog(t, "heartbeat failed, to be retried")
	}
	r.Shift(t, id, -200*time.Second)

	w := startWebhook(t, beating(others.Address, interval))
	if status, text, err := w.post(context.Background(), rig.Review(t, id, 3), "500ms"); err != nil || status != http.StatusInternalServerError {
		t.Errorf("answered %d %s, %v while Redis is out of reach", status, text, err)
	}
	var waiting []*rig.Process
	for range 2 {
		made := others.Made.Load()
		waiting = append(waiting, rig.StartWaitingSidecar(t, others.Address, id, uuid.NewString(), 3, flag))
		rig.Eventually(t, 10*time.Second, func() error {
			if others.Made.Load() == made {
				return errors.New("it has not tried yet")
			}
			return nil
		})
	}
	others.Mend() // they come first
	a := w.admit(t, rig.Review(t, id, 3))
	if a.Allowed || a.Code != http.StatusTooManyRequests {
		t.Errorf("the first admission after it was answered %+v", a)
	}
	for _, p := range waiting {
		p.WantLogPrefix(t, "waiting for a token of "+id.String()+": 3 of 3 in use, ")
	}
	if n := len(beats[0].Log.Lines(t, "heartbeat succeeds again")); n != 0 {
		t.Fatal("a holder was back too early for this test")
	}
	r.WantInflight(t, id, live...)
	holders.Mend()
	wantSettled(t, r, id, interval+2*time.Second, live...)
	a = w.admit(t, rig.Review(t, id, 3))
	if a.Allowed || a.Code != http.StatusTooManyRequests {
		t.Errorf("an admission after it was answered %+v", a)
	}
	first := r.MustLine(t, id)[0]

	// The same again, and one of them does not live any more.
	beats[0].Signal(t, syscall.SIGKILL)
	<-beats[0].Done()
	r.Shift(t, id, -200*time.Second)
	rig.Eventually(t, interval+3*time.Second+5*time.Second, func() error {
		got := r.Inflight(t, id)
		for _, token := range live[1:] {
			if !slices.Contains(got, token) {
				t.Fatalf("in flight are %v, without the live %s", got, token)
			}
		}
		if !slices.Contains(got, first) {
			return fmt.Errorf("in flight are %v, want the first in line, %s", got, first)
		}
		return nil
	})
	r.WantCounts(t, id, 0, 3)
}

// A second outage, however short, does not make the first forgotten: those who have not come back yet get the time to.
func TestSecondOutage(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	for _, interval := range []time.Duration{5 * time.Second, 30 * time.Second} {
		s := semaphoresOf(t, beating(r.Address, interval))
		for _, inLine := range []bool{false, true} {
			for _, more := range []int{-4, -1, 0, 1, 2, 3, 4} {
				gap := interval + time.Duration(more)*time.Second
				id := freshID()
				holder := acquire(t, s, id, 1)
				q := acquireRequest{uuid.NewString(), 1, "", ""}
				if inLine {
					q.arrival = joinLine
				}
				wantDoubt := func(what string) {
					t.Helper()
					a, err := s.runAcquire(context.Background(), id, q)
					rig.Must(t, err)
					// As times are in whole seconds, it may be one less.
					if back := min(3*time.Second, interval); a.status != acquireFull || a.inUse != 1 || a.doubt < back+time.Second {
						t.Errorf("interval %s, in line %t: %s: got %+v", interval, inLine, what, a)
					}
					if inLine {
						q.arrival = a.place.arrival
					}
				}
				if inLine {
					_, err := s.runAcquire(context.Background(), id, q)
					rig.Must(t, err)
				}
				r.Shift(t, id, -200*time.Second)
				wantDoubt("a long outage")
				r.Shift(t, id, -gap)
				wantDoubt(fmt.Sprintf("and a second one of %s", gap))
				r.WantInflight(t, id, holder)
			}
		}
	}
}

// The end of an outage is not forgotten by those who come later, nor by one that comes seldom.
func TestEndOfAnOutageIsKept(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	r.Shift(t, id, -200*time.Second)
	wantFullError(t, s, id, 1, 1)
	end := r.State(t, id, "resumed")
	for ago := range 12 { // and the seconds that the test takes
		r.Shift(t, id, -time.Second)
		wantFullError(t, s, id, 1, 1)
		if got := r.State(t, id, "resumed"); got != end-ago-1 {
			t.Fatalf("the end is noted as %d, want %d", got, end-ago-1)
		}
	}
	r.WantInflight(t, id, holder)
	r.Shift(t, id, -23*time.Second)
	acquire(t, s, id, 1)
}

// A Redis that answers and refuses to write is away, for holders as for all others: nobody is judged by that time.
func TestRefusingRedisIsAway(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ refuse, accept []any }{
		"READONLY":   {[]any{"REPLICAOF", "127.0.0.1", rig.Port(rig.FreeAddress(t))}, []any{"REPLICAOF", "NO", "ONE"}},
		"NOREPLICAS": {[]any{"CONFIG", "SET", "min-replicas-to-write", "1"}, []any{"CONFIG", "SET", "min-replicas-to-write", "0"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if name == "READONLY" && rig.TestQueue == rig.ClusterQueue {
				t.Skip("a Cluster's replica sends us to its master")
			}
			const interval = 2 * time.Second
			r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
			holders := rig.StartProxy(t, r.Address)
			token := acquire(t, s, id, 1)
			p := rig.StartSidecar(t, holders.Address, id, token, "--heartbeat-interval-seconds=2")
			p.WantLog(t, heldText)
			waiter, done := queueUp(t, t.Context(), semaphoresOf(t, beating(r.Address, interval)), id, 1, r)
			w := startWebhook(t, beating(r.Address, interval))

			r.Do(t, c.refuse[0].(string), c.refuse[1:]...)
			rig.Must(t, errOf(r.Control.Do("PING")))
			says := func(text, name string) bool {
				return strings.Contains(text, name) || name == "READONLY" && strings.Contains(text, "is not a primary")
			}
			if line := p.WantLog(t, "heartbeat failed, to be retried"); !says(fmt.Sprint(line["error"]), name) {
				t.Errorf("logged %v", line)
			}
			touched := r.State(t, id, "touched")
			for range 3 {
				if status, text, err := w.post(context.Background(), rig.Review(t, id, 1), "2s"); err != nil || status != http.StatusInternalServerError || !says(text, name) {
					t.Errorf("answered %d %s, %v", status, text, err)
				}
			}
			if now := r.State(t, id, "touched"); now != touched {
				t.Error("a refused command has left a trace")
			}
			holders.Cut() // so that others come first
			r.Do(t, c.accept[0].(string), c.accept[1:]...)
			r.Shift(t, id, -200*time.Second) // for so long
			for range 3 {
				if a := w.admit(t, rig.Review(t, id, 1)); a.Allowed || a.Code != http.StatusTooManyRequests {
					t.Fatalf("answered %+v", a)
				}
			}
			holders.Mend()
			wantSettled(t, r, id, interval+2*time.Second, token)
			r.WantLine(t, id, waiter)
			p.Signal(t, syscall.SIGTERM)
			wantDone(t, done)
			r.WantInflight(t, id, waiter)
		})
	}
}

// While somebody waits, a holder that died is found out within seconds after the threshold.
func TestDeadHolderWhileOthersWait(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{time.Second, 2 * time.Second, 30 * time.Second} {
		t.Run(interval.String(), func(t *testing.T) {
			t.Parallel()
			r, _, id := newSemaphore(t)
			s := semaphoresOf(t, beating(r.Address, interval))
			live, dead := acquire(t, s, id, 2), acquire(t, s, id, 2)
			next, done := queueUp(t, context.Background(), s, id, 2, r)
			second, _ := queueUp(t, t.Context(), s, id, 2, r)
			r.Do(t, "ZADD", id.inflightKey(), "XX", r.Now(t)-seconds(s.staleThreshold)+2, dead)
			start := time.Now()
			wantDone(t, done)
			if took := time.Since(start); took < time.Second || took > 2*time.Second+5*time.Second {
				t.Errorf("its token was given on after %s, and was stale after 2 s", took)
			}
			r.WantInflight(t, id, live, next)
			r.WantLine(t, id, second)
		})
	}
}

// Where nobody waited, Redis cannot tell at first whether it was away. The webhook that finds it so looks after the semaphore, even
// if no other pod comes; and a holder that comes back meanwhile keeps its token.
func TestDeadHoldersAndSeldomAdmissions(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{time.Second, 2 * time.Second, 3 * time.Second, 5 * time.Second} {
		t.Run(interval.String(), func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphore(t)
			w := startWebhook(t, beating(r.Address, interval))
			live := acquire(t, s, id, 3)
			acquire(t, s, id, 3)
			acquire(t, s, id, 3)
			r.Shift(t, id, -1000*time.Second)
			start := time.Now()
			w.wantFull(t, id, 3, 3)
			if _, err := w.semaphores.heartbeat(context.Background(), id, live, "", 0); err != nil {
				t.Error(err)
			}
			rig.Eventually(t, interval+6*time.Second-time.Since(start), func() error {
				if got := r.Inflight(t, id); !slices.Equal(got, []string{live}) {
					return fmt.Errorf("in flight are %v, want %s", got, live)
				}
				return nil
			})
			w.wantAdmitted(t, id, 3)
			w.wantAdmitted(t, id, 3)
			w.wantFull(t, id, 3, 3)
		})
	}
}

// The same with the interval that is the default, and near the end of it.
func TestWatchOfALongInterval(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	w := startWebhook(t, testConfig(r.Address))
	acquire(t, s, id, 1)
	r.Shift(t, id, -1000*time.Second)
	w.wantFull(t, id, 1, 1)
	r.Shift(t, id, -28*time.Second)
	rig.Eventually(t, 7*time.Second+5*time.Second, func() error {
		if got := r.Inflight(t, id); len(got) != 0 {
			return errors.New("still in flight")
		}
		return nil
	})
	w.wantAdmitted(t, id, 1)
}

// What Redis has answered before it fell silent is said: it tells more than the silence.
func TestAnswersBeforeASilenceAreSaid(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", "1")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	done := make(chan error, 1)
	before := r.CommandCalls(t)["evalsha"]
	go func() { done <- errOf(s.release(ctx, id, uuid.NewString())) }()
	rig.Eventually(t, 5*time.Second, func() error {
		if n := r.CommandCalls(t)["evalsha"] - before; n < 3 {
			return fmt.Errorf("asked %d times", n)
		}
		return nil
	})
	r.Pause(t)
	defer r.Resume(t)
	if err := <-done; err == nil || !strings.Contains(err.Error(), "NOREPLICAS") {
		t.Errorf("got %v", err)
	}
}
