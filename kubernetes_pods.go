package main

import (
	"cmp"
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
	"sync"
	"time"
	"unique"
)

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
		if c.Type == "PodScheduled" {
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

// listMeta is the ListMeta of a page of a list.
type listMeta struct {
	ResourceVersion string `json:"resourceVersion"`
	Continue        string `json:"continue"` // empty on the last page
}

// readPods reads a page of a list pod by pod, because a page may have megabytes.
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

// watchBounds are the limits of lists and watches. Tests use smaller ones.
type watchBounds struct {
	page        int           // pods in a page of a list
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

// old is the age at which a view of pods is too old to act on. It leaves some time to the
// list that follows a silence.
func (b watchBounds) old() time.Duration { return b.silence * 3 / 2 }

// errWatchSilent ends a watch that sends nothing.
var errWatchSilent = fmt.Errorf("%w: the watch sent nothing for too long", errTryAgain)

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

// podWatch passes the pods of one namespace to a handler. Its state is the method that
// runs: list, watch or pause.
type podWatch struct {
	k         *kubernetes
	namespace string
	selector  string
	handler   podHandler
	known     map[string]*watchedPod // pods that the handler has received, by UID
	version   string                 // resourceVersion that the handler has received
	retry     *backoff
	waited    time.Duration // the last wait in pause
	limit     logLimiter    // of lines about failures
	log       *slog.Logger

	mu     sync.Mutex
	heard  time.Time // when the handler had all that the API server knew; at first, the start
	listed bool
	failed error // why the last list or watch ended
}

// newPodWatch returns a watch of all pods of a namespace that a label selector matches.
// The namespace "" stands for all.
func (k *kubernetes) newPodWatch(selector, namespace string, handler podHandler) *podWatch {
	return &podWatch{
		k: k, namespace: namespace, selector: selector, handler: handler, known: map[string]*watchedPod{},
		retry: newBackoff(k.bounds.first, k.bounds.most), log: k.log.With("namespace", namespace), heard: time.Now(),
	}
}

// run lists and watches until ctx is done.
func (w *podWatch) run(ctx context.Context) {
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

// hear notes that the handler has all that the API server knew just now. After a silence,
// only a list is sure to: hear returns errWatchSilent for an event or a bookmark then.
func (w *podWatch) hear(list bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !list && time.Since(w.heard) >= w.k.bounds.silence {
		return errWatchSilent
	}
	w.heard, w.failed, w.listed = time.Now(), nil, w.listed || list
	return nil
}

// silent returns the time since the API server was last heard, or since the start.
func (w *podWatch) silent() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Since(w.heard)
}

// check returns why the handler must not act on its pods: they may have changed long ago.
func (w *podWatch) check() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch silent := time.Since(w.heard); {
	case !w.listed && w.failed == nil:
		return errors.New("pods are not listed yet")
	case !w.listed:
		return fmt.Errorf("pods are not listed yet: %w", w.failed)
	case silent >= w.k.bounds.old():
		return fmt.Errorf("nothing heard for %s: %w", roughly(silent), cmp.Or(w.failed, errWatchSilent))
	}
	return nil
}

// list passes all pods to the handler, page by page. Then it drops the known pods that
// are not in the list.
func (w *podWatch) list(ctx context.Context) error {
	start, seen := time.Now(), map[string]bool{}
	query := url.Values{"labelSelector": {w.selector}, "limit": {strconv.Itoa(w.k.bounds.page)}}
	for {
		var page listMeta
		path := podsPath(w.namespace) + "?" + query.Encode()
		err := w.k.exchange(ctx, listTimeout, http.MethodGet, path, "", nil, func(body io.Reader) (err error) {
			page, err = readPods(body, func(p *watchedPod) {
				seen[p.uid] = true
				w.set(p)
			})
			return err
		})
		if err != nil {
			return fmt.Errorf("list pods: %w", err)
		}
		w.version = page.ResourceVersion // equal on all pages
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
	_ = w.hear(true)
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

// follow watches, and resumes where a watch ended. It returns an error if only a list can
// tell what has changed: errExpired when the API server no longer has the changes,
// errWatchSilent, or ctx's error.
func (w *podWatch) follow(ctx context.Context) error {
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
func (w *podWatch) note(ctx context.Context, failed error) {
	w.mu.Lock()
	w.failed = failed
	w.mu.Unlock()
	if failed == nil || ctx.Err() != nil {
		return
	}
	if _, ok := w.limit.allow(); ok {
		w.log.Warn("watch of pods ended, tries again", "silentSeconds", seconds(w.silent()), "error", failed.Error())
	}
}

// pause waits before the next attempt, after success and failure alike. It returns the
// cause if ctx is done.
func (w *podWatch) pause(ctx context.Context, failed error) error {
	w.note(ctx, failed)
	w.waited = w.retry.next()
	if after := retryAfter(failed); after > 0 {
		w.waited += after
	}
	return sleep(ctx, w.waited)
}

// watch passes the changes since version to the handler. It returns nil when the API
// server ends the watch.
func (w *podWatch) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(w.k.bounds.silence-w.silent(), func() { cancel(errWatchSilent) })
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
func (w *podWatch) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("watch pods: %w", err)
}

// watchEvent is one line of a watch.
type watchEvent struct {
	Type   string          `json:"type"`
	Object json.RawMessage `json:"object"` // a pod; a bookmark's has only a version; an ERROR has a Status
}

func (w *podWatch) handle(e watchEvent) error {
	if e.Type == "ERROR" {
		failure := &apiError{address: w.k.address}
		if err := json.Unmarshal(e.Object, &failure.apiStatus); err != nil {
			return fmt.Errorf("decode an ERROR event: %w", err)
		}
		return failure
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
