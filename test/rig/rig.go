// Package rig has what all test suites share. It starts real servers and real processes
// of the program, and reads their output. It uses no name of the program: a suite sees
// what a user sees.
//
// All helpers take the test. They fail it with a clear message, and stop what they
// started when it ends.
//
// A suite in a folder of its own begins with
//
//	func TestMain(m *testing.M) { rig.Main(m, "make chaos") }
//
// and then runs only with SUITE=1 in the environment, as its make target sets it. "go
// test ./..." stays quick.
//
// Program (this file, process.go, program.go):
//
//	Program(t), Build             the program
//	BuildBroken(t, edits)         a build with replaced texts
//	StartProgram, StartSidecar, StartWaitingSidecar, StartAwait, InPod
//	StartWebhook, StartGate       wait until the process is ready
//	NewWebhook, NewGate, NewProcess + Start, Launch
//	Process                       Log, Stdout, OnLine, Signal, Pause, Resume, Kill, Done,
//	                              WantExit, WantLog, Memory, CPU
//	Webhook, Gate                 URL, Post, WantReady, Metrics, Metric
//
// Servers (redis.go, group.go, queue.go, etcd.go, dns.go, proxy.go,
// apiserver*.go):
//
//	StartRedis, StartRedisWith, CommonRedis
//	Redis                         Do, Control, Start, Stop, Crash, Pause, Resume, Redial
//	StartSentinelGroup, StartCluster
//	Group                         Address, Holder, Serves, WantReady
//	LockServers                   the servers of a Redlock: Addresses, LocksLeft
//	StartEtcd, LeaderFirst
//	StartDNS, ProgramInPod        a DNS server with faults
//	StartProxy
//	Proxy                         Silence, Cut, Mend, HoldFirst, Answers, Delay, Rewrite,
//	                              Made
//	StartAPIServer                an API server with pods, events, watches and faults
//	QueueAddress                  a server's address for the program; see TEST_QUEUE
//
// The data of a semaphore in Redis (semaphore.go, scripts.go):
//
//	FreshID, ID                   InflightKey, ..., Keys; helpers take any id with the
//	                              String "NAMESPACE/KEY"
//	Redis                         Counts, WantCounts, Inflight, WantInflight, Line,
//	                              WantLine, State, Shift, MakeStale, MakeFree, ...
//	ScriptSource(name), Redis.Run(name, id, timing, args...)
//	Redis.LoadScripts             as a webhook does; done at each start unless the server is Bare
//	Acquire, Maintain, Heartbeat, Release
//	BeatTimeout, PollMost, LineQuiet, LinePatience
//	                              times of scripts and program (constants.go)
//
// Reviews (review.go):
//
//	Fixture, Review(t, id, length, change...)
//	                              AdmissionReviews of test/testdata/admission-reviews
//	ReadAdmission, PatchedPod     the webhook's answer
package rig

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Root is the folder of the project: the nearest parent with the program's go.mod.
var Root = sync.OnceValue(func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(text, []byte("module github.com/kaidotio/at-least-semaphore-pod-hook\n")) {
			return dir
		}
		if dir == filepath.Dir(dir) {
			panic("no go.mod of the program in this folder or above it")
		}
	}
})

// Path returns the path of a project file, given from the root.
func Path(path string) string { return filepath.Join(Root(), filepath.FromSlash(path)) }

// ReadFile reads a project file, given by its path from the root.
func ReadFile(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(Path(path))
	Must(t, err)
	return string(text)
}

// WriteFile writes a file into a new folder, and returns its path.
func WriteFile(t testing.TB, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	Must(t, os.WriteFile(file, []byte(text), 0o600))
	return file
}

