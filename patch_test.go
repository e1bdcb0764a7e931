package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
)

var (
	testID   = semaphoreID{"shop", "web"}
	testSpec = semaphoreSpec{key: "web", length: 3, expiration: 10 * time.Second}
)

const testToken = "b7a1f0de-8a0e-4b0c-9d52-0a3c1a7de001"

// patched applies the patch for a token to the JSON of a pod.
func patched(t *testing.T, c webhookConfig, object []byte, token string) map[string]any {
	t.Helper()
	p := new(pod)
	rig.Must(t, json.Unmarshal(object, p))
	patch, err := jsonpatch.DecodePatch(sidecarPatch(c, p, testID, testSpec, token))
	rig.Must(t, err)
	result, err := patch.Apply(object)
	rig.Must(t, err)
	var m map[string]any
	rig.Must(t, json.Unmarshal(result, &m))
	return m
}

func containers(p map[string]any, list string) []any {
	l, _ := p["spec"].(map[string]any)[list].([]any)
	return l
}

// fixtures are the pods of real admission reviews, as JSON.
func fixtures(t *testing.T) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("test/testdata/admission-reviews/*.json")
	rig.Must(t, err)
	if len(files) < 6 {
		t.Fatalf("only %d admission reviews", len(files))
	}
	pods := map[string][]byte{}
	for _, f := range files {
		body, err := os.ReadFile(f)
		rig.Must(t, err)
		r, err := decodeReview(body)
		rig.Must(t, err)
		pods[filepath.Base(f)] = r.Object
	}
	return pods
}

// wantSidecar returns exactly the sidecar container that the patch adds.
func wantSidecar(native bool, token string) map[string]any {
	c := map[string]any{
		"name":            "at-least-semaphore-pod-sidecar",
		"image":           "example.org/sidecar:v1",
		"imagePullPolicy": "IfNotPresent",
		"args": []any{"sidecar", "--queue-redis-address=redis:6379", "--heartbeat-interval-seconds=30",
			"--stale-threshold-seconds=120", "shop/web", token},
		"resources": map[string]any{
			"requests": map[string]any{"cpu": "5m", "memory": "32Mi"},
			"limits":   map[string]any{"cpu": "100m", "memory": "64Mi"},
		},
		"terminationMessagePolicy": "FallbackToLogsOnError",
		"securityContext": map[string]any{
			"allowPrivilegeEscalation": false,
			"capabilities":             map[string]any{"drop": []any{"ALL"}},
			"readOnlyRootFilesystem":   true,
			"runAsGroup":               65532.0,
			"runAsNonRoot":             true,
			"runAsUser":                65532.0,
			"seccompProfile":           map[string]any{"type": "RuntimeDefault"},
		},
	}
	c["env"] = []any{
		map[string]any{"name": "GOMAXPROCS", "value": "1"},
		map[string]any{"name": "QUEUE_REDIS_ADDRESS", "value": "redis:6379"},
		map[string]any{"name": "HEARTBEAT_INTERVAL_SECONDS", "value": "30"},
		map[string]any{"name": "STALE_THRESHOLD_SECONDS", "value": "120"},
		map[string]any{"name": "SEMAPHORE", "value": "shop/web"},
		fromField("POD_NAME", "metadata.name"),
		fromField("NODE_NAME", "spec.nodeName"),
		fromField("POD_UID", "metadata.uid"),
	}
	if native {
		c["restartPolicy"] = "Always"
		c["args"] = []any{
			"sidecar", "--queue-redis-address=redis:6379", "--heartbeat-interval-seconds=30",
			"--stale-threshold-seconds=120", "--length=3", "--expiration-seconds=10", "--lock-mode=redlock",
			"--redis-addresses=redis:6379", "shop/web", token,
		}
	}
	return c
}

// fromField is an environment variable that the kubelet sets from a field of the pod.
func fromField(name, path string) map[string]any {
	return map[string]any{"name": name, "valueFrom": map[string]any{"fieldRef": map[string]any{"fieldPath": path}}}
}

