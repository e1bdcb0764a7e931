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

// Redis's clock is set by ten minutes, or a server with another clock takes over. No pod
// overtakes a live holder, and dead holders are still reclaimed. The line keeps its
// order, and new pods join at its end.
func TestClockIsSet(t *testing.T) {
	t.Parallel()
	for name, by := range map[string]time.Duration{"back": 10 * time.Minute, "forward": -10 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const threshold = 8 * time.Second
			r, _, id := newSemaphore(t)
			c := configWithInterval(r.Address, 2*time.Second)
			c.staleThreshold = threshold
			s := semaphoresOf(t, c)
			live := acquire(t, s, id, 2)
			p := rig.StartSidecar(t, r.Address, id, live,
				"--heartbeat-interval-seconds=2", "--stale-threshold-seconds=8")
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
				t.Error("an admitted pod overtook the line")
			}
			wantDone(t, done[0])
			rig.WantWithin(t, time.Since(start), threshold+5*time.Second, "reclaiming the dead holder's token")
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

// The estimate of Redis's clock, by which commands have deadlines, is corrected after an
// error.
func TestClockOfRedisIsLearnedAnew(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	clock := &serverOf(t, s, id).clock
	for _, ahead := range []time.Duration{10 * time.Minute, -10 * time.Minute, -30 * time.Second} {
		clock.observe(clock.at(time.Now()) + ahead.Microseconds())
		if _, err := s.heartbeat(context.Background(), id, token, "", "", 0, 1); err != nil {
			t.Errorf("with an estimate %s ahead: %v", ahead, err)
		}
		off := time.Duration(clock.at(time.Now())-int64(r.Now(t))*1e6) * time.Microsecond
		if off < -time.Second || off > 2*time.Second {
			t.Errorf("an estimate %s ahead was corrected to %s ahead", ahead, off)
		}
	}
}

// admitted is the outcome of an admission.
type admitted struct {
	start time.Duration // after the first admission of admitFor
	took  time.Duration
	rig.Admission
	err error
}

func (a admitted) String() string {
	return fmt.Sprintf("admission after %s took %s: %d %s %v", a.start, a.took, a.Code, a.Message, a.err)
}

// admitFor sends admissions for the time d: atOnce of them concurrently, then one each
// tenth of a second. Every fifth admission is for a fresh semaphore.
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
			a, err := w.tryAdmitWithin(b, "30s") // on a starved machine, Redis is away for longer
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

// connectAll opens n idle connections to the queue Redis.
func connectAll(t *testing.T, w *testWebhook, n int) {
	t.Helper()
	pool := serverOf(t, w.semaphores, checkID(0)).pool
	for range n {
		conn, err := pool.GetContext(t.Context())
		rig.Must(t, err)
		defer conn.Close()
	}
}

// All connections fall silent while new ones work, as after a failover. Each admission is
// allowed within three seconds, whether it needs a repair or not, and at whatever moment
// it comes.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	p := rig.StartProxy(t, r.Address)
	w := startWebhook(t, testConfig(p.Address))
	id := freshID()
	held := w.wantAdmitted(t, id, 500)
	w.semaphores.giveBack(id, held)
	connectAll(t, w, 60) // more than there are admissions at once
	p.Silence()
	body := func() []byte { return rig.Review(t, id, 500) }
	fresh := func() []byte { return rig.Review(t, freshID(), 1) }
	all := admitFor(w, body, fresh, 20, 3*time.Second)
	tokens, slowest := 0, all[0]
	for _, a := range all {
		if a.took > slowest.took {
			slowest = a
		}
		if a.err != nil || !a.Allowed {
			t.Error(a)
		}
	}
	rig.WantWithin(t, slowest.took, 3*time.Second, fmt.Sprintf("the slowest of %d admissions", len(all)))
	for _, a := range all {
		if a.Token != "" && strings.Contains(string(a.Patch), `"`+id.String()+`"`) {
			tokens++
		}
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if _, inflight, err := r.Counts(id); err != nil || inflight != tokens {
			return fmt.Errorf("%d in flight, %d handed out, %v", inflight, tokens, err)
		}
		return nil
	})
}

// All connections of a waiter fall silent, the subscribed one too. The waiter still gets
// a free token within four seconds, whenever it polled last.
func TestSilentConnectionsOfAWaiter(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	for i := range 8 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			s, id := testSemaphores(t, r.Address), freshID()
			p := rig.StartProxy(t, r.Address)
			holder := acquire(t, s, id, 1)
			r := rig.CommonRedis(t)
			waiter, done := queueUp(t, context.Background(), testSemaphores(t, p.Address), id, 1, r)
			time.Sleep(time.Duration(i) * 300 * time.Millisecond) // a moment between two of its polls
			p.Silence()
			start := time.Now()
			giveBack(t, s, id, holder)
			wantDone(t, done)
			rig.WantWithin(t, time.Since(start), 4*time.Second, "a token for a waiter behind silent connections")
			r.WantInflight(t, id, waiter)
		})
	}
}

