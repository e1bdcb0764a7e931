package main

import (
	"path"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// The names of the injected containers.
const (
	sidecarName = "at-least-semaphore-pod-sidecar"
	awaitName   = "at-least-semaphore-pod-await"
)

// Where the sidecar finds the certificates that it trusts for rediss://, and those for etcd, if it is given any.
const (
	caVolumeName   = "at-least-semaphore-pod-redis-ca"
	etcdVolumeName = "at-least-semaphore-pod-etcd-tls"
	mountPath      = "/var/run/at-least-semaphore-pod-hook/"
	caMountPath    = mountPath + "redis-ca"
	etcdMountPath  = mountPath + "etcd-tls"
	caFileName     = "ca.crt"
)

// nobody is the user and group of the distroless image's "nonroot". The containers name them themselves, so that they run in a
// pod whose own security context says root.
const nobody int64 = 65532

// What a container is told of its pod: the UID, by which await and sidecar find each other, and what people know it by.
var (
	podUIDVariable   = fieldVariable("POD_UID", "metadata.uid")
	podNameVariable  = fieldVariable("POD_NAME", "metadata.name")
	nodeNameVariable = fieldVariable("NODE_NAME", "spec.nodeName")
)

// oneProcessor is all that the injected containers need: for each processor, Go keeps memory of its own, on a node with two a tenth of what a
// sidecar has. Go reads it before main begins; to say so later would cost more.
var oneProcessor = corev1.EnvVar{Name: "GOMAXPROCS", Value: "1"}

// podUIDReference is what Kubernetes replaces in arguments: the token of a pod that takes it itself.
const podUIDReference = "$(POD_UID)"

func fieldVariable(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}}
}

// injectedContainer is a container that runs this program. It passes PodSecurity "restricted".
func injectedContainer(c webhookConfig, name string, resources corev1.ResourceRequirements, args ...string) corev1.Container {
	return corev1.Container{
		Name:                     name,
		Image:                    c.sidecarImage,
		ImagePullPolicy:          corev1.PullIfNotPresent,
		Args:                     args,
		Env:                      []corev1.EnvVar{oneProcessor},
		Resources:                resources,
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
}

// sidecarContainer is the container that runs the sidecar mode, and the volumes that it needs.
func sidecarContainer(c webhookConfig, resources corev1.ResourceRequirements, id semaphoreID, spec semaphoreSpec, token string) (corev1.Container, []corev1.Volume) {
	sidecar := injectedContainer(c, sidecarName, resources,
		"sidecar",
		"--queue-redis-address="+c.queueRedisAddress.String(),
		"--heartbeat-interval-seconds="+strconv.Itoa(seconds(c.heartbeatInterval)),
		"--stale-threshold-seconds="+strconv.Itoa(seconds(c.staleThreshold)))
	sidecar.Env = append(sidecar.Env, podNameVariable, nodeNameVariable)
	var volumes []corev1.Volume
	if c.sidecarRedisSecret != "" {
		sidecar.Env = append(sidecar.Env,
			secretVariable("REDIS_USERNAME", c.sidecarRedisSecret, "username", true),
			secretVariable("REDIS_PASSWORD", c.sidecarRedisSecret, "password", c.redis.password == "" && c.redis.sentinelPassword != ""))
	}
	if c.redis.sentinelPassword != "" {
		sidecar.Env = append(sidecar.Env,
			secretVariable("REDIS_SENTINEL_USERNAME", c.sidecarRedisSecret, "sentinel-username", true),
			secretVariable("REDIS_SENTINEL_PASSWORD", c.sidecarRedisSecret, "sentinel-password", false))
	}
	if c.sidecarRedisCA.name != "" {
		sidecar.Args = append(sidecar.Args, "--redis-ca-file="+path.Join(caMountPath, caFileName))
		sidecar.VolumeMounts = append(sidecar.VolumeMounts, corev1.VolumeMount{Name: caVolumeName, MountPath: caMountPath, ReadOnly: true})
		volumes = append(volumes, caVolume(c.sidecarRedisCA))
	}
	if c.enableSidecarContainers {
		volumes = append(volumes, addNative(&sidecar, c, spec)...)
	}
	sidecar.Args = append(sidecar.Args, id.String(), token)
	return sidecar, volumes
}

func lengthFlag(length int) string { return "--length=" + strconv.Itoa(length) }
func expirationFlag(expiration time.Duration) string {
	return "--expiration-seconds=" + strconv.Itoa(seconds(expiration))
}

// addNative makes it a native sidecar that acquires its token, in line if need be. It returns the volumes that this needs.
func addNative(sidecar *corev1.Container, c webhookConfig, spec semaphoreSpec) (volumes []corev1.Volume) {
	sidecar.RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
	sidecar.Env = append(sidecar.Env, podUIDVariable)
	sidecar.Args = append(sidecar.Args,
		lengthFlag(spec.length),
		expirationFlag(spec.expiration),
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
	return []corev1.Volume{{Name: etcdVolumeName, VolumeSource: corev1.VolumeSource{
		Secret: &corev1.SecretVolumeSource{SecretName: c.sidecarEtcdSecret, Items: items},
	}}}
}

// awaitContainer is the init container that ends when the sidecar holds the token.
func awaitContainer(c webhookConfig, resources corev1.ResourceRequirements) corev1.Container {
	await := injectedContainer(c, awaitName, resources, "await")
	await.Env = append(await.Env, podUIDVariable)
	if c.restartAwait {
		await.RestartPolicy = new(corev1.ContainerRestartPolicyOnFailure)
	}
	return await
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

// resourceKind tells which requests and limits each container has that is injected into a pod.
type resourceKind int

const (
	resourcesBurstable  resourceKind = iota
	resourcesGuaranteed              // a pod of this QoS class keeps it
	resourcesOfPod                   // it has resources as a whole, and may be refused if the requests of its containers add up to more
	resourceKinds
)

func resourceKindOf(p *pod) resourceKind {
	switch {
	case len(p.Spec.Resources.Limits)+len(p.Spec.Resources.Requests) > 0:
		return resourcesOfPod
	case p.isGuaranteed():
		return resourcesGuaranteed
	}
	return resourcesBurstable
}

func (k resourceKind) resources(c webhookConfig) corev1.ResourceRequirements {
	switch k {
	case resourcesOfPod:
		return corev1.ResourceRequirements{}
	case resourcesGuaranteed:
		return corev1.ResourceRequirements{Requests: c.sidecarLimits, Limits: c.sidecarLimits}
	}
	return corev1.ResourceRequirements{Requests: c.sidecarRequests, Limits: c.sidecarLimits}
}

// isGuaranteed reports whether a pod, without what is injected, is of the QoS class Guaranteed: each of its containers has limits
// for CPU and memory, and requests that are equal to them, or none, which means the same.
func (p *pod) isGuaranteed() bool {
	for _, list := range [][]podContainer{p.Spec.InitContainers, p.Spec.Containers} {
		for _, c := range list {
			if c.Name == sidecarName || c.Name == awaitName {
				continue
			}
			for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
				limit := c.Resources.Limits[name]
				request, ok := c.Resources.Requests[name]
				if limit.IsZero() || ok && request.Cmp(limit) != 0 {
					return false
				}
			}
		}
	}
	return true
}
