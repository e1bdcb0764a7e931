// Package demo runs the demo to its end, by hand, and interrupted.
package demo

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestMain(m *testing.M) { rig.Main(m, "make test-demo") }

// buildDemo builds the demo, once.
var buildDemo = sync.OnceValues(func() (string, error) {
	demo := filepath.Join(rig.Folder(), "demo")
	if out, err := exec.Command("go", "build", "-C", rig.Path("demo"), "-o", demo, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the demo: %w\n%s", err, out)
	}
	return demo, nil
})

// demoProcess is a running demo. The environment of its children has its TMPDIR.
type demoProcess struct {
	*exec.Cmd
	out rig.Log
	dir string
}

// startDemo starts the demo with the program under test.
func startDemo(t *testing.T, args ...string) *demoProcess {
	t.Helper()
	demo, err := buildDemo()
	rig.Must(t, err)
	args = append([]string{"-program", rig.Program(t)}, args...)
	p := &demoProcess{Cmd: exec.Command(demo, args...), dir: t.TempDir()}
	p.Dir = rig.Root()
	p.Env = append(os.Environ(), "TMPDIR="+p.dir)
	p.Stdout, p.Stderr = &p.out, &p.out
	rig.Must(t, p.Start())
	t.Cleanup(func() { _ = p.Process.Kill() })
	return p
}

// waitForOutput waits until the demo has printed want.
func (p *demoProcess) waitForOutput(t *testing.T, want string) {
	t.Helper()
	rig.Eventually(t, time.Minute, func() error {
		if !strings.Contains(p.out.String(), want) {
			return fmt.Errorf("no %q in %s", want, p.out.String())
		}
		return nil
	})
}

var demoToken = regexp.MustCompile(`(?:with token|POD_UID is) ([-0-9a-f]{36})`)

// wantNothingLeft fails if a process or a file of the demo is left.
func (p *demoProcess) wantNothingLeft(t *testing.T) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	rig.Must(t, err)
	for _, dir := range dirs {
		env, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err == nil && bytes.Contains(env, []byte("TMPDIR="+p.dir+"\x00")) {
			args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
			t.Errorf("process %s is left: %q", filepath.Base(dir), args)
		}
	}
	files, err := filepath.Glob(filepath.Join(p.dir, "*"))
	rig.Must(t, err)
	for _, m := range demoToken.FindAllStringSubmatch(p.out.String(), -1) {
		if _, err := os.Stat(rig.StartMark(m[1])); err == nil {
			files = append(files, rig.StartMark(m[1]))
		}
	}
	if files != nil {
		t.Errorf("files are left: %q", files)
	}
}

func TestDemo(t *testing.T) {
	t.Parallel()
	testDemo(t, "story")
}

func TestDemoWithEtcd(t *testing.T) {
	t.Parallel()
	testDemo(t, "-etcd", rig.EtcdProgram(t), "story")
}

func TestDemoWithSentinels(t *testing.T) {
	t.Parallel()
	out := testDemo(t, "-sentinels", rig.RedisProgram, "story")
	failover := regexp.MustCompile(`\d+\.\d s after the kill; the primary was [\d.:]+, and now is [\d.:]+\n` +
		`   => queue 0, inflight 3`)
	if !failover.MatchString(out) {
		t.Errorf("no failover in\n%s", out)
	}
}

func TestDemoWithoutRedis(t *testing.T) {
	p := startDemo(t, "-sentinels", "/no/redis-server", "story")
	const want = "/no/redis-server: no such file or directory: install Redis, or leave out the Sentinels"
	if err := p.Wait(); err == nil || !strings.Contains(p.out.String(), want) {
		t.Errorf("%v: %s", err, p.out.String())
	}
	p.wantNothingLeft(t)
}