// wantAwait returns exactly the init container that the patch adds beside a native
// sidecar.
func wantAwait() map[string]any {
	c := wantSidecar(true, "")
	c["name"] = "at-least-semaphore-pod-await"
	c["args"] = []any{"await"}
	c["env"] = []any{map[string]any{"name": "GOMAXPROCS", "value": "1"}, fromField("POD_UID", "metadata.uid")}
	delete(c, "restartPolicy")
	return c
}

// withUnknownFields adds fields that this program does not know, throughout the pod.
func withUnknownFields(t *testing.T, object []byte) []byte {
	t.Helper()
	var p map[string]any
	rig.Must(t, json.Unmarshal(object, &p))
	spec := p["spec"].(map[string]any)
	spec["ofTheFuture"] = map[string]any{
		"exact": 12345678901234.0, "null": nil, "list": []any{1.0, "a", map[string]any{}},
	}
	for _, list := range []string{"containers", "initContainers"} {
		for _, c := range containers(p, list) {
			c.(map[string]any)["ofTheFuture"] = []any{true}
		}
	}
	p["metadata"].(map[string]any)["ofTheFuture"] = "x"
	out, err := json.Marshal(p)
	rig.Must(t, err)
	return out
}

// For each fixture and both kinds of sidecar, the patched pod is the original plus
// exactly the promised additions. A pod copied from a patched one gets one sidecar, with
// the new token.
func TestPatchApplied(t *testing.T) {
	t.Parallel()
	const secondToken = "b7a1f0de-8a0e-4b0c-9d52-0a3c1a7de002"
	for name, object := range fixtures(t) {
		for _, native := range []bool{true, false} {
			c := testConfig("redis:6379")
			c.enableSidecarContainers = native
			list := "containers"
			if native {
				list = "initContainers"
			}
			object := withUnknownFields(t, object)
			for _, token := range []string{testToken, secondToken} {
				got := patched(t, c, object, token)
				object, _ = json.Marshal(got)

				sidecars := containers(got, list)
				at, added := len(sidecars)-1, 1
				if native {
					at, added = 0, 2
					if !reflect.DeepEqual(sidecars[1], wantAwait()) {
						t.Errorf("%s: the await container is\n%v, want\n%v", name, sidecars[1], wantAwait())
					}
				}
				if !reflect.DeepEqual(sidecars[at], wantSidecar(native, token)) {
					t.Errorf("%s, native %t: the sidecar is\n%v, want\n%v",
						name, native, sidecars[at], wantSidecar(native, token))
				}
				annotations := got["metadata"].(map[string]any)["annotations"].(map[string]any)
				if annotations[annotationToken] != token {
					t.Errorf("%s, native %t: the token annotation is %v", name, native, annotations[annotationToken])
				}
				// Without the additions, the pod equals the original.
				delete(annotations, annotationToken)
				rest := slices.Delete(sidecars, at, at+added)
				got["spec"].(map[string]any)[list] = rest
				if len(rest) == 0 {
					delete(got["spec"].(map[string]any), list)
				}
				var original map[string]any
				rig.Must(t, json.Unmarshal(withUnknownFields(t, fixtures(t)[name]), &original))
				if !reflect.DeepEqual(got, original) {
					t.Errorf("%s, native %t: the rest is\n%v, want\n%v", name, native, got, original)
				}
			}
		}
	}
}

