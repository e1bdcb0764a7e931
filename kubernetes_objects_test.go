package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// newAPIServer starts the API server of the tests below: one with a store of our own or,
// with the tag e2e, the one of KUBECONFIG.
var newAPIServer = rig.StartAPIServer

// newClient returns a client of a server, which works until the test ends, and the
// client's log.
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

// inBackground runs a function until the test ends.
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

// podRecorder is a handler that records its calls.
type podRecorder struct {
	mu     sync.Mutex
	pods   map[string]*watchedPod // by name
	syncs  int
	drops  []string
	wrongs []string
}

func (h *podRecorder) setPod(p *watchedPod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pods[p.name] = p
}

func (h *podRecorder) dropPod(p *watchedPod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drops = append(h.drops, p.name)
	switch now := h.pods[p.name]; {
	case now == nil:
		h.wrongs = append(h.wrongs, "dropped twice: "+p.name)
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

// want waits until the handler has exactly these pods, and as many calls of synced.
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
			return fmt.Errorf("pods %q after %d lists, want %q after %d; wrong: %q",
				got, h.syncs, names, syncs, h.wrongs)
		}
		return nil
	})
}

// watching is a client that watches a namespace.
type watching struct {
	*kubernetes
	*podRecorder
	log   *rig.Log
	watch *podWatch
}

const gatedSelector = rig.LabelGated + "=true"

func startWatching(t *testing.T, c kubernetesSettings, namespace string, change ...func(*kubernetes)) *watching {
	t.Helper()
	k, log := newClient(t, c, change...)
	h := &podRecorder{pods: map[string]*watchedPod{}}
	w := k.newPodWatch(gatedSelector, namespace, h)
	inBackground(t, w.run)
	return &watching{k, h, log, w}
}

func isList(r string) bool { return strings.HasPrefix(r, "GET ") && strings.Contains(r, "limit=") }
func isWatched(r string) bool {
	return strings.HasPrefix(r, "GET ") && strings.Contains(r, "watch=true")
}

// The client lists in pages, and watches from the end of the list.
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
		t.Errorf("%d list requests for seven pods in pages of three", got)
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
			return fmt.Errorf("the labels are still %v", l)
		}
		return nil
	})
	if p := k.get("p7"); p.namespace != n || p.phase != "Pending" || p.unscheduledReason != "SchedulingGated" ||
		time.Since(p.created) > time.Minute || !slices.Equal(p.gates, []string{"example.org/other", rig.GateName}) ||
		len(p.annotations) != 1 || p.annotations[annotationKey] != "web" {
		t.Errorf("got %+v", p)
	}
	// A watch does not say why a pod disappeared; a get does.
	if p, err := k.getPod(t.Context(), n, "p2", left.uid); err != nil || p.labels[rig.LabelGated] != "false" {
		t.Errorf("get of a pod without its label: %v, %+v", err, p)
	}
	if _, err := k.getPod(t.Context(), n, "p3", gone.uid); !errors.Is(err, errNotFound) {
		t.Errorf("get of a deleted pod: %v", err)
	}
	if _, err := k.getPod(t.Context(), n, "p4", gone.uid); !errors.Is(err, errNotFound) {
		t.Errorf("get of another pod of the same name: %v", err)
	}
}

// The client watches all namespaces, or some.
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
			return fmt.Errorf("the watch has the pods %v and %v", p, q)
		}
		return nil
	})
}

