//go:build measure

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// The cost of waiting: many sidecars, as processes, against one Redis.
func TestMeasureWaiters(t *testing.T) {
	const over = time.Minute
	t.Logf("%8s  %14s  %14s  %16s  %18s  %16s  %s", "waiters", "Redis CPU", "Redis memory", "CPU per sidecar", "RssAnon/sidecar", "VmRSS/sidecar", "next holds the token after SIGTERM to the holder: median, worst")
	for _, n := range []int{10, 100, 1000} {
		r, s, id := newSemaphoreOn(t, startRedis(t))
		first := acquire(t, s, id, 1)
		var sidecars []*exec.Cmd
		byToken := map[string]*exec.Cmd{}
		stop := func() {
			for _, p := range sidecars {
				_ = p.Process.Kill()
				_ = p.Wait()
			}
		}
		t.Cleanup(stop)
		for i := range n {
			token := uuid.NewString()
			p := exec.Command(binary, "sidecar", "--queue-redis-address="+r.address, "--redis-addresses="+r.address, "--length=1", id.String(), token)
			must(t, p.Start())
			sidecars, byToken[token] = append(sidecars, p), p
			if i%10 == 9 { // so that they start as fast as the machine lets them, and no faster
				r.wantWaiters(t, id, i+1)
			}
		}
		r.wantWaiters(t, id, n)

		redisBefore, sidecarsBefore, start := cpu(t, r.cmd), time.Duration(0), time.Now()
		for _, p := range sidecars {
			sidecarsBefore += cpu(t, p)
		}
		time.Sleep(over) // what is measured is the cost of this
		elapsed := time.Since(start)
		redisCPU := cpu(t, r.cmd) - redisBefore
		var sidecarsCPU time.Duration
		var anonymous, resident int
		for _, p := range sidecars {
			sidecarsCPU += cpu(t, p)
			anonymous += memory(t, p, "RssAnon")
			resident += memory(t, p, "VmRSS")
		}
		sidecarsCPU -= sidecarsBefore
		r.wantWaiters(t, id, n) // nobody was dropped

		giveBack(t, s, id, first)
		r.wantWaiters(t, id, n-1)
		var taken []time.Duration
		for range min(20, n-1) {
			holder, next := r.inflight(t, id)[0], r.mustLine(t, id)[0]
			start := time.Now()
			must(t, byToken[holder].Process.Signal(syscall.SIGTERM))
			for !slices.Equal(r.inflight(t, id), []string{next}) {
				if time.Since(start) > 20*time.Second {
					t.Fatalf("%s has not taken the token", next)
				}
			}
			taken = append(taken, time.Since(start))
		}
		slices.Sort(taken)
		percent := func(d time.Duration) string { return fmt.Sprintf("%.3f %%", 100*d.Seconds()/elapsed.Seconds()) }
		t.Logf("%8d  %14s  %11d KB  %16s  %15d KB  %13d KB  %s, %s", n, percent(redisCPU), memory(t, r.cmd, "VmRSS"), percent(sidecarsCPU/time.Duration(n)),
			anonymous/n, resident/n, taken[len(taken)/2].Round(100*time.Microsecond), taken[len(taken)-1].Round(100*time.Microsecond))
		stop()
	}
}

func (s *redisServer) wantWaiters(t *testing.T, id semaphoreID, n int) {
	t.Helper()
	eventually(t, 5*time.Minute, func() error {
		got, err := redis.Int(s.control.Do("ZCARD", id.waitersKey()))
		if err == nil && got != n {
			err = fmt.Errorf("%d in line, want %d", got, n)
		}
		return err
	})
}

// cpu is the processor time that a process has used. Linux gives it in hundredths of a second.
func cpu(t *testing.T, p *exec.Cmd) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Process.Pid))
	must(t, err)
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, field := range fields[11:13] { // utime, stime; see proc(5)
		n, err := strconv.Atoi(field)
		must(t, err)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}
