package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net/http"
	"os"
	"sync"
	"time"
)

// eventReporter is who the events are from.
const eventReporter = annotationPrefix + "gate"

const (
	eventsWaiting   = 2000 // those that find so many before them are left out
	eventsPerSecond = 20
	eventAttempts   = 3
	eventNoteMost   = 1000 // bytes; the API server takes 1023
)

// podEvent is an event of Kubernetes about a pod.
type podEvent struct {
	pod     *watchedPod
	warning bool
	reason  string // one word, such as TokenTaken
	action  string // one word: what was done, or tried
	note    string
	id      string // tells events of the pod with the same reason apart; of those with the same, in an hour, one is shown
}

// eventQueue keeps events until they are sent.
type eventQueue struct {
	waiting chan podEvent
	pace    *pacer

	mu     sync.Mutex
	logged time.Time
}

func newEventQueue() *eventQueue {
	return &eventQueue{waiting: make(chan podEvent, eventsWaiting), pace: newPacer(eventsPerSecond, eventsPerSecond)}
}

// createEvent has an event sent, soon and if that is possible: nothing may depend on it. It does not block.
func (k *kubernetes) createEvent(e podEvent) {
	select {
	case k.events.waiting <- e:
	default:
		k.logEventFailure(fmt.Errorf("%d events wait to be sent", eventsWaiting))
	}
}

// sendEvents sends events one by one until ctx is done.
func (k *kubernetes) sendEvents(ctx context.Context) {
	for {
		select {
		case e := <-k.events.waiting:
			if err := k.sendEvent(ctx, e); err != nil && ctx.Err() == nil {
				k.logEventFailure(err)
			}
		case <-ctx.Done():
			return
		}
	}
}

func (k *kubernetes) logEventFailure(err error) {
	k.events.mu.Lock()
	defer k.events.mu.Unlock()
	if time.Since(k.events.logged) > logEvery {
		k.log.Warn("events of pods left out", "error", err.Error())
		k.events.logged = time.Now()
	}
}

// sendEvent creates the event; that another process has done so before is as good.
func (k *kubernetes) sendEvent(ctx context.Context, e podEvent) error {
	body, err := json.Marshal(e.object(time.Now()))
	if err != nil {
		return err
	}
	path := "/apis/events.k8s.io/v1/namespaces/" + e.pod.namespace + "/events"
	retry := newBackoff(k.bounds.first, k.bounds.most)
	for attempt := 1; ; attempt++ {
		if err := k.events.pace.wait(ctx); err != nil {
			return err
		}
		err := k.call(ctx, http.MethodPost, path, "application/json", body, nil)
		if refused := (*apiError)(nil); errors.As(err, &refused) && refused.Reason == "AlreadyExists" {
			return nil
		}
		if !errors.Is(err, errTryAgain) || attempt == eventAttempts {
			return err
		}
		if err := sleep(ctx, retry.next()); err != nil {
			return err
		}
	}
}

// object is the Event of events.k8s.io/v1. Its name is the same in all processes that tell the same.
func (e *podEvent) object(now time.Time) map[string]any {
	id := fnv.New64a()
	fmt.Fprintf(id, "%s\x00%s\x00%s", e.pod.uid, e.reason, e.id)
	kind := "Normal"
	if e.warning {
		kind = "Warning"
	}
	return map[string]any{
		"apiVersion": "events.k8s.io/v1",
		"kind":       "Event",
		"metadata":   map[string]string{"namespace": e.pod.namespace, "name": fmt.Sprintf("%s.%016x", truncate(e.pod.name, 200), id.Sum64())},
		"regarding": map[string]string{"apiVersion": "v1", "kind": "Pod", "namespace": e.pod.namespace, "name": e.pod.name, "uid": e.pod.uid,
			"resourceVersion": e.pod.version},
		"eventTime":           now.UTC().Format("2006-01-02T15:04:05.000000Z"),
		"reportingController": eventReporter,
		"reportingInstance":   instanceName(),
		"type":                kind,
		"reason":              e.reason,
		"action":              e.action,
		"note":                truncate(e.note, eventNoteMost),
	}
}

// instanceName tells the processes of a Deployment apart: the pod's name.
func instanceName() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return truncate(name, 128)
}

// pacer lets calls pass in their order, one each gap, and a burst of them after a rest.
type pacer struct {
	gap  time.Duration
	rest time.Duration // no more than so much of it counts
	head chan struct{} // full while a call is at the head of the line

	mu   sync.Mutex
	next time.Time // when the next call may pass
}

func newPacer(perSecond, burst int) *pacer {
	gap := time.Second / time.Duration(perSecond)
	return &pacer{gap: gap, rest: gap * time.Duration(burst), head: make(chan struct{}, 1)}
}

// wait waits for the caller's turn. Its error is that of ctx.
func (p *pacer) wait(ctx context.Context) error {
	select {
	case p.head <- struct{}{}:
		defer func() { <-p.head }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for {
		due := p.pass()
		if due <= 0 {
			return nil
		}
		if err := sleep(ctx, due); err != nil {
			return err
		}
	}
}

// pass lets a call pass, or says in what time it may.
func (p *pacer) pass() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if rested := now.Add(-p.rest); p.next.Before(rested) {
		p.next = rested
	}
	if p.next.After(now) {
		return p.next.Sub(now)
	}
	p.next = p.next.Add(p.gap)
	return 0
}

// hold lets none pass for d.
func (p *pacer) hold(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if until := time.Now().Add(d); p.next.Before(until) {
		p.next = until
	}
}
