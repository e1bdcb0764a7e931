//go:build failover

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	trafficInterval = 2 * time.Second // between two heartbeats
	trafficHolders  = 20
	trafficWaiters  = 10
	patient         = "10s"
	impatient       = "1s"
)

// tried is what became of an admission; times are since the fault.
type tried struct {
	id      semaphoreID
	timeout string
	start   time.Duration
	took    time.Duration
	token   string
	err     error
}

// traffic is what goes on while servers fail: admissions, fifty a second, every other with a second of time; holders that beat; and a
// line.
type traffic struct {
	group   rig.Group
	webhook *testWebhook
	ids     []semaphoreID // of the admissions
	held    semaphoreID   // of the holders
	line    semaphoreID   // of the waiters

	holders    []string // tokens
	lineHolder string
	waiters    []string
	got        chan string // the waiters' tokens, in the order in which they get them

	mu    sync.Mutex
	ends  map[string]func() // by token: end a holder
	fault time.Time
	tried []tried
	stop  func() // ends the admissions
	beats sync.WaitGroup
}

// groupConfig is a configuration with a lock server of its own.
func groupConfig(t *testing.T, address string) webhookConfig {
	t.Helper()
	c := beating(address, trafficInterval)
	c.redisAddresses = []string{rig.StartRedis(t).Address}
	return c
}

// startTraffic starts it. Holders and waiters are of the first of the ids' servers.
func startTraffic(t *testing.T, g rig.Group, ids ...semaphoreID) *traffic {
	t.Helper()
	c := groupConfig(t, g.Address())
	f := &traffic{group: g, webhook: startWebhook(t, c), ids: ids, got: make(chan string, trafficWaiters), ends: map[string]func(){},
		held: sameServer(t, g, ids[0]), line: sameServer(t, g, ids[0])}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(f.webhook.log.String())
		}
	})
	ctx, end := context.WithCancel(context.Background())
	t.Cleanup(func() {
		end()
		f.beats.Wait()
	})
	newClient := func() *semaphores {
		return newSemaphores(c.settings, newLocker(c.settings, 0), 1, slog.New(slog.DiscardHandler))
	}
	for range trafficHolders {
		token := f.webhook.wantAdmitted(t, f.held, trafficHolders)
		f.holders = append(f.holders, token)
		f.beat(ctx, newClient(), f.held, token)
	}
	f.lineHolder = f.webhook.wantAdmitted(t, f.line, 1)
	f.beat(ctx, newClient(), f.line, f.lineHolder)
	for range trafficWaiters {
		w := newWaiter(newClient(), f.line, 1)
		f.waiters = append(f.waiters, w.token)
		f.beats.Go(func() {
			if w.waitOnly(ctx) != nil {
				_ = w.semaphores.close(context.Background())
				return
			}
			f.beat(ctx, w.semaphores, f.line, w.token)
			f.got <- w.token
		})
		g.Holder(t, f.line).WantLine(t, f.line, f.waiters...)
	}
	f.admit(ctx)
	return f
}

// sameServer is a fresh semaphore on the server of another.
func sameServer(t *testing.T, g rig.Group, id semaphoreID) semaphoreID {
	for {
		if fresh := freshID(); g.Holder(t, fresh) == g.Holder(t, id) {
			return fresh
		}
	}
}

// beat is what a holder's sidecar does, until ctx is done or its end is called.
func (f *traffic) beat(ctx context.Context, client *semaphores, id semaphoreID, token string) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	f.mu.Lock()
	f.ends[token] = func() {
		cancel()
		<-ended
	}
	f.mu.Unlock()
	f.beats.Go(func() {
		defer close(ended)
		defer func() { _ = client.close(context.Background()) }()
		s := &sidecar{semaphores: client, id: id, token: token, interval: trafficInterval, grace: ctx, log: client.log}
		s.loop(ctx, 0, nil)
	})
}

// admit sends admissions until stop is called, which waits for the last.
func (f *traffic) admit(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	f.stop = sync.OnceFunc(func() {
		cancel()
		<-ended
	})
	f.beats.Go(func() {
		defer close(ended)
		var all sync.WaitGroup
		defer all.Wait()
		ticks := time.NewTicker(time.Second / 50)
		defer ticks.Stop()
		for n := 0; ctx.Err() == nil; n++ {
			<-ticks.C
			all.Go(func() {
				a := tried{id: f.ids[n%len(f.ids)], timeout: []string{patient, impatient}[n/len(f.ids)%2]}
				start := time.Now()
				a.token, a.err = f.try(a.id, a.timeout)
				a.took = time.Since(start)
				f.mu.Lock()
				defer f.mu.Unlock()
				a.start = start.Sub(f.fault)
				if f.fault.IsZero() {
					a.start = -time.Hour
				}
				f.tried = append(f.tried, a)
			})
		}
	})
}

// try asks for a token as the admission of a pod does.
func (f *traffic) try(id semaphoreID, timeout string) (token string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin(timeout))
	defer cancel()
	token, _, err = f.webhook.semaphores.acquire(ctx, id, "", maxLength, 10*time.Second)
	return token, err
}

// strike does the fault.
func (f *traffic) strike(fault func()) {
	f.mu.Lock()
	f.fault = time.Now()
	f.mu.Unlock()
	fault()
}

// since returns the admissions that began after so much time since the fault.
func (f *traffic) since(after time.Duration) (all []tried) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.tried {
		if a.start >= after {
			all = append(all, a)
		}
	}
	return all
}