func TestPatchReplacesSidecarsAnywhere(t *testing.T) {
	for name, spec := range map[string]string{
		"none":  `{"containers":[{"name":"app"}]}`,
		"null":  `{"containers":[{"name":"app"}],"initContainers":null}`,
		"empty": `{"containers":[{"name":"app"}],"initContainers":[]}`,
		"native first": `{"containers":[{"name":"app"}],"initContainers":[{"name":"at-least-semaphore-pod-sidecar"},` +
			`{"name":"at-least-semaphore-pod-await"},{"name":"i"}]}`,
		"native last": `{"containers":[{"name":"app"}],"initContainers":[{"name":"i"},` +
			`{"name":"at-least-semaphore-pod-sidecar"}]}`,
		"only native": `{"containers":[{"name":"app"}],` +
			`"initContainers":[{"name":"at-least-semaphore-pod-sidecar"}]}`,
		"classic": `{"containers":[{"name":"at-least-semaphore-pod-sidecar"},{"name":"app"}]}`,
		"both, several": `{"containers":[{"name":"at-least-semaphore-pod-sidecar"},{"name":"app"},` +
			`{"name":"at-least-semaphore-pod-sidecar"}],` +
			`"initContainers":[{"name":"at-least-semaphore-pod-sidecar"},{"name":"at-least-semaphore-pod-sidecar"}]}`,
		"nothing else left": `{"containers":[{"name":"at-least-semaphore-pod-sidecar"}]}`,
	} {
		for _, native := range []bool{true, false} {
			c := testConfig("redis:6379")
			c.enableSidecarContainers = native
			got := patched(t, c, []byte(`{"metadata":{"annotations":{"a/b~c":"d"}},"spec":`+spec+`}`), testToken)
			annotations := got["metadata"].(map[string]any)["annotations"]
			if !reflect.DeepEqual(annotations, map[string]any{"a/b~c": "d", annotationToken: testToken}) {
				t.Errorf("%s: annotations %v", name, annotations)
			}
			var names []string
			for _, list := range []string{"initContainers", "containers"} {
				for _, c := range containers(got, list) {
					names = append(names, list+":"+c.(map[string]any)["name"].(string))
				}
			}
			sidecars := slices.DeleteFunc(slices.Clone(names), func(n string) bool {
				return n == "containers:app" || n == "initContainers:i"
			})
			want := []string{"containers:" + sidecarName}
			if native {
				want = []string{"initContainers:" + sidecarName, "initContainers:" + awaitName}
			}
			if !slices.Equal(sidecars, want) {
				t.Errorf("%s, native %t: the sidecars are %v", name, native, names)
			}
			if native && !slices.Equal(names[:2], want) || !native && names[len(names)-1] != want[0] {
				t.Errorf("%s, native %t: the sidecars are out of place: %v", name, native, names)
			}
		}
	}
}

// The sidecar's JSON decodes as a container of Kubernetes, and its arguments parse.
func TestSidecarContainerIsValid(t *testing.T) {
	sidecar, _ := sidecarContainer(testConfig("redis:6379"), corev1.ResourceRequirements{}, testID, testSpec, testToken)
	encoded, err := json.Marshal(sidecar)
	rig.Must(t, err)
	var c corev1.Container
	rig.Must(t, json.Unmarshal(encoded, &c))
	args := c.Args
	if args[0] != "sidecar" {
		t.Fatalf("args %v", args)
	}
	parsed, err := parseSidecarConfig(args[1:], func(string) string { return "" })
	rig.Must(t, err)
	if parsed.semaphore != testID || parsed.token != testToken || parsed.queueRedisAddress.text != "redis:6379" {
		t.Errorf("the sidecar's args parse as %+v", parsed)
	}
}

func TestJSONPointer(t *testing.T) {
	if got := jsonPointer("a/b", "~c", "0"); got != "/a~1b/~0c/0" {
		t.Errorf("got %s", got)
	}
}

// patchedPod returns a patched pod with a spec.
func patchedPod(t *testing.T, c webhookConfig, spec string) corev1.Pod {
	t.Helper()
	var p corev1.Pod
	object := []byte(`{"metadata":{"annotations":{"a":"b"}},"spec":` + spec + `}`)
	rig.Must(t, json.Unmarshal(mustJSON(t, patched(t, c, object, testToken)), &p))
	return p
}

