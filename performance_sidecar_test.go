//go:build bench

package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make bench-sidecar" measures what runs beside every pod: a sidecar, as the process of a release, while it holds its token; and what many
// of them cost their Redis. It fails where a sidecar takes more than these, which TestBenchSidecar explains.
const (
	sidecarMemory     = 2560 // KB of its own
	sidecarCPU        = 2 * time.Millisecond
	sidecarStart      = 30 * time.Millisecond
	sidecarConnection = 1
)

// benchTime is for how long sidecars hold their tokens before their memory is measured: SIDECAR_TIME.
func benchTime(t *testing.T) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(cmp.Or(os.Getenv("SIDECAR_TIME"), "10m"))
	rig.Must(t, err)
	return d
}

// sidecarKind is a way in which a sidecar is injected.
type sidecarKind struct {
	name  string
	flags func(address string) []string
	await bool // there is an init container, which waits for the token
}

var sidecarKinds = []sidecarKind{
	{"native", func(address string) []string { return []string{"--length=10000", "--redis-addresses=" + address} }, true},
	{"classic", func(string) []string { return nil }, false},
}

// podEnvironment is that of the containers that are injected into a pod.
func podEnvironment() []string {
	return append(os.Environ(), oneProcessor.Name+"="+oneProcessor.Value, "POD_UID="+uuid.NewString(), "POD_NAME=web-5d8f7c9b6-x2x7k", "NODE_NAME=node-1")
}

// start starts a sidecar with the settings that are built in, as in a pod whose app runs.
func (k sidecarKind) start(t *testing.T, program, address string, id semaphoreID, token string) *rig.Process {
	t.Helper()
	pod := podEnvironment()
	args := append([]string{"sidecar", "--queue-redis-address=" + address}, k.flags(address)...)
	p := rig.NewProcess(program, append(args, id.String(), token)...)
	await := rig.NewProcess(program, "await")
	p.Cmd.Env, await.Cmd.Env = pod, pod
	p.Start(t)
	if k.await {
		await.Start(t)
		await.WantExit(t, 0)
		t.Cleanup(func() { os.Remove(newStartMark("pod", token).path) })
	}
	return p
}

