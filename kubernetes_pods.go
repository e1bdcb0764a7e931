package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unique"
)

// watchedPod is what is kept of a pod: some hundred bytes, as there may be thousands.
type watchedPod struct {
	namespace, name, uid string
	version              string            // resourceVersion
	created              time.Time         // whole seconds
	deleted              bool              // it is being deleted
	labels, annotations  map[string]string // ours, those with annotationPrefix
	gates                []string
	phase                string
	unscheduledReason    string          // of the condition PodScheduled, such as Unschedulable
	initContainers       []initContainer // ours
}

// initContainer is the state of the sidecar, or of await.
type initContainer struct {
	name  string
	state string // waiting, running or terminated; empty if the kubelet has not said
}

// podObject is what is read of a pod in JSON.
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
		namespace: shared(m.Namespace), name: m.Name, uid: m.UID, version: m.ResourceVersion, created: m.CreationTimestamp, deleted: m.DeletionTimestamp != nil,
		labels: ours(m.Labels), annotations: ours(m.Annotations), phase: shared(o.Status.Phase),
	}
	for _, g := range o.Spec.SchedulingGates {
		p.gates = append(p.gates, shared(g.Name))
	}
	for _, c := range o.Status.Conditions {
		if c.Type == "PodScheduled" {
			p.unscheduledReason = shared(c.Reason)
		}
	}
	for _, s := range o.Status.InitContainerStatuses {
		if s.Name != sidecarName && s.Name != awaitName {
			continue
		}
		c := initContainer{name: shared(s.Name)}
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

// shared is a text of which many pods have the same: they keep one.
func shared(text string) string { return unique.Make(text).Value() }

// ours are the labels or annotations that are for us. What others annotate may be long.
func ours(all map[string]string) map[string]string {
	var few map[string]string
	for name, value := range all {
		if strings.HasPrefix(name, annotationPrefix) {
			if few == nil {
				few = map[string]string{}
			}
			few[shared(name)] = shared(value)
		}
	}
	return few
}

// listMeta is what a page of a list says of the list.
type listMeta struct {
	ResourceVersion string `json:"resourceVersion"`
	Continue        string `json:"continue"` // empty on the last page
}

// readPods reads a page of a list pod by pod, as a page may have megabytes.
func readPods(body io.Reader, each func(*watchedPod)) (meta listMeta, err error) {
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
			err = readItems(d, each)
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

func readItems(d *json.Decoder, each func(*watchedPod)) error {
	start, err := d.Token()
	if err != nil || start == nil { // null
		return err
	}
	for d.More() {
		var o podObject
		if err := d.Decode(&o); err != nil {
			return err
		}
		each(o.watched())
	}
	_, err = d.Token()
	return err
}

// watchBounds are those of lists and watches; tests have smaller ones.
type watchBounds struct {
	page        int           // pods in a page of a list
	length      time.Duration // after so long, and up to half of it more, the API server ends a watch
	silence     time.Duration // without an event or a bookmark, after which a watch is given up
	first, most time.Duration // waits before it is tried again
}

// The API server sends a bookmark each minute, and a quarter of it later at most.
func newWatchBounds() watchBounds {
	return watchBounds{page: 500, length: 4 * time.Minute, silence: 100 * time.Second, first: 200 * time.Millisecond, most: 30 * time.Second}
}

// errSilent ends a watch that says nothing.
var errSilent = fmt.Errorf("%w: the watch said nothing for too long", errTryAgain)

// podHandler hears of pods, from one goroutine for each watch. It must not block: the API server ends a watch that is not read.
type podHandler interface {
	// setPod tells of a pod that is new or has changed. The handler may keep it, and must not change it.
	setPod(*watchedPod)
	// dropPod tells that a pod is gone, as it was known last: it was deleted, or lost the label; getPod tells which. A new pod of the
	// same name may have been told of before.
	dropPod(*watchedPod)
	// synced tells, after each list, that all pods of the namespace have been told of; "" is all namespaces.
	synced(namespace string)
}

// podWatch tells a handler of the pods of one namespace. Its state is where it is: in list, in watch, or in pause.
type podWatch struct {
	k         *kubernetes
	namespace string
	selector  string
	handler   podHandler
	known     map[string]*watchedPod // by UID: what the handler was told of
	version   string                 // up to which it was told
	retry     *backoff
	waited    time.Duration // last, in pause
	limit     logLimiter    // of lines about failures
	log       *slog.Logger
}

// watchPods tells the handler of all pods of a namespace, or of all for "", that a label selector matches, until ctx is done.
func (k *kubernetes) watchPods(ctx context.Context, selector, namespace string, handler podHandler) {
	w := &podWatch{k: k, namespace: namespace, selector: selector, handler: handler, known: map[string]*watchedPod{},
		log: k.log.With("namespace", namespace)}
	w.retry = newBackoff(k.bounds.first, k.bounds.most)
	for {
		err := w.list(ctx)
		if err == nil {
			err = w.follow(ctx)
		}
		if w.pause(ctx, err) != nil {
			return
		}
	}
}

// list tells of all pods, page by page, and then of those that have gone since they were told of.
func (w *podWatch) list(ctx context.Context) error {
	start, seen := time.Now(), map[string]bool{}
	query := url.Values{"labelSelector": {w.selector}, "limit": {strconv.Itoa(w.k.bounds.page)}}
	for {
		var page listMeta
		err := w.k.exchange(ctx, listTimeout, http.MethodGet, podsPath(w.namespace)+"?"+query.Encode(), "", nil, func(body io.Reader) (err error) {
			page, err = readPods(body, func(p *watchedPod) {
				seen[p.uid] = true
				w.set(p)
			})
			return err
		})
		if err != nil {
			return fmt.Errorf("list pods: %w", err)
		}
		w.version = page.ResourceVersion // of all pages
		if page.Continue == "" {
			break
		}
		query.Set("continue", page.Continue)
	}
	for uid, p := range w.known {
		if !seen[uid] {
			w.drop(p)
		}
	}
	w.log.Info("pods listed", "pods", len(w.known), "milliseconds", time.Since(start).Milliseconds())
	w.handler.synced(w.namespace)
	return nil
}

func (w *podWatch) set(p *watchedPod) {
	if old, ok := w.known[p.uid]; ok && old.version == p.version {
		return
	}
	w.known[p.uid] = p
	w.handler.setPod(p)
}

func (w *podWatch) drop(p *watchedPod) {
	delete(w.known, p.uid)
	w.handler.dropPod(p)
}

// follow watches, and again from where a watch ended, until the API server no longer knows what happened since (errExpired), or ctx is
// done.
func (w *podWatch) follow(ctx context.Context) error {
	for {
		start := time.Now()
		err := w.watch(ctx)
		if time.Since(start) > max(time.Second, w.waited) { // else it ends as soon as it begins
			w.retry = newBackoff(w.k.bounds.first, w.k.bounds.most)
		}
		if errors.Is(err, errExpired) {
			return err
		}
		if err := w.pause(ctx, err); err != nil {
			return err
		}
	}
}

// pause waits before the next attempt, however the last one ended. Its error is that of ctx.
func (w *podWatch) pause(ctx context.Context, failed error) error {
	if _, ok := w.limit.allow(); ok && ctx.Err() == nil && failed != nil {
		w.log.Warn("watch of pods ended, tries again", "error", failed.Error())
	}
	w.waited = w.retry.next()
	if after := retryAfter(failed); after > 0 {
		w.waited += after
	}
	return sleep(ctx, w.waited)
}

// watch tells of what happens from the version on. It returns nil when the API server ends the watch.
func (w *podWatch) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(w.k.bounds.silence, func() { cancel(errSilent) })
	defer silence.Stop()
	length := w.k.bounds.length + rand.N(w.k.bounds.length/2+1) // so that not all watches end at once
	query := url.Values{"labelSelector": {w.selector}, "watch": {"true"}, "allowWatchBookmarks": {"true"},
		"resourceVersion": {w.version}, "timeoutSeconds": {strconv.Itoa(max(1, seconds(length)))}}
	response, err := w.k.send(ctx, http.MethodGet, podsPath(w.namespace)+"?"+query.Encode(), "", nil)
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
		if err := w.take(e); err != nil {
			return w.ended(ctx, err)
		}
		silence.Reset(w.k.bounds.silence)
	}
}

// ended is why a watch ended.
func (w *podWatch) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("watch pods: %w", err)
}

// watchEvent is one line of a watch.
type watchEvent struct {
	Type   string          `json:"type"`
	Object json.RawMessage `json:"object"` // a pod; of a bookmark, one that has nothing but a version; or a Status
}

func (w *podWatch) take(e watchEvent) error {
	if e.Type == "ERROR" {
		refused := &apiError{address: w.k.address}
		if err := json.Unmarshal(e.Object, &refused.apiStatus); err != nil {
			return fmt.Errorf("decode an ERROR event: %w", err)
		}
		return refused
	}
	var o podObject
	if err := json.Unmarshal(e.Object, &o); err != nil {
		return fmt.Errorf("decode an event of the type %q: %w", e.Type, err)
	}
	switch p := o.watched(); e.Type {
	case "ADDED", "MODIFIED":
		w.set(p)
	case "DELETED":
		w.drop(p)
	case "BOOKMARK":
	default:
		return fmt.Errorf("an event of the unknown type %q", e.Type)
	}
	w.version = o.Metadata.ResourceVersion
	return nil
}
