//go:build bench

package main

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make bench-growth" measures what a command costs with many tokens in flight, or many pods in line, and for how long a repair holds Redis.
// The slices of few and many alternate, so that what else the machine does hits both alike.

const (
	growthRounds = 41
	growthSlice  = 25  // commands of each slice
	growthMost   = 1.3 // the ratio of medians, to that with the least
	growthLength = 20000

	repairRounds = 15
	repairMost   = 5 * time.Millisecond // for which one command may hold Redis
)

var growthSizes = []int{10, 1000, 10000}

// crowded is a semaphore with so many in flight and in line, all of them alive.
type crowded struct {
	id             semaphoreID
	inflight, line []string
	arrival        int64 // of the first in line, less growthSlice
}

// newCrowded is a semaphore with tokens in flight and in line, and so many free ones; all of them had a heartbeat, or have asked, so long ago.
func newCrowded(t *testing.T, s *rig.Redis, inflight, line, free, length int, ago time.Duration) *crowded {
	t.Helper()
	c := &crowded{id: freshID()}
	heartbeat := time.Now().Add(-ago).Unix()
	created := time.Now().Add(-time.Hour).Unix()
	c.arrival = created * 1000000
	s.Do(t, "HSET", c.id.stateKey(), "created", created, "touched", time.Now().Unix(), "resumed", 0, "lost", 0, "length", length, "asked", time.Now().Unix())
	pipe := func(command string, args ...any) { rig.Must(t, s.Control.Send(command, args...)) }
	name := func(token string) {
		pipe("HSET", c.id.namesKey(), token+"/pod", fmt.Sprintf("%d web-7d4b9c6f5-x2x4z node-17", heartbeat))
	}
	for range inflight {
		token := uuid.NewString()
		pipe("ZADD", c.id.inflightKey(), heartbeat, token)
		name(token)
		c.inflight = append(c.inflight, token)
	}
	for i := range line {
		token := uuid.NewString()
		pipe("ZADD", c.id.waitersKey(), c.arrival+growthSlice+int64(i), token)
		pipe("ZADD", c.id.seenKey(), heartbeat, token)
		pipe("HSET", c.id.namesKey(), token, length)
		name(token)
		c.line = append(c.line, token)
	}
	s.Do(t, "") // waits for all of it
	s.AddFree(t, c.id, free)
	for _, key := range c.id.keys() {
		s.Do(t, "EXPIRE", key, 86400)
	}
	return c
}

// alive lets all in line have asked just now.
func keepAlive(t *testing.T, s *rig.Redis, c *crowded) {
	t.Helper()
	now := time.Now().Unix()
	s.Do(t, "HSET", c.id.stateKey(), "touched", now)
	for some := range slices.Chunk(c.line, 1000) {
		args := []any{c.id.seenKey(), "XX"}
		for _, token := range some {
			args = append(args, now, token)
		}
		s.Do(t, "ZADD", args...)
	}
}

// growthCase is a command that is measured. prepare comes before each slice, ask is one of its commands, and undo comes after the slice.
type growthCase struct {
	name    string
	grows   string // what there is few or many of
	fill    func(t *testing.T, n int) *crowded
	prepare func(t *testing.T, c *crowded)
	ask     func(c *crowded, i int) (acquireReply, error)
	want    int // status
	undo    func(t *testing.T, c *crowded)
}

