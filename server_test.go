package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestCertificateFollowsItsFiles(t *testing.T) {
	dir := t.TempDir()
	var b rig.Log
	log := slog.New(slog.NewJSONHandler(&b, nil))
	if _, err := loadCertificate(dir, log); err == nil || !strings.Contains(err.Error(), "--certDir: open "+dir) {
		t.Errorf("without files: %v", err)
	}
	rig.WriteCertificate(t, dir, 1)
	c, err := loadCertificate(dir, log)
	rig.Must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go c.watch(ctx, time.Millisecond)
	wantSerial := func(want int64) {
		t.Helper()
		rig.Eventually(t, 5*time.Second, func() error {
			pair, err := c.get(nil)
			if err == nil && pair.Leaf.SerialNumber.Int64() != want {
				err = fmt.Errorf("serial number %d, want %d", pair.Leaf.SerialNumber, want)
			}
			return err
		})
	}
	wantLines := func(message string, n int) {
		t.Helper()
		rig.Eventually(t, 5*time.Second, func() error {
			if got := len(b.Lines(t, message)); got < n {
				return fmt.Errorf("%d times %q", got, message)
			}
			return nil
		})
	}
	wantSerial(1)
	rig.WriteCertificate(t, dir, 2)
	wantSerial(2)
	wantLines("certificate taken", 2)

	rig.Must(t, os.WriteFile(filepath.Join(dir, "tls.key"), []byte("not a key"), 0o600))
	wantLines("changed files not taken, what they held before stays in use", 1)
	wantSerial(2)
	rig.Must(t, os.Remove(filepath.Join(dir, "tls.key")))
	wantLines("changed files not taken, what they held before stays in use", 2)
	wantSerial(2)
	rig.WriteCertificate(t, dir, 3)
	wantSerial(3)
}

// A bad pair is logged once, not at every look.
func TestBadCertificateIsReportedOnce(t *testing.T) {
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	c, err := loadCertificate(dir, slog.New(slog.DiscardHandler))
	rig.Must(t, err)
	rig.Must(t, os.WriteFile(filepath.Join(dir, "tls.crt"), []byte("not a certificate"), 0o600))
	for i, want := range []bool{true, false, false} {
		if changed, _ := c.reload(); changed != want {
			t.Errorf("look %d: changed is %t", i, changed)
		}
	}
	rig.Must(t, os.Remove(filepath.Join(dir, "tls.crt")))
	for i, want := range []bool{true, false} {
		changed, err := c.reload()
		if changed != want || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("removed, look %d: changed is %t, %v", i, changed, err)
		}
	}
}

func TestCertificateIsRereadWithoutRestart(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := rig.StartWebhook(t, r.Address)
	body := rig.Review(t, freshID(), 1, func(r map[string]any) { r["dryRun"] = true })
	for serial := int64(1); serial <= 3; serial++ {
		rig.WriteCertificate(t, w.CertDir, serial)
		rig.Eventually(t, 20*time.Second, func() error {
			w.Client.CloseIdleConnections()
			status, _, got, err := w.Post(body)
			if err == nil && (status != 200 || got != serial) {
				err = fmt.Errorf("status %d, serial number %d, want %d", status, got, serial)
			}
			return err
		})
	}
}

// SIGTERM in the middle of an admission: the admission is finished first.
func TestShutdownFinishesWhatItHasBegun(t *testing.T) {
	r := rig.StartRedis(t)
	w := rig.StartWebhook(t, r.Address)
	id := freshID()
	if status, text, _, err := w.Post(rig.Review(t, id, 2)); err != nil || status != 200 {
		t.Fatal(status, text, err)
	}
	r.Pause(t)
	type answer struct {
		status int
		text   string
		err    error
	}
	answered := make(chan answer, 1)
	go func() {
		status, text, _, err := w.Post(rig.Review(t, id, 2))
		answered <- answer{status, text, err}
	}()
	// The acquire is on its way when its bytes wait to be read by the paused server.
	rig.WantUnreadBytes(t, r.Address)
	w.Signal(t, syscall.SIGTERM)
	w.WantLog(t, "stopping")
	r.Resume(t)
	a := <-answered
	if a.err != nil || a.status != 200 || !strings.Contains(a.text, `"allowed":true`) {
		t.Errorf("answered %+v", a)
	}
	w.WantExit(t, 0)
	w.WantLog(t, "stopped")
	r.WantCounts(t, id, 0, 2)
}

func TestWebhookDoesNotStart(t *testing.T) {
	certs := t.TempDir()
	rig.WriteCertificate(t, certs, 1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	rig.Must(t, err)
	defer l.Close()
	_, taken, _ := net.SplitHostPort(l.Addr().String())
	for want, args := range map[string][]string{
		"--certDir: open ":                          {"--certDir=" + t.TempDir()},
		"--host and --port: listen tcp 127.0.0.1:":  {"--certDir=" + certs, "--host=127.0.0.1", "--port=" + taken},
		"--metrics-bind-address: listen tcp 127.0.": {"--certDir=" + certs, "--host=127.0.0.1", "--port=" + rig.Port(rig.FreeAddress(t)), "--metrics-bind-address=127.0.0.1:" + taken},
	} {
		code, _, stderr := runArgs(nil, append([]string{"webhook"}, args...)...)
		if code != 1 || !strings.Contains(stderr, want) {
			t.Errorf("%v: exit code %d, %s", args, code, stderr)
		}
	}
}

// A webhook is ready while its queue takes writes, and it is not stopping.
func TestReadiness(t *testing.T) {
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
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
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", "1") // it answers, and refuses writes
	want("/readyz", 503, "NOREPLICAS")
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", "0")
	want("/readyz", 200, "ok")
	r.Pause(t)
	want("/readyz", 503, "queue Redis "+r.Address)
	want("/healthz", 200, "ok")
	r.Resume(t)
	rig.Eventually(t, 5*time.Second, func() error {
		if c, text := get("/readyz"); c != 200 {
			return errors.New(text)
		}
		return nil
	})
	close(stopping)
	want("/readyz", 503, "stopping")
	want("/healthz", 200, "ok")
}
