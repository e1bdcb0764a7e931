package rig

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// object is a pointer to a type of Kubernetes.
type object[T any] interface {
	comparable
	metav1.Object
	runtime.Object
	DeepCopy() T
}

// Collection holds the objects of one kind. It replaces objects and never modifies them.
type Collection[T object[T]] struct {
	BookmarkEvery time.Duration // a minute in a real API server
	HistoryMost   int           // largest number of changes in the history

	gvk      schema.GroupVersionKind
	resource string                               // such as pods
	prepare  func(T)                              // completes a new object; nil: nothing to do
	check    func(before, after T) *metav1.Status // refuses a write; nil: accepts all

	mu        sync.Mutex
	version   int
	objects   map[string]T // by NAMESPACE/NAME
	history   []change[T]
	compacted int            // the version up to which the history is gone
	pages     map[string][]T // the rest of a list, by "continue"
	changed   chan struct{}  // each change closes and replaces it
	marked    int            // the version of the last bookmark
}

// change is one version. before is nil for a new object, and after for a deleted one.
type change[T any] struct {
	version       int
	before, after T
}

func newCollection[O any, T interface {
	*O
	object[T]
}](apiVersion, kind, resource string) *Collection[T] {
	return &Collection[T]{BookmarkEvery: 100 * time.Millisecond, HistoryMost: 1000,
		gvk: schema.FromAPIVersionAndKind(apiVersion, kind), resource: resource, version: 1000, compacted: 1000,
		objects: map[string]T{}, pages: map[string][]T{}, changed: make(chan struct{})}
}

func (s *Collection[T]) notFound(name string) *metav1.Status {
	return Failure(http.StatusNotFound, metav1.StatusReasonNotFound, "%s %q not found", s.resource, name)
}

// Get returns an object, or the Status "not found".
func (s *Collection[T]) Get(namespace, name string) (o T, status *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[namespace+"/"+name]
	if !ok {
		status = s.notFound(name)
	}
	return o, status
}

// put makes a change. The caller holds s.mu.
func (s *Collection[T]) put(before, after T) {
	var none T
	s.version++
	if after == none {
		delete(s.objects, before.GetNamespace()+"/"+before.GetName())
	} else {
		after.SetResourceVersion(strconv.Itoa(s.version))
		s.objects[after.GetNamespace()+"/"+after.GetName()] = after
	}
	s.history = append(s.history, change[T]{s.version, before, after})
	if gone := len(s.history) - s.HistoryMost; gone > 0 {
		s.forget(gone)
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Collection[T]) forget(changes int) {
	if changes > 0 {
		s.compacted = s.history[changes-1].version
		s.history = slices.Clone(s.history[changes:])
	}
}

// Compact drops the history, and the lists that clients are reading.
func (s *Collection[T]) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(len(s.history))
	clear(s.pages)
}

// Create adds an object.
func (s *Collection[T]) Create(o T) (T, *metav1.Status) {
	var none T
	s.mu.Lock()
	defer s.mu.Unlock()
	o = o.DeepCopy()
	if o.GetName() == "" {
		o.SetName(o.GetGenerateName() + uuid.NewString()[:5])
	}
	if s.objects[o.GetNamespace()+"/"+o.GetName()] != none {
		return none, Failure(http.StatusConflict, metav1.StatusReasonAlreadyExists, "%s %q already exists", s.resource, o.GetName())
	}
	o.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{})
	o.SetUID(types.UID(uuid.NewString()))
	if created := o.GetCreationTimestamp(); created.IsZero() { // a test may set it
		o.SetCreationTimestamp(metav1.NewTime(time.Now().Truncate(time.Second)))
	}
	if s.prepare != nil {
		s.prepare(o)
	}
	if s.check != nil {
		if status := s.check(none, o); status != nil {
			return none, status
		}
	}
	s.put(none, o)
	return o, nil
}

