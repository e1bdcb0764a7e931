package bench

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// createGated creates a gated pod, as the webhook admits it.
func createGated(t *testing.T, api *rig.APIServer, id rig.ID, name string, length int) {
	t.Helper()
	api.CreatePod(t, id.Namespace, rig.AdmittedPod(name, id, length, 10))
}

// wantInLines waits until n pods wait in the lines of the semaphores, and returns how
// long that took.
func wantInLines(t *testing.T, r *rig.Redis, ids []rig.ID, n int) time.Duration {
	t.Helper()
	start := time.Now()
	rig.Eventually(t, 2*time.Minute, func() error {
		total := 0
		for _, id := range ids {
			waiters, err := redis.Int(r.Control.Do("ZCARD", id.WaitersKey()))
			if err != nil {
				return err
			}
			total += waiters
		}
		if total != n {
			return fmt.Errorf("%d in line, want %d", total, n)
		}
		return nil
	})
	return time.Since(start)
}

// "make measure-gate" measures the cost of gates. It creates many pods of many full
// semaphores and starts one gate. It measures how soon the gate puts new pods in line,
// removes deleted pods, and lifts a scheduling gate when a token is free.
func TestMeasureGate(t *testing.T) {
	const semaphores, each, length, over = 50, 100, 5, time.Minute
	r, api := rig.StartRedis(t), rig.StartAPIServer(t)
	namespace := api.NewNamespace(t)
	gated := func(name string) (uid string, yes bool) {
		p, status := api.Store.Get(namespace, name)
		if status != nil {
			return "", false
		}
		return string(p.UID), len(p.Spec.SchedulingGates) > 0
	}
	var ids []rig.ID
	var holders []string
	for i := range semaphores {
		id := rig.ID{Namespace: namespace, Key: fmt.Sprintf("web-%d", i)}
		ids = append(ids, id)
		for range length {
			holders = append(holders, r.Acquire(t, id, length))
		}
	}
	gate := rig.StartGate(t, api, r.Address)
	names := make([]string, 0, semaphores*each)
	start := time.Now()
	for i := range semaphores * each {
		names = append(names, fmt.Sprintf("pod-%d", i))
		createGated(t, api, ids[i%semaphores], names[i], length)
	}
	created := time.Since(start)
	joined := wantInLines(t, r, ids, len(names))
	t.Logf("%d pods of %d semaphores were created in %s; all stood in line %s later",
		len(names), semaphores, created.Round(time.Millisecond), joined.Round(time.Millisecond))

	redisBefore, gateBefore, start := r.CPU(t), gate.CPU(t), time.Now()
	time.Sleep(over) // the test measures the cost of this time
	elapsed := time.Since(start).Seconds()
	percent := func(d time.Duration) string { return fmt.Sprintf("%.1f %%", 100*d.Seconds()/elapsed) }
	t.Logf("they cost %s of a processor in Redis, and %s in gate, "+
		"which has %d KB resident (VmRSS), %d of them its own (RssAnon)",
		percent(r.CPU(t)-redisBefore), percent(gate.CPU(t)-gateBefore),
		gate.Memory(t, "VmRSS"), gate.Memory(t, "RssAnon"))
	wantInLines(t, r, ids, len(names))

	// handOver gives a token back, and returns how soon the gate of the next pod is lifted.
	handOver := func(id rig.ID, token string) time.Duration {
		next := r.MustLine(t, id)[0]
		start := time.Now()
		r.Release(t, id, token)
		rig.Eventually(t, 20*time.Second, func() error {
			for _, name := range names {
				if uid, yes := gated(name); uid == next {
					if yes {
						return errors.New("not lifted")
					}
					return nil
				}
			}
			return errors.New("no such pod")
		})
		return time.Since(start)
	}
	var lifted []time.Duration
	for n, token := range holders[:50] {
		lifted = append(lifted, handOver(ids[n/length], token))
	}
	slices.Sort(lifted)
	t.Logf("from a token that was given back to the lifted gate, of %d: %s in the median, %s at worst", len(lifted),
		lifted[len(lifted)/2].Round(time.Millisecond), lifted[len(lifted)-1].Round(time.Millisecond))

	// All waiting pods are deleted but those of the last semaphore.
	last := semaphores - 1
	gone := 0
	for i, name := range names {
		if _, yes := gated(name); yes && i%semaphores != last {
			api.DeletePod(t, namespace, name)
			gone++
		}
	}
	took := handOver(ids[last], holders[last*length])
	left := took + wantInLines(t, r, ids, each-1)
	t.Logf("%d were deleted; then the gate of another semaphore was lifted within %s; %s after the last deletion "+
		"they had left the line", gone, took.Round(time.Millisecond), left.Round(time.Millisecond))
	for line := range strings.Lines(gate.Log.String()) {
		// So many pods at once cause more events than the gate sends, and more changes than
		// the API server of the tests remembers for a watch.
		if strings.Contains(line, `"level":"WARN"`) && !strings.Contains(line, "events left out") &&
			!strings.Contains(line, "410 too old resource version") {
			t.Errorf("it warned: %s", line)
		}
	}
}
