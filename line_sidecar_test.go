package main

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// A waiting sidecar says where it stands, and leaves the line on SIGTERM.
func TestWaitingSidecar(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	first, second := uuid.NewString(), uuid.NewString()
	a := rig.StartWaitingSidecar(t, r.Address, id, first, 1)
	a.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, 0 s")
	b := rig.StartWaitingSidecar(t, r.Address, id, second, 1)
	b.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 2nd in line, 0 s")
	r.WantLine(t, id, first, second)

	a.Signal(t, syscall.SIGTERM)
	a.WantExit(t, 0)
	a.WantLog(t, "left the line")
	r.WantLine(t, id, second)

	giveBack(t, s, id, holder)
	b.WantLog(t, "holding the token")
	b.Signal(t, syscall.SIGTERM)
	b.WantExit(t, 0)
	b.WantLog(t, "token given back")
	r.WantCounts(t, id, 1, 0)
}

// One that is killed while it waits, and started again by the kubelet, keeps its place.
func TestKilledWaiterKeepsItsPlace(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	first := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, first, 1)
	r.WantLine(t, id, first)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	p.Signal(t, syscall.SIGKILL)
	<-p.Done()
	p = rig.StartWaitingSidecar(t, r.Address, id, first, 1)
	rig.Eventually(t, 20*time.Second, func() error {
		if !strings.Contains(p.Log.String(), "1st in line, ") {
			return errors.New(p.Log.String())
		}
		return nil
	})
	r.WantLine(t, id, first, second)
}

// When the token is held, nothing is left of the waiting: one connection, as ever.
func TestHolderUsesOneConnection(t *testing.T) {
	rig.SkipUnderSentinel(t)
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	r.WantLine(t, id, token)
	connections := func() (mine int) {
		// The test has its own, and its semaphores' and their lock's.
		return strings.Count(string(r.Do(t, "CLIENT", "LIST").([]byte)), "\n") - 3
	}
	if n := connections(); n != 2 {
		t.Errorf("%d connections while it waits", n)
	}
	giveBack(t, s, id, holder)
	p.WantLog(t, "holding the token")
	rig.Eventually(t, 10*time.Second, func() error {
		if n := connections(); n != 1 {
			return fmt.Errorf("%d connections", n)
		}
		return nil
	})
}
