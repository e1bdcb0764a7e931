package main

import (
	"encoding/json"
	"net/url"
	"strings"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
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