// recoveredBy is how long after a fault all is to work again: the bound, or three seconds after the servers themselves have failed over, which
// takes them longer on a machine that is busy. An attempt that the old server leaves without an answer takes two of the three.
func (f *traffic) recoveredBy(t *testing.T, bound time.Duration, serves func() bool) time.Duration {
	t.Helper()
	rig.Eventually(t, 20*time.Second, func() error {
		if serves() {
			return errors.New("the servers have not failed over")
		}
		return nil
	})
	return max(bound, time.Since(f.fault)+3*time.Second)
}

// wantRecovered waits until the queue works again, and for some seconds more. It fails unless all admissions with ten seconds of
// time succeed, and those with one that began later than bound after the fault. What was lost with the old server is counted again
// once its holder's heartbeat comes. Then all adds up, and the line goes on in its order.
func (f *traffic) wantRecovered(t *testing.T, bound time.Duration, unaffected ...semaphoreID) {
	t.Helper()
	rig.Eventually(t, bound+20*time.Second, func() error {
		if n := len(f.since(bound + 2*time.Second)); n < 20 {
			return fmt.Errorf("%d admissions since", n)
		}
		return nil
	})
	f.stop()
	all := f.since(0)
	var slowest, slowestOther time.Duration
	failed, lastFailed := 0, time.Duration(0)
	for _, a := range all {
		other := slices.Contains(unaffected, a.id)
		if other {
			slowestOther = max(slowestOther, a.took)
		} else {
			slowest = max(slowest, a.took)
		}
		if a.err == nil {
			continue
		}
		failed++
		lastFailed = max(lastFailed, a.start+a.took)
		if other || a.timeout == patient || a.start+a.took > bound {
			t.Errorf("%s after the fault, an admission with %s failed after %s: %v", a.start, a.timeout, a.took, a.err)
		}
	}
	if slowest > bound {
		t.Errorf("the slowest admission took %s", slowest)
	}
	t.Logf("of %d admissions %d failed, all with 1 s, until %.1f s after the fault; the slowest took %.1f s, on other servers %.2f s",
		len(all), failed, lastFailed.Seconds(), slowest.Seconds(), slowestOther.Seconds())

	// Holders are back within an interval, and a retry.
	holder := f.group.Holder(t, f.held)
	rig.Eventually(t, trafficInterval+3*time.Second, func() error {
		got := slices.Sorted(slices.Values(holder.Inflight(t, f.held)))
		if want := slices.Sorted(slices.Values(f.holders)); !slices.Equal(got, want) {
			return fmt.Errorf("of the holders %d are in flight", len(got))
		}
		return nil
	})
	holder.WantCounts(t, f.held, 0, trafficHolders)
	f.wantCounted(t)
	f.wantLineGoesOn(t)
}

// wantCounted checks the tokens of the admissions: what is in flight are those that somebody got, but for those of the last moment
// before the failover, which the new server does not know. A heartbeat, as their pods' sidecars send it, counts them again.
func (f *traffic) wantCounted(t *testing.T) {
	t.Helper()
	lost := 0
	for _, id := range f.ids {
		server := f.group.Holder(t, id)
		inflight := map[string]bool{}
		for _, token := range server.Inflight(t, id) {
			inflight[token] = true
		}
		granted := 0
		f.mu.Lock()
		for _, a := range f.tried {
			if a.id != id || a.err != nil {
				continue
			}
			granted++
			if !inflight[a.token] {
				lost++
				if _, err := f.webhook.semaphores.heartbeat(context.Background(), id, a.token, "", 0); err != nil {
					t.Error(err)
				}
			}
		}
		f.mu.Unlock()
		rig.Eventually(t, 30*time.Second, func() error { // what failed admissions may have taken is given back
			if got := len(server.Inflight(t, id)); got != granted {
				return fmt.Errorf("%s: %d in flight, %d were handed out", id, got, granted)
			}
			return nil
		})
		if queue, _, err := server.Counts(id); err != nil || queue+granted > maxLength {
			t.Errorf("%s: %d free, %d in use, %v", id, queue, granted, err)
		}
	}
	t.Logf("%d tokens were unknown to the new server, and counted again", lost)
}

// wantLineGoesOn gives back the token that the line waits for, and what comes of it, and wants the line's order.
func (f *traffic) wantLineGoesOn(t *testing.T) {
	t.Helper()
	f.group.Holder(t, f.line).WantLine(t, f.line, f.waiters...)
	last := f.lineHolder
	for i, want := range f.waiters[:3] {
		start := time.Now()
		f.release(t, last)
		select {
		case got := <-f.got:
			if got != want {
				t.Fatalf("the %s in line got the token out of turn", ordinal(slices.Index(f.waiters, got)+1))
			}
			// Called, or by its own next question, which tells it, too, that it has to subscribe elsewhere.
			if took := time.Since(start); took > pollMost {
				t.Errorf("the %s in line was called %s late", ordinal(i+1), took)
			}
			last = got
		case <-time.After(20 * time.Second):
			t.Fatal("the line does not go on")
		}
	}
}

// release ends a holder, whose sidecar gives its token back.
func (f *traffic) release(t *testing.T, token string) {
	t.Helper()
	f.mu.Lock()
	end := f.ends[token]
	f.mu.Unlock()
	end()
	giveBack(t, f.webhook.semaphores, f.line, token)
}
