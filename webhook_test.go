package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// Of concurrent first admissions on a fresh key, exactly as many succeed as the length
// allows.
func TestConcurrentFirstAdmissions(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	for _, length := range []int{200, 100} {
		for range 3 {
			id := freshID()
			body := rig.Review(t, id, length)
			var admitted, full atomic.Int64
			var wg sync.WaitGroup
			for range 200 {
				wg.Go(func() {
					a, err := w.tryAdmit(body)
					switch {
					case err != nil:
						t.Error(err)
					case a.Allowed && a.Token != "":
						admitted.Add(1)
					case a.Code == http.StatusTooManyRequests:
						full.Add(1)
					default:
						t.Errorf("got %+v, want allowed with a token, or 429", a)
					}
				})
			}
			wg.Wait()
			if int(admitted.Load()) != length || int(full.Load()) != 200-length {
				t.Fatalf("length %d: %d of 200 admitted, %d refused", length, admitted.Load(), full.Load())
			}
			r.WantCounts(t, id, 0, length)
		}
	}
}

// In the steady state, an admission is one EVALSHA, admitted or refused.
func TestSteadyStateCost(t *testing.T) {
	t.Parallel()
	rig.SkipUnderSentinel(t)
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	w.wantAdmitted(t, id, 30)
	rig.Eventually(t, 10*time.Second, func() error { // the first repair may still free its lock
		if r.Do(t, "EXISTS", id.lockKey()) != int64(0) {
			return errors.New("the lock is still taken")
		}
		return nil
	})

	r.Do(t, "CONFIG", "RESETSTAT")
	for range 29 {
		w.wantAdmitted(t, id, 30)
	}
	for range 10 {
		w.wantFull(t, id, 30, 30)
	}
	calls := r.CommandCalls(t)
	if calls["evalsha"] != 39 {
		t.Errorf("%d calls of EVALSHA for 39 admissions", calls["evalsha"])
	}
	for command, n := range calls {
		// The counts include the commands of the script, and of this test.
		inScript := slices.Contains([]string{
			"time", "hmget", "hset", "exists", "zrange", "llen", "zcard", "zcount", "lpop", "zadd", "expire", "zscore",
			"zrem", "zrangebyscore", "ttl",
		}, command)
		if command != "evalsha" && !inScript && !strings.HasPrefix(command, "config") && command != "info" {
			t.Errorf("%d unexpected calls of %s", n, command)
		}
	}
}

// While Redis is unreachable, the admission fails, and no pod is admitted.
func TestRedisUnreachable(t *testing.T) {
	t.Parallel()
	address := rig.FreeAddress(t)
	w := startWebhook(t, testConfig(address))
	id := freshID()
	status, text, err := w.post(context.Background(), rig.Review(t, id, 1), "10s")
	rig.Must(t, err)
	want := "acquire " + id.String() + ": " + rig.UnreachedText(address)
	if status != http.StatusInternalServerError || !strings.Contains(text, want) {
		t.Errorf("got %d %q", status, text)
	}
	lines := w.log.WantLines(t, "admission", 1)
	if lines[0]["verdict"] != verdictFailed || lines[0]["error"] == "" || lines[0]["level"] != "ERROR" {
		t.Errorf("logged %v", lines)
	}
}

