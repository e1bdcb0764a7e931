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
)

// installGate adds deploy/gate, as an operator does, until the test ends.
func installGate(t *testing.T) {
	t.Helper()
	text, err := kubectl("", "kustomize", filepath.Join(root, "deploy/gate"))
	must(t, err)
	text = strings.ReplaceAll(text, releasedImage, os.Getenv("IMAGE"))
	text = strings.ReplaceAll(text, "--unschedulable-seconds=300", "--unschedulable-seconds=15")
	_, err = kubectl(text, "apply", "-f", "-")
	must(t, err)
	t.Cleanup(func() {
		if log, err := hook("logs", "-l", "app.kubernetes.io/component=gate", "--tail=-1"); err != nil || strings.Contains(log, "NOPERM") {
			t.Errorf("gate lacks rights in Redis, or has no log: %v\n%s", err, log)
		}
		_, err := kubectl(text, "delete", "-f", "-")
		must(t, err)
	})
	must(t, rolledOut("deployment/gate"))
}

// wantGated waits until the pod is there and not to be scheduled.
func (n *namespace) wantGated(name string) {
	n.Helper()
	eventually(n.T, 30*time.Second, func() error {
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

// wantEvent waits until there is an event of a pod.
func (n *namespace) wantEvent(pod, reason, text string) {
	n.Helper()
	eventually(n.T, 30*time.Second, func() error {
		out, err := n.try("get", "events", "--field-selector", "involvedObject.name="+pod+",reason="+reason, "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, text) {
			err = fmt.Errorf("the events %s of %s say %q, want %q", reason, pod, out, text)
		}
		return err
	})
}

// Pods that are gated hold nothing of a node until they have a token. Then each is scheduled, one after the other; those who are killed
// meanwhile, all that stand in line for them, lose nothing.
func TestGate(t *testing.T) {
	n := newNamespace(t)
	if _, warnings, err := kubectlWarned(encode(gated(pod("nobody", "none", 1))), "-n", n.name, "create", "--dry-run=server", "-f", "-"); err != nil || !strings.Contains(warnings, "no gate is at work") {
		t.Errorf("without a gate: warned of %q, %v", warnings, err)
	}
	installGate(t)

	n.create(gated(pod("first", "gate", 1)))
	n.wantOneSidecar(n.wantRunning("first"))
	n.wantEvent("first", "TokenTaken", "token of "+n.name+"/gate taken after")
	eventually(t, 20*time.Second, func() error {
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
	n.kubectl("delete", "pod", "first")
	n.wantRunning("second")
	t.Logf("the second runs %s after the first was to be deleted", time.Since(start))
	n.wantGated("third")

	// Both are gone, and all their memory.
	_, err = hook("delete", "pod", "-l", "app.kubernetes.io/component=gate", "--grace-period=0", "--force")
	must(t, err)
	n.create(gated(pod("fourth", "gate", 1)))
	must(t, rolledOut("deployment/gate"))
	n.wantGated("fourth")
	n.kubectl("delete", "pod", "second")
	n.wantRunning("third")
	n.wantGated("fourth")
	n.kubectl("delete", "pod", "third", "--wait=false")
	n.wantRunning("fourth")
	n.kubectl("delete", "pod", "fourth")
	n.wantCounts("gate", 1, 0)
}

// A pod that finds no node lets its token go, and the next one runs; it hears so.
func TestGateUnschedulable(t *testing.T) {
	n := newNamespace(t)
	installGate(t)
	nowhere := gated(pod("nowhere", "node", 1))
	nowhere["spec"].(object)["nodeSelector"] = object{"example.org/no-such": "node"}
	n.create(nowhere)
	n.wantEvent("nowhere", "TokenTaken", "taken")
	n.create(gated(pod("next", "node", 1)))
	n.wantGated("next")
	n.wantEvent("nowhere", "TokenLetGo", "its token of "+n.name+"/node goes to another pod")
	n.wantRunning("next")
}

// The Job of eight pods that leave no room on the node while they wait in Init:1/2, does so when they are gated: a pod that has nothing
// to do with it runs. All complete, never two at once.
func TestGateLeavesRoom(t *testing.T) {
	if took := roomBesideGated(t); took > 10*time.Second {
		t.Errorf("the unrelated pod runs after %s", took)
	}
}

// roomBesideGated checks that and returns how long the unrelated pod takes to run.
func roomBesideGated(t *testing.T) (took time.Duration) {
	t.Helper()
	n := newNamespace(t)
	installGate(t)
	job := object{
		"apiVersion": "batch/v1", "kind": "Job", "metadata": object{"name": "eight"},
		"spec": object{"completions": 8, "parallelism": 8, "template": object{
			"metadata": object{"annotations": annotations("room", 1)},
			"spec": object{"restartPolicy": "Never", "containers": []object{{"name": "app", "image": "busybox", "command": []string{"sleep", "2"},
				"resources": object{"requests": object{"cpu": "400m"}}}}},
		}},
	}
	n.create(gated(job))
	eventually(t, 30*time.Second, func() error {
		out, err := n.try("get", "pods", "-l", "job-name=eight", "-o", `jsonpath={.items[*].spec.schedulingGates[*].name}`)
		if n := strings.Count(out, annotationPrefix+"token"); err == nil && n != 7 {
			err = fmt.Errorf("%d are gated", n)
		}
		return err
	})
	start := time.Now()
	n.create(object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": "unrelated"}, "spec": object{"terminationGracePeriodSeconds": 1,
		"containers": []object{{"name": "app", "image": "busybox", "command": []string{"sleep", "600"}, "resources": object{"requests": object{"cpu": "300m"}}}}}})
	n.wantRunning("unrelated")
	took = time.Since(start)
	eventually(t, 2*time.Minute, func() error {
		out, err := n.try("get", "job", "eight", "-o", "jsonpath={.status.succeeded}")
		if err == nil && out != "8" {
			err = fmt.Errorf("%q have completed", out)
		}
		return err
	})
	shifts := strings.Fields(n.kubectl("get", "pods", "-l", "job-name=eight", "-o",
		`jsonpath={range .items[*]}{.status.containerStatuses[?(@.name=="app")].state.terminated.startedAt}/{.status.containerStatuses[?(@.name=="app")].state.terminated.finishedAt}{"\n"}{end}`))
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
