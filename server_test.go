package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
)

func TestCertificateFollowsItsFiles(t *testing.T) {
	dir := t.TempDir()
	var b syncBuffer
	log := slog.New(slog.NewJSONHandler(&b, nil))
	if _, err := loadCertificate(dir, log); err == nil || !strings.Contains(err.Error(), "--certDir: open "+dir) {
		t.Errorf("without files: %v", err)
	}
	writeCertificate(t, dir, 1)
	c, err := loadCertificate(dir, log)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go c.watch(ctx, time.Millisecond)
	wantSerial := func(want int64) {
		t.Helper()
		eventually(t, 5*time.Second, func() error {
			pair, err := c.get(nil)
			if err == nil && pair.Leaf.SerialNumber.Int64() != want {
				err = fmt.Errorf("serial number %d, want %d", pair.Leaf.SerialNumber, want)
			}
			return err
		})
	}
	wantLines := func(message string, n int) {
		t.Helper()
		eventually(t, 5*time.Second, func() error {
			if got := len(b.lines(t, message)); got < n {
				return fmt.Errorf("%d times %q", got, message)
			}
			return nil
		})
	}
	wantSerial(1)
	writeCertificate(t, dir, 2)
	wantSerial(2)
	wantLines("certificate taken", 2)

	must(t, os.WriteFile(filepath.Join(dir, "tls.key"), []byte("not a key"), 0o600))
	wantLines("changed files not taken, what they held before stays in use", 1)
	wantSerial(2)
	must(t, os.Remove(filepath.Join(dir, "tls.key")))
	wantLines("changed files not taken, what they held before stays in use", 2)
	wantSerial(2)
	writeCertificate(t, dir, 3)
	wantSerial(3)
}

// A bad pair is logged once, not at every look.
func TestBadCertificateIsReportedOnce(t *testing.T) {
	dir := t.TempDir()
	writeCertificate(t, dir, 1)
	c, err := loadCertificate(dir, slog.New(slog.DiscardHandler))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "tls.crt"), []byte("not a certificate"), 0o600))
	for i, want := range []bool{true, false, false} {
		if changed, _ := c.reload(); changed != want {
			t.Errorf("look %d: changed is %t", i, changed)
		}
	}
	must(t, os.Remove(filepath.Join(dir, "tls.crt")))
	for i, want := range []bool{true, false} {
		changed, err := c.reload()
		if changed != want || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("removed, look %d: changed is %t, %v", i, changed, err)
		}
	}
}

// webhookProcess is the webhook as its users run it.
type webhookProcess struct {
	*process
	url, healthURL string
	certDir        string
	client         *http.Client
}

func startWebhookProcess(t *testing.T, redisAddress string, flags ...string) *webhookProcess {
	t.Helper()
	return startWebhookProcessOf(t, binary, redisAddress, flags...)
}

// startWebhookProcessOf is startWebhookProcess for another build of the program.
func startWebhookProcessOf(t *testing.T, program, redisAddress string, flags ...string) *webhookProcess {
	t.Helper()
	w := newWebhookProcess(t, program, redisAddress, flags...)
	w.begin(t)
	return w
}

// newWebhookProcess is a webhook that is not started yet.
func newWebhookProcess(t *testing.T, program, redisAddress string, flags ...string) *webhookProcess {
	t.Helper()
	w := &webhookProcess{certDir: t.TempDir()}
	writeCertificate(t, w.certDir, 1)
	address, health := freeAddress(t), freeAddress(t)
	host, port, _ := net.SplitHostPort(address)
	w.url, w.healthURL = "https://"+address, "http://"+health
	w.process = newProcess(program, append([]string{"webhook", "--host=" + host, "--port=" + port, "--metrics-bind-address=" + health,
		"--certDir=" + w.certDir, "--queue-redis-address=" + redisAddress, "--redis-addresses=" + redisAddress}, flags...)...)
	w.client = &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // the certificate changes; what matters is its serial number
	}}
	return w
}

