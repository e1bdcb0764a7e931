package bench

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make bench-growth" measures the cost of a command with many tokens in flight, or with
// many pods in line. It also measures how long a repair blocks Redis. The slices of few
// and many alternate, so other load of the machine affects both alike.

const (
	growthRounds = 41
	growthSlice  = 25  // commands of each slice
	growthMost   = 1.5 // limit for the ratio of the medians, to the smallest size
	growthLength = 20000

	repairRounds = 15
	repairMost   = 5 * time.Millisecond // longest time for which one command may block Redis
)

var growthSizes = []int{10, 1000, 10000}

// crowded is a semaphore with many live tokens in flight or in line.
type crowded struct {
	id             rig.ID
	inflight, line []string
	arrival        int64 // of the first in line, less growthSlice
}

// newCrowded makes a semaphore with tokens in flight, in line, and free. ago is the time
// since each holder's last heartbeat and each waiter's last request.
func newCrowded(t *testing.T, r *rig.Redis, inflight, line, free, length int, ago time.Duration) *crowded {
	t.Helper()
	c := &crowded{id: rig.FreshID()}
	now := time.Now()
	heartbeat, created := now.Add(-ago).Unix(), now.Add(-time.Hour).Unix()
	c.arrival = created * 1000000
	r.Do(t, "HSET", c.id.StateKey(), "created", created, "touched", now.Unix(), "resumed", 0, "lost", 0,
		"length", length, "asked", now.Unix())
	pipe := func(command string, args ...any) { rig.Must(t, r.Control.Send(command, args...)) }
	name := func(token string) {
		pipe("HSET", c.id.NamesKey(), token+"/pod", fmt.Sprintf("%d web-7d4b9c6f5-x2x4z node-17", heartbeat))
	}
	for range inflight {
		token := uuid.NewString()
		pipe("ZADD", c.id.InflightKey(), heartbeat, token)
		name(token)
		c.inflight = append(c.inflight, token)
	}
	for i := range line {
		token := uuid.NewString()
		pipe("ZADD", c.id.WaitersKey(), c.arrival+growthSlice+int64(i), token)
		pipe("ZADD", c.id.SeenKey(), heartbeat, token)
		pipe("HSET", c.id.NamesKey(), token, length)
		name(token)
		c.line = append(c.line, token)
	}
	r.Do(t, "") // waits for all commands
	r.AddFree(t, c.id, free)
	for _, key := range c.id.Keys() {
		r.Do(t, "EXPIRE", key, 86400)
	}
	return c
}

// keepAlive records that all waiters have asked just now.
func (c *crowded) keepAlive(t *testing.T, r *rig.Redis) {
	t.Helper()
	now := time.Now().Unix()
	r.Do(t, "HSET", c.id.StateKey(), "touched", now)
	for some := range slices.Chunk(c.line, 1000) {
		args := []any{c.id.SeenKey(), "XX"}
		for _, token := range some {
			args = append(args, now, token)
		}
		r.Do(t, "ZADD", args...)
	}
}

// request is one call of the acquire script.
type request struct {
	token   string
	length  int
	arrival string // see rig.Redis.TryAcquire
	pod     string
}

func (q request) send(conn redis.Conn, id rig.ID) (rig.Acquired, error) {
	reply, err := runScript(conn, "acquire", id, q.length, q.token, q.arrival, q.pod)
	if err != nil {
		return rig.Acquired{}, err
	}
	return rig.ReadAcquired(reply)
}

// growthCase is a measured command.
type growthCase struct {
	name    string
	grows   string // what the sizes count
	fill    func(t *testing.T, n int) *crowded
	prepare func(t *testing.T, c *crowded) // before each slice
	next    func(c *crowded, i int) request
	want    int                            // status
	undo    func(t *testing.T, c *crowded) // after each slice
}