// A holder whose connection falls silent stays in flight.
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
		if now := p.Made.Load(); now > made+3+int32(rig.IfDiscovered(4)) { // a slow machine needs more than one
			t.Errorf("%d connections were made", now-made)
		}
	}
}

// Redis hangs, for old connections and new ones. Clients retry without flooding it, and
// then all work goes on.
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
	late := 0 // admissions that a starved machine keeps until their deadline; they may have a token
	for _, a := range all {
		switch {
		case a.err == nil && a.Allowed:
		case a.took > 10*time.Second && !rig.Timed:
			late++
		default:
			t.Error(a)
		}
		if a.start > 5500*time.Millisecond {
			rig.WantWithin(t, a.took, time.Second, "an admission after Redis was back")
		}
	}
	n := len(all)
	if late > n/2 {
		t.Errorf("%d of %d admissions were late", late, n)
	}
	connections, commands := int(p.Made.Load()-made), r.CommandCalls(t)["evalsha"]
	t.Logf("%d admissions, a waiter and a holder: %d connections, %d commands", n, connections, commands)
	if connections > 4*n+20 || commands > 4*n+30 { // the attempts of one take 1, 2 and 4 s, and the rest of its time
		t.Errorf("%d admissions, a waiter and a holder made %d connections and %d commands", n, connections, commands)
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if _, inflight, err := r.Counts(id); err != nil || inflight < n+2-late || inflight > n+2 {
			return fmt.Errorf("%d in flight, want %d, but for %d that were late; %v", inflight, n+2, late, err)
		}
		return nil
	})
	giveBack(t, w.semaphores, waiters, holder)
	wantDone(t, done)
	r.WantInflight(t, waiters, token)
}

// A proxy without a server accepts connections and closes them at once. The webhook
// retries until the admission's deadline, but not at full speed.
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
		t.Errorf("got %+v, %v", a, err)
	}
	rig.WantWithin(t, time.Since(start), 5*time.Second, "an admission while connections were closed for 3 s")
	if n := p.Made.Load() - made; n > int32(30+rig.IfDiscovered(30)) {
		t.Errorf("%d connections were made in three seconds", n)
	}
	r.WantCounts(t, id, 3, 2)
}

// The memory of a semaphore depends on what its pods need, not on its length.
func TestMemoryOfGreatLengths(t *testing.T) {
	t.Parallel()
	const keys, most = 100, 7 << 20
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	acquire(t, s, id, maxLength) // loads the scripts
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

// Keys of an unused semaphore expire within minutes, whichever command was the last. Keys
// in use stay.
func TestUnusedSemaphoresExpire(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	wantTTL := func(what string, busy bool) {
		t.Helper()
		keys := 0
		for _, key := range id.keys()[:scriptKeys-1] { // the history lives longer
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
	_, err := s.heartbeat(ctx, id, token, "", "", 0, 1)
	rig.Must(t, err)
	wantTTL("rejoined late", true)
	giveBack(t, s, id, token)
	giveBack(t, s, id, token)
	wantTTL("given back twice", false)

	token = acquire(t, s, id, 1)
	waiting, _ := standInLine(t, r, s, id, false)
	wantTTL("held, with a waiter", true)
	giveBack(t, s, id, token)
	wantTTL("kept for the waiter", true)
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
	giveBack(t, s, id, token) // drops the silent waiter
	r.WantLine(t, id)
	wantTTL("the last in line dropped", false)
}

// scriptCost has the totals of commands run by scripts, of their publishes, and of the
// time of scripts.
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

// costDuring returns the cost of the scripts that run during f.
func costDuring(t *testing.T, s *rig.Redis, f func()) scriptCost {
	t.Helper()
	before := costSoFar(t, s)
	f()
	after := costSoFar(t, s)
	return scriptCost{
		commands:  after.commands - before.commands,
		published: after.published - before.published,
		micros:    after.micros - before.micros,
	}
}

// median sorts values and returns the median.
func median[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

// An admission costs the same at any length: the first of a semaphore, which makes its
// tokens, and all later ones.
func TestAdmissionCostsTheSameForAnyLength(t *testing.T) {
	t.Parallel()
	const small, pairs = 3, 15
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	giveBack(t, s, id, acquire(t, s, id, 1)) // loads the scripts
	commands, micros := map[string][]int{}, map[string][]int{}
	name := func(admission, length int) string { return fmt.Sprintf("admission %d of length %d", admission, length) }
	for range pairs { // alternately, so that other load disturbs both alike
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
			factor int // the most that a great length may cost, as a multiple of a small one
			more   int // and this: an unlock, which may come late
			counts bool
		}{"commands": {commands, 1, 5, true}, "µs": {micros, 2, 0, rig.Timed}} {
			few, lots := median(c.values[name(i, small)]), median(c.values[name(i, maxLength)])
			t.Logf("admission %d: %d %s with length %d, %d with length %d", i+1, few, what, small, lots, maxLength)
			if c.counts && lots > c.factor*few+c.more {
				t.Errorf("a great length costs more than %d times as many %s and %d", c.factor, what, c.more)
			}
		}
	}
}

// A command that arrives after its deadline changes nothing, whatever its script. Before
// its deadline, it runs.
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
				t.Errorf("%s after its deadline: got status %d", name, status)
			}
		}
		if !slices.Equal(r.Dump(t, id), before) {
			t.Errorf("%s after its deadline changed data", name)
		}
		if status := run(now[0]*1e6 + 10e6); status == statusLate {
			t.Errorf("%s before its deadline was refused as late", name)
		}
	}
}

