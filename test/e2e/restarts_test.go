//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Whatever of Kubernetes is restarted, as an upgrade of a node does it: never more apps than tokens, nobody loses a place, no app
// is restarted, and tokens are handed over afterwards as before.
func TestRestarts(t *testing.T) {
	for _, c := range []struct{ component, signal string }{
		{"kubelet", "TERM"}, {"kubelet", "KILL"}, {"containerd", "TERM"}, {"containerd", "KILL"},
		{"apiserver", "KILL"}, {"controller-manager", "KILL"}, {"scheduler", "KILL"},
	} {
		t.Run(c.component+" "+c.signal, func(t *testing.T) { testRestart(t, c.component, c.signal) })
	}
}

// testRestart restarts a component while pods of a semaphore of length 2 hold, wait, start and end.
func testRestart(t *testing.T, component, signal string) {
	const length = 2
	n := newNamespace(t)
	d := newDiary(n)
	var names []string
	create := func() string {
		name := fmt.Sprintf("p-%d", len(names))
		n.create(waiting(pod(name, "restart", length, d.app(untilTold))))
		names = append(names, name)
		return name
	}
	for range length {
		d.wantStarted(time.Minute, create())
	}
	var line []corev1.Pod
	for range 4 {
		line = append(line, n.wantWaiting(create()))
		n.wantWaiters("restart", line...)
	}

	// One ends and the first in line starts in the middle of it, and one is created.
	n.kubectl("delete", "pod", names[0], "--wait=false")
	restartOnNode(t, component, signal)
	create()
	d.wantStarted(time.Minute, names[length])
	line = append(line[1:], n.wantWaiting(names[len(names)-1]))
	n.wantWaiters("restart", line...)
	d.wantNeverMoreThan(length)

	// And once more, while none of them moves.
	restartOnNode(t, component, signal)
	n.wantWaiters("restart", line...)
	n.wantHolders("restart", n.wantRunning(names[1]), n.wantRunning(names[2]))

	// Those that hold tokens end one after the other.
	for i := 1; i < 4; i++ {
		n.kubectl("delete", "pod", names[i], "--wait=false")
		d.wantStarted(time.Minute, names[i+length])
	}
	d.wantNeverMoreThan(length)
	shifts := d.shifts()
	if got := podsOf(shifts); !slices.Equal(got, names[:length+4]) {
		t.Errorf("the apps ran in the order %v", got)
	}
	for i, gap := range turnovers(shifts, length) {
		t.Logf("%s started %s after the end that made room for it", shifts[length+i].pod, inSeconds(gap))
		if i > 0 && gap > 3*time.Second { // the first was in the middle of the restart
			t.Errorf("want 3 s at most")
		}
	}
	for _, name := range names[4:] {
		p, err := n.get(name)
		must(t, err)
		for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			if c.RestartCount > 0 {
				t.Errorf("%s: %s was restarted", name, c.Name)
			}
		}
	}
}

// killAwait kills the init container of a waiting pod that awaits its token.
func killAwait(t *testing.T, p corev1.Pod) {
	t.Helper()
	must(t, onNode(fmt.Sprintf(`uid=%s
		for p in $(grep -lsE "$uid|$(echo $uid | tr - _)" /proc/[0-9]*/cgroup | cut -d/ -f3); do
			tr '\0' ' ' </proc/$p/cmdline | grep -q 'at-least-semaphore-pod-hook await $' && kill -KILL $p && exit 0
		done
		echo no await of $uid; exit 1`, p.UID)))
}

// An init container that is killed while it waits is started again in a pod whose restartPolicy allows it, and the pod keeps its
// place. In one whose policy is Never the pod fails, and leaves the line.
func TestAwaitKilled(t *testing.T) {
	n := newNamespace(t)
	n.create(waiting(pod("holder", "await", 1)))
	n.wantRunning("holder")
	n.create(waiting(pod("again", "await", 1)))
	again := n.wantWaiting("again")
	n.wantWaiters("await", again)
	n.create(waiting(pod("never", "await", 1, object{"restartPolicy": "Never"})))
	never := n.wantWaiting("never")
	n.wantWaiters("await", again, never)
	killAwait(t, again)
	killAwait(t, never)
	n.wantStartedAgain("again", awaitName)
	eventually(t, time.Minute, func() error {
		p, err := n.get("never")
		if err == nil && p.Status.Phase != corev1.PodFailed {
			err = fmt.Errorf("it is %s", p.Status.Phase)
		}
		return err
	})
	n.wantWaiters("await", again)
	n.kubectl("delete", "pod", "holder", "--wait=false")
	n.wantRunning("again")
	n.wantHolders("await", again)
}

// The settings for clusters that are not like this one.
func TestSettings(t *testing.T) {
	_, err := hook("patch", "configmap", "settings", "-p", encode(object{"data": object{
		"AWAIT_RESTART":             "true",
		"SIDECAR_RESOURCES":         "cpu=200m,memory=96Mi,ephemeral-storage=16Mi",
		"SIDECAR_REQUESTS":          "cpu=10m,memory=48Mi,ephemeral-storage=16Mi",
		"SIDECAR_IMAGE_PULL_SECRET": "mirror",
		"POD_ANNOTATIONS":           "example.org/ports=6379,2379,example.org/mesh=off",
	}}))
	must(t, err)
	t.Cleanup(func() {
		apply(t, "deploy")
		restartWebhook(t)
	})
	restartWebhook(t)
	n := newNamespace(t)
	n.create(waiting(pod("holder", "settings", 1)))
	n.wantRunning("holder")
	n.create(waiting(pod("never", "settings", 1, object{"restartPolicy": "Never", "imagePullSecrets": []object{{"name": "own"}}})))
	p := n.wantWaiting("never")
	for _, c := range p.Spec.InitContainers {
		if got := fmt.Sprint(c.Resources.Limits.Cpu(), c.Resources.Limits.Memory(), c.Resources.Limits.StorageEphemeral(), c.Resources.Requests.Cpu()); got != "200m 96Mi 16Mi 10m" {
			t.Errorf("%s: resources %s", c.Name, got)
		}
	}
	if s := p.Spec.ImagePullSecrets; len(s) != 2 || s[0].Name != "own" || s[1].Name != "mirror" {
		t.Errorf("pull secrets %v", s)
	}
	if a := p.Annotations; a["example.org/ports"] != "6379,2379" || a["example.org/mesh"] != "off" {
		t.Errorf("annotations %v", a)
	}
	killAwait(t, p)
	n.wantStartedAgain("never", awaitName)
	n.wantWaiters("settings", p)
	n.kubectl("delete", "pod", "holder", "--wait=false")
	n.wantRunning("never")
	if out := n.kubectl("get", "pod", "never", "-o", "jsonpath={.status.initContainerStatuses[1].state.terminated.exitCode}"); strings.TrimSpace(out) != "0" {
		t.Errorf("exit code %s", out)
	}
}