// The injected containers do not change the pod's QoS class, in a second patch too.
func TestPatchKeepsTheQoSClass(t *testing.T) {
	const all, less = `{"cpu":"1","memory":"1Gi"}`, `{"cpu":"500m","memory":"1Gi"}`
	for name, c := range map[string]struct {
		spec     string
		requests string // CPU request of each injected container
	}{
		"requests equal to limits": {`{"containers":[{"resources":{"limits":` + all +
			`,"requests":{"cpu":"1000m","memory":"1024Mi"}}}]}`, "100m"},
		"limits only": {`{"containers":[{"resources":{"limits":` + all + `}}]}`, "100m"},
		"other resources": {`{"containers":[{"resources":{"limits":` +
			`{"cpu":"1","memory":"1Gi","nvidia.com/gpu":"1"},"requests":` + all + `}}]}`, "100m"},
		"init container, too": {`{"initContainers":[{"resources":{"limits":` + all + `}}],` +
			`"containers":[{"resources":{"limits":` + all + `}}]}`, "100m"},
		"patched before": {`{"initContainers":[{"name":"at-least-semaphore-pod-sidecar"},` +
			`{"name":"at-least-semaphore-pod-await"}],"containers":[{"resources":{"limits":` + all + `}}]}`, "100m"},
		"nothing": {`{"containers":[{}]}`, "5m"},
		"requests less than limits": {`{"containers":[{"resources":{"limits":` + all + `,"requests":` +
			less + `}}]}`, "5m"},
		"requests only":         {`{"containers":[{"resources":{"requests":` + all + `}}]}`, "5m"},
		"no limit of memory":    {`{"containers":[{"resources":{"limits":{"cpu":"1"}}}]}`, "5m"},
		"limits of zero":        {`{"containers":[{"resources":{"limits":{"cpu":"0","memory":"0"}}}]}`, "5m"},
		"one of two containers": {`{"containers":[{"resources":{"limits":` + all + `}},{}]}`, "5m"},
		"all but an init container": {`{"initContainers":[{}],"containers":[{"resources":{"limits":` +
			all + `}}]}`, "5m"},
		"resources of the pod as a whole": {`{"resources":{"limits":` + all + `},"containers":[{}]}`, "0"},
	} {
		p := patchedPod(t, testConfig("redis:6379"), c.spec)
		for _, injected := range p.Spec.InitContainers[:2] {
			r := injected.Resources
			if got := r.Requests.Cpu().String(); got != c.requests {
				t.Errorf("%s: %s requests CPU %s", name, injected.Name, got)
			}
			limit := "100m"
			if c.requests == "0" {
				limit = "0"
			}
			if got := r.Limits.Cpu().String(); got != limit {
				t.Errorf("%s: %s has a limit of CPU %s", name, injected.Name, got)
			}
			if c.requests == limit && r.Requests.Memory().Cmp(*r.Limits.Memory()) != 0 {
				t.Errorf("%s: %s requests memory %s", name, injected.Name, r.Requests.Memory())
			}
		}
	}
}

// The patch adds the pull secret to the pod's own, once.
func TestPatchAddsThePullSecret(t *testing.T) {
	c := testConfig("redis:6379")
	for spec, want := range map[string][]string{
		`{"containers":[{}]}`: nil,
		`{"containers":[{}],"imagePullSecrets":[{"name":"own"},{"name":"other"}]}`: {"own", "other"},
		`{"containers":[{}],"imagePullSecrets":[]}`:                                nil,
	} {
		for _, name := range []string{"", "mirror", "own"} {
			c.sidecarImagePullSecret = name
			var got []string
			for _, s := range patchedPod(t, c, spec).Spec.ImagePullSecrets {
				got = append(got, s.Name)
			}
			want := slices.Clone(want)
			if name != "" && !slices.Contains(want, name) {
				want = append(want, name)
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s with %q: got %v, want %v", spec, name, got, want)
			}
		}
	}
}

