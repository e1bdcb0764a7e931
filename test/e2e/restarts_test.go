//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Components of Kubernetes restart, as in an upgrade of a node. Never more apps work than
// there are tokens, no pod loses its place, no app restarts, and afterwards tokens are
// handed over as before.
func TestRestarts(t *testing.T) {
	const handOvers = 3
	var l *line
	var usual time.Duration
	for _, c := range []struct{ component, moving, atRest string }{ // signals
		{"kubelet", "TERM", "KILL"}, {"containerd", "KILL", "TERM"},
		{"apiserver", "KILL", "KILL"}, {"controller-manager", "KILL", "KILL"}, {"scheduler", "KILL", "KILL"},
	} {
		if l == nil {
			l = newLine(newNamespace(t), handOvers)
			for range handOvers {
				l.moveOn()
			}
			usual = l.lastGaps(handOvers).most
		}
		if !t.Run(c.component, func(t *testing.T) {
			l.T = t
			l.testRestart(c.component, c.moving, c.atRest, handOvers)
			gaps := l.lastGaps(handOvers)
			t.Logf("end of an app to start of the next: %s; before all restarts %s at most", gaps, inSeconds(usual))
			if gaps.median > 3*usual {
				t.Errorf("want at most three times as long")
			}
		}) {
			l = nil // its pods may have lost their places
			continue
		}
		l.T = t
	}
}

// lastGaps returns the times from the last ends to the starts that they made room for.
func (l *line) lastGaps(number int) figures {
	l.Helper()
	gaps := turnovers(l.shifts(), 2)
	return figuresOf(gaps[len(gaps)-number:])
}

// testRestart restarts a component by two signals while pods hold tokens and wait for
// them, and then hands tokens over.
func (l *line) testRestart(component, moving, atRest string, handOvers int) {
	l.Helper()
	l.fill(handOvers + 1)

	// During the first restart, a holder ends and the first waiter starts. After it, a
	// pod is created.
	l.end(l.holders[0].Name)
	restartOnNode(l.T, component, moving)
	last := l.createNext()
	l.wantMoved()
	l.waiters = append(l.waiters, l.wantWaiting(last))
	l.wantWaiters("line", l.waiters...)
	l.wantNeverMoreThan(2)

	// During the second restart, no pod starts or ends.
	restartOnNode(l.T, component, atRest)
	l.wantWaiters("line", l.waiters...)
	l.wantHolders("line", l.wantRunning(l.holders[0].Name), l.wantRunning(l.holders[1].Name))

	for range handOvers {
		l.moveOn()
	}
	l.wantOrder()
	l.wantNoRestarts(slices.Concat(l.holders, l.waiters)...)
}

// killAwait kills the init container of a pod that waits for its token.
func killAwait(t *testing.T, p corev1.Pod) {
	t.Helper()
	must(t, onNode(fmt.Sprintf(`uid=%s
		for p in $(grep -lsE "$uid|$(echo $uid | tr - _)" /proc/[0-9]*/cgroup | cut -d/ -f3); do
			tr '\0' ' ' </proc/$p/cmdline | grep -q 'at-least-semaphore-pod-hook await $' && kill -KILL $p && exit 0
		done
		echo no await of $uid; exit 1`, p.UID)))
}

// The waiting init container is killed. If the restartPolicy of the pod allows it, it
// starts again and the pod keeps its place. With the policy Never, the pod fails and
// leaves the line.
func TestAwaitKilled(t *testing.T) {
	t.Parallel()
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
	eventually(t, patience, func() error {
		p, err := n.get("never")
		if err == nil && p.Status.Phase != corev1.PodFailed {
			err = fmt.Errorf("it is %s", p.Status.Phase)
		}
		return err
	})
	n.wantWaiters("await", again)
	n.end("holder")
	n.wantRunning("again")
	n.wantHolders("await", again)
}
