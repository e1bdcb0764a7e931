package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Concurrent first admissions on a fresh key: all that fit are admitted, and no more, always.
func TestConcurrentFirstAdmissions(t *testing.T) {
	r := commonRedis(t)
	w := startWebhook(t, testConfig(r.address))
	for _, length := range []int{200, 100} {
		for range 20 {
			id := freshID()
			body := review(t, id, length)
			var admitted, full atomic.Int64
			var wg sync.WaitGroup
			for range 200 {
				wg.Go(func() {
					a, err := w.tryAdmit(body)
					switch {
					case err != nil:
						t.Error(err)
					case a.allowed && a.token != "":
						admitted.Add(1)
					case a.code == http.StatusTooManyRequests:
						full.Add(1)
					default:
						t.Errorf("answered %+v", a)
					}
				})
			}
			wg.Wait()
			if int(admitted.Load()) != length || int(full.Load()) != 200-length {
				t.Fatalf("length %d: %d of 200 admitted, %d refused", length, admitted.Load(), full.Load())
			}
			r.wantCounts(t, id, 0, length)
		}
	}
}

// In the steady state an admission is one EVALSHA, admitted or refused.
func TestSteadyStateCost(t *testing.T) {
	r := startRedis(t)
	w := startWebhook(t, testConfig(r.address))
	id := freshID()
	w.wantAdmitted(t, id, 30)

	r.do(t, "CONFIG", "RESETSTAT")
	for range 29 {
		w.wantAdmitted(t, id, 30)
	}
	for range 10 {
		w.wantFull(t, id, 30, 30)
	}
	calls := commandCalls(t, r)
	if calls["evalsha"] != 39 {
		t.Errorf("%d EVALSHA for 39 admissions", calls["evalsha"])
	}
	for command, n := range calls {
		// What the script calls is counted as well; the rest is this test's.
		inScript := slices.Contains([]string{"time", "llen", "zcard", "zcount", "lpop", "zadd", "expire"}, command)
		if command != "evalsha" && !inScript && !strings.HasPrefix(command, "config") && command != "info" {
			t.Errorf("%d calls of %s", n, command)
		}
	}
}

func commandCalls(t *testing.T, r *redisServer) map[string]int {
	t.Helper()
	info, err := redis.String(r.do(t, "INFO", "commandstats"), nil)
	must(t, err)
	calls := map[string]int{}
	for _, m := range regexp.MustCompile(`cmdstat_([^:]+):calls=(\d+)`).FindAllStringSubmatch(info, -1) {
		n, err := strconv.Atoi(m[2])
		must(t, err)
		calls[m[1]] = n
	}
	return calls
}

func TestDryRunTakesNothing(t *testing.T) {
	w := startWebhook(t, testConfig(freeAddress(t)))
	id := freshID()
	a := w.admit(t, review(t, id, 1, func(request map[string]any) { request["dryRun"] = true }))
	if !a.allowed || a.token != "00000000-0000-0000-0000-000000000000" {
		t.Fatalf("answered %+v", a)
	}
	lines := w.log.lines(t, "admission")
	if len(lines) != 1 || lines[0]["verdict"] != verdictDryRun || lines[0]["token"] != "" {
		t.Errorf("logged %v", lines)
	}
}

func TestInvalidAnnotations(t *testing.T) {
	w := startWebhook(t, testConfig(freeAddress(t)))
	number := func(name string, most int) map[string]string {
		must := fmt.Sprintf(": it must be a whole number from 1 to %d", most)
		cases := map[string]string{}
		for _, v := range []string{"0", "-1", "abc", "3.5", "99999999", "", " 3", "+3", "3\n", "0x3"} {
			cases[v] = fmt.Sprintf("%s%s is %q%s", annotationPrefix, name, v, must)
		}
		long := "1" + strings.Repeat("0", 30)
		cases[long] = fmt.Sprintf("%s%s is %q%s", annotationPrefix, name, long, must)
		return cases
	}
	const keyRule = ": it must be letters, digits and . _ / -, and begin and end with a letter or digit"
	keys := map[string]string{strings.Repeat("k", 300): ": it has 300 characters: at most 253 are allowed"}
	for _, k := range []string{"", "{}", "a{b}", "a\nb", "a\n", "-a", "a/", "ä", "a b"} {
		keys[k] = fmt.Sprintf("%skey is %q%s", annotationPrefix, k, keyRule)
	}
	for name, cases := range map[string]map[string]string{"length": number("length", 10000), "expiration": number("expiration", 3600), "key": keys} {
		for value, want := range cases {
			a := w.admit(t, review(t, freshID(), 1, func(request map[string]any) {
				annotationsOf(request)[annotationPrefix+name] = value
			}))
			if a.allowed || a.code != http.StatusUnprocessableEntity || a.patch != nil {
				t.Errorf("%s %q: answered %+v", name, value, a)
			}
			if !strings.HasPrefix(a.message, "invalid annotations: ") || !strings.Contains(a.message, want) || strings.Contains(a.message, "\n") {
				t.Errorf("%s %q: message %q, want %q in it", name, value, a.message, want)
			}
		}
	}
}

