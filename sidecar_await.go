package main

import (
	"bufio"
	"context"
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
	"time"
)

// A pod with a native sidecar is held back by a regular init container, which runs the mode "await": it asks the sidecar over a
// socket and ends well when, and only when, the token is held. Kubernetes starts no later container of the pod before that,
// whatever is restarted meanwhile. (A startup probe of the sidecar would not do: a kubelet that is restarted takes a running
// sidecar whose probe has no result yet for started, and goes on to the app.)
//
// The socket is an abstract one (see unix(7)): it needs no file system, no port, and is there in the host's network too, where
// the pod's UID keeps pods apart.
const (
	// answerFresh is how long after its question the answer "held" counts. A later one may be from before the await, or the
	// sidecar, was paused: it is asked for again.
	answerFresh = time.Second

	// An await hears what its pod waits for after awaitFirst, and then every logEvery, for its log.
	awaitFirst = time.Second

	// awaitPatience is after how long an await first says that no sidecar answers.
	awaitPatience = 10 * time.Second

	// The least and the longest wait before an await asks a sidecar that does not answer again.
	askLeast = 20 * time.Millisecond
	askMost  = time.Second

	heldText = "holding the token"
)

// errNotHeld is the error of an await that was told to end.
var errNotHeld = errors.New("told to end before the token was held")

// awaitSocket is the address at which a pod's sidecar answers.
func awaitSocket(podUID string) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: "@at-least-semaphore-pod/" + podUID}
}

// runAwait is the mode "await": it returns nil once the sidecar of its pod holds the token. Until then it asks, for as long as it
// takes; its only error is errNotHeld, when ctx is done.
func runAwait(ctx context.Context, podUID string, log *slog.Logger) error {
	debug.FreeOSMemory() // it may be long
	return newAwait(podUID, log).run(ctx)
}

// await asks a pod's sidecar.
type await struct {
	podUID   string
	log      *slog.Logger
	now      func() time.Time
	heard    string     // what it said last
	answered time.Time  // when it was there last
	limit    logLimiter // of lines about a sidecar that does not answer
}

func newAwait(podUID string, log *slog.Logger) *await {
	return &await{podUID: podUID, log: log, now: time.Now, answered: time.Now()}
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
		case ctx.Err() != nil:
			return errNotHeld
		case took >= answerFresh: // the sidecar was there, and is to be asked anew
			retry = newBackoff(askLeast, askMost)
			continue
		}
		a.complain(err)
		if sleep(ctx, retry.next()) != nil {
			return errNotHeld
		}
	}
}

// ask connects to the sidecar and logs what it says, until it says that the token is held, or the connection ends.
func (a *await) ask(ctx context.Context) (held bool, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", awaitSocket(a.podUID).Name)
	if err != nil {
		return false, err
	}
	defer conn.Close()
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
		if text != a.heard {
			a.heard = text
			a.log.Info(text)
		}
	}
}

// complain logs that no sidecar answers, after a while and then every logEvery.
func (a *await) complain(err error) {
	if a.now().Sub(a.answered) < awaitPatience {
		return
	}
	if _, ok := a.limit.allow(); !ok {
		return
	}
	a.log.Warn("the sidecar does not answer, to be asked again; it must be the init container before this one, and run",
		"container", sidecarName, "error", err.Error())
}

// awaitServer is where a pod's await asks its sidecar. It is opened for an answer of Redis that the token is held, and lets the await
// pass while that is fresh. Once it has, the app may run, until an await asks again: an init container runs only while the app
// does not.
type awaitServer struct {
	mark       startMark
	log        *slog.Logger
	passed     chan struct{} // receives when an await was let pass
	askedAgain chan struct{} // receives when an await asks after one was let pass

	mu    sync.Mutex
	text  string        // what the pod waits for
	open  chan struct{} // closed while the door is open
	until time.Time     // when it closes by itself; zero while it is closed
	past  bool          // the last await was let pass
	heard bool          // an await has asked
}

func newAwaitServer(mark startMark, text string, log *slog.Logger) *awaitServer {
	return &awaitServer{mark: mark, text: text, log: log, past: mark.isSet(),
		open: make(chan struct{}), passed: make(chan struct{}, 1), askedAgain: make(chan struct{}, 1)}
}

// say sets what the pod waits for.
func (d *awaitServer) say(text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.text = text
}

// said returns what the pod waits for.
func (d *awaitServer) said() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text
}

// openUntil opens the door for a time.
func (d *awaitServer) openUntil(until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.until.IsZero() {
		close(d.open)
	}
	d.until = until
}