func growthCases(r *rig.Redis) []growthCase {
	var added []string // by the slice
	newcomer := func(arrival string, length int) request {
		token := uuid.NewString()
		added = append(added, token)
		return request{token: token, length: length, arrival: arrival, pod: "web-1 node-1"}
	}
	forget := func(t *testing.T, c *crowded) {
		for _, token := range added {
			for _, key := range []string{c.id.InflightKey(), c.id.WaitersKey(), c.id.SeenKey()} {
				r.Do(t, "ZREM", key, token)
			}
			r.Do(t, "HDEL", c.id.NamesKey(), token, token+"/pod")
		}
		added = nil
		r.Do(t, "DEL", c.id.QueueKey())
	}
	inFlight := func(t *testing.T, n int) *crowded { return newCrowded(t, r, n, 0, 0, growthLength, 0) }
	inLine := func(t *testing.T, n int) *crowded { return newCrowded(t, r, 10, n, 0, 10, 0) }
	keepAlive := func(t *testing.T, c *crowded) { c.keepAlive(t, r) }
	return []growthCase{
		{name: "admitted", grows: "in flight", fill: inFlight,
			prepare: func(t *testing.T, c *crowded) {
				c.keepAlive(t, r)
				r.AddFree(t, c.id, growthSlice)
			},
			next: func(*crowded, int) request { return newcomer("", growthLength) },
			want: rig.AcquireTaken, undo: forget},
		{name: "refused", grows: "in flight", fill: inFlight, prepare: keepAlive,
			next: func(c *crowded, _ int) request { return newcomer("", len(c.inflight)) },
			want: rig.AcquireFull, undo: forget},
		{name: "refused", grows: "in line", fill: inLine, prepare: keepAlive,
			next: func(*crowded, int) request { return newcomer("", 10) },
			want: rig.AcquireFull, undo: forget},
		{name: "joins", grows: "in line", fill: inLine, prepare: keepAlive,
			next: func(*crowded, int) request { return newcomer("0", 10) },
			want: rig.AcquireFull, undo: forget},
		{name: "last, asks again", grows: "in line", fill: inLine, prepare: keepAlive,
			next: func(c *crowded, _ int) request {
				return request{token: c.line[len(c.line)-1], length: 10, arrival: fmt.Sprint(c.arrival)}
			},
			want: rig.AcquireFull, undo: forget},
		{name: "first, is served", grows: "in line", fill: inLine,
			// Each caller becomes the first in line, and takes the place of a holder.
			prepare: func(t *testing.T, c *crowded) {
				c.keepAlive(t, r)
				for range growthSlice {
					token := uuid.NewString()
					r.Do(t, "ZADD", c.id.WaitersKey(), c.arrival+int64(len(added)), token)
					added = append(added, token)
					r.Do(t, "ZADD", c.id.SeenKey(), time.Now().Unix(), token)
					r.Do(t, "HSET", c.id.NamesKey(), token, 10+growthSlice)
				}
				r.AddFree(t, c.id, growthSlice)
			},
			next: func(c *crowded, i int) request {
				return request{token: added[i], length: 10 + growthSlice, arrival: fmt.Sprint(c.arrival)}
			},
			want: rig.AcquireTaken, undo: forget},
	}
}

// figures has the times of all slices, in microseconds, for each of growthSizes.
type figures [][]float64

func TestBenchGrowth(t *testing.T) {
	r := startRedis(t)
	r.Release(t, rig.FreshID(), r.Acquire(t, rig.FreshID(), 1)) // loads the scripts
	fmt.Printf("%d slices of %d commands of each size\n\n%s\n%s\n", growthRounds, growthSlice,
		"| acquire | | p50, us: 10 | 1,000 | 10,000 | ratio: 1,000 | 10,000 "+
			"| Redis's own, us: 10 | 1,000 | 10,000 | ratio: 1,000 | 10,000 |",
		"| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	for _, c := range growthCases(r) {
		p50s, own := c.measure(t, r)
		fmt.Printf("| %s | %s |%s%s\n", c.name, c.grows, p50s.columns(), own.columns())
		for i, n := range growthSizes {
			if ratio := p50s.ratio(i); ratio > growthMost {
				t.Errorf("%s: with %d %s, acquire takes %.2f times as long as with %d, want at most %.1f times",
					c.name, n, c.grows, ratio, growthSizes[0], growthMost)
			}
		}
	}
}

// measure returns the median of each slice, and the mean as Redis measures it.
func (c growthCase) measure(t *testing.T, r *rig.Redis) (p50s, own figures) {
	t.Helper()
	var all []*crowded
	p50s, own = make(figures, len(growthSizes)), make(figures, len(growthSizes))
	for _, n := range growthSizes {
		all = append(all, c.fill(t, n))
	}
	microsOfScripts := func() int { return r.Info(t, "commandstats", `cmdstat_evalsha:calls=\d+,usec=`) }
	for round := range growthRounds {
		for k := range growthSizes {
			i := (k + round) % len(growthSizes) // no size is always the first
			c.prepare(t, all[i])
			before := microsOfScripts()
			var took []time.Duration
			for n := range growthSlice {
				q := c.next(all[i], n)
				start := time.Now()
				a, err := q.send(r.Control, all[i].id)
				took = append(took, time.Since(start))
				if err != nil || a.Status != c.want {
					t.Fatalf("%s, %d %s: answered %+v, %v", c.name, growthSizes[i], c.grows, a, err)
				}
			}
			slices.Sort(took)
			p50s[i] = append(p50s[i], 1000*quantile(took, 0.5))
			own[i] = append(own[i], float64(microsOfScripts()-before)/growthSlice)
			c.undo(t, all[i])
		}
	}
	for _, one := range all {
		r.Do(t, "DEL", one.id.Keys()...)
	}
	return p50s, own
}