// The patch adds the operator's annotations. If the pod has another value, it keeps that,
// and gets a warning.
func TestPatchAddsAnnotations(t *testing.T) {
	c := testConfig(rig.FreeAddress(t))
	c.podAnnotations = map[string]string{
		"example.org/ports": "6379,2379", "example.org/mesh": "off",
		annotationPrefix[:len(annotationPrefix)-1] + ".x/y~z": "1",
	}
	w := startWebhook(t, c)
	a := w.admit(t, rig.Review(t, freshID(), 1, whenFull(whenFullWait), func(r map[string]any) {
		rig.AnnotationsOf(r)["example.org/ports"], rig.AnnotationsOf(r)["example.org/mesh"] = "9000", "off"
	}))
	want := []string{warningWaits,
		`the pod keeps its own annotation example.org/ports; the cluster's is "6379,2379"`}
	if !slices.Equal(a.Warnings, want) {
		t.Errorf("got warnings %q, want %q", a.Warnings, want)
	}
	p := patchedPod(t, c, `{"containers":[{}]}`)
	for name, value := range c.podAnnotations {
		if p.Annotations[name] != value {
			t.Errorf("%s is %q", name, p.Annotations[name])
		}
	}
	if p.Annotations["a"] != "b" {
		t.Errorf("the pod's own annotations are %v", p.Annotations)
	}
}

// The await container has a restart policy only if the operator says that the cluster
// supports it.
func TestAwaitRestart(t *testing.T) {
	c := testConfig("redis:6379")
	for _, c.restartAwait = range []bool{false, true} {
		p := patchedPod(t, c, `{"containers":[{}],"restartPolicy":"Never"}`)
		await := p.Spec.InitContainers[1]
		restarts := await.RestartPolicy != nil && *await.RestartPolicy == "OnFailure"
		if restarts != c.restartAwait || !restarts && await.RestartPolicy != nil {
			t.Errorf("with --await-restart=%t: the restart policy is %v", c.restartAwait, await.RestartPolicy)
		}
	}
}

// With --await-restart, a pod that gave up must fail, and not wait again, unless its own
// restart policy says so.
func TestAwaitRestartOfAPodThatGivesUp(t *testing.T) {
	c := testConfig("redis:6379")
	c.restartAwait = true
	for _, policy := range []string{"Never", "OnFailure"} {
		for _, then := range whenWaitedChoices {
			spec := semaphoreSpec{key: "web", length: 3, wait: waitEnd{time.Minute, then}}
			p := new(pod)
			p.Spec.RestartPolicy = policy
			await := awaitContainer(c, p, spec, corev1.ResourceRequirements{})
			rules := string(mustJSON(t, await.RestartPolicyRules))
			want := `[{"action":"Restart","exitCodes":{"operator":"NotIn","values":[0,75]}}]`
			wantPolicy := corev1.ContainerRestartPolicyNever
			if policy != "Never" || then == whenWaitedRun {
				want, wantPolicy = "null", corev1.ContainerRestartPolicyOnFailure
			}
			if *await.RestartPolicy != wantPolicy || rules != want {
				t.Errorf("%s, %s: restart policy %s, rules %s", policy, then, *await.RestartPolicy, rules)
			}
		}
	}
}

// With --sidecar-run-as-user=none, the injected containers have no user and no group, but
// all else that PodSecurity "restricted" and the SCC "restricted-v2" of OpenShift want.
func TestPatchWithoutAUser(t *testing.T) {
	for _, native := range []string{"true", "false"} {
		c, err := parseWebhookConfig([]string{"--sidecar-run-as-user=none", "--enable-sidecar-containers=" + native},
			func(string) string { return "" })
		rig.Must(t, err)
		p := patchedPod(t, c, `{"containers":[{"name":"app"}]}`)
		injected := slices.Concat(p.Spec.InitContainers, p.Spec.Containers[1:])
		if want := map[string]int{"true": 2, "false": 1}[native]; len(injected) != want {
			t.Errorf("native %s: %d containers injected", native, len(injected))
		}
		for _, container := range injected {
			want := `{"capabilities":{"drop":["ALL"]},"runAsNonRoot":true,"readOnlyRootFilesystem":true,` +
				`"allowPrivilegeEscalation":false,"seccompProfile":{"type":"RuntimeDefault"}}`
			if got := string(mustJSON(t, container.SecurityContext)); got != want {
				t.Errorf("native %s: %s has %s, want %s", native, container.Name, got, want)
			}
		}
	}
}

