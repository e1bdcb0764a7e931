package rig

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// APIServer speaks HTTPS, requires a token, and simulates faults of API servers and
// networks. The pods are in its own store, or in a real API server.
type APIServer struct {
	Address   string
	Dir       string // of the certificate and the token
	CAFile    string
	TokenFile string

	Store *APIStore // nil if the pods are in a real API server

	// Late delays all watches: while it is locked, they send nothing. Then they send
	// everything that they have missed.
	Late sync.RWMutex

	pods http.Handler

	mu       sync.Mutex
	server   *http.Server
	token    string
	fault    APIFault
	watches  map[*servedWatch]bool
	requests []string // METHOD PATH?QUERY of each
}

// APIFault handles a request instead of the API server, or returns false. It may change
// the request.
type APIFault func(w http.ResponseWriter, r *http.Request) bool

// StartAPIServer starts an API server with its own store.
func StartAPIServer(t testing.TB) *APIServer {
	t.Helper()
	store := NewAPIStore()
	s := StartAPIServerFor(t, store)
	s.Store = store
	return s
}

// StartAPIServerFor starts an API server in front of existing pods.
func StartAPIServerFor(t testing.TB, pods http.Handler) *APIServer {
	t.Helper()
	dir := t.TempDir()
	s := &APIServer{Address: FreeAddress(t), Dir: dir, CAFile: filepath.Join(dir, "tls.crt"),
		TokenFile: filepath.Join(dir, "token"), pods: pods, watches: map[*servedWatch]bool{}}
	WriteCertificate(t, dir, 1)
	s.SetToken(t, "first-token")
	s.Start(t)
	t.Cleanup(s.Stop)
	return s
}

// SetToken replaces the token, and the clients' file.
func (s *APIServer) SetToken(t testing.TB, token string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
	Must(t, os.WriteFile(s.TokenFile, []byte(token+"\n"), 0o600))
}

// Start serves with the certificate that is in its file now.
func (s *APIServer) Start(t testing.TB) {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(s.Dir, "tls.crt"), filepath.Join(s.Dir, "tls.key"))
	Must(t, err)
	var l net.Listener
	Eventually(t, 10*time.Second, func() error { // a process that is just being started has the socket of before, too
		l, err = net.Listen("tcp", s.Address)
		return err
	})
	server := &http.Server{Handler: s, TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}},
		ErrorLog: log.New(io.Discard, "", 0)}
	s.mu.Lock()
	s.server = server
	s.mu.Unlock()
	go func() { _ = server.ServeTLS(l, "", "") }()
}

// Stop closes all connections. The pods stay, and Start serves them again.
func (s *APIServer) Stop() {
	s.mu.Lock()
	server := s.server
	s.mu.Unlock()
	server.Close()
}

// Fail sets the fault; nil: none.
func (s *APIServer) Fail(fault APIFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

func (s *APIServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests = append(s.requests, r.Method+" "+r.URL.String())
	fault, token := s.fault, s.token
	s.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+token {
		Respond(w, 0, nil, Failure(http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "Unauthorized"))
		return
	}
	if fault != nil && fault(w, r) {
		return
	}
	if !IsWatch(r) {
		s.pods.ServeHTTP(w, r)
		return
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	served := &servedWatch{ResponseWriter: w, late: &s.Late, drop: func() { cancel(http.ErrAbortHandler) }}
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

// IsWatch reports whether a request is a watch.
func IsWatch(r *http.Request) bool { return r.URL.Query().Get("watch") == "true" }

// servedWatch is an open watch.
type servedWatch struct {
	http.ResponseWriter
	late   *sync.RWMutex
	drop   func()
	silent atomic.Bool // writes are discarded
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

// eachWatch calls do for each open watch, and returns their number.
func (s *APIServer) eachWatch(do func(*servedWatch)) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		do(w)
	}
	return len(s.watches)
}

// DropWatches ends the connections of all watches, and returns their number.
func (s *APIServer) DropWatches() int { return s.eachWatch(func(w *servedWatch) { w.drop() }) }

// SilenceWatches makes all open watches send nothing more, and returns their number.
func (s *APIServer) SilenceWatches() int {
	return s.eachWatch(func(w *servedWatch) { w.silent.Store(true) })
}

// WantWatches waits until n watches are open.
func (s *APIServer) WantWatches(t testing.TB, want int) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		if got := s.eachWatch(func(*servedWatch) {}); got != want {
			return fmt.Errorf("%d watches, want %d", got, want)
		}
		return nil
	})
}

