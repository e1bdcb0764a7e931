package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// All that is kept of a pod, as Kubernetes writes it.
func TestWatchedPod(t *testing.T) {
	t.Parallel()
	at := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	p := rig.GatedPod("p")
	p.Namespace, p.UID, p.ResourceVersion, p.CreationTimestamp, p.DeletionTimestamp = "shop", "some-uid", "7", at, &at
	p.Spec.NodeName = "node1"
	p.Status = corev1.PodStatus{
		Phase: corev1.PodPending,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: "True"}, {Type: corev1.PodScheduled, Status: "False",
			Reason: "Unschedulable", Message: strings.Repeat("x", 9000), LastTransitionTime: at}},
		InitContainerStatuses: []corev1.ContainerStatus{
			{Name: "other", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at}}},
			{Name: sidecarName, Started: new(true), State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at}}},
			{Name: awaitName, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: at}}},
		},
	}
	var o podObject
	rig.Must(t, json.Unmarshal(mustJSON(t, p), &o))
	got := fmt.Sprintf("%+v", *o.watched())
	want := fmt.Sprintf("%+v", watchedPod{namespace: "shop", name: "p", uid: "some-uid", version: "7", created: at.Time, deleted: true,
		labels: map[string]string{rig.LabelGated: "true"}, annotations: map[string]string{annotationKey: "web"}, gates: []string{"example.org/other", rig.GateName},
		node: "node1", phase: "Pending", scheduled: podScheduled{"False", "Unschedulable", strings.Repeat("x", 500), at.Time},
		initContainers: []initContainer{{sidecarName, true, "running", at.Time}, {awaitName, false, "terminated", at.Time}}})
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A list of pods with much that is not ours. One of nothing has null for items.
func TestReadPods(t *testing.T) {
	for text, want := range map[string]string{
		`{"kind": "PodList", "metadata": {"resourceVersion": "7"}, "items": null}`:   "0 pods, {ResourceVersion:7 Continue:}, <nil>",
		`{"items": [{}, {}], "metadata": {"resourceVersion": "7", "continue": "x"}}`: "2 pods, {ResourceVersion:7 Continue:x}, <nil>",
		`{"items": [{}`:                                        "1 pods, {ResourceVersion: Continue:}, EOF",
		`{"items": [{}, {"metadata": 3}]}`:                     "1 pods, {ResourceVersion: Continue:}, json: cannot unmarshal number into Go struct field podObject.metadata of type struct",
		`{"metadata": {"resourceVersion": "7"}, "items": [{}]`: "1 pods, {ResourceVersion:7 Continue:}, EOF",
	} {
		n := 0
		meta, err := readPods(strings.NewReader(text), func(*watchedPod) { n++ })
		if got := fmt.Sprintf("%d pods, %+v, %v", n, meta, err); !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}

// Thousands of pods fit into a few MiB, whatever others write into them.
func TestWatchedPodsAreSmall(t *testing.T) {
	const pods, most = 5000, 1400 // bytes each
	r, w := io.Pipe()
	go func() {
		p := rig.GatedPod("")
		p.Namespace, p.Status.Phase = "shop", corev1.PodPending
		p.Annotations["example.org/config"] = strings.Repeat("x", 20000)
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: "False", Reason: corev1.PodReasonSchedulingGated}}
		fmt.Fprint(w, `{"metadata": {}, "items": [`)
		for i := range pods {
			p.Name, p.UID, p.ResourceVersion = fmt.Sprintf("gated-pod-of-a-deployment-%d", i), "1d3e5f70-0000-4000-8000-000000000000", fmt.Sprint(i)
			if i > 0 {
				fmt.Fprint(w, ",")
			}
			_ = json.NewEncoder(w).Encode(p)
		}
		fmt.Fprint(w, "]}")
		w.Close()
	}()
	known := map[string]*watchedPod{}
	before := heap()
	_, err := readPods(r, func(p *watchedPod) { known[uuid.NewString()] = p })
	rig.Must(t, err)
	each := (heap() - before) / pods
	t.Logf("%d bytes a pod", each)
	if len(known) != pods || each > most {
		t.Errorf("%d pods of %d bytes each, want %d of %d at most", len(known), each, pods, most)
	}
	runtime.KeepAlive(known)
}

// heap is what is in use.
func heap() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}