// Delete removes an object.
func (s *Collection[T]) Delete(namespace, name string) (T, *metav1.Status) {
	var none T
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[namespace+"/"+name]
	if !ok {
		return none, s.notFound(name)
	}
	s.put(o, none)
	return o, nil
}

// Change changes an object; pods like the scheduler and the kubelet do.
func (s *Collection[T]) Change(namespace, name string, change func(T)) (T, *metav1.Status) {
	return s.tryChange(namespace, name, func(o T) *metav1.Status {
		change(o)
		return nil
	})
}

// tryChange is Change, unless change returns a status.
func (s *Collection[T]) tryChange(namespace, name string, change func(T) *metav1.Status) (T, *metav1.Status) {
	var none T
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.objects[namespace+"/"+name]
	if before == none {
		return none, s.notFound(name)
	}
	after := before.DeepCopy()
	status := change(after)
	if status == nil && s.check != nil {
		status = s.check(before, after)
	}
	if status != nil || equality.Semantic.DeepEqual(before, after) {
		return before, status
	}
	s.put(before, after)
	return after, nil
}

// matching returns the matching objects in the order of their names. The caller holds
// s.mu.
func (s *Collection[T]) matching(matches func(T) bool) []T {
	list := []T{}
	for _, o := range s.objects {
		if matches(o) {
			list = append(list, o)
		}
	}
	slices.SortFunc(list, func(a, b T) int {
		return strings.Compare(a.GetNamespace()+"/"+a.GetName(), b.GetNamespace()+"/"+b.GetName())
	})
	return list
}

// page returns a page of a list: the first one, or the one that next names.
func (s *Collection[T]) page(matches func(T) bool, next, limit string) (list any, status *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	meta, rest := metav1.ListMeta{ResourceVersion: strconv.Itoa(s.version)}, []T(nil)
	if next == "" {
		rest = s.matching(matches)
	} else {
		var there bool
		if rest, there = s.pages[next]; !there {
			return nil, Failure(http.StatusGone, metav1.StatusReasonExpired,
				"The provided continue parameter is too old to display a consistent list result.")
		}
		meta.ResourceVersion, _, _ = strings.Cut(next, ".")
	}
	most, err := strconv.Atoi(limit)
	if err != nil || most > len(rest) {
		most = len(rest)
	}
	if len(rest) > most {
		meta.Continue = meta.ResourceVersion + "." + uuid.NewString()
		s.pages[meta.Continue] = rest[most:]
	}
	apiVersion, kind := s.gvk.ToAPIVersionAndKind()
	return map[string]any{"apiVersion": apiVersion, "kind": kind + "List", "metadata": meta, "items": rest[:most]}, nil
}

// since returns the changes after a version, and a channel that the next change closes.
// ok is false if the store has dropped them.
func (s *Collection[T]) since(version int) (changes []change[T], changed chan struct{}, upTo int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearchFunc(s.history, version+1, func(c change[T], v int) int { return c.version - v })
	return s.history[i:], s.changed, s.version, version >= s.compacted
}