// The sidecar gets its credentials by reference, and its CA in a volume.
func TestPatchForSecureRedis(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"secret", "configmap"} {
		c := testConfig("rediss://redis:6379")
		c.sidecarRedisSecret, c.sidecarRedisCA = "redis-sidecar", objectReference{kind, "redis-ca"}
		for name, object := range fixtures(t) {
			first := patched(t, c, object, testToken)
			again := patched(t, c, mustJSON(t, first), testToken)
			for _, p := range []map[string]any{first, again} {
				sidecar := containers(p, "initContainers")[0].(map[string]any)
				wantEnv := `[{"name":"GOMAXPROCS","value":"1"},` +
					`{"name":"QUEUE_REDIS_ADDRESS","value":"rediss://redis:6379"},` +
					`{"name":"HEARTBEAT_INTERVAL_SECONDS","value":"30"},{"name":"STALE_THRESHOLD_SECONDS","value":"120"},` +
					`{"name":"SEMAPHORE","value":"shop/web"},{"name":"POD_NAME","valueFrom":{"fieldRef":{"fieldPath":"metadata.name"}}},` +
					`{"name":"NODE_NAME","valueFrom":{"fieldRef":{"fieldPath":"spec.nodeName"}}},` +
					`{"name":"POD_UID","valueFrom":{"fieldRef":{"fieldPath":"metadata.uid"}}},` +
					`{"name":"REDIS_USERNAME","valueFrom":{"secretKeyRef":` +
					`{"key":"username","name":"redis-sidecar","optional":true}}},` +
					`{"name":"REDIS_PASSWORD","valueFrom":{"secretKeyRef":` +
					`{"key":"password","name":"redis-sidecar","optional":false}}},` +
					`{"name":"REDIS_CA_FILE","value":"/var/run/at-least-semaphore-pod-hook/redis-ca/ca.crt"}]`
				if env := string(mustJSON(t, sidecar["env"])); env != wantEnv {
					t.Errorf("%s: env is %s, want %s", name, env, wantEnv)
				}
				caFile := any("--redis-ca-file=/var/run/at-least-semaphore-pod-hook/redis-ca/ca.crt")
				if !slices.Contains(sidecar["args"].([]any), caFile) {
					t.Errorf("%s: args are %v", name, sidecar["args"])
				}
				wantMounts := `[{"mountPath":"/var/run/at-least-semaphore-pod-hook/redis-ca",` +
					`"name":"at-least-semaphore-pod-redis-ca","readOnly":true}]`
				if mounts := string(mustJSON(t, sidecar["volumeMounts"])); mounts != wantMounts {
					t.Errorf("%s: mounts are %s", name, mounts)
				}
				volumes := containers(p, "volumes")
				want := map[string]string{
					"secret": `{"name":"at-least-semaphore-pod-redis-ca",` +
						`"secret":{"items":[{"key":"ca.crt","path":"ca.crt"}],"optional":true,"secretName":"redis-ca"}}`,
					"configmap": `{"configMap":{"items":[{"key":"ca.crt","path":"ca.crt"}],"name":"redis-ca","optional":true},` +
						`"name":"at-least-semaphore-pod-redis-ca"}`,
				}[kind]
				if got := string(mustJSON(t, volumes[len(volumes)-1])); got != want {
					t.Errorf("%s: the volume is %s", name, got)
				}
				var original map[string]any
				rig.Must(t, json.Unmarshal(object, &original))
				if len(volumes) != len(containers(original, "volumes"))+1 {
					t.Errorf("%s: got %d volumes", name, len(volumes))
				}
			}
		}
	}
}
