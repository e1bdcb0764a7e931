package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// apiServer speaks HTTPS, asks for a token, and does to its clients what API servers and networks do. Behind it are pods: in a store of
// its own, or in a real API server.
type apiServer struct {
	settings kubernetesSettings // of its clients
	dir      string             // of the certificate and the token
	pods     http.Handler
	store    *apiStore // nil if the pods are in a real API server

	late sync.RWMutex // while it is locked, watches tell nothing, and then all that they have missed

	mu       sync.Mutex
	server   *http.Server
	token    string
	fault    apiFault
	watches  map[*servedWatch]bool
	requests []string // all, as METHOD PATH?QUERY
}

// apiFault handles a request in the API server's place, or reports false; it may change the request.
type apiFault func(w http.ResponseWriter, r *http.Request) bool

// startAPIServer starts an API server in front of a store of its own.
func startAPIServer(t *testing.T) *apiServer {
	t.Helper()
	store := newAPIStore()
	s := startAPIServerFor(t, store)
	s.store = store
	return s
}

func startAPIServerFor(t *testing.T, pods http.Handler) *apiServer {
	t.Helper()
	dir := t.TempDir()
	s := &apiServer{pods: pods, dir: dir, watches: map[*servedWatch]bool{}, settings: kubernetesSettings{address: freeAddress(t),
		caFile: filepath.Join(dir, "tls.crt"), tokenFile: filepath.Join(dir, "token")}}
	writeCertificate(t, dir, 1)
	s.setToken(t, "first-token")
	s.start(t)
	t.Cleanup(s.stop)
	return s
}

// setToken replaces the token, and the file of the clients.
func (s *apiServer) setToken(t *testing.T, token string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
	must(t, os.WriteFile(s.settings.tokenFile, []byte(token+"\n"), 0o600))
}

// start serves, with the certificate that is in its file now.
func (s *apiServer) start(t *testing.T) {
	t.Helper()
	pair, err := loadCertificate(s.dir, slog.New(slog.DiscardHandler))
	must(t, err)
	l, err := net.Listen("tcp", s.settings.address)
	must(t, err)
	server := &http.Server{Handler: s, TLSConfig: &tls.Config{GetCertificate: pair.get}, ErrorLog: log.New(io.Discard, "", 0)}
	s.mu.Lock()
	s.server = server
	s.mu.Unlock()
	go func() { _ = server.ServeTLS(l, "", "") }()
}

// stop closes all connections; the pods stay, and start goes on with them.
func (s *apiServer) stop() {
	s.mu.Lock()
	server := s.server
	s.mu.Unlock()
	server.Close()
}

// fail sets what is wrong from now on; nil for nothing.
func (s *apiServer) fail(fault apiFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests = append(s.requests, r.Method+" "+r.URL.String())
	fault, token := s.fault, s.token
	s.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+token {
		respond(w, 0, nil, failure(http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "Unauthorized"))
		return
	}
	if fault != nil && fault(w, r) {
		return
	}
	if !isWatch(r) {
		s.pods.ServeHTTP(w, r)
		return
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	served := &servedWatch{ResponseWriter: w, late: &s.late, drop: func() { cancel(http.ErrAbortHandler) }}
	s.mu.Lock()
	s.watches[served] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watches, served)
		s.mu.Unlock()
		if context.Cause(ctx) == http.ErrAbortHandler {
			panic(http.ErrAbortHandler)
		}
	}()
	s.pods.ServeHTTP(served, r.WithContext(ctx))
}

func isWatch(r *http.Request) bool { return r.URL.Query().Get("watch") == "true" }

// servedWatch is a watch under way.
type servedWatch struct {
	http.ResponseWriter
	late   *sync.RWMutex
	drop   func()
	silent atomic.Bool // what is written vanishes
}

func (w *servedWatch) Write(b []byte) (int, error) {
	w.late.RLock()
	defer w.late.RUnlock()
	if w.silent.Load() {
		return len(b), nil
	}
	return w.ResponseWriter.Write(b)
}

func (w *servedWatch) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// eachWatch does something to all watches under way, and returns how many there were.
func (s *apiServer) eachWatch(do func(*servedWatch)) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		do(w)
	}
	return len(s.watches)
}

func (s *apiServer) dropWatches() int { return s.eachWatch(func(w *servedWatch) { w.drop() }) }
func (s *apiServer) silenceWatches() int {
	return s.eachWatch(func(w *servedWatch) { w.silent.Store(true) })
}

// wantWatches waits until so many watches are under way.
func (s *apiServer) wantWatches(t *testing.T, want int) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		if got := s.eachWatch(func(*servedWatch) {}); got != want {
			return fmt.Errorf("%d watches, want %d", got, want)
		}
		return nil
	})
}