// While Redis hangs, an acquire is on its way, and the client disconnects or the deadline
// passes. Redis takes a token only if the webhook still waits for the reply; the webhook
// then gives it back.
func TestAbandonedAcquireTakesNothing(t *testing.T) {
	t.Parallel()
	const admissions = 5
	for name, abandon := range map[string]func(*testing.T, *testWebhook, []byte){
		"client gone": func(t *testing.T, w *testWebhook, body []byte) {
			// The requests' contexts, as the webhook has them.
			arrived := make(chan context.Context, admissions)
			handler := w.server.Config.Handler
			w.server.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				arrived <- r.Context()
				handler.ServeHTTP(rw, r)
			})
			ctx, leave := context.WithCancel(context.Background())
			var clients sync.WaitGroup
			for range admissions {
				clients.Go(func() {
					if _, _, err := w.post(ctx, body, "10s"); !errors.Is(err, context.Canceled) {
						t.Errorf("got %v, want %v", err, context.Canceled)
					}
				})
			}
			var requests []context.Context
			for range admissions {
				requests = append(requests, <-arrived)
			}
			leave()
			clients.Wait()
			for _, r := range requests {
				<-r.Done() // the webhook notices that its client has gone
			}
		},
		"deadline": func(t *testing.T, w *testWebhook, body []byte) {
			var clients sync.WaitGroup
			for range admissions {
				clients.Go(func() {
					start := time.Now()
					status, text, err := w.post(context.Background(), body, "2s")
					if err != nil || status != http.StatusInternalServerError ||
						!strings.Contains(text, "no answer of queue Redis") {
						t.Errorf("got %d %q, %v", status, text, err)
					}
					rig.WantWithin(t, time.Since(start), 2*time.Second, "the answer to an API server that waits for 2 s")
				})
			}
			clients.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := rig.StartRedis(t)
			w := startWebhook(t, testConfig(r.Address))
			id := freshID()
			w.wantAdmitted(t, id, 10)
			r.Pause(t)
			abandon(t, w, rig.Review(t, id, 10))
			r.Resume(t)
			rig.Eventually(t, 10*time.Second, func() error {
				// The first command, and those that were on their way.
				if n := r.CommandCalls(t)["hmget"] + r.CommandCalls(t)["time"]; n < 4 {
					return fmt.Errorf("Redis ran %d commands, want 4", n)
				}
				return nil
			})
			r.WantCounts(t, id, 9, 1)
			w.close() // waits for releases in the background
			r.WantCounts(t, id, 9, 1)
		})
	}
}

// brokenWriter is a connection that breaks when the reply is written.
type brokenWriter struct{ httptest.ResponseRecorder }

