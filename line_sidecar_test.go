package main

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

// A waiting sidecar says where it stands, and leaves the line on SIGTERM.
func TestWaitingSidecar(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	first, second := uuid.NewString(), uuid.NewString()
	a := startWaitingSidecar(t, r.address, id, first, 1)
	a.wantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, 0 s")
	b := startWaitingSidecar(t, r.address, id, second, 1)
	b.wantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 2nd in line, 0 s")
	r.wantLine(t, id, first, second)

	a.signal(t, syscall.SIGTERM)
	a.wantExit(t, 0)
	a.wantLog(t, "left the line")
	r.wantLine(t, id, second)

	giveBack(t, s, id, holder)
	b.wantLog(t, "holding the token")
	b.signal(t, syscall.SIGTERM)
	b.wantExit(t, 0)
	b.wantLog(t, "token given back")
	r.wantCounts(t, id, 1, 0)
}

// One that is killed while it waits, and started again by the kubelet, keeps its place.
func TestKilledWaiterKeepsItsPlace(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	first := uuid.NewString()
	p := startWaitingSidecar(t, r.address, id, first, 1)
	r.wantLine(t, id, first)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	p.signal(t, syscall.SIGKILL)
	<-p.done
	p = startWaitingSidecar(t, r.address, id, first, 1)
	eventually(t, 20*time.Second, func() error {
		if !strings.Contains(p.log.String(), "1st in line, ") {
			return errors.New(p.log.String())
		}
		return nil
	})
	r.wantLine(t, id, first, second)
}

// When the token is held, nothing is left of the waiting: one connection, as ever.
func TestHolderUsesOneConnection(t *testing.T) {
	forOneServer(t)
	t.Parallel()
	r, s, id := newSemaphoreOn(t, startRedis(t))
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	p := startWaitingSidecar(t, r.address, id, token, 1)
	r.wantLine(t, id, token)
	connections := func() (mine int) {
		// The test has its own, and its semaphores' and their lock's.
		return strings.Count(string(r.do(t, "CLIENT", "LIST").([]byte)), "\n") - 3
	}
	if n := connections(); n != 2 {
		t.Errorf("%d connections while it waits", n)
	}
	giveBack(t, s, id, holder)
	p.wantLog(t, "holding the token")
	eventually(t, 10*time.Second, func() error {
		if n := connections(); n != 1 {
			return fmt.Errorf("%d connections", n)
		}
		return nil
	})
}