func growthCases(r *rig.Redis, s *semaphores) []growthCase {
	ctx := context.Background()
	var taken []string
	newcomer := func(c *crowded, arrival string, length int) (acquireReply, error) {
		token := uuid.NewString()
		taken = append(taken, token)
		return s.runAcquire(ctx, c.id, acquireRequest{token: token, length: length, arrival: arrival, pod: newPodName("web-1", "node-1")})
	}
	forget := func(t *testing.T, c *crowded) { // all that the slice has added
		for _, token := range taken {
			for _, key := range []string{c.id.inflightKey(), c.id.waitersKey(), c.id.seenKey()} {
				r.Do(t, "ZREM", key, token)
			}
			r.Do(t, "HDEL", c.id.namesKey(), token, token+"/pod")
		}
		taken = nil
		r.Do(t, "DEL", c.id.queueKey())
	}
	inFlight := func(t *testing.T, n int) *crowded { return newCrowded(t, r, n, 0, 0, growthLength, 0) }
	inLine := func(t *testing.T, n int) *crowded { return newCrowded(t, r, 10, n, 0, 10, 0) }
	refresh := func(t *testing.T, c *crowded) { keepAlive(t, r, c) }
	return []growthCase{
		{"admitted", "in flight", inFlight, func(t *testing.T, c *crowded) {
			keepAlive(t, r, c)
			r.AddFree(t, c.id, growthSlice)
		}, func(c *crowded, _ int) (acquireReply, error) { return newcomer(c, "", growthLength) }, acquireTaken, forget},
		{"refused", "in flight", inFlight, refresh,
			func(c *crowded, _ int) (acquireReply, error) { return newcomer(c, "", len(c.inflight)) }, acquireFull, forget},
		{"refused", "in line", inLine, refresh,
			func(c *crowded, _ int) (acquireReply, error) { return newcomer(c, "", 10) }, acquireFull, forget},
		{"joins", "in line", inLine, refresh,
			func(c *crowded, _ int) (acquireReply, error) { return newcomer(c, joinLine, 10) }, acquireFull, forget},
		{"last, asks again", "in line", inLine, refresh, func(c *crowded, _ int) (acquireReply, error) {
			return s.runAcquire(ctx, c.id, acquireRequest{token: c.line[len(c.line)-1], length: 10, arrival: fmt.Sprint(c.arrival)})
		}, acquireFull, forget},
		{"first, is served", "in line", inLine, func(t *testing.T, c *crowded) {
			// Each that asks is made the first, and takes the place of a holder.
			keepAlive(t, r, c)
			for range growthSlice {
				token := uuid.NewString()
				taken = append(taken, token)
				r.Do(t, "ZADD", c.id.waitersKey(), c.arrival+int64(len(taken)), token)
				r.Do(t, "ZADD", c.id.seenKey(), time.Now().Unix(), token)
				r.Do(t, "HSET", c.id.namesKey(), token, 10+growthSlice)
			}
			r.AddFree(t, c.id, growthSlice)
		}, func(c *crowded, i int) (acquireReply, error) {
			return s.runAcquire(ctx, c.id, acquireRequest{token: taken[i], length: 10 + growthSlice, arrival: fmt.Sprint(c.arrival)})
		}, acquireTaken, forget},
	}
}

func TestBenchGrowth(t *testing.T) {
	r := deployedRedis(t)
	s := testSemaphores(t, r.Address)
	giveBack(t, s, freshID(), uuid.NewString())
	_, err := s.runAcquire(context.Background(), freshID(), acquireRequest{token: uuid.NewString(), length: 1}) // so that the scripts are there
	rig.Must(t, err)
	fmt.Printf("%d slices of %d commands of each size\n\n%s\n%s\n", growthRounds, growthSlice,
		"| acquire | | p50, us: 10 | 1,000 | 10,000 | ratio: 1,000 | 10,000 | Redis's own, us: 10 | 1,000 | 10,000 | ratio: 1,000 | 10,000 |",
		"| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	for _, c := range growthCases(r, s) {
		var all []*crowded
		p50s, own := make([][]float64, len(growthSizes)), make([][]float64, len(growthSizes))
		for _, n := range growthSizes {
			all = append(all, c.fill(t, n))
		}
		for round := range growthRounds {
			for k := range growthSizes {
				i := (k + round) % len(growthSizes) // none is always the first
				c.prepare(t, all[i])
				before := r.Info(t, "commandstats", `cmdstat_evalsha:calls=\d+,usec=`)
				var took []time.Duration
				for n := range growthSlice {
					start := time.Now()
					a, err := c.ask(all[i], n)
					took = append(took, time.Since(start))
					if err != nil || a.status != c.want {
						t.Fatalf("%s, %d %s: answered %+v, %v", c.name, growthSizes[i], c.grows, a, err)
					}
				}
				slices.Sort(took)
				p50s[i] = append(p50s[i], 1000*quantile(took, 0.5))
				own[i] = append(own[i], float64(r.Info(t, "commandstats", `cmdstat_evalsha:calls=\d+,usec=`)-before)/growthSlice)
				c.undo(t, all[i])
			}
		}
		line := fmt.Sprintf("| %s | %s |", c.name, c.grows)
		for _, figures := range [][][]float64{p50s, own} {
			var medians, toFew string
			for i, n := range growthSizes {
				ratio := median(ratios(figures[i], figures[0]))
				medians += fmt.Sprintf(" %.0f |", median(slices.Clone(figures[i])))
				if i > 0 {
					toFew += fmt.Sprintf(" %.2f |", ratio)
				}
				if ratio > growthMost && &figures[0] == &p50s[0] {
					t.Errorf("%s: with %d %s, acquire takes %.2f times as long as with %d, want at most %.1f times", c.name, n, c.grows, ratio, growthSizes[0], growthMost)
				}
			}
			line += medians + toFew
		}
		fmt.Println(line)
		for _, one := range all {
			r.Do(t, "DEL", one.id.keys()...)
		}
	}
}

