package main

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// patchOperation is one step of a JSON patch (RFC 6902).
type patchOperation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// patch is a JSON patch in the making.
type patch []patchOperation

func (p *patch) add(value any, path ...string) {
	*p = append(*p, patchOperation{"add", jsonPointer(path...), value})
}

func (p *patch) remove(path ...string) {
	*p = append(*p, patchOperation{Op: "remove", Path: jsonPointer(path...)})
}

// test lets the whole patch fail where the value is another one.
func (p *patch) test(value any, path ...string) {
	*p = append(*p, patchOperation{"test", jsonPointer(path...), value})
}

// removeNamed removes the items of a list in the pod's spec that have one of the names.
func (p *patch) removeNamed(list string, items []string, names ...string) {
	for i, item := range slices.Backward(items) {
		if slices.Contains(names, item) {
			p.remove("spec", list, strconv.Itoa(i))
		}
	}
}

// appendTo appends an item to a list in the pod's spec, or makes the list if it is not there; then it is.
func appendTo[T any](p *patch, list string, there *bool, item T) {
	if !*there {
		p.add([]T{item}, "spec", list)
	} else {
		p.add(item, "spec", list, "-")
	}
	*there = true
}

// jsonPointer joins the steps of a path (RFC 6901).
func jsonPointer(steps ...string) string {
	escape := strings.NewReplacer("~", "~0", "/", "~1")
	var b strings.Builder
	for _, s := range steps {
		b.WriteByte('/')
		b.WriteString(escape.Replace(s))
	}
	return b.String()
}

// sidecarPatch is the JSON patch that gives a pod its sidecar, for a token that the webhook has taken, or without one for a
// pod that is to wait for it. It only adds to the pod, but for what another such patch has added, as in a pod that was made from
// the YAML of another: that is removed.
//
// A native sidecar goes first in initContainers, and second the container that awaits its token. Kubernetes starts init
// containers in order, and none before the one before it has started, if it is a sidecar, or else has ended well: so no other
// container runs without a token. It stops sidecars in reverse order after the app. A classic sidecar goes last in containers,
// so that the app stays the default container of kubectl.
func sidecarPatch(c webhookConfig, p *pod, id semaphoreID, spec semaphoreSpec, token string) ([]byte, error) {
	var steps patch
	steps.removeNamed("initContainers", namesOf(p.Spec.InitContainers), sidecarName, awaitName)
	steps.removeNamed("containers", namesOf(p.Spec.Containers), sidecarName, awaitName)
	steps.removeNamed("volumes", namesOf(p.Spec.Volumes), caVolumeName, etcdVolumeName)
	resources := resourcesFor(c, p)
	sidecar, volumes := sidecarContainer(c, resources, id, spec, token)
	switch {
	case !c.enableSidecarContainers:
		steps.add(sidecar, "spec", "containers", "-")
	case p.Spec.InitContainers == nil:
		steps.add([]corev1.Container{sidecar, awaitContainer(c, resources)}, "spec", "initContainers")
	default:
		steps.add(sidecar, "spec", "initContainers", "0")
		steps.add(awaitContainer(c, resources), "spec", "initContainers", "1")
	}
	there := p.Spec.Volumes != nil
	for _, v := range volumes {
		appendTo(&steps, "volumes", &there, v)
	}
	if name := c.sidecarImagePullSecret; name != "" && !slices.Contains(namesOf(p.Spec.ImagePullSecrets), name) {
		there := p.Spec.ImagePullSecrets != nil
		appendTo(&steps, "imagePullSecrets", &there, corev1.LocalObjectReference{Name: name})
	}
	setGate(&steps, p, spec.whenFull == whenFullGate)
	if _, ok := p.Metadata.Annotations[annotationToken]; token != "" {
		steps.add(token, "metadata", "annotations", annotationToken)
	} else if ok {
		steps.remove("metadata", "annotations", annotationToken)
	}
	for _, name := range slices.Sorted(maps.Keys(c.podAnnotations)) {
		if _, ok := p.Metadata.Annotations[name]; !ok {
			steps.add(c.podAnnotations[name], "metadata", "annotations", name)
		}
	}
	return json.Marshal(steps)
}

// setGate lets the pod have our scheduling gate and label, or not: one that is made from the YAML of another may have them already.
func setGate(steps *patch, p *pod, gated bool) {
	_, labelled := p.Metadata.Labels[labelGated]
	if !gated {
		steps.removeNamed("schedulingGates", namesOf(p.Spec.SchedulingGates), gateName)
		if labelled {
			steps.remove("metadata", "labels", labelGated)
		}
		return
	}
	if !slices.Contains(namesOf(p.Spec.SchedulingGates), gateName) {
		there := p.Spec.SchedulingGates != nil
		appendTo(steps, "schedulingGates", &there, named{gateName})
	}
	if p.Metadata.Labels == nil {
		steps.add(map[string]string{labelGated: "true"}, "metadata", "labels")
	} else {
		steps.add("true", "metadata", "labels", labelGated)
	}
}
