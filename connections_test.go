package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// admitted is what became of an admission.
type admitted struct {
	start time.Duration // after what the test did
	took  time.Duration
	rig.Admission
	err error
}

func (a admitted) String() string {
	return fmt.Sprintf("admission after %s took %s: %d %s %v", a.start, a.took, a.Code, a.Message, a.err)
}

// admitFor sends admissions of a semaphore for a while: so many at once, and then one each tenth of a second; every fifth is of a
// fresh semaphore.
func admitFor(w *testWebhook, body, fresh func() []byte, atOnce int, d time.Duration) []admitted {
	var mu sync.Mutex
	var all []admitted
	var wg sync.WaitGroup
	begin := time.Now()
	n := 0
	admit := func() {
		b := body()
		if n++; n%5 == 0 {
			b = fresh()
		}
		wg.Go(func() {
			start := time.Now()
			a, err := w.tryAdmit(b)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, admitted{start.Sub(begin), time.Since(start), a, err})
		})
	}
	for range atOnce {
		admit()
	}
	ticks := time.NewTicker(100 * time.Millisecond)
	defer ticks.Stop()
	for time.Since(begin) < d {
		<-ticks.C
		admit()
	}
	wg.Wait()
	return all
}

// connectAll makes so many connections to the queue Redis, which are idle then.
func connectAll(t *testing.T, w *testWebhook, p *rig.Proxy, n int) {
	t.Helper()
	p.Answers.Lock()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if err := w.semaphores.check(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if active := serverOf(t, w.semaphores, checkID(0)).pool.ActiveCount(); active < n {
			return fmt.Errorf("%d connections", active)
		}
		return nil
	})
	p.Answers.Unlock()
	wg.Wait()
}

// All connections fall silent while new ones work, as after a failover. Admissions that need no repair, and those that do, in the
// midst of it and later, are decided within three seconds, and none fails.
func TestSilentConnections(t *testing.T) {
	r := rig.StartRedis(t)
	p := rig.StartProxy(t, r.Address)
	w := startWebhook(t, testConfig(p.Address))
	id := freshID()
	held := w.wantAdmitted(t, id, 500)
	w.semaphores.giveBack(id, held)
	connectAll(t, w, p, 60) // more than there are admissions at once
	p.Silence()
	all := admitFor(w, func() []byte { return rig.Review(t, id, 500) }, func() []byte { return rig.Review(t, freshID(), 1) }, 20, 3*time.Second)
	tokens, slowest := 0, all[0]
	for _, a := range all {
		if a.took > slowest.took {
			slowest = a
		}
		if a.took > 3*time.Second || a.err != nil || !a.Allowed {
			t.Error(a)
		}
	}
	t.Logf("of %d, the slowest: %s", len(all), slowest)
	for _, a := range all {
		if a.Token != "" && strings.Contains(string(a.Patch), `"`+id.String()+`"`) {
			tokens++
		}
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if _, inflight, err := r.Counts(id); err != nil || inflight != tokens {
			return fmt.Errorf("%d in flight, %d were handed out, %v", inflight, tokens, err)
		}
		return nil
	})
}

// A waiter whose connections all fall silent, that on which it is called too, gets its token at most four seconds after it is free;
// whenever it has asked last.
func TestSilentConnectionsOfAWaiter(t *testing.T) {
	r := rig.CommonRedis(t)
	for i := range 8 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			s, id := testSemaphores(t, r.Address), freshID()
			p := rig.StartProxy(t, r.Address)
			holder := acquire(t, s, id, 1)
			r := rig.CommonRedis(t)
			waiter, done := queueUp(t, context.Background(), testSemaphores(t, p.Address), id, 1, r)
			time.Sleep(time.Duration(i) * 300 * time.Millisecond) // a moment between two of its questions
			p.Silence()
			start := time.Now()
			giveBack(t, s, id, holder)
			wantDone(t, done)
			took := time.Since(start)
			t.Logf("%s late", took)
			if took > 4*time.Second {
				t.Errorf("it got its token %s late", took)
			}
			r.WantInflight(t, id, waiter)
		})
	}
}

