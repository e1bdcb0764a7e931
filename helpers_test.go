package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// binary is this program, built by TestMain for the tests that need processes.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "at-least-semaphore-pod-hook")
	if err == nil {
		binary = filepath.Join(dir, "at-least-semaphore-pod-hook")
		err = build(binary)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "build the program:", err)
		os.Exit(1)
	}
	code := m.Run()
	for _, s := range []*redisServer{sharedRedis, sharedSentinel} {
		if s != nil {
			s.stop()
		}
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

func build(binary string, flags ...string) error {
	args := slices.Concat([]string{"build"}, flags, []string{"-o", binary, "."})
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// eventually polls until check returns nil, and fails with its last error.
func eventually(t testing.TB, within time.Duration, check func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", within, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// freeAddress is an address on which nothing listens.
func freeAddress(t testing.TB) string {
	t.Helper()
	for {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10000+lastPort.Add(1)%20000))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
}

// lastPort counts up, so that nobody gets the port that another was given; and none that the system takes for connections.
var lastPort = func() *atomic.Int64 {
	n := new(atomic.Int64)
	n.Store(int64(os.Getpid()) * 1009)
	return n
}()

// child is a server that a test has started.
type child struct{ cmd *exec.Cmd }

// pause stops the process, so that connections hang; resume lets it go on.
func (c *child) pause(t *testing.T) {
	t.Helper()
	must(t, c.cmd.Process.Signal(syscall.SIGSTOP))
	t.Cleanup(func() { _ = c.cmd.Process.Signal(syscall.SIGCONT) })
	waitState(t, c.cmd.Process.Pid, "T")
}

func (c *child) resume(t *testing.T) {
	t.Helper()
	must(t, c.cmd.Process.Signal(syscall.SIGCONT))
}

// waitState waits until a process is in a state of /proc/PID/stat.
func waitState(t *testing.T, pid int, want string) {
	t.Helper()
	eventually(t, 10*time.Second, func() error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return err
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[0] != want {
			return fmt.Errorf("process %d is in state %s, not %s", pid, fields[0], want)
		}
		return nil
	})
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// wantLines waits for that many lines with a message, and no more: a line about an answer comes after it.
func (b *syncBuffer) wantLines(t *testing.T, message string, n int) (found []map[string]any) {
	t.Helper()
	eventually(t, 10*time.Second, func() error {
		if found = b.lines(t, message); len(found) < n {
			return fmt.Errorf("logged %q %d times, not %d:\n%s", message, len(found), n, b)
		}
		return nil
	})
	if len(found) > n {
		t.Fatalf("logged %q %d times, not %d: %v", message, len(found), n, found)
	}
	return found
}

// lines are the JSON lines of a log with that message.
func (b *syncBuffer) lines(t *testing.T, message string) []map[string]any {
	t.Helper()
	var found []map[string]any
	for line := range strings.Lines(b.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("not a JSON line: %q", line)
		}
		for name := range m { // no log of ours has objects in it
			if strings.Count(line, fmt.Sprintf("%q:", name)) > 1 {
				t.Errorf("%q is there twice: %s", name, line)
			}
		}
		if m["msg"] == message {
			found = append(found, m)
		}
	}
	return found
}

func testConfig(address string) webhookConfig {
	return webhookConfig{
		sharedConfig: sharedConfig{
			lockMode:          "redlock",
			redisAddresses:    []string{address},
			etcdAddresses:     []string{"127.0.0.1:2379"},
			queueRedisAddress: mustAddress(foundBy(address)),
			heartbeatInterval: 30 * time.Second,
			staleThreshold:    120 * time.Second,
		},
		sidecarImage:            "example.org/sidecar:v1",
		sidecarLimits:           corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("64Mi")},
		sidecarRequests:         corev1.ResourceList{"cpu": resource.MustParse("5m"), "memory": resource.MustParse("32Mi")},
		enableSidecarContainers: true,
	}
}

func mustAddress(text string) queueAddress {
	address, err := readQueueAddress(text)
	if err != nil {
		panic(err)
	}
	return address
}

// testWebhook is the webhook behind a real TLS and HTTP/2 server.
type testWebhook struct {
	*webhook
	server *httptest.Server
	log    *syncBuffer
}

