//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// manifestsOf returns the manifests of a folder, with the image under test.
func manifestsOf(t *testing.T, folder string) string {
	t.Helper()
	text, err := kubectl("", "kustomize", filepath.Join(root, folder))
	must(t, err)
	return strings.ReplaceAll(text, releasedImage, os.Getenv("IMAGE"))
}

// installGate installs deploy/gate, as operators do, until the test ends.
func installGate(t *testing.T) {
	t.Helper()
	text := manifestsOf(t, "deploy/gate")
	text = strings.ReplaceAll(text, "--unschedulable-seconds=300", "--unschedulable-seconds=15")
	must(t, errOf(kubectl(text, "apply", "-f", "-")))
	t.Cleanup(func() {
		log, err := hook("logs", "-l", "app.kubernetes.io/component=gate", "--tail=-1")
		if err != nil || strings.Contains(log, "NOPERM") {
			t.Errorf("gate lacks rights in Redis, or has no log: %v\n%s", err, log)
		}
		must(t, errOf(kubectl(text, "delete", "-f", "-")))
	})
	must(t, rolledOut("deployment/gate"))
}

// wantGated waits until the scheduler ignores the pod.
func (n *namespace) wantGated(name string) {
	n.Helper()
	eventually(n.T, patience, func() error {
		p, err := n.get(name)
		if err != nil {
			return err
		}
		for _, c := range p.Status.Conditions {
			if c.Type == "PodScheduled" && c.Reason == "SchedulingGated" {
				return nil
			}
		}
		return fmt.Errorf("its conditions are %+v", p.Status.Conditions)
	})
}

// events returns the messages of the events of a pod with that reason.
func (n *namespace) events(pod, reason string) (string, error) {
	return n.try("get", "events", "--field-selector", "involvedObject.name="+pod+",reason="+reason,
		"-o", "jsonpath={.items[*].message}")
}

// wantEvent waits until there is an event of a pod.
func (n *namespace) wantEvent(pod, reason, text string) {
	n.Helper()
	eventually(n.T, patience, func() error {
		out, err := n.events(pod, reason)
		if err == nil && !strings.Contains(out, text) {
			err = fmt.Errorf("the events %s of %s say %q, want %q", reason, pod, out, text)
		}
		return err
	})
}