// Memory is what the kernel counts as anonymous (RssAnon): the pages that no other process shares, on whatever node. The rest of what is
// resident are pages of the binary's file, which all sidecars of a node have in common. CPU is that of all threads, with what the runtime
// does between the heartbeats. A start ends when Redis has the first heartbeat; a native sidecar's first is the taking of its token.
func TestBenchSidecar(t *testing.T) {
	const each = 5
	program := filepath.Join(t.TempDir(), "at-least-semaphore-pod-hook")
	t.Setenv("CGO_ENABLED", "0")
	rig.Must(t, rig.Build(rig.Root(), program, "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w"))
	r, over := deployedRedis(t), benchTime(t)
	fmt.Printf("%d processors, %s, %d sidecars of each kind for %s\n\n%s\n%s\n", runtime.NumCPU(), runtime.Version(), each, over,
		"| sidecar | memory, its own, KB | with the binary's | CPU a heartbeat, ms | start to the first heartbeat, ms | worst | connections |",
		"| --- | --- | --- | --- | --- | --- | --- |")
	type measured struct {
		kind       sidecarKind
		starts     []time.Duration
		processes  []*rig.Process
		cpu        time.Duration // so far, when it began to be measured
		connection int
	}
	var all []*measured
	for _, kind := range sidecarKinds {
		m := &measured{kind: kind}
		id := freshID()
		r.MakeFree(t, id, 10000)
		for range 4 * each { // the first is the one that reads the binary from the disk
			m.starts = append(m.starts, startTime(t, r, kind, program, id))
		}
		before := connectionsOf(t, r)
		for range each {
			m.processes = append(m.processes, kind.start(t, program, r.Address, id, uuid.NewString()))
		}
		r.WantInflightCount(t, id, each)
		rig.Eventually(t, 10*time.Second, func() error { // those to lock servers are closed soon
			m.connection = connectionsOf(t, r) - before
			if m.connection > sidecarConnection*each {
				return fmt.Errorf("%d sidecars have %d connections", each, m.connection)
			}
			return nil
		})
		all = append(all, m)
	}
	for _, m := range all {
		m.cpu = threadsTime(t, m.processes)
	}
	beats := scriptsRun(t, r)
	time.Sleep(over) // what is measured is the cost of this
	beats = (scriptsRun(t, r) - beats) / (each * len(all))
	if want := int(over / (30 * time.Second)); beats < want-1 || beats > want+1 {
		t.Errorf("%d heartbeats of each, want some %d", beats, want)
	}
	for _, m := range all {
		perBeat := (threadsTime(t, m.processes) - m.cpu) / time.Duration(max(1, beats)*each)
		var own, resident []int
		for _, p := range m.processes {
			own, resident = append(own, p.Memory(t, "RssAnon")), append(resident, p.Memory(t, "VmRSS"))
		}
		slices.Sort(m.starts)
		start, worst := m.starts[len(m.starts)/2], m.starts[len(m.starts)-1]
		fmt.Printf("| %s | %d | %d | %.2f | %.1f | %.1f | %.1f |\n", m.kind.name, slices.Max(own), slices.Max(resident), milliseconds(perBeat),
			milliseconds(start), milliseconds(worst), float64(m.connection)/each)
		if most := slices.Max(own); most > sidecarMemory {
			t.Errorf("a %s sidecar has %d KB of its own, more than %d", m.kind.name, most, sidecarMemory)
		}
		if perBeat > sidecarCPU {
			t.Errorf("a heartbeat of a %s sidecar takes %s, more than %s", m.kind.name, perBeat, sidecarCPU)
		}
		if start > sidecarStart {
			t.Errorf("the first heartbeat of a %s sidecar comes after %s, later than %s", m.kind.name, start, sidecarStart)
		}
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// startTime is how long it takes from the start of a process until Redis has its first heartbeat.
func startTime(t *testing.T, r *rig.Redis, kind sidecarKind, program string, id semaphoreID) time.Duration {
	t.Helper()
	token := uuid.NewString()
	p := rig.NewProcess(program, append(append([]string{"sidecar", "--queue-redis-address=" + r.Address}, kind.flags(r.Address)...), id.String(), token)...)
	p.Cmd.Env = podEnvironment()
	start := time.Now()
	rig.Must(t, p.Launch())
	for {
		score := r.Do(t, "ZSCORE", id.inflightKey(), token)
		took := time.Since(start)
		if score != nil {
			p.Signal(t, syscall.SIGTERM)
			p.WantExit(t, 0)
			return took
		}
		if took > 10*time.Second {
			p.Kill()
			t.Fatalf("no heartbeat:\n%s", p.Log.String())
		}
	}
}

// connectionsOf is how many connections a Redis has.
func connectionsOf(t *testing.T, r *rig.Redis) int {
	t.Helper()
	return int(numberIn(t, r.Do(t, "INFO", "clients").([]byte), `connected_clients:(\d+)`))
}

// scriptsRun is how many scripts a Redis has run.
func scriptsRun(t *testing.T, r *rig.Redis) int {
	t.Helper()
	calls := r.CommandCalls(t)
	return calls["evalsha"] + calls["eval"]
}

// threadsTime is the processor time of all threads of processes so far, to the nanosecond.
func threadsTime(t *testing.T, processes []*rig.Process) (all time.Duration) {
	t.Helper()
	for _, p := range processes {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.Pid()))
		rig.Must(t, err)
		if len(files) == 0 {
			t.Fatalf("%v has ended:\n%s", p.Cmd.Args, p.Log.String())
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			rig.Must(t, err)
			n, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
			rig.Must(t, err)
			all += time.Duration(n)
		}
	}
	return all
}

