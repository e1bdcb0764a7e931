package bench

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make measure-sidecars" measures the cost of waiting: it starts many sidecars, as
// processes, against one Redis.
func TestMeasureWaiters(t *testing.T) {
	const over = time.Minute
	t.Logf("%8s  %14s  %14s  %16s  %18s  %16s  %s", "waiters", "Redis CPU", "Redis memory", "CPU per sidecar",
		"RssAnon/sidecar", "VmRSS/sidecar", "next holds the token after SIGTERM to the holder: median, worst")
	for _, n := range []int{10, 100, 1000} {
		r, id := rig.StartRedis(t), rig.FreshID()
		first := r.Acquire(t, id, 1)
		sidecars := startWaiters(t, r, id, n)
		stop := func() {
			for _, p := range sidecars {
				p.Kill()
			}
		}

		redisBefore, sidecarsBefore, start := r.CPU(t), time.Duration(0), time.Now()
		for _, p := range sidecars {
			sidecarsBefore += p.CPU(t)
		}
		time.Sleep(over) // the test measures the cost of this time
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
		r.WantLineLength(t, id, n) // Redis has dropped no waiter

		r.Release(t, id, first)
		r.WantLineLength(t, id, n-1)
		var taken []time.Duration
		for range min(20, n-1) {
			taken = append(taken, handOver(t, r, id, sidecars))
		}
		slices.Sort(taken)
		percent := func(d time.Duration) string { return fmt.Sprintf("%.3f %%", 100*d.Seconds()/elapsed.Seconds()) }
		t.Logf("%8d  %14s  %11d KB  %16s  %15d KB  %13d KB  %s, %s", n, percent(redisCPU), r.Memory(t, "VmRSS"),
			percent(sidecarsCPU/time.Duration(n)), anonymous/n, resident/n,
			taken[len(taken)/2].Round(100*time.Microsecond), taken[len(taken)-1].Round(100*time.Microsecond))
		stop()
	}
}

// startWaiters starts n sidecars that wait for one token. It returns them by token.
func startWaiters(t *testing.T, r *rig.Redis, id rig.ID, n int) map[string]*rig.Process {
	t.Helper()
	all := map[string]*rig.Process{}
	for i := range n {
		token := uuid.NewString()
		p := rig.NewProcess(rig.Program(t), "sidecar", "--queue-redis-address="+r.Address,
			"--redis-addresses="+r.Address, "--length=1", id.String(), token)
		rig.Must(t, p.Launch())
		t.Cleanup(p.Kill)
		all[token] = p
		if i%10 == 9 { // at most ten starts at once, for slow machines
			r.WantLineLength(t, id, i+1)
		}
	}
	r.WantLineLength(t, id, n)
	return all
}

// handOver ends the holder, and returns the time until the first in line has the token.
func handOver(t *testing.T, r *rig.Redis, id rig.ID, sidecars map[string]*rig.Process) time.Duration {
	t.Helper()
	holder, next := r.Inflight(t, id)[0], r.MustLine(t, id)[0]
	start := time.Now()
	sidecars[holder].Signal(t, syscall.SIGTERM)
	for !slices.Equal(r.Inflight(t, id), []string{next}) {
		if time.Since(start) > 20*time.Second {
			t.Fatalf("%s has not taken the token", next)
		}
	}
	return time.Since(start)
}