// admitOne opens the door until a time, and reports whether an await has passed by then. Its error is that of ctx.
func (d *awaitServer) admitOne(ctx context.Context, until time.Time) (passed bool, err error) {
	d.openUntil(until)
	closing := time.NewTimer(time.Until(until))
	defer closing.Stop()
	select {
	case <-d.passed:
		return true, nil
	case <-closing.C:
	case <-ctx.Done():
		err = ctx.Err()
	}
	d.shut()
	select {
	case <-d.passed: // at the last moment
		return true, err
	default:
		return false, err
	}
}

// opened is closed once the door is open.
func (d *awaitServer) opened() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.open
}

// shut closes the door.
func (d *awaitServer) shut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shutLocked()
}

func (d *awaitServer) shutLocked() {
	if !d.until.IsZero() {
		d.open, d.until = make(chan struct{}), time.Time{}
	}
}

// asked is called for each await that asks.
func (d *awaitServer) asked() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.heard = true
	if d.past {
		d.past = false
		d.mark.remove(d.log)
		d.askedAgain <- struct{}{} // there is room: it was received before the last await was let pass
	}
}

// warnUnheard logs that no await has asked so far.
func (d *awaitServer) warnUnheard() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.heard {
		d.log.Warn("no init container asks for the token: unless the kubelet is away, the app runs without one; the next init container "+
			"after this sidecar must be the one named here", "container", awaitName)
	}
}

// pass reports whether an await may pass: the door is open. It closes the door behind it.
func (d *awaitServer) pass() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	ok := time.Now().Before(d.until)
	d.shutLocked()
	if ok {
		d.past = true
		d.mark.set(d.log) // before the await hears of it
		d.passed <- struct{}{}
	}
	return ok
}

// serve answers the awaits of a pod for as long as the process lives.
func (d *awaitServer) serve(podUID string) error {
	listener, err := net.ListenUnix("unix", awaitSocket(podUID))
	if err != nil {
		return fmt.Errorf("listen for the pod's init container: %w", err)
	}
	go func() {
		for {
			conn, err := listener.Accept()
			switch {
			case err == nil:
				go d.answer(conn)
			case errors.Is(err, net.ErrClosed):
				return
			default: // no file descriptor left, for example
				time.Sleep(100 * time.Millisecond)
			}
		}
	}()
	return nil
}

// answer tells an await what its pod waits for, and then that the token is held, if that is fresh; else it hangs up, to be
// asked again.
func (d *awaitServer) answer(conn net.Conn) {
	defer conn.Close()
	asked := time.Now()
	gone := make(chan struct{})
	go func() { // an await sends nothing
		_, _ = io.Copy(io.Discard, conn)
		close(gone)
	}()
	d.asked()
	tell := func(text string) {
		_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = fmt.Fprintln(conn, text) // an await that does not hear it asks again
	}
	news := time.NewTimer(awaitFirst)
	defer news.Stop()
	for {
		select {
		case <-d.opened():
			if time.Since(asked) >= answerFresh/2 {
				return
			}
			if d.pass() {
				tell(heldText)
				return
			}
		case <-news.C:
			tell(d.said())
			news.Reset(logEvery)
		case <-gone:
			return
		}
	}
}

// startMark is a file that says that the pod's app may have been started. It lies in /dev/shm, which the containers of a pod
// share and which lives as long as they can: it outlives a sidecar that is killed, but not the pod's sandbox or its node. (An
// emptyDir would do, too, but kubectl drain refuses pods that have one.) With hostIPC it is that of the node, where the empty
// file stays until the node restarts.
type startMark struct{ path string }

// newStartMark names the mark of a pod; outside of a pod there is none.
func newStartMark(podUID, token string) startMark {
	if podUID == "" {
		return startMark{}
	}
	return startMark{filepath.Join("/dev/shm", "at-least-semaphore-pod-"+token)}
}

func (m startMark) isSet() bool {
	if m.path == "" {
		return false
	}
	_, err := os.Stat(m.path)
	return err == nil
}

// setAt is when a mark that is set was.
func (m startMark) setAt() time.Time {
	info, err := os.Stat(m.path)
	if err != nil {
		return time.Now()
	}
	return info.ModTime()
}

func (m startMark) set(log *slog.Logger) {
	if err := os.WriteFile(m.path, nil, 0o600); err != nil {
		log.Warn("should this sidecar be killed and its token be reclaimed, it will have to wait in line again", "error", err.Error())
	}
}

func (m startMark) remove(log *slog.Logger) {
	if err := os.Remove(m.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("should this sidecar be killed, it will take the app for started", "error", err.Error())
	}
}
