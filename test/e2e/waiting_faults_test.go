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

// A sidecar that is killed keeps its token, or its place in line. No app is restarted. If
// it was silent so long that it may have lost them, the test tries again.
func TestWaitingSidecarKilled(t *testing.T) {
	t.Parallel()
	const tries = 3
	for range tries {
		if killSidecars(t) {
			return
		}
	}
	t.Errorf("the node took too long to restart a sidecar %d times", tries)
}

// killSidecars returns false if Redis did not hear of a pod for too long.
func killSidecars(t *testing.T) bool {
	t.Helper()
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
	const dropped = 12 // seconds after which Redis drops a silent waiter
	if !n.killSidecar("inflight", "killed", holder, staleSeconds) || !n.killSidecar("seen", "killed", waiters[0], dropped) {
		return false
	}
	n.wantHolders("killed", holder)
	n.wantWaiters("killed", waiters...)
	if p := n.wantRunning("holder"); p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("the app was restarted: %+v", p.Status.ContainerStatuses[0])
	}
	n.delete("holder")
	n.wantRunning("first")
	n.wantHolders("killed", waiters[0])
	n.wantWaiters("killed", waiters[1])
	d.wantStarts(2)
	d.wantNeverMoreThan(1)
	return true
}

// killSidecar kills a pod's sidecar, and waits until Redis has heard of the pod again. It
// returns false if Redis did not for so many seconds. In less time the pod must keep what
// it has.
func (n *namespace) killSidecar(set, key string, p corev1.Pod, limit float64) bool {
	n.Helper()
	_, last := n.heard(set, key, p)
	must(n.T, onNode("pkill -KILL -f '"+bracketed(string(p.UID))+"'"))
	killed, _ := n.heard(set, key, p)
	silence := 0.0
	eventually(n.T, patience, func() error {
		now, heard := n.heard(set, key, p)
		if heard == 0 { // it is in the set no more
			silence = max(silence, now-last)
			if silence < limit {
				n.Fatalf("%s left %s of %s/%s %.1f s after Redis heard of it", p.Name, set, n.name, key, silence)
			}
			return nil
		}
		silence, last = max(silence, heard-last), heard
		if heard < killed+1 {
			return fmt.Errorf("Redis heard of %s at %.1f, and its sidecar was killed at %.1f", p.Name, heard, killed)
		}
		return nil
	})
	n.wantStartedAgain(p.Name, sidecarName)
	if silence >= limit {
		n.Logf("Redis did not hear of %s for %.1f s", p.Name, silence)
	}
	return silence < limit
}

// A pod in deny mode is not scheduled until its token has gone to another pod. Then it
// waits in line before it runs.
func TestTokenLostBeforeTheStart(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	d := newDiary(n)
	late := d.app(untilTold)
	late["schedulingGates"] = []object{{"name": "e2e/later"}}
	n.create(pod("late", "late", 1, late))
	n.wantCounts("late", 0, 1)
	n.wantAdmitted(pod("next", "late", 1, d.app(untilTold)))
	n.wantRunning("next")
	n.kubectl("patch", "pod", "late", "--type=json", "-p", `[{"op": "remove", "path": "/spec/schedulingGates"}]`)
	n.wantWaiting("late")
	n.wantSidecarLog("late", fmt.Sprintf("waiting for a token of %s/late: 1 of 1 in use, 1st in line", n.name))
	n.wantFull("third", "late", 1, 1)
	n.wantRunning("next")
	n.delete("next")
	n.wantRunning("late")
	d.wantStarts(2)
	d.wantNeverMoreThan(1)
}

// pause stops the kubelet while several tests need that: from the time at which all are
// prepared, until the last does not need it any more.
type pause struct {
	prepared, done sync.WaitGroup
	stop, resume   func() error
}

func newPause(tests int) *pause {
	p := &pause{
		stop:   sync.OnceValue(func() error { return onNode("pkill -STOP -x kubelet") }),
		resume: sync.OnceValue(func() error { return onNode("pkill -CONT -x kubelet") }),
	}
	p.prepared.Add(tests)
	p.done.Add(tests)
	return p
}

