package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A regular init container holds back the app of a pod with a native sidecar. It runs the
// mode "await": it asks the sidecar over a socket, and succeeds when, and only when, the
// token is held. Kubernetes starts no later container of the pod before that, whatever
// restarts meanwhile. (A startup probe of the sidecar would not do: a restarted kubelet
// takes a running sidecar without a probe result for started, and goes on to the app.)
//
// The socket is abstract (see unix(7)): it needs no file system and no port. In the host's
// network, where the pod's UID keeps pods apart, any process of the node can bind the name
// or connect to it. So each side trusts only a process of its own user.
const (
	// answerFresh is how long after its question the answer "held" counts. A later answer
	// may date from before a pause of the await or the sidecar, so the await asks again.
	answerFresh = time.Second

	// awaitFirst is when an await first receives what its pod waits for, for its log;
	// after that, every logEvery.
	awaitFirst = time.Second

	// awaitPatience is how long an await waits before it first logs that no sidecar
	// answers.
	awaitPatience = 10 * time.Second

	// askLeast and askMost bound the pause of an await whose sidecar does not answer.
	askLeast = 20 * time.Millisecond
	askMost  = time.Second

	heldText = "holding the token"

	// terminationMessage is the file whose text Kubernetes shows as the reason why a
	// container ended. The container runtime makes it.
	terminationMessage = "/dev/termination-log"
)

// errNotHeld is the error of an await that was stopped.
var errNotHeld = errors.New("stopped before the token was held")

// peerCredentials is the socket option SO_PEERCRED of Linux (see unix(7)): three integers of
// four bytes, the process ID, the user and the group of the other end.
const peerCredentials = 17

// checkPeer returns an error unless the other end of a connection runs as a user: both
// injected containers run as the same one.
func checkPeer(conn *net.UnixConn, user int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	// The syscall package has the option's own type on Linux only, and status also runs
	// elsewhere. This type has room for it.
	var answer *syscall.IPv6Mreq
	var failed error
	err = raw.Control(func(fd uintptr) {
		answer, failed = syscall.GetsockoptIPv6Mreq(int(fd), syscall.SOL_SOCKET, peerCredentials)
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	if peer := binary.NativeEndian.Uint32(answer.Multiaddr[4:]); peer != uint32(user) {
		return fmt.Errorf("the other end of the pod's socket is a process of the user %d, not %d", peer, user)
	}
	return nil
}

// awaitSocket is the address at which a pod's sidecar answers.
func awaitSocket(podUID string) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: "@at-least-semaphore-pod/" + podUID}
}

// runAwait is the mode "await": it returns nil once the sidecar of its pod holds the
// token. It waits without a limit. Its errors are errNotHeld, when ctx is done, and
// *gaveUpError.
func runAwait(ctx context.Context, podUID string, log *slog.Logger) error {
	debug.FreeOSMemory() // the wait may be long
	return newAwait(podUID, log).run(ctx)
}

// await asks a pod's sidecar.
type await struct {
	podUID   string
	message  string // the file terminationMessage
	user     int    // of the sidecar
	log      *slog.Logger
	now      func() time.Time
	status   string     // the sidecar's last answer
	answered time.Time  // when the sidecar last answered
	limit    logLimiter // of warnings that it does not answer
}

func newAwait(podUID string, log *slog.Logger) *await {
	return &await{podUID: podUID, message: terminationMessage, user: os.Geteuid(), log: log, now: time.Now, answered: time.Now()}
}

func (a *await) run(ctx context.Context) error {
	for retry := newBackoff(askLeast, askMost); ; {
		asked := a.now()
		held, err := a.ask(ctx)
		took := a.now().Sub(asked)
		switch {
		case held && took < answerFresh:
			a.log.Info(heldText)
			return nil
		case errors.As(err, new(*gaveUpError)):
			return err
		case ctx.Err() != nil:
			return errNotHeld
		case took >= answerFresh: // the sidecar was there: ask again at once
			retry = newBackoff(askLeast, askMost)
			continue
		}
		a.logUnanswered(err)
		if sleep(ctx, retry.next()) != nil {
			return errNotHeld
		}
	}
}

