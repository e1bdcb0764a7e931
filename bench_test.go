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
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The parts of an admission, for benchstat: go test -run '^$' -bench . -count 10 . "make
// bench" measures it as a whole.

func benchmarkRequest(b *testing.B, change ...func(map[string]any)) *admissionRequest {
	b.Helper()
	r, err := decodeReview(rig.Review(b, freshID(), maxLength, change...))
	rig.Must(b, err)
	return r
}

func BenchmarkDecode(b *testing.B) {
	body := rig.Review(b, freshID(), maxLength)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		r, err := decodeReview(body)
		rig.Must(b, err)
		_, err = decodePod(r)
		rig.Must(b, err)
	}
}

// A decision without the token: decoding the pod, reading the annotations, and the patch.
func BenchmarkDecide(b *testing.B) {
	c := testConfig("127.0.0.1:6379") // never contacted
	s := newSemaphores(c.settings, nil, 1, slog.New(slog.DiscardHandler))
	defer s.queue.close()
	a := newAdmitter(c, s)
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
	c := testConfig("127.0.0.1:6379")
	p, err := decodePod(benchmarkRequest(b))
	rig.Must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		sidecarPatch(c, p, testID, testSpec, testToken)
	}
}

// One script acquires a token, another releases it.
func BenchmarkScript(b *testing.B) {
	c := testConfig(deployedRedis(b).Address)
	locks := newLocker(c.settings, lockConnections)
	s := newSemaphores(c.settings, locks, idleConnections, slog.New(slog.DiscardHandler))
	defer s.close(context.Background())
	id, pod := freshID(), newPodName("web-1", "")
	token, _, err := s.acquire(b.Context(), id, pod, maxLength, 10*time.Second) // makes the tokens
	rig.Must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		_, err := s.release(b.Context(), id, token)
		rig.Must(b, err)
		token = uuid.NewString()
		a, err := s.runAcquire(b.Context(), id, acquireRequest{token: token, length: maxLength, pod: pod})
		if err != nil || a.status != acquireTaken {
			b.Fatalf("acquire: got %+v, %v", a, err)
		}
	}
}

// annotated sets an annotation of the pod in a review.
func annotated(name, value string) func(map[string]any) {
	return func(request map[string]any) { rig.AnnotationsOf(request)[name] = value }
}

// Admissions without HTTP/2 and TLS, by verdict.
func BenchmarkAdmission(b *testing.B) {
	r := deployedRedis(b)
	for verdict, change := range map[string]func(map[string]any){
		verdictAdmitted: func(map[string]any) {},
		verdictWait:     annotated(annotationWhenFull, whenFullWait),
		verdictInvalid:  annotated(annotationLength, "many"),
		"none":          annotated(annotationEnabled, "false"),
	} {
		b.Run(verdict, func(b *testing.B) {
			w := startWebhook(b, testConfig(r.Address))
			w.webhook.log = slog.New(slog.NewJSONHandler(io.Discard, nil))
			handler, id := w.routes(), freshID()
			body := rig.Review(b, id, maxLength, change)
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				if n++; n%5000 == 0 { // makes new tokens
					b.StopTimer()
					r.MakeFree(b, id, 5000)
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

// deployedRedis starts a Redis that writes its file like the one in deploy/.
func deployedRedis(t testing.TB) *rig.Redis {
	t.Helper()
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "appendfsync", "everysec")
	return r
}