// One message names every problem.
func TestAllProblemsAtOnce(t *testing.T) {
	w := startWebhook(t, testConfig(freeAddress(t)))
	a := w.admit(t, review(t, freshID(), 1, func(request map[string]any) {
		annotations := annotationsOf(request)
		annotations[annotationKey] = "a b"
		annotations[annotationLength] = "many"
		delete(annotations, annotationExpiration)
	}))
	want := "invalid annotations: " +
		`at-least-semaphore-pod-hook.kaidotio.github.io/key is "a b": it must be letters, digits and . _ / -, and begin and end with a letter or digit; ` +
		`at-least-semaphore-pod-hook.kaidotio.github.io/length is "many": it must be a whole number from 1 to 10000; ` +
		`at-least-semaphore-pod-hook.kaidotio.github.io/expiration is missing: it must be a whole number from 1 to 3600`
	if a.message != want {
		t.Errorf("message is\n%s\nwant\n%s", a.message, want)
	}
}

// The decision on invalid annotations takes less than a millisecond; the least of many runs, as the machine may
// be busy with something else.
func TestInvalidAnnotationsAreCheap(t *testing.T) {
	w := startWebhook(t, testConfig(freeAddress(t)))
	body := review(t, freshID(), 1, func(request map[string]any) { annotationsOf(request)[annotationLength] = "1e30" })
	least := time.Hour
	for range 100 {
		start := time.Now()
		r, err := decodeReview(body)
		must(t, err)
		d, err := w.decide(context.Background(), r)
		must(t, err)
		if d.response.Allowed {
			t.Fatal("allowed")
		}
		least = min(least, time.Since(start))
	}
	if least > time.Millisecond {
		t.Errorf("took %s", least)
	}
}

func annotationsOf(request map[string]any) map[string]any {
	return request["object"].(map[string]any)["metadata"].(map[string]any)["annotations"].(map[string]any)
}

// What is none of our business is allowed without a patch and without Redis.
func TestAllowedUntouched(t *testing.T) {
	w := startWebhook(t, testConfig(freeAddress(t)))
	for name, change := range map[string]func(map[string]any){
		"not annotated":   func(r map[string]any) { delete(annotationsOf(r), annotationEnabled) },
		"annotated false": func(r map[string]any) { annotationsOf(r)[annotationEnabled] = "false" },
		"no annotations": func(r map[string]any) {
			delete(r["object"].(map[string]any)["metadata"].(map[string]any), "annotations")
		},
		"null annotations": func(r map[string]any) { r["object"].(map[string]any)["metadata"].(map[string]any)["annotations"] = nil },
		"update":           func(r map[string]any) { r["operation"] = "UPDATE" },
		"delete":           func(r map[string]any) { r["operation"], r["object"] = "DELETE", nil },
		"another kind":     func(r map[string]any) { r["kind"].(map[string]any)["kind"] = "Deployment" },
		"another group":    func(r map[string]any) { r["kind"].(map[string]any)["group"] = "example.org" },
		"a subresource":    func(r map[string]any) { r["subResource"] = "eviction" },
	} {
		a := w.admit(t, review(t, freshID(), 1, change))
		if !a.allowed || a.patch != nil || a.message != "" {
			t.Errorf("%s: answered %+v", name, a)
		}
	}
	if log := w.log.String(); log != "" {
		t.Errorf("logged %s", log)
	}
}

// The answer is a failure, never an admission, where Redis is out of reach.
func TestRedisUnreachable(t *testing.T) {
	address := freeAddress(t)
	w := startWebhook(t, testConfig(address))
	id := freshID()
	status, text, err := w.post(context.Background(), review(t, id, 1), "10s")
	must(t, err)
	if status != http.StatusInternalServerError || !strings.Contains(text, "acquire "+id.String()+": connect to queue Redis "+address) {
		t.Errorf("answered %d %q", status, text)
	}
	lines := w.log.lines(t, "admission")
	if len(lines) != 1 || lines[0]["verdict"] != verdictFailed || lines[0]["error"] == "" || lines[0]["level"] != "ERROR" {
		t.Errorf("logged %v", lines)
	}
}

