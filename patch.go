package main

import (
	"encoding/json"
	"path"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// sidecarName is the name of the injected container.
const sidecarName = "at-least-semaphore-pod-sidecar"

// Where the sidecar finds the certificates that it trusts for rediss://, if it is given any.
const (
	caVolumeName = "at-least-semaphore-pod-redis-ca"
	caMountPath  = "/var/run/at-least-semaphore-pod-hook/redis-ca"
	caFileName   = "ca.crt"
)

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
// sidecars (and their volumes) that are there already, as in a pod that was made from the YAML of another: those are removed.
//
// A native sidecar goes first in initContainers: Kubernetes starts them in order, so that the token is kept alive
// however long the other init containers take, and stops them in reverse order after the app. A classic one
// goes last in containers, so that the app stays the default container of kubectl.
func sidecarPatch(c webhookConfig, p *pod, id semaphoreID, token string) ([]byte, error) {
	var patch []patchOperation
	remove := func(list, name string, items []named) {
		for i, item := range slices.Backward(items) {
			if item.Name == name {
				patch = append(patch, patchOperation{Op: "remove", Path: jsonPointer("spec", list, strconv.Itoa(i))})
			}
		}
	}
	remove("initContainers", sidecarName, p.Spec.InitContainers)
	remove("containers", sidecarName, p.Spec.Containers)
	remove("volumes", caVolumeName, p.Spec.Volumes)
	sidecar := sidecarContainer(c, id, token)
	switch {
	case !c.enableSidecarContainers:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "containers", "-"), sidecar})
	case p.Spec.InitContainers == nil:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "initContainers"), []corev1.Container{sidecar}})
	default:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "initContainers", "0"), sidecar})
	}
	if c.sidecarRedisCA.name != "" {
		if p.Spec.Volumes == nil {
			patch = append(patch, patchOperation{"add", jsonPointer("spec", "volumes"), []corev1.Volume{caVolume(c.sidecarRedisCA)}})
		} else {
			patch = append(patch, patchOperation{"add", jsonPointer("spec", "volumes", "-"), caVolume(c.sidecarRedisCA)})
		}
	}
	patch = append(patch, patchOperation{"add", jsonPointer("metadata", "annotations", annotationToken), token})
	return json.Marshal(patch)
}

// sidecarContainer is the container that runs the sidecar mode. It passes PodSecurity "restricted" and quotas that
// demand requests and limits.
func sidecarContainer(c webhookConfig, id semaphoreID, token string) corev1.Container {
	args := []string{
		"sidecar",
		"--queue-redis-address=" + c.queueRedisAddress,
		"--heartbeat-interval-seconds=" + strconv.Itoa(seconds(c.heartbeatInterval)),
		"--stale-threshold-seconds=" + strconv.Itoa(seconds(c.staleThreshold)),
	}
	if c.sidecarRedisCA.name != "" {
		args = append(args, "--redis-ca-file="+path.Join(caMountPath, caFileName))
	}
	sidecar := corev1.Container{
		Name:            sidecarName,
		Image:           c.sidecarImage,
		ImagePullPolicy: corev1.PullIfNotPresent,
		Args:            append(args, id.String(), token),
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{
				corev1.ResourceCPU:    resource.MustParse("5m"),
				corev1.ResourceMemory: resource.MustParse("32Mi"),
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
	if c.sidecarRedisSecret != "" {
		sidecar.Env = []corev1.EnvVar{
			secretVariable("REDIS_USERNAME", c.sidecarRedisSecret, "username", true),
			secretVariable("REDIS_PASSWORD", c.sidecarRedisSecret, "password", false),
		}
	}
	if c.sidecarRedisCA.name != "" {
		sidecar.VolumeMounts = []corev1.VolumeMount{{Name: caVolumeName, MountPath: caMountPath, ReadOnly: true}}
	}
	return sidecar
}

func secretVariable(name, secret, key string, optional bool) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
		LocalObjectReference: corev1.LocalObjectReference{Name: secret}, Key: key, Optional: &optional,
	}}}
}

// caVolume is the volume with the certificates that the sidecar trusts.
func caVolume(from objectReference) corev1.Volume {
	volume := corev1.Volume{Name: caVolumeName}
	items := []corev1.KeyToPath{{Key: caFileName, Path: caFileName}}
	if from.kind == "secret" {
		volume.Secret = &corev1.SecretVolumeSource{SecretName: from.name, Items: items}
	} else {
		volume.ConfigMap = &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: from.name}, Items: items}
	}
	return volume
}
