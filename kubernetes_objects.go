package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// listMeta is the ListMeta of a page of a list.
type listMeta struct {
	ResourceVersion string `json:"resourceVersion"`
	Continue        string `json:"continue"` // empty on the last page
}

// readList reads a page of a list object by object, because a page may have megabytes.
func readList[T any](body io.Reader, read func(*json.Decoder) (T, error), each func(T)) (meta listMeta, err error) {
	d := json.NewDecoder(body)
	if _, err := d.Token(); err != nil { // {
		return meta, err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return meta, err
		}
		switch name {
		case "metadata":
			err = d.Decode(&meta)
		case "items":
			err = readItems(d, read, each)
		default:
			err = d.Decode(new(json.RawMessage))
		}
		if err != nil {
			return meta, err
		}
	}
	_, err = d.Token() // }
	return meta, err
}

func readItems[T any](d *json.Decoder, read func(*json.Decoder) (T, error), each func(T)) error {
	start, err := d.Token()
	if err != nil || start == nil { // null
		return err
	}
	for d.More() {
		object, err := read(d)
		if err != nil {
			return err
		}
		each(object)
	}
	_, err = d.Token()
	return err
}

// watchBounds are the limits of lists and watches. Tests use smaller ones.
type watchBounds struct {
	page        int           // objects in a page of a list
	length      time.Duration // the API server ends a watch after this time, or up to half of it later
	silence     time.Duration // without an event, a bookmark or a list for this time, the client lists again
	first, most time.Duration // waits before a retry
}

// newWatchBounds returns the limits for production. The API server sends a bookmark once
// a minute, and two seconds before the end of a watch. So a short watch makes it tell
// soon that the client has missed nothing.
func newWatchBounds() watchBounds {
	return watchBounds{
		page:    500,
		length:  10 * time.Second,
		silence: 20 * time.Second,
		first:   200 * time.Millisecond,
		most:    10 * time.Second,
	}
}

// old is the age at which a view of objects is too old to act on. It leaves some time to the
// list that follows a silence.
func (b watchBounds) old() time.Duration { return b.silence * 3 / 2 }

// errWatchSilent ends a watch that sends nothing.
var errWatchSilent = fmt.Errorf("%w: the watch sent nothing for too long", errTryAgain)

// versioned is an object that can be watched.
type versioned interface {
	GetUID() types.UID
	GetResourceVersion() string
}

// objectWatch passes the objects of one kind to set and drop, from one goroutine. They
// must not block: the API server ends a watch whose client does not read. The state of a
// watch is the method that runs: list, watch or pause.
type objectWatch[T versioned] struct {
	k        *kubernetes
	kind     string // such as pods
	path     string
	selector url.Values // labelSelector, or fieldSelector
	read     func(*json.Decoder) (T, error)
	set      func(T) // receives a new or changed object, may keep it, and must not change it
	drop     func(T) // receives the last state of an object that is gone; set may have another of its name already
	synced   func()  // runs after each list: set has received all objects

	known   map[types.UID]T // objects that set has received
	version string          // resourceVersion up to which set has received all
	retry   *backoff
	waited  time.Duration // the last wait in pause
	limit   logLimiter    // of lines about failures
	log     *slog.Logger

	mu     sync.Mutex
	heard  time.Time // when set had all that the API server knew; at first, the start
	listed bool
	failed error // why the last list or watch ended
}

// newWatch completes a watch.
func newWatch[T versioned](k *kubernetes, w *objectWatch[T]) *objectWatch[T] {
	w.k, w.known, w.heard = k, map[types.UID]T{}, time.Now()
	w.retry = newBackoff(k.bounds.first, k.bounds.most)
	if w.log == nil {
		w.log = k.log
	}
	return w
}

// run lists and watches until ctx is done.
func (w *objectWatch[T]) run(ctx context.Context) {
	for {
		err := w.list(ctx)
		if err == nil {
			err = w.follow(ctx)
		}
		if errors.Is(err, errWatchSilent) {
			w.note(ctx, err) // the silence was a pause
		} else if w.pause(ctx, err) != nil {
			return
		}
	}
}