// count counts the requests so far that are so.
func (s *apiServer) count(is func(request string) bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(s.requests), func(r string) bool { return !is(r) }))
}

// direct sends a request to the pods, past the faults, and decodes the answer into out unless that is nil.
func (s *apiServer) direct(t *testing.T, method, path string, in, out any) {
	t.Helper()
	w := s.ask(t, method, path, in)
	if w.Code/100 != 2 {
		t.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
	}
	if out != nil {
		must(t, json.Unmarshal(w.Body.Bytes(), out))
	}
}

// ask is direct with any answer.
func (s *apiServer) ask(t *testing.T, method, path string, in any) *httptest.ResponseRecorder {
	t.Helper()
	var body []byte
	if in != nil {
		body = mustJSON(t, in)
	}
	r := httptest.NewRequest(method, path, bytes.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		r.Header.Set("Content-Type", "application/json-patch+json")
	}
	w := httptest.NewRecorder()
	s.pods.ServeHTTP(w, r)
	return w
}

// Gated pods, which no scheduler and no kubelet touches.
const (
	testGate  = annotationPrefix + "token"
	testLabel = annotationPrefix + "gated"
)

// testGatedPod is a pod with a gate of ours and one of others.
func testGatedPod(name string) *corev1.Pod {
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{testLabel: "true", "app": "test"},
			Annotations: map[string]string{annotationKey: "web", "example.org/note": "is not ours"}},
		Spec: corev1.PodSpec{SchedulingGates: []corev1.PodSchedulingGate{{Name: "example.org/other"}, {Name: testGate}},
			Containers: []corev1.Container{{Name: "app", Image: "example.org/app:v1"}}},
	}
}

// createPod creates a pod and returns it as it became.
func (s *apiServer) createPod(t *testing.T, namespace string, p *corev1.Pod) *corev1.Pod {
	t.Helper()
	created := new(corev1.Pod)
	s.direct(t, http.MethodPost, podsPath(namespace), p, created)
	return created
}

func (s *apiServer) deletePod(t *testing.T, namespace, name string) {
	t.Helper()
	s.direct(t, http.MethodDelete, podPath(namespace, name)+"?gracePeriodSeconds=0", nil, nil)
}

// label sets a label of a pod.
func (s *apiServer) label(t *testing.T, namespace, name, label, value string) {
	t.Helper()
	var steps patch
	steps.add(jsonText(value), "metadata", "labels", label)
	s.direct(t, http.MethodPatch, podPath(namespace, name), steps, nil)
}

// namespace is a new one.
func (s *apiServer) namespace(t *testing.T) string {
	t.Helper()
	name := "test-" + uuid.NewString()
	if s.store != nil {
		return name
	}
	object := map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name}}
	s.direct(t, http.MethodPost, "/api/v1/namespaces", object, nil)
	t.Cleanup(func() { s.direct(t, http.MethodDelete, "/api/v1/namespaces/"+name, nil, nil) })
	// A controller does that, too, in a moment; without it there are no pods.
	account := map[string]any{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": map[string]any{"name": "default"}}
	if w := s.ask(t, http.MethodPost, "/api/v1/namespaces/"+name+"/serviceaccounts", account); w.Code != http.StatusCreated && w.Code != http.StatusConflict {
		t.Fatalf("create a ServiceAccount: %d %s", w.Code, w.Body)
	}
	return name
}

// failWatches refuses so many watches.
func (s *apiServer) failWatches(times int32, code int32) {
	var n atomic.Int32
	s.fail(func(w http.ResponseWriter, r *http.Request) bool {
		if !isWatch(r) || n.Add(1) > times {
			return false
		}
		w.Header().Set("Retry-After", "1")
		respond(w, 0, nil, failure(code, "", "no watches now"))
		return true
	})
}

// expireWatches makes the API server forget what happened: the next watch is from a version that is too old.
func (s *apiServer) expireWatches() {
	if s.store != nil {
		s.store.compact()
		s.fail(nil)
		return
	}
	var once atomic.Bool
	s.fail(func(_ http.ResponseWriter, r *http.Request) bool {
		if query := r.URL.Query(); isWatch(r) && once.CompareAndSwap(false, true) {
			query.Set("resourceVersion", "1")
			r.URL.RawQuery = query.Encode()
		}
		return false
	})
}

// failEvents refuses so many events.
func (s *apiServer) failEvents(times int32) {
	var n atomic.Int32
	s.fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost || n.Add(1) > times {
			return false
		}
		respond(w, 0, nil, failure(http.StatusServiceUnavailable, "", "no events now"))
		return true
	})
}

// MarshalJSON implements json.Marshaler.
func (p patch) MarshalJSON() ([]byte, error) { return p.json(), nil }
