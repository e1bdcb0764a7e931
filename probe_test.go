package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

// inPod makes the sidecars and probes of a test those of one pod, whose UID it returns.
func inPod(t *testing.T, token string) string {
	t.Helper()
	podUID := uuid.NewString()
	t.Setenv("POD_UID", podUID)
	t.Cleanup(func() { os.Remove(newPassed(podUID, token).path) })
	return podUID
}

// startProbe starts the startup probe; out is what it prints when it has ended.
func startProbe(t *testing.T) (p *process, out *bytes.Buffer) {
	t.Helper()
	out = new(bytes.Buffer)
	p = &process{Cmd: exec.Command(binary, "probe"), done: make(chan struct{})}
	p.Stdout, p.Stderr = out, out
	p.start(t)
	return p, out
}

// The probe says what is waited for, and succeeds when the token is held: the one that is under way then, and each later.
func TestProbe(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	inPod(t, token)
	early, earlyOut := startProbe(t) // comes before the sidecar listens
	p := startWaitingSidecar(t, r.address, id, token, 1)
	r.wantLine(t, id, token)
	early.wantExit(t, 1)
	if got := earlyOut.String(); !strings.HasPrefix(got, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ") || strings.Count(got, "\n") != 1 {
		t.Errorf("the probe says %q", got)
	}
	during, duringOut := startProbe(t)
	waitState(t, during.Process.Pid, "S")
	giveBack(t, s, id, holder)
	p.wantLog(t, "holding the token")
	during.wantExit(t, 0)
	after, afterOut := startProbe(t)
	after.wantExit(t, 0)
	if duringOut.String() != "holding the token\n" || afterOut.String() != "holding the token\n" {
		t.Errorf("the probes say %q and %q", duringOut, afterOut)
	}
}

// A sidecar that ends, or is not there, is no success.
func TestProbeWithoutSidecar(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	acquire(t, s, id, 1)
	token := uuid.NewString()
	podUID := inPod(t, token)
	p := startWaitingSidecar(t, r.address, id, token, 1)
	r.wantLine(t, id, token)
	during, out := startProbe(t)
	waitState(t, during.Process.Pid, "S")
	p.signal(t, syscall.SIGKILL)
	during.wantExit(t, 1)
	t.Logf("the probe said %q", out)

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err := runProbe(ctx, podUID, new(bytes.Buffer))
	if err == nil || errors.Is(err, errNotHolding) || !strings.HasPrefix(err.Error(), "the sidecar does not answer: ") {
		t.Errorf("got %v", err)
	}
}

// A waiter's probe is answered after as long as it waits already.
func TestProbePatience(t *testing.T) {
	for waited, want := range map[time.Duration]time.Duration{0: probeFirst, time.Second: probeFirst, probeFirst: probeLeast, time.Minute: time.Minute, time.Hour: probeMost} {
		if got := probePatience(waited); got != want {
			t.Errorf("after %s: %s, want %s", waited, got, want)
		}
	}
	if probeTimeout <= probeMost {
		t.Errorf("the kubelet gives up after %s", probeTimeout)
	}
}

// A probe that is cut off is no success.
func TestProbeCutOff(t *testing.T) {
	r := newReadiness("starting")
	podUID := uuid.NewString()
	must(t, r.serve(podUID))
	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error, 1)
	go func() { failed <- runProbe(ctx, podUID, new(bytes.Buffer)) }()
	cancel()
	if err := <-failed; err == nil || errors.Is(err, errNotHolding) {
		t.Errorf("got %v", err)
	}
	r.hold()
	must(t, runProbe(context.Background(), podUID, new(bytes.Buffer)))
}

// In a pod that was admitted with a token, the app starts only if the token is still there; if it was reclaimed while the pod was
// Pending, the pod waits in line.
func TestAdmittedPodConfirmsItsToken(t *testing.T) {
	r := commonRedis(t)
	w := startWebhook(t, testConfig(r.address))
	s, id := testSemaphores(t, r.address), freshID()
	token := w.wantAdmitted(t, id, 1)
	inPod(t, token)
	p := startWaitingSidecar(t, r.address, id, token, 1)
	p.wantLog(t, "holding the token")
	probe, _ := startProbe(t)
	probe.wantExit(t, 0)
	p.signal(t, syscall.SIGTERM)
	p.wantExit(t, 0)
	r.wantCounts(t, id, 1, 0)

	late := w.wantAdmitted(t, id, 1)
	inPod(t, late)
	r.makeStale(t, id, late)
	other := w.wantAdmitted(t, id, 1)
	p = startWaitingSidecar(t, r.address, id, late, 1)
	r.wantLine(t, id, late)
	probe, out := startProbe(t)
	probe.wantExit(t, 1)
	if !strings.Contains(out.String(), "1 of 1 in use, 1st in line") {
		t.Errorf("the probe says %q", out)
	}
	giveBack(t, s, id, other)
	p.wantLog(t, "holding the token")
	if got := r.inflight(t, id); len(got) != 1 || got[0] != late {
		t.Errorf("in flight is %v, want %s", got, late)
	}
}

// A sidecar that is killed in a running pod takes up its token again; if it was reclaimed meanwhile, it is counted again and
// does not wait, as the app runs.
func TestSidecarStartedAgainInARunningPod(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	token := uuid.NewString()
	inPod(t, token)
	start := func() *process {
		p := startWaitingSidecar(t, r.address, id, token, 1)
		p.wantLog(t, "holding the token")
		return p
	}
	kill := func(p *process) {
		p.signal(t, syscall.SIGKILL)
		<-p.done
	}
	kill(start())
	p := start()
	p.wantLog(t, "started again in a running pod")
	r.wantCounts(t, id, 0, 1)
	kill(p)
	r.makeStale(t, id, token)
	acquire(t, s, id, 1)
	start().wantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	r.wantCounts(t, id, 0, 2)
}

// While Redis is out of reach the app does not start, and the pod's event says why; when it is back, it does.
func TestSidecarStartsWithoutRedis(t *testing.T) {
	r := startRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	token := acquire(t, s, id, 1)
	inPod(t, token)
	r.stop()
	p := startWaitingSidecar(t, r.address, id, token, 1)
	p.wantLog(t, "no token yet, to be retried")
	probe, out := startProbe(t)
	probe.wantExit(t, 1)
	if want := fmt.Sprintf("acquire %s: connect to queue Redis %s: ", id, r.address); !strings.HasPrefix(out.String(), want) {
		t.Errorf("the probe says %q, want %q", out, want)
	}
	must(t, r.start())
	p.wantLog(t, "holding the token")
	probe, _ = startProbe(t)
	probe.wantExit(t, 0)
}
