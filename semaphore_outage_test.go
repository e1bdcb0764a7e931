package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
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

// wantSettled waits until holders had time to come back. It fails if other tokens than
// these are in flight meanwhile.
func wantSettled(t *testing.T, s *rig.Redis, id semaphoreID, quiet time.Duration, tokens ...string) {
	t.Helper()
	rig.Eventually(t, 20*time.Second, func() error {
		s.WantInflight(t, id, tokens...)
		if since := s.Now(t) - s.State(t, id, "resumed"); since <= seconds(quiet)+1 {
			return fmt.Errorf("only %d s after the outage", since)
		}
		return nil
	})
}

// After an outage longer than the threshold, live holders keep their tokens. Clients that
// started during the outage, and know nothing of it, do not take them. Dead holders are
// reclaimed.
func TestHoldersOutliveAnOutage(t *testing.T) {
	t.Parallel()
	const interval = 2 * time.Second
	r, _, id := newSemaphore(t)
	s := semaphoresOf(t, configWithInterval(r.Address, interval))
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

	w := startWebhook(t, configWithInterval(others.Address, interval))
	status, text, err := w.post(context.Background(), rig.Review(t, id, 3), "500ms")
	if err != nil || status != http.StatusInternalServerError {
		t.Errorf("got %d %s, %v while Redis is unreachable", status, text, err)
	}
	var waiting []*rig.Process
	for range 2 {
		made := others.Made.Load()
		waiting = append(waiting, rig.StartWaitingSidecar(t, others.Address, id, uuid.NewString(), 3, flag))
		rig.Eventually(t, 10*time.Second, func() error {
			if others.Made.Load() == made {
				return errors.New("the sidecar has not retried yet")
			}
			return nil
		})
	}
	others.Mend() // their commands arrive before the heartbeats
	a := w.admit(t, rig.Review(t, id, 3))
	if a.Allowed || a.Code != http.StatusTooManyRequests {
		t.Errorf("the first admission after the outage got %+v", a)
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
		t.Errorf("a later admission after the outage got %+v", a)
	}
	first := r.MustLine(t, id)[0]

	// The same again, with one dead holder.
	beats[0].Signal(t, syscall.SIGKILL)
	<-beats[0].Done()
	r.Shift(t, id, -200*time.Second)
	rig.Eventually(t, interval+beatTimeout+5*time.Second, func() error {
		r.MakeStale(t, id, live[0]) // its last heartbeat may have been on its way
		got := r.Inflight(t, id)
		for _, token := range live[1:] {
			if !slices.Contains(got, token) {
				t.Fatalf("in flight: %v, without the live %s", got, token)
			}
		}
		if !slices.Contains(got, first) {
			return fmt.Errorf("in flight: %v, want the first in line, %s", got, first)
		}
		return nil
	})
	r.WantCounts(t, id, 0, 3)
}