// When a watch ends, the client does not list again, as long as the API server knows the
// version. It lists after a silence.
func TestKubernetesWatchEnds(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*testing.T, *rig.APIServer){
		"dropped": func(_ *testing.T, s *rig.APIServer) { s.DropWatches() },
		"silent":  func(_ *testing.T, s *rig.APIServer) { s.SilenceWatches() },
		"over":    func(*testing.T, *rig.APIServer) {}, // each second
		"restart": func(t *testing.T, s *rig.APIServer) { s.Stop(); s.Start(t) },
		"token":   func(t *testing.T, s *rig.APIServer) { s.SetToken(t, "second-token"); s.DropWatches() },
		"CA":      func(t *testing.T, s *rig.APIServer) { rig.WriteCertificate(t, s.Dir, 2); s.Stop(); s.Start(t) },
		"failures": func(_ *testing.T, s *rig.APIServer) {
			s.FailWatches(2, http.StatusServiceUnavailable)
			s.DropWatches()
		},
		"too many": func(_ *testing.T, s *rig.APIServer) {
			s.FailWatches(1, http.StatusTooManyRequests)
			s.DropWatches()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.NewNamespace(t)
			s.CreatePod(t, n, rig.GatedPod("old"))
			s.CreatePod(t, n, rig.GatedPod("gone"))
			k := startWatching(t, clientSettings(s), n, func(k *kubernetes) {
				switch name {
				case "silent":
					k.bounds.silence = 2 * time.Second
				case "over":
					k.bounds.length = time.Second
				}
			})
			k.want(t, 1, "gone", "old")
			s.WantWatches(t, 1)
			watches := s.Count(isWatched)
			end(t, s)
			s.DeletePod(t, n, "gone")
			s.CreatePod(t, n, rig.GatedPod("new"))
			lists := 1
			if name == "silent" {
				lists = 2 // what the silent watch has not sent may be much
			}
			k.want(t, lists, "new", "old")
			rig.Eventually(t, 20*time.Second, func() error {
				if s.Count(isWatched) == watches {
					return errors.New("the client has not watched again")
				}
				return nil
			})
			s.CreatePod(t, n, rig.GatedPod("newer"))
			k.want(t, lists, "new", "newer", "old")
		})
	}
}

// The client detects a silent connection, with its watch, by a ping.
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
	rig.WantWithin(t, time.Since(start), pingAfter+pingTimeout+3*time.Second,
		"finding a pod behind a silent connection")
}

