package main

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// patchedPod is a pod with that spec, patched.
func patchedPod(t *testing.T, c webhookConfig, spec string) corev1.Pod {
	t.Helper()
	var p corev1.Pod
	rig.Must(t, json.Unmarshal(mustJSON(t, patched(t, c, []byte(`{"metadata":{"annotations":{"a":"b"}},"spec":`+spec+`}`), testToken)), &p))
	return p
}

// The injected containers leave a pod in its QoS class; patched again, too.
func TestPatchKeepsTheQoSClass(t *testing.T) {
	const all, less = `{"cpu":"1","memory":"1Gi"}`, `{"cpu":"500m","memory":"1Gi"}`
	for name, c := range map[string]struct {
		spec     string
		requests string // of each injected container, their CPU
	}{
		"requests equal to limits":        {`{"containers":[{"resources":{"limits":` + all + `,"requests":{"cpu":"1000m","memory":"1024Mi"}}}]}`, "100m"},
		"limits only":                     {`{"containers":[{"resources":{"limits":` + all + `}}]}`, "100m"},
		"other resources":                 {`{"containers":[{"resources":{"limits":{"cpu":"1","memory":"1Gi","nvidia.com/gpu":"1"},"requests":` + all + `}}]}`, "100m"},
		"init container, too":             {`{"initContainers":[{"resources":{"limits":` + all + `}}],"containers":[{"resources":{"limits":` + all + `}}]}`, "100m"},
		"patched before":                  {`{"initContainers":[{"name":"at-least-semaphore-pod-sidecar"},{"name":"at-least-semaphore-pod-await"}],"containers":[{"resources":{"limits":` + all + `}}]}`, "100m"},
		"nothing":                         {`{"containers":[{}]}`, "5m"},
		"requests less than limits":       {`{"containers":[{"resources":{"limits":` + all + `,"requests":` + less + `}}]}`, "5m"},
		"requests only":                   {`{"containers":[{"resources":{"requests":` + all + `}}]}`, "5m"},
		"no limit of memory":              {`{"containers":[{"resources":{"limits":{"cpu":"1"}}}]}`, "5m"},
		"limits of zero":                  {`{"containers":[{"resources":{"limits":{"cpu":"0","memory":"0"}}}]}`, "5m"},
		"one of two containers":           {`{"containers":[{"resources":{"limits":` + all + `}},{}]}`, "5m"},
		"all but an init container":       {`{"initContainers":[{}],"containers":[{"resources":{"limits":` + all + `}}]}`, "5m"},
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

// A pull secret is added to those that the pod has, once.
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
				t.Errorf("%s with %q: %v, want %v", spec, name, got, want)
			}
		}
	}
}

// The operator's annotations are added to a pod that does not have them; one that has another value keeps it, and its user is told.
func TestPatchAddsAnnotations(t *testing.T) {
	c := testConfig(rig.FreeAddress(t))
	c.podAnnotations = map[string]string{"example.org/ports": "6379,2379", "example.org/mesh": "off", annotationPrefix[:len(annotationPrefix)-1] + ".x/y~z": "1"}
	w := startWebhook(t, c)
	a := w.admit(t, rig.Review(t, freshID(), 1, whenFull(whenFullWait), func(r map[string]any) {
		rig.AnnotationsOf(r)["example.org/ports"], rig.AnnotationsOf(r)["example.org/mesh"] = "9000", "off"
	}))
	if want := []string{warningWaits, `this pod keeps its own annotation example.org/ports; the cluster's is "6379,2379"`}; !slices.Equal(a.Warnings, want) {
		t.Errorf("warned %q, want %q", a.Warnings, want)
	}
	p := patchedPod(t, c, `{"containers":[{}]}`)
	for name, value := range c.podAnnotations {
		if p.Annotations[name] != value {
			t.Errorf("%s is %q", name, p.Annotations[name])
		}
	}
	if p.Annotations["a"] != "b" {
		t.Errorf("the pod's own are %v", p.Annotations)
	}
}

// The init container restarts by itself only where the operator says that the cluster knows that.
func TestAwaitRestart(t *testing.T) {
	c := testConfig("redis:6379")
	for _, c.restartAwait = range []bool{false, true} {
		p := patchedPod(t, c, `{"containers":[{}],"restartPolicy":"Never"}`)
		await := p.Spec.InitContainers[1]
		if restarts := await.RestartPolicy != nil && *await.RestartPolicy == "OnFailure"; restarts != c.restartAwait || !restarts && await.RestartPolicy != nil {
			t.Errorf("with --await-restart=%t: %v", c.restartAwait, await.RestartPolicy)
		}
	}
}
