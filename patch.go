package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// patch is a JSON patch (RFC 6902).
type patch []patchStep

type patchStep struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

func (p *patch) step(op string, value any, path []string) {
	*p = append(*p, patchStep{op, jsonPointer(path...), value})
}

func (p *patch) add(value any, path ...string) { p.step("add", value, path) }

func (p *patch) remove(path ...string) { p.step("remove", nil, path) }

// test makes the patch fail unless the value at path equals value.
func (p *patch) test(value any, path ...string) { p.step("test", value, path) }

// removeNamed removes the items of a list in the pod's spec that have one of the names.
func (p *patch) removeNamed(list string, items []string, names ...string) {
	for i, item := range slices.Backward(items) {
		if slices.Contains(names, item) {
			p.remove("spec", list, strconv.Itoa(i))
		}
	}
}

// appendTo appends items to a list in the pod's spec, and makes the list if it is not
// there.
func appendTo[T any](p *patch, list string, there bool, items ...T) {
	if !there && len(items) > 0 {
		p.add(items, "spec", list)
		return
	}
	for _, item := range items {
		p.add(item, "spec", list, "-")
	}
}

func (p patch) json() []byte {
	text, _ := json.Marshal(p) // cannot fail: the values are texts and objects of Kubernetes
	return text
}

// jsonPointer joins the steps of a path (RFC 6901).
func jsonPointer(steps ...string) string {
	var b strings.Builder
	for _, s := range steps {
		b.WriteByte('/')
		b.WriteString(pointerEscapes.Replace(s))
	}
	return b.String()
}

var pointerEscapes = strings.NewReplacer("~", "~0", "/", "~1")

// sidecarPatch returns the JSON patch that gives a pod its sidecar: with the token that the
// webhook has taken, or without one for a pod that waits. It only adds to the pod, with
// one exception. A pod made from the YAML of another may have what a former patch added:
// that is removed.
//
// A native sidecar goes first in initContainers, and the container that awaits its token
// second. Kubernetes starts init containers in order. It starts none before the previous
// one has started, if that is a sidecar, or else has succeeded: so no other container
// runs without a token. It stops sidecars after the app, in reverse order. A classic
// sidecar goes last in containers, so that the app stays the default container of
// kubectl.
func sidecarPatch(c webhookConfig, p *pod, id semaphoreID, spec semaphoreSpec, token string) []byte {
	var steps patch
	steps.removeNamed("initContainers", namesOf(p.Spec.InitContainers), sidecarName, awaitName)
	steps.removeNamed("containers", namesOf(p.Spec.Containers), sidecarName, awaitName)
	steps.removeNamed("volumes", namesOf(p.Spec.Volumes), caVolumeName, etcdVolumeName)
	resources := injectedResources(c, p)
	sidecar, volumes := sidecarContainer(c, resources, id, spec, token)
	switch await := awaitContainer(c, p, spec, resources); {
	case !c.enableSidecarContainers:
		steps.add(sidecar, "spec", "containers", "-")
	case p.Spec.InitContainers == nil:
		steps.add([]corev1.Container{sidecar, await}, "spec", "initContainers")
	default:
		steps.add(sidecar, "spec", "initContainers", "0")
		steps.add(await, "spec", "initContainers", "1")
	}
	appendTo(&steps, "volumes", p.Spec.Volumes != nil, volumes...)
	if name := c.sidecarImagePullSecret; name != "" && !slices.Contains(namesOf(p.Spec.ImagePullSecrets), name) {
		appendTo(&steps, "imagePullSecrets", p.Spec.ImagePullSecrets != nil, corev1.LocalObjectReference{Name: name})
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
	return steps.json()
}

// setGate adds our scheduling gate and label, or removes them: a pod made from the YAML
// of another may have them already.
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
		appendTo(steps, "schedulingGates", p.Spec.SchedulingGates != nil, corev1.PodSchedulingGate{Name: gateName})
	}
	if p.Metadata.Labels == nil {
		steps.add(map[string]string{labelGated: "true"}, "metadata", "labels")
	} else {
		steps.add("true", "metadata", "labels", labelGated)
	}
}