// All kept fields of a pod, as Kubernetes writes them.
func TestWatchedPod(t *testing.T) {
	t.Parallel()
	at := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	p := rig.GatedPod("p")
	p.Namespace, p.UID, p.ResourceVersion, p.CreationTimestamp, p.DeletionTimestamp = "shop", "some-uid", "7", at, &at
	p.Spec.NodeName = "node1"
	p.Spec.InitContainers = []corev1.Container{{Name: "other", Args: []string{"x"}},
		{Name: sidecarName, Args: []string{"sidecar", "--length=3"}}}
	p.Status = corev1.PodStatus{
		Phase: corev1.PodPending,
		Conditions: []corev1.PodCondition{
			{Type: corev1.PodReady, Status: "True"}, {Type: corev1.PodScheduled, Status: "False",
				Reason: "Unschedulable", Message: strings.Repeat("x", 9000), LastTransitionTime: at}},
		InitContainerStatuses: []corev1.ContainerStatus{
			{Name: "other", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at}}},
			{Name: sidecarName, Started: new(true),
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at}}},
			{Name: awaitName,
				State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: at}}},
		},
	}
	var o podObject
	rig.Must(t, json.Unmarshal(mustJSON(t, p), &o))
	got := fmt.Sprintf("%+v", *o.watched())
	want := fmt.Sprintf("%+v", watchedPod{
		namespace: "shop", name: "p", uid: "some-uid", version: "7", created: at.Time, deleted: true,
		labels: map[string]string{rig.LabelGated: "true"}, annotations: map[string]string{annotationKey: "web"},
		gates: []string{"example.org/other", rig.GateName}, sidecarArgs: "sidecar\x00--length=3",
		phase: "Pending", unscheduledReason: "Unschedulable", conditions: []string{"Ready", conditionScheduled},
		initContainers: []initContainer{{sidecarName, "running"}, {awaitName, "terminated"}},
	})
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A list of pods with many fields that we ignore. An empty list has null for items.
func TestReadPods(t *testing.T) {
	for text, want := range map[string]string{
		`{"kind": "PodList", "metadata": {"resourceVersion": "7"}, "items": null}`: "0 pods, " +
			"{ResourceVersion:7 Continue:}, <nil>",
		`{"items": [{}, {}], "metadata": {"resourceVersion": "7", "continue": "x"}}`: "2 pods, " +
			"{ResourceVersion:7 Continue:x}, <nil>",
		`{"items": [{}`: "1 pods, {ResourceVersion: Continue:}, EOF",
		`{"items": [{}, {"metadata": 3}]}`: "1 pods, {ResourceVersion: Continue:}, json: " +
			"cannot unmarshal number into Go struct field podObject.metadata of type struct",
		`{"metadata": {"resourceVersion": "7"}, "items": [{}]`: "1 pods, {ResourceVersion:7 Continue:}, EOF",
	} {
		n := 0
		meta, err := readList(strings.NewReader(text), readPod, func(*watchedPod) { n++ })
		if got := fmt.Sprintf("%d pods, %+v, %v", n, meta, err); !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}

// Thousands of pods fit into a few MiB, whatever their other fields.
func TestWatchedPodsAreSmall(t *testing.T) {
	const pods, most = 2000, 1400 // pods, and bytes for each
	r, w := io.Pipe()
	go func() {
		p := rig.GatedPod("")
		p.Namespace, p.Status.Phase = "shop", corev1.PodPending
		p.Annotations["example.org/config"] = strings.Repeat("x", 5000)
		p.Status.Conditions = []corev1.PodCondition{{
			Type: corev1.PodScheduled, Status: "False", Reason: corev1.PodReasonSchedulingGated,
		}}
		fmt.Fprint(w, `{"metadata": {}, "items": [`)
		for i := range pods {
			p.Name, p.ResourceVersion = fmt.Sprintf("gated-pod-of-a-deployment-%d", i), fmt.Sprint(i)
			p.UID = "1d3e5f70-0000-4000-8000-000000000000"
			if i > 0 {
				fmt.Fprint(w, ",")
			}
			_ = json.NewEncoder(w).Encode(p)
		}
		fmt.Fprint(w, "]}")
		w.Close()
	}()
	known := map[string]*watchedPod{}
	before := heap()
	_, err := readList(r, readPod, func(p *watchedPod) { known[uuid.NewString()] = p })
	rig.Must(t, err)
	each := (heap() - before) / pods
	t.Logf("%d bytes a pod", each)
	if len(known) != pods || each > most {
		t.Errorf("%d pods of %d bytes each, want %d of %d at most", len(known), each, pods, most)
	}
	runtime.KeepAlive(known)
}

// heap returns the bytes of the heap in use.
func heap() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// If the API server no longer knows the version, a new list reports the changes,
// deletions too.
func TestKubernetesExpired(t *testing.T) {
	t.Parallel()
	for name, expire := range map[string]func(*rig.APIServer){
		"event":  func(s *rig.APIServer) { s.ExpireWatches() },
		"status": func(s *rig.APIServer) { s.FailWatches(1, http.StatusGone) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.NewNamespace(t)
			s.CreatePod(t, n, rig.GatedPod("old"))
			s.CreatePod(t, n, rig.GatedPod("gone"))
			s.CreatePod(t, n, rig.GatedPod("early"))
			k := startWatching(t, clientSettings(s), n)
			k.want(t, 1, "early", "gone", "old")
			s.WantWatches(t, 1)
			s.DeletePod(t, n, "early") // the later list must not report it again
			k.want(t, 1, "gone", "old")
			s.FailWatches(1000, http.StatusInternalServerError)
			s.DropWatches()
			s.WantWatches(t, 0)
			s.DeletePod(t, n, "gone")
			s.CreatePod(t, n, rig.GatedPod("new"))
			again := s.CreatePod(t, n, rig.GatedPod("gone")) // a new pod of the same name
			expire(s)
			k.want(t, 2, "gone", "new", "old")
			if got := k.get("gone").uid; got != string(again.UID) {
				t.Errorf("the UID of the pod is %s, want that of the new pod", got)
			}
			if !slices.Equal(k.drops, []string{"early", "gone"}) {
				t.Errorf("dropped pods: %q, want early and gone", k.drops)
			}
			s.DeletePod(t, n, "gone")
			k.want(t, 2, "new", "old")
		})
	}
}

// A list that expires between pages starts again, and loses no pod that was reported.
func TestKubernetesExpiredList(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	for i := range 5 {
		s.CreatePod(t, n, rig.GatedPod(fmt.Sprintf("p%d", i)))
	}
	expired := sync.OnceFunc(func() { s.DeletePod(t, n, "p0") })
	var refused bool
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("continue") == "" || refused {
			return false
		}
		refused = true
		expired()
		if s.Store != nil {
			s.Store.Compact()
			return false
		}
		rig.Respond(w, 0, nil, rig.Failure(http.StatusGone, "Expired",
			"The provided continue parameter is too old to display a consistent list result."))
		return true
	})
	k := startWatching(t, clientSettings(s), n, func(k *kubernetes) { k.bounds.page = 2 })
	k.want(t, 1, "p1", "p2", "p3", "p4")
	if !slices.Equal(k.drops, []string{"p0"}) {
		t.Errorf("dropped pods: %q, want p0", k.drops)
	}
}