// testDemo runs the demo to its end, and returns what it printed.
func testDemo(t *testing.T, args ...string) string {
	t.Helper()
	p := startDemo(t, args...)
	if err := p.Wait(); err != nil {
		t.Fatalf("%v:\n%s", err, p.out.String())
	}
	out := p.out.String()
	for _, want := range []string{
		"=> queue 0, inflight 3", "=> queue 1, inflight 2", "=> queue 3, inflight 0", "Every step succeeded.",
		"web-4  refused: admission webhook", "web-5  admitted",
		"its sidecar logs: waiting for a token of shop/web: 3 of 3 in use, 2nd in line",
		"=> queue 0, inflight 3, in line 2",
		"web-6  await exited with 0", "web-7  still waits, 1st in line\n   => queue 0, inflight 3, in line 1\n",
		"; 1 waiting in line\n   => queue 1, inflight 2, in line 1", "web-7  await exited with 0",
		"web-8  sidecar exited with 0\n          its sidecar logged: left the line\n   => queue 0, inflight 3\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	p.wantNothingLeft(t)
	return out
}

// The commands that "make run" prints work: they ask for a token and wait in line.
func TestDemoRunLines(t *testing.T) {
	p := startDemo(t, "run")
	p.waitForOutput(t, "Ctrl-C here stops everything.\n")
	find := func(pattern string) string {
		line := regexp.MustCompile("(?m)^  " + pattern + "$").FindString(p.out.String())
		if line == "" {
			t.Fatalf("no %q in %s", pattern, p.out.String())
		}
		return line
	}
	line := find("curl .*")
	curl := exec.Command("sh", "-c", line)
	curl.Dir = rig.Root()
	answer, err := curl.CombinedOutput()
	if err != nil || !bytes.Contains(answer, []byte(`"allowed":true,"patch":`)) {
		t.Errorf("%s%v: %s", line, err, answer)
	}
	var log rig.Log
	sidecar := exec.Command("sh", "-c", "exec "+find(".* sidecar .*--length.*"))
	sidecar.Dir, sidecar.Stderr = rig.Root(), &log
	rig.Must(t, sidecar.Start())
	t.Cleanup(func() { _ = sidecar.Process.Kill() })
	rig.Eventually(t, time.Minute, func() error {
		if !strings.Contains(log.String(), rig.HeldText) {
			return fmt.Errorf("its log: %s", log.String())
		}
		return nil
	})
	rig.Must(t, sidecar.Process.Signal(syscall.SIGINT))
	rig.Must(t, sidecar.Wait())
	rig.Must(t, p.Process.Signal(syscall.SIGINT))
	rig.Must(t, p.Wait())
	p.wantNothingLeft(t)
}

func TestDemoInterrupted(t *testing.T) {
	etcd := rig.EtcdProgram(t)
	const begun = "--queue-redis-address="
	both := []syscall.Signal{syscall.SIGINT, syscall.SIGTERM}
	for _, c := range []struct {
		args, at string // the output to interrupt at
		signals  []syscall.Signal
		wantCode int
	}{
		{"story", begun, both, 1},
		{"run", begun, both, 0},
		{"-etcd " + etcd + " story", begun, both, 1},
		{"story", "its sidecar logs: waiting", both, 1}, // a pod waits in line
	} {
		for _, signal := range c.signals {
			t.Run(fmt.Sprintf("%s %s %s", filepath.Base(c.args), c.at, signal), func(t *testing.T) {
				t.Parallel()
				p := startDemo(t, strings.Fields(c.args)...)
				p.waitForOutput(t, c.at)
				rig.Must(t, p.Process.Signal(signal))
				_ = p.Wait()
				if strings.Contains(p.out.String(), "was killed") {
					t.Errorf("the demo killed a process that did not end:\n%s", p.out.String())
				}
				if code := p.ProcessState.ExitCode(); code != c.wantCode {
					t.Errorf("exit code %d\n%s", code, p.out.String())
				}
				p.wantNothingLeft(t)
			})
		}
	}
}
