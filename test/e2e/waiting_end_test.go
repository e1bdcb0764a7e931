//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
)

// waitEnds makes a pod, or the pods of a workload, stop waiting after some seconds.
func waitEnds(o object, seconds int, then string) object {
	template := o
	if spec := o["spec"].(object); spec["template"] != nil {
		template = spec["template"].(object)
	}
	own := template["metadata"].(object)["annotations"].(object)
	own[annotationPrefix+"wait-seconds"], own[annotationPrefix+"when-waited"] = fmt.Sprint(seconds), then
	return o
}

// failsJob is a podFailurePolicy that ends a Job whose pods stop waiting, as in docs/.
var failsJob = object{"rules": []object{
	{"action": "FailJob", "onExitCodes": object{"operator": "In", "values": []int{75}}},
	{"action": "FailJob", "onPodConditions": []object{{"type": annotationPrefix + "GaveUp", "status": "True"}}},
}}

// wantJobFailed waits until a Job has failed by its podFailurePolicy, with one pod.
func (n *namespace) wantJobFailed(name string) {
	n.Helper()
	eventually(n.T, patience, func() error {
		var j batchv1.Job
		if err := api.get("/apis/batch/v1/namespaces/"+n.name+"/jobs/"+name, &j); err != nil {
			return err
		}
		failed := func(c batchv1.JobCondition) bool {
			return c.Type == batchv1.JobFailed && c.Status == corev1.ConditionTrue &&
				c.Reason == batchv1.JobReasonPodFailurePolicy
		}
		if !slices.ContainsFunc(j.Status.Conditions, failed) || j.Status.Failed != 1 {
			return fmt.Errorf("the status of %s is %s", name, encode(object{"status": j.Status}))
		}
		return nil
	})
}

// awaitOf returns the status of a pod's init container await.
func awaitOf(p corev1.Pod) corev1.ContainerStatus {
	for _, c := range p.Status.InitContainerStatuses {
		if c.Name == awaitName {
			return c
		}
	}
	return corev1.ContainerStatus{}
}

// Pods stop waiting: one fails, one waits again at the end of the line, one runs beyond the
// length, and a Job ends at once.
func TestWaitsEnd(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	never, onFailure := object{"restartPolicy": "Never"}, object{"restartPolicy": "OnFailure"}
	n.create(pod("holder", "ends", 1))
	holder := n.wantRunning("holder")

	n.create(waitEnds(waiting(pod("fails", "ends", 1, never)), 5, "fail"))
	eventually(t, patience, func() error {
		p, err := n.get("fails")
		if err != nil {
			return err
		}
		end := awaitOf(p).State.Terminated
		if p.Status.Phase != corev1.PodFailed || end == nil || end.ExitCode != 75 ||
			!strings.HasPrefix(end.Message, "gave up after ") || !strings.Contains(end.Message, "in use by holder") {
			return fmt.Errorf("the status is %s", encode(object{"status": p.Status}))
		}
		return nil
	})
	n.create(waitEnds(waiting(pod("again", "ends", 1, onFailure)), 5, "fail"))
	eventually(t, patience, func() error {
		p, err := n.get("again")
		if err == nil && (awaitOf(p).RestartCount < 2 || p.Status.Phase != corev1.PodPending) {
			err = fmt.Errorf("the status is %s", encode(object{"status": p.Status}))
		}
		return err
	})
	n.create(waitEnds(waiting(pod("runs", "ends", 1)), 5, "run"))
	runs := n.wantRunning("runs")
	n.wantHolders("ends", holder, runs)
	n.delete("runs", "holder")
	n.wantRunning("again")

	err := n.tryCreate(waitEnds(waiting(pod("always", "ends", 1)), 5, "fail"))
	if err == nil || !strings.Contains(err.Error(), "needs restartPolicy Never or OnFailure") {
		t.Errorf("a pod with restartPolicy Always: %v", err)
	}
	j := waitEnds(waiting(job("policy", "policy", 1, "true", never)), 5, "fail")
	j["spec"].(object)["podFailurePolicy"], j["spec"].(object)["backoffLimit"] = failsJob, 5
	n.create(pod("other", "policy", 1))
	n.wantRunning("other")
	n.create(j)
	n.wantJobFailed("policy")
}

// A gated pod whose time is over fails without a node, and its Job ends at once.
func testGateEndsWaits(t *testing.T) {
	n := newNamespace(t)
	never := object{"restartPolicy": "Never"}
	n.create(gated(pod("holder", "ends", 1)))
	holder := n.wantRunning("holder")
	j := waitEnds(gated(job("policy", "ends", 1, "true", never)), 10, "fail")
	j["spec"].(object)["podFailurePolicy"], j["spec"].(object)["backoffLimit"] = failsJob, 5
	n.create(j)
	n.create(waitEnds(gated(pod("fails", "ends", 1, never)), 10, "fail"))
	eventually(t, patience, func() error {
		p, err := n.get("fails")
		if err == nil && (p.Status.Phase != corev1.PodFailed || p.Status.Reason != "GaveUp" || p.Spec.NodeName != "" ||
			!strings.HasPrefix(p.Status.Message, "gave up after ")) {
			err = fmt.Errorf("the status is %s", encode(object{"status": p.Status}))
		}
		return err
	})
	n.wantEvent("fails", "GaveUp", "1 of 1 in use by holder")
	if out, err := n.try("get", "pod", "fails"); err != nil || !strings.Contains(out, " GaveUp ") {
		t.Errorf("kubectl shows %s, %v", out, err)
	}
	n.wantJobFailed("policy")
	n.create(waitEnds(gated(pod("runs", "ends", 1)), 10, "run"))
	n.wantHolders("ends", holder, n.wantRunning("runs"))
}
