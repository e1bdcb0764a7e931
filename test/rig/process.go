package rig

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Process is a process that a test starts: the program or a server. Change Cmd only
// before the start.
type Process struct {
	Cmd    *exec.Cmd
	Log    Log // stderr
	Stdout Log

	// OnLine receives each line of stderr as the process writes it. Done is closed after
	// the last line.
	OnLine func(line string)

	done chan struct{} // closed when the process has ended
}

// NewProcess returns a process, not started.
func NewProcess(program string, args ...string) *Process {
	return NewProcessOf(exec.Command(program, args...))
}

// NewProcessOf is NewProcess for a command.
func NewProcessOf(cmd *exec.Cmd) *Process {
	p := &Process{Cmd: cmd, done: make(chan struct{})}
	p.Cmd.Stderr, p.Cmd.Stdout = &p.Log, &p.Stdout
	return p
}

// Start starts the process. It ends with the test.
func (p *Process) Start(t testing.TB) {
	t.Helper()
	Must(t, p.Launch())
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("log of %v:\n%s", p.Cmd.Args, p.Log.String())
		}
	})
}

// Launch starts the process. The caller must end it.
func (p *Process) Launch() error {
	if p.OnLine != nil {
		p.Cmd.Stderr = io.MultiWriter(p.Cmd.Stderr, &lineWriter{onLine: p.OnLine})
	}
	if err := p.Cmd.Start(); err != nil {
		return err
	}
	go func() {
		_ = p.Cmd.Wait() // also waits for the last line of stderr
		close(p.done)
	}()
	return nil
}

// lineWriter calls onLine for each line.
type lineWriter struct {
	onLine func(line string)
	rest   []byte
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		end := bytes.IndexByte(w.rest, '\n')
		if end < 0 {
			return len(p), nil
		}
		w.onLine(string(w.rest[:end+1]))
		w.rest = w.rest[end+1:]
	}
}

// Pid returns the process ID.
func (p *Process) Pid() int { return p.Cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended reports whether the process has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// ExitCode returns the exit code of a process that has ended; -1 if a signal ended it.
func (p *Process) ExitCode() int { return p.Cmd.ProcessState.ExitCode() }

// Kill kills the process if it runs, and waits until it has ended.
func (p *Process) Kill() {
	_ = p.Cmd.Process.Kill()
	<-p.done
}

// Signal sends a signal.
func (p *Process) Signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	Must(t, p.Cmd.Process.Signal(s))
}

// Pause stops the process until Resume or the end of the test: its connections hang.
func (p *Process) Pause(t testing.TB) {
	t.Helper()
	p.Signal(t, syscall.SIGSTOP)
	process := p.Cmd.Process
	t.Cleanup(func() { _ = process.Signal(syscall.SIGCONT) })
	p.WantState(t, "T")
}

// Resume continues a paused process.
func (p *Process) Resume(t testing.TB) {
	t.Helper()
	p.Signal(t, syscall.SIGCONT)
}

// WantState waits until the process is in a state of /proc/PID/stat: T means stopped, S
// sleeping.
func (p *Process) WantState(t testing.TB, want string) {
	t.Helper()
	Eventually(t, 10*time.Second, func() error {
		fields, err := p.stat()
		if err == nil && fields[0] != want {
			err = fmt.Errorf("process %d is in state %s, not %s", p.Pid(), fields[0], want)
		}
		return err
	})
}

// stat returns the fields of /proc/PID/stat, from the state on.
func (p *Process) stat() ([]string, error) {
	stat, err := os.ReadFile(p.proc("stat"))
	if err != nil {
		return nil, err
	}
	return strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])), nil
}

func (p *Process) proc(file string) string {
	return filepath.Join("/proc", strconv.Itoa(p.Pid()), file)
}

// WantExit waits until the process ends, and requires this exit code.
func (p *Process) WantExit(t testing.TB, code int) {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(40 * time.Second):
		t.Fatal("the process did not end")
	}
	if got := p.ExitCode(); got != code {
		t.Fatalf("exit code %d, want %d", got, code)
	}
}

// WantNotEnded fails the test if the process has ended.
func (p *Process) WantNotEnded(t testing.TB) {
	t.Helper()
	if p.Ended() {
		t.Fatalf("ended with %d:\n%s", p.ExitCode(), p.Log.String())
	}
}

// WantLog waits for a log line with a message, and returns the first one.
func (p *Process) WantLog(t testing.TB, message string) map[string]any {
	t.Helper()
	var lines []map[string]any
	Eventually(t, 20*time.Second, func() error {
		if lines = p.Log.Lines(t, message); len(lines) == 0 {
			return fmt.Errorf("no %q in the log:\n%s", message, p.Log.String())
		}
		return nil
	})
	return lines[0]
}

// WantLogPrefix waits for a log line whose message begins with prefix, and returns the
// message.
func (p *Process) WantLogPrefix(t testing.TB, prefix string) (message string) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		for _, line := range strings.Split(p.Log.String(), "\n") {
			if _, rest, ok := strings.Cut(line, `"msg":"`+prefix); ok {
				message, _, _ = strings.Cut(rest, `"`)
				message = prefix + message
				return nil
			}
		}
		return fmt.Errorf("no %q in the log:\n%s", prefix, p.Log.String())
	})
	return message
}

// WantNoSecret fails the test if the password is in the log or in the arguments.
func (p *Process) WantNoSecret(t testing.TB) {
	t.Helper()
	if strings.Contains(p.Log.String(), Password) || strings.Contains(strings.Join(p.Cmd.Args, " "), Password) {
		t.Errorf("the password is shown: %v\n%s", p.Cmd.Args, p.Log.String())
	}
}

// Memory returns a field of /proc/PID/status, in KB: VmRSS, VmHWM or RssAnon.
func (p *Process) Memory(t testing.TB, field string) int {
	t.Helper()
	status, err := os.ReadFile(p.proc("status"))
	Must(t, err)
	m := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		t.Fatalf("no %s in %s", field, status)
	}
	n, err := strconv.Atoi(string(m[1]))
	Must(t, err)
	return n
}

// CPU returns the CPU time that the process has used so far.
func (p *Process) CPU(t testing.TB) time.Duration {
	t.Helper()
	fields, err := p.stat()
	Must(t, err)
	var ticks time.Duration // of 10 ms
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		Must(t, err)
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond
}
