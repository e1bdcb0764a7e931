//go:build measure

package main

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The cost of waiting: many sidecars, as processes, against one Redis.
func TestMeasureWaiters(t *testing.T) {
	const over = time.Minute
	t.Logf("%8s  %14s  %14s  %16s  %18s  %16s  %s", "waiters", "Redis CPU", "Redis memory", "CPU per sidecar", "RssAnon/sidecar", "VmRSS/sidecar", "next holds the token after SIGTERM to the holder: median, worst")
	for _, n := range []int{10, 100, 1000} {
		r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
		first := acquire(t, s, id, 1)
		var sidecars []*rig.Process
		byToken := map[string]*rig.Process{}
		stop := func() {
			for _, p := range sidecars {
				p.Kill()
			}
		}
		t.Cleanup(stop)
		for i := range n {
			token := uuid.NewString()
			p := rig.NewProcess(rig.Program(t), "sidecar", "--queue-redis-address="+r.Address, "--redis-addresses="+r.Address, "--length=1", id.String(), token)
			rig.Must(t, p.Launch())
			sidecars, byToken[token] = append(sidecars, p), p
			if i%10 == 9 { // so that they start as fast as the machine lets them, and no faster
				r.WantLineLength(t, id, i+1)
			}
		}
		r.WantLineLength(t, id, n)

		redisBefore, sidecarsBefore, start := r.CPU(t), time.Duration(0), time.Now()
		for _, p := range sidecars {
			sidecarsBefore += p.CPU(t)
		}
		time.Sleep(over) // what is measured is the cost of this
		elapsed := time.Since(start)
		redisCPU := r.CPU(t) - redisBefore
		var sidecarsCPU time.Duration
		var anonymous, resident int
		for _, p := range sidecars {
			sidecarsCPU += p.CPU(t)
			anonymous += p.Memory(t, "RssAnon")
			resident += p.Memory(t, "VmRSS")
		}
		sidecarsCPU -= sidecarsBefore
		r.WantLineLength(t, id, n) // nobody was dropped

		giveBack(t, s, id, first)
		r.WantLineLength(t, id, n-1)
		var taken []time.Duration
		for range min(20, n-1) {
			holder, next := r.Inflight(t, id)[0], r.MustLine(t, id)[0]
			start := time.Now()
			rig.Must(t, byToken[holder].Cmd.Process.Signal(syscall.SIGTERM))
			for !slices.Equal(r.Inflight(t, id), []string{next}) {
				if time.Since(start) > 20*time.Second {
					t.Fatalf("%s has not taken the token", next)
				}
			}
			taken = append(taken, time.Since(start))
		}
		slices.Sort(taken)
		percent := func(d time.Duration) string { return fmt.Sprintf("%.3f %%", 100*d.Seconds()/elapsed.Seconds()) }
		t.Logf("%8d  %14s  %11d KB  %16s  %15d KB  %13d KB  %s, %s", n, percent(redisCPU), r.Memory(t, "VmRSS"), percent(sidecarsCPU/time.Duration(n)),
			anonymous/n, resident/n, taken[len(taken)/2].Round(100*time.Microsecond), taken[len(taken)-1].Round(100*time.Microsecond))
		stop()
	}
}