// hear notes that set has received all that the API server knew just now. After a silence,
// only a list is sure to: hear returns errWatchSilent for an event or a bookmark then.
func (w *objectWatch[T]) hear(list bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !list && time.Since(w.heard) >= w.k.bounds.silence {
		return errWatchSilent
	}
	w.heard, w.failed, w.listed = time.Now(), nil, w.listed || list
	return nil
}

// silent returns the time since the API server was last heard, or since the start.
func (w *objectWatch[T]) silent() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Since(w.heard)
}

// check returns why the program must not act on the objects: they may have changed long ago.
func (w *objectWatch[T]) check() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch silent := time.Since(w.heard); {
	case !w.listed && w.failed == nil:
		return fmt.Errorf("%s are not listed yet", w.kind)
	case !w.listed:
		return fmt.Errorf("%s are not listed yet: %w", w.kind, w.failed)
	case silent >= w.k.bounds.old():
		return fmt.Errorf("nothing heard for %s: %w", roughly(silent), cmp.Or(w.failed, errWatchSilent))
	}
	return nil
}

// list passes all objects to set, page by page. Then it drops the known objects that are
// not in the list.
func (w *objectWatch[T]) list(ctx context.Context) error {
	start, seen := time.Now(), map[types.UID]bool{}
	query := maps.Clone(w.selector)
	query.Set("limit", strconv.Itoa(w.k.bounds.page))
	for {
		var page listMeta
		path := w.path + "?" + query.Encode()
		err := w.k.exchange(ctx, listTimeout, http.MethodGet, path, "", nil, func(body io.Reader) (err error) {
			page, err = readList(body, w.read, func(o T) {
				seen[o.GetUID()] = true
				w.pass(o)
			})
			return err
		})
		if err != nil {
			return fmt.Errorf("list %s: %w", w.kind, err)
		}
		w.version = page.ResourceVersion // equal on all pages
		if page.Continue == "" {
			break
		}
		query.Set("continue", page.Continue)
	}
	for uid, o := range w.known {
		if !seen[uid] {
			w.lose(o)
		}
	}
	level := slog.LevelInfo
	w.mu.Lock()
	if w.listed && (w.failed == nil || errors.Is(w.failed, errWatchSilent)) {
		level = slog.LevelDebug // where nothing changes, only a list tells so, again and again
	}
	w.mu.Unlock()
	_ = w.hear(true)
	w.log.Log(ctx, level, w.kind+" listed", w.kind, len(w.known), "milliseconds", time.Since(start).Milliseconds())
	w.synced()
	return nil
}

func (w *objectWatch[T]) pass(o T) {
	if old, ok := w.known[o.GetUID()]; ok && old.GetResourceVersion() == o.GetResourceVersion() {
		return
	}
	w.known[o.GetUID()] = o
	w.set(o)
}

func (w *objectWatch[T]) lose(o T) {
	delete(w.known, o.GetUID())
	w.drop(o)
}

// follow watches, and resumes where a watch ended. It returns an error if only a list can
// tell what has changed: errExpired when the API server no longer has the changes,
// errWatchSilent, or ctx's error.
func (w *objectWatch[T]) follow(ctx context.Context) error {
	for {
		start := time.Now()
		err := w.watch(ctx)
		lasted := time.Since(start) > max(time.Second, w.waited)
		if lasted {
			w.retry = newBackoff(w.k.bounds.first, w.k.bounds.most)
		}
		if errors.Is(err, errExpired) || errors.Is(err, errWatchSilent) {
			return err
		}
		if err == nil && lasted {
			continue
		}
		if err := w.pause(ctx, err); err != nil {
			return err
		}
		if w.silent() >= w.k.bounds.silence {
			return errWatchSilent
		}
	}
}

// note keeps the reason why a list or a watch ended, and logs it.
func (w *objectWatch[T]) note(ctx context.Context, failed error) {
	w.mu.Lock()
	w.failed = failed
	w.mu.Unlock()
	if failed == nil || ctx.Err() != nil || errors.Is(failed, errWatchSilent) { // a list follows, and tells
		return
	}
	if _, ok := w.limit.allow(); ok {
		w.log.Warn("watch of "+w.kind+" ended, tries again", "silentSeconds", seconds(w.silent()), "error", failed.Error())
	}
}

