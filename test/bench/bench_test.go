//go:build bench

package main

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make bench" measures admissions side by side with the floor: a process with the webhook's server and TLS, whose handler reads the body
// and answers a constant of the same size. Both run all the time, and are asked in turn in short slices, so that what else the machine does
// hits both alike. What is compared are the slices of one pair; the table has the medians of these ratios. Its first lines are those of a
// floor that sends Redis a PING for each request, too: what a webhook cannot do without.

const (
	benchSlice  = 200 * time.Millisecond
	benchSecret = "0123456789abcdef"
	floorFolder = "FLOOR_CERTIFICATE" // in the environment of the floor's process
	floorHost   = "FLOOR_ADDRESS"
	floorRedis  = "FLOOR_REDIS" // is sent a PING for each POST; empty for none
)

// benchRounds is how many pairs of slices there are for each line of the table.
var benchRounds, _ = strconv.Atoi(cmp.Or(os.Getenv("BENCH_ROUNDS"), "15"))

func init() {
	if folder := os.Getenv(floorFolder); folder != "" {
		fmt.Fprintln(os.Stderr, serveFloor(os.Getenv(floorHost), folder, os.Getenv(floorRedis)))
		os.Exit(1)
	}
}

// serveFloor answers each POST with what was PUT last, and a GET with what /metrics tells of a process.
func serveFloor(address, folder, redisAddress string) error {
	log := slog.New(slog.DiscardHandler)
	cert, err := loadCertificate(folder, log)
	if err != nil {
		return err
	}
	who, err := newCallers(webhookConfig{}, log)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	pool := newRedisPool(redisAddress, redisSettings{}, idleConnections, redisReadTimeout)
	ping := func() error {
		conn := pool.Get()
		defer conn.Close()
		_, err := conn.Do("PING")
		return err
	}
	var answer atomic.Pointer[[]byte]
	answer.Store(&[]byte{})
	handler := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil && r.Method == http.MethodPost && redisAddress != "" {
			err = ping()
		}
		switch {
		case err != nil:
			http.Error(rw, err.Error(), http.StatusBadRequest)
		case r.Method == http.MethodPut:
			answer.Store(&body)
		case r.Method == http.MethodGet:
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			var u syscall.Rusage
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
			fmt.Fprintf(rw, "go_memstats_mallocs_total %d\ngo_memstats_alloc_bytes_total %d\nprocess_cpu_seconds_total %g\n",
				m.Mallocs, m.TotalAlloc, float64(u.Utime.Nano()+u.Stime.Nano())/1e9)
		default:
			text := *answer.Load()
			rw.Header().Set("Content-Type", "application/json")
			rw.Header().Set("Content-Length", strconv.Itoa(len(text)))
			_, _ = rw.Write(text)
		}
	})
	return newWebhookServer(handler, who.tls(cert), newBounds()).ServeTLS(l, "", "")
}

// target is a server that is measured.
type target struct {
	url, statistics string
	client          *http.Client // over one connection, as the API server's
}

func newTarget(t *testing.T, url, statistics string) *target {
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	t.Cleanup(transport.CloseIdleConnections)
	return &target{url, statistics, &http.Client{Transport: transport, Timeout: 20 * time.Second}}
}

func startFloor(t *testing.T, redisAddress string) *target {
	t.Helper()
	folder, address := t.TempDir(), rig.FreeAddress(t)
	rig.WriteCertificate(t, folder, 1)
	p := rig.NewProcess(os.Args[0])
	p.Cmd.Env = append(os.Environ(), floorFolder+"="+folder, floorHost+"="+address, floorRedis+"="+redisAddress)
	p.Start(t)
	f := newTarget(t, "https://"+address, "https://"+address)
	rig.Eventually(t, 20*time.Second, func() error {
		_, err := f.do(http.MethodGet, nil)
		return err
	})
	return f
}

// startBenchWebhook starts the webhook as it is installed, which logs into a file.
func startBenchWebhook(t *testing.T, r *rig.Redis, logFile string) *target {
	t.Helper()
	secret := filepath.Join(t.TempDir(), "secret")
	rig.Must(t, os.WriteFile(secret, []byte(benchSecret), 0o600))
	log, err := os.Create(logFile)
	rig.Must(t, err)
	t.Cleanup(func() { log.Close() })
	rig.LimitMemoryAsDeployed(t)
	w := rig.NewWebhook(t, rig.Program(t), r.Address, "--path-secret-file="+secret)
	w.Cmd.Stderr = log
	w.Begin(t)
	return newTarget(t, w.URL+mutatePath+"/"+benchSecret+"?timeout=10s", w.HealthURL+"/metrics")
}

