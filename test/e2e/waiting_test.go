//go:build e2e

package e2e

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// wantSidecarLog waits until the log of a pod's sidecar contains a text.
func (n *namespace) wantSidecarLog(pod, text string) {
	n.Helper()
	n.wantLog(pod, sidecarName, text)
}

// wantLog waits until the log of a container contains a text.
func (n *namespace) wantLog(pod, container, text string) {
	n.Helper()
	eventually(n.T, 30*time.Second, func() error {
		log, err := n.try("logs", pod, "-c", container)
		if err == nil && !strings.Contains(log, text) {
			err = fmt.Errorf("no %q in\n%s", text, log)
		}
		return err
	})
}

// Pods wait in line, each says where it stands, and they run in their order.
func TestWaiting(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	d := newDiary(n)
	n.create(waiting(pod("holder", "line", 1, d.app(untilTold))))
	holder := n.wantRunning("holder")
	n.wantOneSidecar(holder)
	if token, ok := holder.Annotations[annotationPrefix+"token"]; ok {
		t.Errorf("the webhook took the token %s", token)
	}
	n.wantHolders("line", holder)

	names := []string{"first", "second", "third"}
	var line []corev1.Pod
	for _, name := range names {
		_, stderr, err := kubectlWarned(encode(waiting(pod(name, "line", 1, d.app(untilTold)))), "-n", n.name, "create", "-f", "-")
		must(t, err)
		if !strings.Contains(stderr, "Warning: this pod may wait in Init:1/2") {
			t.Errorf("warned: %q", stderr)
		}
		line = append(line, n.wantWaiting(name))
		n.wantWaiters("line", line...)
	}
	n.wantSidecarLog("first", fmt.Sprintf("waiting for a token of %s/line: 1 of 1 in use, 1st in line", n.name))
	n.wantSidecarLog("second", fmt.Sprintf("waiting for a token of %s/line: 1 of 1 in use, 2nd in line", n.name))
	if out := n.kubectl("get", "pod", "second"); !strings.Contains(out, "Init:1/2") {
		t.Errorf("kubectl get pod:\n%s", out)
	}
	n.wantLog("second", awaitName, fmt.Sprintf("waiting for a token of %s/line: 1 of 1 in use, 2nd in line", n.name))

	for i, name := range append([]string{"holder"}, names[:2]...) {
		n.kubectl("delete", "pod", name)
		n.wantRunning(names[i])
		n.wantHolders("line", line[i])
		n.wantWaiters("line", line[i+1:]...)
	}
	n.kubectl("delete", "pod", "second", "third", "--ignore-not-found")
	n.wantCounts("line", 1, 0)
	d.wantNeverMoreThan(1)
	if got := strings.Join(podsOf(d.shifts()), " "); got != "holder first second third" {
		t.Errorf("the apps ran in the order %s", got)
	}
}

// Who leaves the line blocks nobody, however it leaves.
func TestLeavingTheLine(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	create := func(name string) { n.create(waiting(pod(name, "leaving", 1))) }
	create("holder")
	n.wantRunning("holder")
	var line []corev1.Pod
	for _, name := range []string{"told", "forced", "last"} {
		create(name)
		line = append(line, n.wantWaiting(name))
		n.wantWaiters("leaving", line...)
	}
	log := n.follow("told", sidecarName)
	n.kubectl("delete", "pod", "told", "--wait=false")
	n.wantWaitersWithin(10*time.Second, "leaving", line[1:]...)
	timeOf(t, <-log, "left the line")
	n.kubectl("delete", "pod", "forced", "--grace-period=0", "--force")
	n.wantWaitersWithin(25*time.Second, "leaving", line[2]) // dropped after 14 s
	n.kubectl("delete", "pod", "holder")
	n.wantRunning("last")
	n.wantHolders("leaving", line[2])
}

// A pod that does not wait gets nothing while others do.
func TestWaitersGoFirst(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(waiting(pod("holder", "first", 1)))
	n.wantRunning("holder")
	n.create(waiting(pod("waiter", "first", 1)))
	n.wantWaiters("first", n.wantWaiting("waiter"))
	want := fmt.Sprintf("denied the request: no semaphore available: %s/first has 1 of 1 tokens in use, by holder (", n.name)
	if got := n.wantRefused(pod("hasty", "first", 1)); !strings.Contains(got, want) || !strings.Contains(got, "; 1 waiting in line") {
		t.Errorf("refused with %q, want %q", got, want)
	}
	n.kubectl("delete", "pod", "holder", "--wait=false")
	eventually(t, time.Minute, func() error {
		n.wantRefused(pod("hasty", "first", 1))
		p, err := n.get("waiter")
		if err == nil && p.Status.Phase != corev1.PodRunning {
			err = fmt.Errorf("the waiter is %s", p.Status.Phase)
		}
		return err
	})
}

// Pods that wait in the host's network, beside one another and beside others; the ports of the apps are theirs alone.
func TestWaitingInTheHostsNetwork(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	d := newDiary(n)
	listen := "trap 'kill $!; note end; exit 0' TERM; httpd -f -p 18080 -h / & wait $!"
	probed := object{"readinessProbe": object{"tcpSocket": object{"port": 18080}, "periodSeconds": 1}}
	create := func(name string, more object) {
		spec := d.app(listen, probed)
		maps.Copy(spec, more)
		n.create(waiting(pod(name, "host", 1, spec)))
	}
	host := object{"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}
	names := []string{"holder", "host-1", "pod-1", "host-2", "pod-2", "host-3"}
	var line []corev1.Pod
	for _, name := range names {
		more := object{}
		if strings.HasPrefix(name, "host") {
			more = host
		}
		create(name, more)
		if name == "holder" {
			n.wantRunning(name)
			continue
		}
		line = append(line, n.wantWaiting(name))
		n.wantWaiters("host", line...)
	}
	for i, name := range names[:len(names)-1] {
		n.kubectl("delete", "pod", name, "--wait=false")
		n.wantRunning(names[i+1])
		n.wantHolders("host", line[i])
	}
	d.wantNeverMoreThan(1)
}

// Pods that wait where PodSecurity is strict.
func TestWaitingRestricted(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "pod-security.kubernetes.io/enforce=restricted")
	n.create(waiting(pod("holder", "strict", 1, restricted)))
	n.wantRunning("holder")
	n.create(waiting(pod("waiter", "strict", 1, restricted)))
	n.wantWaiters("strict", n.wantWaiting("waiter"))
	n.kubectl("delete", "pod", "holder", "--wait=false")
	n.wantRunning("waiter")
}

// The pods of a Job wait for their turns, and complete.
func TestJobsInLine(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	_, stderr, err := kubectlWarned(encode(waiting(job("warned", "warned", 1, "true"))), "-n", n.name, "create", "--dry-run=server", "-f", "-")
	must(t, err)
	if !strings.Contains(stderr, "Warning: the pods of this Job may wait in Init:1/2") {
		t.Errorf("warned of the Job: %q", stderr)
	}
	n.wantJobsDone(12, 3, 1, 2*time.Minute)
}

// The next in line runs within seconds.
func TestHandOver(t *testing.T) {
	n := newNamespace(t)
	d := newDiary(n)
	d.handOver(5, 2, waiting, func(int) {})
	for _, gap := range turnovers(d.shifts(), 1) {
		if gap >= 3*time.Second {
			t.Errorf("an app started %s after the one before had ended", inSeconds(gap))
		}
	}
}
