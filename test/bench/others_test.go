package bench

import (
	"bufio"
	"fmt"
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

// "make bench-others" measures the cost of taking a token and giving it back, and
// compares three contenders: our scripts, the Semaphore of the npm package
// redis-semaphore, and a plain script, the least that a semaphore can be. All use one
// Redis in turn, in short slices. No client ever finds the semaphore full.

const benchPermits = 100

// contender is a measured semaphore.
type contender struct {
	name  string
	pairs func(clients int, over time.Duration) (pairs int, elapsed time.Duration, err error)

	rates []float64 // pairs a second, of each slice
	redis []float64 // CPU time of Redis for a pair, in microseconds
}

// slice makes clients acquire and release. It returns the pairs a second, and the CPU
// time of Redis for each pair.
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

// goPairs runs the pair function of one client in many clients.
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

// onPool runs a command over a connection of a pool. An answer other than want is an
// error.
func onPool(pool *redis.Pool, want int, command func(redis.Conn) (int, error)) error {
	conn := pool.Get()
	defer conn.Close()
	n, err := command(conn)
	if err == nil && n != want {
		err = fmt.Errorf("answered %d", n)
	}
	return err
}

// newOurs acquires and releases with this program's scripts. It sends them what a webhook
// and a sidecar send.
func newOurs(t *testing.T, r *rig.Redis) *contender {
	t.Helper()
	pool := newPool(r.Address)
	t.Cleanup(func() { pool.Close() })
	id := rig.FreshID()
	r.Release(t, id, r.Acquire(t, id, benchPermits)) // makes the free tokens
	return &contender{name: "ours", pairs: goPairs(func() error {
		token := uuid.NewString()
		err := onPool(pool, rig.AcquireTaken, func(conn redis.Conn) (int, error) {
			a, err := request{token: token, length: benchPermits, pod: "web-1 node-1"}.send(conn, id)
			return a.Status, err
		})
		if err != nil {
			return err
		}
		return onPool(pool, rig.ReleaseDone, func(conn redis.Conn) (int, error) {
			reply, err := runScript(conn, "release", id, token)
			return reply.Status, err
		})
	})}
}

// A minimal semaphore: a Sorted Set of the permits and their times by Redis's clock,
// without a line.
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
	pool := newPool(r.Address)
	t.Cleanup(func() { pool.Close() })
	run := func(script *redis.Script, args ...any) error {
		return onPool(pool, 1, func(conn redis.Conn) (int, error) {
			return redis.Int(script.Do(conn, append([]any{"plain"}, args...)...))
		})
	}
	return &contender{name: "plain", pairs: goPairs(func() error {
		token := uuid.NewString()
		if err := run(plainAcquire, benchPermits, token, 120); err != nil {
			return err
		}
		return run(plainRelease, token)
	})}
}

// newNode runs redis-semaphore in its own process. NODE_PATH names its folder.
func newNode(t *testing.T, r *rig.Redis) *contender {
	t.Helper()
	program := rig.Path("test/testdata/redis-semaphore.js")
	p := exec.Command("node", program, r.Address, "node", fmt.Sprint(benchPermits))
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
	pairs := func(clients int, over time.Duration) (n int, elapsed time.Duration, err error) {
		var took float64
		if _, err = fmt.Fprintln(in, clients, over.Milliseconds()); err == nil {
			_, err = fmt.Fscanln(answers, &n, &took)
		}
		return n, time.Duration(took * float64(time.Second)), err
	}
	return &contender{name: "redis-semaphore", pairs: pairs}
}

func TestBenchOthers(t *testing.T) {
	r := startRedis(t)
	ours, node, plain := newOurs(t, r), newNode(t, r), newPlain(t, r)
	all := []*contender{ours, node, plain}
	fmt.Printf("%d processors, %s, %d slices of %s of each for each line\n\n%s\n%s\n",
		runtime.NumCPU(), runtime.Version(), benchRounds, benchSlice,
		"| clients | ours, pairs/s | redis-semaphore | ours to it | plain | ours to it "+
			"| Redis, us a pair: ours | redis-semaphore | plain |",
		"| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	for _, clients := range []int{1, 8, 32} {
		for _, c := range all {
			c.slice(t, r, clients, 5*benchSlice) // opens connections, loads scripts, makes Node compile
			c.rates, c.redis = nil, nil
		}
		for round := range benchRounds {
			for n := range all {
				c := all[(round+n)%len(all)]
				rate, cost := c.slice(t, r, clients, benchSlice)
				c.rates, c.redis = append(c.rates, rate), append(c.redis, cost)
			}
		}
		fmt.Printf("| %d | %.0f | %.0f | %.2f | %.0f | %.2f | %.0f | %.0f | %.0f |\n", clients,
			median(ours.rates), median(node.rates), median(ratios(ours.rates, node.rates)),
			median(plain.rates), median(ratios(ours.rates, plain.rates)),
			median(ours.redis), median(node.redis), median(plain.redis))
	}
}
