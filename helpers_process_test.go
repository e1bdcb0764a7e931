package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

// process is this program as a process.
type process struct {
	*exec.Cmd
	log    syncBuffer // stderr
	stdout syncBuffer
	done   chan struct{} // closed when it has ended
}

// podUIDs are the UIDs of the pods, one for each test, in which its processes are.
var podUIDs sync.Map

// newProcess is a program that is not started yet.
func newProcess(program string, args ...string) *process {
	p := &process{Cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.Stderr, p.Stdout = &p.log, &p.stdout
	return p
}

// limitMemoryAsDeployed gives the processes that are started from now on the memory of a webhook's container in deploy/.
func limitMemoryAsDeployed(t *testing.T) {
	t.Helper()
	t.Setenv("GOMEMLIMIT", "128MiB")
	t.Setenv("GOGC", "400")
}

func startProcess(t *testing.T, args ...string) *process {
	t.Helper()
	p := newProcess(binary, args...)
	if podUID, ok := podUIDs.Load(t); ok {
		p.Env = append(os.Environ(), "POD_UID="+podUID.(string))
	}
	p.start(t)
	return p
}

// start starts the process, which ends with the test.
func (p *process) start(t *testing.T) {
	t.Helper()
	must(t, p.launch())
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("log of %v:\n%s", p.Args[1:], p.log.String())
		}
	})
}

// launch starts the process, which has to be ended.
func (p *process) launch() error {
	if err := p.Start(); err != nil {
		return err
	}
	go func() {
		_ = p.Wait()
		close(p.done)
	}()
	return nil
}

// kill ends the process, if it runs.
func (p *process) kill() {
	_ = p.Process.Kill()
	<-p.done
}

func startSidecar(t *testing.T, address string, id semaphoreID, token string, flags ...string) *process {
	t.Helper()
	args := append([]string{"sidecar", "--queue-redis-address=" + foundBy(address), "--heartbeat-interval-seconds=1", "--stale-threshold-seconds=120"}, flags...)
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

// inPod makes the sidecars and awaits of a test those of one pod, whose UID it returns.
func inPod(t *testing.T, token string) string {
	t.Helper()
	podUID := uuid.NewString()
	podUIDs.Store(t, podUID)
	t.Cleanup(func() { os.Remove(newStartMark(podUID, token).path) })
	return podUID
}

// startAwait starts the init container that waits for the token.
func startAwait(t *testing.T) *process {
	t.Helper()
	return startProcess(t, "await")
}

// wantNotEnded fails if a process has ended.
func (p *process) wantNotEnded(t *testing.T) {
	t.Helper()
	select {
	case <-p.done:
		t.Fatalf("ended with %d:\n%s", p.ProcessState.ExitCode(), p.log.String())
	default:
	}
}

// wantLogPrefix waits for a log line whose message begins like that, and returns the message.
func (p *process) wantLogPrefix(t *testing.T, prefix string) (message string) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		for _, line := range strings.Split(p.log.String(), "\n") {
			if _, rest, ok := strings.Cut(line, `"msg":"`+prefix); ok {
				message, _, _ = strings.Cut(rest, `"`)
				message = prefix + message
				return nil
			}
		}
		return fmt.Errorf("no %q in the log:\n%s", prefix, p.log.String())
	})
	return message
}

// wantLog waits for a log line with that message.
func (p *process) wantLog(t *testing.T, message string) map[string]any {
	t.Helper()
	var lines []map[string]any
	eventually(t, 20*time.Second, func() error {
		if lines = p.log.lines(t, message); len(lines) == 0 {
			return fmt.Errorf("no %q in the log:\n%s", message, p.log.String())
		}
		return nil
	})
	return lines[0]
}

// startWaitingSidecar starts a sidecar that gets its token itself.
func startWaitingSidecar(t *testing.T, address string, id semaphoreID, token string, length int, flags ...string) *process {
	t.Helper()
	return startSidecar(t, address, id, token, append([]string{fmt.Sprintf("--length=%d", length), "--redis-addresses=" + address}, flags...)...)
}

// memory is a field of /proc/PID/status, in KB.
func memory(t *testing.T, p *exec.Cmd, field string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	must(t, err)
	m := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		t.Fatalf("no %s in %s", field, status)
	}
	n, err := strconv.Atoi(string(m[1]))
	must(t, err)
	return n
}
