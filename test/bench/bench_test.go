// Package bench measures what the program costs. Each measurement prints a table for
// docs/performance.md or docs/performance-pods.md.
package bench

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// "make bench" compares admissions with a floor: a process with the webhook's server and
// TLS settings. Its handler reads the body and answers a constant of the same size.
//
// Both run all the time. The client sends requests to them in turn, in short slices, so
// other load of the machine affects both alike. A ratio compares the two slices of one
// pair; the table has the medians of these ratios. The first lines of the table compare a
// second floor, which also sends Redis a PING for each request: no webhook can be
// cheaper.

const (
	benchSlice  = 200 * time.Millisecond
	benchSecret = "0123456789abcdef"
)

// benchRounds is the number of pairs of slices for each line of the table.
var benchRounds, _ = strconv.Atoi(cmp.Or(os.Getenv("BENCH_ROUNDS"), "15"))

// target is a measured server.
type target struct {
	url, statistics string
	client          *http.Client // keeps its connections, as the API server's
}

func newTarget(t *testing.T, url, statistics string) *target {
	transport := &http.Transport{MaxIdleConnsPerHost: 1000, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	t.Cleanup(transport.CloseIdleConnections)
	return &target{url, statistics, &http.Client{Transport: transport, Timeout: 20 * time.Second}}
}

// startWebhook starts the webhook with the memory settings of deploy/. It logs to a file.
func startWebhook(t *testing.T, r *rig.Redis, logFile string) *target {
	t.Helper()
	secret := filepath.Join(t.TempDir(), "secret")
	rig.Must(t, os.WriteFile(secret, []byte(benchSecret), 0o600))
	log, err := os.Create(logFile)
	rig.Must(t, err)
	t.Cleanup(func() { log.Close() })
	w := rig.NewWebhook(t, rig.Program(t), r.Address, "--path-secret-file="+secret)
	w.Cmd.Stderr = log
	w.Cmd.Env = append(os.Environ(), rig.DeployedMemory(t)...)
	w.Begin(t)
	return newTarget(t, w.URL+"/mutate/"+benchSecret+"?timeout=10s", w.HealthURL+"/metrics")
}

// startRedis starts a Redis that writes its append-only file as in deploy/.
func startRedis(t *testing.T) *rig.Redis {
	t.Helper()
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "appendfsync", "everysec")
	return r
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
	if err == nil && (response.StatusCode != http.StatusOK || response.ProtoMajor != 1) {
		err = fmt.Errorf("%s by %s: %s", response.Status, response.Proto, text)
	}
	return text, err
}

