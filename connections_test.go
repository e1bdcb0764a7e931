package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// admitted is what became of an admission.
type admitted struct {
	start time.Duration // after what the test did
	took  time.Duration
	admission
	err error
}

func (a admitted) String() string {
	return fmt.Sprintf("admission after %s took %s: %d %s %v", a.start, a.took, a.code, a.message, a.err)
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
func connectAll(t *testing.T, w *testWebhook, p *faultyProxy, n int) {
	t.Helper()
	p.answers.Lock()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if err := w.semaphores.check(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, 10*time.Second, func() error {
		if active := serverOf(t, w.semaphores, checkID(0)).pool.ActiveCount(); active < n {
			return fmt.Errorf("%d connections", active)
		}
		return nil
	})
	p.answers.Unlock()
	wg.Wait()
}

// All connections fall silent while new ones work, as after a failover. Admissions that need no repair, and those that do, in the
// midst of it and later, are decided within three seconds, and none fails.
func TestSilentConnections(t *testing.T) {
	r := startRedis(t)
	p := startFaultyProxy(t, r.address)
	w := startWebhook(t, testConfig(p.address))
	id := freshID()
	held := w.wantAdmitted(t, id, 500)
	w.semaphores.giveBack(id, held)
	connectAll(t, w, p, 60) // more than there are admissions at once
	p.silence()
	all := admitFor(w, func() []byte { return review(t, id, 500) }, func() []byte { return review(t, freshID(), 1) }, 20, 3*time.Second)
	tokens, slowest := 0, all[0]
	for _, a := range all {
		if a.took > slowest.took {
			slowest = a
		}
		if a.took > 3*time.Second || a.err != nil || !a.allowed {
			t.Error(a)
		}
	}
	t.Logf("of %d, the slowest: %s", len(all), slowest)
	for _, a := range all {
		if a.token != "" && strings.Contains(string(a.patch), `"`+id.String()+`"`) {
			tokens++
		}
	}
	eventually(t, 10*time.Second, func() error {
		if _, inflight, err := r.counts(id); err != nil || inflight != tokens {
			return fmt.Errorf("%d in flight, %d were handed out, %v", inflight, tokens, err)
		}
		return nil
	})
}

// A waiter whose connections all fall silent, that on which it is called too, gets its token at most four seconds after it is free;
// whenever it has asked last.
func TestSilentConnectionsOfAWaiter(t *testing.T) {
	r := commonRedis(t)
	for i := range 8 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			s, id := testSemaphores(t, r.address), freshID()
			p := startFaultyProxy(t, r.address)
			holder := acquire(t, s, id, 1)
			r := commonRedis(t)
			waiter, done := queueUp(t, context.Background(), testSemaphores(t, p.address), id, 1, r)
			time.Sleep(time.Duration(i) * 300 * time.Millisecond) // a moment between two of its questions
			p.silence()
			start := time.Now()
			giveBack(t, s, id, holder)
			wantDone(t, done)
			took := time.Since(start)
			t.Logf("%s late", took)
			if took > 4*time.Second {
				t.Errorf("it got its token %s late", took)
			}
			r.wantInflight(t, id, waiter)
		})
	}
}

// A holder whose connection falls silent is counted all the time.
func TestSilentConnectionOfAHolder(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	p := startFaultyProxy(t, r.address)
	startSidecar(t, p.address, id, token, "--heartbeat-interval-seconds=4").wantLog(t, heldText)
	for range 2 {
		made := p.made.Load()
		p.silence()
		at := r.now(t)
		eventually(t, 4*time.Second+3*time.Second, func() error {
			if score := string(r.do(t, "ZSCORE", id.inflightKey(), token).([]byte)); score <= fmt.Sprint(at+1) {
				return fmt.Errorf("the last heartbeat was at %s, now it is %d", score, r.now(t))
			}
			return nil
		})
		if now := p.made.Load(); now > made+1+int32(addedByLookups(4)) {
			t.Errorf("%d connections were made", now-made)
		}
	}
}

// Redis hangs, for old connections and new ones. It is asked again, but not hammered, and then all goes on.
func TestHangingRedisIsNotHammered(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	p := startFaultyProxy(t, r.address)
	w := startWebhook(t, testConfig(p.address))
	id := freshID()
	w.wantAdmitted(t, id, 500)
	waiters := freshID()
	holder := acquire(t, w.semaphores, waiters, 1)
	token, done := queueUp(t, context.Background(), w.semaphores, waiters, 1, r)
	beats := w.wantAdmitted(t, id, 500)
	sidecar := startSidecar(t, p.address, id, beats)
	sidecar.wantLog(t, heldText)
	r.do(t, "CONFIG", "RESETSTAT")
	made := p.made.Load()
	r.pause(t)
	time.AfterFunc(5*time.Second, func() { _ = r.cmd.Process.Signal(syscall.SIGCONT) })
	body := func() []byte { return review(t, id, 500) }
	all := admitFor(w, body, body, 20, 7*time.Second)
	for _, a := range all {
		if a.err != nil || !a.allowed || a.start > 5500*time.Millisecond && a.took > time.Second {
			t.Error(a)
		}
	}
	n := len(all)
	connections, commands := int(p.made.Load()-made), commandCalls(t, r)["evalsha"]
	t.Logf("%d admissions, a waiter and a holder: %d connections, %d commands", n, connections, commands)
	if connections > 2*n+20 || commands > 2*n+30 {
		t.Errorf("%d admissions, a waiter and a holder made %d connections and %d commands", n, connections, commands)
	}
	eventually(t, 10*time.Second, func() error {
		if _, inflight, err := r.counts(id); err != nil || inflight != n+2 {
			return fmt.Errorf("%d in flight, want %d, %v", inflight, n+2, err)
		}
		return nil
	})
	giveBack(t, w.semaphores, waiters, holder)
	wantDone(t, done)
	r.wantInflight(t, waiters, token)
}

// Connections that are made, and closed at once, as by a proxy with nothing behind it: it is tried again for as long as the admission
// has time, but not at full speed.
func TestConnectionsThatAreClosedAtOnce(t *testing.T) {
	t.Parallel()
	r := commonRedis(t)
	p := startFaultyProxy(t, r.address)
	w := startWebhook(t, testConfig(p.address))
	id := freshID()
	w.wantAdmitted(t, id, 5)
	p.cut()
	made := p.made.Load()
	time.AfterFunc(3*time.Second, p.mend)
	start := time.Now()
	a, err := w.tryAdmit(review(t, id, 5))
	if took := time.Since(start); err != nil || !a.allowed || took > 5*time.Second {
		t.Errorf("answered after %s: %+v, %v", took, a, err)
	}
	if n := p.made.Load() - made; n > int32(30+addedByLookups(30)) {
		t.Errorf("%d connections in three seconds", n)
	}
	r.wantCounts(t, id, 3, 2)
}