// WantBookmark waits for a bookmark of this version or a later one.
func (s *Collection[T]) WantBookmark(t testing.TB, version string) {
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

// serve adds the routes of lists, watches and single objects.
func (s *Collection[T]) serve(mux *http.ServeMux, group string, namespaced bool) {
	all := group + "/" + s.resource
	if namespaced {
		mux.HandleFunc("GET "+all, s.serveList)
		all = group + "/namespaces/{namespace}/" + s.resource
	}
	respond := func(w http.ResponseWriter, code int, o T, status *metav1.Status) {
		Respond(w, code, s.shown(o), status)
	}
	mux.HandleFunc("GET "+all, s.serveList)
	mux.HandleFunc("GET "+all+"/{name}", func(w http.ResponseWriter, r *http.Request) {
		o, status := s.Get(r.PathValue("namespace"), r.PathValue("name"))
		respond(w, http.StatusOK, o, status)
	})
	mux.HandleFunc("POST "+all, func(w http.ResponseWriter, r *http.Request) {
		o := s.empty()
		status := badRequest(json.NewDecoder(r.Body).Decode(o))
		if status == nil {
			o.SetNamespace(r.PathValue("namespace"))
			o, status = s.Create(o)
		}
		respond(w, http.StatusCreated, o, status)
	})
	mux.HandleFunc("PUT "+all+"/{name}", func(w http.ResponseWriter, r *http.Request) {
		o := s.empty()
		if status := badRequest(json.NewDecoder(r.Body).Decode(o)); status != nil {
			Respond(w, 0, nil, status)
			return
		}
		o, status := s.tryChange(r.PathValue("namespace"), r.PathValue("name"), func(now T) *metav1.Status {
			if v := o.GetResourceVersion(); v != "" && v != now.GetResourceVersion() {
				return Failure(http.StatusConflict, metav1.StatusReasonConflict, "Operation cannot be fulfilled on %s %q: "+
					"the object has been modified; please apply your changes to the latest version and try again",
					s.resource, now.GetName())
			}
			o.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{})
			o.SetUID(now.GetUID())
			o.SetCreationTimestamp(now.GetCreationTimestamp())
			o.SetResourceVersion(now.GetResourceVersion())
			reflect.ValueOf(now).Elem().Set(reflect.ValueOf(o).Elem())
			return nil
		})
		respond(w, http.StatusOK, o, status)
	})
	mux.HandleFunc("DELETE "+all+"/{name}", func(w http.ResponseWriter, r *http.Request) {
		var options metav1.DeleteOptions
		if status := badRequest(json.NewDecoder(r.Body).Decode(&options)); status != nil && r.ContentLength > 0 {
			Respond(w, 0, nil, status)
			return
		}
		namespace, name := r.PathValue("namespace"), r.PathValue("name")
		if now, status := s.Get(namespace, name); status == nil && options.Preconditions != nil {
			want := options.Preconditions
			if want.UID != nil && *want.UID != now.GetUID() ||
				want.ResourceVersion != nil && *want.ResourceVersion != now.GetResourceVersion() {
				Respond(w, 0, nil, Failure(http.StatusConflict, metav1.StatusReasonConflict, "Precondition failed"))
				return
			}
		}
		o, status := s.Delete(namespace, name)
		respond(w, http.StatusOK, o, status)
	})
	mux.HandleFunc("PATCH "+all+"/{name}", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		steps, wrong := jsonpatch.DecodePatch(body)
		if err != nil || wrong != nil || r.Header.Get("Content-Type") != "application/json-patch+json" {
			Respond(w, 0, nil, Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "not a JSON patch: %v", wrong))
			return
		}
		o, status := s.tryChange(r.PathValue("namespace"), r.PathValue("name"), func(o T) *metav1.Status {
			text, err := json.Marshal(o)
			if err == nil {
				text, err = steps.Apply(text)
			}
			if err != nil {
				return Failure(http.StatusUnprocessableEntity, "", "%v", err)
			}
			patched := s.empty()
			if status := badRequest(json.Unmarshal(text, patched)); status != nil {
				return status
			}
			reflect.ValueOf(o).Elem().Set(reflect.ValueOf(patched).Elem())
			return nil
		})
		respond(w, http.StatusOK, o, status)
	})
}

func badRequest(err error) *metav1.Status {
	if err == nil {
		return nil
	}
	return Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err)
}

// empty returns a new object.
func (s *Collection[T]) empty() T {
	var o T
	return reflect.New(reflect.TypeOf(o).Elem()).Interface().(T)
}

// shown returns a copy that names its kind.
func (s *Collection[T]) shown(o T) T {
	var none T
	if o == none {
		return none
	}
	o = o.DeepCopy()
	o.GetObjectKind().SetGroupVersionKind(s.gvk)
	return o
}

