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
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	first, second := uuid.NewString(), uuid.NewString()
	a := startWaitingSidecar(t, r.address, id, first, 1)
	a.wantLog(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, 0 s")
	b := startWaitingSidecar(t, r.address, id, second, 1)
	b.wantLog(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 2nd in line, 0 s")
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

// startWaitingSidecar starts a sidecar that gets its token itself.
func startWaitingSidecar(t *testing.T, address string, id semaphoreID, token string, length int, flags ...string) *process {
	t.Helper()
	return startSidecar(t, address, id, token, append([]string{fmt.Sprintf("--length=%d", length), "--redis-addresses=" + address}, flags...)...)
}

// One that is killed while it waits, and started again by the kubelet, keeps its place.
func TestKilledWaiterKeepsItsPlace(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
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
	r := startRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
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