// Many sidecars, simulated in one process: each is what runs in a sidecar while it holds its token, with a connection of its own. A hundred
// share a semaphore.
func TestBenchManySidecars(t *testing.T) {
	const shared = 100
	allowFiles(t, 12000)
	interval := testConfig("127.0.0.1:6379").heartbeatInterval
	fmt.Printf("%d processors, %s, a heartbeat each %s, %d sidecars to a semaphore, for two intervals\n\n%s\n%s\n", runtime.NumCPU(), runtime.Version(), interval, shared,
		"| sidecars | heartbeats/s | CPU of Redis, % of a core | us a heartbeat | memory of Redis, MB | KB a sidecar | resident, MB |", "| --- | --- | --- | --- | --- | --- | --- |")
	var idle, empty float64
	for _, n := range []int{0, 100, 1000, 10000} {
		r := rig.StartRedisWith(t, rig.RedisOptions{Args: func(port string) []string { return append(rig.PlainPort(port), "--maxclients", "11000") }})
		r.Do(t, "CONFIG", "SET", "appendfsync", "everysec")
		ctx, cancel := context.WithCancel(t.Context())
		var sidecars sync.WaitGroup
		var failed failures
		for i := range n {
			id := semaphoreID{"shop", fmt.Sprintf("web-%d", i/shared)}
			s := newSemaphores(testConfig(r.Address).settings, nil, 1, slog.New(&failed))
			one := &sidecar{semaphores: s, id: id, token: uuid.NewString(), pod: newPodName(fmt.Sprintf("web-%d", i), "node-1"), held: time.Now(),
				interval: interval, log: s.log, grace: ctx}
			sidecars.Go(func() {
				defer s.queue.close()
				one.loop(ctx, rand.N(interval), nil)
			})
		}
		if n > 0 {
			time.Sleep(interval + time.Second) // all have begun
		}
		if got := connectionsOf(t, r) - 1; got != n {
			t.Errorf("%d sidecars have %d connections", n, got)
		}
		failed.lines.Store(0) // each has put itself there
		cpu, beats, start := redisCPU(t, r), scriptsRun(t, r), time.Now()
		time.Sleep(2 * interval) // what is measured is the cost of this
		elapsed := time.Since(start).Seconds()
		cpu, beats = redisCPU(t, r)-cpu, scriptsRun(t, r)-beats
		used := numberIn(t, r.Do(t, "INFO", "memory").([]byte), `used_memory:(\d+)`)
		if n == 0 {
			idle, empty = cpu/elapsed, used
		}
		perBeat, perSidecar := "", ""
		if n > 0 {
			perBeat = fmt.Sprintf("%.0f", 1e6*(cpu-idle*elapsed)/float64(max(1, beats)))
			perSidecar = fmt.Sprintf("%.1f", (used-empty)/1024/float64(n))
		}
		fmt.Printf("| %d | %.1f | %.2f | %s | %.1f | %s | %.1f |\n", n, float64(beats)/elapsed, 100*cpu/elapsed, perBeat, used/1e6, perSidecar,
			float64(r.Memory(t, "VmRSS"))/1e3)
		if lines := failed.lines.Load(); lines > 0 || beats < 19*n/10 {
			t.Errorf("of %d sidecars: %d heartbeats, %d complaints, such as %v", n, beats, lines, failed.last.Load())
		}
		cancel()
		sidecars.Wait()
		r.Stop()
	}
}

// redisCPU is what a Redis has used of a processor so far, in seconds.
func redisCPU(t *testing.T, r *rig.Redis) float64 {
	t.Helper()
	info := r.Do(t, "INFO", "cpu").([]byte)
	return numberIn(t, info, `used_cpu_user:([0-9.]+)`) + numberIn(t, info, `used_cpu_sys:([0-9.]+)`)
}

// failures counts what is logged.
type failures struct {
	lines atomic.Int64
	last  atomic.Value
}

// Enabled implements slog.Handler.
func (f *failures) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }

// Handle implements slog.Handler.
func (f *failures) Handle(_ context.Context, r slog.Record) error {
	f.lines.Add(1)
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	})
	f.last.Store(text)
	return nil
}

// WithAttrs implements slog.Handler.
func (f *failures) WithAttrs([]slog.Attr) slog.Handler { return f }

// WithGroup implements slog.Handler.
func (f *failures) WithGroup(string) slog.Handler { return f }

// allowFiles sees to it that this process, and those that it starts, may have so many files open.
func allowFiles(t *testing.T, n uint64) {
	t.Helper()
	var limit syscall.Rlimit
	rig.Must(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	limit.Max = max(limit.Max, n)
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatalf("%d open files are needed: %v", limit.Max, err)
	}
}