func startWebhook(t testing.TB, c webhookConfig) *testWebhook {
	t.Helper()
	var b syncBuffer
	log := slog.New(slog.NewJSONHandler(&b, nil))
	c.redis.counts = new(redisCounts)
	who, err := newCallers(c, log)
	must(t, err)
	a, err := newAdmitter(c, newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), idleConnections, log))
	must(t, err)
	w := &webhook{admitter: a, callers: who, bounds: newBounds(), limit: logLimiter{most: badCallersLogged}, log: log}
	w.semaphores.metrics = newMetrics(c.redis.counts)
	w.semaphores.metrics.countVerdicts()
	w.semaphores.metrics.watchSemaphores(w.semaphores)
	w.semaphores.metrics.watchGate(w.pulse)
	server := httptest.NewUnstartedServer(w.routes())
	server.EnableHTTP2 = true
	w.bounds.apply(server.Config)
	server.StartTLS()
	tw := &testWebhook{webhook: w, server: server, log: &b}
	t.Cleanup(tw.close)
	return tw
}

func (w *testWebhook) close() {
	w.server.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = w.semaphores.close(ctx)
}

// review makes the AdmissionReview of a Deployment's pod, out of one that a real API server sent.
func review(t testing.TB, id semaphoreID, length int, change ...func(request map[string]any)) []byte {
	t.Helper()
	r := readFixture(t, "deployment-pod.json")
	request := r["request"].(map[string]any)
	request["namespace"] = id.namespace
	annotations := request["object"].(map[string]any)["metadata"].(map[string]any)["annotations"].(map[string]any)
	maps.Copy(annotations, map[string]any{annotationKey: id.key, annotationLength: strconv.Itoa(length), annotationExpiration: "10"})
	for _, c := range change {
		c(request)
	}
	body, err := json.Marshal(r)
	must(t, err)
	return body
}

func readFixture(t testing.TB, name string) map[string]any {
	t.Helper()
	body, err := os.ReadFile(filepath.Join("testdata", "admission-reviews", name))
	must(t, err)
	var r map[string]any
	must(t, json.Unmarshal(body, &r))
	return r
}

// post sends a body to /mutate and returns status and text.
func (w *testWebhook) post(ctx context.Context, body []byte, timeout string) (int, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, w.server.URL+"/mutate?timeout="+timeout, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := w.server.Client().Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if response.ProtoMajor != 2 {
		err = fmt.Errorf("served by %s, not HTTP/2", response.Proto)
	}
	return response.StatusCode, string(text), err
}

// admission is an answer of the webhook.
type admission struct {
	allowed  bool
	code     int32
	message  string
	warnings []string
	audit    map[string]string
	token    string
	patch    []byte
}

// admit sends a review that must be answered with a decision.
func (w *testWebhook) admit(t *testing.T, body []byte) admission {
	t.Helper()
	a, err := w.tryAdmit(body)
	must(t, err)
	return a
}

func (w *testWebhook) tryAdmit(body []byte) (admission, error) {
	status, text, err := w.post(context.Background(), body, "10s")
	if err != nil {
		return admission{}, err
	}
	return readAdmission(status, text)
}

// readAdmission reads what a webhook has answered.
func readAdmission(status int, text string) (admission, error) {
	if status != http.StatusOK {
		return admission{}, fmt.Errorf("status %d: %s", status, text)
	}
	var answer admissionv1.AdmissionReview
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return admission{}, err
	}
	a := admission{allowed: answer.Response.Allowed, patch: answer.Response.Patch, warnings: answer.Response.Warnings, audit: answer.Response.AuditAnnotations}
	if r := answer.Response.Result; r != nil {
		a.code, a.message = r.Code, r.Message
	}
	var patch []struct {
		Path  string
		Value any
	}
	if a.patch != nil {
		if err := json.Unmarshal(a.patch, &patch); err != nil {
			return admission{}, err
		}
	}
	for _, o := range patch {
		if o.Path == jsonPointer("metadata", "annotations", annotationToken) {
			a.token = o.Value.(string)
		}
	}
	return a, nil
}

// wantAdmitted is admit for a pod that must get a token; it returns the token.
func (w *testWebhook) wantAdmitted(t *testing.T, id semaphoreID, length int) string {
	t.Helper()
	a := w.admit(t, review(t, id, length))
	if !a.allowed || a.token == "" {
		t.Fatalf("%s: not admitted: %d %s", id, a.code, a.message)
	}
	return a.token
}

// wantFull is admit for a pod that must be refused, with so many in use.
func (w *testWebhook) wantFull(t *testing.T, id semaphoreID, length, inUse int) {
	t.Helper()
	a := w.admit(t, review(t, id, length))
	want := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", id, inUse, length)
	if a.allowed || a.code != http.StatusTooManyRequests || !strings.HasPrefix(a.message, want) || a.patch != nil {
		t.Fatalf("got %+v, want 429 %q", a, want)
	}
}