// Where the sidecar finds the certificates that it trusts for rediss://, and those for
// etcd.
const (
	caVolumeName   = "at-least-semaphore-pod-redis-ca"
	etcdVolumeName = "at-least-semaphore-pod-etcd-tls"
	mountPath      = "/var/run/at-least-semaphore-pod-hook/"
	caMountPath    = mountPath + "redis-ca"
	etcdMountPath  = mountPath + "etcd-tls"
	caFileName     = "ca.crt"
)

// What a container knows of its pod: the UID, which names its token, and by which await and
// sidecar find each other; and the names that people know.
var (
	podUIDVariable   = fieldVariable("POD_UID", "metadata.uid")
	podNameVariable  = fieldVariable("POD_NAME", "metadata.name")
	nodeNameVariable = fieldVariable("NODE_NAME", "spec.nodeName")

	podNamespaceVariable = fieldVariable("POD_NAMESPACE", "metadata.namespace") // to share a semaphore
)

// oneProcessor sets GOMAXPROCS for the injected containers, which need no more. Go keeps
// memory for each processor: with two, that is a tenth of a sidecar's memory. Go reads
// the variable before main begins; setting it later would cost more.
var oneProcessor = corev1.EnvVar{Name: "GOMAXPROCS", Value: "1"}

// podUIDReference is replaced by Kubernetes in arguments: the token of a pod that
// acquires it itself.
const podUIDReference = "$(POD_UID)"

func fieldVariable(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{
		FieldRef: &corev1.ObjectFieldSelector{FieldPath: path},
	}}
}

