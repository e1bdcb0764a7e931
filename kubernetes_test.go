package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// newAPIServer is in front of the pods of the tests below: of a store of our own; with the tag e2e, of the API server of KUBECONFIG.
var newAPIServer = rig.StartAPIServer

// newClient is a client of a server, which works until the test ends, and its log.
func newClient(t *testing.T, c kubernetesSettings, change ...func(*kubernetes)) (*kubernetes, *rig.Log) {
	t.Helper()
	b := new(rig.Log)
	k, err := newKubernetes(c, slog.New(slog.NewJSONHandler(b, nil)))
	rig.Must(t, err)
	for _, c := range change {
		c(k)
	}
	inBackground(t, k.run)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the client:\n%s", b)
		}
	})
	return k, b
}

// inBackground runs something until the test ends.
func inBackground(t *testing.T, run func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// podRecorder is a handler that remembers.
type podRecorder struct {
	mu     sync.Mutex
	pods   map[string]*watchedPod // by name
	syncs  int
	told   int
	drops  []string
	wrongs []string
}

func (h *podRecorder) setPod(p *watchedPod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told++
	h.pods[p.name] = p
}

func (h *podRecorder) dropPod(p *watchedPod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drops = append(h.drops, p.name)
	switch now := h.pods[p.name]; {
	case now == nil:
		h.wrongs = append(h.wrongs, "told twice that there is no "+p.name)
	case now.uid == p.uid:
		delete(h.pods, p.name)
	}
}

func (h *podRecorder) synced(string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.syncs++
}

func (h *podRecorder) get(name string) *watchedPod {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pods[name]
}

// want waits until the handler has been told of these pods and no others, and has been synced so often.
func (h *podRecorder) want(t *testing.T, syncs int, names ...string) {
	t.Helper()
	rig.Eventually(t, 30*time.Second, func() error {
		h.mu.Lock()
		defer h.mu.Unlock()
		var got []string
		for name := range h.pods {
			got = append(got, name)
		}
		slices.Sort(got)
		if !slices.Equal(got, names) || h.syncs != syncs || h.wrongs != nil {
			return fmt.Errorf("told of %q after %d lists, want %q after %d; wrong: %q", got, h.syncs, names, syncs, h.wrongs)
		}
		return nil
	})
}

// watching is a client that watches a namespace.
type watching struct {
	*kubernetes
	*podRecorder
	log *rig.Log
}

const gatedSelector = rig.LabelGated + "=true"

func startWatching(t *testing.T, c kubernetesSettings, namespace string, change ...func(*kubernetes)) *watching {
	t.Helper()
	k, log := newClient(t, c, change...)
	h := &podRecorder{pods: map[string]*watchedPod{}}
	inBackground(t, func(ctx context.Context) { k.watchPods(ctx, gatedSelector, namespace, h) })
	return &watching{k, h, log}
}

func isList(r string) bool { return strings.HasPrefix(r, "GET ") && strings.Contains(r, "limit=") }
func isWatched(r string) bool {
	return strings.HasPrefix(r, "GET ") && strings.Contains(r, "watch=true")
}

// Lists in pages, and watches from where the list ended.
func TestKubernetesListsAndWatches(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	for i := range 7 {
		s.CreatePod(t, n, rig.GatedPod(fmt.Sprintf("p%d", i)))
	}
	other := rig.GatedPod("other")
	delete(other.Labels, rig.LabelGated)
	s.CreatePod(t, n, other)
	s.Fail(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.ProtoMajor != 2 {
			t.Errorf("%s %s by %s, not HTTP/2", r.Method, r.URL, r.Proto)
		}
		return false
	})
	k := startWatching(t, clientSettings(s), n, func(k *kubernetes) { k.bounds.page = 3 })
	k.want(t, 1, "p0", "p1", "p2", "p3", "p4", "p5", "p6")
	if got := s.Count(isList); got != 3 {
		t.Errorf("%d requests for seven pods in pages of three", got)
	}
	s.CreatePod(t, n, rig.GatedPod("p7"))
	s.SetLabel(t, n, "p1", annotationPrefix+"changed", "yes")
	left := k.get("p2")
	s.SetLabel(t, n, "p2", rig.LabelGated, "false")
	gone := k.get("p3")
	s.DeletePod(t, n, "p3")
	k.want(t, 1, "p0", "p1", "p4", "p5", "p6", "p7")
	rig.Eventually(t, 5*time.Second, func() error {
		if l := k.get("p1").labels; l[annotationPrefix+"changed"] != "yes" || l["app"] != "" {
			return fmt.Errorf("labels %v", l)
		}
		return nil
	})
	if p := k.get("p7"); p.namespace != n || p.phase != "Pending" || p.scheduled.reason != "SchedulingGated" || time.Since(p.created) > time.Minute ||
		!slices.Equal(p.gates, []string{"example.org/other", rig.GateName}) || len(p.annotations) != 1 || p.annotations[annotationKey] != "web" {
		t.Errorf("got %+v", p)
	}
	// A watch does not say why.
	if p, err := k.getPod(t.Context(), n, "p2", left.uid); err != nil || p.labels[rig.LabelGated] != "false" {
		t.Errorf("a pod that lost its label: %v, %+v", err, p)
	}
	if _, err := k.getPod(t.Context(), n, "p3", gone.uid); !errors.Is(err, errNoPod) {
		t.Errorf("a pod that was deleted: %v", err)
	}
	if _, err := k.getPod(t.Context(), n, "p4", gone.uid); !errors.Is(err, errNoPod) {
		t.Errorf("another pod of the name: %v", err)
	}
}