func (*brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestTokenOfUndeliverableReplyIsGivenBack(t *testing.T) {
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	body := strings.NewReader(string(rig.Review(t, id, 3)))
	request := httptest.NewRequest(http.MethodPost, "/mutate?timeout=10s", body)
	request.Header.Set("Content-Type", "application/json")
	w.mutate(new(brokenWriter), request)
	r.WantCounts(t, id, 3, 0)
	lines := w.log.WantLines(t, "admission", 1)
	if lines[0]["verdict"] != verdictUndeliverable || lines[0]["error"] != "deliver the answer: broken pipe" {
		t.Errorf("logged %v", lines)
	}
}

// A pod in mode wait has no token yet, so an undelivered reply is only a warning.
func TestUndeliverableReplyOfWaitingPod(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	body := strings.NewReader(string(rig.Review(t, freshID(), 3, whenFull(whenFullWait))))
	request := httptest.NewRequest(http.MethodPost, "/mutate?timeout=10s", body)
	request.Header.Set("Content-Type", "application/json")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	w.mutate(httptest.NewRecorder(), request.WithContext(ctx))
	lines := w.log.WantLines(t, "admission", 1)
	if lines[0]["verdict"] != verdictUndeliverable || lines[0]["level"] != "WARN" {
		t.Errorf("logged %v", lines)
	}
}

func TestOneLogLinePerAdmission(t *testing.T) {
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	token := w.wantAdmitted(t, id, 1)
	w.wantFull(t, id, 1, 1)
	w.admit(t, rig.Review(t, id, 0))
	want := []map[string]any{
		{"verdict": verdictAdmitted, "token": token},
		{"verdict": verdictFull, "token": "",
			"message": fmt.Sprintf("no semaphore available: %s has 1 of 1 tokens in use, by web-67d4947b99-... (", id)},
		{"verdict": verdictInvalid, "token": ""},
	}
	for i, line := range w.log.WantLines(t, "admission", len(want)) {
		want[i]["namespace"], want[i]["key"] = id.namespace, id.key
		want[i]["pod"], want[i]["level"] = "web-67d4947b99-", "INFO"
		for k, v := range want[i] {
			if got, _ := line[k].(string); got != v && (k != "message" || !strings.HasPrefix(got, v.(string))) {
				t.Errorf("line %d: %s is %v, want %v", i, k, line[k], v)
			}
		}
		if ms, ok := line["durationMs"].(float64); !ok || ms < 0 || ms > 60000 {
			t.Errorf("line %d: durationMs is %v", i, line["durationMs"])
		}
	}
}

// A closed webhook leaves no goroutines and no connections.
func TestClosedWebhookLeavesNothing(t *testing.T) {
	rig.SkipUnderSentinel(t)
	r := rig.StartRedis(t)
	goroutines := runtime.NumGoroutine()
	w := startWebhook(t, testConfig(r.Address))
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if i%2 == 0 { // the client disconnects at some point of the admission
				time.AfterFunc(time.Duration(i)*100*time.Microsecond, cancel)
			}
			_, _, err := w.post(ctx, rig.Review(t, semaphoreID{"shop", fmt.Sprint("left-", i%7)}, 20), "10s")
			if err != nil && i%2 == 1 {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	w.server.Client().CloseIdleConnections()
	w.close()
	rig.Eventually(t, 10*time.Second, func() error {
		if n := runtime.NumGoroutine(); n > goroutines {
			return fmt.Errorf("%d goroutines, want %d\n%s", n, goroutines, stacks())
		}
		clients, err := redis.String(r.Do(t, "CLIENT", "LIST"), nil)
		if err == nil && strings.Count(clients, "\n") != 1 {
			err = fmt.Errorf("connections left:\n%s", clients)
		}
		return err
	})
	keys, err := redis.Strings(r.Do(t, "KEYS", "*"), nil)
	rig.Must(t, err)
	for _, key := range keys {
		if ttl, err := redis.Int(r.Do(t, "TTL", key), nil); err != nil || ttl <= 0 {
			t.Errorf("%s has a time to live of %d, %v", key, ttl, err)
		}
		if strings.HasPrefix(key, "lock/") {
			t.Errorf("the lock %s is left", key)
		}
	}
}

func stacks() string {
	b := make([]byte, 1<<16)
	return string(b[:runtime.Stack(b, true)])
}

// After Redis is emptied or restarted, the webhook needs no restart, and no token is
// lost.
func TestRedisRestarted(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	for range 3 {
		rig.StartSidecar(t, r.Address, id, w.wantAdmitted(t, id, 4))
	}
	r.WantCounts(t, id, 1, 3)
	for range 3 {
		r.Stop()
		status, text, err := w.post(context.Background(), rig.Review(t, id, 4), "2s")
		rig.Must(t, err)
		if status != http.StatusInternalServerError {
			t.Errorf("without Redis: %d %s", status, text)
		}
		rig.Must(t, r.Start())
		token := w.wantAdmitted(t, id, 4) // the first attempt succeeds
		w.wantFull(t, id, 4, 4)
		w.semaphores.giveBack(id, token)
		r.WantCounts(t, id, 1, 3)
	}
	tokens := slices.Sorted(slices.Values(r.Inflight(t, id)))
	rig.Must(t, errOf(r.Control.Do("DEL", id.inflightKey())))
	rig.Eventually(t, 20*time.Second, func() error {
		if got := slices.Sorted(slices.Values(r.Inflight(t, id))); !slices.Equal(got, tokens) {
			return fmt.Errorf("in flight: %v, want %v again by the sidecars' heartbeats", got, tokens)
		}
		return nil
	})
}

func errOf(_ any, err error) error { return err }

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

// On SIGTERM during an admission, the webhook finishes the admission first.
func TestShutdownFinishesAdmissions(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	p := rig.StartProxy(t, r.Address)
	w := rig.StartWebhook(t, p.Address)
	id := freshID()
	if status, text, _, err := w.Post(rig.Review(t, id, 2)); err != nil || status != 200 {
		t.Fatal(status, text, err)
	}
	acquire := p.HoldFirst(t, id.inflightKey(), false)
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
	<-acquire.Held
	w.Signal(t, syscall.SIGTERM)
	w.WantLog(t, "stopping")
	acquire.Deliver()
	a := <-answered
	if a.err != nil || a.status != 200 || !strings.Contains(a.text, `"allowed":true`) {
		t.Errorf("got %+v, want allowed", a)
	}
	w.WantExit(t, 0)
	w.WantLog(t, "stopped")
	r.WantCounts(t, id, 0, 2)
}

// A webhook stops while an API server uses its connections, which go to another webhook
// from then on. No admission fails. Like an API server, the client speaks HTTP/1.1: it
// cannot repeat a request on a connection that the webhook closes under its hands.
func TestShutdownFailsNoAdmission(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	next := rig.StartWebhook(t, r.Address)
	for range 5 {
		stopped := next
		next = rig.StartWebhook(t, r.Address)
		var service atomic.Pointer[string] // where new connections go
		address := strings.TrimPrefix(stopped.URL, "https://")
		service.Store(&address)
		transport := &http.Transport{
			MaxIdleConnsPerHost: 25,
			IdleConnTimeout:     time.Second, // well before the webhook closes idle ones
			TLSClientConfig:     &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}},
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, *service.Load())
			},
		}
		client := &http.Client{Transport: transport}
		body := rig.Review(t, freshID(), 0) // is refused without Redis
		var asked, failed atomic.Int64
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for ctx.Err() == nil {
					asked.Add(1)
					response, err := client.Post(stopped.URL+"/mutate", "application/json", bytes.NewReader(body))
					if err == nil {
						_, err = io.Copy(io.Discard, response.Body)
						response.Body.Close()
					}
					if err != nil {
						failed.Add(1)
						t.Log(err)
					}
					_ = sleep(ctx, rand.N(10*time.Millisecond))
				}
			})
		}
		ask := func(more int64) {
			want := asked.Load() + more
			rig.Eventually(t, time.Minute, func() error {
				if n := asked.Load(); n < want {
					return fmt.Errorf("%d admissions, want %d", n, want)
				}
				return nil
			})
		}
		ask(200)
		successor := strings.TrimPrefix(next.URL, "https://")
		service.Store(&successor)
		stopped.Signal(t, syscall.SIGTERM)
		stopped.WantExit(t, 0)
		ask(100)
		cancel()
		wg.Wait()
		transport.CloseIdleConnections()
		if failed.Load() > 0 {
			t.Errorf("%d of %d admissions failed", failed.Load(), asked.Load())
		}
	}
}

