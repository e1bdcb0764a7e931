package main

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// samples are the metrics of a scrape, by name with labels, as exported.
type samples map[string]float64

// scrape scrapes the webhook, and checks the metrics with promtool.
func (w *testWebhook) scrape(t *testing.T) samples {
	t.Helper()
	rec := httptest.NewRecorder()
	w.healthRoutes().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if rec.Code != http.StatusOK {
		t.Fatalf("scrape: got %d %s", rec.Code, rec.Body)
	}
	text := rec.Body.String()
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v: %s", err, out)
	}
	all := samples{}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all[line[:at]] = value
	}
	return all
}

// watchCertificate adds the certificate in a folder to the metrics.
func (w *testWebhook) watchCertificate(t *testing.T, dir string) *certificate {
	t.Helper()
	cert, err := loadCertificate(dir, slog.New(slog.DiscardHandler))
	rig.Must(t, err)
	w.semaphores.metrics.watchCertificate(cert)
	return cert
}

// want compares samples. Its names have no prefix.
func (s samples) want(t *testing.T, want map[string]float64) {
	t.Helper()
	for name, value := range want {
		if got, ok := s[metricsPrefix+name]; !ok || got != value {
			t.Errorf("%s is %v (exported: %t), want %v", name, got, ok, value)
		}
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	rig.SkipUnderSentinel(t)
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	cert := w.watchCertificate(t, dir)
	before := w.scrape(t)
	before.want(t, map[string]float64{
		`admission_duration_seconds_count{verdict="admitted"}`: 0,
		`redis_errors_total{kind="READONLY"}`:                  0,
		`failovers_total`:                                      0,
		`certificate_expiry_timestamp_seconds`:                 float64(cert.current.Load().Leaf.NotAfter.Unix()),
	})

	id := freshID()
	w.wantAdmitted(t, id, 2)
	w.wantAdmitted(t, id, 2)
	w.wantFull(t, id, 2, 2)
	w.admit(t, rig.Review(t, id, -1))
	if status, text, err := w.post(t.Context(), []byte("{"), ""); err != nil || status != http.StatusBadRequest {
		t.Errorf("got %d %s, %v", status, text, err)
	}
	rig.Eventually(t, 5*time.Second, func() error { // the webhook frees the lock in the background
		if n := w.scrape(t)[metricsPrefix+"lock_held_seconds_count"]; n != 1 {
			return fmt.Errorf("%v locks were freed, want 1", n)
		}
		return nil
	})
	w.scrape(t).want(t, map[string]float64{
		`admission_duration_seconds_count{verdict="admitted"}`:    2,
		`admission_duration_seconds_count{verdict="full"}`:        1,
		`admission_duration_seconds_count{verdict="invalid"}`:     1,
		`admission_duration_seconds_count{verdict="bad request"}`: 1,
		// One acquire gets only the clock of Redis, and one gets that tokens are missing.
		`script_duration_seconds_count{script="acquire"}`:  5,
		`script_duration_seconds_count{script="maintain"}`: 1,
		`lock_attempts_total{outcome="taken"}`:             1,
		`lock_attempts_total{outcome="failed"}`:            0,
		`repaired_tokens_total{action="refilled"}`:         2,
		`repaired_tokens_total{action="reclaimed"}`:        0,
	})

	// connections of the queue, the lock and scrapes
	if n := w.scrape(t)[metricsPrefix+"redis_connections"]; n < 2 || n > 4 {
		t.Errorf("%v connections are exported, want 2 to 4", n)
	}

	// Stale tokens are counted when reclaimed.
	for _, token := range r.Inflight(t, id) {
		r.Do(t, "ZADD", id.inflightKey(), 1, token)
	}
	r.ForgetLength(t, id)
	w.wantAdmitted(t, id, 2)
	w.scrape(t).want(t, map[string]float64{`repaired_tokens_total{action="reclaimed"}`: 2})

	// Errors of Redis are counted by kind.
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", 1)
	status, text, err := w.post(t.Context(), rig.Review(t, freshID(), 2), "1s")
	if err != nil || status != http.StatusInternalServerError {
		t.Errorf("got %d %s, %v", status, text, err)
	}
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", 0)
	after := w.scrape(t)
	if n := after[metricsPrefix+`redis_errors_total{kind="NOREPLICAS"}`]; n < 1 {
		t.Errorf("NOREPLICAS was counted %v times", n)
	}
	after.want(t, map[string]float64{`admission_duration_seconds_count{verdict="failed"}`: 1})
}

// kindOfError tells the kinds apart, and returns only known kinds.
func TestKindsOfErrors(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	s := testSemaphores(t, r.Address)
	r.Do(t, "ACL", "SETUSER", "default", "-zadd")
	_, err := s.heartbeat(t.Context(), freshID(), "token", "", "", 0)
	if kind := kindOfError(err); err == nil || kind != "NOPERM" {
		t.Errorf("%v: kind %s, want NOPERM", err, kind)
	}
	r.Do(t, "ACL", "SETUSER", "default", "+zadd")
	r.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = s.heartbeat(ctx, freshID(), "token", "", "", 0)
	if kind := kindOfError(err); err == nil || kind != kindUnreached {
		t.Errorf("%v: kind %s, want unreached", err, kind)
	}
	if kind := kindOfError(fmt.Errorf("x: %w", errUnanswered)); kind != kindUnanswered {
		t.Errorf("an unanswered command: kind %s", kind)
	}
	if kind := kindOfError(fmt.Errorf("whatever")); kind != kindOther || !slices.Contains(errorKinds, kind) {
		t.Errorf("an unknown error: kind %s", kind)
	}
}

// Only a webhook has verdicts of admissions: all of them, from the start.
func TestOnlyWebhooksCountVerdicts(t *testing.T) {
	m := newMetrics(new(redisCounts))
	scrape := func() string {
		rec := httptest.NewRecorder()
		m.handler(slog.New(slog.DiscardHandler)).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		return rec.Body.String()
	}
	if text := scrape(); strings.Contains(text, "admission_duration_seconds") {
		t.Error("a gate has metrics of admissions")
	}
	m.countVerdicts()
	text := scrape()
	for _, verdict := range verdicts {
		if !strings.Contains(text, fmt.Sprintf("admission_duration_seconds_count{verdict=%q} 0\n", verdict)) {
			t.Errorf("no count for the verdict %q", verdict)
		}
	}
}
