// Package demo runs the demo to its end, by hand, and interrupted.
package demo

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

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
	p := newDemo(t, args...)
	rig.Must(t, p.Start())
	return p
}

// newDemo is startDemo before the start.
func newDemo(t *testing.T, args ...string) *demoProcess {
	t.Helper()
	demo, err := buildDemo()
	rig.Must(t, err)
	args = append([]string{"-program", rig.Program(t)}, args...)
	p := &demoProcess{Cmd: exec.Command(demo, args...), dir: t.TempDir()}
	p.Dir = rig.Root()
	p.Env = append(os.Environ(), "TMPDIR="+p.dir)
	p.Stdout, p.Stderr = &p.out, &p.out
	t.Cleanup(func() {
		if p.Process != nil {
			_ = p.Process.Kill()
		}
	})
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

var demoUID = regexp.MustCompile(`[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

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
	for _, uid := range demoUID.FindAllString(p.out.String(), -1) {
		if _, err := os.Stat(rig.StartMark(uid)); err == nil {
			files = append(files, rig.StartMark(uid))
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
	failover := regexp.MustCompile(`web-9 refused \d+\.\d s after the kill, the primary is [\d.:]+; ` +
		`web-5 ended; web-9 admitted => 0 free, 3 in use\n`)
	if !failover.MatchString(out) {
		t.Errorf("no failover in\n%s", out)
	}
}

// With -v, the story also shows the flags, the patches and what status prints. A connection
// that breaks does not interrupt it.
func TestDemoDetails(t *testing.T) {
	t.Parallel()
	p := startDemo(t, "-v", "story")
	p.waitForOutput(t, "web-1")
	rig.Must(t, p.Process.Signal(syscall.SIGPIPE))
	if err := p.Wait(); err != nil {
		t.Fatalf("%v:\n%s", err, p.out.String())
	}
	for _, want := range []string{
		"      web-1 got the token ", "      web-6 got no token; its POD_UID is ", "--queue-redis-address=",
		"add /spec/initContainers", "denied the request: no semaphore available: shop/web has 3 of 3 tokens in use",
		"      the sidecar of web-1 exited with 0\n", "      warning: this pod may wait",
		"length in force: 3, as pods ask for\n", "length in force: 4 until "} {
		if !strings.Contains(p.out.String(), want) {
			t.Errorf("no %q in\n%s", want, p.out.String())
		}
	}
	p.wantNothingLeft(t)
}

// The story has colours on a terminal, and none with NO_COLOR. Elsewhere it has none: see
// testDemo.
func TestDemoColours(t *testing.T) {
	for noColor, want := range map[string]bool{"": true, "1": false} {
		t.Run("NO_COLOR="+noColor, func(t *testing.T) {
			t.Parallel()
			terminal, screen := openTerminal(t)
			p := newDemo(t, "story")
			p.Env = append(p.Env, "NO_COLOR="+noColor, "TERM=xterm")
			p.Stdout, p.Stderr = terminal, terminal
			rig.Must(t, p.Start())
			rig.Must(t, terminal.Close())
			go func() { _, _ = io.Copy(&p.out, screen) }() // ends when the demo does
			if err := p.Wait(); err != nil {
				t.Fatalf("%v:\n%s", err, p.out.String())
			}
			p.waitForOutput(t, "Next: ")
			if out := p.out.String(); strings.Contains(out, "\x1b[") != want {
				t.Errorf("colours: want %t, got\n%q", want, out)
			}
		})
	}
}

// openTerminal opens a terminal. What is written to it can be read from screen.
func openTerminal(t *testing.T) (terminal, screen *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	rig.Must(t, err)
	t.Cleanup(func() { _ = screen.Close() })
	var number, unlock uint32
	for request, value := range map[uintptr]*uint32{syscall.TIOCGPTN: &number, syscall.TIOCSPTLCK: &unlock} {
		if _, _, err := syscall.Syscall(syscall.SYS_IOCTL, screen.Fd(), request, uintptr(unsafe.Pointer(value))); err != 0 {
			t.Fatal(err)
		}
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	rig.Must(t, err)
	return terminal, screen
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
		"web-1, web-2, web-3 admitted => 0 free, 3 in use\n    web-4 refused: shop/web has 3 of 3 tokens in use, by web-",
		"    web-1 ended, 1 free, 2 in use; web-4 admitted => 0 free, 3 in use\n",
		"    web-5 refused, and admitted ", " s after the kill => 0 free, 3 in use\n",
		"web-7 logs: waiting for a token of shop/web: 3 of 3 in use, 2nd in line, ", " => 0 free, 3 in use, 2 in line\n",
		"    web-6 starts ", "; web-7 is 1st in line => 0 free, 3 in use, 1 in line\n",
		"; 1 waiting in line => 1 free, 2 in use, 1 in line\n", "    web-7 starts ",
		"    web-8 admitted, and logs: left the line => 0 free, 3 in use\n",
		": the mail server moves; 2 in use, by web-", "    web-11, web-12 admitted => 0 free, 2 in use, 2 in line\n",
		"shop/web --clear --yes\n    web-11 starts ", "length=4 --for=2h --yes\n    web-12 starts ", " => 0 free, 4 in use\n",
		"$ at-least-semaphore-pod-hook status shop/web\n    shop/web: 4 of 4 tokens in use (0 stale), 0 free, ",
		"\nEvery step succeeded. All pods have ended, then the webhook => 4 free, 0 in use\nNext: make run, "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if n := strings.Count(out, "\n"); n > 40 {
		t.Errorf("the story has %d lines, want 40 at most:\n%s", n, out)
	}
	if strings.Contains(out, "\x1b") {
		t.Errorf("the story has colours without a terminal: %q", out)
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
	for _, c := range []struct{ pattern, want string }{
		{".* status .* shop/web", "shop/web: 2 of 3 tokens in use"},
		{".* status .* pause shop/web --for=5m --yes", "length in force: paused until "},
	} {
		status := exec.Command("sh", "-c", find(c.pattern))
		status.Dir = rig.Root()
		if out, err := status.CombinedOutput(); err != nil || !bytes.Contains(out, []byte(c.want)) {
			t.Errorf("%s: %v, no %q in %s", c.pattern, err, c.want, out)
		}
	}
	page := regexp.MustCompile(`http://[0-9.:]+/`).FindString(p.out.String())
	shown, err := http.Get(page + "data?semaphore=shop/web")
	rig.Must(t, err)
	defer shown.Body.Close()
	if text, err := io.ReadAll(shown.Body); err != nil || !bytes.Contains(text, []byte("2 of 0 tokens in use")) {
		t.Errorf("the page has %s, %v", text, err)
	}
	rig.Must(t, sidecar.Process.Signal(syscall.SIGINT))
	rig.Must(t, sidecar.Wait())
	rig.Must(t, p.Process.Signal(syscall.SIGINT))
	rig.Must(t, p.Wait())
	p.wantNothingLeft(t)
}

func TestDemoInterrupted(t *testing.T) {
	etcd := rig.EtcdProgram(t)
	const begun, ready = "web-1", "--queue-redis-address="
	both := []syscall.Signal{syscall.SIGINT, syscall.SIGTERM}
	for _, c := range []struct {
		args, at string // the output to interrupt at
		signals  []syscall.Signal
		wantCode int
	}{
		{"story", begun, both, 1},
		{"run", ready, both, 0},
		{"-etcd " + etcd + " story", begun, both, 1},
		{"-v story", "web-7 logs: waiting", both, 1}, // pods wait in line
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