// TestGate installs the gate, once for all that is tested with it.
func TestGate(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	warnings, err := n.createWarned(gated(pod("nobody", "none", 1)), "--dry-run=server")
	if err != nil || !strings.Contains(warnings, "without any event, no gate runs") {
		t.Errorf("without a gate: warned of %q, %v", warnings, err)
	}
	installGate(t)
	for name, test := range map[string]func(*testing.T){
		"Line":          testGateLine,
		"Unschedulable": testGateUnschedulable,
		"Refused":       testGateRefused,
		"EndsWaits":     testGateEndsWaits,
		"SeveralTokens": testGateSeveralTokens,
		"LeavesRoom":    func(t *testing.T) { roomBesideGated(t, "250m", "260m") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

// A gated pod that needs several tokens gets all at one time, and its sidecar keeps them.
func testGateSeveralTokens(t *testing.T) {
	n := newNamespace(t)
	n.create(waiting(pod("holder", "heavy", 3)))
	n.wantRunning("holder")
	heavy := gated(pod("heavy", "heavy", 3))
	heavy["metadata"].(object)["annotations"].(object)[annotationPrefix+"tokens"] = "3"
	n.create(heavy)
	n.wantEvent("heavy", "WaitingForToken", "waiting for 3 tokens of "+n.name+"/heavy: 1 of 3 in use, 1st in line")
	n.wantGated("heavy")
	n.delete("holder")
	n.wantRunning("heavy")
	wantStatus(t, n.name+"/heavy", n.name+`/heavy: 3 of 3 tokens in use by 1 pod .*`, `heavy +[^ ]+ .* 3 .*`)
}

// Gated pods take no room on a node until they have a token. Then they run one after the
// other. All gates are killed meanwhile, and no pod loses its place.
func testGateLine(t *testing.T) {
	n := newNamespace(t)
	n.create(gated(pod("first", "gate", 1)))
	n.wantOneSidecar(n.wantRunning("first"))
	n.wantEvent("first", "TokenTaken", "token of "+n.name+"/gate taken after")
	eventually(t, patience, func() error {
		p, err := n.get("first")
		if label, ok := p.Labels[annotationPrefix+"gated"]; err == nil && ok {
			err = fmt.Errorf("it has the label %q yet", label)
		}
		return err
	})
	for _, name := range []string{"second", "third"} {
		n.create(gated(pod(name, "gate", 1)))
		n.wantGated(name)
	}
	n.wantEvent("second", "WaitingForToken", "1 of 1 in use, 1st in line")
	second, err := n.get("second")
	must(t, err)
	third, err := n.get("third")
	must(t, err)
	n.wantWaiters("gate", second, third)
	wantStatus(t, n.name+"/gate", `1st +second .*`, `2nd +third .*`)

	start := time.Now()
	n.delete("first")
	n.wantRunning("second")
	t.Logf("the second runs %s after the deletion of the first", inSeconds(time.Since(start)))
	n.wantGated("third")

	// Both gates are gone, with their memory.
	_, err = hook("delete", "pod", "-l", "app.kubernetes.io/component=gate", "--grace-period=0", "--force")
	must(t, err)
	n.create(gated(pod("fourth", "gate", 1)))
	must(t, rolledOut("deployment/gate"))
	n.wantGated("fourth")
	n.delete("second")
	n.wantRunning("third")
	n.wantGated("fourth")
	n.end("third")
	n.wantRunning("fourth")
	n.delete("fourth")
	n.wantCounts("gate", 1, 0)
}

// A pod that finds no node loses its token to the next one. An event tells it.
func testGateUnschedulable(t *testing.T) {
	n := newNamespace(t)
	nowhere := gated(pod("nowhere", "node", 1))
	nowhere["spec"].(object)["nodeSelector"] = object{"example.org/no-such": "node"}
	n.create(nowhere)
	n.wantEvent("nowhere", "TokenTaken", "taken")
	n.create(gated(pod("next", "node", 1)))
	n.wantGated("next")
	n.wantEvent("nowhere", "TokenLetGo", "its token of "+n.name+"/node goes to another pod")
	n.wantRunning("next")
}

// refusing is a policy that keeps the last scheduling gate of a pod.
const refusing = `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: NAME}
spec:
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: NAME}}
    resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [UPDATE], resources: [pods]}]
  validations:
    - expression: object.metadata.name != "stuck" || has(object.spec.schedulingGates)
      message: on purpose
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: NAME}
spec: {policyName: NAME, validationActions: [Deny]}
`

// A pod with the scheduling gate of another controller takes no token. Then a policy
// refuses to lift our gate, too, and the next pod gets the token.
func testGateRefused(t *testing.T) {
	n := newNamespace(t)
	policy := strings.ReplaceAll(refusing, "NAME", n.name)
	stuck := gated(pod("stuck", "refused", 1))
	stuck["spec"].(object)["schedulingGates"] = []object{{"name": "example.org/other"}}
	n.create(stuck)
	n.wantEvent("stuck", "WaitingForGates", "example.org/other")
	n.create(gated(pod("first", "refused", 1)))
	n.wantRunning("first")

	_, err := kubectl(policy, "apply", "-f", "-")
	must(t, err)
	t.Cleanup(func() { must(t, errOf(kubectl(policy, "delete", "--ignore-not-found", "-f", "-"))) })
	eventually(t, patience, func() error {
		_, err := n.try("patch", "pod", "stuck", "--dry-run=server", "--type=json",
			"-p", `[{"op": "remove", "path": "/spec/schedulingGates"}]`)
		if err == nil || !strings.Contains(err.Error(), "on purpose") {
			return fmt.Errorf("the policy does not refuse yet: %v", err)
		}
		return nil
	})
	n.kubectl("patch", "pod", "stuck", "--type=json", "-p", `[{"op": "remove", "path": "/spec/schedulingGates/0"}]`)
	n.create(gated(pod("next", "refused", 1)))
	n.wantEvent("next", "WaitingForToken", "2nd in line")
	n.delete("first")
	n.wantEvent("stuck", "TokenLetGo", "on purpose")
	n.wantRunning("next")
	n.wantGated("stuck")
	must(t, errOf(kubectl(policy, "delete", "-f", "-")))
	n.end("next")
	n.wantRunning("stuck")
}

// roomBesideGated runs a Job of eight gated pods, and an unrelated pod beside them, with
// these requests of CPU. If the eight were scheduled at once, a node of two cores would
// have no room for it. The pods of the Job complete one after the other. It returns the
// time until the unrelated pod runs.
func roomBesideGated(t *testing.T, each, unrelated string) (took time.Duration) {
	t.Helper()
	n := newNamespace(t)
	requests := func(cpu string) object { return object{"resources": object{"requests": object{"cpu": cpu}}} }
	eight := job("eight", "room", 1, "", object{"containers": []object{container("app", "sleep 2", requests(each))}})
	eight["spec"].(object)["completions"], eight["spec"].(object)["parallelism"] = 8, 8
	n.create(gated(eight))
	eventually(t, patience, func() error {
		var pods corev1.PodList
		if err := api.get(n.path()+"?labelSelector=job-name%3Deight", &pods); err != nil {
			return err
		}
		gated, lifted := 0, 0
		for _, p := range pods.Items {
			switch {
			case slices.Contains(p.Spec.SchedulingGates, corev1.PodSchedulingGate{Name: annotationPrefix + "token"}):
				gated++
			case p.Status.Phase != corev1.PodSucceeded:
				lifted++
			}
		}
		if len(pods.Items) != 8 || gated < 5 || lifted > 2 { // one ends while the next one starts
			return fmt.Errorf("of %d pods, %d are gated and %d may run", len(pods.Items), gated, lifted)
		}
		return nil
	})
	start := time.Now()
	n.create(object{
		"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": "unrelated"},
		"spec": object{"containers": []object{container("app", forever, requests(unrelated))}},
	})
	n.wantRunning("unrelated")
	took = time.Since(start)
	if refused, err := n.events("unrelated", "FailedScheduling"); err != nil || refused != "" {
		t.Errorf("the unrelated pod found no room at first: %s, %v", refused, err)
	}
	eventually(t, patience, func() error {
		out, err := n.try("get", "job", "eight", "-o", "jsonpath={.status.succeeded}")
		if err == nil && out != "8" {
			err = fmt.Errorf("%q have completed", out)
		}
		return err
	})
	terminated := `.status.containerStatuses[?(@.name=="app")].state.terminated`
	shifts := strings.Fields(n.kubectl("get", "pods", "-l", "job-name=eight", "-o",
		"jsonpath={range .items[*]}{"+terminated+".startedAt}/{"+terminated+`.finishedAt}{"\n"}{end}`))
	slices.Sort(shifts)
	for i, shift := range shifts[1:] {
		started, _, _ := strings.Cut(shift, "/")
		if _, ended, _ := strings.Cut(shifts[i], "/"); started < ended {
			t.Errorf("one worked in %s, and another in %s", shifts[i], shift)
		}
	}
	n.wantCounts("room", 1, 0)
	return took
}
