//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

var restricted = object{
	"securityContext": object{
		"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": object{"type": "RuntimeDefault"},
	},
	"containers": []object{container("app", forever, object{
		"securityContext": object{"allowPrivilegeEscalation": false, "capabilities": object{"drop": []string{"ALL"}}},
	})},
}

// Annotated pods run in namespaces with strict rules.
func TestStrictNamespaces(t *testing.T) {
	t.Parallel()
	t.Run("PodSecurity restricted", func(t *testing.T) {
		t.Parallel()
		n := newNamespace(t, "pod-security.kubernetes.io/enforce=restricted")
		n.create(pod("p", "strict", 1, restricted))
		n.wantOneSidecar(n.wantRunning("p"))
	})
	t.Run("quota of requests and limits", func(t *testing.T) {
		t.Parallel()
		n := newNamespace(t)
		n.create(object{"apiVersion": "v1", "kind": "ResourceQuota", "metadata": object{"name": "q"}, "spec": object{
			"hard": object{"requests.cpu": "1", "requests.memory": "1Gi", "limits.cpu": "2", "limits.memory": "1Gi"},
		}})
		n.create(pod("p", "strict", 1, object{"containers": []object{container("app", forever, object{
			"resources": object{
				"requests": object{"cpu": "10m", "memory": "16Mi"}, "limits": object{"cpu": "100m", "memory": "64Mi"},
			},
		})}}))
		n.wantOneSidecar(n.wantRunning("p"))
	})
	t.Run("LimitRange", func(t *testing.T) {
		t.Parallel()
		n := newNamespace(t)
		limits := object{
			"type": "Container", "max": object{"cpu": "1", "memory": "512Mi"},
			"default": object{"cpu": "200m", "memory": "128Mi"}, "defaultRequest": object{"cpu": "50m", "memory": "64Mi"},
		}
		n.create(object{
			"apiVersion": "v1", "kind": "LimitRange", "metadata": object{"name": "l"},
			"spec": object{"limits": []object{limits}},
		})
		n.create(pod("p", "strict", 1))
		n.wantOneSidecar(n.wantRunning("p"))
	})
	t.Run("root in the pod's security context", func(t *testing.T) {
		t.Parallel()
		n := newNamespace(t)
		n.create(pod("p", "strict", 1, object{"securityContext": object{"runAsUser": 0}}))
		n.wantOneSidecar(n.wantRunning("p"))
	})
}