func TestWebhookDoesNotStart(t *testing.T) {
	certs := t.TempDir()
	rig.WriteCertificate(t, certs, 1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	rig.Must(t, err)
	defer l.Close()
	_, taken, _ := net.SplitHostPort(l.Addr().String())
	for want, args := range map[string][]string{
		"--certDir: open ":                         {"--certDir=" + t.TempDir()},
		"--host and --port: listen tcp 127.0.0.1:": {"--certDir=" + certs, "--host=127.0.0.1", "--port=" + taken},
		"--metrics-bind-address: listen tcp 127.0.": {"--certDir=" + certs, "--host=127.0.0.1",
			"--port=" + rig.Port(rig.FreeAddress(t)), "--metrics-bind-address=127.0.0.1:" + taken},
	} {
		code, _, stderr := runArgs(nil, append([]string{"webhook"}, args...)...)
		if code != 1 || !strings.Contains(stderr, want) {
			t.Errorf("%v: exit code %d, %s", args, code, stderr)
		}
	}
}

// A webhook is ready while its queue accepts writes and it is not stopping.
func TestReadiness(t *testing.T) {
	t.Parallel()
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
		rig.Eventually(t, 10*time.Second, func() error { // an answer counts for a second, and Redis may be slow
			if c, got := get(path); c != code || !strings.Contains(got, text) {
				return fmt.Errorf("%s: got %d %q, want %d %q", path, c, got, code, text)
			}
			return nil
		})
	}
	want("/readyz", 200, "ok")
	want("/healthz", 200, "ok")
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", "1") // Redis answers, but refuses writes
	want("/readyz", 503, "NOREPLICAS")
	r.Do(t, "CONFIG", "SET", "min-replicas-to-write", "0")
	want("/readyz", 200, "ok")
	empty := r.Fill(t)
	want("/readyz", 503, "OOM")
	empty()
	want("/readyz", 200, "ok")
	r.Pause(t)
	away := "queue Redis " + r.Address
	if rig.TestQueue != "" {
		away = "queue Redis " // a look for the servers may fail first
	}
	want("/readyz", 503, away)
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

// However often /readyz is called, Redis gets about one command a second.
func TestReadinessIsShared(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	w.readiness.keep = readyFor
	rig.Must(t, errOf(w.ready(t.Context())))
	const calls = 1000
	before := r.CommandCalls(t)["evalsha"]
	concurrently(calls, func(int) {
		rec := httptest.NewRecorder()
		w.healthRoutes().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		if rec.Code != http.StatusOK {
			t.Errorf("got %d %s", rec.Code, rec.Body)
		}
	})
	if n := r.CommandCalls(t)["evalsha"] - before; n > calls/10 {
		t.Errorf("%d calls ran %d scripts", calls, n)
	}
}

// A Redis that may evict tokens is warned of once a minute, and serves on. A user that
// may not ask for its settings gets no warning.
func TestWarnsOfEviction(t *testing.T) {
	r := rig.StartRedis(t)
	c := testConfig(r.Address)
	const warning = "ok\nwarning: Redis may evict tokens, set maxmemory-policy noeviction: "
	for name, set := range map[string]struct {
		maxmemory, policy, rule string
		want                    string
	}{
		"evicts":         {"1gb", "volatile-lru", "-info " + rig.EvictionACL, warning + r.Address + " (volatile-lru)"},
		"refuses":        {"1gb", "noeviction", "+info", "ok"},
		"unbounded":      {"0", "allkeys-lru", "+info", "ok"},
		"may not ask it": {"1gb", "volatile-lru", "-info", "ok"},
	} {
		t.Run(name, func(t *testing.T) {
			r.Do(t, "CONFIG", "SET", "maxmemory", set.maxmemory)
			r.Do(t, "CONFIG", "SET", "maxmemory-policy", set.policy)
			r.Do(t, "ACL", append([]any{"SETUSER", "default"}, anySlice(strings.Fields(set.rule))...)...)
			w := startWebhook(t, c)
			for range 3 {
				text := ""
				rig.Eventually(t, 10*time.Second, func() (err error) { // a side question may get no answer in time
					if text, err = w.ready(t.Context()); err == nil && strings.TrimSpace("ok\n"+text) != set.want {
						err = fmt.Errorf("got %q, want %q", text, set.want)
					}
					return err
				})
			}
			want := 0
			if set.want != "ok" {
				want = 1
			}
			if lines := w.log.Lines(t, "Redis may evict tokens"); len(lines) != want {
				t.Errorf("logged %v, want %d lines", lines, want)
			}
		})
	}
}

// largeReview is a review of more than smallBody bytes.
func largeReview(t *testing.T, id semaphoreID) []byte {
	t.Helper()
	return rig.Review(t, id, maxLength, func(r map[string]any) {
		rig.AnnotationsOf(r)["large"] = strings.Repeat("x", 2*smallBody)
	})
}

// A pod that etcd accepts fits into a review, even if JSON escapes all of its text.
func TestReviewOfTheLargestPod(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	review := rig.Review(t, freshID(), 1, whenFull(whenFullWait), func(request map[string]any) {
		request["dryRun"] = true
		spec := request["object"].(map[string]any)["spec"].(map[string]any)
		container := spec["containers"].([]any)[0].(map[string]any)
		container["env"] = []any{map[string]any{"name": "A", "value": strings.Repeat("<&>", (1536<<10)/3)}}
	})
	var a rig.Admission
	rig.Eventually(t, time.Minute, func() error { // on a busy machine, the body may arrive too slowly
		status, text, err := w.post(t.Context(), review, "30s")
		if err == nil {
			a, err = rig.ReadAdmission(status, text)
		}
		return err
	})
	if !a.Allowed || a.Patch == nil {
		t.Errorf("got %d %s", a.Code, a.Message)
	}
}

// While Redis hangs, large requests wait up to a cap; further ones get 503 and "try
// again". Small requests are served meanwhile.
func TestLargeRequestsWait(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	w.wantAdmitted(t, id, maxLength)
	r.Pause(t)
	want := func(body []byte, timeout string, status int, text string) {
		got, answer, err := w.post(context.Background(), body, timeout)
		if err != nil || got != status || !strings.Contains(answer, text) {
			t.Errorf("got %d %s, %v, want %d %s", got, answer, err, status, text)
		}
	}
	var wg sync.WaitGroup
	for range maxLarge {
		wg.Go(func() { want(largeReview(t, id), "30s", http.StatusOK, "") })
	}
	rig.Eventually(t, 5*time.Second, func() error {
		if n := len(w.bounds.large); n != maxLarge {
			return fmt.Errorf("%d large requests wait, want %d", n, maxLarge)
		}
		return nil
	})
	var late sync.WaitGroup
	for range 6 {
		late.Go(func() { want(largeReview(t, id), "1s", http.StatusServiceUnavailable, "try again") })
		late.Go(func() { want(rig.Review(t, freshID(), 0), "10s", http.StatusOK, "422") }) // needs no Redis
	}
	late.Wait()
	r.Resume(t)
	wg.Wait()
	if failed := w.scrape(t)[metricsPrefix+`admission_duration_seconds_count{verdict="failed"}`]; failed != 6 {
		t.Errorf("the metrics count %v failed admissions, want 6", failed)
	}
	want(largeReview(t, id), "30s", http.StatusOK, "")
}

// fakeConn is a connection that tells of its end.
type fakeConn struct {
	net.Conn
	closed chan struct{}
}

func (c *fakeConn) Close() error { close(c.closed); return nil }

// opened opens connections of clients without a request.
func (b *bounds) opened(n int) (all []*fakeConn) {
	for range n {
		c := &fakeConn{closed: make(chan struct{})}
		b.note(c, http.StateNew)
		all = append(all, c)
	}
	return all
}

// call begins an authenticated request.
func (b *bounds) call(c *fakeConn) error {
	b.note(c, http.StateActive)
	r := new(http.Request)
	return b.noteAuthenticated(r.WithContext(context.WithValue(context.Background(), connectionKey{}, net.Conn(c))))
}

// wantEnded checks which connection was closed for a newer one: the only one of all.
func wantEnded(t *testing.T, all []*fakeConn, want int) {
	t.Helper()
	<-all[want].closed
	for i, c := range all {
		select {
		case <-c.closed:
			if i != want {
				t.Errorf("connection %d was closed, want only %d", i, want)
			}
		default:
		}
	}
}

// Beyond the cap, the oldest unauthenticated connection is closed, and no other.
func TestTooManyUnauthenticated(t *testing.T) {
	b := newBounds()
	caller := b.opened(1)
	rig.Must(t, b.call(caller[0]))
	b.note(caller[0], http.StateIdle)
	unauthenticated := b.opened(maxUnauthenticated)
	b.note(unauthenticated[0], http.StateClosed)
	all := append(append(caller, unauthenticated[1:]...), b.opened(2)...)
	wantEnded(t, all, 1)
	b.note(all[1], http.StateClosed)
	if n := b.open(); n != maxUnauthenticated+1 {
		t.Errorf("%d connections are open, want %d", n, maxUnauthenticated+1)
	}
}

// An API server closes a connection after 90 s without a request, and loses an admission
// on one that the webhook closed just then. The same holds for one that it did not use
// yet. A limit of the whole request would end the context of one that waits for Redis.
func TestAPIServerClosesConnections(t *testing.T) {
	s := newWebhookServer(http.NotFoundHandler(), nil, newBounds())
	if s.ReadHeaderTimeout <= 90*time.Second || s.IdleTimeout <= 90*time.Second || s.ReadTimeout != 0 {
		t.Errorf("the webhook closes a connection after %s without a first request, %s without another, "+
			"a request's after %s: want more than 90 s, and no limit of the whole request",
			s.ReadHeaderTimeout, s.IdleTimeout, s.ReadTimeout)
	}
}

// Beyond the cap, the caller that was idle longest is closed. If all are busy, the new
// one is refused.
func TestTooManyAuthenticated(t *testing.T) {
	b := newBounds()
	var all []*fakeConn
	for range maxAuthenticated {
		c := b.opened(1)[0]
		rig.Must(t, b.call(c))
		all = append(all, c)
	}
	late := b.opened(1)[0]
	var wrong *badRequest
	if err := b.call(late); !errors.As(err, &wrong) || wrong.status != http.StatusServiceUnavailable {
		t.Errorf("all are busy: got %v, want 503", err)
	}
	for _, i := range []int{5, 3, 4} {
		b.note(all[i], http.StateIdle)
	}
	rig.Must(t, b.call(all[5])) // used again
	rig.Must(t, b.call(late))
	wantEnded(t, append(all, late), 3)
}
