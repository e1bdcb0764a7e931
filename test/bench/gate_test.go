//go:build measure

package main

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

// The cost of gates: many pods of many semaphores that are all full, one process that stands in line for them; how soon those that come
// stand in line, those that go have left it, and a gate is lifted once a token is free.
func TestMeasureGate(t *testing.T) {
	const semaphores, each, length, over = 50, 100, 5, time.Minute
	g := newGateTest(t, length)
	var ids []semaphoreID
	var holders []string
	for i := range semaphores {
		id := semaphoreID{g.id.namespace, fmt.Sprintf("web-%d", i)}
		ids = append(ids, id)
		for range length {
			holders = append(holders, acquire(t, g.owner, id, length))
		}
	}
	p := g.process()
	wantInLine := func(want int) (took time.Duration) {
		t.Helper()
		start := time.Now()
		rig.Eventually(t, 2*time.Minute, func() error {
			total := 0
			for _, id := range ids {
				n, err := redis.Int(g.redis.Control.Do("ZCARD", id.waitersKey()))
				if err != nil {
					return err
				}
				total += n
			}
			if total != want {
				return fmt.Errorf("%d in line, want %d", total, want)
			}
			return nil
		})
		return time.Since(start)
	}
	names := make([]string, 0, semaphores*each)
	start := time.Now()
	for i := range semaphores * each {
		g.id = ids[i%semaphores]
		names = append(names, fmt.Sprintf("pod-%d", i))
		g.create(names[i])
	}
	created := time.Since(start)
	joined := wantInLine(len(names))
	t.Logf("%d pods of %d semaphores were created in %s; all stood in line %s later", len(names), semaphores, created.Round(time.Millisecond), joined.Round(time.Millisecond))

	redisBefore, gateBefore, start := g.redis.CPU(t), p.CPU(t), time.Now()
	time.Sleep(over) // what is measured is the cost of this
	elapsed := time.Since(start).Seconds()
	percent := func(d time.Duration) string { return fmt.Sprintf("%.1f %%", 100*d.Seconds()/elapsed) }
	t.Logf("they cost %s of a processor in Redis, and %s in gate, which has %d KB resident (VmRSS), %d of them its own (RssAnon)", percent(g.redis.CPU(t)-redisBefore),
		percent(p.CPU(t)-gateBefore), p.Memory(t, "VmRSS"), p.Memory(t, "RssAnon"))
	wantInLine(len(names))

	var lifted []time.Duration
	for n, token := range holders[:50] {
		id := ids[n/length]
		g.id = id
		next, err := redis.Strings(g.redis.Control.Do("ZRANGE", id.waitersKey(), 0, 0))
		rig.Must(t, err)
		start := time.Now()
		giveBack(t, g.owner, id, token)
		rig.Eventually(t, 20*time.Second, func() error {
			for _, name := range names {
				if q, status := g.api.Store.Get(id.namespace, name); status == nil && string(q.UID) == next[0] {
					if len(q.Spec.SchedulingGates) > 0 {
						return errors.New("not lifted")
					}
					return nil
				}
			}
			return errors.New("no such pod")
		})
		lifted = append(lifted, time.Since(start))
	}
	slices.Sort(lifted)
	t.Logf("from a token that was given back to the lifted gate, of %d: %s in the median, %s at worst", len(lifted), lifted[len(lifted)/2].Round(time.Millisecond), lifted[len(lifted)-1].Round(time.Millisecond))

	left := len(names) - len(lifted)
	gone := 0
	for _, name := range names {
		if q, status := g.api.Store.Get(ids[0].namespace, name); status == nil && len(q.Spec.SchedulingGates) > 0 && gone < left/2 {
			g.api.DeletePod(t, ids[0].namespace, name)
			gone++
		}
	}
	t.Logf("%d were deleted; %s later they had left the line", gone, wantInLine(left-gone).Round(time.Millisecond))
	for line := range strings.Lines(p.Log.String()) {
		if strings.Contains(line, `"level":"WARN"`) && !strings.Contains(line, "events of pods left out") { // so many at once
			t.Errorf("it warned: %s", line)
		}
	}
}
