package main

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// sidecarName is the name of the injected container.
const sidecarName = "at-least-semaphore-pod-sidecar"

// nobody is the user and group of the distroless image's "nonroot". The container names them itself, so that it
// runs in a pod whose own security context says root.
const nobody int64 = 65532

// patchOperation is one step of a JSON patch (RFC 6902).
type patchOperation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
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

// sidecarPatch is the JSON patch that gives a pod the sidecar for its token. It only adds to the pod, but for
// sidecars that are there already, as in a pod that was made from the YAML of another: those are removed.
//
// A native sidecar goes first in initContainers: Kubernetes starts them in order, so that the token is kept alive
// however long the other init containers take, and stops them in reverse order after the app. A classic one
// goes last in containers, so that the app stays the default container of kubectl.
func sidecarPatch(c webhookConfig, p *pod, id semaphoreID, token string) ([]byte, error) {
	var patch []patchOperation
	remove := func(list string, containers []container) {
		for i, c := range slices.Backward(containers) {
			if c.Name == sidecarName {
				patch = append(patch, patchOperation{Op: "remove", Path: jsonPointer("spec", list, strconv.Itoa(i))})
			}
		}
	}
	remove("initContainers", p.Spec.InitContainers)
	remove("containers", p.Spec.Containers)
	sidecar := sidecarContainer(c, id, token)
	switch {
	case !c.enableSidecarContainers:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "containers", "-"), sidecar})
	case p.Spec.InitContainers == nil:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "initContainers"), []corev1.Container{sidecar}})
	default:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "initContainers", "0"), sidecar})
	}
	patch = append(patch, patchOperation{"add", jsonPointer("metadata", "annotations", annotationToken), token})
	return json.Marshal(patch)
}

// sidecarContainer is the container that runs the sidecar mode. It passes PodSecurity "restricted" and quotas that
// demand requests and limits.
func sidecarContainer(c webhookConfig, id semaphoreID, token string) corev1.Container {
	sidecar := corev1.Container{
		Name:            sidecarName,
		Image:           c.sidecarImage,
		ImagePullPolicy: corev1.PullIfNotPresent,
		Args: []string{
			"sidecar",
			"--queue-redis-address=" + c.queueRedisAddress,
			"--heartbeat-interval-seconds=" + strconv.Itoa(seconds(c.heartbeatInterval)),
			"--stale-threshold-seconds=" + strconv.Itoa(seconds(c.staleThreshold)),
			id.String(),
			token,
		},
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{
				corev1.ResourceCPU:    resource.MustParse("5m"),
				corev1.ResourceMemory: resource.MustParse("24Mi"),
			},
			Limits: corev1.ResourceList{
				corev1.ResourceCPU:    resource.MustParse("100m"),
				corev1.ResourceMemory: resource.MustParse("64Mi"),
			},
		},
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: new(false),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			ReadOnlyRootFilesystem:   new(true),
			RunAsGroup:               new(nobody),
			RunAsNonRoot:             new(true),
			RunAsUser:                new(nobody),
			SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
	}
	if c.enableSidecarContainers {
		sidecar.RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
	}
	return sidecar
}
