package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestMain(m *testing.M) {
	if err := chooseTests(); err != nil {
		panic(err)
	}
	os.Exit(rig.Run(m))
}

// freshID is a semaphore that no other test uses.
func freshID() semaphoreID { return semaphoreOf(rig.FreshID()) }

func semaphoreOf(id rig.ID) semaphoreID { return semaphoreID{id.Namespace, id.Key} }

// clientSettings are the settings of the clients of a test's API server.
func clientSettings(s *rig.APIServer) kubernetesSettings {
	return kubernetesSettings{address: s.Address, caFile: s.CAFile, tokenFile: s.TokenFile}
}

// MarshalJSON implements json.Marshaler.
func (p patch) MarshalJSON() ([]byte, error) { return p.json(), nil }

func testConfig(address string) webhookConfig {
	return webhookConfig{
		sharedConfig: sharedConfig{
			lockMode:          "redlock",
			redisAddresses:    []string{address},
			etcdAddresses:     []string{"127.0.0.1:2379"},
			queueRedisAddress: mustAddress(rig.QueueAddress(address)),
			heartbeatInterval: 30 * time.Second,
			staleThreshold:    120 * time.Second,
		},
		sidecarImage:            "example.org/sidecar:v1",
		sidecarLimits:           corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("64Mi")},
		sidecarRequests:         corev1.ResourceList{"cpu": resource.MustParse("5m"), "memory": resource.MustParse("32Mi")},
		enableSidecarContainers: true,
	}
}

// beating is a configuration with a short heartbeat interval. The stale threshold is longer than any test.
func beating(address string, interval time.Duration) webhookConfig {
	c := testConfig(address)
	c.heartbeatInterval = interval
	return c
}

// semaphoresOf is what a webhook, or a sidecar, of a configuration has.
func semaphoresOf(t *testing.T, c webhookConfig) *semaphores {
	t.Helper()
	s := newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), idleConnections, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.close(context.Background())) })
	return s
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
	log    *rig.Log
}

func startWebhook(t testing.TB, c webhookConfig) *testWebhook {
	t.Helper()
	var b rig.Log
	log := slog.New(slog.NewJSONHandler(&b, nil))
	c.redis.counts = new(redisCounts)
	who, err := newCallers(c, log)
	rig.Must(t, err)
	a, err := newAdmitter(c, newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), idleConnections, log))
	rig.Must(t, err)
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

// admit sends a review that must be answered with a decision.
func (w *testWebhook) admit(t *testing.T, body []byte) rig.Admission {
	t.Helper()
	a, err := w.tryAdmit(body)
	rig.Must(t, err)
	return a
}

func (w *testWebhook) tryAdmit(body []byte) (rig.Admission, error) {
	status, text, err := w.post(context.Background(), body, "10s")
	if err != nil {
		return rig.Admission{}, err
	}
	return rig.ReadAdmission(status, text)
}

// wantAdmitted is admit for a pod that must get a token; it returns the token.
func (w *testWebhook) wantAdmitted(t *testing.T, id semaphoreID, length int) string {
	t.Helper()
	a := w.admit(t, rig.Review(t, id, length))
	if !a.Allowed || a.Token == "" {
		t.Fatalf("%s: not admitted: %d %s", id, a.Code, a.Message)
	}
	return a.Token
}

// wantFull is admit for a pod that must be refused, with so many in use.
func (w *testWebhook) wantFull(t *testing.T, id semaphoreID, length, inUse int) {
	t.Helper()
	a := w.admit(t, rig.Review(t, id, length))
	want := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", id, inUse, length)
	if a.Allowed || a.Code != http.StatusTooManyRequests || !strings.HasPrefix(a.Message, want) || a.Patch != nil {
		t.Fatalf("got %+v, want 429 %q", a, want)
	}
}
