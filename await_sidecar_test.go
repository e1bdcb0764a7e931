package main

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

// Until the app may run, a token that was lost is not put back by a heartbeat: it has been given to another.
func TestTokenLostBeforeTheAppStarts(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	inPod(t, token)
	p := startWaitingSidecar(t, r.address, id, token, 1) // with a heartbeat interval of 1 s
	p.wantLog(t, heldText)
	r.makeStale(t, id, token)
	eventually(t, 20*time.Second, func() error { // it is kept alive meanwhile
		if score := string(r.do(t, "ZSCORE", id.inflightKey(), token).([]byte)); score == "1" {
			return errors.New("not renewed")
		}
		return nil
	})
	other := r.giveToAnother(t, id, token)
	r.wantLine(t, id, token)
	a := startAwait(t)
	a.wantLogPrefix(t, "waiting for a token of ")
	r.wantCounts(t, id, 0, 1)
	giveBack(t, s, id, other)
	a.wantExit(t, 0)
	r.wantLine(t, id)
	r.wantInflight(t, id, token)
}

// giveToAnother takes a token out of flight and puts another there; at no time is one missing.
func (s *redisServer) giveToAnother(t *testing.T, id semaphoreID, token string) (other string) {
	t.Helper()
	other = uuid.NewString()
	s.do(t, "ZADD", id.inflightKey(), "9999999999", other)
	s.do(t, "ZREM", id.inflightKey(), token)
	return other
}

// An init container that asks again shows that the app does not run: the pod was started again. Its token is asked for anew,
// and not put back by a heartbeat should it have been given to another.
func TestPodStartedAgain(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	inPod(t, token)
	p := startWaitingSidecar(t, r.address, id, token, 1, "--heartbeat-interval-seconds=60")
	startAwait(t).wantExit(t, 0)
	other := r.giveToAnother(t, id, token)
	a := startAwait(t)
	p.wantLog(t, "the pod is started again: its init container asks for the token")
	r.wantLine(t, id, token)
	a.wantNotEnded(t)
	giveBack(t, s, id, other)
	a.wantExit(t, 0)
}

// In a pod that was admitted with a token, the app starts only if the token is still there; if it was reclaimed while the pod was
// Pending, the pod waits in line.
func TestAdmittedPodConfirmsItsToken(t *testing.T) {
	t.Parallel()
	r := commonRedis(t)
	w := startWebhook(t, testConfig(r.address))
	s, id := testSemaphores(t, r.address), freshID()
	token := w.wantAdmitted(t, id, 1)
	inPod(t, token)
	p := startWaitingSidecar(t, r.address, id, token, 1)
	p.wantLog(t, "holding the token")
	startAwait(t).wantExit(t, 0)
	p.signal(t, syscall.SIGTERM)
	p.wantExit(t, 0)
	r.wantCounts(t, id, 1, 0)

	late := w.wantAdmitted(t, id, 1)
	inPod(t, late)
	r.makeStale(t, id, late)
	other := w.wantAdmitted(t, id, 1)
	p = startWaitingSidecar(t, r.address, id, late, 1)
	r.wantLine(t, id, late)
	a := startAwait(t)
	a.wantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	giveBack(t, s, id, other)
	a.wantExit(t, 0)
	p.wantLog(t, "holding the token")
	r.wantInflight(t, id, late)
}

// A sidecar that is killed in a running pod takes up its token again; if it was reclaimed meanwhile, it is counted again and
// does not wait, as the app runs.
func TestSidecarStartedAgainInARunningPod(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	inPod(t, token)
	start := func() *process { return startWaitingSidecar(t, r.address, id, token, 1) }
	kill := func(p *process) {
		p.signal(t, syscall.SIGKILL)
		<-p.done
	}
	p := start()
	startAwait(t).wantExit(t, 0)
	kill(p)
	p = start()
	p.wantLog(t, "started again in a running pod")
	r.wantCounts(t, id, 0, 1)
	kill(p)
	r.makeStale(t, id, token)
	acquire(t, s, id, 1)
	start().wantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	r.wantCounts(t, id, 0, 2)
}

// While Redis is out of reach the app does not start, and the init container's log says why; when it is back, it does.
func TestSidecarStartsWithoutRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, startRedis(t))
	token := acquire(t, s, id, 1)
	inPod(t, token)
	r.stop()
	p := startWaitingSidecar(t, r.address, id, token, 1)
	p.wantLog(t, "no token yet, to be retried")
	a := startAwait(t)
	a.wantLogPrefix(t, fmt.Sprintf("acquire %s: %s", id, unreachedText(r.address)))
	must(t, r.start())
	a.wantExit(t, 0)
}
