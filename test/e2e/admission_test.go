//go:build e2e

package e2e

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

var restricted = object{
	"securityContext": object{"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": object{"type": "RuntimeDefault"}},
	"containers": []object{container("app", forever, object{
		"securityContext": object{"allowPrivilegeEscalation": false, "capabilities": object{"drop": []string{"ALL"}}},
	})},
}

// Annotated pods run where a namespace is strict.
func TestStrictNamespaces(t *testing.T) {
	t.Parallel()
	t.Run("PodSecurity restricted", func(t *testing.T) {
		n := newNamespace(t, "pod-security.kubernetes.io/enforce=restricted")
		n.create(pod("p", "strict", 1, restricted))
		n.wantOneSidecar(n.wantRunning("p"))
	})
	t.Run("quota of requests and limits", func(t *testing.T) {
		n := newNamespace(t)
		n.create(object{"apiVersion": "v1", "kind": "ResourceQuota", "metadata": object{"name": "q"}, "spec": object{
			"hard": object{"requests.cpu": "1", "requests.memory": "1Gi", "limits.cpu": "2", "limits.memory": "1Gi"},
		}})
		n.create(pod("p", "strict", 1, object{"containers": []object{container("app", forever, object{
			"resources": object{"requests": object{"cpu": "10m", "memory": "16Mi"}, "limits": object{"cpu": "100m", "memory": "64Mi"}},
		})}}))
		n.wantOneSidecar(n.wantRunning("p"))
	})
	t.Run("LimitRange", func(t *testing.T) {
		n := newNamespace(t)
		n.create(object{"apiVersion": "v1", "kind": "LimitRange", "metadata": object{"name": "l"}, "spec": object{"limits": []object{{
			"type": "Container", "default": object{"cpu": "200m", "memory": "128Mi"}, "defaultRequest": object{"cpu": "50m", "memory": "64Mi"},
			"max": object{"cpu": "1", "memory": "512Mi"},
		}}}})
		n.create(pod("p", "strict", 1))
		n.wantOneSidecar(n.wantRunning("p"))
	})
	t.Run("root in the pod's security context", func(t *testing.T) {
		n := newNamespace(t)
		n.create(pod("p", "strict", 1, object{"securityContext": object{"runAsUser": 0}}))
		n.wantOneSidecar(n.wantRunning("p"))
	})
}