// serveList serves lists and watches, of one namespace or of all.
func (s *Collection[T]) serveList(w http.ResponseWriter, r *http.Request) {
	query, namespace := r.URL.Query(), r.PathValue("namespace")
	selector, err := labels.Parse(query.Get("labelSelector"))
	field, wrong := fields.ParseSelector(query.Get("fieldSelector"))
	if err != nil || wrong != nil {
		Respond(w, 0, nil, Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v %v", err, wrong))
		return
	}
	var none T
	matches := func(o T) bool {
		return o != none && (namespace == "" || o.GetNamespace() == namespace) && selector.Matches(labels.Set(o.GetLabels())) &&
			field.Matches(fields.Set{"metadata.name": o.GetName(), "metadata.namespace": o.GetNamespace()})
	}
	if query.Get("watch") == "true" {
		s.serveWatch(w, r, matches)
		return
	}
	list, status := s.page(matches, query.Get("continue"), query.Get("limit"))
	Respond(w, http.StatusOK, list, status)
}

// serveWatch sends the changes after a version.
func (s *Collection[T]) serveWatch(w http.ResponseWriter, r *http.Request, matches func(T) bool) {
	query, flush := r.URL.Query(), http.NewResponseController(w).Flush
	version, err := strconv.Atoi(query.Get("resourceVersion"))
	if err != nil {
		Respond(w, 0, nil, Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"a watch from no version is not served here"))
		return
	}
	length, _ := strconv.Atoi(query.Get("timeoutSeconds"))
	end, bookmark := time.After(time.Duration(length)*time.Second), time.NewTicker(s.BookmarkEvery)
	defer bookmark.Stop()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	send := func(kind string, object any) bool {
		return json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": object}) == nil && flush() == nil
	}
	for flush() == nil {
		changes, changed, upTo, ok := s.since(version)
		if !ok {
			send("ERROR", tooOld(fmt.Sprint(version)))
			return
		}
		for _, c := range changes {
			if kind, o := s.event(c, matches(c.before), matches(c.after)); kind != "" && !send(kind, o) {
				return
			}
		}
		version = upTo
		select {
		case <-changed:
		case <-bookmark.C:
			mark := s.empty()
			mark.SetResourceVersion(strconv.Itoa(version))
			if query.Get("allowWatchBookmarks") == "true" && !send("BOOKMARK", s.shown(mark)) {
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

// event returns the watch event for a change. If the selector no longer matches after a
// change, the event is a deletion: of the object as it was before, with the new version.
func (s *Collection[T]) event(c change[T], matched, matches bool) (kind string, o T) {
	switch {
	case matched && matches:
		return "MODIFIED", s.shown(c.after)
	case matches:
		return "ADDED", s.shown(c.after)
	case matched:
		o = s.shown(c.before)
		o.SetResourceVersion(strconv.Itoa(c.version))
		return "DELETED", o
	}
	return "", o
}

// prepareSecret completes a new Secret.
func prepareSecret(s *corev1.Secret) {
	if s.Type == "" {
		s.Type = corev1.SecretTypeOpaque
	}
}

var dataKey = regexp.MustCompile(`^[-._a-zA-Z0-9]+$`)

// checkSecret refuses what a real API server refuses.
func (s *APIStore) checkSecret(before, after *corev1.Secret) *metav1.Status {
	invalid := func(format string, args ...any) *metav1.Status {
		return Failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "Secret %q is invalid: %s", after.Name,
			fmt.Sprintf(format, args...))
	}
	if before == nil {
		if _, missing := s.Namespaces.Get("", after.Namespace); missing != nil {
			return missing
		}
	} else if before.Type != after.Type {
		return invalid("type: field is immutable")
	}
	if after.Type == corev1.SecretTypeTLS && (after.Data["tls.crt"] == nil || after.Data["tls.key"] == nil) {
		return invalid("data: tls.crt and tls.key are required")
	}
	for key := range after.Data {
		if !dataKey.MatchString(key) {
			return invalid("data: %q is no key", key)
		}
	}
	return nil
}