// join returns the functions by which a test begins and ends its part. A test that fails
// ends it in any case.
func (p *pause) join(t *testing.T) (begin, end func()) {
	prepared, done := sync.OnceFunc(p.prepared.Done), sync.OnceFunc(p.done.Done)
	begin = func() {
		t.Helper()
		prepared()
		p.prepared.Wait()
		must(t, p.stop())
	}
	end = func() {
		t.Helper()
		done()
		p.done.Wait()
		must(t, p.resume())
	}
	t.Cleanup(func() {
		prepared()
		end()
	})
	return begin, end
}

// A node is lost: its kubelet is stopped, and processes are killed.
func TestNodeLost(t *testing.T) {
	p := newPause(3)
	t.Run("Deny", func(t *testing.T) {
		t.Parallel()
		testNodeLost(t, p)
	})
	t.Run("Wait", func(t *testing.T) {
		t.Parallel()
		token, app := loseHolder(t, p, object{})
		t.Logf("the token moved %s after the kill, and the app started after %s", inSeconds(token), inSeconds(app))
	})
	t.Run("Wait with hostIPC", func(t *testing.T) { // the pod's /dev/shm is the node's, and outlives its sandbox
		t.Parallel()
		loseHolder(t, p, object{"hostIPC": true})
	})
}

// The sidecar of a pod is lost, and its token is reclaimed. When the node is back, the
// pod counts again, and no pod is admitted until there is room.
func testNodeLost(t *testing.T, p *pause) {
	n := newNamespace(t)
	stop, resume := p.join(t)
	n.create(pod("lost", "node", 1))
	token := n.wantRunning("lost").Annotations[annotationPrefix+"token"]
	stop()
	must(t, onNode("pkill -KILL -f '"+bracketed(token)+"'"))
	start := time.Now()
	n.wantFull("next", "node", 1, 1)
	n.wantAdmitted(pod("next", "node", 1))
	t.Logf("admitted %s after the kill, with a stale threshold of %d s", inSeconds(time.Since(start)), staleSeconds)
	resume()
	n.wantRunning("next")
	n.wantCounts("node", 0, 2) // the sidecar of the lost pod has started again
	n.wantFull("third", "node", 1, 2)
	n.delete("lost")
	n.wantFull("third", "node", 1, 1)
	n.delete("next")
	n.create(pod("third", "node", 1))
}

// loseHolder kills all processes of a pod that holds a token. The first pod in line gets
// the token when it is stale. When the node is back, the lost pod waits in line.
// loseHolder returns the times from the kill until the first in line had the token, and
// until its app started. spec replaces parts of the pods' spec.
func loseHolder(t *testing.T, p *pause, spec object) (token, app time.Duration) {
	t.Helper()
	n := newNamespace(t)
	d := newDiary(n)
	stop, resume := p.join(t)
	create := func(name string) { n.create(waiting(pod(name, "lost", 1, d.app(untilTold), spec))) }
	create("lost")
	lost := n.wantRunning("lost")
	var waiters []corev1.Pod
	for _, name := range []string{"first", "second"} {
		create(name)
		waiters = append(waiters, n.wantWaiting(name))
		n.wantWaiters("lost", waiters...)
	}
	stop()
	// The script writes the note of the app's end, as the app cannot.
	must(t, onNode(fmt.Sprintf(`uid=%s
		grep -lsE "$uid|$(echo $uid | tr - _)" /proc/[0-9]*/cgroup | cut -d/ -f3 | xargs kill -KILL 2>/dev/null
		echo end lost $(cut -d' ' -f1 /proc/uptime) $uid >>%s/notes`, lost.UID, d.dir)))
	killed := d.shifts()[0].end
	// The kubelet cannot serve the log.
	log := fmt.Sprintf("/var/log/pods/%s_first_%s/%s/*.log", n.name, waiters[0].UID, sidecarName)
	eventually(t, patience, func() error {
		text, err := nodeOutput("cat " + log)
		if err == nil && !strings.Contains(text, "holding the token") {
			err = errors.New(text)
		}
		return err
	})
	token = uptime(t) - killed
	if token < staleSeconds*time.Second/2 {
		t.Errorf("the token moved %s after the kill, and could not be stale yet", inSeconds(token))
	}
	resume()
	d.wantStarted("first")
	app = d.shifts()[1].start - killed

	n.wantRunning("first")
	n.wantWaiters("lost", waiters[1], lost)
	n.wantHolders("lost", waiters[0])
	n.wantWaiting("lost")
	n.delete("first")
	n.wantRunning("second")
	n.delete("second")
	n.wantRunning("lost")
	d.wantNeverMoreThan(1)
	return token, app
}
