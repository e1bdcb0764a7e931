package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/uuid"
)

// What an admission is made of, for benchstat: go test -run '^$' -bench . -count 10 . "make bench" measures it as a whole.

func benchmarkRequest(b *testing.B, change ...func(map[string]any)) *admissionRequest {
	b.Helper()
	r, err := decodeReview(review(b, freshID(), maxLength, change...))
	must(b, err)
	return r
}

func BenchmarkDecode(b *testing.B) {
	body := review(b, freshID(), maxLength)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		r, err := decodeReview(body)
		must(b, err)
		_, err = decodePod(r)
		must(b, err)
	}
}

// All of a decision but for the token: the decoding of the pod, the annotations, and the patch.
func BenchmarkDecide(b *testing.B) {
	c := testConfig("127.0.0.1:6379") // is not asked
	s := newSemaphores(c.sharedConfig, nil, 1, slog.New(slog.DiscardHandler))
	defer s.queue.close()
	a, err := newAdmitter(c, s)
	must(b, err)
	r := benchmarkRequest(b, func(request map[string]any) { request["dryRun"] = true })
	b.ReportAllocs()
	for b.Loop() {
		d, err := a.decide(b.Context(), r)
		if err != nil || d.verdict != verdictDryRun {
			b.Fatalf("%s, %v", d.verdict, err)
		}
	}
}

func BenchmarkPatch(b *testing.B) {
	i := mustInject(b, testConfig("127.0.0.1:6379"))
	p, err := decodePod(benchmarkRequest(b))
	must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		i.patch(p, testID, testSpec, testToken)
	}
}

// One script takes a token, another gives it back.
func BenchmarkScript(b *testing.B) {
	c := testConfig(deployedRedis(b).address)
	s := newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), idleConnections, slog.New(slog.DiscardHandler))
	defer s.close(context.Background())
	id, pod := freshID(), newPodName("web-1", "")
	token, _, err := s.acquire(b.Context(), id, pod, maxLength, 10*time.Second) // so that there are tokens
	must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		_, err := s.release(b.Context(), id, token)
		must(b, err)
		token = uuid.NewString()
		a, err := s.ask(b.Context(), id, question{token: token, length: maxLength, pod: pod})
		if err != nil || a.status != acquireTaken {
			b.Fatalf("%+v, %v", a, err)
		}
	}
}

// annotated changes an annotation of a review's pod.
func annotated(name, value string) func(map[string]any) {
	return func(request map[string]any) { annotationsOf(request)[name] = value }
}

// The webhook without HTTP/2 and TLS, by verdict.
func BenchmarkAdmission(b *testing.B) {
	r := deployedRedis(b)
	for verdict, change := range map[string]func(map[string]any){
		verdictAdmitted: func(map[string]any) {},
		verdictWait:     annotated(annotationWhenFull, whenFullWait),
		verdictInvalid:  annotated(annotationLength, "many"),
		"none":          annotated(annotationEnabled, "false"),
	} {
		b.Run(verdict, func(b *testing.B) {
			w := startWebhook(b, testConfig(r.address))
			w.webhook.log = slog.New(slog.NewJSONHandler(io.Discard, nil))
			handler, id := w.routes(), freshID()
			body := review(b, id, maxLength, change)
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				if n++; n%5000 == 0 { // so that there are tokens
					b.StopTimer()
					r.makeFree(b, id, 5000)
					b.StartTimer()
				}
				request := httptest.NewRequest(http.MethodPost, mutatePath+"?timeout=10s", bytes.NewReader(body))
				request.Header.Set("Content-Type", "application/json")
				answer := httptest.NewRecorder()
				if handler.ServeHTTP(answer, request); answer.Code != http.StatusOK {
					b.Fatal(answer.Body)
				}
			}
		})
	}
}

// deployedRedis is a Redis that writes its file as the one in deploy/ does.
func deployedRedis(t testing.TB) *redisServer {
	t.Helper()
	r := startRedis(t)
	r.do(t, "CONFIG", "SET", "appendfsync", "everysec")
	return r
}

// makeFree makes so many tokens of a semaphore free, and none in use.
func (s *redisServer) makeFree(t testing.TB, id semaphoreID, n int) {
	t.Helper()
	s.do(t, "DEL", id.queueKey(), id.inflightKey(), id.namesKey())
	for left := n; left > 0; left -= 1000 {
		s.do(t, "RPUSH", append([]any{id.queueKey()}, make([]any, min(left, 1000))...)...)
	}
}
