//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// startRollOut makes a Deployment of three pods in wait mode that share three tokens, and
// starts to replace them.
func startRollOut(t *testing.T, maxSurge, maxUnavailable int) *diary {
	t.Helper()
	n := newNamespace(t)
	d := newDiary(n)
	n.create(waiting(deployment("web", "rolling", 3, 3, rollingUpdate(maxSurge, maxUnavailable), d.app(untilTold))))
	n.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	n.kubectl("rollout", "restart", "deployment/web")
	return d
}

// wantRollOutDone waits for the end of a rollout and returns how long it took.
func (d *diary) wantRollOutDone() time.Duration {
	d.Helper()
	start := time.Now()
	d.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	took := time.Since(start)
	d.wantStarts(6) // an app notes its start a moment after its container has started
	d.wantNeverMoreThan(3)
	d.wantCounts("rolling", 0, 3)
	return took
}

func wantRolledOut(t *testing.T, maxSurge, maxUnavailable int) time.Duration {
	t.Helper()
	return startRollOut(t, maxSurge, maxUnavailable).wantRollOutDone()
}

// wantStuckRollOut checks that a rollout makes no progress while it may not make an old
// pod unavailable, and ends when it may.
func wantStuckRollOut(t *testing.T, stuckFor time.Duration) (stuck, freed time.Duration) {
	t.Helper()
	d := startRollOut(t, 1, 0)
	start := time.Now()
	var waiter corev1.Pod
	eventually(t, patience, func() error {
		pods, err := d.try("get", "pods", "--field-selector=status.phase=Pending",
			"-o", "jsonpath={.items[*].metadata.name}")
		if err == nil && len(strings.Fields(pods)) != 1 {
			err = fmt.Errorf("pending: %q", pods)
		}
		if err == nil {
			waiter = d.wantWaiting(pods)
		}
		return err
	})
	d.wantWaiters("rolling", waiter)
	if out, err := d.try("rollout", "status", "deployment/web", fmt.Sprintf("--timeout=%s", stuckFor)); err == nil {
		t.Errorf("the rollout was done: %s", out)
	}
	d.wantWaiters("rolling", waiter)
	if shifts := d.shifts(); len(shifts) != 3 || shifts[0].ended || shifts[1].ended || shifts[2].ended {
		t.Errorf("the old pods have not all stayed: %v", shifts)
	}
	stuck = time.Since(start)
	d.kubectl("patch", "deployment", "web", "-p", encode(object{"spec": object{"strategy": rollingUpdate(0, 1)}}))
	return stuck, d.wantRollOutDone()
}

// A Deployment in wait mode has as many replicas as tokens: an update must end an old pod
// first.
func TestRollingUpdate(t *testing.T) {
	t.Parallel()
	wantRolledOut(t, 1, 1)
	wantStuckRollOut(t, 10*time.Second)
}

// With more replicas than tokens, an update ends if maxUnavailable is replicas - length + 1.
func TestRollingUpdateOfMoreReplicasThanTokens(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	d := newDiary(n)
	n.create(waiting(deployment("web", "rolling", 3, 5, rollingUpdate(1, 3), d.app(untilTold))))
	d.wantStarts(3)
	n.kubectl("rollout", "restart", "deployment/web")
	eventually(t, patience, func() error {
		shifts, err := d.read()
		if err != nil {
			return err
		}
		var now []string
		for i, s := range shifts {
			if !s.ended && i >= 3 {
				now = append(now, s.pod)
			}
		}
		if len(now) != 3 {
			err = fmt.Errorf("of the new pods, these work: %v; all: %v", now, shifts)
		}
		return err
	})
	d.wantNeverMoreThan(3)
}