// deliverHeld delivers a held command, and waits until Redis has run it.
func deliverHeld(t *testing.T, r *rig.Redis, h *rig.HeldCommand) {
	t.Helper()
	before := r.CommandCalls(t)["evalsha"]
	h.Deliver()
	<-h.Sent
	rig.Eventually(t, 5*time.Second, func() error {
		if r.CommandCalls(t)["evalsha"] == before {
			return errors.New("the command has not arrived")
		}
		return nil
	})
}

// A heartbeat that the sidecar gave up arrives after the release of its token. The token
// is not counted again, whether the heartbeat's connection was silent or was closed.
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
			rig.Eventually(t, 10*time.Second, func() error { // after a heartbeat, the sidecar knows Redis's clock
				if r.LastHeartbeat(t, id, token) == 1 {
					return errors.New("no heartbeat yet")
				}
				return nil
			})
			h := p.HoldFirst(t, heartbeatScript.made().Hash(), hangUp)
			<-h.Held
			rig.Eventually(t, 10*time.Second, func() error {
				if p.Made.Load() == h.Made {
					return errors.New("the sidecar has not retried over another connection")
				}
				return nil
			})
			sidecar.Signal(t, syscall.SIGTERM)
			r.WantCounts(t, id, 2, 0)
			deliverHeld(t, r, h)
			sidecar.WantExit(t, 0)
			sidecar.WantLog(t, "token given back")
			r.WantCounts(t, id, 2, 0)
		})
	}
}

// The connection of an admission breaks while its command is on its way. A retry is
// refused. When the first command arrives, it takes no token.
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
	deliverHeld(t, r, h)
	r.WantCounts(t, id, 1, 0)
}