// The client goes away, or the deadline passes, while Redis hangs with the acquire on its way. When Redis goes on, it
// takes the token, and the token must come back.
func TestAbandonedAcquireIsGivenBack(t *testing.T) {
	for name, abandon := range map[string]func(*testWebhook, []byte) error{
		"client gone": func(w *testWebhook, body []byte) error {
			ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
			defer cancel()
			if _, _, err := w.post(ctx, body, "10s"); !errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("got %v", err)
			}
			return nil
		},
		"deadline": func(w *testWebhook, body []byte) error {
			start := time.Now()
			status, text, err := w.post(context.Background(), body, "500ms")
			if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, "no answer of queue Redis") {
				return fmt.Errorf("answered %d %q, %v", status, text, err)
			}
			if took := time.Since(start); took > 500*time.Millisecond {
				return fmt.Errorf("answered after %s", took)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := startRedis(t)
			w := startWebhook(t, testConfig(r.address))
			id := freshID()
			w.wantAdmitted(t, id, 10)
			r.pause(t)
			var wg sync.WaitGroup
			for range 5 {
				wg.Go(func() {
					if err := abandon(w, review(t, id, 10)); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			r.resume(t)
			eventually(t, 10*time.Second, func() error {
				if n := len(w.log.lines(t, "unused token given back")); n != 5 {
					return fmt.Errorf("%d of 5 given back", n)
				}
				return nil
			})
			r.wantCounts(t, id, 9, 1)
		})
	}
}

// brokenWriter is a connection that breaks when the answer is written.
type brokenWriter struct{ httptest.ResponseRecorder }

func (*brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestUndeliverableAnswerIsGivenBack(t *testing.T) {
	r := commonRedis(t)
	w := startWebhook(t, testConfig(r.address))
	id := freshID()
	request := httptest.NewRequest(http.MethodPost, "/mutate?timeout=10s", strings.NewReader(string(review(t, id, 3))))
	request.Header.Set("Content-Type", "application/json")
	w.mutate(new(brokenWriter), request)
	r.wantCounts(t, id, 3, 0)
	lines := w.log.lines(t, "admission")
	if len(lines) != 1 || lines[0]["verdict"] != verdictUndeliverable || lines[0]["error"] != "deliver the answer: broken pipe" {
		t.Errorf("logged %v", lines)
	}
}

func TestOneLogLinePerAdmission(t *testing.T) {
	r := commonRedis(t)
	w := startWebhook(t, testConfig(r.address))
	id := freshID()
	token := w.wantAdmitted(t, id, 1)
	w.wantFull(t, id, 1, 1)
	w.admit(t, review(t, id, 0))
	lines := w.log.lines(t, "admission")
	want := []map[string]any{
		{"verdict": verdictAdmitted, "token": token},
		{"verdict": verdictFull, "token": "", "message": fmt.Sprintf("no semaphore available: %s has 1 of 1 tokens in use", id)},
		{"verdict": verdictInvalid, "token": ""},
	}
	if len(lines) != len(want) {
		t.Fatalf("%d lines: %v", len(lines), lines)
	}
	for i, line := range lines {
		want[i]["namespace"], want[i]["key"], want[i]["pod"], want[i]["level"] = id.namespace, id.key, "web-67d4947b99-", "INFO"
		for k, v := range want[i] {
			if line[k] != v {
				t.Errorf("line %d: %s is %v, want %v", i, k, line[k], v)
			}
		}
		if ms, ok := line["durationMs"].(float64); !ok || ms < 0 || ms > 60000 {
			t.Errorf("line %d: durationMs is %v", i, line["durationMs"])
		}
	}
}

// After the last use nothing is left: no goroutine, no connection.
func TestNothingLeftBehind(t *testing.T) {
	r := startRedis(t)
	goroutines := runtime.NumGoroutine()
	w := startWebhook(t, testConfig(r.address))
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if i%2 == 0 { // goes away at some point of the admission
				time.AfterFunc(time.Duration(i)*100*time.Microsecond, cancel)
			}
			_, _, err := w.post(ctx, review(t, semaphoreID{"shop", fmt.Sprint("left-", i%7)}, 20), "10s")
			if err != nil && i%2 == 1 {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	w.server.Client().CloseIdleConnections()
	w.close()
	eventually(t, 10*time.Second, func() error {
		if n := runtime.NumGoroutine(); n > goroutines {
			return fmt.Errorf("%d goroutines, %d before\n%s", n, goroutines, stacks())
		}
		clients, err := redis.String(r.do(t, "CLIENT", "LIST"), nil)
		if err == nil && strings.Count(clients, "\n") != 1 {
			err = fmt.Errorf("connections left:\n%s", clients)
		}
		return err
	})
	keys, err := redis.Strings(r.do(t, "KEYS", "*"), nil)
	must(t, err)
	for _, key := range keys {
		if ttl, err := redis.Int(r.do(t, "TTL", key), nil); err != nil || ttl <= 0 {
			t.Errorf("%s has a time to live of %d, %v", key, ttl, err)
		}
		if strings.HasPrefix(key, "lock/") {
			t.Errorf("%s is left", key)
		}
	}
}

func stacks() string {
	b := make([]byte, 1<<16)
	return string(b[:runtime.Stack(b, true)])
}

// A Redis that is emptied or restarted needs no restart of ours and costs no token.
func TestRedisRestarted(t *testing.T) {
	r := startRedis(t)
	w := startWebhook(t, testConfig(r.address))
	id := freshID()
	for range 3 {
		startSidecar(t, r.address, id, w.wantAdmitted(t, id, 4))
	}
	r.wantCounts(t, id, 1, 3)
	for range 3 {
		r.stop()
		status, text, err := w.post(context.Background(), review(t, id, 4), "2s")
		must(t, err)
		if status != http.StatusInternalServerError {
			t.Errorf("without Redis: %d %s", status, text)
		}
		must(t, r.start())
		token := w.wantAdmitted(t, id, 4) // the very first attempt
		w.wantFull(t, id, 4, 4)
		w.semaphores.giveBack(id, token)
		r.wantCounts(t, id, 1, 3)
	}
	tokens := r.inflight(t, id)
	must(t, errOf(r.control.Do("DEL", id.inflightKey())))
	eventually(t, 20*time.Second, func() error {
		if got := r.inflight(t, id); !slices.Equal(got, tokens) {
			return fmt.Errorf("in flight %v, want %v: the sidecars do not go on", got, tokens)
		}
		return nil
	})
}

func errOf(_ any, err error) error { return err }

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

func TestUnanswerableRequests(t *testing.T) {
	w := startWebhook(t, testConfig(freeAddress(t)))
	good := string(review(t, freshID(), 1))
	with := func(change func(map[string]any)) string {
		var r map[string]any
		must(t, json.Unmarshal([]byte(good), &r))
		change(r)
		body, err := json.Marshal(r)
		must(t, err)
		return string(body)
	}
	for _, c := range []struct {
		name, method, path, contentType, body string
		status                                int
		text                                  string
	}{
		{"method", "GET", "/mutate", "application/json", "", 405, "method GET is not allowed: POST an AdmissionReview"},
		{"path", "POST", "/", "application/json", good, 404, "not found: admission reviews are served at /mutate"},
		{"content type", "POST", "/mutate", "text/plain", good, 415, `Content-Type is "text/plain": it must be application/json`},
		{"no content type", "POST", "/mutate", "", good, 415, `Content-Type is "": it must be application/json`},
		{"empty", "POST", "/mutate", "application/json", "", 400, "empty body"},
		{"truncated", "POST", "/mutate", "application/json", good[:len(good)/2], 400, "decode AdmissionReview: unexpected end of JSON input"},
		{"not JSON", "POST", "/mutate", "application/json", "hello", 400, "decode AdmissionReview: invalid character 'h'"},
		{"more behind", "POST", "/mutate", "application/json", good + "{}", 400, "after top-level value"},
		{"oversized", "POST", "/mutate", "application/json", strings.Repeat(" ", maxBody+1), 413, "the body is larger than 4194304 bytes"},
		{"nested", "POST", "/mutate", "application/json", strings.Repeat("[", maxBody), 400, "exceeded max depth"},
		{"nested inside", "POST", "/mutate", "application/json", `{"request":` + strings.Repeat(`{"a":`, 100000), 400, "exceeded max depth"},
		{"an array", "POST", "/mutate", "application/json", "[]", 400, "decode AdmissionReview"},
		{"null", "POST", "/mutate", "application/json", "null", 400, "only AdmissionReview of admission.k8s.io/v1 is served"},
		{"version", "POST", "/mutate", "application/json", with(func(r map[string]any) { r["apiVersion"] = "admission.k8s.io/v1beta1" }), 400,
			`got "AdmissionReview" of "admission.k8s.io/v1beta1": only AdmissionReview of admission.k8s.io/v1 is served`},
		{"kind", "POST", "/mutate", "application/json", with(func(r map[string]any) { r["kind"] = "Pod" }), 400, `got "Pod" of`},
		{"no request", "POST", "/mutate", "application/json", with(func(r map[string]any) { delete(r, "request") }), 400, "without a request"},
		{"no uid", "POST", "/mutate", "application/json", with(func(r map[string]any) { delete(r["request"].(map[string]any), "uid") }), 400, "without request.uid"},
		{"no namespace", "POST", "/mutate", "application/json", with(func(r map[string]any) { delete(r["request"].(map[string]any), "namespace") }), 400, "without request.namespace"},
		{"no object", "POST", "/mutate", "application/json", with(func(r map[string]any) { r["request"].(map[string]any)["object"] = nil }), 400, "without request.object"},
		{"wrong object", "POST", "/mutate", "application/json", with(func(r map[string]any) { r["request"].(map[string]any)["object"] = "pod" }), 400, "decode request.object"},
		{"wrong annotations", "POST", "/mutate", "application/json", with(func(r map[string]any) {
			annotationsOf(r["request"].(map[string]any))[annotationEnabled] = true
		}), 400, "decode request.object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			request, err := http.NewRequest(c.method, w.server.URL+c.path, strings.NewReader(c.body))
			must(t, err)
			if c.contentType != "" {
				request.Header.Set("Content-Type", c.contentType)
			}
			response, err := w.server.Client().Do(request)
			must(t, err)
			defer response.Body.Close()
			b := make([]byte, 1000)
			n, _ := response.Body.Read(b)
			if text := string(b[:n]); response.StatusCode != c.status || !strings.Contains(text, c.text) {
				t.Errorf("answered %d %q, want %d %q", response.StatusCode, text, c.status, c.text)
			}
			if c.status == 405 && response.Header.Get("Allow") != "POST" {
				t.Errorf("Allow is %q", response.Header.Get("Allow"))
			}
		})
	}
}

func TestAnswerWithin(t *testing.T) {
	for timeout, want := range map[string]time.Duration{
		"10s":   9500 * time.Millisecond,
		"1s":    900 * time.Millisecond,
		"100ms": 90 * time.Millisecond,
		"30s":   29500 * time.Millisecond,
		"5h":    29500 * time.Millisecond,
		"":      9500 * time.Millisecond,
		"-1s":   9500 * time.Millisecond,
		"soon":  9500 * time.Millisecond,
	} {
		if got := answerWithin(timeout); got != want {
			t.Errorf("timeout %q: %s, want %s", timeout, got, want)
		}
	}
}

// Only a pod that is to complete, with a classic sidecar, gets a warning.
func TestWarningNotCompleting(t *testing.T) {
	for _, native := range []bool{true, false} {
		c := testConfig(freeAddress(t))
		c.enableSidecarContainers = native
		w := startWebhook(t, c)
		for _, policy := range []string{"Always", "OnFailure", "Never"} {
			a := w.admit(t, review(t, freshID(), 1, func(request map[string]any) {
				request["dryRun"] = true
				request["object"].(map[string]any)["spec"].(map[string]any)["restartPolicy"] = policy
			}))
			if want := !native && policy != "Always"; !a.allowed || (len(a.warnings) > 0) != want {
				t.Errorf("native %t, restartPolicy %s: warnings %q", native, policy, a.warnings)
			}
		}
	}
}

// The same for a Job, which is never patched.
func TestWarningForJob(t *testing.T) {
	for _, native := range []bool{true, false} {
		for annotated, value := range map[bool]string{true: "true", false: "no"} {
			c := testConfig(freeAddress(t))
			c.enableSidecarContainers = native
			w := startWebhook(t, c)
			a := w.admit(t, review(t, freshID(), 1, func(request map[string]any) {
				request["kind"] = map[string]any{"group": "batch", "version": "v1", "kind": "Job"}
				request["object"] = map[string]any{"spec": map[string]any{"template": map[string]any{
					"metadata": map[string]any{"annotations": map[string]any{annotationEnabled: value}},
				}}}
			}))
			for _, warning := range a.warnings {
				if len(warning) > 120 {
					t.Errorf("%d characters: %s", len(warning), warning)
				}
			}
			if want := !native && annotated; !a.allowed || a.patch != nil || (len(a.warnings) > 0) != want {
				t.Errorf("native %t, annotated %t: answered %+v", native, annotated, a)
			}
		}
	}
}
