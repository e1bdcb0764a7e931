package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// A command that comes a moment after its deadline changes nothing, whatever it is; one that comes before it is run.
func TestCommandsAfterTheirDeadline(t *testing.T) {
	r, s, id := newSemaphore(t)
	held := acquire(t, s, id, 3)
	stale := acquire(t, s, id, 3)
	waiter := uuid.NewString()
	r.MakeStale(t, id, stale)
	for name, c := range map[string]struct {
		script *script
		args   []any
	}{
		"acquire":             {acquireScript, []any{3, uuid.NewString(), "", "pod node"}},
		"acquire, to wait":    {acquireScript, []any{1, waiter, joinLine, "pod node"}},
		"acquire of a waiter": {acquireScript, []any{1, waiter, fmt.Sprint(r.Now(t), "000000"), "pod node"}},
		"acquire of a holder": {acquireScript, []any{3, held, "", "pod node"}},
		"heartbeat":           {heartbeatScript, []any{held, "pod node", 0}},
		"rejoining heartbeat": {heartbeatScript, []any{uuid.NewString(), "pod node", 0}},
		"release":             {releaseScript, []any{held}},
		"maintain":            {maintainScript, []any{4, "1"}},
	} {
		before := r.Dump(t, id)
		run := func(deadline int64) int {
			args := append(id.keys(), deadline, 30, 120, 3600)
			reply, err := redis.Values(c.script.made().Do(r.Control, append(args, c.args...)...))
			rig.Must(t, err)
			return int(reply[0].(int64))
		}
		now, err := redis.Int64s(r.Do(t, "TIME"), nil)
		rig.Must(t, err)
		for _, deadline := range []int64{now[0]*1e6 + now[1], now[0]*1e6 - 3600e6, 0} {
			if status := run(deadline); status != statusLate {
				t.Errorf("%s: answered %d", name, status)
			}
		}
		if !slices.Equal(r.Dump(t, id), before) {
			t.Errorf("%s: has changed something", name)
		}
		if status := run(now[0]*1e6 + 10e6); status == statusLate {
			t.Errorf("%s: refused in time", name)
		}
	}
}

// arrives lets a command come that was kept back.
func arrives(t *testing.T, r *rig.Redis, h *rig.HeldCommand) {
	t.Helper()
	before := r.CommandCalls(t)["evalsha"]
	h.Deliver()
	<-h.Sent
	rig.Eventually(t, 5*time.Second, func() error {
		if r.CommandCalls(t)["evalsha"] == before {
			return errors.New("it has not come")
		}
		return nil
	})
}

// A heartbeat that the sidecar has given up arrives after the release of its token: the token is not counted again. Its connection
// was silent, or was closed while it was on its way.
func TestLateHeartbeat(t *testing.T) {
	t.Parallel()
	for name, hangUp := range map[string]bool{"silent connection": false, "closed connection": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
			p := rig.StartProxy(t, r.Address)
			token := acquire(t, s, id, 2)
			r.MakeStale(t, id, token)
			sidecar := rig.StartSidecar(t, p.Address, id, token, "--heartbeat-interval-seconds=4")
			rig.Eventually(t, 10*time.Second, func() error { // it knows Redis's clock then
				if r.LastHeartbeat(t, id, token) == 1 {
					return errors.New("no heartbeat yet")
				}
				return nil
			})
			h := p.HoldFirst(t, heartbeatScript.made().Hash(), hangUp)
			<-h.Held
			made := p.Made.Load()
			rig.Eventually(t, 10*time.Second, func() error {
				if p.Made.Load() == made {
					return errors.New("it has not asked again on another connection")
				}
				return nil
			})
			sidecar.Signal(t, syscall.SIGTERM)
			r.WantCounts(t, id, 2, 0)
			arrives(t, r, h)
			sidecar.WantExit(t, 0)
			sidecar.WantLog(t, "token given back")
			r.WantCounts(t, id, 2, 0)
		})
	}
}

// The connection of an admission breaks while its command is on its way; it is asked again, and refused. The first command takes no
// token for nobody when it comes.
func TestLateAcquire(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	p := rig.StartProxy(t, r.Address)
	w := startWebhook(t, testConfig(p.Address))
	holder := w.wantAdmitted(t, id, 1)
	h := p.HoldFirst(t, acquireScript.made().Hash(), true)
	w.wantFull(t, id, 1, 1)
	<-h.Held
	giveBack(t, s, id, holder)
	arrives(t, r, h)
	r.WantCounts(t, id, 1, 0)
}

// Redis hangs for some seconds under admissions of which some give up, and some do not. In the end exactly those tokens are in use that
// somebody got.
func TestAbandonedAdmissions(t *testing.T) {
	t.Parallel()
	const length = 50
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id, fresh := freshID(), freshID()
	got := []string{w.wantAdmitted(t, id, length), w.wantAdmitted(t, id, length)}
	waiters := freshID()
	holder := acquire(t, w.semaphores, waiters, 1)
	token, done := queueUp(t, context.Background(), w.semaphores, waiters, 1, r)
	r.Pause(t)
	begin := time.Now()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			timeout := []time.Duration{300, 1000, 2100, 4000, 5200, 30000}[i%6] * time.Millisecond
			if i >= 30 { // and some that had to repair first
				_, _, err := w.post(context.Background(), rig.Review(t, fresh, 1), timeout.String())
				if err != nil {
					t.Error(err)
				}
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), timeout)
			defer cancel()
			if token, _, err := w.semaphores.acquire(ctx, id, "", length, 10*time.Second); err == nil {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, token)
			} else if timeout > 10*time.Second {
				t.Error(err)
			}
		})
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if since := time.Since(begin); since < 4500*time.Millisecond {
			return fmt.Errorf("for %s", since)
		}
		return nil
	})
	r.Resume(t)
	wg.Wait()
	rig.Eventually(t, 10*time.Second, func() error {
		queue, inflight, err := r.Counts(id)
		if err == nil && (inflight != len(got) || queue+inflight != length) {
			err = fmt.Errorf("queue %d, in flight %d, want %d of %d", queue, inflight, len(got), length)
		}
		return err
	})
	r.WantInflight(t, id, got...)
	if len(got) < 2+5 {
		t.Errorf("%d were admitted", len(got))
	}
	giveBack(t, w.semaphores, waiters, holder)
	wantDone(t, done)
	r.WantInflight(t, waiters, token)
	w.close() // waits for what goes on in the background
	r.WantInflight(t, id, got...)
}