// do sends a request with the headers of an API server.
func (f *target) do(method string, body []byte) ([]byte, error) {
	request, err := http.NewRequest(method, f.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json, */*")
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "kube-apiserver-admission")
	response, err := f.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != http.StatusOK || response.ProtoMajor != 2) {
		err = fmt.Errorf("%s by %s: %s", response.Status, response.Proto, text)
	}
	return text, err
}

// statistic reads numbers of the process.
func (f *target) statistic(t *testing.T) func(name string) float64 {
	t.Helper()
	response, err := f.client.Get(f.statistics)
	rig.Must(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	rig.Must(t, err)
	return func(name string) float64 { return numberIn(t, text, `(?m)^`+name+` (\S+)$`) }
}

func numberIn(t *testing.T, text []byte, pattern string) float64 {
	t.Helper()
	m := regexp.MustCompile(pattern).FindSubmatch(text)
	if m == nil {
		t.Fatalf("no %s in %s", pattern, text)
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	rig.Must(t, err)
	return n
}

// pingingFloor is the case that asks the floor with a PING, and not the webhook.
const pingingFloor = "(a) floor and PING"

// benchCase is a kind of request.
type benchCase struct {
	name   string
	bodies [][]byte
	says   string // each answer
	reset  func() // before each slice
	next   atomic.Int64
}

// slice asks for so long, with so many requests at any time; it returns how long each took, and how
// many a second that makes.
func (c *benchCase) slice(t *testing.T, of *target, concurrent int) (all []time.Duration, rate float64) {
	t.Helper()
	c.reset()
	took := make([][]time.Duration, concurrent)
	var workers sync.WaitGroup
	begin := time.Now()
	end := begin.Add(benchSlice)
	for i := range took {
		workers.Go(func() {
			for start := time.Now(); start.Before(end); {
				text, err := of.do(http.MethodPost, c.bodies[int(c.next.Add(1))%len(c.bodies)])
				if err == nil && !bytes.Contains(text, []byte(c.says)) {
					err = fmt.Errorf("answered %s", text)
				}
				if err != nil {
					t.Errorf("%s: %v", c.name, err)
					return
				}
				now := time.Now()
				took[i] = append(took[i], now.Sub(start))
				start = now
			}
		})
	}
	workers.Wait()
	elapsed := time.Since(begin)
	if t.Failed() {
		t.FailNow()
	}
	all = slices.Concat(took...)
	return all, float64(len(all)) / elapsed.Seconds()
}

// quantile is that of sorted durations, in milliseconds.
func quantile(sorted []time.Duration, q float64) float64 {
	return float64(sorted[min(len(sorted)-1, int(q*float64(len(sorted))))].Microseconds()) / 1000
}

// benchSeries is what the slices of one server tell.
type benchSeries struct {
	rates, p50s []float64 // of each slice
	all         []time.Duration
}

func (s *benchSeries) add(took []time.Duration, rate float64) {
	slices.Sort(took)
	s.rates = append(s.rates, rate)
	s.p50s = append(s.p50s, quantile(took, 0.5))
	s.all = append(s.all, took...)
	slices.Sort(s.all)
}

// ratios are those of two series' numbers, pair by pair.
func ratios(a, b []float64) (all []float64) {
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	return all
}

func TestBench(t *testing.T) {
	r := deployedRedis(t)
	webhook, floor, pinging := startBenchWebhook(t, r, filepath.Join(t.TempDir(), "log")), startFloor(t, ""), startFloor(t, r.Address)
	fmt.Printf("%d processors, %s, %d pairs of slices of %s for each line\n\n%s\n%s\n",
		runtime.NumCPU(), runtime.Version(), benchRounds, benchSlice,
		"| | at once | requests/s | floor | ratio | p50, ms | to floor | p99, ms | to floor | CPU, us | floor | Redis | allocations | KB | commands |",
		"| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	for _, c := range benchCases(t, r) {
		answer, err := webhook.do(http.MethodPost, c.bodies[0])
		rig.Must(t, err)
		_, err = floor.do(http.MethodPut, answer)
		rig.Must(t, err)
		measured := webhook
		if c.name == pingingFloor {
			measured = pinging
			_, err = pinging.do(http.MethodPut, answer)
			rig.Must(t, err)
		}
		for _, n := range []int{1, 8, 32} {
			c.slice(t, measured, n)
			c.slice(t, floor, n)
			var ours, theirs benchSeries
			floorBefore, before := floor.costs(t, r), measured.costs(t, r)
			for round := range benchRounds {
				if round%2 == 0 {
					ours.add(c.slice(t, measured, n))
				}
				theirs.add(c.slice(t, floor, n))
				if round%2 == 1 {
					ours.add(c.slice(t, measured, n))
				}
			}
			after := measured.costs(t, r)
			look := measured.costs(t, r).each(after, 1) // at what it costs
			cost, floorCost := after.each(before, len(ours.all)), floor.costs(t, r).each(floorBefore, len(theirs.all))
			cost = cost.each(look.each(costs{}, len(ours.all)), 1)
			p99, floor99 := quantile(ours.all, 0.99), quantile(theirs.all, 0.99)
			rate, p50 := median(ratios(ours.rates, theirs.rates)), median(ratios(ours.p50s, theirs.p50s))
			fmt.Printf("| %s | %d | %.0f | %.0f | %.2f | %.2f | %.2f | %.1f | %.2f | %.0f | %.0f | %.0f | %.0f | %.1f | %.2f |\n", c.name, n,
				median(ours.rates), median(theirs.rates), rate, median(ours.p50s), p50, p99, p99/floor99,
				1e6*cost.cpu, 1e6*floorCost.cpu, 1e6*cost.redisCPU, cost.allocations, cost.bytes/1024, cost.commands)
		}
	}
}

// costs are those of a process, and of its Redis.
type costs struct {
	cpu, redisCPU      float64 // seconds
	allocations, bytes float64
	commands           float64
}

// each is what is left of c if other is taken away, for each of so many requests.
func (c costs) each(other costs, requests int) costs {
	n := float64(requests)
	return costs{(c.cpu - other.cpu) / n, (c.redisCPU - other.redisCPU) / n, (c.allocations - other.allocations) / n, (c.bytes - other.bytes) / n,
		(c.commands - other.commands) / n}
}

// costs are those so far. Commands are what is sent to Redis for admissions.
func (f *target) costs(t *testing.T, r *rig.Redis) (c costs) {
	t.Helper()
	process := f.statistic(t)
	c.cpu, c.allocations, c.bytes = process("process_cpu_seconds_total"), process("go_memstats_mallocs_total"), process("go_memstats_alloc_bytes_total")
	info := r.Do(t, "INFO", "cpu").([]byte)
	c.redisCPU = numberIn(t, info, `used_cpu_user:([0-9.]+)`) + numberIn(t, info, `used_cpu_sys:([0-9.]+)`)
	calls := r.CommandCalls(t)
	for _, command := range []string{"evalsha", "eval", "ping", "role", "script|load"} {
		c.commands += float64(calls[command])
	}
	return c
}

func benchCases(t *testing.T, r *rig.Redis) []*benchCase {
	t.Helper()
	nothing := func() {}
	one := freshID()
	var many [][]byte
	for range 1000 {
		id := freshID()
		many = append(many, rig.Review(t, id, 1000))
		r.MakeFree(t, id, 500)
	}
	full := freshID()
	r.MakeFree(t, full, 0)
	r.Do(t, "ZADD", full.inflightKey(), time.Now().Add(time.Hour).Unix(), testToken)
	return []*benchCase{
		{name: pingingFloor, bodies: [][]byte{rig.Review(t, one, maxLength)}, says: `"allowed":true`, reset: nothing},
		{name: "(b) one key", bodies: [][]byte{rig.Review(t, one, maxLength)}, says: `"allowed":true`, reset: func() { r.MakeFree(t, one, maxLength) }},
		{name: "(c) 1000 keys", bodies: many, says: `"allowed":true`, reset: nothing},
		{name: "(d) full", bodies: [][]byte{rig.Review(t, full, 1)}, says: "1 of 1 tokens in use", reset: nothing},
		{name: "(e) not annotated", bodies: [][]byte{rig.Review(t, one, 1, annotated(annotationEnabled, "false"))}, says: `"allowed":true`, reset: nothing},
		{name: "(f) wait", bodies: [][]byte{rig.Review(t, one, 1, annotated(annotationWhenFull, whenFullWait))}, says: `"allowed":true`, reset: nothing},
		{name: "(g) invalid", bodies: [][]byte{rig.Review(t, one, 1, annotated(annotationLength, "many"))}, says: "must be a whole number", reset: nothing},
	}
}
