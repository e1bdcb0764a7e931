package bench

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
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

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make bench-sidecar" measures a sidecar that holds its token, as a process of a
// release. Then it measures the load of many sidecars on their Redis. It fails if a
// sidecar exceeds these limits, which TestBenchSidecar explains.
const (
	sidecarMemory     = 2560 // KB, not shared
	sidecarMemoryTLS  = 256  // KB more over TLS
	sidecarCPU        = 2 * time.Millisecond
	sidecarStart      = 30 * time.Millisecond
	sidecarConnection = 1
)

// benchTime is the time for which sidecars hold their tokens before the test measures
// their memory: SIDECAR_TIME.
func benchTime(t *testing.T) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(cmp.Or(os.Getenv("SIDECAR_TIME"), "10m"))
	rig.Must(t, err)
	return d
}

// sidecarKind is a way in which the webhook injects a sidecar.
type sidecarKind struct {
	name   string
	flags  func(address string) []string
	await  bool // an init container waits for the token
	secure bool // it connects over TLS
}

var sidecarKinds = []sidecarKind{
	{"native", func(address string) []string {
		return []string{"--length=10000", "--redis-addresses=" + address}
	}, true, false},
	{"native, over TLS", func(address string) []string {
		return []string{"--length=10000", "--redis-addresses=" + address}
	}, true, true},
	{"classic", func(string) []string { return nil }, false, false},
}

// bothRedis is a server that takes connections with and without TLS.
type bothRedis struct {
	*rig.Redis
	secure, caFile string // the address for TLS, and the file that its certificate is signed by
}

func startBothRedis(t *testing.T) *bothRedis {
	t.Helper()
	dir, secure := t.TempDir(), rig.FreeAddress(t)
	rig.WriteCertificate(t, dir, 1)
	b := &bothRedis{secure: "rediss://" + secure, caFile: filepath.Join(dir, "tls.crt")}
	b.Redis = rig.StartRedisWith(t, rig.RedisOptions{Args: func(port string) []string {
		return append(rig.PlainPort(port), "--tls-port", rig.Port(secure), "--tls-cert-file", b.caFile,
			"--tls-key-file", filepath.Join(dir, "tls.key"), "--tls-ca-cert-file", b.caFile,
			"--tls-auth-clients", "no", "--tls-session-caching", "no", "--maxclients", "11000")
	}})
	b.Do(t, "CONFIG", "SET", "appendfsync", "everysec")
	return b
}

// dialSecure connects over TLS as the program does.
func (b *bothRedis) dialSecure(t *testing.T) redis.Conn {
	t.Helper()
	text, err := os.ReadFile(b.caFile)
	rig.Must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	conn, err := redis.Dial("tcp", strings.TrimPrefix(b.secure, "rediss://"), redis.DialUseTLS(true),
		redis.DialTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}))
	rig.Must(t, err)
	return conn
}

// podEnvironment returns the environment of the containers that the webhook injects.
func podEnvironment(podUID string) []string {
	return append(os.Environ(), "GOMAXPROCS=1", "POD_UID="+podUID,
		"POD_NAME=web-5d8f7c9b6-x2x7k", "NODE_NAME=node-1")
}

// process returns a sidecar with the default settings, not started.
func (k sidecarKind) process(program string, r *bothRedis, id rig.ID, token string) *rig.Process {
	address := r.Address
	var trust []string
	if k.secure {
		address, trust = r.secure, []string{"--redis-ca-file=" + r.caFile}
	}
	args := append(append([]string{"sidecar", "--queue-redis-address=" + address}, trust...), k.flags(address)...)
	p := rig.NewProcess(program, append(args, id.String(), token)...)
	p.Cmd.Env = podEnvironment(token)
	return p
}

// start starts a sidecar as in a pod whose app runs.
func (k sidecarKind) start(t *testing.T, program string, r *bothRedis, id rig.ID, token string) *rig.Process {
	t.Helper()
	p := k.process(program, r, id, token)
	p.Start(t)
	if k.await {
		await := rig.NewProcess(program, "await")
		await.Cmd.Env = p.Cmd.Env
		await.Start(t)
		await.WantExit(t, 0)
		t.Cleanup(func() { os.Remove(rig.StartMark(token)) })
	}
	return p
}