// injectedContainer is a container that runs this program. It passes PodSecurity
// "restricted". It names its user, so that it runs even if the pod's security context
// names root; with sidecarUserNone, the kubelet refuses that.
func injectedContainer(c webhookConfig, name string, resources corev1.ResourceRequirements,
	args ...string) corev1.Container {
	security := &corev1.SecurityContext{
		AllowPrivilegeEscalation: new(false),
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		ReadOnlyRootFilesystem:   new(true),
		RunAsNonRoot:             new(true),
		SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
	if c.sidecarUser != sidecarUserNone {
		security.RunAsUser, security.RunAsGroup = new(nonroot), new(nonroot)
	}
	return corev1.Container{
		Name:                     name,
		Image:                    c.sidecarImage,
		ImagePullPolicy:          corev1.PullIfNotPresent,
		Args:                     args,
		Env:                      []corev1.EnvVar{oneProcessor},
		Resources:                resources,
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		SecurityContext:          security,
	}
}

// sidecarContainer returns the container that runs the sidecar mode, and its volumes.
func sidecarContainer(c webhookConfig, resources corev1.ResourceRequirements, id semaphoreID, spec semaphoreSpec,
	token string) (corev1.Container, []corev1.Volume) {
	sidecar := injectedContainer(c, sidecarName, resources, "sidecar")
	for _, setting := range [][2]string{
		{"queue-redis-address", c.queueRedisAddress.String()},
		{"heartbeat-interval-seconds", strconv.Itoa(seconds(c.heartbeatInterval))},
		{"stale-threshold-seconds", strconv.Itoa(seconds(c.staleThreshold))},
	} {
		flag, value := setting[0], setting[1]
		sidecar.Args = append(sidecar.Args, "--"+flag+"="+value)
		sidecar.Env = append(sidecar.Env, corev1.EnvVar{Name: queueVariables[flag], Value: value}) // for status
	}
	sidecar.Env = append(sidecar.Env, corev1.EnvVar{Name: semaphoreVariable, Value: id.String()})
	if id.namespace == shared {
		sidecar.Env = append(sidecar.Env, podNamespaceVariable)
	}
	sidecar.Env = append(sidecar.Env, podNameVariable, nodeNameVariable, podUIDVariable)
	var volumes []corev1.Volume
	if c.sidecarRedisSecret != "" {
		sidecar.Env = append(sidecar.Env,
			secretVariable("REDIS_USERNAME", c.sidecarRedisSecret, "username", true),
			secretVariable("REDIS_PASSWORD", c.sidecarRedisSecret, "password",
				!c.redis.hasPassword() && c.redis.sentinelPassword != ""))
	}
	if c.redis.sentinelPassword != "" {
		sidecar.Env = append(sidecar.Env,
			secretVariable("REDIS_SENTINEL_USERNAME", c.sidecarRedisSecret, "sentinel-username", true),
			secretVariable("REDIS_SENTINEL_PASSWORD", c.sidecarRedisSecret, "sentinel-password", false))
	}
	if c.sidecarRedisCA.name != "" {
		file := path.Join(caMountPath, caFileName)
		sidecar.Args = append(sidecar.Args, "--redis-ca-file="+file)
		sidecar.Env = append(sidecar.Env, corev1.EnvVar{Name: queueVariables["redis-ca-file"], Value: file})
		sidecar.VolumeMounts = append(sidecar.VolumeMounts,
			corev1.VolumeMount{Name: caVolumeName, MountPath: caMountPath, ReadOnly: true})
		volumes = append(volumes, caVolume(c.sidecarRedisCA))
	}
	if c.enableSidecarContainers {
		volumes = append(volumes, addNative(&sidecar, c, spec)...)
		if token == "" {
			token = podUIDReference
		}
	}
	sidecar.Args = append(sidecar.Args, id.String(), token)
	return sidecar, volumes
}

const (
	lengthPrefix     = "--length="
	expirationPrefix = "--expiration-seconds="
	headStartPrefix  = "--head-start-seconds="
	tokensPrefix     = "--tokens="
	waitPrefix       = "--wait-seconds="
	whenWaitedPrefix = "--when-waited="
)

// tokenPrefixes begin the flags of tokenConfig.
var tokenPrefixes = []string{lengthPrefix, expirationPrefix, headStartPrefix, tokensPrefix, waitPrefix, whenWaitedPrefix}

// gatedToken reads from the arguments of a gated pod's sidecar which token the pod
// waits for. It leaves out all flags but those of tokenConfig: the others name files that
// only the pod has.
func gatedToken(args []string, namespace, uid string) (c tokenConfig, err error) {
	if len(args) == 0 || args[0] != "sidecar" {
		return c, errors.New("the pod has no sidecar of the webhook")
	}
	own := slices.DeleteFunc(slices.Clone(args[1:]), func(arg string) bool {
		ours := func(prefix string) bool { return strings.HasPrefix(arg, prefix) }
		return strings.HasPrefix(arg, "-") && !slices.ContainsFunc(tokenPrefixes, ours)
	})
	for i := range own {
		own[i] = strings.ReplaceAll(own[i], podUIDReference, uid) // as the kubelet does
	}
	err = parseFlags(&c, "sidecar", "", own, func(string) string { return "" })
	switch {
	case err != nil:
	case c.semaphore.namespace != namespace && c.semaphore.namespace != shared:
		err = fmt.Errorf("%s is a semaphore of another namespace", c.semaphore)
	case c.token != uid:
		err = fmt.Errorf("the token %s is not the UID of the pod", c.token)
	case c.length == 0:
		err = errors.New("--length: is needed: the sidecar waits for no token")
	}
	return c, err
}

// addNative makes it a native sidecar that acquires its token, in line if needed. It
// returns the volumes for that.
func addNative(sidecar *corev1.Container, c webhookConfig, spec semaphoreSpec) (volumes []corev1.Volume) {
	sidecar.RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
	sidecar.Args = append(sidecar.Args,
		lengthPrefix+strconv.Itoa(spec.length),
		expirationPrefix+strconv.Itoa(seconds(spec.expiration)),
		"--lock-mode="+c.lockMode)
	if spec.tokens > 1 {
		sidecar.Args = append(sidecar.Args, tokensPrefix+strconv.Itoa(spec.tokens))
	}
	if spec.headStart > 0 {
		sidecar.Args = append(sidecar.Args, headStartPrefix+strconv.Itoa(seconds(spec.headStart)))
	}
	if spec.wait.after > 0 {
		sidecar.Args = append(sidecar.Args, waitPrefix+strconv.Itoa(seconds(spec.wait.after)),
			whenWaitedPrefix+spec.wait.then)
	}
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
	sidecar.VolumeMounts = append(sidecar.VolumeMounts,
		corev1.VolumeMount{Name: etcdVolumeName, MountPath: etcdMountPath, ReadOnly: true})
	return []corev1.Volume{{Name: etcdVolumeName, VolumeSource: corev1.VolumeSource{
		Secret: &corev1.SecretVolumeSource{SecretName: c.sidecarEtcdSecret, Items: items},
	}}}
}

// awaitContainer returns the init container that ends when the sidecar holds the token.
//
// With restartAwait, the kubelet restarts it whenever it fails. But a pod with restartPolicy
// Never that gave up must fail, and not wait again: then a rule leaves out that exit code.
func awaitContainer(c webhookConfig, p *pod, spec semaphoreSpec, resources corev1.ResourceRequirements) corev1.Container {
	await := injectedContainer(c, awaitName, resources, "await")
	await.Env = append(await.Env, podUIDVariable)
	switch {
	case !c.restartAwait:
	case spec.wait.fails() && p.Spec.RestartPolicy == "Never":
		await.RestartPolicy = new(corev1.ContainerRestartPolicyNever)
		await.RestartPolicyRules = []corev1.ContainerRestartRule{{
			Action: corev1.ContainerRestartRuleActionRestart,
			ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{
				Operator: corev1.ContainerRestartRuleOnExitCodesOpNotIn, Values: []int32{0, exitGaveUp}},
		}}
	default:
		await.RestartPolicy = new(corev1.ContainerRestartPolicyOnFailure)
	}
	return await
}

func secretVariable(name, secret, key string, optional bool) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
		LocalObjectReference: corev1.LocalObjectReference{Name: secret}, Key: key, Optional: &optional,
	}}}
}