// Main is the TestMain of a suite in its own folder. Without SUITE=1 in the environment,
// it runs only the quick tests, if any, and prints the make target of the suite.
func Main(m *testing.M, target string, quick ...string) {
	flag.Parse()
	if os.Getenv("SUITE") == "1" {
		os.Exit(Run(m))
	}
	fmt.Println("this suite is skipped; run it with:", target)
	if len(quick) == 0 {
		os.Exit(0)
	}
	if err := flag.Set("test.run", "^("+strings.Join(quick, "|")+")$"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(finish(m))
}

// Run builds the program, runs the tests, and stops the shared servers. Fuzzing needs no
// program, and each of its processes would build one.
func Run(m *testing.M) (code int) {
	flag.Parse()
	if flag.Lookup("test.fuzz").Value.String() == "" {
		if _, err := program(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return finish(m)
}

func finish(m *testing.M) (code int) {
	defer os.RemoveAll(Folder())
	defer stopShared()
	return m.Run()
}

// Folder is a temporary folder of this test process. Run removes it after all tests.
var Folder = sync.OnceValue(func() string {
	dir, err := os.MkdirTemp("", "at-least-semaphore-pod-hook")
	if err != nil {
		panic(err)
	}
	return dir
})

// program builds the program, once for each test process.
var program = sync.OnceValues(func() (string, error) {
	path := filepath.Join(Folder(), "at-least-semaphore-pod-hook")
	return path, Build(Root(), path)
})

// Program returns the path of the program, and builds it on the first call.
func Program(t testing.TB) string {
	t.Helper()
	path, err := program()
	Must(t, err)
	return path
}

// Build builds the program of the source folder root. Paths in an overlay start at that
// folder.
func Build(root, binary string, flags ...string) error {
	args := slices.Concat([]string{"build", "-C", root, "-ldflags=-s -w"}, flags, []string{"-o", binary, "."})
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("build the program: %w: %s", err, out)
	}
	return nil
}

// Eventually polls until check returns nil. It waits for patience, or for within if the
// suite is Timed. Then it fails the test with check's last error.
func Eventually(t testing.TB, within time.Duration, check func() error) {
	t.Helper()
	if !Timed {
		within = max(within, patience)
	}
	if err := poll(within, check); err != nil {
		t.Fatalf("not within %s: %v", within, err)
	}
}

// poll polls until check returns nil, and returns its last error. What takes longer is
// polled less often, so that a test that waits leaves the processor to the others.
func poll(within time.Duration, check func() error) error {
	for start := time.Now(); ; {
		err := check()
		waited := time.Since(start)
		if err == nil || waited > within {
			return err
		}
		time.Sleep(min(max(waited/20, 5*time.Millisecond), 100*time.Millisecond))
	}
}

// Must fails the test on an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Sleep waits for d or until ctx is done. It returns the error of ctx.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// JSON returns a value as JSON.
func JSON(t testing.TB, value any) []byte {
	t.Helper()
	text, err := json.Marshal(value)
	Must(t, err)
	return text
}

// FreeAddress returns an unused address. No other test process gets it while this one runs,
// so that a server can be stopped and started again, and no test talks to the server of
// another one.
func FreeAddress(t testing.TB) string {
	t.Helper()
	return freeAddress()
}

func freeAddress() string {
	for {
		port := 10000 + lastPort.Add(1)%20000
		mark, err := net.Listen("unix", fmt.Sprintf("@at-least-semaphore-test-port/%d", port))
		if err != nil {
			continue
		}
		takenPorts.Store(port, mark)
		address := fmt.Sprintf("127.0.0.1:%d", port)
		if isFree(address) {
			return address
		}
	}
}

// isFree reports whether a server can listen at an address. No process is made meanwhile: it
// would have the listener of isFree for a moment, too.
func isFree(address string) bool {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	l, err := net.Listen("tcp", address)
	return err == nil && l.Close() == nil
}

// takenPorts keeps the abstract sockets that mark our ports for other test processes.
var takenPorts sync.Map

// lastPort counts up, so that each port is used once. The range is below the ports that
// the system uses for outgoing connections.
var lastPort = func() *atomic.Int64 {
	// Go's first use of a process forks once without ForkLock, to learn what the kernel can.
	_, _ = os.FindProcess(os.Getpid())
	n := new(atomic.Int64)
	n.Store(int64(os.Getpid()) * 1009)
	return n
}()

// Port returns the port of an address.
func Port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// Password is the password of all test users.
const Password = "correct-horse"

// WriteCertificate writes tls.crt and tls.key for 127.0.0.1 into a folder. The
// certificate is its own CA.
func WriteCertificate(t testing.TB, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	Must(t, err)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(serial),
		Subject:               pkix.Name{CommonName: "test"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	Must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	Must(t, err)
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	Must(t, os.WriteFile(filepath.Join(dir, "tls.crt"), certificate, 0o600))
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	Must(t, os.WriteFile(filepath.Join(dir, "tls.key"), private, 0o600))
}

// Log is a buffer that several goroutines may write and read. The program's log in it is
// JSON lines.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// WantLines waits for n lines with a message, and fails the test on more. The program
// logs a line about a request after its response.
func (l *Log) WantLines(t testing.TB, message string, n int) (found []map[string]any) {
	t.Helper()
	Eventually(t, 10*time.Second, func() error {
		if found = l.Lines(t, message); len(found) < n {
			return fmt.Errorf("logged %q %d times, not %d:\n%s", message, len(found), n, l)
		}
		return nil
	})
	if len(found) > n {
		t.Fatalf("logged %q %d times, not %d: %v", message, len(found), n, found)
	}
	return found
}

// Lines returns the lines with a message. It fails the test if a line is not JSON or has
// a duplicate key.
func (l *Log) Lines(t testing.TB, message string) []map[string]any {
	t.Helper()
	var found []map[string]any
	for line := range strings.Lines(l.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("not a JSON line: %q", line)
		}
		for name := range m { // the program logs no nested objects
			if strings.Count(line, fmt.Sprintf("%q:", name)) > 1 {
				t.Errorf("%q is there twice: %s", name, line)
			}
		}
		if m["msg"] == message {
			found = append(found, m)
		}
	}
	return found
}

// EstablishedConnections counts the established connections to a server of this machine.
func EstablishedConnections(address string) (n int, err error) {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0, err
	}
	var port int
	if _, err := fmt.Sscan(Port(address), &port); err != nil {
		return 0, err
	}
	local := fmt.Sprintf(":%04X", port)
	for line := range strings.Lines(string(table)) {
		// sl local remote state; the state 01 is ESTABLISHED
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[1], local) && f[3] == "01" {
			n++
		}
	}
	return n, nil
}