// While Redis hangs for some seconds, some admissions give up. In the end, exactly the
// tokens of successful admissions are in flight.
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
			if i >= 30 { // some need a repair first
				_, _, err := w.post(context.Background(), rig.Review(t, fresh, 1), timeout.String())
				if err != nil {
					t.Error(err)
				}
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), timeout)
			defer cancel()
			if token, _, err := w.semaphores.acquire(ctx, id, "", length, limit{}, 10*time.Second); err == nil {
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
			return fmt.Errorf("Redis has hung for %s only", since)
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
		t.Errorf("%d were admitted, want at least 7", len(got))
	}
	giveBack(t, w.semaphores, waiters, holder)
	wantDone(t, done)
	r.WantInflight(t, waiters, token)
	w.close() // waits for releases in the background
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
			commonSource, acquireSource, maintainSource, heartbeatSource, releaseSource, keepSource, holdSource, setSource,
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
	for name, want := range map[string]any{"holdsMost": holdsMost, "holdFirst": holdFirst, "holdLast": holdLast, "holdStep": holdStep,
		"historyMost": historyMost} {
		if got := value(name); got != fmt.Sprint(want) {
			t.Errorf("%s is %s in the scripts, and %v in the program", name, got, want)
		}
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
		"stall":        {stall, rig.Stall},
		"linePass":     {linePass, rig.LinePass},
	} {
		wantSeconds(name, c.program)
		if c.suites != c.program {
			t.Errorf("%s is %s in test/rig, and %s in the program", name, c.suites, c.program)
		}
	}
	wantSeconds("overrideMost", scriptOverrideMost)
	if got := value("yourTurn"); got != yourTurn || rig.YourTurn != yourTurn {
		t.Errorf("the scripts call waiters by %q, waiters wait for %q, and suites for %q", got, yourTurn, rig.YourTurn)
	}
	for _, interval := range []time.Duration{1, 2, 3, 4, 30} {
		for _, threshold := range []time.Duration{1, 10, 120} {
			s.heartbeatInterval, s.staleThreshold = interval*time.Second, threshold*time.Second
			wantSeconds("quiet", s.timing().lateAfter())
			wantSeconds("threshold", s.timing().staleAfter())
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

// An empty Redis takes the place of one with ten holders of ten tokens. They come back one
// after another within an interval. New pods ask ten times a second meanwhile, wait or not,
// and repair: none gets a token.
func TestBirthGuard(t *testing.T) {
	t.Parallel()
	for interval := 3 * time.Second; !guardsAgainstNewPods(t, interval); interval *= 2 {
		t.Logf("this machine is too slow for an interval of %s", interval)
	}
}

// guardsAgainstNewPods returns false if the holders could not come back within the interval.
func guardsAgainstNewPods(t *testing.T, interval time.Duration) bool {
	const length = 10
	r := rig.StartRedisWith(t, rig.RedisOptions{Young: true})
	c := configWithInterval(r.Address, interval)
	w, s, id := startWebhook(t, c), semaphoresOf(t, c), freshID()
	r.WantAge(t, 2*interval+time.Second)
	began := time.Now()
	var holders []string
	for range length {
		holders = append(holders, acquire(t, s, id, length))
	}
	r.Crash(t)
	r.LoseData(t)
	rig.Must(t, r.Start())
	waiter := newWaiter(s, id, length)
	isYoung := func() bool { return r.Info(t, "server", "uptime_in_seconds:") <= seconds(interval+beatTimeout) }
	newcomer := func() {
		t.Helper()
		back := length - len(holders)
		a := w.admit(t, rig.Review(t, id, length))
		if a.Allowed {
			t.Fatalf("admitted a pod with %d of %d holders back", back, length)
		}
		_, b, err := waiter.acquireOnce(t.Context(), joinLine)
		rig.Must(t, err)
		if b.status != acquireFull {
			t.Fatalf("a waiter got %+v with %d of %d holders back", b, back, length)
		}
		places, err := s.refreshPlaces(t.Context(), id, 0, nil, []placeRequest{{"gated", 1, 0, length, 1, "gated ", waitEnd{}}})
		rig.Must(t, err)
		if len(places.served) > 0 {
			t.Fatalf("a gate is told of a free token with %d of %d holders back", back, length)
		}
		maintain(t, s, id, length)
		for name, text := range map[string]string{"a pod that does not wait": a.Message,
			"a waiter": waitingText(id, length, 1, waitEnd{}, b), "a gated pod": doubtText(places.doubt)} {
			if back < length && !strings.Contains(text, "; Redis has just started, was away or has lost data: in ") {
				t.Fatalf("with %d of %d holders back, %s was told %q", back, length, name, text)
			}
		}
	}
	for start := time.Now(); len(holders) > 0; {
		due := start.Add(time.Duration(length-len(holders)+1) * interval / (length + 1))
		for ok := true; ok; ok = time.Now().Before(due) {
			if time.Since(start) > interval {
				return false
			}
			newcomer()
			time.Sleep(100 * time.Millisecond)
		}
		_, err := s.heartbeat(t.Context(), id, holders[0], "", "", time.Since(began), 1)
		rig.Must(t, err)
		holders = holders[1:]
	}
	if !isYoung() {
		return false
	}
	r.WantAge(t, 2*interval+time.Second)
	newcomer()
	r.WantCounts(t, id, 0, length)
	return true
}

// A young Redis without holders hands out tokens when it is older than an interval and
// three seconds. Where the user may not ask for its age, it does so at once, and the log
// says so once.
func TestBirthGuardEnds(t *testing.T) {
	t.Parallel()
	const interval = time.Second
	r := rig.StartRedisWith(t, rig.RedisOptions{Young: true})
	s := semaphoresOf(t, configWithInterval(r.Address, interval))
	start := time.Now()
	rig.Eventually(t, 30*time.Second, func() error {
		_, _, err := s.acquire(t.Context(), freshID(), "", 1, limit{}, time.Second)
		return err
	})
	t.Logf("the first token came after %s", time.Since(start))
	if age := r.Info(t, "server", "uptime_in_seconds:"); age <= seconds(interval)+1 {
		t.Errorf("got a token of a server that is %d s old", age)
	}

	hidden := rig.StartRedis(t)
	w := startWebhook(t, configWithInterval(hidden.Address, interval))
	for range 3 {
		_, err := w.ready(t.Context())
		rig.Must(t, err)
	}
	acquire(t, w.semaphores, freshID(), 1)
	if n := len(w.log.Lines(t, "no birth guard: the user may not ask for INFO server")); n != 1 {
		t.Errorf("the log says %d times that there is no birth guard", n)
	}
}
