//go:build e2e

package e2e

import (
	"fmt"
	"maps"
	"net/http"
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
	eventually(n.T, patience, func() error {
		log, err := api.do(http.MethodGet, n.path()+"/"+pod+"/log?container="+container, "", nil)
		if err == nil && !strings.Contains(string(log), text) {
			err = fmt.Errorf("no %q in\n%s", text, log)
		}
		return err
	})
}

// Pods wait in line, each logs its place, and they run in order.
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
		warnings, err := n.createWarned(waiting(pod(name, "line", 1, d.app(untilTold))))
		must(t, err)
		if !strings.Contains(warnings, "Warning: this pod may wait in Init:1/2") {
			t.Errorf("warned: %q", warnings)
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
		n.delete(name)
		n.wantRunning(names[i])
		n.wantHolders("line", line[i])
		n.wantWaiters("line", line[i+1:]...)
	}
	n.delete("third")
	n.wantCounts("line", 1, 0)
	d.wantNeverMoreThan(1)
	if got := strings.Join(podsOf(d.shifts()), " "); got != "holder first second third" {
		t.Errorf("the apps ran in the order %s", got)
	}
}

// A pod that leaves the line blocks no other, whether it ends in good order or by force.
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
	log := n.follow("told", sidecarName, "waiting for a token")
	n.end("told")
	n.wantWaiters("leaving", line[1:]...)
	timeOf(t, <-log, "left the line")
	n.kubectl("delete", "pod", "forced", "--grace-period=0", "--force")
	n.wantWaiters("leaving", line[2]) // Redis drops a silent waiter after 12 s
	n.delete("holder")
	n.wantRunning("last")
	n.wantHolders("leaving", line[2])
}

// A pod with a head start goes before those that came shortly before it, and a pod that
// was moved to the front before all.
func TestHeadStart(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	create := func(name, headStart string) corev1.Pod {
		o := waiting(pod(name, "urgent", 1))
		o["metadata"].(object)["annotations"].(object)[annotationPrefix+"head-start"] = headStart
		n.create(o)
		return n.wantWaiting(name)
	}
	n.create(waiting(pod("holder", "urgent", 1)))
	n.wantRunning("holder")
	ordinary, urgent, last := create("ordinary", "0"), create("urgent", "600"), create("last", "0")
	n.wantWaiters("urgent", urgent, ordinary, last)
	wantStatus(t, n.name+"/urgent", `1st +urgent .* \(\+600\) .*`, `2nd +ordinary .*`)
	out, err := status("first", n.name+"/urgent", "last", "--yes")
	if err != nil || !strings.Contains(out, "moved to the front") {
		t.Errorf("got %v, %s", err, out)
	}
	n.wantWaiters("urgent", last, urgent, ordinary)
	n.delete("holder")
	n.wantRunning("last")
	n.delete("last")
	n.wantRunning("urgent")
	n.wantWaiters("urgent", ordinary)
}

// A pod that needs several tokens gets all at one time, and gives all back. Behind it, no
// pod takes what it waits for.
func TestSeveralTokens(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	create := func(name, tokens string) {
		o := waiting(pod(name, "heavy", 3))
		o["metadata"].(object)["annotations"].(object)[annotationPrefix+"tokens"] = tokens
		n.create(o)
	}
	create("one", "1")
	n.wantRunning("one")
	create("two", "1")
	n.wantRunning("two")
	create("heavy", "3")
	heavy := n.wantWaiting("heavy")
	create("light", "1")
	light := n.wantWaiting("light")
	n.wantWaiters("heavy", heavy, light)
	n.wantSidecarLog("heavy", fmt.Sprintf("waiting for 3 tokens of %s/heavy: 2 of 3 in use, 1st in line", n.name))
	n.delete("one")
	n.delete("two")
	n.wantRunning("heavy")
	wantStatus(t, n.name+"/heavy", n.name+`/heavy: 3 of 3 tokens in use by 1 pod .*`, `heavy .* 3 .*`, `1st +light .*`)
	n.delete("heavy")
	n.wantRunning("light")
	n.wantHolders("heavy", light)
}

// A pod in deny mode is refused while others wait.
func TestWaitersGoFirst(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(waiting(pod("holder", "first", 1)))
	n.wantRunning("holder")
	n.create(waiting(pod("waiter", "first", 1)))
	n.wantWaiters("first", n.wantWaiting("waiter"))
	want := fmt.Sprintf("%sno semaphore available: %s/first has 1 of 1 tokens in use, by holder (", denied, n.name)
	got := n.wantRefused(pod("hasty", "first", 1))
	if !strings.Contains(got, want) || !strings.Contains(got, "; 1 waiting in line") {
		t.Errorf("refused with %q, want %q", got, want)
	}
	n.end("holder")
	eventually(t, patience, func() error {
		n.wantRefused(pod("hasty", "first", 1))
		p, err := n.get("waiter")
		if err == nil && p.Status.Phase != corev1.PodRunning {
			err = fmt.Errorf("the waiter is %s", p.Status.Phase)
		}
		return err
	})
}

// Pods in the host's network wait in line with others. The sidecars use no port there, so
// that the apps can.
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
		n.end(name)
		n.wantRunning(names[i+1])
		n.wantHolders("host", line[i])
	}
	d.wantNeverMoreThan(1)
}

// Pods wait in a namespace with strict PodSecurity.
func TestWaitingRestricted(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "pod-security.kubernetes.io/enforce=restricted")
	n.create(waiting(pod("holder", "strict", 1, restricted)))
	n.wantRunning("holder")
	n.create(waiting(pod("waiter", "strict", 1, restricted)))
	n.wantWaiters("strict", n.wantWaiting("waiter"))
	n.end("holder")
	n.wantRunning("waiter")
}

// The pods of a Job wait in line and complete.
func TestJobsInLine(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	warnings, err := n.createWarned(waiting(job("warned", "warned", 1, "true")), "--dry-run=server")
	must(t, err)
	if !strings.Contains(warnings, "Warning: the pods of this Job may wait in Init:1/2") {
		t.Errorf("warned of the Job: %q", warnings)
	}
	n.wantJobsDone(12, 3, 1, 2*patience)
}

// When the holder has ended, the first pod in line starts. That takes at most twice as
// long as the start of a new pod that finds a free token.
func TestHandOver(t *testing.T) {
	const times = 5
	n := newNamespace(t)
	free := newDiary(n)
	var starts []time.Duration
	for i := range times {
		name := fmt.Sprintf("free-%d", i)
		created := uptime(t)
		n.create(waiting(pod(name, "free", times, free.app(untilTold))))
		free.wantStarted(name)
		starts = append(starts, free.shifts()[i].start-created)
	}
	d := newDiary(n)
	d.handOver(times, 2, waiting, func(int) {})
	gaps := turnovers(d.shifts(), 1)
	t.Logf("end of an app to start of the next: %s", figuresOf(gaps))
	t.Logf("creation of a pod to start of its app: %s", figuresOf(starts))
	if figuresOf(gaps).median > 2*figuresOf(starts).median {
		t.Errorf("want at most twice as long: %v, %v", gaps, starts)
	}
}
