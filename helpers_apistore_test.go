package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

// apiStore holds pods and events, and serves them as a real API server does: lists in pages of one version, watches from a version
// on, with bookmarks and a bounded history, JSON patches. Nothing schedules or runs the pods: see change. Pods are never changed in
// place.
type apiStore struct {
	*http.ServeMux
	bookmarkEvery time.Duration // a minute in a real one
	historyMost   int           // changes

	mu        sync.Mutex
	version   int
	pods      map[string]*corev1.Pod // by NAMESPACE/NAME
	history   []podChange
	compacted int                      // the version up to which the history is gone
	pages     map[string][]*corev1.Pod // what follows, by "continue"
	changed   chan struct{}            // closed, and replaced, by each change
	marked    int                      // the version of the last bookmark
	events    []eventsv1.Event
}

// podChange is one version; before is nil for a new pod, after for one that is gone.
type podChange struct {
	version       int
	before, after *corev1.Pod
}

func newAPIStore() *apiStore {
	s := &apiStore{ServeMux: http.NewServeMux(), bookmarkEvery: 100 * time.Millisecond, historyMost: 1000, version: 1000, compacted: 1000,
		pods: map[string]*corev1.Pod{}, pages: map[string][]*corev1.Pod{}, changed: make(chan struct{})}
	const pods, pod = "/api/v1/namespaces/{namespace}/pods", "/api/v1/namespaces/{namespace}/pods/{name}"
	s.HandleFunc("GET /api/v1/pods", s.servePods)
	s.HandleFunc("GET "+pods, s.servePods)
	s.HandleFunc("POST "+pods, s.serveCreate)
	s.HandleFunc("GET "+pod, func(w http.ResponseWriter, r *http.Request) {
		p, status := s.get(r.PathValue("namespace"), r.PathValue("name"))
		respond(w, http.StatusOK, p, status)
	})
	s.HandleFunc("DELETE "+pod, func(w http.ResponseWriter, r *http.Request) {
		p, status := s.delete(r.PathValue("namespace"), r.PathValue("name"), r.URL.Query().Get("gracePeriodSeconds") == "0")
		respond(w, http.StatusOK, p, status)
	})
	s.HandleFunc("PATCH "+pod, s.servePatch)
	const events = "/apis/events.k8s.io/v1/namespaces/{namespace}/events"
	s.HandleFunc("POST "+events, s.serveEvent)
	s.HandleFunc("GET "+events, func(w http.ResponseWriter, r *http.Request) {
		respond(w, http.StatusOK, eventsv1.EventList{Items: s.eventsOf(r.PathValue("namespace"))}, nil)
	})
	return s
}