// All namespaces, or some.
func TestKubernetesNamespaces(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	a, b := s.NewNamespace(t), s.NewNamespace(t)
	s.CreatePod(t, a, rig.GatedPod("in-a"))
	one, all := startWatching(t, clientSettings(s), a), startWatching(t, clientSettings(s), "")
	s.CreatePod(t, b, rig.GatedPod("in-b"))
	one.want(t, 1, "in-a")
	rig.Eventually(t, 10*time.Second, func() error {
		if p, q := all.get("in-a"), all.get("in-b"); p == nil || q == nil || p.namespace != a || q.namespace != b {
			return fmt.Errorf("told of %v and %v", p, q)
		}
		return nil
	})
}

// What ends a watch costs no list, as long as the API server knows what happened since.
func TestKubernetesWatchEnds(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*testing.T, *rig.APIServer){
		"dropped":  func(_ *testing.T, s *rig.APIServer) { s.DropWatches() },
		"silent":   func(_ *testing.T, s *rig.APIServer) { s.SilenceWatches() },
		"over":     func(*testing.T, *rig.APIServer) {}, // each second
		"restart":  func(t *testing.T, s *rig.APIServer) { s.Stop(); s.Start(t) },
		"token":    func(t *testing.T, s *rig.APIServer) { s.SetToken(t, "second-token"); s.DropWatches() },
		"CA":       func(t *testing.T, s *rig.APIServer) { rig.WriteCertificate(t, s.Dir, 2); s.Stop(); s.Start(t) },
		"failures": func(_ *testing.T, s *rig.APIServer) { s.FailWatches(2, http.StatusServiceUnavailable); s.DropWatches() },
		"too many": func(_ *testing.T, s *rig.APIServer) { s.FailWatches(1, http.StatusTooManyRequests); s.DropWatches() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.NewNamespace(t)
			s.CreatePod(t, n, rig.GatedPod("old"))
			s.CreatePod(t, n, rig.GatedPod("gone"))
			k := startWatching(t, clientSettings(s), n, func(k *kubernetes) {
				k.bounds.silence = 2 * time.Second
				if name == "over" {
					k.bounds.length = time.Second
				}
			})
			k.want(t, 1, "gone", "old")
			s.WantWatches(t, 1)
			watches := s.Count(isWatched)
			end(t, s)
			s.DeletePod(t, n, "gone")
			s.CreatePod(t, n, rig.GatedPod("new"))
			k.want(t, 1, "new", "old")
			rig.Eventually(t, 20*time.Second, func() error {
				if s.Count(isWatched) == watches {
					return errors.New("there is no other watch")
				}
				return nil
			})
			s.CreatePod(t, n, rig.GatedPod("newer"))
			k.want(t, 1, "new", "newer", "old")
		})
	}
}

// A connection that falls silent, with the watch on it, is found by asking.
func TestKubernetesSilentConnection(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	proxy := rig.StartProxy(t, s.Address)
	c := clientSettings(s)
	c.address = proxy.Address
	k := startWatching(t, c, n)
	k.want(t, 1)
	s.WantWatches(t, 1)
	proxy.Silence()
	s.CreatePod(t, n, rig.GatedPod("p"))
	start := time.Now()
	k.want(t, 1, "p")
	if took := time.Since(start); took > pingAfter+pingTimeout+3*time.Second {
		t.Errorf("found after %s", took)
	}
}
