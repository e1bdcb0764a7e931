package rig

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// APIStore holds pods and events, and serves them like a real API server: lists in pages
// of one version, watches from a version with bookmarks and a bounded history, and JSON
// patches. Nothing schedules or runs the pods: see Change. The store replaces pods and
// never modifies them.
type APIStore struct {
	*http.ServeMux
	BookmarkEvery time.Duration // a minute in a real API server
	HistoryMost   int           // largest number of changes in the history

	mu        sync.Mutex
	version   int
	pods      map[string]*corev1.Pod // by NAMESPACE/NAME
	history   []podChange
	compacted int                      // the version up to which the history is gone
	pages     map[string][]*corev1.Pod // the rest of a list, by "continue"
	changed   chan struct{}            // each change closes and replaces it
	marked    int                      // the version of the last bookmark
	events    []eventsv1.Event
	policy    PodPolicy // nil: accepts all patches
}

// PodPolicy judges a patch that has been applied, as a ValidatingAdmissionPolicy does. It
// returns why it refuses the patch; empty if it accepts.
type PodPolicy func(before, after *corev1.Pod) (refusal string)

// SetPolicy sets the policy; nil accepts all patches. Without another reason in its
// manifest, a policy answers "Invalid", with the code 422.
func (s *APIStore) SetPolicy(p PodPolicy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy = p
}

// podChange is one version. before is nil for a new pod, and after for a deleted pod.
type podChange struct {
	version       int
	before, after *corev1.Pod
}

// NewAPIStore makes an empty store.
func NewAPIStore() *APIStore {
	s := &APIStore{ServeMux: http.NewServeMux(), BookmarkEvery: 100 * time.Millisecond, HistoryMost: 1000,
		version: 1000, compacted: 1000,
		pods: map[string]*corev1.Pod{}, pages: map[string][]*corev1.Pod{}, changed: make(chan struct{})}
	const pods, pod = "/api/v1/namespaces/{namespace}/pods", "/api/v1/namespaces/{namespace}/pods/{name}"
	s.HandleFunc("GET /api/v1/pods", s.servePods)
	s.HandleFunc("GET "+pods, s.servePods)
	s.HandleFunc("POST "+pods, s.serveCreate)
	s.HandleFunc("GET "+pod, func(w http.ResponseWriter, r *http.Request) {
		p, status := s.Get(r.PathValue("namespace"), r.PathValue("name"))
		Respond(w, http.StatusOK, p, status)
	})
	s.HandleFunc("DELETE "+pod, func(w http.ResponseWriter, r *http.Request) {
		now := r.URL.Query().Get("gracePeriodSeconds") == "0"
		p, status := s.Delete(r.PathValue("namespace"), r.PathValue("name"), now)
		Respond(w, http.StatusOK, p, status)
	})
	s.HandleFunc("PATCH "+pod, s.servePatch)
	const events = "/apis/events.k8s.io/v1/namespaces/{namespace}/events"
	s.HandleFunc("POST "+events, s.serveEvent)
	s.HandleFunc("GET "+events, func(w http.ResponseWriter, r *http.Request) {
		Respond(w, http.StatusOK, eventsv1.EventList{Items: s.EventsOf(r.PathValue("namespace"))}, nil)
	})
	return s
}

// Get returns a pod, or the Status "not found".
func (s *APIStore) Get(namespace, name string) (*corev1.Pod, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pods[namespace+"/"+name]; p != nil {
		return p, nil
	}
	return nil, Failure(http.StatusNotFound, metav1.StatusReasonNotFound, "pods %q not found", name)
}

// put makes a change. The caller holds s.mu.
func (s *APIStore) put(before, after *corev1.Pod) {
	s.version++
	if after == nil {
		delete(s.pods, before.Namespace+"/"+before.Name)
	} else {
		after.ResourceVersion = strconv.Itoa(s.version)
		s.pods[after.Namespace+"/"+after.Name] = after
	}
	s.history = append(s.history, podChange{s.version, before, after})
	if gone := len(s.history) - s.HistoryMost; gone > 0 {
		s.forget(gone)
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *APIStore) forget(changes int) {
	if changes > 0 {
		s.compacted = s.history[changes-1].version
		s.history = slices.Clone(s.history[changes:])
	}
}

// Compact drops the history, and the lists that clients are reading.
func (s *APIStore) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(len(s.history))
	clear(s.pages)
}