// pause waits before the next attempt, after success and failure alike. It returns the
// cause if ctx is done.
func (w *objectWatch[T]) pause(ctx context.Context, failed error) error {
	w.note(ctx, failed)
	w.waited = w.retry.next()
	if after := retryAfter(failed); after > 0 {
		w.waited += after
	}
	return sleep(ctx, w.waited)
}

// watch passes the changes since version on. It returns nil when the API
// server ends the watch.
func (w *objectWatch[T]) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(w.k.bounds.silence-w.silent(), func() { cancel(errWatchSilent) })
	defer silence.Stop()
	length := w.k.bounds.length + rand.N(w.k.bounds.length/2+1) // so that not all watches end at once
	query := maps.Clone(w.selector)
	query.Set("watch", "true")
	query.Set("allowWatchBookmarks", "true")
	query.Set("resourceVersion", w.version)
	query.Set("timeoutSeconds", strconv.Itoa(max(1, seconds(length))))
	response, err := w.k.send(ctx, http.MethodGet, w.path+"?"+query.Encode(), "", nil)
	if err != nil {
		return w.ended(ctx, err)
	}
	defer response.Body.Close()
	for events := json.NewDecoder(response.Body); ; {
		var e watchEvent
		if err := events.Decode(&e); err == io.EOF {
			return nil
		} else if err != nil {
			return w.ended(ctx, fmt.Errorf("API server %s: %w: %w", w.k.address, errTryAgain, err))
		}
		err := w.handle(e)
		if err == nil {
			err = w.hear(false)
		}
		if err != nil {
			return w.ended(ctx, err)
		}
		silence.Reset(w.k.bounds.silence)
	}
}

// ended returns why a watch ended: the cause if ctx is done, else err.
func (w *objectWatch[T]) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("watch %s: %w", w.kind, err)
}

// watchEvent is one line of a watch.
type watchEvent struct {
	Type   string          `json:"type"`
	Object json.RawMessage `json:"object"` // a bookmark's has only a version; an ERROR has a Status
}

func (w *objectWatch[T]) handle(e watchEvent) error {
	if e.Type == "ERROR" {
		failure := &apiError{address: w.k.address}
		if err := json.Unmarshal(e.Object, &failure.apiStatus); err != nil {
			return fmt.Errorf("decode an ERROR event: %w", err)
		}
		return failure
	}
	o, err := w.read(json.NewDecoder(bytes.NewReader(e.Object)))
	if err != nil {
		return fmt.Errorf("decode an event of the type %q: %w", e.Type, err)
	}
	switch e.Type {
	case "ADDED", "MODIFIED":
		w.pass(o)
	case "DELETED":
		w.lose(o)
	case "BOOKMARK":
	default:
		return fmt.Errorf("an event of the unknown type %q", e.Type)
	}
	w.version = o.GetResourceVersion()
	return nil
}

// mirror holds the objects of a watch.
type mirror[T versioned] struct {
	*objectWatch[T]

	mu      sync.Mutex
	objects map[string]T // by NAMESPACE/NAME; without a namespace, by /NAME
}

// newMirror returns a mirror of the objects at a path, which calls changed after each
// change. Its method run watches.
func newMirror[O any, T interface {
	*O
	metav1.Object
}](k *kubernetes, kind, path string, selector url.Values, changed func()) *mirror[T] {
	m := &mirror[T]{objects: map[string]T{}}
	key := func(o T) string { return o.GetNamespace() + "/" + o.GetName() }
	m.objectWatch = newWatch(k, &objectWatch[T]{kind: kind, path: path, selector: selector,
		read: func(d *json.Decoder) (T, error) {
			o := T(new(O))
			err := d.Decode(o)
			o.SetManagedFields(nil) // long, and an update without them leaves them alone
			return o, err
		},
		set: func(o T) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.objects[key(o)] = o
			changed()
		},
		drop: func(o T) {
			m.mu.Lock()
			defer m.mu.Unlock()
			if now, ok := m.objects[key(o)]; ok && now.GetUID() == o.GetUID() {
				delete(m.objects, key(o))
			}
			changed()
		},
		synced: changed})
	return m
}

