package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// samples are the metrics of a scrape, by name with labels, as exported.
type samples map[string]float64

// scrape scrapes the webhook, and checks the metrics with promtool.
func (w *testWebhook) scrape(t *testing.T) samples {
	t.Helper()
	text := w.metrics(t)
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v: %s", err, out)
	}
	return samplesOf(t, text)
}

// metrics returns the response of /metrics.
func (w *testWebhook) metrics(t *testing.T) string {
	t.Helper()
	rec := httptest.NewRecorder()
	w.healthRoutes().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if rec.Code != http.StatusOK {
		t.Fatalf("scrape: got %d %s", rec.Code, rec.Body)
	}
	return rec.Body.String()
}

// samples is scrape without a promtool, which takes a tenth of a second of CPU.
func (w *testWebhook) samples(t *testing.T) samples {
	t.Helper()
	return samplesOf(t, w.metrics(t))
}

func samplesOf(t *testing.T, text string) samples {
	t.Helper()
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
		if n := w.samples(t)[metricsPrefix+"lock_held_seconds_count"]; n != 1 {
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
	_, err := s.heartbeat(t.Context(), freshID(), "token", "", "", 0, 1)
	if kind := kindOfError(err); err == nil || kind != "NOPERM" {
		t.Errorf("%v: kind %s, want NOPERM", err, kind)
	}
	r.Do(t, "ACL", "SETUSER", "default", "+zadd")
	r.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = s.heartbeat(ctx, freshID(), "token", "", "", 0, 1)
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

// of returns the value of a semaphore's metric.
func (s samples) of(name string, id semaphoreID) (float64, bool) {
	value, ok := s[fmt.Sprintf("%s%s{key=%q,namespace=%q}", metricsPrefix, name, id.key, id.namespace)]
	return value, ok
}

// Each webhook exports the same metrics of a semaphore, whichever pods it has admitted
// itself.
func TestSemaphoreMetrics(t *testing.T) {
	t.Parallel()
	r, s, id, tokens := shownSemaphore(t, "metrics-"+uuid.NewString()[:8])
	rig.Must(t, errOf(s.heartbeat(t.Context(), id, uuid.NewString(), "", "", 0, 1))) // a rejoin
	free := semaphoreID{id.namespace, "free"}
	giveBack(t, s, free, acquire(t, s, free, 3))
	acquire(t, s, semaphoreID{id.namespace, "strange\xff"}, 1)
	for range 2 {
		w := startWebhook(t, testConfig(r.Address))
		all := w.scrape(t)
		for name, want := range map[string]float64{
			"length": 2, "queue": 0, "inflight": 3, "late": 1, "stale": 1, "waiters": 2,
			"reclaimed_tokens_total": 0, "rejoined_tokens_total": 1,
		} {
			if got, ok := all.of(name, id); !ok || got != want {
				t.Errorf("%s is %v (exported: %t), want %v", name, got, ok, want)
			}
		}
		if got, _ := all.of("queue", free); got != 3 {
			t.Errorf("%v tokens are free, want 3", got)
		}
		if got, _ := all.of("oldest_heartbeat_seconds", id); got < 7200 || got > 7300 {
			t.Errorf("the oldest heartbeat was %v s ago, want about 7200", got)
		}
		if got, ok := all.of("longest_wait_seconds", id); !ok || got > 60 {
			t.Errorf("the longest wait is %v s (exported: %t)", got, ok)
		}
		all.want(t, map[string]float64{"survey_success": 1, "semaphores_left_out": 0})
	}
	left := semaphoreID{id.namespace, "left"}
	acquire(t, s, left, 1)
	for _, then := range whenWaitedChoices {
		r.Do(t, "ZADD", left.waitersKey(), 1, then) // since long
		_, err := r.Run("acquire", left, rig.DefaultTiming, 1, then, joinLine, "", "", "", "", "", 1, then)
		rig.Must(t, err)
	}
	giveBack(t, s, id, tokens[0])
	r.Do(t, "HSET", id.stateKey(), "resumed", 0) // a slow machine may have made a silence
	maintain(t, s, id, 3)
	all := startWebhook(t, testConfig(r.Address)).scrape(t)
	for _, reason := range whenWaitedChoices {
		series := fmt.Sprintf("left_total{key=%q,namespace=%q,reason=%q}", left.key, left.namespace, reason)
		all.want(t, map[string]float64{series: 1})
	}
	if got, _ := all.of("reclaimed_tokens_total", id); got != 1 {
		t.Errorf("%v tokens were reclaimed, want 1", got)
	}
}

// The metrics tell the length that the owner has set, and pauses.
func TestMetricsOfASetLength(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	ctx := t.Context()
	acquire(t, s, id, 3)
	want := func(limit, paused float64) {
		t.Helper()
		all := startWebhook(t, testConfig(r.Address)).scrape(t)
		if got, ok := all.of("limit", id); ok != (limit >= 0) || ok && got != limit {
			t.Errorf("limit is %v (exported: %t), want %v", got, ok, limit)
		}
		if got, ok := all.of("paused", id); !ok || got != paused {
			t.Errorf("paused is %v (exported: %t), want %v", got, ok, paused)
		}
		if got, _ := all.of("length", id); got != 3 {
			t.Errorf("length is %v, want 3", got)
		}
	}
	const none = -1
	override := func(length int) {
		t.Helper()
		_, _, err := s.setOverride(ctx, id, override{length: length}, time.Hour)
		rig.Must(t, err)
	}
	want(none, 0)
	rig.Must(t, s.setLimit(ctx, id, limit{known: true, length: 2}, time.Hour, false))
	want(2, 0)
	override(0)
	want(0, 1)
	override(5)
	want(5, 0)
	r.Do(t, "HSET", id.stateKey(), "ends", r.Now(t)) // the override has ended
	want(2, 0)
	rig.Must(t, s.setLimit(ctx, id, limit{known: true, length: 0}, time.Hour, false))
	want(0, 1)
	rig.Must(t, s.setLimit(ctx, id, limit{known: true, length: -1}, time.Hour, false))
	want(none, 0)
}

// With too many semaphores, those in use have metrics, and the others are counted.
// Reading a thousand semaphores is quick.
// A semaphore whose keys a namespace's user has spoilt keeps no other out of a survey.
func TestSurveyOfSpoiltSemaphores(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	acquire(t, s, id, 2)
	odd, wrong := freshID(), freshID()
	r.Do(t, "HSET", odd.stateKey(), "length", "x", "interval", "", "touched", "1e9", "limit", "-3", "override", "y", "ends", "9999999999")
	r.Do(t, "HSET", wrong.stateKey(), "length", 3)
	r.Do(t, "SADD", wrong.inflightKey(), "x")
	states, err := s.survey(t.Context(), "")
	if err == nil || !strings.Contains(err.Error(), wrong.String()+": WRONGTYPE") || strings.Contains(err.Error(), id.String()) {
		t.Errorf("got the error %v", err)
	}
	var found []string
	for _, st := range states {
		found = append(found, fmt.Sprintf("%s %d %+v", st.id, st.inUse, st.setting))
	}
	for _, want := range []string{fmt.Sprintf("%s 1 %+v", id, setting{}),
		fmt.Sprintf("%s 0 %+v", odd, setting{limit: limit{known: true, length: -1}})} {
		if !slices.Contains(found, want) {
			t.Errorf("found %q, want %q", found, want)
		}
	}
}

func TestMetricsOfManySemaphores(t *testing.T) {
	t.Parallel()
	r, s, _ := newSemaphoreOn(t, rig.StartRedis(t))
	const semaphores = mostMeasured + 100
	concurrently(semaphores, func(i int) {
		id := semaphoreID{"shop", fmt.Sprintf("key-%d", i)}
		maintain(t, s, id, 1) // without a lock
		token := acquire(t, s, id, 1)
		if i < semaphores-mostMeasured {
			giveBack(t, s, id, token)
		}
	})
	w := startWebhook(t, testConfig(r.Address))
	start := time.Now()
	all := w.samples(t)
	rig.WantWithin(t, time.Since(start), surveyTimeout, fmt.Sprintf("a scrape of %d semaphores", semaphores))
	all.want(t, map[string]float64{"survey_success": 1, "semaphores": semaphores, "semaphores_left_out": semaphores - mostMeasured})
	measured := 0
	for name := range all {
		if strings.HasPrefix(name, metricsPrefix+"inflight{") {
			measured++
		}
	}
	if measured != mostMeasured {
		t.Errorf("%d semaphores have metrics, want %d", measured, mostMeasured)
	}
	var v surveyResult
	rig.Must(t, newSurveyor(s, surveyPatience).read(&v))
	if len(v.shown) != mostMeasured || cap(v.shown) >= v.seen {
		t.Errorf("%d of %d states are kept, with room for %d", len(v.shown), v.seen, cap(v.shown))
	}
	if _, ok := all.of("inflight", semaphoreID{"shop", "key-0"}); ok {
		t.Error("an unused semaphore has metrics in the place of a used one")
	}
}

// A Redis that hangs delays one scrape by two seconds, and only the metrics read from
// Redis are missing.
func TestMetricsOfAHangingRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	acquire(t, s, id, 1)
	w := startWebhook(t, testConfig(r.Address))
	w.scrape(t).want(t, map[string]float64{"semaphores": 1, "survey_success": 1})
	w.semaphores.metrics = newMetrics(new(redisCounts))
	w.semaphores.metrics.countVerdicts()
	w.semaphores.metrics.watchSemaphores(w.semaphores, surveyTimeout)
	r.Pause(t)
	defer r.Resume(t)
	rig.Eventually(t, 10*time.Second, func() error { // the cache may still have the last result
		start := time.Now()
		all := w.scrape(t)
		rig.WantWithin(t, time.Since(start), surveyTimeout+2*time.Second, "a scrape")
		if all[metricsPrefix+"survey_success"] != 0 {
			return fmt.Errorf("survey_success is not 0")
		}
		if len(all) < 100 {
			t.Errorf("only %d metrics are exported", len(all))
		}
		return nil
	})
	w.scrape(t)
	if lines := w.log.Lines(t, "the semaphores cannot be read for the metrics"); len(lines) != 1 {
		t.Errorf("the failure was logged %d times, want once", len(lines))
	}
}

// A semaphore whose slot moves to another node of a Cluster is left out; others are read.
func TestReadStatesDuringSlotMigration(t *testing.T) {
	s := testSemaphores(t, rig.CommonRedis(t).Address)
	now := "*2\r\n$10\r\n1700000010\r\n$1\r\n0\r\n"
	moved := "-MOVED 1 127.0.0.1:7000\r\n"
	state := fmt.Sprintf("*%d\r\n$1\r\n3\r\n", len(stateFields)) + strings.Repeat("$-1\r\n", len(stateFields)-1) + "*0\r\n"
	counts := ":1\r\n:2\r\n:0\r\n:0\r\n*2\r\n$1\r\na\r\n$10\r\n1700000000\r\n:0\r\n*0\r\n*1\r\n$-1\r\n:0\r\n"
	all := now + moved + moved + state + state + strings.Repeat(moved, 9) + counts
	conn := redis.NewConn(answering{Reader: bytes.NewReader([]byte(all))}, time.Second, time.Second)
	states, err := s.readStates(t.Context(), conn, []semaphoreID{{"shop", "moved"}, {"shop", "moves"}, {"shop", "there"}})
	if err != nil || len(states) != 1 || states[0].id.key != "there" || states[0].inUse != 2 ||
		states[0].oldestHeartbeat != 10*time.Second {
		t.Errorf("got %+v, %v", states, err)
	}
}

// A webhook with a shorter interval and threshold than those of running pods reclaims no
// token of a pod that lives. When it has heard no longer ones for minutes, its own count.
func TestShorterSettingsMakeNoHolderStale(t *testing.T) {
	r, long, id := newSemaphore(t)
	c := testConfig(r.Address)
	c.heartbeatInterval, c.staleThreshold = 3*time.Second, 12*time.Second
	short := semaphoresOf(t, c)
	ctx := t.Context()
	holder := acquire(t, long, id, 1)
	silentFor := func(seconds int) { r.Do(t, "ZADD", id.inflightKey(), "XX", r.Now(t)-seconds, holder) }
	for range 2 { // what the short one sends does not replace the memory
		silentFor(100)
		wantFullError(t, short, id, 1, 1)
		rig.Must(t, short.maintain(ctx, id, 1, false))
		r.WantInflight(t, id, holder)
	}
	d, err := short.inspect(ctx, id, detailMost)
	if err != nil || d.stale != 0 || d.holders[0].stale {
		t.Errorf("status shows %+v, %v", d, err)
	}
	silentFor(130)
	holder = acquire(t, short, id, 1)

	// A long silence of Redis, or a clock that was set, ends no memory.
	rig.Must(t, errOf(long.heartbeat(ctx, id, holder, "", "", 0, 1)))
	r.Shift(t, id, -time.Hour)
	for range 2 {
		rig.Must(t, short.maintain(ctx, id, 1, false))
		r.WantInflight(t, id, holder)
		r.Do(t, "HINCRBY", id.stateKey(), "resumed", -10)
	}

	r.Do(t, "HSET", id.stateKey(), "sent", r.Now(t)-301, "resumed", 0)
	silentFor(13)
	acquire(t, short, id, 1)
}

// What all have left counts for nothing, and expires within minutes. If a holder comes
// back before that, everything is as it was.
func TestAbandonedSemaphore(t *testing.T) {
	t.Parallel()
	r, s, id, tokens := shownSemaphore(t, "abandoned-"+uuid.NewString()[:8])
	want := func(inUse, stale, waiting int) {
		t.Helper()
		all := startWebhook(t, testConfig(r.Address)).scrape(t)
		for name, want := range map[string]int{"inflight": inUse, "stale": stale, "waiters": waiting} {
			if got, ok := all.of(name, id); !ok || got != float64(want) {
				t.Errorf("%s is %v (exported: %t), want %d", name, got, ok, want)
			}
		}
		wait, _ := all.of("longest_wait_seconds", id)
		heartbeat, _ := all.of("oldest_heartbeat_seconds", id)
		if (wait > 0) != (waiting > 0) || (heartbeat > 0) != (inUse > 0) {
			t.Errorf("the longest wait is %v s, the oldest heartbeat was %v s ago", wait, heartbeat)
		}
	}
	timeToLive := func() (most int64) {
		for _, key := range id.keys()[:scriptKeys-1] { // the history lives longer
			most = max(most, r.Do(t, "TTL", key).(int64))
		}
		return most
	}
	r.Shift(t, id, -150*time.Second) // Redis may have been away
	want(2, 2, 2)
	if left := timeToLive(); left < 80000 {
		t.Errorf("the keys expire in %d s", left)
	}
	r.Shift(t, id, -time.Minute)
	for range 2 { // a second survey does not put it off
		want(0, 0, 0)
		if left := timeToLive(); left < 200 || left > 300 {
			t.Errorf("the keys expire in %d s, want at most 300", left)
		}
		for _, key := range id.keys()[:scriptKeys-1] { // the history lives longer
			r.Do(t, "EXPIRE", key, 250)
		}
	}
	wantStatus(t, r, []string{id.String()}, id.String()+`: 0 of 2 tokens in use \(0 stale\), 0 free, 0 waiting in line`)
	if left := timeToLive(); left > 250 {
		t.Errorf("the keys expire in %d s, want at most 250", left)
	}

	rig.Must(t, errOf(s.heartbeat(t.Context(), id, tokens[0], "", "", 0, 1)))
	want(2, 1, 0)                                    // the waiters have not asked yet
	rig.Eventually(t, 10*time.Second, func() error { // the survey of another test may have begun before
		if left := timeToLive(); left < 80000 {
			rig.Must(t, errOf(s.heartbeat(t.Context(), id, tokens[0], "", "", 0, 1)))
			return fmt.Errorf("the keys expire in %d s, though a holder is back", left)
		}
		return nil
	})
	if d, err := s.inspect(t.Context(), id, detailMost); err != nil || len(d.holders) != 2 || len(d.line) != 0 {
		t.Errorf("status shows %+v, %v", d, err)
	}
}

// What the owner has set outlives the pods of an abandoned semaphore, and nothing else
// does. Once it has ended, all expires as elsewhere.
func TestAbandonedSemaphoreWithASetLength(t *testing.T) {
	t.Parallel()
	r, s, id, _ := shownSemaphore(t, "abandoned-"+uuid.NewString()[:8])
	_, _, err := s.setOverride(t.Context(), id, override{length: 0}, 2*time.Hour)
	rig.Must(t, err)
	r.Shift(t, id, -time.Hour)
	want := func(paused float64, least, most int64) {
		t.Helper()
		all := startWebhook(t, testConfig(r.Address)).scrape(t)
		inUse, _ := all.of("inflight", id)
		if got, ok := all.of("paused", id); !ok || got != paused || inUse != 0 {
			t.Errorf("paused is %v (exported: %t), want %v; %v in use", got, ok, paused, inUse)
		}
		for _, key := range id.keys()[:scriptKeys-1] { // the history lives longer
			least, most := least, most
			if key != id.stateKey() {
				least, most = 200, 300
			}
			if left := r.Do(t, "TTL", key).(int64); left != -2 && (left < least || left > most) { // -2: no such key
				t.Errorf("%s expires in %d s, want %d to %d", key, left, least, most)
			}
		}
	}
	want(1, 7200-60, 100000)
	r.Do(t, "HSET", id.stateKey(), "ends", r.Now(t))
	want(0, 200, 300)
}

// Redis does not note commands while it is full. The heartbeats show that pods live.
func TestFullRedisIsNotAbandoned(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	s, id := testSemaphores(t, r.Address), freshID()
	token := acquire(t, s, id, 1)
	r.Shift(t, id, -time.Hour)
	r.Do(t, "CONFIG", "SET", "maxmemory", 1)
	rig.Must(t, errOf(s.heartbeat(t.Context(), id, token, "", "", 0, 1)))
	if states, err := s.survey(t.Context(), ""); err != nil || len(states) != 1 || states[0].inUse != 1 {
		t.Errorf("got %+v, %v", states, err)
	}
}

// The metric tells of a file that is bad, or not where the ConfigMap has it. New settings
// count before anyone hears of them.
func TestSettingsRefused(t *testing.T) {
	t.Parallel()
	mount := t.TempDir()
	rig.Must(t, os.Mkdir(filepath.Join(mount, "..data"), 0o700))
	write := func(name, text string) { // as the kubelet does
		t.Helper()
		rig.Must(t, os.WriteFile(filepath.Join(mount, "..data", name), []byte(text), 0o600))
		if err := os.Symlink("..data/"+name, filepath.Join(mount, name)); !errors.Is(err, os.ErrExist) {
			rig.Must(t, err)
		}
	}
	none := newOwnerFile("", slog.New(slog.DiscardHandler), func() { t.Error("there are settings without a file") })
	none.watch(t.Context(), time.Millisecond) // it ends
	if s, err := none.settings(); err != nil || len(s.lines) > 0 {
		t.Errorf("without a file: %d lines, %v", len(s.lines), err)
	}
	var f ownerFile
	heard := -1
	changed := func() {
		if f.watchedFile != nil {
			s, err := f.settings()
			rig.Must(t, err)
			heard = len(s.lines)
		}
	}
	f = newOwnerFile(filepath.Join(mount, "semaphores"), slog.New(slog.DiscardHandler), changed)
	m := newMetrics(new(redisCounts))
	m.watchSettings(f)
	want := func(lines int, refused float64) {
		t.Helper()
		_, _ = f.reload()
		families, err := m.registry.Gather()
		rig.Must(t, err)
		for _, family := range families {
			if family.GetName() == metricsPrefix+"settings_refused" && family.GetMetric()[0].GetGauge().GetValue() != refused {
				t.Errorf("refused is not %v", refused)
			}
		}
		s, err := f.settings()
		rig.Must(t, err)
		if len(s.lines) != lines || heard >= 0 && heard != lines {
			t.Errorf("%d lines count, and %d were heard of; want %d", len(s.lines), heard, lines)
		}
	}
	want(0, 0)
	write("semaphores", "shop/web length=3\nshop/mail length=1")
	want(2, 0)
	write("semaphores", "shop/web")
	want(2, 1)
	write("semaphores", "shop/web length=3")
	want(1, 0)
	rig.Must(t, os.Remove(filepath.Join(mount, "..data", "semaphores")))
	write("lengths.txt", "shop/web length=4")
	want(1, 1)
	rig.Must(t, os.Remove(filepath.Join(mount, "..data", "lengths.txt")))
	want(0, 0)
}