// begin starts it and waits until it serves.
func (w *webhookProcess) begin(t *testing.T) {
	t.Helper()
	w.start(t)
	t.Cleanup(w.client.CloseIdleConnections)
	eventually(t, 20*time.Second, func() error {
		response, err := http.Get(w.healthURL + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	})
}

func (w *webhookProcess) post(body []byte) (status int, text string, serial int64, err error) {
	response, err := w.client.Post(w.url+"/mutate?timeout=10s", "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, "", 0, err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	return response.StatusCode, string(b), response.TLS.PeerCertificates[0].SerialNumber.Int64(), err
}

// The Deployment gives Go half of the container's memory, and has it collect garbage seldom below that.
func TestMemoryIsLimitedAsDeployed(t *testing.T) {
	text, err := os.ReadFile("deploy/base/webhook.yaml")
	must(t, err)
	value := func(pattern string) string {
		found := regexp.MustCompile(pattern).FindAllSubmatch(text, -1)
		if len(found) != 1 {
			t.Fatalf("%d matches of %s in deploy/base/webhook.yaml, want 1", len(found), pattern)
		}
		return string(found[0][1])
	}
	forGo, err := resource.ParseQuantity(strings.TrimSuffix(value(`name: GOMEMLIMIT\n +value: (\S+)\n`), "B"))
	must(t, err)
	whole, err := resource.ParseQuantity(value(`limits: \{.*memory: (\S+)\}`))
	must(t, err)
	if 2*forGo.Value() != whole.Value() {
		t.Errorf("GOMEMLIMIT is %s: it must be half of the limit, %s", &forGo, &whole)
	}
	if percent := value(`name: GOGC\n +value: "(\d+)"\n`); percent != "400" {
		t.Errorf("GOGC is %s: it must be 400, as the figures of the documents were measured", percent)
	}
}

func TestCertificateIsRereadWithoutRestart(t *testing.T) {
	t.Parallel()
	r := commonRedis(t)
	w := startWebhookProcess(t, r.address)
	body := review(t, freshID(), 1, func(r map[string]any) { r["dryRun"] = true })
	for serial := int64(1); serial <= 3; serial++ {
		writeCertificate(t, w.certDir, serial)
		eventually(t, 20*time.Second, func() error {
			w.client.CloseIdleConnections()
			status, _, got, err := w.post(body)
			if err == nil && (status != 200 || got != serial) {
				err = fmt.Errorf("status %d, serial number %d, want %d", status, got, serial)
			}
			return err
		})
	}
}

// SIGTERM in the middle of an admission: the admission is finished first.
func TestShutdownFinishesWhatItHasBegun(t *testing.T) {
	r := startRedis(t)
	w := startWebhookProcess(t, r.address)
	id := freshID()
	if status, text, _, err := w.post(review(t, id, 2)); err != nil || status != 200 {
		t.Fatal(status, text, err)
	}
	r.pause(t)
	type answer struct {
		status int
		text   string
		err    error
	}
	answered := make(chan answer, 1)
	go func() {
		status, text, _, err := w.post(review(t, id, 2))
		answered <- answer{status, text, err}
	}()
	// The acquire is on its way when its bytes wait to be read by the paused server.
	waitForUnreadBytes(t, r.address)
	w.signal(t, syscall.SIGTERM)
	w.wantLog(t, "stopping")
	r.resume(t)
	a := <-answered
	if a.err != nil || a.status != 200 || !strings.Contains(a.text, `"allowed":true`) {
		t.Errorf("answered %+v", a)
	}
	w.wantExit(t, 0)
	w.wantLog(t, "stopped")
	r.wantCounts(t, id, 0, 2)
}

// waitForUnreadBytes waits until some connection of a server has received what the server has not read.
func waitForUnreadBytes(t *testing.T, address string) {
	t.Helper()
	local := tableAddress(address)
	eventually(t, 20*time.Second, func() error {
		table, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(table)) {
			f := strings.Fields(line) // sl local remote state tx:rx ...
			if len(f) > 4 && strings.HasSuffix(f[1], local) && f[3] == "01" && !strings.HasSuffix(f[4], ":00000000") {
				return nil
			}
		}
		return errors.New("nothing has been sent to " + address)
	})
}

// tableAddress is how an address ends in /proc/net/tcp.
func tableAddress(address string) string {
	port, err := strconv.Atoi(portOf(address))
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf(":%04X", port)
}

func TestWebhookDoesNotStart(t *testing.T) {
	certs := t.TempDir()
	writeCertificate(t, certs, 1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	_, taken, _ := net.SplitHostPort(l.Addr().String())
	for want, args := range map[string][]string{
		"--certDir: open ":                          {"--certDir=" + t.TempDir()},
		"--host and --port: listen tcp 127.0.0.1:":  {"--certDir=" + certs, "--host=127.0.0.1", "--port=" + taken},
		"--metrics-bind-address: listen tcp 127.0.": {"--certDir=" + certs, "--host=127.0.0.1", "--port=" + portOf(freeAddress(t)), "--metrics-bind-address=127.0.0.1:" + taken},
	} {
		code, _, stderr := runArgs(nil, append([]string{"webhook"}, args...)...)
		if code != 1 || !strings.Contains(stderr, want) {
			t.Errorf("%v: exit code %d, %s", args, code, stderr)
		}
	}
}

// A webhook is ready while its queue takes writes, and it is not stopping.
func TestReadiness(t *testing.T) {
	r := startRedis(t)
	w := startWebhook(t, testConfig(r.address))
	stopping := make(chan struct{})
	w.stopping = stopping
	get := func(path string) (int, string) {
		rec := httptest.NewRecorder()
		w.healthRoutes().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		return rec.Code, strings.TrimSpace(rec.Body.String())
	}
	want := func(path string, code int, text string) {
		t.Helper()
		if c, got := get(path); c != code || !strings.Contains(got, text) {
			t.Errorf("%s: %d %q, want %d %q", path, c, got, code, text)
		}
	}
	want("/readyz", 200, "ok")
	want("/healthz", 200, "ok")
	r.do(t, "CONFIG", "SET", "min-replicas-to-write", "1") // it answers, and refuses writes
	want("/readyz", 503, "NOREPLICAS")
	r.do(t, "CONFIG", "SET", "min-replicas-to-write", "0")
	want("/readyz", 200, "ok")
	r.pause(t)
	want("/readyz", 503, "queue Redis "+r.address)
	want("/healthz", 200, "ok")
	r.resume(t)
	eventually(t, 5*time.Second, func() error {
		if c, text := get("/readyz"); c != 200 {
			return errors.New(text)
		}
		return nil
	})
	close(stopping)
	want("/readyz", 503, "stopping")
	want("/healthz", 200, "ok")
}