// statistic reads numbers from the metrics of the process.
func (f *target) statistic(t *testing.T) func(name string) float64 {
	t.Helper()
	response, err := f.client.Get(f.statistics)
	rig.Must(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	rig.Must(t, err)
	return func(name string) float64 { return numberIn(t, text, `(?m)^`+name+` (\S+)$`) }
}

// numberIn returns the first group of a pattern as a number.
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

// redisCPU returns the CPU time that a Redis has used so far, in seconds.
func redisCPU(t *testing.T, r *rig.Redis) float64 {
	t.Helper()
	info := r.Do(t, "INFO", "cpu").([]byte)
	return numberIn(t, info, `used_cpu_user:([0-9.]+)`) + numberIn(t, info, `used_cpu_sys:([0-9.]+)`)
}

// runScript runs a script of lua/ over a connection as the program does: by its hash,
// without another command before.
func runScript(conn redis.Conn, name string, id rig.ID, args ...any) (rig.Reply, error) {
	deadline := time.Now().Add(time.Hour).UnixMicro()
	return rig.RunScript(conn, rig.Script(name), id, deadline, rig.DefaultTiming, args...)
}

// pingingFloor is the case that measures the floor with a PING, not the webhook.
const pingingFloor = "(a) floor and PING"

// benchCase is a kind of request.
type benchCase struct {
	name   string
	bodies [][]byte
	want   string // in each answer
	reset  func() // before each slice
	next   atomic.Int64
}

// slice sends concurrent requests for one slice of time. It returns the duration of each
// request, and the requests a second.
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
				if err == nil && !bytes.Contains(text, []byte(c.want)) {
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

// quantile returns a quantile of sorted durations, in milliseconds.
func quantile(sorted []time.Duration, q float64) float64 {
	return milliseconds(sorted[min(len(sorted)-1, int(q*float64(len(sorted))))])
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median(values []float64) float64 {
	return slices.Sorted(slices.Values(values))[len(values)/2]
}

// ratios divides the numbers of two series, pair by pair.
func ratios(a, b []float64) (all []float64) {
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	return all
}

// benchSeries has the results of all slices of one server.
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

func TestBench(t *testing.T) {
	r := startRedis(t)
	webhook := startWebhook(t, r, filepath.Join(t.TempDir(), "log"))
	floor, pinging := startFloor(t, ""), startFloor(t, r.Address)
	fmt.Printf("%d processors, %s, %d pairs of slices of %s for each line\n\n%s\n%s\n",
		runtime.NumCPU(), runtime.Version(), benchRounds, benchSlice,
		"| | at once | requests/s | floor | ratio | p50, ms | to floor | p99, ms | to floor "+
			"| CPU, us | floor | Redis | allocations | KB | commands |",
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
			fmt.Println(c.measure(t, r, measured, floor, n))
		}
	}
}

// measure measures one line of the table.
func (c *benchCase) measure(t *testing.T, r *rig.Redis, measured, floor *target, concurrent int) string {
	t.Helper()
	c.slice(t, measured, concurrent)
	c.slice(t, floor, concurrent)
	var ours, theirs benchSeries
	floorBefore, before := floor.costs(t, r), measured.costs(t, r)
	for round := range benchRounds {
		if round%2 == 0 {
			ours.add(c.slice(t, measured, concurrent))
		}
		theirs.add(c.slice(t, floor, concurrent))
		if round%2 == 1 {
			ours.add(c.slice(t, measured, concurrent))
		}
	}
	after := measured.costs(t, r)
	reading := measured.costs(t, r).minus(after) // the costs of reading the costs
	cost := after.minus(before).minus(reading).each(len(ours.all))
	floorCost := floor.costs(t, r).minus(floorBefore).each(len(theirs.all))
	p99, floor99 := quantile(ours.all, 0.99), quantile(theirs.all, 0.99)
	const line = "| %s | %d | %.0f | %.0f | %.2f | %.2f | %.2f | %.1f | %.2f " +
		"| %.0f | %.0f | %.0f | %.0f | %.1f | %.2f |"
	return fmt.Sprintf(line, c.name, concurrent,
		median(ours.rates), median(theirs.rates), median(ratios(ours.rates, theirs.rates)),
		median(ours.p50s), median(ratios(ours.p50s, theirs.p50s)), p99, p99/floor99,
		1e6*cost.cpu, 1e6*floorCost.cpu, 1e6*cost.redisCPU, cost.allocations, cost.bytes/1024, cost.commands)
}

// costs has the costs of a process and of its Redis.
type costs struct {
	cpu, redisCPU      float64 // seconds
	allocations, bytes float64
	commands           float64 // to Redis, for admissions
}

func (c costs) minus(other costs) costs {
	return costs{
		cpu: c.cpu - other.cpu, redisCPU: c.redisCPU - other.redisCPU,
		allocations: c.allocations - other.allocations, bytes: c.bytes - other.bytes,
		commands: c.commands - other.commands,
	}
}

// each returns the share of one request.
func (c costs) each(requests int) costs {
	n := float64(requests)
	return costs{
		cpu: c.cpu / n, redisCPU: c.redisCPU / n,
		allocations: c.allocations / n, bytes: c.bytes / n,
		commands: c.commands / n,
	}
}

// costs returns the costs so far.
func (f *target) costs(t *testing.T, r *rig.Redis) (c costs) {
	t.Helper()
	process := f.statistic(t)
	c.cpu = process("process_cpu_seconds_total")
	c.allocations = process("go_memstats_mallocs_total")
	c.bytes = process("go_memstats_alloc_bytes_total")
	c.redisCPU = redisCPU(t, r)
	calls := r.CommandCalls(t)
	for _, command := range []string{"evalsha", "eval", "ping", "role", "script|load"} {
		c.commands += float64(calls[command])
	}
	return c
}

func benchCases(t *testing.T, r *rig.Redis) []*benchCase {
	t.Helper()
	nothing := func() {}
	one := rig.FreshID()
	ofOne := func(length int, change ...func(map[string]any)) [][]byte {
		return [][]byte{rig.Review(t, one, length, change...)}
	}
	var many [][]byte
	for range 1000 {
		id := rig.FreshID()
		many = append(many, rig.Review(t, id, 1000))
		r.MakeFree(t, id, 500)
	}
	full := rig.FreshID()
	r.MakeFree(t, full, 0)
	r.Do(t, "ZADD", full.InflightKey(), time.Now().Add(time.Hour).Unix(), uuid.NewString())
	const allowed = `"allowed":true`
	return []*benchCase{
		{name: pingingFloor, bodies: ofOne(rig.MaxLength), want: allowed, reset: nothing},
		{name: "(b) one key", bodies: ofOne(rig.MaxLength), want: allowed,
			reset: func() { r.MakeFree(t, one, rig.MaxLength) }},
		{name: "(c) 1000 keys", bodies: many, want: allowed, reset: nothing},
		{name: "(d) full", bodies: [][]byte{rig.Review(t, full, 1)}, want: "1 of 1 tokens in use", reset: nothing},
		{name: "(e) not annotated", bodies: ofOne(1, annotated(rig.AnnotationEnabled, "false")),
			want: allowed, reset: nothing},
		{name: "(f) wait", bodies: ofOne(1, annotated(rig.AnnotationWhenFull, rig.WhenFullWait)),
			want: allowed, reset: nothing},
		{name: "(g) invalid", bodies: ofOne(1, annotated(rig.AnnotationLength, "many")),
			want: "must be a whole number", reset: nothing},
	}
}

// annotated changes an annotation of a review's pod.
func annotated(name, value string) func(map[string]any) {
	return func(request map[string]any) { rig.AnnotationsOf(request)[name] = value }
}
