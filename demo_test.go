package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startDemo builds the demo and starts it with this program.
func startDemo(t *testing.T, args ...string) (*exec.Cmd, *syncBuffer) {
	t.Helper()
	demo := filepath.Join(filepath.Dir(binary), "demo")
	out, err := exec.Command("go", "build", "-C", "demo", "-o", demo, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	cmd := exec.Command(demo, append([]string{"-program", binary}, args...)...)
	var b syncBuffer
	cmd.Stdout, cmd.Stderr = &b, &b
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd, &b
}

// wantNoProcessOf fails if a process is left that talks to the demo's Redis, or has its files in a folder of a demo's.
func wantNoProcessOf(t *testing.T, redis string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	for _, dir := range dirs {
		if args, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil && (bytes.Contains(args, []byte("--queue-redis-address="+redis)) || bytes.Contains(args, []byte("at-least-semaphore-pod-hook-demo"))) {
			t.Errorf("process %s is left: %q", filepath.Base(dir), args)
		}
	}
}

func TestDemo(t *testing.T) { testDemo(t, "story") }

func TestDemoWithEtcd(t *testing.T) {
	etcd, err := etcdBinary()
	must(t, err)
	testDemo(t, "-etcd", etcd, "story")
}

func testDemo(t *testing.T, args ...string) {
	cmd, out := startDemo(t, args...)
	start := time.Now()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v:\n%s", err, out.String())
	}
	for _, want := range []string{"=> queue 0, inflight 3", "=> queue 1, inflight 2", "=> queue 3, inflight 0", "Everything went as told.",
		"web-4  refused: admission webhook", "web-5  admitted"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("took %s", took)
	}
	wantNoProcessOf(t, redisOfDemo(out))
}

// redisOfDemo finds the demo's Redis in what it has printed.
func redisOfDemo(out *syncBuffer) string {
	_, rest, _ := strings.Cut(out.String(), "--queue-redis-address=")
	address, _, _ := strings.Cut(rest, " ")
	return address
}

// The curl line that "make run" prints works as it stands.
func TestDemoRunCurl(t *testing.T) {
	cmd, out := startDemo(t, "run")
	var line string
	eventually(t, 20*time.Second, func() error {
		for l := range strings.Lines(out.String()) {
			if strings.HasPrefix(l, "  curl ") && strings.HasSuffix(l, "\n") {
				line = l
				return nil
			}
		}
		return fmt.Errorf("no curl line in %s", out.String())
	})
	answer, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil || !bytes.Contains(answer, []byte(`"allowed":true,"patch":`)) {
		t.Errorf("%s%v: %s", line, err, answer)
	}
	must(t, cmd.Process.Signal(syscall.SIGINT))
	must(t, cmd.Wait())
}

func TestDemoInterrupted(t *testing.T) {
	etcd, err := etcdBinary()
	must(t, err)
	for mode, wantCode := range map[string]int{"story": 1, "run": 0, "-etcd " + etcd + " story": 1} {
		for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
			cmd, out := startDemo(t, strings.Fields(mode)...)
			eventually(t, 20*time.Second, func() error {
				if redisOfDemo(out) == "" {
					return fmt.Errorf("nothing printed yet: %s", out.String())
				}
				return nil
			})
			must(t, cmd.Process.Signal(signal))
			start := time.Now()
			_ = cmd.Wait()
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("%s, %s: took %s: something had to be killed", mode, signal, took)
			}
			if code := cmd.ProcessState.ExitCode(); code != wantCode {
				t.Errorf("%s, %s: exit code %d\n%s", mode, signal, code, out.String())
			}
			wantNoProcessOf(t, redisOfDemo(out))
		}
	}
}