// ratio returns the median ratio of a size to the first size.
func (f figures) ratio(size int) float64 { return median(ratios(f[size], f[0])) }

// columns formats the medians of all sizes, and the ratios of all but the first.
func (f figures) columns() (text string) {
	for i := range f {
		text += fmt.Sprintf(" %.0f |", median(f[i]))
	}
	for i := 1; i < len(f); i++ {
		text += fmt.Sprintf(" %.2f |", f.ratio(i))
	}
	return text
}

// repairCase describes a semaphore before and after a repair.
type repairCase struct {
	name           string
	length         int
	inflight, line int
	free           int
	ago            time.Duration // since the last heartbeats and requests; negative: the clock was set back
	queue, inUse   int           // afterwards
}

// No command of a repair blocks Redis for long, whatever its work is.
func TestBenchRepair(t *testing.T) {
	const many, portion = 10000, 256
	r := startRedis(t)
	repair(t, r, rig.FreshID(), 1) // loads the script
	r.Do(t, "CONFIG", "SET", "latency-tracking-info-percentiles", "100")
	fmt.Printf("%d repairs each\n\n%s\n%s\n", repairRounds,
		"| repair finds | longest command, ms: median | worst | commands | all of it, ms: median | worst |",
		"| --- | --- | --- | --- | --- | --- |")
	for _, c := range []repairCase{
		{name: "10,000 stale tokens", length: many, inflight: many, ago: time.Hour, queue: portion},
		{name: "10,000 missing tokens", length: many, queue: portion},
		{name: "10,000 free tokens too many", length: 5, free: many, queue: 5},
		{name: "10 stale tokens, 10,000 in line", length: 10, inflight: 10, line: many, ago: time.Hour, queue: 10},
		{name: "10,000 stale tokens, 10,000 in line",
			length: many, inflight: many, line: many, ago: time.Hour, queue: portion},
		{name: "10,000 in flight, 10,000 in line, and the clock was set back",
			length: many, inflight: many, line: many, ago: -time.Hour, inUse: many},
	} {
		var longest, all []float64
		commands := 0
		for range repairRounds {
			made := newCrowded(t, r, c.inflight, c.line, c.free, c.length, c.ago)
			r.Do(t, "CONFIG", "RESETSTAT")
			start := time.Now()
			repair(t, r, made.id, c.length)
			all = append(all, milliseconds(time.Since(start)))
			text := r.Do(t, "INFO", "latencystats").([]byte)
			longest = append(longest, numberIn(t, text, `latency_percentiles_usec_evalsha:p100=([0-9.]+)`)/1000)
			commands = r.Info(t, "commandstats", `cmdstat_evalsha:calls=`)
			queue, inUse, err := r.Counts(made.id)
			rig.Must(t, err)
			if queue != c.queue || inUse != c.inUse {
				t.Errorf("%s: %d free and %d in use afterwards, want %d and %d", c.name, queue, inUse, c.queue, c.inUse)
			}
			r.Do(t, "DEL", made.id.Keys()...)
		}
		fmt.Printf("| %s | %.1f | %.1f | %d | %.1f | %.1f |\n", c.name,
			median(longest), slices.Max(longest), commands, median(all), slices.Max(all))
		if half, most := median(longest), milliseconds(repairMost); half > most {
			t.Errorf("%s: a command of the repair blocked Redis for %.1f ms in the median, want at most %.0f",
				c.name, half, most)
		}
	}
}

// repair repairs a semaphore for a client that was not in line. Each command reclaims a
// portion of the stale tokens.
func repair(t *testing.T, r *rig.Redis, id rig.ID, length int) {
	t.Helper()
	for left := 1; left > 0; {
		reply, err := runScript(r.Control, "maintain", id, length, "1")
		rig.Must(t, err)
		var reclaimed, refilled, trimmed int
		_, err = redis.Scan(reply.Rest, &reclaimed, &refilled, &trimmed, &left)
		rig.Must(t, err)
	}
}