// get returns an object, or nil. The caller must not change it.
func (m *mirror[T]) get(namespace, name string) T {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.objects[namespace+"/"+name]
}

// all returns the objects, in no order.
func (m *mirror[T]) all() []T {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.objects))
}

// secretsOf returns a mirror of all Secrets of a namespace.
func (k *kubernetes) secretsOf(namespace string, changed func()) *mirror[*corev1.Secret] {
	return newMirror[corev1.Secret](k, "secrets", secretPath(namespace, ""), url.Values{}, changed)
}

// secretsNamed returns a mirror of the Secrets of one name in all namespaces. A role can
// allow exactly these.
func (k *kubernetes) secretsNamed(name string, changed func()) *mirror[*corev1.Secret] {
	return newMirror[corev1.Secret](k, "secrets", secretPath("", ""), url.Values{"fieldSelector": {"metadata.name=" + name}},
		changed)
}

// configMapNamed returns a mirror of one ConfigMap. A role can allow exactly this one.
func (k *kubernetes) configMapNamed(namespace, name string, changed func()) *mirror[*corev1.ConfigMap] {
	return newMirror[corev1.ConfigMap](k, "configmaps", "/api/v1/namespaces/"+namespace+"/configmaps",
		url.Values{"fieldSelector": {"metadata.name=" + name}}, changed)
}

// namespacesWith returns a mirror of the namespaces that a label selector matches.
func (k *kubernetes) namespacesWith(selector string, changed func()) *mirror[*corev1.Namespace] {
	return newMirror[corev1.Namespace](k, "namespaces", "/api/v1/namespaces", url.Values{"labelSelector": {selector}}, changed)
}

// secretPath returns the path of a Secret. Without a name it is that of all Secrets of
// the namespace, and without a namespace that of all.
func secretPath(namespace, name string) string {
	path := "/api/v1"
	if namespace != "" {
		path += "/namespaces/" + namespace
	}
	return strings.TrimSuffix(path+"/secrets/"+name, "/")
}

// getSecret reads a Secret. Its errors are errNotFound, errTryAgain, and others.
func (k *kubernetes) getSecret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	s := new(corev1.Secret)
	return s, k.exchangeObject(ctx, http.MethodGet, secretPath(namespace, name), nil, s)
}

// putSecret creates a Secret without a resourceVersion, and updates one with it. It
// returns what the API server has now. It fails with errChanged if the Secret to create
// is there already, or if the one to update has another version; with errNotFound if that
// is gone, or the namespace of the new one; with errTryAgain, and others.
func (k *kubernetes) putSecret(ctx context.Context, s *corev1.Secret) (*corev1.Secret, error) {
	method, path := http.MethodPut, secretPath(s.Namespace, s.Name)
	if s.ResourceVersion == "" {
		method, path = http.MethodPost, secretPath(s.Namespace, "")
	}
	s.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}
	now := new(corev1.Secret)
	return now, k.exchangeObject(ctx, method, path, s, now)
}

// deleteSecret deletes a Secret. It fails with errChanged if it has another version now,
// and with errNotFound if it is gone.
func (k *kubernetes) deleteSecret(ctx context.Context, s *corev1.Secret) error {
	only := metav1.DeleteOptions{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "DeleteOptions"},
		Preconditions: &metav1.Preconditions{UID: &s.UID, ResourceVersion: &s.ResourceVersion}}
	return k.exchangeObject(ctx, http.MethodDelete, secretPath(s.Namespace, s.Name), only, nil)
}

// exchangeObject sends an object unless it is nil, and reads one unless into is nil.
func (k *kubernetes) exchangeObject(ctx context.Context, method, path string, object, into any) error {
	var body []byte
	var read func(io.Reader) error
	if object != nil {
		body, _ = json.Marshal(object) // cannot fail: the objects are those of Kubernetes
	}
	if into != nil {
		read = func(body io.Reader) error { return json.NewDecoder(body).Decode(into) }
	}
	return k.call(ctx, method, path, "application/json", body, read)
}