// Pods that have much of their own run with exactly one sidecar; so does one that is made from the YAML of a running one.
func TestPodsWithMuchOfTheirOwn(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(pod("much", "much", 3, object{
		"initContainers": []object{
			container("init", "echo hello >/shared/greeting", object{"volumeMounts": []object{{"name": "shared", "mountPath": "/shared"}}}),
			container("proxy", forever, object{"restartPolicy": "Always", "startupProbe": object{"exec": object{"command": []string{"cat", "/bin/sh"}}}}),
		},
		"containers": []object{container("app", forever, object{
			"volumeMounts":   []object{{"name": "shared", "mountPath": "/shared"}},
			"readinessProbe": object{"exec": object{"command": []string{"cat", "/shared/greeting"}}, "periodSeconds": 1},
			"livenessProbe":  object{"exec": object{"command": []string{"cat", "/shared/greeting"}}},
		}), container("second", forever)},
		"volumes": []object{{"name": "shared", "emptyDir": object{}}},
	}))
	first := n.wantRunning("much")
	n.wantOneSidecar(first)
	if len(first.Spec.InitContainers) != 4 || len(first.Spec.Containers) != 2 {
		t.Errorf("%d init containers, %d containers", len(first.Spec.InitContainers), len(first.Spec.Containers))
	}
	n.create(pod("host", "much", 3, object{"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}))
	n.wantOneSidecar(n.wantRunning("host"))

	var again object
	must(t, json.Unmarshal([]byte(n.kubectl("get", "pod", "much", "-o", "json")), &again))
	n.kubectl("delete", "pod", "much")
	metadata := again["metadata"].(object)
	for _, field := range []string{"resourceVersion", "uid", "creationTimestamp"} {
		delete(metadata, field)
	}
	n.create(again)
	second := n.wantRunning("much")
	n.wantOneSidecar(second)
	if len(second.Spec.InitContainers) != 4 || len(second.Spec.Containers) != 2 {
		t.Errorf("again: %d init containers, %d containers", len(second.Spec.InitContainers), len(second.Spec.Containers))
	}
	token := annotationPrefix + "token"
	if first.Annotations[token] == second.Annotations[token] || !strings.Contains(strings.Join(second.Spec.InitContainers[0].Args, " "), second.Annotations[token]) {
		t.Errorf("tokens %s and %s, args %v", first.Annotations[token], second.Annotations[token], second.Spec.InitContainers[0].Args)
	}
	n.wantCounts("much", 1, 2)
}

// Every annotation error reaches its user as one readable line.
func TestAnnotationErrors(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	for name, c := range map[string]struct{ value, want string }{
		"length":     {"many", `length is "many": it must be a whole number from 1 to 10000`},
		"expiration": {"0", `expiration is "0": it must be a whole number from 1 to 3600`},
		"key":        {"a b{}", `key is "a b{}": it must be letters, digits and . _ / -, and begin and end with a letter or digit`},
	} {
		p := pod("wrong", "k", 1)
		p["metadata"].(object)["annotations"].(object)[annotationPrefix+name] = c.value
		_, stderr, err := kubectlWarned(encode(p), "-n", n.name, "apply", "-f", "-")
		want := `admission webhook "at-least-semaphore-pod-hook.kaidotio.github.io" denied the request: invalid annotations: ` + annotationPrefix + c.want
		if err == nil || strings.Count(strings.TrimSpace(stderr), "\n") != 0 || !strings.Contains(stderr, want) {
			t.Errorf("%s: %v\n%s", name, err, stderr)
		}
	}
	p := pod("wrong", "k", 1)
	delete(p["metadata"].(object)["annotations"].(object), annotationPrefix+"length")
	delete(p["metadata"].(object)["annotations"].(object), annotationPrefix+"expiration")
	_, stderr, err := kubectlWarned(encode(p), "-n", n.name, "apply", "-f", "-")
	if err == nil || strings.Count(strings.TrimSpace(stderr), "\n") != 0 || !strings.Contains(stderr, "length is missing") || !strings.Contains(stderr, "; "+annotationPrefix+"expiration is missing") {
		t.Errorf("missing: %v\n%s", err, stderr)
	}
}

// The sidecar leaves a pod in its QoS class.
func TestQoSClass(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	all := object{"cpu": "10m", "memory": "16Mi"}
	whole := object{"cpu": "100m", "memory": "64Mi"} // with 10m for all containers, each takes ten seconds to start
	for name, c := range map[string]struct {
		spec object
		want corev1.PodQOSClass
	}{
		"guaranteed": {object{
			"initContainers": []object{container("init", "true", object{"resources": object{"limits": all}})},
			"containers":     []object{container("app", forever, object{"resources": object{"requests": all, "limits": all}})},
		}, corev1.PodQOSGuaranteed},
		"guaranteed-as-a-whole": {object{
			"resources":  object{"requests": whole, "limits": whole},
			"containers": []object{container("app", forever)},
		}, corev1.PodQOSGuaranteed},
		"burstable": {object{
			"containers": []object{container("app", forever, object{"resources": object{"requests": object{"cpu": "5m"}, "limits": all}})},
		}, corev1.PodQOSBurstable},
	} {
		n.create(pod(name, "qos", 5, c.spec))
		p := n.wantRunning(name)
		n.wantOneSidecar(p)
		if p.Status.QOSClass != c.want {
			t.Errorf("%s: the class is %s", name, p.Status.QOSClass)
		}
	}
}

// Pods that cannot have a sidecar.
func TestPodsWithoutASidecar(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	static := pod("static", "none", 1, object{"nodeName": "a-node"})
	static["metadata"].(object)["annotations"].(object)[corev1.MirrorPodAnnotationKey] = "0123456789abcdef"
	out, stderr, err := kubectlWarned(encode(static), "-n", n.name, "create", "--dry-run=server", "-o", "yaml", "-f", "-")
	must(t, err)
	if !strings.Contains(stderr, "Warning: a static pod gets no semaphore sidecar") || strings.Contains(out, sidecarName) {
		t.Errorf("warned %q:\n%s", stderr, out)
	}
	windows := pod("windows", "none", 1, object{"os": object{"name": "windows"}})
	if got := n.wantRefused(windows); !strings.Contains(got, "denied the request: this is a Windows pod") {
		t.Errorf("refused with %s", got)
	}
}

// A pod that is not annotated "true" never sees the webhook.
func TestOtherPodsAreLeftAlone(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	plain := pod("plain", "k", 1)
	delete(plain["metadata"].(object), "annotations")
	off := pod("off", "k", 0) // would be refused for its length
	off["metadata"].(object)["annotations"].(object)[annotationPrefix+"at-least-semaphore-pod"] = "false"
	for _, o := range []object{plain, off} {
		n.create(o)
		p := n.wantRunning(o["metadata"].(object)["name"].(string))
		for _, c := range append([]corev1.Container{}, p.Spec.InitContainers...) {
			t.Errorf("%s has an init container %s", p.Name, c.Name)
		}
	}
}

// The examples are accepted as they are.
func TestExamples(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	out := n.kubectl("apply", "--dry-run=server", "-f", filepath.Join(root, "deploy/examples"))
	for _, want := range []string{"deployment.apps/mail created", "deployment.apps/web created", "job.batch/import created", "statefulset.apps/worker created"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}