// A second outage, however short, does not end the wait for holders after the first.
func TestSecondOutage(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	for _, interval := range []time.Duration{5 * time.Second, 30 * time.Second} {
		s := semaphoresOf(t, configWithInterval(r.Address, interval))
		for _, inLine := range []bool{false, true} {
			for _, more := range []int{-4, -1, 0, 1, 2, 3, 4} {
				gap := interval + time.Duration(more)*time.Second
				id := freshID()
				holder := acquire(t, s, id, 1)
				q := acquireRequest{token: uuid.NewString(), length: 1}
				if inLine {
					q.arrival = joinLine
				}
				wantDoubt := func(what string) {
					t.Helper()
					a, err := s.runAcquire(context.Background(), id, q)
					rig.Must(t, err)
					// Times are whole seconds, so the wait may be one second shorter.
					back := min(beatTimeout, interval)
					if a.status != acquireFull || a.inUse != 1 || a.doubt < back+time.Second {
						t.Errorf("interval %s, in line %t, %s: got %+v", interval, inLine, what, a)
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

// Redis keeps the end of an outage for clients that come later, and for a client that
// comes seldom.
func TestEndOfAnOutageIsKept(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	r.Shift(t, id, -200*time.Second)
	wantFullError(t, s, id, 1, 1)
	end := r.State(t, id, "resumed")
	for ago := range 12 { // plus the seconds that the test takes
		r.Shift(t, id, -time.Second)
		wantFullError(t, s, id, 1, 1)
		if got := r.State(t, id, "resumed"); got != end-ago-1 {
			t.Fatalf("the stored end is %d, want %d", got, end-ago-1)
		}
	}
	r.WantInflight(t, id, holder)
	r.Shift(t, id, -23*time.Second)
	acquire(t, s, id, 1)
}

// A Redis that answers but refuses to write counts as away: that time makes no token
// stale.
func TestRefusingRedisIsAway(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ refuse, accept []any }{
		"READONLY": {
			[]any{"REPLICAOF", "127.0.0.1", rig.Port(rig.FreeAddress(t))},
			[]any{"REPLICAOF", "NO", "ONE"},
		},
		"NOREPLICAS": {
			[]any{"CONFIG", "SET", "min-replicas-to-write", "1"},
			[]any{"CONFIG", "SET", "min-replicas-to-write", "0"},
		},
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
			waiter, done := queueUp(t, t.Context(), semaphoresOf(t, configWithInterval(r.Address, interval)), id, 1, r)
			w := startWebhook(t, configWithInterval(r.Address, interval))

			r.Do(t, c.refuse[0].(string), c.refuse[1:]...)
			rig.Must(t, errOf(r.Control.Do("PING")))
			hasReason := func(text, name string) bool {
				return strings.Contains(text, name) || name == "READONLY" && strings.Contains(text, "is not a primary")
			}
			line := p.WantLog(t, "heartbeat failed, to be retried")
			if !hasReason(fmt.Sprint(line["error"]), name) {
				t.Errorf("logged %v, want the error %s", line, name)
			}
			touched := r.State(t, id, "touched")
			for range 3 {
				status, text, err := w.post(context.Background(), rig.Review(t, id, 1), "2s")
				if err != nil || status != http.StatusInternalServerError || !hasReason(text, name) {
					t.Errorf("got %d %s, %v", status, text, err)
				}
			}
			if now := r.State(t, id, "touched"); now != touched {
				t.Error("a refused command changed data")
			}
			holders.Cut() // other commands arrive before the heartbeats
			r.Do(t, c.accept[0].(string), c.accept[1:]...)
			r.Shift(t, id, -200*time.Second) // as if Redis refused for that long
			for range 3 {
				if a := w.admit(t, rig.Review(t, id, 1)); a.Allowed || a.Code != http.StatusTooManyRequests {
					t.Fatalf("the admission got %+v", a)
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

// While pods wait, a dead holder is reclaimed within seconds after the threshold.
func TestDeadHolderWhileOthersWait(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{time.Second, 2 * time.Second, 30 * time.Second} {
		t.Run(interval.String(), func(t *testing.T) {
			t.Parallel()
			r, _, id := newSemaphore(t)
			s := semaphoresOf(t, configWithInterval(r.Address, interval))
			live, dead := acquire(t, s, id, 2), acquire(t, s, id, 2)
			next, done := queueUp(t, context.Background(), s, id, 2, r)
			second, _ := queueUp(t, t.Context(), s, id, 2, r)
			r.Do(t, "ZADD", id.inflightKey(), "XX", r.Now(t)-seconds(s.staleThreshold)+2, dead)
			start := time.Now()
			wantDone(t, done)
			took := time.Since(start)
			if took < time.Second {
				t.Errorf("its token was reclaimed after %s, and was stale after 2 s only", took)
			}
			rig.WantWithin(t, took, 2*time.Second+5*time.Second, "reclaiming a token that is stale after 2 s")
			r.WantInflight(t, id, live, next)
			r.WantLine(t, id, second)
		})
	}
}

// Without waiters, Redis cannot know at first whether it was away. The webhook that gets
// this reply repairs later, even if no other pod comes. A holder that returns meanwhile
// keeps its token.
func TestDeadHoldersAndRareAdmissions(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{time.Second, 2 * time.Second, 3 * time.Second, 5 * time.Second} {
		t.Run(interval.String(), func(t *testing.T) {
			t.Parallel()
			r, _, id := newSemaphore(t)
			w := startWebhook(t, configWithInterval(r.Address, interval))
			s := w.semaphores
			live := acquire(t, s, id, 3)
			acquire(t, s, id, 3)
			acquire(t, s, id, 3)
			r.Shift(t, id, -1000*time.Second)
			start := time.Now()
			w.wantFull(t, id, 3, 3)
			if _, err := w.semaphores.heartbeat(context.Background(), id, live, "", "", 0, 1); err != nil {
				t.Error(err)
			}
			rig.Eventually(t, interval+6*time.Second-time.Since(start), func() error {
				if got := r.Inflight(t, id); !slices.Equal(got, []string{live}) {
					return fmt.Errorf("in flight: %v, want %s", got, live)
				}
				return nil
			})
			w.wantAdmitted(t, id, 3)
			w.wantAdmitted(t, id, 3)
			w.wantFull(t, id, 3, 3)
		})
	}
}

// While a webhook waits for the end of the doubt, Redis hangs: another silence. The webhook
// still frees the tokens of dead holders, though no other pod comes.
func TestDeadHoldersAfterTwoSilences(t *testing.T) {
	t.Parallel()
	for _, pause := range []time.Duration{3 * time.Second, lineQuiet + 2*time.Second} { // 2 s are a silence
		t.Run(pause.String(), func(t *testing.T) {
			t.Parallel()
			r, _, id := newSemaphoreOn(t, rig.StartRedis(t))
			c := configWithInterval(r.Address, time.Second)
			c.redisAddresses = []string{rig.CommonRedis(t).Address} // the lock's server does not hang
			w := startWebhook(t, c)
			acquire(t, w.semaphores, id, 1)
			r.Shift(t, id, -1000*time.Second)
			w.wantFull(t, id, 1, 1)
			r.Pause(t)
			time.AfterFunc(pause, func() { _ = r.Cmd.Process.Signal(syscall.SIGCONT) })
			rig.Eventually(t, 20*time.Second, func() error {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				d, err := w.semaphores.inspect(ctx, id, detailMost)
				if err == nil && d.inUse > 0 {
					err = fmt.Errorf("the dead holder is still in flight; log of the webhook:\n%s", w.log)
				}
				return err
			})
		})
	}
}

// The same near the end of the default interval.
func TestWatchOfALongInterval(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	w := startWebhook(t, testConfig(r.Address))
	acquire(t, s, id, 1)
	r.Shift(t, id, -1000*time.Second)
	w.wantFull(t, id, 1, 1)
	r.Shift(t, id, -15*time.Second) // a slow machine's pause must not make a silence of it
	rig.Eventually(t, 20*time.Second+5*time.Second, func() error {
		if got := r.Inflight(t, id); len(got) != 0 {
			return errors.New("the dead holder is still in flight")
		}
		return nil
	})
	w.wantAdmitted(t, id, 1)
}

// If Redis answered before it hung, errors name those answers: they explain more than the
// time-out.
func TestErrorsNameAnswersBeforeAHang(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", "1")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	done := make(chan error, 1)
	before := r.CommandCalls(t)["evalsha"]
	go func() { done <- errOf(s.release(ctx, id, uuid.NewString(), "")) }()
	rig.Eventually(t, 5*time.Second, func() error {
		if n := r.CommandCalls(t)["evalsha"] - before; n < 3 {
			return fmt.Errorf("%d attempts, want 3", n)
		}
		return nil
	})
	r.Pause(t)
	defer r.Resume(t)
	if err := <-done; err == nil || !strings.Contains(err.Error(), "NOREPLICAS") {
		t.Errorf("got %v, want NOREPLICAS", err)
	}
}

// stalled is the longest time a line may wait for a repair: the longest poll, and a lock
// server's time-out.
const stalled = pollMost + 4*time.Second

// A repair works on the state that it finds, not on the state that made it necessary.
// Whatever happens in between, all tokens exist afterwards.
func TestRepairIsWhole(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	const length = 4
	for _, c := range []struct {
		name            string
		stale           int // when an acquire asks for a repair
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
		{"the stale one comes back", 1, func(
			t *testing.T, _ *rig.Redis, s *semaphores, id semaphoreID, tokens []string,
		) {
			_, err := s.heartbeat(ctx, id, tokens[0], "", "", 0, 1)
			rig.Must(t, err)
		}, 0, 4},
		{"the stale one is given back, and another goes stale", 1, func(
			t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, tokens []string,
		) {
			giveBack(t, s, id, tokens[0])
			r.MakeStale(t, id, tokens[1])
		}, 2, 2},
		{"another process repairs it, and another token goes stale", 1, func(
			t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, tokens []string,
		) {
			maintain(t, s, id, length)
			r.MakeStale(t, id, tokens[1])
		}, 2, 2},
		{"another process repairs it for a smaller length", 2, func(
			t *testing.T, _ *rig.Redis, s *semaphores, id semaphoreID, _ []string,
		) {
			maintain(t, s, id, 1)
		}, 2, 2},
		{"another process repairs it for a greater length", 2, func(
			t *testing.T, _ *rig.Redis, s *semaphores, id semaphoreID, _ []string,
		) {
			maintain(t, s, id, length+2)
		}, 4, 2}, // pods of the greater length may still come
		{"a free token is lost, and another goes stale", 1, func(
			t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, tokens []string,
		) {
			giveBack(t, s, id, tokens[3])
			r.Do(t, "DEL", id.queueKey())
			r.MakeStale(t, id, tokens[1])
		}, 3, 1},
		{"a token in flight is lost, and another goes stale", 1, func(
			t *testing.T, r *rig.Redis, _ *semaphores, id semaphoreID, tokens []string,
		) {
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
					t.Fatalf("got %+v, want a repair with %d stale", a, c.stale)
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

// A repair reclaims all stale tokens, more than one command can, and deletes their names.
// A live token stays.
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
	r.Do(t, "") // waits for all replies
	maintain(t, s, id, many+1)
	r.WantInflight(t, id, live)
	if n := r.Do(t, "HLEN", id.namesKey()); n != int64(0) {
		t.Errorf("the names of %d reclaimed pods are left", n)
	}
	if n := r.State(t, id, "reclaimed"); n != many {
		t.Errorf("Redis counted %d reclaimed tokens, want %d", n, many)
	}
}

// withLocker returns the semaphores of one process, with another locker.
func withLocker(t *testing.T, address string, locks locker) *semaphores {
	t.Helper()
	s := testSemaphores(t, address)
	rig.Must(t, s.locks.close())
	s.locks = locks
	return s
}

// dyingPods are pods in line with connections of their own. Each dies when it gets its
// token; other waiters reclaim it.
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
		t.Cleanup(wg.Wait) // runs before the semaphores are closed
		t.Cleanup(cancel)
		wg.Go(func() { done <- w.waitOnly(ctx) })
		tokens = append(tokens, w.token)
		r.WantLine(t, id, tokens...)
		d.waiting, d.done = append(d.waiting, w), append(d.done, done)
	}
	return d
}

// next waits for the first in line to be served.
func (d *dyingPods) next(within time.Duration) (token string, err error) {
	select {
	case err = <-d.done[0]:
	case <-time.After(within):
		return "", fmt.Errorf("%s has served no pod for %s, with %d in line", d.id, within, len(d.waiting))
	}
	token = d.waiting[0].token
	d.waiting, d.done = d.waiting[1:], d.done[1:]
	return token, err
}

// wantNext is next, and soon.
func (d *dyingPods) wantNext(t *testing.T, soon time.Duration) (token string, err error) {
	t.Helper()
	start := time.Now()
	token, err = d.next(90 * time.Second)
	rig.WantWithin(t, time.Since(start), soon, "the wait of the first in line")
	return token, err
}

// One of three lock servers hangs, and one holder after the other dies. Each line, long
// or short, is still served.
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
				token, err := line.wantNext(t, stalled)
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

// hangingLocker fails after the longest time a lock may take, until its servers are back.
type hangingLocker struct {
	locker
	back chan struct{} // closed when the servers are back
}

func (l *hangingLocker) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	select {
	case <-l.back:
		return l.locker.tryLock(ctx, name, expiration)
	case <-time.After(2 * etcdTimeout):
		return nil, errors.New("no answer")
	}
}

// The first attempt at the lock takes longer than an acquire retries: a second one follows.
func TestSlowLockServerIsAskedAgain(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	s.locks = &unlucky{locker: s.locks, event: func() { time.Sleep(lockPatience + time.Millisecond) }}
	acquire(t, s, id, 1)
	r.WantCounts(t, id, 0, 1)
}

// While the lock servers hang, no token is reclaimed; soon after they are back, it is. A
// lone waiter keeps polling as often as ever, as Redis would take its silence for an
// outage of its own.
func TestLineAfterLockServersHung(t *testing.T) {
	t.Parallel()
	for _, waiting := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d in line", waiting), func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphore(t)
			holder := acquire(t, s, id, 1)
			back := make(chan struct{})
			line := startDyingPods(t, r, id, waiting, 1, func() locker {
				return &hangingLocker{redlockServers{r}.newLocker(), back}
			})
			r.MakeStale(t, id, holder)
			if token, err := line.next(15 * time.Second); err == nil {
				t.Errorf("%s was served without the lock", token)
			}
			close(back)
			if _, err := line.wantNext(t, stalled); err != nil {
				t.Error(err)
			}
		})
	}
}

// While Redis is full, heartbeats count holders, put back missing tokens, and releases
// work. Admissions fail and give the reason.
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
	waiting := uuid.NewString() // has its token, but its app has not started
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
					return fmt.Errorf("the last heartbeat of %s was at %d, and Redis full at %d", token, last, at)
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
			t.Errorf("%s: got %d %s, %v", id, status, text, err)
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
		for _, line := range p.Log.Lines(t, "heartbeat failed, to be retried") {
			if text := fmt.Sprint(line["error"]); !strings.Contains(text, "no answer") { // a slow machine's
				t.Error("a failed heartbeat: ", text)
			}
		}
	}

	empty()
	w.wantAdmitted(t, id, 4)
	w.wantAdmitted(t, id, 4)
	w.wantFull(t, id, 4, 4)
	w.wantAdmitted(t, freshID(), 1)
}

// While Redis is full, waiters cannot poll, though heartbeats work. They keep their
// places, and tokens given back meanwhile are theirs.
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
	rig.Eventually(t, 30*time.Second, func() error { // Redis usually drops waiters that are silent for this long
		asked, err := redis.Strings(r.Do(t, "ZRANGE", id.seenKey(), -1, -1, "WITHSCORES"), nil)
		rig.Must(t, err)
		if now := fmt.Sprint(r.Now(t) - 11); asked[1] > now {
			return fmt.Errorf("last poll: %v, now %d", asked, r.Now(t))
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
			return fmt.Errorf("in line: %v, want %v", got, []string{second, third, joined})
		}
		return nil
	})
}

// queueLast joins the line, once, without a waiter that polls.
func queueLast(t *testing.T, s *semaphores, id semaphoreID, length int) (token string) {
	t.Helper()
	token = uuid.NewString()
	a, err := s.runAcquire(context.Background(), id, acquireRequest{token: token, length: length, arrival: joinLine})
	rig.Must(t, err)
	if a.status != acquireFull {
		t.Fatalf("got %+v, want a place in line", a)
	}
	return token
}

// After Redis lost all data, waiters do not take the tokens of holders, and keep their
// order.
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
	if rejoined, err := s.heartbeat(context.Background(), id, holder, "", "", 0, 1); err != nil || !rejoined {
		t.Fatalf("rejoined %t, %v", rejoined, err)
	}
	giveBack(t, s, id, holder)
	wantDone(t, done)
	r.WantLine(t, id, second, third)
	r.WantCounts(t, id, 0, 1)
}

// Redis is emptied in the second in which a waiter joined. The waiter's next poll still
// reports the loss.
func TestRedisEmptiedInTheSecondOfJoining(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	r.Do(t, "DEL", id.queueKey(), id.inflightKey(), id.namesKey(), id.stateKey())
	arrival := fmt.Sprint(r.Now(t)+1, "000000") // as if it joined in this second
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: uuid.NewString(), length: 1, arrival: arrival})
	if err != nil || a.status != acquireFull || a.doubt == 0 {
		t.Errorf("got %+v, %v, want to wait for the token's holder", a, err)
	}
}