// Create adds a pod.
func (s *APIStore) Create(p *corev1.Pod) (*corev1.Pod, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p = p.DeepCopy()
	if p.Name == "" {
		p.Name = p.GenerateName + uuid.NewString()[:5]
	}
	if s.pods[p.Namespace+"/"+p.Name] != nil {
		return nil, Failure(http.StatusConflict, metav1.StatusReasonAlreadyExists, "pods %q already exists", p.Name)
	}
	p.TypeMeta = metav1.TypeMeta{}
	p.UID = types.UID(uuid.NewString())
	if p.CreationTimestamp.IsZero() { // a test may set it
		p.CreationTimestamp = metav1.NewTime(time.Now().Truncate(time.Second))
	}
	p.Status.Phase = cmp.Or(p.Status.Phase, corev1.PodPending)
	if len(p.Spec.SchedulingGates) > 0 && len(p.Status.Conditions) == 0 {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse,
			Reason:  corev1.PodReasonSchedulingGated,
			Message: "Scheduling is blocked due to non-empty scheduling gates"}}
	}
	s.put(nil, p)
	return p, nil
}

// Delete marks a pod as deleted, and removes it. If the pod has a node, it only marks the
// pod unless now is set: the kubelet removes it after its end.
func (s *APIStore) Delete(namespace, name string, now bool) (*corev1.Pod, *metav1.Status) {
	p, status := s.Change(namespace, name, func(p *corev1.Pod) {
		if p.DeletionTimestamp == nil {
			p.DeletionTimestamp = &metav1.Time{Time: time.Now().Truncate(time.Second)}
		}
	})
	if status != nil || p.Spec.NodeName != "" && !now {
		return p, status
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p = s.pods[namespace+"/"+name]; p != nil {
		s.put(p, nil)
	}
	return p, nil
}

// Change changes a pod, as the scheduler and the kubelet do.
func (s *APIStore) Change(namespace, name string, change func(*corev1.Pod)) (*corev1.Pod, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.pods[namespace+"/"+name]
	if before == nil {
		return nil, Failure(http.StatusNotFound, metav1.StatusReasonNotFound, "pods %q not found", name)
	}
	after := before.DeepCopy()
	change(after)
	if equality.Semantic.DeepEqual(before, after) {
		return before, nil
	}
	s.put(before, after)
	return after, nil
}

// matching returns the matching pods in the order of their names. The caller holds s.mu.
func (s *APIStore) matching(matches func(*corev1.Pod) bool) []*corev1.Pod {
	var list []*corev1.Pod
	for _, p := range s.pods {
		if matches(p) {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b *corev1.Pod) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	return list
}

// page returns a page of a list: the first one, or the one that next names.
func (s *APIStore) page(matches func(*corev1.Pod) bool, next, limit string) (*corev1.PodList, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	version, rest := strconv.Itoa(s.version), []*corev1.Pod(nil)
	if next == "" {
		rest = s.matching(matches)
	} else {
		var there bool
		if rest, there = s.pages[next]; !there {
			return nil, Failure(http.StatusGone, metav1.StatusReasonExpired,
				"The provided continue parameter is too old to display a consistent list result.")
		}
		version, _, _ = strings.Cut(next, ".")
	}
	list := &corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"},
		ListMeta: metav1.ListMeta{ResourceVersion: version}, Items: []corev1.Pod{}}
	most, err := strconv.Atoi(limit)
	if err != nil || most > len(rest) {
		most = len(rest)
	}
	for _, p := range rest[:most] {
		list.Items = append(list.Items, *p)
	}
	if len(rest) > most {
		list.Continue = version + "." + uuid.NewString()
		s.pages[list.Continue] = rest[most:]
	}
	return list, nil
}

// since returns the changes after a version, and a channel that the next change closes.
// ok is false if the store has dropped them.
func (s *APIStore) since(version int) (changes []podChange, changed chan struct{}, upTo int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearchFunc(s.history, version+1, func(c podChange, v int) int { return c.version - v })
	return s.history[i:], s.changed, s.version, version >= s.compacted
}

// EventsOf returns the events of a namespace.
func (s *APIStore) EventsOf(namespace string) []eventsv1.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.events), func(e eventsv1.Event) bool { return e.Namespace != namespace })
}

// WantBookmark waits for a bookmark of this version or a later one.
func (s *APIStore) WantBookmark(t testing.TB, version string) {
	t.Helper()
	Eventually(t, 10*time.Second, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if n, err := strconv.Atoi(version); err != nil || s.marked < n {
			return fmt.Errorf("the last bookmark was of %d, not %s: %v", s.marked, version, err)
		}
		return nil
	})
}