// ask connects to the sidecar and logs its answers until it says that the token is held, or
// that the pod gave up (*gaveUpError), or the connection ends.
func (a *await) ask(ctx context.Context) (held bool, err error) {
	conn, err := new(net.Dialer).DialUnix(ctx, "unix", nil, awaitSocket(a.podUID))
	if err != nil {
		return false, err
	}
	defer conn.Close()
	if err := checkPeer(conn, a.user); err != nil {
		return false, err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	for lines := bufio.NewReader(conn); ; {
		line, err := lines.ReadString('\n')
		a.answered = a.now()
		if err != nil {
			return false, err
		}
		text := strings.TrimSuffix(line, "\n")
		if text == heldText {
			return true, nil
		}
		if strings.HasPrefix(text, gaveUpPrefix) {
			a.writeMessage(text)
			_, _ = fmt.Fprintln(conn, text) // tells the sidecar that this await knows
			return false, &gaveUpError{text}
		}
		if text != a.status {
			a.status = text
			a.log.Info(text)
		}
	}
}

// writeMessage writes the termination message. Without the file, Kubernetes takes the last
// lines of the log: see injectedContainer.
func (a *await) writeMessage(text string) {
	if file, err := os.OpenFile(a.message, os.O_WRONLY|os.O_TRUNC, 0); err == nil {
		defer file.Close()
		_, _ = file.WriteString(text)
	}
}

// logUnanswered logs that no sidecar answers: after awaitPatience, and then every
// logEvery.
func (a *await) logUnanswered(err error) {
	if a.now().Sub(a.answered) < awaitPatience {
		return
	}
	if _, ok := a.limit.allow(); !ok {
		return
	}
	a.log.Warn("the sidecar does not answer, to be asked again; it must be the init container before this one, and run",
		"container", sidecarName, "error", err.Error())
}

// awaitServer is where a pod's await asks its sidecar. It opens when Redis replies that
// the token is held, and admits one await while that reply is fresh. After that the app
// may run, until an await asks again: an init container runs only while the app does not.
type awaitServer struct {
	mark      startMark
	user      int // of the awaits
	log       *slog.Logger
	limit     logLimiter    // of lines about other users
	listening chan struct{} // closed once awaits can ask
	passed    chan struct{} // receives when an await was admitted
	asked     chan struct{} // receives when an await asks after one was admitted

	mu       sync.Mutex
	status   string        // what the pod waits for
	gaveUp   string        // the open server says this, and not that the token is held; or empty
	asking   int           // awaits that are connected
	open     chan struct{} // closed while the server is open
	until    time.Time     // when it shuts by itself; zero while it is shut
	admitted bool          // the last await was admitted
	wasAsked bool          // an await has asked
}

func newAwaitServer(mark startMark, status string, log *slog.Logger) *awaitServer {
	return &awaitServer{mark: mark, user: os.Geteuid(), status: status, log: log, admitted: mark.isSet(),
		listening: make(chan struct{}), open: make(chan struct{}),
		passed: make(chan struct{}, 1), asked: make(chan struct{}, 1)}
}

// setStatus sets what the pod waits for.
func (s *awaitServer) setStatus(status string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = status
}

// getStatus returns what the pod waits for.
func (s *awaitServer) getStatus() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// openUntil opens the server for a time.
func (s *awaitServer) openUntil(until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.until.IsZero() {
		close(s.open)
	}
	s.until = until
}

// admitOne opens the server until a time, and reports whether it has admitted an await by
// then. Its error is ctx's.
func (s *awaitServer) admitOne(ctx context.Context, until time.Time) (passed bool, err error) {
	s.openUntil(until)
	closing := time.NewTimer(time.Until(until))
	defer closing.Stop()
	select {
	case <-s.passed:
		return true, nil
	case <-closing.C:
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.shut()
	select {
	case <-s.passed: // at the last moment
		return true, err
	default:
		return false, err
	}
}

// tellGaveUp opens the server until an await knows that the pod gave up. Its error is ctx's.
func (s *awaitServer) tellGaveUp(ctx context.Context, text string) error {
	s.mu.Lock()
	s.gaveUp = text
	s.mu.Unlock()
	s.openUntil(time.Now())
	select {
	case <-s.passed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// getGaveUp returns what the open server says of a pod that gave up, or "".
func (s *awaitServer) getGaveUp() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gaveUp
}

// noteTold notes that an await knows that the pod gave up.
func (s *awaitServer) noteTold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gaveUp == "" {
		return
	}
	s.gaveUp = ""
	s.shutLocked()
	if s.admitted = s.asking == 1; !s.admitted { // the next await asks already
		s.asked <- struct{}{}
	}
	s.passed <- struct{}{}
}

// opened returns a channel that is closed once the server is open.
func (s *awaitServer) opened() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// shut shuts the server.
func (s *awaitServer) shut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shutLocked()
}

func (s *awaitServer) shutLocked() {
	if !s.until.IsZero() {
		s.open, s.until = make(chan struct{}), time.Time{}
	}
}

// noteAsked notes that an await asks.
func (s *awaitServer) noteAsked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wasAsked = true
	s.asking++
	if s.admitted {
		s.admitted = false
		s.mark.remove(s.log)
		s.asked <- struct{}{} // never blocks: the last value was received before an await was admitted
	}
}

// noteClosed notes that an await asks no more.
func (s *awaitServer) noteClosed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asking--
}