// repairCase is what a repair finds, and what it leaves.
type repairCase struct {
	name           string
	length         int
	inflight, line int
	free           int
	ago            time.Duration // since the last heartbeats, and questions; in the future where the clock was set back
	queue, inUse   int           // afterwards
}

// No command of a repair holds Redis for long, whatever there is to do.
func TestBenchRepair(t *testing.T) {
	const many, portion = 10000, 256
	r := deployedRedis(t)
	s := testSemaphores(t, r.Address)
	maintain(t, s, freshID(), 1) // so that the script is there
	r.Do(t, "CONFIG", "SET", "latency-tracking-info-percentiles", "100")
	fmt.Printf("%d repairs each\n\n%s\n%s\n", repairRounds,
		"| repair finds | longest command, ms: median | worst | commands | all of it, ms: median | worst |", "| --- | --- | --- | --- | --- | --- |")
	for _, c := range []repairCase{
		{name: "10,000 stale tokens", length: many, inflight: many, ago: time.Hour, queue: portion},
		{name: "10,000 missing tokens", length: many, queue: portion},
		{name: "10,000 free tokens too many", length: 5, free: many, queue: 5},
		{name: "10 stale tokens, 10,000 in line", length: 10, inflight: 10, line: many, ago: time.Hour, queue: 10},
		{name: "10,000 stale tokens, 10,000 in line", length: many, inflight: many, line: many, ago: time.Hour, queue: portion},
		{name: "10,000 in flight, 10,000 in line, and the clock was set back", length: many, inflight: many, line: many, ago: -time.Hour, inUse: many},
	} {
		var longest, all []float64
		commands := 0
		for range repairRounds {
			made := newCrowded(t, r, c.inflight, c.line, c.free, c.length, c.ago)
			r.Do(t, "CONFIG", "RESETSTAT")
			start := time.Now()
			maintain(t, s, made.id, c.length)
			all = append(all, float64(time.Since(start).Microseconds())/1000)
			text := r.Do(t, "INFO", "latencystats").([]byte)
			longest = append(longest, numberIn(t, text, `latency_percentiles_usec_evalsha:p100=([0-9.]+)`)/1000)
			commands = r.Info(t, "commandstats", `cmdstat_evalsha:calls=`)
			queue, inUse, err := r.Counts(made.id)
			rig.Must(t, err)
			if queue != c.queue || inUse != c.inUse {
				t.Errorf("%s: %d free and %d in use afterwards, want %d and %d", c.name, queue, inUse, c.queue, c.inUse)
			}
			r.Do(t, "DEL", made.id.keys()...)
		}
		half := median(longest) // which sorts them
		fmt.Printf("| %s | %.1f | %.1f | %d | %.1f | %.1f |\n", c.name, half, longest[len(longest)-1], commands, median(all), all[len(all)-1])
		if most := float64(repairMost.Microseconds()) / 1000; half > most {
			t.Errorf("%s: a command of the repair held Redis for %.1f ms in the median, want at most %.0f", c.name, half, most)
		}
	}
}