// A holder whose connection falls silent is counted all the time.
func TestSilentConnectionOfAHolder(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	p := rig.StartProxy(t, r.Address)
	rig.StartSidecar(t, p.Address, id, token, "--heartbeat-interval-seconds=4").WantLog(t, heldText)
	for range 2 {
		made := p.Made.Load()
		p.Silence()
		at := r.Now(t)
		rig.Eventually(t, 4*time.Second+3*time.Second, func() error {
			if score := string(r.Do(t, "ZSCORE", id.inflightKey(), token).([]byte)); score <= fmt.Sprint(at+1) {
				return fmt.Errorf("the last heartbeat was at %s, now it is %d", score, r.Now(t))
			}
			return nil
		})
		if now := p.Made.Load(); now > made+1+int32(rig.IfDiscovered(4)) {
			t.Errorf("%d connections were made", now-made)
		}
	}
}

// Redis hangs, for old connections and new ones. It is asked again, but not hammered, and then all goes on.
func TestHangingRedisIsNotHammered(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	p := rig.StartProxy(t, r.Address)
	w := startWebhook(t, testConfig(p.Address))
	id := freshID()
	w.wantAdmitted(t, id, 500)
	waiters := freshID()
	holder := acquire(t, w.semaphores, waiters, 1)
	token, done := queueUp(t, context.Background(), w.semaphores, waiters, 1, r)
	beats := w.wantAdmitted(t, id, 500)
	sidecar := rig.StartSidecar(t, p.Address, id, beats)
	sidecar.WantLog(t, heldText)
	r.Do(t, "CONFIG", "RESETSTAT")
	made := p.Made.Load()
	r.Pause(t)
	time.AfterFunc(5*time.Second, func() { _ = r.Cmd.Process.Signal(syscall.SIGCONT) })
	body := func() []byte { return rig.Review(t, id, 500) }
	all := admitFor(w, body, body, 20, 7*time.Second)
	for _, a := range all {
		if a.err != nil || !a.Allowed || a.start > 5500*time.Millisecond && a.took > time.Second {
			t.Error(a)
		}
	}
	n := len(all)
	connections, commands := int(p.Made.Load()-made), r.CommandCalls(t)["evalsha"]
	t.Logf("%d admissions, a waiter and a holder: %d connections, %d commands", n, connections, commands)
	if connections > 2*n+20 || commands > 2*n+30 {
		t.Errorf("%d admissions, a waiter and a holder made %d connections and %d commands", n, connections, commands)
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if _, inflight, err := r.Counts(id); err != nil || inflight != n+2 {
			return fmt.Errorf("%d in flight, want %d, %v", inflight, n+2, err)
		}
		return nil
	})
	giveBack(t, w.semaphores, waiters, holder)
	wantDone(t, done)
	r.WantInflight(t, waiters, token)
}

// Connections that are made, and closed at once, as by a proxy with nothing behind it: it is tried again for as long as the admission
// has time, but not at full speed.
func TestConnectionsThatAreClosedAtOnce(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	p := rig.StartProxy(t, r.Address)
	w := startWebhook(t, testConfig(p.Address))
	id := freshID()
	w.wantAdmitted(t, id, 5)
	p.Cut()
	made := p.Made.Load()
	time.AfterFunc(3*time.Second, p.Mend)
	start := time.Now()
	a, err := w.tryAdmit(rig.Review(t, id, 5))
	if took := time.Since(start); err != nil || !a.Allowed || took > 5*time.Second {
		t.Errorf("answered after %s: %+v, %v", took, a, err)
	}
	if n := p.Made.Load() - made; n > int32(30+rig.IfDiscovered(30)) {
		t.Errorf("%d connections in three seconds", n)
	}
	r.WantCounts(t, id, 3, 2)
}
