package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

// The startup probe of a native sidecar is the mode "probe", run in the sidecar's container: it asks the sidecar over a socket
// and ends well when the token is held. Kubernetes starts no other container of the pod before that.
//
// The answer is kept back until there is something to say, so that a pod that waits for hours costs next to nothing, and one
// that gets its token hears of it at once. The socket is an abstract one (see unix(7)): it needs no file system, no port, and
// is there in the host's network too, where the pod's UID keeps pods apart.
const (
	// probeConnect is for how long a probe waits for a sidecar that has just been started.
	probeConnect = 5 * time.Second

	// A probe is told to come again after a while, so that the pod has an event that says what it waits for: soon at first, and
	// later after as long as it waits already, within these bounds. Each probe costs the node about as much as the start of a
	// container.
	probeFirst = 15 * time.Second
	probeLeast = time.Minute
	probeMost  = 5 * time.Minute

	// probeTimeout is what the kubelet gives a probe.
	probeTimeout = probeMost + time.Minute

	holdingText = "holding the token"
)

// errNotHolding is the error of a probe that has said what the pod waits for.
var errNotHolding = errors.New("not holding the token")

// probeSocket is the address of a pod's sidecar.
func probeSocket(podUID string) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: "@at-least-semaphore-pod/" + podUID}
}

// readiness is what a sidecar answers its probes.
type readiness struct {
	start   time.Time
	holding chan struct{} // closed when the token is held

	mu   sync.Mutex
	text string // what is waited for until then
}

func newReadiness(text string) *readiness {
	return &readiness{start: time.Now(), holding: make(chan struct{}), text: text}
}

// note sets what is waited for.
func (r *readiness) note(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.text = text
}

// hold says that the token is held, once and for all.
func (r *readiness) hold() { close(r.holding) }

// serve answers the probes of a pod for as long as the process lives.
func (r *readiness) serve(podUID string) error {
	listener, err := net.ListenUnix("unix", probeSocket(podUID))
	if err != nil {
		return fmt.Errorf("listen for the startup probe: %w", err)
	}
	go func() {
		for {
			conn, err := listener.Accept()
			switch {
			case err == nil:
				go r.answer(conn)
			case errors.Is(err, net.ErrClosed):
				return
			default: // no file descriptor left, for example
				time.Sleep(100 * time.Millisecond)
			}
		}
	}()
	return nil
}

// probePatience is for how long an answer is kept back.
func probePatience(waited time.Duration) time.Duration {
	if waited < probeFirst {
		return probeFirst
	}
	return min(max(waited, probeLeast), probeMost)
}

func (r *readiness) answer(conn net.Conn) {
	defer conn.Close()
	gone := make(chan struct{})
	go func() { // a probe sends nothing
		_, _ = conn.Read(make([]byte, 1))
		close(gone)
	}()
	later := time.NewTimer(probePatience(time.Since(r.start)))
	defer later.Stop()
	text := holdingText
	select {
	case <-r.holding:
	case <-gone:
		return
	case <-later.C:
		r.mu.Lock()
		text = r.text
		r.mu.Unlock()
	}
	_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = fmt.Fprintln(conn, text)
}

// runProbe is the mode "probe". Its error is errNotHolding, or that the sidecar does not answer.
func runProbe(ctx context.Context, podUID string, stdout io.Writer) error {
	conn, err := dialProbe(ctx, podUID)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	debug.FreeOSMemory() // it may be long
	text, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return fmt.Errorf("the sidecar ended while it was asked: %w", err)
	}
	fmt.Fprint(stdout, text)
	if strings.TrimSpace(text) != holdingText {
		return errNotHolding
	}
	return nil
}

func dialProbe(ctx context.Context, podUID string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, probeConnect)
	defer cancel()
	address := probeSocket(podUID)
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", address.Name)
		if err == nil {
			return conn, nil
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return nil, fmt.Errorf("the sidecar does not answer: %w", err)
		}
	}
}

// passed is a file that says that the startup probe has passed, so that the pod's other containers may run. It lies in
// /dev/shm, which the containers of a pod share and which lives as long as they can: it outlives a sidecar that is killed, but
// not the pod's sandbox or its node. (An emptyDir would do, too, but kubectl drain refuses pods that have one.) With hostIPC it
// is that of the node, where the empty file stays until the node restarts.
type passed struct{ path string }

func newPassed(podUID, token string) passed {
	if podUID == "" {
		return passed{}
	}
	return passed{filepath.Join("/dev/shm", "at-least-semaphore-pod-"+token)}
}

func (p passed) is() bool {
	if p.path == "" {
		return false
	}
	_, err := os.Stat(p.path)
	return err == nil
}

func (p passed) set() error {
	if p.path == "" {
		return nil
	}
	return os.WriteFile(p.path, nil, 0o600)
}
