//go:build bench

package main

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make bench-others" measures what it costs to take a token and to give it back, side by side with what else there is: the Semaphore of the
// npm package redis-semaphore, and the least that a semaphore can be. All three use the same Redis, in turn, in short slices; no client ever
// finds it full.

const benchPermits = 100

// contender is a semaphore that is measured.
type contender struct {
	name  string
	pairs func(clients int, over time.Duration) (pairs int, elapsed time.Duration, err error)

	rates []float64 // pairs a second, of each slice
	redis []float64 // processor time of Redis for a pair, in microseconds
}

// slice lets so many clients take and give back.
func (c *contender) slice(t *testing.T, r *rig.Redis, clients int, over time.Duration) (rate, cost float64) {
	t.Helper()
	before := redisCPU(t, r)
	n, elapsed, err := c.pairs(clients, over)
	rig.Must(t, err)
	if n == 0 {
		t.Fatalf("%s: nothing done", c.name)
	}
	return float64(n) / elapsed.Seconds(), 1e6 * (redisCPU(t, r) - before) / float64(n)
}

// goPairs makes a contender's pairs of what one client does.
func goPairs(pair func() error) func(int, time.Duration) (int, time.Duration, error) {
	return func(clients int, over time.Duration) (int, time.Duration, error) {
		var all sync.WaitGroup
		var done atomic.Int64
		var failed atomic.Pointer[error]
		start := time.Now()
		for range clients {
			all.Go(func() {
				for time.Since(start) < over {
					if err := pair(); err != nil {
						failed.Store(&err)
						return
					}
					done.Add(1)
				}
			})
		}
		all.Wait()
		if err := failed.Load(); err != nil {
			return 0, 0, *err
		}
		return int(done.Load()), time.Since(start), nil
	}
}

// newOurs is this program: acquire as the webhook does, and release as the sidecar.
func newOurs(t *testing.T, r *rig.Redis) *contender {
	t.Helper()
	c := testConfig(r.Address)
	s := newSemaphores(c.settings, newLocker(c.settings, lockConnections), idleConnections, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { _ = s.close(context.Background()) })
	id, pod := freshID(), newPodName("web-1", "node-1")
	return &contender{name: "ours", pairs: goPairs(func() error {
		token, _, err := s.acquire(t.Context(), id, pod, benchPermits, 10*time.Second)
		if err == nil {
			_, err = s.release(t.Context(), id, token)
		}
		return err
	})}
}

// What a semaphore needs at least: a Sorted Set of those who have a permit, with the time by Redis's clock, and no line.
var (
	plainAcquire = redis.NewScript(1, `
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[3]))
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then
  return 0
end
redis.call('ZADD', KEYS[1], now, ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1`)
	plainRelease = redis.NewScript(1, `return redis.call('ZREM', KEYS[1], ARGV[1])`)
)

func newPlain(t *testing.T, r *rig.Redis) *contender {
	t.Helper()
	pool := &redis.Pool{MaxIdle: idleConnections, Dial: func() (redis.Conn, error) { return redis.Dial("tcp", r.Address) }}
	t.Cleanup(func() { pool.Close() })
	run := func(script *redis.Script, args ...any) error {
		conn := pool.Get()
		defer conn.Close()
		n, err := redis.Int(script.Do(conn, append([]any{"plain"}, args...)...))
		if err == nil && n != 1 {
			err = fmt.Errorf("answered %d", n)
		}
		return err
	}
	return &contender{name: "plain", pairs: goPairs(func() error {
		token := uuid.NewString()
		if err := run(plainAcquire, benchPermits, token, 120); err != nil {
			return err
		}
		return run(plainRelease, token)
	})}
}

// newNode is redis-semaphore, in a process of its own. NODE_PATH says where it is.
func newNode(t *testing.T, r *rig.Redis) *contender {
	t.Helper()
	p := exec.Command("node", "test/testdata/redis-semaphore.js", r.Address, "node", fmt.Sprint(benchPermits))
	in, err := p.StdinPipe()
	rig.Must(t, err)
	out, err := p.StdoutPipe()
	rig.Must(t, err)
	p.Stderr = os.Stderr
	rig.Must(t, p.Start())
	t.Cleanup(func() {
		in.Close()
		_ = p.Wait()
	})
	answers := bufio.NewReader(out)
	return &contender{name: "redis-semaphore", pairs: func(clients int, over time.Duration) (pairs int, elapsed time.Duration, err error) {
		var took float64
		if _, err = fmt.Fprintln(in, clients, over.Milliseconds()); err == nil {
			_, err = fmt.Fscanln(answers, &pairs, &took)
		}
		return pairs, time.Duration(took * float64(time.Second)), err
	}}
}

func TestBenchOthers(t *testing.T) {
	r := deployedRedis(t)
	all := []*contender{newOurs(t, r), newNode(t, r), newPlain(t, r)}
	ours, node, plain := all[0], all[1], all[2]
	fmt.Printf("%d processors, %s, %d slices of %s of each for each line\n\n%s\n%s\n", runtime.NumCPU(), runtime.Version(), benchRounds, benchSlice,
		"| clients | ours, pairs/s | redis-semaphore | ours to it | plain | ours to it | Redis, us a pair: ours | redis-semaphore | plain |",
		"| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	for _, clients := range []int{1, 8, 32} {
		for _, c := range all {
			c.slice(t, r, clients, 5*benchSlice) // connections, scripts, and what Node compiles
			c.rates, c.redis = nil, nil
		}
		for round := range benchRounds {
			for n := range all {
				c := all[(round+n)%len(all)]
				rate, cost := c.slice(t, r, clients, benchSlice)
				c.rates, c.redis = append(c.rates, rate), append(c.redis, cost)
			}
		}
		toNode, toPlain := median(ratios(ours.rates, node.rates)), median(ratios(ours.rates, plain.rates)) // before median sorts them
		fmt.Printf("| %d | %.0f | %.0f | %.2f | %.0f | %.2f | %.0f | %.0f | %.0f |\n", clients, median(ours.rates), median(node.rates), toNode,
			median(plain.rates), toPlain, median(ours.redis), median(node.redis), median(plain.redis))
	}
}