// Count counts the matching requests up to now. A request is METHOD PATH?QUERY.
func (s *APIServer) Count(matches func(request string) bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(s.requests), func(r string) bool { return !matches(r) }))
}

// Direct sends a request to the pods without faults. It must succeed. out receives the
// response unless it is nil.
func (s *APIServer) Direct(t testing.TB, method, path string, in, out any) {
	t.Helper()
	w := s.TryDirect(t, method, path, in)
	if w.Code/100 != 2 {
		t.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
	}
	if out != nil {
		Must(t, json.Unmarshal(w.Body.Bytes(), out))
	}
}

// TryDirect is Direct, but accepts any response.
func (s *APIServer) TryDirect(t testing.TB, method, path string, in any) *httptest.ResponseRecorder {
	t.Helper()
	var body []byte
	if in != nil {
		body = JSON(t, in)
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

// GatedPod returns a pod with our scheduling gate and one of another controller. No
// scheduler and no kubelet changes it.
func GatedPod(name string) *corev1.Pod {
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{LabelGated: "true", "app": "test"},
			Annotations: map[string]string{AnnotationKey: "web", "example.org/note": "is not ours"}},
		Spec: corev1.PodSpec{
			SchedulingGates: []corev1.PodSchedulingGate{{Name: "example.org/other"}, {Name: GateName}},
			Containers:      []corev1.Container{{Name: "app", Image: "example.org/app:v1"}}},
	}
}

// AdmittedPod returns a pod as the webhook admits it for a semaphore: with our scheduling
// gate only, and with the sidecar.
func AdmittedPod(name string, id ID, length, expiration int) *corev1.Pod {
	p := GatedPod(name)
	p.Spec.SchedulingGates = p.Spec.SchedulingGates[1:]
	p.Annotations = map[string]string{AnnotationEnabled: "true", AnnotationKey: id.Key,
		AnnotationLength: strconv.Itoa(length), AnnotationExpiration: strconv.Itoa(expiration)}
	p.Spec.InitContainers = []corev1.Container{{Name: SidecarName, Args: []string{"sidecar",
		"--redis-ca-file=/not/here/ca.crt", "--length=" + strconv.Itoa(length),
		"--expiration-seconds=" + strconv.Itoa(expiration), id.String(), "$(POD_UID)"}}, {Name: AwaitName, Args: []string{"await"}}}
	return p
}

// StopWaiting makes the sidecar of an admitted pod stop waiting after some seconds.
func StopWaiting(p *corev1.Pod, seconds int, whenWaited string) *corev1.Pod {
	sidecar := &p.Spec.InitContainers[0]
	sidecar.Args = append([]string{"sidecar", fmt.Sprintf("--wait-seconds=%d", seconds), "--when-waited=" + whenWaited},
		sidecar.Args[1:]...)
	return p
}

// MarkScheduled changes a pod as if its sidecar and await ran on a node.
func MarkScheduled(p *corev1.Pod) {
	now := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	p.Spec.NodeName = "node-1"
	p.Status.InitContainerStatuses = []corev1.ContainerStatus{
		{Name: SidecarName, Started: new(true), State: now}, {Name: AwaitName, State: now}}
}

// MarkRunning changes a pod as if a kubelet had started it: its sidecar runs, and its
// await has ended.
func MarkRunning(p *corev1.Pod) {
	MarkScheduled(p)
	p.Status.Phase = corev1.PodRunning
	p.Status.InitContainerStatuses[1] = corev1.ContainerStatus{
		Name: AwaitName, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}
}

func podsPath(namespace string) string      { return "/api/v1/namespaces/" + namespace + "/pods" }
func podPath(namespace, name string) string { return podsPath(namespace) + "/" + name }