// eachPod passes the pods of a namespace to each, page by page. The selector, of labels,
// may be empty.
func (k *kubernetes) eachPod(ctx context.Context, namespace, selector string, each func(*corev1.Pod)) error {
	query := url.Values{"limit": {strconv.Itoa(k.bounds.page)}}
	if selector != "" {
		query.Set("labelSelector", selector)
	}
	for {
		var page listMeta
		err := k.call(ctx, http.MethodGet, podsPath(namespace)+"?"+query.Encode(), "", nil, func(body io.Reader) (err error) {
			page, err = readList(body, func(d *json.Decoder) (*corev1.Pod, error) {
				p := new(corev1.Pod)
				return p, d.Decode(p)
			}, each)
			return err
		})
		if err != nil || page.Continue == "" {
			return err
		}
		query.Set("continue", page.Continue)
	}
}

// webhookConfiguration is the part of a MutatingWebhookConfiguration that setup reads.
type webhookConfiguration struct {
	Metadata struct {
		Name            string    `json:"name"`
		UID             types.UID `json:"uid"`
		ResourceVersion string    `json:"resourceVersion"`
	} `json:"metadata"`
	Webhooks []struct {
		Name         string `json:"name"`
		ClientConfig struct {
			CABundle []byte `json:"caBundle"`
			Service  struct {
				Namespace string `json:"namespace"`
				Name      string `json:"name"`
				Path      string `json:"path"`
			} `json:"service"`
		} `json:"clientConfig"`
	} `json:"webhooks"`
}

func webhookConfigurationPath(name string) string {
	return "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/" + name
}

// getWebhookConfiguration reads a MutatingWebhookConfiguration.
func (k *kubernetes) getWebhookConfiguration(ctx context.Context, name string) (*webhookConfiguration, error) {
	c := new(webhookConfiguration)
	return c, k.exchangeObject(ctx, http.MethodGet, webhookConfigurationPath(name), nil, c)
}

// patchWebhookConfiguration changes a MutatingWebhookConfiguration by a JSON patch. It
// fails with errChanged if a test of the patch fails.
func (k *kubernetes) patchWebhookConfiguration(ctx context.Context, name string, patch []byte) error {
	return k.call(ctx, http.MethodPatch, webhookConfigurationPath(name), "application/json-patch+json", patch, nil)
}

// watchedPod is the part of a pod that the gate keeps: some hundred bytes, because there
// may be thousands of pods.
type watchedPod struct {
	namespace, name, uid string
	version              string            // resourceVersion
	created              time.Time         // whole seconds
	deleted              bool              // it has a deletionTimestamp
	labels, annotations  map[string]string // only those with annotationPrefix
	gates                []string
	sidecarArgs          string // of the sidecar's container, which are immutable; joined by argsSeparator
	phase                string
	unscheduledReason    string          // reason of the condition PodScheduled, such as Unschedulable
	conditions           []string        // the types of its conditions
	initContainers       []initContainer // sidecar and await
}

// argsSeparator is in no argument: it ends a text in the kernel.
const argsSeparator = "\x00"

// initContainer is the state of the sidecar, or of await.
type initContainer struct {
	name  string
	state string // waiting, running or terminated; empty before the kubelet reports it
}

// podObject is the part of a pod's JSON that the gate reads.
type podObject struct {
	Metadata struct {
		Name              string            `json:"name"`
		Namespace         string            `json:"namespace"`
		UID               string            `json:"uid"`
		ResourceVersion   string            `json:"resourceVersion"`
		CreationTimestamp time.Time         `json:"creationTimestamp"`
		DeletionTimestamp *time.Time        `json:"deletionTimestamp"`
		Labels            map[string]string `json:"labels"`
		Annotations       map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		SchedulingGates []named `json:"schedulingGates"`
		InitContainers  []struct {
			Name string   `json:"name"`
			Args []string `json:"args"`
		} `json:"initContainers"`
	} `json:"spec"`
	Status struct {
		Phase      string `json:"phase"`
		Conditions []struct {
			Type   string `json:"type"`
			Reason string `json:"reason"`
		} `json:"conditions"`
		InitContainerStatuses []struct {
			Name  string `json:"name"`
			State struct {
				Waiting    *struct{} `json:"waiting"`
				Running    *struct{} `json:"running"`
				Terminated *struct{} `json:"terminated"`
			} `json:"state"`
		} `json:"initContainerStatuses"`
	} `json:"status"`
}

