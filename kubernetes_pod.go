package main

import (
	"encoding/json"
	"io"
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
	node                 string // empty until it is scheduled
	phase                string
	scheduled            podScheduled
	initContainers       []initContainer // ours
}

// podScheduled is the condition PodScheduled. It is empty until something looked at the pod.
type podScheduled struct {
	status, reason string // True; False with SchedulingGated or Unschedulable
	message        string
	since          time.Time
}

// initContainer is the state of the sidecar, or of await.
type initContainer struct {
	name    string
	started bool
	state   string    // waiting, running or terminated; empty if the kubelet has not said
	since   time.Time // if it runs, or ended
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
		NodeName        string  `json:"nodeName"`
	} `json:"spec"`
	Status struct {
		Phase      string `json:"phase"`
		Conditions []struct {
			Type               string    `json:"type"`
			Status             string    `json:"status"`
			Reason             string    `json:"reason"`
			Message            string    `json:"message"`
			LastTransitionTime time.Time `json:"lastTransitionTime"`
		} `json:"conditions"`
		InitContainerStatuses []struct {
			Name    string `json:"name"`
			Started bool   `json:"started"`
			State   struct {
				Waiting *struct{} `json:"waiting"`
				Running *struct {
					StartedAt time.Time `json:"startedAt"`
				} `json:"running"`
				Terminated *struct {
					FinishedAt time.Time `json:"finishedAt"`
				} `json:"terminated"`
			} `json:"state"`
		} `json:"initContainerStatuses"`
	} `json:"status"`
}

func (o *podObject) watched() *watchedPod {
	m := &o.Metadata
	p := &watchedPod{
		namespace: shared(m.Namespace), name: m.Name, uid: m.UID, version: m.ResourceVersion, created: m.CreationTimestamp, deleted: m.DeletionTimestamp != nil,
		labels: ours(m.Labels), annotations: ours(m.Annotations), node: shared(o.Spec.NodeName), phase: shared(o.Status.Phase),
	}
	for _, g := range o.Spec.SchedulingGates {
		p.gates = append(p.gates, shared(g.Name))
	}
	for _, c := range o.Status.Conditions {
		if c.Type == "PodScheduled" {
			p.scheduled = podScheduled{shared(c.Status), shared(c.Reason), shared(truncate(c.Message, 500)), c.LastTransitionTime}
		}
	}
	for _, s := range o.Status.InitContainerStatuses {
		if s.Name != sidecarName && s.Name != awaitName {
			continue
		}
		c := initContainer{name: shared(s.Name), started: s.Started}
		switch {
		case s.State.Terminated != nil:
			c.state, c.since = "terminated", s.State.Terminated.FinishedAt
		case s.State.Running != nil:
			c.state, c.since = "running", s.State.Running.StartedAt
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