// A pod with several containers and probes gets exactly one sidecar. So does a pod that
// is created from the YAML of a running one.
func TestPodsWithMuchOfTheirOwn(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	reads := object{"command": []string{"cat", "/shared/greeting"}}
	n.create(pod("much", "much", 3, object{
		"initContainers": []object{
			container("init", "echo hello >/shared/greeting", object{
				"volumeMounts": []object{{"name": "shared", "mountPath": "/shared"}},
			}),
			container("proxy", forever, object{
				"restartPolicy": "Always", "startupProbe": object{"exec": object{"command": []string{"cat", "/bin/sh"}}},
			}),
		},
		"containers": []object{container("app", forever, object{
			"volumeMounts":   []object{{"name": "shared", "mountPath": "/shared"}},
			"readinessProbe": object{"exec": reads, "periodSeconds": 1},
			"livenessProbe":  object{"exec": reads},
		}), container("second", forever)},
		"volumes": []object{{"name": "shared", "emptyDir": object{}}},
	}))
	first := n.wantRunning("much")
	n.wantOneSidecar(first)
	if inits, all := len(first.Spec.InitContainers), len(first.Spec.Containers); inits != 4 || all != 2 {
		t.Errorf("%d init containers, %d containers", inits, all)
	}
	n.create(pod("host", "much", 3, object{"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}))
	n.wantOneSidecar(n.wantRunning("host"))

	var again object
	must(t, json.Unmarshal([]byte(n.kubectl("get", "pod", "much", "-o", "json")), &again))
	n.delete("much")
	metadata := again["metadata"].(object)
	for _, field := range []string{"resourceVersion", "uid", "creationTimestamp"} {
		delete(metadata, field)
	}
	n.create(again)
	second := n.wantRunning("much")
	n.wantOneSidecar(second)
	if inits, all := len(second.Spec.InitContainers), len(second.Spec.Containers); inits != 4 || all != 2 {
		t.Errorf("again: %d init containers, %d containers", inits, all)
	}
	before, now := first.Annotations[annotationPrefix+"token"], second.Annotations[annotationPrefix+"token"]
	if args := second.Spec.InitContainers[0].Args; before == now || !strings.Contains(strings.Join(args, " "), now) {
		t.Errorf("tokens %s and %s, args %v", before, now, args)
	}
	n.wantCounts("much", 1, 2)
}

// Each annotation error reaches the user as one readable line.
func TestAnnotationErrors(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	for name, c := range map[string]struct{ value, want string }{
		"length":     {"many", `length is "many": it must be a whole number from 1 to 10000`},
		"expiration": {"0", `expiration is "0": it must be a whole number from 1 to 3600`},
		"key": {"a b{}", `key is "a b{}": it must be letters, digits and . _ / -, ` +
			`and begin and end with a letter or digit`},
	} {
		p := pod("wrong", "k", 1)
		p["metadata"].(object)["annotations"].(object)[annotationPrefix+name] = c.value
		_, stderr, err := kubectlWarned(encode(p), "-n", n.name, "apply", "-f", "-")
		want := denied + "invalid annotations: " + annotationPrefix + c.want
		if err == nil || strings.Count(strings.TrimSpace(stderr), "\n") != 0 || !strings.Contains(stderr, want) {
			t.Errorf("%s: %v\n%s", name, err, stderr)
		}
	}
	p := pod("wrong", "k", 1)
	delete(p["metadata"].(object)["annotations"].(object), annotationPrefix+"length")
	delete(p["metadata"].(object)["annotations"].(object), annotationPrefix+"expiration")
	_, stderr, err := kubectlWarned(encode(p), "-n", n.name, "apply", "-f", "-")
	if err == nil || strings.Count(strings.TrimSpace(stderr), "\n") != 0 || !strings.Contains(stderr, "length is missing") ||
		!strings.Contains(stderr, "; "+annotationPrefix+"expiration is missing") {
		t.Errorf("missing: %v\n%s", err, stderr)
	}
}

// The sidecar does not change the QoS class of a pod.
func TestQoSClass(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	all := object{"cpu": "10m", "memory": "16Mi"}
	whole := object{"cpu": "100m", "memory": "64Mi"} // with 10m for all, each container takes ten seconds to start
	for name, c := range map[string]struct {
		spec object
		want corev1.PodQOSClass
	}{
		"guaranteed": {object{
			"initContainers": []object{container("init", "true", object{"resources": object{"limits": all}})},
			"containers": []object{
				container("app", forever, object{"resources": object{"requests": all, "limits": all}}),
			},
		}, corev1.PodQOSGuaranteed},
		"guaranteed-as-a-whole": {object{
			"resources":  object{"requests": whole, "limits": whole},
			"containers": []object{container("app", forever)},
		}, corev1.PodQOSGuaranteed},
		"burstable": {object{
			"containers": []object{
				container("app", forever, object{"resources": object{"requests": object{"cpu": "5m"}, "limits": all}}),
			},
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

// A static pod gets no sidecar, and a Windows pod is refused.
func TestPodsWithoutASidecar(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	static := pod("static", "none", 1, object{"nodeName": "a-node"})
	static["metadata"].(object)["annotations"].(object)[corev1.MirrorPodAnnotationKey] = "0123456789abcdef"
	out, warnings, err := kubectlWarned(encode(static), "-n", n.name, "create", "--dry-run=server", "-o", "yaml", "-f", "-")
	must(t, err)
	if !strings.Contains(warnings, "Warning: a static pod gets no semaphore sidecar") || strings.Contains(out, sidecarName) {
		t.Errorf("warned %q:\n%s", warnings, out)
	}
	windows := pod("windows", "none", 1, object{"os": object{"name": "windows"}})
	if got := n.wantRefused(windows); !strings.Contains(got, "denied the request: this is a Windows pod") {
		t.Errorf("refused with %s", got)
	}
}

// The API server does not call the webhook for a pod without the annotation "true".
func TestOtherPodsAreLeftAlone(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	plain := pod("plain", "k", 1)
	delete(plain["metadata"].(object), "annotations")
	off := pod("off", "k", 0) // the webhook would refuse this length
	off["metadata"].(object)["annotations"].(object)[annotationPrefix+"at-least-semaphore-pod"] = "false"
	for _, o := range []object{plain, off} {
		n.create(o)
		p := n.wantRunning(o["metadata"].(object)["name"].(string))
		for _, c := range append([]corev1.Container{}, p.Spec.InitContainers...) {
			t.Errorf("%s has an init container %s", p.Name, c.Name)
		}
	}
}

// The creator of an object whose annotations have no effect gets a warning. The API server
// asks for one neither for other objects, nor for those of a controller.
func TestWarnings(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	annotate := func(o object, name, value string) object {
		o["metadata"].(object)["annotations"].(object)[annotationPrefix+name] = value
		return o
	}
	onItself := deployment("itself", "warned", 1, 0, rollingUpdate(1, 1), object{})
	template := onItself["spec"].(object)["template"].(object)["metadata"].(object)
	onItself["metadata"].(object)["annotations"] = template["annotations"]
	delete(template, "annotations")
	wrong := deployment("wrong", "warned", 0, 0, rollingUpdate(1, 1), object{})
	periodic := object{"apiVersion": "batch/v1", "kind": "CronJob", "metadata": object{"name": "periodic"},
		"spec": object{"schedule": "0 0 1 1 *", "jobTemplate": object{"spec": job("", "warned", 0, "true")["spec"]}}}
	owned := annotate(pod("owned", "warned", 1), "at-least-semaphore-pod", "True")
	owned["metadata"].(object)["ownerReferences"] = []object{
		{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": "0123"}}
	plain := pod("plain", "warned", 1)
	delete(plain["metadata"].(object), "annotations")
	for name, c := range map[string]struct {
		o    object
		want string
	}{
		"value": {annotate(pod("value", "warned", 1), "at-least-semaphore-pod", "True"),
			`at-least-semaphore-pod is "True": the pod runs uncounted; write "true"`},
		"misspelt": {annotate(pod("misspelt", "warned", 1), "lenght", "1"), "lenght is unknown: did you mean length?"},
		"misspelt, uncounted": {annotate(annotate(pod("other", "warned", 1), "lenght", "1"),
			"at-least-semaphore-pod", "1"), "lenght is unknown: did you mean length?"},
		"Deployment":       {onItself, "* does nothing on a Deployment: move it to spec.template.metadata"},
		"wrong Deployment": {wrong, `the pods of this Deployment will be refused: ` + annotationPrefix + `length is "0"`},
		"wrong CronJob":    {periodic, `the pods of this CronJob will be refused: ` + annotationPrefix + `length is "0"`},
		"in the host's network": {deployment("host", "warned", 1, 0, rollingUpdate(1, 1), object{"hostNetwork": true}),
			"hostNetwork without dnsPolicy ClusterFirstWithHostNet"},
		"right Deployment":    {deployment("right", "warned", 1, 0, rollingUpdate(1, 1), object{}), ""},
		"of a controller":     {owned, ""},
		"disabled":            {annotate(pod("off", "warned", 0), "at-least-semaphore-pod", "false"), ""},
		"without annotations": {plain, ""},
	} {
		warnings, err := n.createWarned(c.o, "--dry-run=server")
		if err != nil || !strings.Contains(warnings, c.want) || c.want == "" && warnings != "" {
			t.Errorf("%s: warned of %q, %v, want %q", name, warnings, err, c.want)
		}
	}
	must(t, n.tryCreate(onItself))
	onItself["metadata"].(object)["labels"] = object{"changed": "yes"}
	if _, warnings, err := kubectlWarned(encode(onItself), "-n", n.name, "apply", "-f", "-"); err != nil ||
		!strings.Contains(warnings, "does nothing on a Deployment") {
		t.Errorf("of an update: warned of %q, %v", warnings, err)
	}
}

// The policy in docs/security.md fixes the length of a semaphore, for pods and for the
// templates of their controllers.
func TestLengthPolicy(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	page, err := os.ReadFile(filepath.Join(root, "docs/security.md"))
	must(t, err)
	_, policy, _ := strings.Cut(string(page), "\n## Fix the length of a semaphore\n")
	_, policy, _ = strings.Cut(policy, "\n```yaml\n")
	policy, _, found := strings.Cut(policy, "\n```\n")
	if !found {
		t.Fatal("docs/security.md has no policy")
	}
	policy = strings.NewReplacer("length-of-shop-web", "length-of-"+n.name, ": shop}", ": "+n.name+"}").Replace(policy)
	t.Cleanup(func() { _, _ = kubectl(policy, "delete", "--ignore-not-found", "-f", "-") })
	must(t, errOf(kubectl(policy, "apply", "-f", "-")))
	const refused = "the semaphore shop/web has three tokens"
	cronJob := func(length int) object {
		return object{"apiVersion": "batch/v1", "kind": "CronJob", "metadata": object{"name": "periodic"},
			"spec": object{"schedule": "0 0 1 1 *", "jobTemplate": object{"spec": job("", "web", length, "true")["spec"]}}}
	}
	eventually(t, patience, func() error { // a new policy takes the API server some seconds
		if _, err := n.createWarned(pod("p", "web", 4), "--dry-run=server"); err == nil || !strings.Contains(err.Error(), refused) {
			return fmt.Errorf("a length of 4 got %w", err)
		}
		return nil
	})
	for name, c := range map[string]struct {
		right, wrong object
	}{
		"pod":         {pod("p", "web", 3), pod("p", "web", 30)},
		"another key": {pod("p", "other", 4), nil},
		"Deployment": {deployment("d", "web", 3, 5, rollingUpdate(1, 1), object{}),
			deployment("d", "web", 2, 5, rollingUpdate(1, 1), object{})},
		"CronJob": {cronJob(3), cronJob(4)},
	} {
		if _, err := n.createWarned(c.right, "--dry-run=server"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if c.wrong == nil {
			continue
		}
		if _, err := n.createWarned(c.wrong, "--dry-run=server"); err == nil || !strings.Contains(err.Error(), refused) {
			t.Errorf("%s with another length: %v", name, err)
		}
	}
}

// The API server accepts the examples of deploy/ unchanged.
func TestExamples(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	out := n.kubectl("apply", "--dry-run=server", "-f", filepath.Join(root, "deploy/examples"))
	for _, want := range []string{"deployment.apps/mail", "deployment.apps/web", "job.batch/import", "statefulset.apps/worker"} {
		if !strings.Contains(out, want+" created") {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}