// The memory of a sidecar is its anonymous memory (RssAnon): the pages that no other
// process shares. The other resident pages belong to the binary's file, and all sidecars
// of a node share them. The CPU time covers all threads, including the runtime's work
// between heartbeats. A start ends with the first heartbeat in Redis. The first heartbeat
// of a native sidecar takes the token.
func TestBenchSidecar(t *testing.T) {
	const each = 5
	program := filepath.Join(t.TempDir(), "at-least-semaphore-pod-hook")
	t.Setenv("CGO_ENABLED", "0")
	rig.Must(t, rig.Build(rig.Root(), program, "-trimpath", "-tags", "grpcnotrace"))
	r, over := startBothRedis(t), benchTime(t)
	fmt.Printf("%d processors, %s, %d sidecars of each kind for %s\n\n%s\n%s\n",
		runtime.NumCPU(), runtime.Version(), each, over,
		"| sidecar | memory, its own, KB | with the binary's | CPU a heartbeat, ms "+
			"| start to the first heartbeat, ms | worst | connections |",
		"| --- | --- | --- | --- | --- | --- | --- |")
	type measured struct {
		kind       sidecarKind
		starts     []time.Duration
		processes  []*rig.Process
		cpu        time.Duration // before the measurement
		connection int
	}
	var all []*measured
	for _, kind := range sidecarKinds {
		m := &measured{kind: kind}
		id := rig.FreshID()
		r.MakeFree(t, id, 10000)
		for range 4 * each { // the first start reads the binary from the disk
			m.starts = append(m.starts, startTime(t, r, kind, program, id))
		}
		before := connectionsOf(t, r.Redis)
		for range each {
			m.processes = append(m.processes, kind.start(t, program, r, id, uuid.NewString()))
		}
		r.WantInflightCount(t, id, each)
		rig.Eventually(t, 10*time.Second, func() error { // sidecars soon close their connections to lock servers
			m.connection = connectionsOf(t, r.Redis) - before
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
	beats := scriptsRun(t, r.Redis)
	time.Sleep(over) // the test measures the cost of this time
	beats = (scriptsRun(t, r.Redis) - beats) / (each * len(all))
	if want := int(over / rig.DefaultTiming.Interval); beats < want-1 || beats > want+1 {
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
		fmt.Printf("| %s | %d | %d | %.2f | %.1f | %.1f | %.1f |\n", m.kind.name, slices.Max(own), slices.Max(resident),
			milliseconds(perBeat), milliseconds(start), milliseconds(worst), float64(m.connection)/each)
		bound := sidecarMemory
		if m.kind.secure {
			bound += sidecarMemoryTLS
		}
		if most := slices.Max(own); most > bound {
			t.Errorf("a %s sidecar has %d KB of its own, more than %d", m.kind.name, most, bound)
		}
		if perBeat > sidecarCPU {
			t.Errorf("a heartbeat of a %s sidecar takes %s, more than %s", m.kind.name, perBeat, sidecarCPU)
		}
		if start > sidecarStart {
			t.Errorf("the first heartbeat of a %s sidecar comes after %s, later than %s",
				m.kind.name, start, sidecarStart)
		}
	}
}

// startTime returns the time from the start of a process until its first heartbeat in
// Redis.
func startTime(t *testing.T, r *bothRedis, kind sidecarKind, program string, id rig.ID) time.Duration {
	t.Helper()
	token := uuid.NewString()
	p := kind.process(program, r, id, token)
	start := time.Now()
	rig.Must(t, p.Launch())
	for {
		score := r.Do(t, "ZSCORE", id.InflightKey(), token)
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

// connectionsOf returns the number of connections of a Redis.
func connectionsOf(t *testing.T, r *rig.Redis) int {
	t.Helper()
	return int(numberIn(t, r.Do(t, "INFO", "clients").([]byte), `connected_clients:(\d+)`))
}

// scriptsRun returns the number of scripts that a Redis has run.
func scriptsRun(t *testing.T, r *rig.Redis) int {
	t.Helper()
	calls := r.CommandCalls(t)
	return calls["evalsha"] + calls["eval"]
}

// threadsTime returns the CPU time of all threads of the processes, in nanoseconds.
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

// What TLS costs a heartbeat, its connection, and the memory of Redis, beside the same
// without TLS. The two take turns, so that a busy machine slows both down.
func TestBenchSidecarTLS(t *testing.T) {
	const pairs, each, many = 100, 10, 300
	allowFiles(t, 4000)
	r, id, token := startBothRedis(t), rig.FreshID(), uuid.NewString()
	dials := []func() redis.Conn{
		func() redis.Conn { return r.Dial(t) },
		func() redis.Conn { return r.dialSecure(t) },
	}
	var conns []redis.Conn
	for _, dial := range dials {
		conns = append(conns, dial())
	}
	ratio := func(name string, n int, do func(kind int)) {
		var took [2][]float64 // microseconds
		var ratios []float64
		for i := range n {
			var now [2]float64
			for k := range 2 {
				kind := (i + k) % 2
				start := time.Now()
				do(kind)
				now[kind] = float64(time.Since(start).Microseconds())
				took[kind] = append(took[kind], now[kind])
			}
			ratios = append(ratios, now[1]/max(1, now[0]))
		}
		median := func(all []float64) float64 { return slices.Sorted(slices.Values(all))[len(all)/2] }
		fmt.Printf("| %s | %.0f | %.0f | %.2f |\n", name, median(took[0]), median(took[1]), median(ratios))
	}
	fmt.Printf("%d processors, %s\n\n| medians | without TLS, us | with TLS, us | ratio of a pair |\n| --- | --- | --- | --- |\n",
		runtime.NumCPU(), runtime.Version())
	ratio(fmt.Sprintf("%d heartbeats", each), pairs, func(kind int) {
		for range each {
			_, err := runScript(conns[kind], "heartbeat", id, token, "web-1 node-1", 60)
			rig.Must(t, err)
		}
	})
	ratio("a connection, and a PING", pairs, func(kind int) {
		conn := dials[kind]()
		_, err := conn.Do("PING")
		rig.Must(t, err)
		conn.Close()
	})
	for kind, name := range []string{"without TLS", "with TLS"} {
		before := r.Memory(t, "VmRSS")
		var open []redis.Conn
		for range many {
			conn := dials[kind]()
			_, err := conn.Do("PING")
			rig.Must(t, err)
			open = append(open, conn)
		}
		fmt.Printf("a connection %s takes %.1f KB of Redis, resident\n", name, float64(r.Memory(t, "VmRSS")-before)/many)
		for _, conn := range open {
			conn.Close()
		}
	}
}

// simulation is many sidecars in one process. Each sends the commands of a sidecar that
// holds its token, over its own connection.
type simulation struct {
	address  string
	interval time.Duration

	began      atomic.Int64 // sidecars that have sent a heartbeat
	complaints atomic.Int64 // heartbeats after the first that failed or found the token lost
	last       atomic.Value // complaint
}

// run simulates one sidecar until ctx is done.
func (s *simulation) run(ctx context.Context, id rig.ID, pod string) {
	token, held := uuid.NewString(), time.Now()
	var conn redis.Conn
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	beat := func() (rejoined bool, err error) {
		if conn == nil || conn.Err() != nil {
			if conn, err = redis.Dial("tcp", s.address, redis.DialReadTimeout(s.interval)); err != nil {
				return false, err
			}
		}
		reply, err := runScript(conn, "heartbeat", id, token, pod, int(time.Since(held).Seconds()))
		return reply.Status == rig.HeartbeatRejoined, err
	}
	next := time.NewTimer(rand.N(s.interval))
	defer next.Stop()
	for first := true; ; first = false {
		select {
		case <-next.C:
		case <-ctx.Done():
			return
		}
		next.Reset(s.interval)
		rejoined, err := beat()
		switch {
		case err != nil:
			s.complain(err.Error())
		case rejoined && !first:
			s.complain("the token was not in flight")
		}
		if first {
			s.began.Add(1)
		}
	}
}

func (s *simulation) complain(text string) {
	s.complaints.Add(1)
	s.last.Store(text)
}

// Many sidecars, simulated in one process. A hundred share a semaphore.
func TestBenchManySidecars(t *testing.T) {
	const shared = 100
	allowFiles(t, 12000)
	interval := rig.DefaultTiming.Interval
	fmt.Printf("%d processors, %s, a heartbeat each %s, %d sidecars to a semaphore, for two intervals\n\n%s\n%s\n",
		runtime.NumCPU(), runtime.Version(), interval, shared,
		"| sidecars | heartbeats/s | CPU of Redis, % of a core | us a heartbeat "+
			"| memory of Redis, MB | KB a sidecar | resident, MB |",
		"| --- | --- | --- | --- | --- | --- | --- |")
	var idle, empty float64
	for _, n := range []int{0, 100, 1000, 10000} {
		r := rig.StartRedisWith(t, rig.RedisOptions{Args: func(port string) []string {
			return append(rig.PlainPort(port), "--maxclients", "11000")
		}})
		r.Do(t, "CONFIG", "SET", "appendfsync", "everysec")
		ctx, cancel := context.WithCancel(t.Context())
		var sidecars sync.WaitGroup
		s := &simulation{address: r.Address, interval: interval}
		for i := range n {
			id := rig.ID{Namespace: "shop", Key: fmt.Sprintf("web-%d", i/shared)}
			sidecars.Go(func() { s.run(ctx, id, fmt.Sprintf("web-%d node-1", i)) })
		}
		rig.Eventually(t, interval+time.Minute, func() error {
			if began := s.began.Load(); began < int64(n) {
				return fmt.Errorf("%d of %d sidecars have sent a heartbeat", began, n)
			}
			return nil
		})
		if got := connectionsOf(t, r) - 1; got != n {
			t.Errorf("%d sidecars have %d connections", n, got)
		}
		cpu, beats, start := redisCPU(t, r), scriptsRun(t, r), time.Now()
		time.Sleep(2 * interval) // the test measures the cost of this time
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
		fmt.Printf("| %d | %.1f | %.2f | %s | %.1f | %s | %.1f |\n", n, float64(beats)/elapsed, 100*cpu/elapsed,
			perBeat, used/1e6, perSidecar, float64(r.Memory(t, "VmRSS"))/1e3)
		if complaints := s.complaints.Load(); complaints > 0 || beats < 19*n/10 {
			t.Errorf("of %d sidecars: %d heartbeats, %d complaints, such as %v", n, beats, complaints, s.last.Load())
		}
		cancel()
		sidecars.Wait()
		r.Stop()
	}
}

// allowFiles raises the limit of open files to n, for this process and its children.
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
