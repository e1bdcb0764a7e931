//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// A sidecar that is killed while it holds a token keeps it, and one that is killed while it waits keeps its place in line. No
// app is restarted.
func TestWaitingSidecarKilled(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	d := newDiary(n)
	create := func(name string) { n.create(waiting(pod(name, "killed", 1, d.app(untilTold)))) }
	create("holder")
	holder := n.wantRunning("holder")
	var waiters []corev1.Pod
	for _, name := range []string{"first", "second"} {
		create(name)
		waiters = append(waiters, n.wantWaiting(name))
		n.wantWaiters("killed", waiters...)
	}
	for _, p := range []corev1.Pod{holder, waiters[0]} {
		must(t, onNode("pkill -KILL -f '"+bracketed(string(p.UID))+"'"))
		n.wantStartedAgain(p.Name, sidecarName)
	}
	n.wantHolders("killed", holder)
	n.wantWaiters("killed", waiters...)
	if p := n.wantRunning("holder"); p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("the app was restarted: %+v", p.Status.ContainerStatuses[0])
	}
	n.kubectl("delete", "pod", "holder")
	n.wantRunning("first")
	n.wantHolders("killed", waiters[0])
	n.wantWaiters("killed", waiters[1])
	d.wantStarts(10*time.Second, 2)
	d.wantNeverMoreThan(1)
}

// A pod in deny mode that is not scheduled for so long that its token goes to another: it waits in line before it runs.
func TestTokenLostBeforeTheStart(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	d := newDiary(n)
	late := d.app(untilTold)
	late["schedulingGates"] = []object{{"name": "e2e/later"}}
	n.create(pod("late", "late", 1, late))
	n.wantCounts("late", 0, 1)
	n.wantAdmittedWithin(staleSeconds*time.Second+20*time.Second, pod("next", "late", 1, d.app(untilTold)))
	n.wantRunning("next")
	n.kubectl("patch", "pod", "late", "--type=json", "-p", `[{"op": "remove", "path": "/spec/schedulingGates"}]`)
	n.wantWaiting("late")
	n.wantSidecarLog("late", fmt.Sprintf("waiting for a token of %s/late: 1 of 1 in use, 1st in line", n.name))
	n.wantFull("third", "late", 1, 1)
	n.wantRunning("next")
	n.kubectl("delete", "pod", "next")
	n.wantRunning("late")
	d.wantStarts(10*time.Second, 2)
	d.wantNeverMoreThan(1)
}

// Of a pod that holds a token all processes are killed while its kubelet is stopped, as when a node is lost: the first in line
// has the token soon after it is stale. When the lost pod is back, it waits in line.
func TestHolderLost(t *testing.T) {
	token, app := loseHolder(t)
	t.Logf("the token moved %s after the kill, the app ran after %s", inSeconds(token), inSeconds(app))
	if most := (staleSeconds + 5) * time.Second; token > most {
		t.Errorf("want %s at most", most)
	}
}

// loseHolder returns how long after the kill the first in line had the token, and its app ran. The kubelet is stopped until the
// token has moved.
func loseHolder(t *testing.T) (token, app time.Duration) {
	t.Helper()
	n := newNamespace(t)
	d := newDiary(n)
	create := func(name string) { n.create(waiting(pod(name, "lost", 1, d.app(untilTold)))) }
	create("lost")
	lost := n.wantRunning("lost")
	var waiters []corev1.Pod
	for _, name := range []string{"first", "second"} {
		create(name)
		waiters = append(waiters, n.wantWaiting(name))
		n.wantWaiters("lost", waiters...)
	}
	resume := sync.OnceFunc(func() { must(t, onNode("pkill -CONT -x kubelet")) })
	must(t, onNode("pkill -STOP -x kubelet"))
	defer resume()
	// The last note is the app's, which cannot write it any more.
	must(t, onNode(fmt.Sprintf(`uid=%s
		grep -lsE "$uid|$(echo $uid | tr - _)" /proc/[0-9]*/cgroup | cut -d/ -f3 | xargs kill -KILL 2>/dev/null
		echo end lost $(cut -d' ' -f1 /proc/uptime) >>%s/notes`, lost.UID, d.dir)))
	killed := d.shifts()[0].end
	// The kubelet cannot be asked for the log.
	log := fmt.Sprintf("/var/log/pods/%s_first_%s/%s/*.log", n.name, waiters[0].UID, sidecarName)
	eventually(t, (staleSeconds+30)*time.Second, func() error {
		text, err := nodeOutput("cat " + log)
		if err == nil && !strings.Contains(text, "holding the token") {
			err = errors.New(text)
		}
		return err
	})
	token = uptime(t) - killed
	resume()
	d.wantStarted(time.Minute, "first")
	app = d.shifts()[1].start - killed

	n.wantRunning("first")
	n.wantWaiters("lost", waiters[1], lost)
	n.wantHolders("lost", waiters[0])
	n.wantWaiting("lost")
	n.kubectl("delete", "pod", "first")
	n.wantRunning("second")
	n.kubectl("delete", "pod", "second")
	n.wantRunning("lost")
	d.wantNeverMoreThan(1)
	return token, app
}
