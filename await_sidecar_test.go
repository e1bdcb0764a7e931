package main

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// Until the app may run, a token that was lost is not put back by a heartbeat: it has been given to another.
func TestTokenLostBeforeTheAppStarts(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1) // with a heartbeat interval of 1 s
	p.WantLog(t, heldText)
	r.MakeStale(t, id, token)
	rig.Eventually(t, 20*time.Second, func() error { // it is kept alive meanwhile
		if score := string(r.Do(t, "ZSCORE", id.inflightKey(), token).([]byte)); score == "1" {
			return errors.New("not renewed")
		}
		return nil
	})
	other := r.GiveToAnother(t, id, token)
	r.WantLine(t, id, token)
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of ")
	r.WantCounts(t, id, 0, 1)
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
	r.WantLine(t, id)
	r.WantInflight(t, id, token)
}

// An init container that asks again shows that the app does not run: the pod was started again. Its token is asked for anew,
// and not put back by a heartbeat should it have been given to another.
func TestPodStartedAgain(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--heartbeat-interval-seconds=60")
	rig.StartAwait(t).WantExit(t, 0)
	other := r.GiveToAnother(t, id, token)
	a := rig.StartAwait(t)
	p.WantLog(t, "the pod is started again: its init container asks for the token")
	r.WantLine(t, id, token)
	a.WantNotEnded(t)
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
}

// In a pod that was admitted with a token, the app starts only if the token is still there; if it was reclaimed while the pod was
// Pending, the pod waits in line.
func TestAdmittedPodConfirmsItsToken(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	s, id := testSemaphores(t, r.Address), freshID()
	token := w.wantAdmitted(t, id, 1)
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLog(t, "holding the token")
	rig.StartAwait(t).WantExit(t, 0)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	r.WantCounts(t, id, 1, 0)

	late := w.wantAdmitted(t, id, 1)
	rig.InPod(t, late)
	r.MakeStale(t, id, late)
	other := w.wantAdmitted(t, id, 1)
	p = rig.StartWaitingSidecar(t, r.Address, id, late, 1)
	r.WantLine(t, id, late)
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
	p.WantLog(t, "holding the token")
	r.WantInflight(t, id, late)
}

// A sidecar that is killed in a running pod takes up its token again; if it was reclaimed meanwhile, it is counted again and
// does not wait, as the app runs.
func TestSidecarStartedAgainInARunningPod(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	start := func() *rig.Process { return rig.StartWaitingSidecar(t, r.Address, id, token, 1) }
	kill := func(p *rig.Process) {
		p.Signal(t, syscall.SIGKILL)
		<-p.Done()
	}
	p := start()
	rig.StartAwait(t).WantExit(t, 0)
	kill(p)
	p = start()
	p.WantLog(t, "started again in a running pod")
	r.WantCounts(t, id, 0, 1)
	kill(p)
	r.MakeStale(t, id, token)
	acquire(t, s, id, 1)
	start().WantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	r.WantCounts(t, id, 0, 2)
}

// While Redis is out of reach the app does not start, and the init container's log says why; when it is back, it does.
func TestSidecarStartsWithoutRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	token := acquire(t, s, id, 1)
	rig.InPod(t, token)
	r.Stop()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLog(t, "no token yet, to be retried")
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, fmt.Sprintf("acquire %s: %s", id, rig.UnreachedText(r.Address)))
	rig.Must(t, r.Start())
	a.WantExit(t, 0)
}