// CreatePod creates a pod and returns the created object.
func (s *APIServer) CreatePod(t testing.TB, namespace string, p *corev1.Pod) *corev1.Pod {
	t.Helper()
	created := new(corev1.Pod)
	s.Direct(t, http.MethodPost, podsPath(namespace), p, created)
	return created
}

// DeletePod deletes a pod without a grace period.
func (s *APIServer) DeletePod(t testing.TB, namespace, name string) {
	t.Helper()
	s.Direct(t, http.MethodDelete, podPath(namespace, name)+"?gracePeriodSeconds=0", nil, nil)
}

// SetLabel sets a label of a pod.
func (s *APIServer) SetLabel(t testing.TB, namespace, name, label, value string) {
	t.Helper()
	steps := []patchStep{{"add", "/metadata/labels/" + escape(label), value}}
	s.Direct(t, http.MethodPatch, podPath(namespace, name), steps, nil)
}

// NewNamespace creates a namespace.
func (s *APIServer) NewNamespace(t testing.TB) string {
	t.Helper()
	name := "test-" + uuid.NewString()
	if s.Store != nil {
		_, status := s.Store.Namespaces.Create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
		if status != nil {
			t.Fatal(status.Message)
		}
		return name
	}
	object := map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name}}
	s.Direct(t, http.MethodPost, "/api/v1/namespaces", object, nil)
	t.Cleanup(func() { s.Direct(t, http.MethodDelete, "/api/v1/namespaces/"+name, nil, nil) })
	// A controller does that soon, too. Without it the API server accepts no pods.
	account := map[string]any{"apiVersion": "v1", "kind": "ServiceAccount",
		"metadata": map[string]any{"name": "default"}}
	w := s.TryDirect(t, http.MethodPost, "/api/v1/namespaces/"+name+"/serviceaccounts", account)
	if w.Code != http.StatusCreated && w.Code != http.StatusConflict {
		t.Fatalf("create a ServiceAccount: %d %s", w.Code, w.Body)
	}
	return name
}

// FailWatches makes the next watches fail.
func (s *APIServer) FailWatches(times int32, code int32) {
	var n atomic.Int32
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if !IsWatch(r) || n.Add(1) > times {
			return false
		}
		w.Header().Set("Retry-After", "1")
		Respond(w, 0, nil, Failure(code, "", "no watches now"))
		return true
	})
}

// ExpireWatches makes the API server drop its history: the version of the next watch is
// too old. A real one drops its history when it likes, so here it only seems to.
func (s *APIServer) ExpireWatches() {
	if s.Store != nil {
		s.Store.Compact()
		s.Fail(nil)
		return
	}
	var once atomic.Bool
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if !IsWatch(r) || !once.CompareAndSwap(false, true) {
			return false
		}
		event := map[string]any{"type": "ERROR", "object": tooOld(r.URL.Query().Get("resourceVersion"))}
		_ = json.NewEncoder(w).Encode(event)
		return true
	})
}

// tooOld is what the API server sends to a watch from a version that it no longer knows.
func tooOld(version string) metav1.Status {
	return metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Status: metav1.StatusFailure, Code: http.StatusGone, Reason: metav1.StatusReasonExpired,
		Message: "too old resource version: " + version}
}

// FailEvents makes the next events fail.
func (s *APIServer) FailEvents(times int32) {
	var n atomic.Int32
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost || n.Add(1) > times {
			return false
		}
		Respond(w, 0, nil, Failure(http.StatusServiceUnavailable, "", "no events now"))
		return true
	})
}

// CreateConfiguration creates the webhook's configuration as deploy/ does, without caBundle
// and path.
func (s *APIServer) CreateConfiguration(t testing.TB) {
	t.Helper()
	const name = "at-least-semaphore-pod-hook"
	c := &admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, webhook := range []string{"a", "warnings.a"} {
		c.Webhooks = append(c.Webhooks, admissionregistrationv1.MutatingWebhook{Name: webhook,
			ClientConfig: admissionregistrationv1.WebhookClientConfig{
				Service: &admissionregistrationv1.ServiceReference{Namespace: name, Name: "webhook"}}})
	}
	if _, status := s.Store.Webhooks.Create(c); status != nil {
		t.Fatal(status.Message)
	}
}
