package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// Redis's clock is set by ten minutes, or a server with another clock takes over: nobody overtakes a live holder, a dead one is found
// out as ever, and the line goes on in its order, with those who join it now at its end.
func TestClockIsSet(t *testing.T) {
	t.Parallel()
	for name, by := range map[string]time.Duration{"back": 10 * time.Minute, "forward": -10 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const threshold = 8 * time.Second
			r, _, id := newSemaphore(t)
			c := beating(r.Address, 2*time.Second)
			c.staleThreshold = threshold
			s := semaphoresOf(t, c)
			live := acquire(t, s, id, 2)
			p := rig.StartSidecar(t, r.Address, id, live, "--heartbeat-interval-seconds=2", "--stale-threshold-seconds=8")
			p.WantLog(t, heldText)
			var line []string
			var done []<-chan error
			join := func() {
				token, d := queueUp(t, context.Background(), s, id, 2, r)
				line, done = append(line, token), append(done, d)
			}
			dead := acquire(t, s, id, 2)
			join()
			join()
			r.Shift(t, id, by)
			start := time.Now()
			join()
			r.WantInflight(t, id, live, dead)
			w := startWebhook(t, c)
			a := w.admit(t, rig.Review(t, id, 2))
			if a.Allowed {
				t.Error("a pod that does not wait overtook the line")
			}
			wantDone(t, done[0])
			rig.WantWithin(t, time.Since(start), threshold+5*time.Second, "giving on the dead holder's token")
			r.WantInflight(t, id, live, line[0])
			r.WantLine(t, id, line[1:]...)

			wantSoon := func(i int) {
				t.Helper()
				start := time.Now()
				wantDone(t, done[i])
				rig.WantWithin(t, time.Since(start), 5*time.Second, "a free token for the next in line")
				r.WantLine(t, id, line[i+1:]...)
			}
			r.Shift(t, id, by)
			giveBack(t, s, id, line[0])
			wantSoon(1)
			r.Shift(t, id, -by)
			p.Signal(t, syscall.SIGTERM)
			wantSoon(2)
			r.WantInflight(t, id, line[1:]...)
		})
	}
}