// respond writes an object, or the Status if that is not nil.
func respond(w http.ResponseWriter, code int, object any, status *metav1.Status) {
	if status != nil {
		status.TypeMeta, status.Status = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, metav1.StatusFailure
		code, object = int(status.Code), status
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(object)
}

func failure(code int32, reason metav1.StatusReason, format string, args ...any) *metav1.Status {
	return &metav1.Status{Code: code, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

func (s *apiStore) get(namespace, name string) (*corev1.Pod, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pods[namespace+"/"+name]; p != nil {
		return p, nil
	}
	return nil, failure(http.StatusNotFound, metav1.StatusReasonNotFound, "pods %q not found", name)
}

// put makes a change, with s.mu held.
func (s *apiStore) put(before, after *corev1.Pod) {
	s.version++
	if after == nil {
		delete(s.pods, before.Namespace+"/"+before.Name)
	} else {
		after.ResourceVersion = strconv.Itoa(s.version)
		s.pods[after.Namespace+"/"+after.Name] = after
	}
	s.history = append(s.history, podChange{s.version, before, after})
	if gone := len(s.history) - s.historyMost; gone > 0 {
		s.forget(gone)
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *apiStore) forget(changes int) {
	if changes > 0 {
		s.compacted = s.history[changes-1].version
		s.history = slices.Clone(s.history[changes:])
	}
}

// compact forgets the history, and the lists that are being read.
func (s *apiStore) compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(len(s.history))
	clear(s.pages)
}

// create adds a pod.
func (s *apiStore) create(p *corev1.Pod) (*corev1.Pod, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p = p.DeepCopy()
	if p.Name == "" {
		p.Name = p.GenerateName + uuid.NewString()[:5]
	}
	if s.pods[p.Namespace+"/"+p.Name] != nil {
		return nil, failure(http.StatusConflict, metav1.StatusReasonAlreadyExists, "pods %q already exists", p.Name)
	}
	p.TypeMeta = metav1.TypeMeta{}
	p.UID = types.UID(uuid.NewString())
	if p.CreationTimestamp.IsZero() { // a test may choose it
		p.CreationTimestamp = metav1.NewTime(time.Now().Truncate(time.Second))
	}
	p.Status.Phase = cmp.Or(p.Status.Phase, corev1.PodPending)
	if len(p.Spec.SchedulingGates) > 0 && len(p.Status.Conditions) == 0 {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse,
			Reason: corev1.PodReasonSchedulingGated, Message: "Scheduling is blocked due to non-empty scheduling gates"}}
	}
	s.put(nil, p)
	return p, nil
}

// delete removes a pod; one that has a node is only marked, unless it is to happen now: the kubelet removes it when it has ended.
func (s *apiStore) delete(namespace, name string, now bool) (*corev1.Pod, *metav1.Status) {
	p, status := s.get(namespace, name)
	if status != nil {
		return nil, status
	}
	if p.Spec.NodeName != "" && !now {
		return s.change(namespace, name, func(p *corev1.Pod) {
			p.DeletionTimestamp = &metav1.Time{Time: time.Now().Truncate(time.Second)}
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p = s.pods[namespace+"/"+name]; p != nil {
		s.put(p, nil)
	}
	return p, nil
}

// change is for what scheduler and kubelet do to a pod.
func (s *apiStore) change(namespace, name string, change func(*corev1.Pod)) (*corev1.Pod, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.pods[namespace+"/"+name]
	if before == nil {
		return nil, failure(http.StatusNotFound, metav1.StatusReasonNotFound, "pods %q not found", name)
	}
	after := before.DeepCopy()
	change(after)
	if equality.Semantic.DeepEqual(before, after) {
		return before, nil
	}
	s.put(before, after)
	return after, nil
}

// matching are the pods of a namespace, or all, that a selector matches, in the order of their names, with s.mu held.
func (s *apiStore) matching(matches func(*corev1.Pod) bool) []*corev1.Pod {
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

func (s *apiStore) servePods(w http.ResponseWriter, r *http.Request) {
	query, namespace := r.URL.Query(), r.PathValue("namespace")
	selector, err := labels.Parse(query.Get("labelSelector"))
	if err != nil {
		respond(w, 0, nil, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err))
		return
	}
	matches := func(p *corev1.Pod) bool {
		return p != nil && (namespace == "" || p.Namespace == namespace) && selector.Matches(labels.Set(p.Labels))
	}
	if query.Get("watch") == "true" {
		s.serveWatch(w, r, matches)
		return
	}
	list, status := s.page(matches, query.Get("continue"), query.Get("limit"))
	respond(w, http.StatusOK, list, status)
}

// page is a page of a list: from the beginning, or from where the one before ended.
func (s *apiStore) page(matches func(*corev1.Pod) bool, next, limit string) (*corev1.PodList, *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	version, rest := strconv.Itoa(s.version), []*corev1.Pod(nil)
	if next == "" {
		rest = s.matching(matches)
	} else {
		var there bool
		if rest, there = s.pages[next]; !there {
			return nil, failure(http.StatusGone, metav1.StatusReasonExpired, "The provided continue parameter is too old to display a consistent list result.")
		}
		version, _, _ = strings.Cut(next, ".")
	}
	list := &corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, ListMeta: metav1.ListMeta{ResourceVersion: version}, Items: []corev1.Pod{}}
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

// serveWatch tells of the changes after a version.
func (s *apiStore) serveWatch(w http.ResponseWriter, r *http.Request, matches func(*corev1.Pod) bool) {
	query, flush := r.URL.Query(), http.NewResponseController(w).Flush
	version, err := strconv.Atoi(query.Get("resourceVersion"))
	if err != nil {
		respond(w, 0, nil, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "a watch from no version is not served here"))
		return
	}
	length, _ := strconv.Atoi(query.Get("timeoutSeconds"))
	end, bookmark := time.After(time.Duration(length)*time.Second), time.NewTicker(s.bookmarkEvery)
	defer bookmark.Stop()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	send := func(kind string, object any) bool {
		return json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": object}) == nil && flush() == nil
	}
	for flush() == nil {
		changes, changed, upTo, ok := s.since(version)
		if !ok {
			send("ERROR", metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure,
				Code: http.StatusGone, Reason: metav1.StatusReasonExpired, Message: fmt.Sprintf("too old resource version: %d", version)})
			return
		}
		for _, c := range changes {
			if kind, p := c.event(matches(c.before), matches(c.after)); kind != "" && !send(kind, p) {
				return
			}
		}
		version = upTo
		select {
		case <-changed:
		case <-bookmark.C:
			mark := &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{ResourceVersion: strconv.Itoa(version)}}
			if query.Get("allowWatchBookmarks") == "true" && !send("BOOKMARK", mark) {
				return
			}
			s.mu.Lock()
			s.marked = version
			s.mu.Unlock()
		case <-end:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// since are the changes after a version, and what is closed by the next one; not ok if they are no longer known.
func (s *apiStore) since(version int) (changes []podChange, changed chan struct{}, upTo int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearchFunc(s.history, version+1, func(c podChange, v int) int { return c.version - v })
	return s.history[i:], s.changed, s.version, version >= s.compacted
}

// event is what a watch tells of a change: one that makes the selector match no more is a deletion, of the pod as it was before, with
// the new version.
func (c podChange) event(matched, matches bool) (kind string, p *corev1.Pod) {
	switch {
	case matched && matches:
		kind, p = "MODIFIED", c.after
	case matches:
		kind, p = "ADDED", c.after
	case matched:
		kind, p = "DELETED", c.before.DeepCopy()
		p.ResourceVersion = strconv.Itoa(c.version)
	default:
		return "", nil
	}
	shown := *p
	shown.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	return kind, &shown
}

func (s *apiStore) serveCreate(w http.ResponseWriter, r *http.Request) {
	p := new(corev1.Pod)
	if err := json.NewDecoder(r.Body).Decode(p); err != nil {
		respond(w, 0, nil, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err))
		return
	}
	p.Namespace = r.PathValue("namespace")
	created, status := s.create(p)
	respond(w, http.StatusCreated, created, status)
}

// servePatch takes JSON patches. As a real one, it lets gates be removed but not added, and answers 422 where a test fails.
func (s *apiStore) servePatch(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	steps, wrong := jsonpatch.DecodePatch(body)
	if err != nil || wrong != nil || r.Header.Get("Content-Type") != "application/json-patch+json" {
		respond(w, 0, nil, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "not a JSON patch: %v", wrong))
		return
	}
	var status *metav1.Status
	after, missing := s.change(r.PathValue("namespace"), r.PathValue("name"), func(p *corev1.Pod) {
		var patched *corev1.Pod
		if patched, status = applySteps(p, steps); status == nil {
			*p = *patched
		}
	})
	respond(w, http.StatusOK, after, cmp.Or(missing, status))
}

func applySteps(p *corev1.Pod, steps jsonpatch.Patch) (*corev1.Pod, *metav1.Status) {
	text, err := json.Marshal(p)
	if err == nil {
		text, err = steps.Apply(text)
	}
	if err != nil {
		return nil, failure(http.StatusUnprocessableEntity, "", "%v", err)
	}
	patched := new(corev1.Pod)
	if err := json.Unmarshal(text, patched); err != nil {
		return nil, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err)
	}
	for _, g := range patched.Spec.SchedulingGates {
		if !slices.Contains(p.Spec.SchedulingGates, g) {
			return nil, failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "spec.schedulingGates: only deletion is allowed")
		}
	}
	if patched.Spec.NodeName != p.Spec.NodeName || patched.UID != p.UID {
		return nil, failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "field is immutable")
	}
	patched.Status = p.Status // is a subresource
	return patched, nil
}