// The heartbeat of a returning holder reports that Redis lost its data. The tokens of
// other holders then go to no new pods, and tokens refilled before are removed.
func TestHolderReportsLoss(t *testing.T) {
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
				if rejoined, err := s.heartbeat(t.Context(), id, holder, "", "", time.Minute, 1); err != nil || !rejoined {
					t.Fatalf("rejoined %t, %v", rejoined, err)
				}
				r.WantCounts(t, id, 0, newcomers+i+1)
				_, _, err := s.acquire(t.Context(), id, "", 4, limit{}, time.Second)
				var full *fullError
				if !errors.As(err, &full) ||
					newcomers+i+1 < 4 && !strings.Contains(refusal(full), "; Redis has just started, was away or has lost data: in ") {
					t.Errorf("with %d holders back: got %v, %+v, want to wait for the others", i+1, err, full)
				}
			}
		})
	}
}

// The first heartbeat of a pod whose token is gone reports no loss of data: a new pod
// gets a replacement of the missing token.
func TestLateStartReportsNoLoss(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 2)
	r.Do(t, "DEL", id.keys()...)
	if rejoined, err := s.heartbeat(t.Context(), id, token, "", "", 0, 1); err != nil || !rejoined {
		t.Fatalf("rejoined %t, %v", rejoined, err)
	}
	acquire(t, s, id, 2)
	r.WantCounts(t, id, 0, 2)
}