// The clock by which commands have their deadlines is learned anew.
func TestClockOfRedisIsLearnedAnew(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	clock := &serverOf(t, s, id).clock
	for _, ahead := range []time.Duration{10 * time.Minute, -10 * time.Minute, -30 * time.Second} {
		clock.observe(clock.at(time.Now()) + ahead.Microseconds())
		if _, err := s.heartbeat(context.Background(), id, token, "", 0); err != nil {
			t.Errorf("an estimate that is %s ahead: %v", ahead, err)
		}
		if off := time.Duration(clock.at(time.Now())-int64(r.Now(t))*1e6) * time.Microsecond; off < -time.Second || off > 2*time.Second {
			t.Errorf("an estimate that was %s ahead is %s ahead now", ahead, off)
		}
	}
}

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
		if a.err != nil || !a.Allowed {
			t.Error(a)
		}
	}
	rig.WantWithin(t, slowest.took, 3*time.Second, fmt.Sprintf("of %d admissions, the slowest", len(all)))
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
			rig.WantWithin(t, time.Since(start), 4*time.Second, "a token for a waiter behind silent connections")
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
		rig.Eventually(t, 4*time.Second+beatTimeout, func() error {
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
		if a.err != nil || !a.Allowed {
			t.Error(a)
		}
		if a.start > 5500*time.Millisecond {
			rig.WantWithin(t, a.took, time.Second, "an admission after Redis was back")
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
	if err != nil || !a.Allowed {
		t.Errorf("answered %+v, %v", a, err)
	}
	rig.WantWithin(t, time.Since(start), 5*time.Second, "an admission while connections were closed for 3 s")
	if n := p.Made.Load() - made; n > int32(30+rig.IfDiscovered(30)) {
		t.Errorf("%d connections in three seconds", n)
	}
	r.WantCounts(t, id, 3, 2)
}

// A semaphore costs what its pods need, not what its length allows.
func TestMemoryOfGreatLengths(t *testing.T) {
	t.Parallel()
	const keys, most = 300, 20 << 20
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	acquire(t, s, id, maxLength) // so that the scripts are there
	before := r.Info(t, "memory", "used_memory:")
	for range keys {
		acquire(t, s, freshID(), maxLength)
	}
	grown := r.Info(t, "memory", "used_memory:") - before
	t.Logf("%d bytes for %d semaphores", grown, keys)
	if grown > most {
		t.Errorf("Redis has grown by %d bytes, want at most %d", grown, most)
	}
}

// What nobody uses any more goes within minutes, whoever was the last to leave; what is in use stays.
func TestUnusedSemaphoresExpire(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	wantTTL := func(what string, busy bool) {
		t.Helper()
		keys := 0
		for _, key := range id.keys() {
			ttl, err := redis.Int(r.Do(t, "TTL", key), nil)
			rig.Must(t, err)
			if ttl == -2 {
				continue
			}
			keys++
			if ttl < 0 || busy && ttl < 86400/2 || !busy && ttl > 300 {
				t.Errorf("%s: %s has a time to live of %d", what, key, ttl)
			}
		}
		if keys == 0 {
			t.Errorf("%s: there are no keys", what)
		}
	}
	token := acquire(t, s, id, 2)
	wantTTL("held", true)
	giveBack(t, s, id, token)
	wantTTL("given back", false)
	_, err := s.heartbeat(ctx, id, token, "", 0)
	rig.Must(t, err)
	wantTTL("back late", true)
	giveBack(t, s, id, token)
	giveBack(t, s, id, token)
	wantTTL("given back twice", false)

	token = acquire(t, s, id, 1)
	waiting, _ := standInLine(t, r, s, id, false)
	wantTTL("waited for", true)
	giveBack(t, s, id, token)
	wantTTL("kept for the one that waits", true)
	wantFullError(t, s, id, 1, 0)
	wantTTL("refused", true)
	giveBack(t, s, id, waiting)
	wantTTL("the line left", false)

	r.MakeStale(t, id, acquire(t, s, id, 1))
	maintain(t, s, id, 1)
	wantTTL("reclaimed", false)
	token = acquire(t, s, id, 1)
	wantTTL("held again", true)

	silent, _ := standInLine(t, r, s, id, false)
	r.Unseen(t, id, silent, time.Minute)
	giveBack(t, s, id, token) // finds the one in line gone
	r.WantLine(t, id)
	wantTTL("the last in line dropped", false)
}

// scriptCost is what scripts have done so far.
type scriptCost struct{ commands, published, micros int }

func costSoFar(t *testing.T, s *rig.Redis) (c scriptCost) {
	t.Helper()
	for name, n := range s.CommandCalls(t) {
		if name != "info" && name != "evalsha" && name != "eval" {
			c.commands += n
		}
	}
	c.published = s.CommandCalls(t)["publish"]
	c.micros = s.Info(t, "commandstats", `cmdstat_evalsha:calls=\d+,usec=`)
	return c
}

// during is what scripts do while f runs.
func costDuring(t *testing.T, s *rig.Redis, f func()) scriptCost {
	t.Helper()
	before := costSoFar(t, s)
	f()
	after := costSoFar(t, s)
	return scriptCost{after.commands - before.commands, after.published - before.published, after.micros - before.micros}
}

// median sorts the values.
func median[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

// A great length costs an admission no more than a small one: the first of a semaphore, which makes its tokens, and all others.
func TestAdmissionCostsTheSameForAnyLength(t *testing.T) {
	t.Parallel()
	const small, pairs = 3, 50
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	giveBack(t, s, id, acquire(t, s, id, 1)) // so that the scripts are there
	commands, micros := map[string][]int{}, map[string][]int{}
	name := func(admission, length int) string { return fmt.Sprintf("admission %d of length %d", admission, length) }
	for range pairs { // in turn, so that what disturbs one disturbs the other
		for _, length := range []int{small, maxLength} {
			id := freshID()
			for i := range small {
				c := costDuring(t, r, func() { acquire(t, s, id, length) })
				commands[name(i, length)] = append(commands[name(i, length)], c.commands)
				micros[name(i, length)] = append(micros[name(i, length)], c.micros)
			}
		}
	}
	for i := range small {
		for what, c := range map[string]struct {
			values map[string][]int
			factor int // for how much longer a command may take
		}{"commands": {commands, 1}, "µs": {micros, 2}} {
			few, lots := median(c.values[name(i, small)]), median(c.values[name(i, maxLength)])
			t.Logf("admission %d: %d %s with length %d, %d with length %d", i+1, few, what, small, lots, maxLength)
			if lots > c.factor*few {
				t.Error("too many")
			}
		}
	}
}

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

// The scripts, the program and test/rig have the same constants, under the same names.
// The scripts and the program compute the same times from them.
func TestScriptsAndProgramAgree(t *testing.T) {
	r, s, id := newSemaphore(t)
	// value evaluates a local of semaphore.lua.
	value := func(name string) string {
		t.Helper()
		for i, source := range []string{
			commonSource, acquireSource, maintainSource, heartbeatSource, releaseSource, keepSource, holdSource,
		} {
			want := 0
			if i == 0 {
				want = 1
			}
			if n := strings.Count(source, "local "+name+" ="); n != want {
				t.Errorf("script source %d declares %s %d times, want %d", i, name, n, want)
			}
		}
		args := append([]any{commonSource + "return tostring(" + name + ")", scriptKeys}, id.keys()...)
		args = append(args, math.MaxInt64, seconds(s.heartbeatInterval), seconds(s.staleThreshold), s.timeToLive())
		text, err := redis.String(r.Do(t, "EVAL", args...), nil)
		rig.Must(t, err)
		return text
	}
	wantSeconds := func(name string, want time.Duration) {
		t.Helper()
		if got := value(name); got != fmt.Sprint(want.Seconds()) {
			t.Errorf("interval %s, threshold %s: %s is %s s in the scripts, and %s in the program",
				s.heartbeatInterval, s.staleThreshold, name, got, want)
		}
	}
	for name, c := range map[string]struct{ program, suites time.Duration }{
		"beatTimeout":  {beatTimeout, rig.BeatTimeout},
		"pollMost":     {pollMost, rig.PollMost},
		"lineQuiet":    {lineQuiet, rig.LineQuiet},
		"linePatience": {linePatience, rig.LinePatience},
	} {
		wantSeconds(name, c.program)
		if c.suites != c.program {
			t.Errorf("%s is %s in test/rig, and %s in the program", name, c.suites, c.program)
		}
	}
	if got := value("yourTurn"); got != yourTurn || rig.YourTurn != yourTurn {
		t.Errorf("the scripts call waiters by %q, waiters wait for %q, and suites for %q", got, yourTurn, rig.YourTurn)
	}
	for _, interval := range []time.Duration{1, 2, 3, 4, 30} {
		for _, threshold := range []time.Duration{1, 10, 120} {
			s.heartbeatInterval, s.staleThreshold = interval*time.Second, threshold*time.Second
			wantSeconds("quiet", s.lateAfter())
			wantSeconds("threshold", s.staleAfter())
		}
	}

	// The program is as quick as the scripts rely on it, with the longest attempts.
	if d := s.attemptTimeout() + holderRetry; d > beatTimeout {
		t.Errorf("live holders may beat %s after an outage, and the scripts wait for %s", d, beatTimeout)
	}
	if placesEvery > pollMost {
		t.Errorf("the gate refreshes places every %s, and waiters ask within %s", placesEvery, pollMost)
	}
	if doubtEvery >= lineQuiet {
		t.Errorf("repairs come every %s, and Redis takes %s for a silence", doubtEvery, lineQuiet)
	}
}