// caVolume returns the volume with the certificates that the sidecar trusts. They may be
// missing until the namespace is ready: the kubelet would retry a volume for two minutes
// where it retries a container, which misses its password, every few seconds.
func caVolume(from objectReference) corev1.Volume {
	volume := corev1.Volume{Name: caVolumeName}
	optional := true
	items := []corev1.KeyToPath{{Key: caFileName, Path: caFileName}}
	if from.kind == "secret" {
		volume.Secret = &corev1.SecretVolumeSource{SecretName: from.name, Items: items, Optional: &optional}
	} else {
		name := corev1.LocalObjectReference{Name: from.name}
		volume.ConfigMap = &corev1.ConfigMapVolumeSource{LocalObjectReference: name, Items: items, Optional: &optional}
	}
	return volume
}

// injectedResources returns the requests and limits of each injected container. A pod of
// the QoS class Guaranteed keeps its class. A pod with resources as a whole may get
// refused if its containers request more, so the injected ones request nothing.
func injectedResources(c webhookConfig, p *pod) corev1.ResourceRequirements {
	switch {
	case len(p.Spec.Resources.Limits)+len(p.Spec.Resources.Requests) > 0:
		return corev1.ResourceRequirements{}
	case p.isGuaranteed():
		return corev1.ResourceRequirements{Requests: c.sidecarLimits, Limits: c.sidecarLimits}
	}
	return corev1.ResourceRequirements{Requests: c.sidecarRequests, Limits: c.sidecarLimits}
}

// isGuaranteed reports whether a pod, without what is injected, is of the QoS class
// Guaranteed. Then each container has limits for CPU and memory, and requests that equal
// them, or none, which means the same.
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
