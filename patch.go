package main

import (
	"encoding/json"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// sidecarName is the name of the injected container.
const sidecarName = "at-least-semaphore-pod-sidecar"

// sidecarProgram is where the image has the program; its startup probe needs the path.
const sidecarProgram = "/at-least-semaphore-pod-hook"

// Where the sidecar finds the certificates that it trusts for rediss://, and those for etcd, if it is given any.
const (
	caVolumeName   = "at-least-semaphore-pod-redis-ca"
	etcdVolumeName = "at-least-semaphore-pod-etcd-tls"
	mountPath      = "/var/run/at-least-semaphore-pod-hook/"
	caMountPath    = mountPath + "redis-ca"
	etcdMountPath  = mountPath + "etcd-tls"
	caFileName     = "ca.crt"
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

// sidecarPatch is the JSON patch that gives a pod its sidecar, for a token that the webhook has taken, or without one for a
// pod that is to wait for it. It only adds to the pod, but for what another such patch has added, as in a pod that was made from
// the YAML of another: that is removed.
//
// A native sidecar goes first in initContainers: Kubernetes starts them in order, and none before the startup probe of the one
// before, so that no other container runs without a token; and it stops them in reverse order after the app. A classic one goes
// last in containers, so that the app stays the default container of kubectl.
func sidecarPatch(c webhookConfig, p *pod, id semaphoreID, asked request, token string) ([]byte, error) {
	var patch []patchOperation
	remove := func(list string, items []named, names ...string) {
		for i, item := range slices.Backward(items) {
			if slices.Contains(names, item.Name) {
				patch = append(patch, patchOperation{Op: "remove", Path: jsonPointer("spec", list, strconv.Itoa(i))})
			}
		}
	}
	remove("initContainers", p.Spec.InitContainers, sidecarName)
	remove("containers", p.Spec.Containers, sidecarName)
	remove("volumes", p.Spec.Volumes, caVolumeName, etcdVolumeName)
	sidecar, volumes := sidecarContainer(c, id, asked, token)
	switch {
	case !c.enableSidecarContainers:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "containers", "-"), sidecar})
	case p.Spec.InitContainers == nil:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "initContainers"), []corev1.Container{sidecar}})
	default:
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "initContainers", "0"), sidecar})
	}
	if len(volumes) > 0 && p.Spec.Volumes == nil {
		patch = append(patch, patchOperation{"add", jsonPointer("spec", "volumes"), volumes})
	} else {
		for _, v := range volumes {
			patch = append(patch, patchOperation{"add", jsonPointer("spec", "volumes", "-"), v})
		}
	}
	if _, ok := p.Metadata.Annotations[annotationToken]; token != "" {
		patch = append(patch, patchOperation{"add", jsonPointer("metadata", "annotations", annotationToken), token})
	} else if ok {
		patch = append(patch, patchOperation{Op: "remove", Path: jsonPointer("metadata", "annotations", annotationToken)})
	}
	return json.Marshal(patch)
}

// sidecarContainer is the container that runs the sidecar mode, and the volumes that it needs. It passes PodSecurity
// "restricted" and quotas that demand requests and limits.
func sidecarContainer(c webhookConfig, id semaphoreID, asked request, token string) (corev1.Container, []corev1.Volume) {
	sidecar := corev1.Container{
		Name:            sidecarName,
		Image:           c.sidecarImage,
		ImagePullPolicy: corev1.PullIfNotPresent,
		Args: []string{
			"sidecar",
			"--queue-redis-address=" + c.queueRedisAddress,
			"--heartbeat-interval-seconds=" + strconv.Itoa(seconds(c.heartbeatInterval)),
			"--stale-threshold-seconds=" + strconv.Itoa(seconds(c.staleThreshold)),
		},
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
	var volumes []corev1.Volume
	if c.sidecarRedisSecret != "" {
		sidecar.Env = append(sidecar.Env,
			secretVariable("REDIS_USERNAME", c.sidecarRedisSecret, "username", true),
			secretVariable("REDIS_PASSWORD", c.sidecarRedisSecret, "password", false))
	}
	if c.sidecarRedisCA.name != "" {
		sidecar.Args = append(sidecar.Args, "--redis-ca-file="+path.Join(caMountPath, caFileName))
		sidecar.VolumeMounts = append(sidecar.VolumeMounts, corev1.VolumeMount{Name: caVolumeName, MountPath: caMountPath, ReadOnly: true})
		volumes = append(volumes, caVolume(c.sidecarRedisCA))
	}
	if c.enableSidecarContainers {
		volumes = append(volumes, confirm(&sidecar, c, asked)...)
		if token == "" {
			token = "$(POD_UID)"
		}
	}
	sidecar.Args = append(sidecar.Args, id.String(), token)
	return sidecar, volumes
}

// confirm makes a native sidecar one that sees to its token, in line if need be, before any other container starts. It returns
// the volumes that this needs.
func confirm(sidecar *corev1.Container, c webhookConfig, asked request) (volumes []corev1.Volume) {
	sidecar.RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
	sidecar.StartupProbe = &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{sidecarProgram, "probe"}}},
		PeriodSeconds:    1,
		TimeoutSeconds:   int32(seconds(probeTimeout)),
		FailureThreshold: math.MaxInt32, // it may wait for as long as it likes
	}
	sidecar.Env = append(sidecar.Env, corev1.EnvVar{
		Name: "POD_UID", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.uid"}},
	})
	sidecar.Args = append(sidecar.Args,
		"--length="+strconv.Itoa(asked.length),
		"--expiration-seconds="+strconv.Itoa(seconds(asked.expiration)),
		"--lock-mode="+c.lockMode)
	if c.lockMode != lockModeEtcd {
		sidecar.Args = append(sidecar.Args, "--redis-addresses="+strings.Join(c.redisAddresses, ","))
		return nil
	}
	sidecar.Args = append(sidecar.Args, "--etcd-addresses="+strings.Join(c.etcdAddresses, ","))
	if c.etcd.username != "" {
		sidecar.Env = append(sidecar.Env,
			secretVariable("ETCD_USERNAME", c.sidecarEtcdSecret, "username", false),
			secretVariable("ETCD_PASSWORD", c.sidecarEtcdSecret, "password", false))
	}
	var items []corev1.KeyToPath
	file := func(flag, name string) {
		items = append(items, corev1.KeyToPath{Key: name, Path: name})
		sidecar.Args = append(sidecar.Args, "--"+flag+"="+path.Join(etcdMountPath, name))
	}
	if c.etcd.caFile != "" {
		file("etcd-ca-file", caFileName)
	}
	if c.etcd.certFile != "" {
		file("etcd-cert-file", corev1.TLSCertKey)
		file("etcd-key-file", corev1.TLSPrivateKeyKey)
	}
	if items == nil {
		return nil
	}
	sidecar.VolumeMounts = append(sidecar.VolumeMounts, corev1.VolumeMount{Name: etcdVolumeName, MountPath: etcdMountPath, ReadOnly: true})
	return []corev1.Volume{{Name: etcdVolumeName, VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: c.sidecarEtcdSecret, Items: items}}}}
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