func (o *podObject) watched() *watchedPod {
	m := &o.Metadata
	p := &watchedPod{
		namespace:   interned(m.Namespace),
		name:        m.Name,
		uid:         m.UID,
		version:     m.ResourceVersion,
		created:     m.CreationTimestamp,
		deleted:     m.DeletionTimestamp != nil,
		labels:      prefixed(m.Labels),
		annotations: prefixed(m.Annotations),
		phase:       interned(o.Status.Phase),
	}
	for _, g := range o.Spec.SchedulingGates {
		p.gates = append(p.gates, interned(g.Name))
	}
	for _, c := range o.Spec.InitContainers {
		if c.Name == sidecarName {
			p.sidecarArgs = interned(strings.Join(c.Args, argsSeparator))
		}
	}
	for _, c := range o.Status.Conditions {
		p.conditions = append(p.conditions, interned(c.Type))
		if c.Type == conditionScheduled {
			p.unscheduledReason = interned(c.Reason)
		}
	}
	for _, s := range o.Status.InitContainerStatuses {
		if s.Name != sidecarName && s.Name != awaitName {
			continue
		}
		c := initContainer{name: interned(s.Name)}
		switch {
		case s.State.Terminated != nil:
			c.state = "terminated"
		case s.State.Running != nil:
			c.state = "running"
		case s.State.Waiting != nil:
			c.state = "waiting"
		}
		p.initContainers = append(p.initContainers, c)
	}
	return p
}

// interned returns a copy of text that all pods with an equal text share.
func interned(text string) string { return unique.Make(text).Value() }

// prefixed returns the labels or annotations with our prefix. All others may be long.
func prefixed(all map[string]string) map[string]string {
	var own map[string]string
	for name, value := range all {
		if strings.HasPrefix(name, annotationPrefix) {
			if own == nil {
				own = map[string]string{}
			}
			own[interned(name)] = interned(value)
		}
	}
	return own
}

func readPod(d *json.Decoder) (*watchedPod, error) {
	var o podObject
	if err := d.Decode(&o); err != nil {
		return nil, err
	}
	return o.watched(), nil
}

// GetUID and GetResourceVersion implement versioned.
func (p *watchedPod) GetUID() types.UID          { return types.UID(p.uid) }
func (p *watchedPod) GetResourceVersion() string { return p.version }

func (p *watchedPod) reference() corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.namespace, Name: p.name,
		UID: p.GetUID(), ResourceVersion: p.version}
}

// podHandler receives the changes of pods, from one goroutine for each watch. It must not
// block: the API server ends a watch whose client does not read.
type podHandler interface {
	// setPod receives a new or changed pod. The handler may keep it, and must not change
	// it.
	setPod(*watchedPod)
	// dropPod receives the last state of a pod that was deleted or has lost its label. It
	// was deleted if it has a deletionTimestamp and our gate; else getPod tells. setPod may
	// already have received a new pod of the same name.
	dropPod(*watchedPod)
	// synced runs after each list: the handler has received all pods of the namespace; ""
	// is all namespaces.
	synced(namespace string)
}

// podWatch passes the pods of one namespace to a handler.
type podWatch = objectWatch[*watchedPod]

// newPodWatch returns a watch of all pods of a namespace that a label selector matches.
// The namespace "" stands for all.
func (k *kubernetes) newPodWatch(selector, namespace string, handler podHandler) *podWatch {
	return newWatch(k, &podWatch{kind: "pods", path: podsPath(namespace), selector: url.Values{"labelSelector": {selector}},
		read: readPod, set: handler.setPod, drop: handler.dropPod, synced: func() { handler.synced(namespace) },
		log: k.log.With("namespace", namespace)})
}
