package main

import (
	"context"
	"syscall"
	"testing"
	"time"

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
			if took := time.Since(start); took > threshold+5*time.Second {
				t.Errorf("the dead holder's token was given on after %s", took)
			}
			r.WantInflight(t, id, live, line[0])
			r.WantLine(t, id, line[1:]...)

			wantSoon := func(i int) {
				t.Helper()
				start := time.Now()
				wantDone(t, done[i])
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("the next in line got a free token after %s", took)
				}
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