// warnNotAsked logs that no await has asked so far.
func (s *awaitServer) warnNotAsked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.wasAsked {
		s.log.Warn("no init container asks for the token: unless the kubelet is away, the app runs without one; "+
			"the next init container after this sidecar must be the one named here", "container", awaitName)
	}
}

// pass reports whether an await may pass, and shuts the server behind it.
func (s *awaitServer) pass() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gaveUp != "" { // the server stays open for that
		return false
	}
	ok := time.Now().Before(s.until)
	s.shutLocked()
	if ok {
		s.admitted = true
		s.mark.set(s.log) // before the await gets the answer
		s.passed <- struct{}{}
	}
	return ok
}

// serve answers the awaits of a pod for as long as the process lives. If another process
// has taken the name of the socket, it tries again until ctx is done.
func (s *awaitServer) serve(ctx context.Context, podUID string) {
	listener, err := net.ListenUnix("unix", awaitSocket(podUID))
	for retry := newBackoff(askLeast, askMost); err != nil; listener, err = net.ListenUnix("unix", awaitSocket(podUID)) {
		if _, ok := s.limit.allow(); ok {
			s.log.Warn("cannot listen for the init container, to be retried",
				"error", err.Error())
		}
		if sleep(ctx, retry.next()) != nil {
			return
		}
	}
	close(s.listening)
	for {
		conn, err := listener.AcceptUnix()
		switch {
		case err == nil:
			go s.answer(conn)
		case errors.Is(err, net.ErrClosed):
			return
		default: // no file descriptor left, for example
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// answer sends an await what its pod waits for, and then that the token is held, or that
// the pod gave up. If the token is no longer fresh, it closes the connection, and the await
// asks again.
func (s *awaitServer) answer(conn *net.UnixConn) {
	defer conn.Close()
	if err := checkPeer(conn, s.user); err != nil {
		if _, ok := s.limit.allow(); ok {
			s.log.Warn("a foreign process asks for the token, and gets no answer",
				"error", err.Error())
		}
		return
	}
	asked := time.Now()
	closed := make(chan bool, 1) // receives whether the await knows that the pod gave up
	go func() {                  // an await sends nothing else
		n, _ := io.Copy(io.Discard, conn)
		closed <- n > 0
	}()
	s.noteAsked()
	defer s.noteClosed()
	send := func(text string) {
		_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = fmt.Fprintln(conn, text) // if this fails, the await asks again
	}
	next := time.NewTimer(awaitFirst)
	defer next.Stop()
	for {
		select {
		case <-s.opened():
			if time.Since(asked) >= answerFresh/2 {
				return
			}
			if gaveUp := s.getGaveUp(); gaveUp != "" {
				send(gaveUp)
				if <-closed {
					s.noteTold()
				}
				return
			}
			if s.pass() {
				send(heldText)
				return
			}
		case <-next.C:
			send(s.getStatus())
			next.Reset(logEvery)
		case <-closed:
			return
		}
	}
}

// startMark is a file that says that the pod's app may have started. It is in /dev/shm,
// which the containers of a pod share. So it outlives a killed sidecar. With hostIPC,
// /dev/shm is the node's, and the mark outlives the pod's sandbox, too. So its text names
// the sandbox: a mark of another one does not count. (An emptyDir would also do, but
// kubectl drain refuses pods that have one.)
type startMark struct{ path, sandbox string }

// newStartMark returns the mark of a pod; outside of a pod there is none.
func newStartMark(podUID, token string) startMark {
	if podUID == "" {
		return startMark{}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	return startMark{filepath.Join("/dev/shm", "at-least-semaphore-pod-"+token), sandboxOf(string(mounts))}
}

// sandboxOf returns a text that names the pod's sandbox, from the list of a container's
// mounts (see proc_pid_mountinfo(5)). Container runtimes mount /etc/resolv.conf from a
// folder that has the ID of the sandbox in its name. The text is empty if that mount is
// missing.
func sandboxOf(mounts string) (sandbox string) {
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == "/etc/resolv.conf" {
			sandbox = f[3]
		}
	}
	return sandbox
}

func (m startMark) isSet() bool {
	if m.path == "" {
		return false
	}
	sandbox, err := os.ReadFile(m.path)
	return err == nil && string(sandbox) == m.sandbox
}

// setAt returns when the mark was set.
func (m startMark) setAt() time.Time {
	info, err := os.Stat(m.path)
	if err != nil {
		return time.Now()
	}
	return info.ModTime()
}

func (m startMark) set(log *slog.Logger) {
	if err := os.WriteFile(m.path, []byte(m.sandbox), 0o600); err != nil {
		log.Warn("start not marked: if this sidecar is killed and its token reclaimed, the pod waits in line again",
			"error", err.Error())
	}
}

func (m startMark) remove(log *slog.Logger) {
	if err := os.Remove(m.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("start mark not removed: if this sidecar is killed, it takes the app for started",
			"error", err.Error())
	}
}
