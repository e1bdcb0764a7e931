package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"
)

// process is the program in one of its modes, or etcd.
type process struct {
	cmd     *exec.Cmd
	log     logBuffer     // its output
	done    chan struct{} // closed when the process has ended
	endedAt time.Time     // valid once done is closed
}

// start starts a program in its own process group: Ctrl-C in a terminal reaches only the
// demo, which stops the processes in order. env is added to the environment.
func (s *setup) start(env []string, program string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if s.options.verbose {
		p.cmd.Stderr = io.MultiWriter(&p.log, os.Stderr)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	s.processes = append(s.processes, p)
	go func() {
		_ = p.cmd.Wait()
		p.endedAt = time.Now()
		close(p.done)
	}()
	return p, nil
}

// end sends a signal and waits until the process ends. After SIGKILL, the exit code is
// -1.
func (p *process) end(signal syscall.Signal) (exitCode int, err error) {
	if err := p.cmd.Process.Signal(signal); err != nil {
		return 0, err
	}
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), nil
	case <-time.After(stepTimeout):
		return 0, fmt.Errorf("process %d did not end after %s:\n%s", p.cmd.Process.Pid, signal, p.log.String())
	}
}

// stopAll ends all processes, the last started first, so that the sidecars end before the
// webhook. It kills and reports processes that do not end in time.
func (s *setup) stopAll() {
	deadline := time.After(10 * time.Second)
	for _, p := range slices.Backward(s.processes) {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		_ = p.cmd.Process.Signal(syscall.SIGCONT) // it may be paused
		select {
		case <-p.done:
		case <-deadline:
			for _, p := range s.processes {
				if !p.ended() {
					fmt.Fprintf(os.Stderr, "%s (process %d) did not end, and was killed\n",
						p.cmd.Path, p.cmd.Process.Pid)
					_ = p.cmd.Process.Kill()
				}
			}
			<-p.done
		}
	}
}

// ended reports whether the process has ended.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// pause stops the process, as a busy node would. When pause returns, it is stopped.
func (p *process) pause(ctx context.Context) error {
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return poll(ctx, "not paused", func() error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		if err != nil {
			return err
		}
		if !bytes.Contains(stat, []byte(") T ")) {
			return fmt.Errorf("its state: %s", stat)
		}
		return nil
	})
}

// resume resumes a paused process.
func (p *process) resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// logBuffer keeps a process's output, to print it on failure.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