func (s *apiStore) serveEvent(w http.ResponseWriter, r *http.Request) {
	var e eventsv1.Event
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
		respond(w, 0, nil, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var status *metav1.Status
	switch same := func(other eventsv1.Event) bool { return other.Namespace == e.Namespace && other.Name == e.Name }; {
	case e.EventTime.IsZero() || e.ReportingController == "" || e.ReportingInstance == "" || e.Action == "" || e.Reason == "" ||
		e.Type != corev1.EventTypeNormal && e.Type != corev1.EventTypeWarning || len(e.Note) >= 1024 || e.Regarding.Namespace != e.Namespace:
		status = failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "Event %q is invalid", e.Name)
	case slices.ContainsFunc(s.events, same):
		status = failure(http.StatusConflict, metav1.StatusReasonAlreadyExists, "events.events.k8s.io %q already exists", e.Name)
	default:
		s.events = append(s.events, e)
	}
	respond(w, http.StatusCreated, e, status)
}

// eventsOf are the events of a namespace.
func (s *apiStore) eventsOf(namespace string) []eventsv1.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.events), func(e eventsv1.Event) bool { return e.Namespace != namespace })
}

// wantBookmark waits for a bookmark of this version, or a later one.
func (s *apiStore) wantBookmark(t *testing.T, version string) {
	t.Helper()
	eventually(t, 10*time.Second, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if n, err := strconv.Atoi(version); err != nil || s.marked < n {
			return fmt.Errorf("the last bookmark was of %d, not %s: %v", s.marked, version, err)
		}
		return nil
	})
}
