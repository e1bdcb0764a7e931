package main

import (
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// process is this program as a process.
type process struct {
	*exec.Cmd
	log  syncBuffer
	done chan struct{} // closed when it has ended
}

func startProcess(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(binary, args...), done: make(chan struct{})}
	p.Stderr = &p.log
	p.start(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %v:\n%s", args, p.log.String())
		}
	})
	return p
}

// start starts the process, which ends with the test.
func (p *process) start(t *testing.T) {
	t.Helper()
	must(t, p.Start())
	go func() {
		_ = p.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.done
	})
}

func startSidecar(t *testing.T, address string, id semaphoreID, token string, flags ...string) *process {
	t.Helper()
	args := append([]string{"sidecar", "--queue-redis-address=" + address, "--heartbeat-interval-seconds=1", "--stale-threshold-seconds=120"}, flags...)
	return startProcess(t, append(args, id.String(), token)...)
}

// wantExit waits for the end of a process.
func (p *process) wantExit(t *testing.T, code int) {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(40 * time.Second):
		t.Fatal("the process did not end")
	}
	if got := p.ProcessState.ExitCode(); got != code {
		t.Fatalf("exit code %d, want %d", got, code)
	}
}

func (p *process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	must(t, p.Process.Signal(s))
}