// A bookmark counts as an event: changes of other pods do not make the watch expire.
func TestKubernetesBookmarks(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	if s.Store == nil {
		t.Skip("bookmarks take a minute on a real API server")
	}
	n := s.NewNamespace(t)
	s.CreatePod(t, n, rig.GatedPod("p"))
	other := rig.GatedPod("other")
	delete(other.Labels, rig.LabelGated)
	s.CreatePod(t, n, other)
	k := startWatching(t, clientSettings(s), n)
	k.want(t, 1, "p")
	s.SetLabel(t, n, "other", "example.org/changed", "yes")
	changed := time.Now()
	before, _ := s.Store.Get(n, "other")
	s.Store.WantBookmark(t, before.ResourceVersion)
	rig.Eventually(t, 10*time.Second, func() error {
		if since := time.Since(changed); k.watch.silent() > since {
			return fmt.Errorf("the client has heard nothing for %s", since)
		}
		return nil
	})
	s.Store.Compact()
	s.DropWatches()
	rig.Eventually(t, 10*time.Second, func() error {
		if got := s.Count(isWatched); got < 2 {
			return fmt.Errorf("%d watches, want 2", got)
		}
		return nil
	})
	s.CreatePod(t, n, rig.GatedPod("q"))
	k.want(t, 1, "p", "q") // a client that ignores bookmarks has to list again
}

// Failing requests are retried with backoff.
func TestKubernetesBacksOff(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]rig.APIFault{
		"refused": func(w http.ResponseWriter, _ *http.Request) bool {
			rig.Respond(w, 0, nil, rig.Failure(http.StatusInternalServerError, "InternalError",
				"etcdserver: no leader"))
			return true
		},
		"forbidden": func(w http.ResponseWriter, _ *http.Request) bool {
			rig.Respond(w, 0, nil, rig.Failure(http.StatusForbidden, "Forbidden", "pods is forbidden"))
			return true
		},
		"nonsense":  func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, `{"items": 3}`); return true },
		"hangs up":  func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
		"no events": func(_ http.ResponseWriter, r *http.Request) bool { return rig.IsWatch(r) },
		"too old": func(w http.ResponseWriter, r *http.Request) bool {
			if rig.IsWatch(r) {
				rig.Respond(w, 0, nil, rig.Failure(http.StatusGone, "Expired", "too old resource version"))
			}
			return rig.IsWatch(r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.NewNamespace(t)
			var mu sync.Mutex
			var first, fifth time.Time
			attempts := 0
			s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
				mu.Lock()
				if rig.IsWatch(r) || name != "no events" && name != "too old" {
					if attempts++; attempts == 1 {
						first = time.Now()
					} else if attempts == 5 {
						fifth = time.Now()
					}
				}
				mu.Unlock()
				return fault(w, r)
			})
			k := startWatching(t, clientSettings(s), n)
			rig.Eventually(t, 30*time.Second, func() error {
				mu.Lock()
				defer mu.Unlock()
				if fifth.IsZero() {
					return fmt.Errorf("%d attempts, want 5", attempts)
				}
				return nil
			})
			// The waits are 0.2, 0.4, 0.8 and 1.6 s, with jitter down to a half.
			if took := fifth.Sub(first); took < 1500*time.Millisecond {
				t.Errorf("five attempts in %s, want at least 1.5 s", took)
			}
			if got := len(k.log.Lines(t, "watch of pods ended, tries again")); got != 1 && name != "no events" {
				t.Errorf("%d log lines, want one a minute", got)
			}
			s.Fail(nil)
			s.CreatePod(t, n, rig.GatedPod("p"))
			rig.Eventually(t, 30*time.Second, func() error {
				if k.get("p") == nil {
					return errors.New("the watch has not reported the pod")
				}
				return nil
			})
		})
	}
}

// The client waits as long as Retry-After says.
func TestKubernetesRetryAfter(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	s.CreatePod(t, n, rig.GatedPod("p"))
	refused := make(chan time.Time, 1)
	var again time.Time
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case refused <- time.Now():
			w.Header().Set("Retry-After", "2")
			rig.Respond(w, 0, nil, rig.Failure(http.StatusTooManyRequests, "TooManyRequests",
				"the server has received too many requests"))
			return true
		default:
			if again.IsZero() {
				again = time.Now()
			}
			return false
		}
	})
	k := startWatching(t, clientSettings(s), n)
	k.want(t, 1, "p")
	if took := again.Sub(<-refused); took < 2*time.Second {
		t.Errorf("the client retried after %s", took)
	}
}
