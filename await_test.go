package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The await says what its pod waits for, and ends well when the token is held: one that waits by then, and one that comes later,
// as after a crash of the first.
func TestAwait(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	rig.InPod(t, token)
	early := rig.StartAwait(t) // comes before the sidecar listens
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	r.WantLine(t, id, token)
	early.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	early.WantNotEnded(t)
	giveBack(t, s, id, holder)
	early.WantExit(t, 0)
	early.WantLog(t, heldText)
	p.WantLog(t, heldText)
	r.WantCounts(t, id, 0, 1)
	rig.StartAwait(t).WantExit(t, 0)
	rig.StartAwait(t).WantExit(t, 0)
}

// While its sidecar is killed, and started again, an await waits; it ends well only when the token is held.
func TestAwaitOutlivesItsSidecar(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	rig.InPod(t, token)
	a := rig.StartAwait(t)
	for range 3 {
		p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
		p.WantLogPrefix(t, "waiting for a token of ")
		p.Signal(t, syscall.SIGKILL)
		<-p.Done()
		a.WantNotEnded(t)
	}
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLogPrefix(t, "waiting for a token of ")
	giveBack(t, s, id, holder)
	a.WantExit(t, 0)
	r.WantInflight(t, id, token)
}

// An await that is told to end does so at once, with and without a sidecar, and not well: the app must not start.
func TestAwaitEndsOnSignal(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	token := uuid.NewString()
	podUID := rig.InPod(t, token)
	for _, withSidecar := range []bool{false, true} {
		if withSidecar {
			rig.StartWaitingSidecar(t, r.Address, id, token, 1)
			r.WantLine(t, id, token)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- runAwait(ctx, podUID, slog.New(slog.DiscardHandler)) }()
		cancel()
		select {
		case err := <-ended:
			if !errors.Is(err, errNotHeld) {
				t.Errorf("with a sidecar %t: got %v", withSidecar, err)
			}
		case <-time.After(time.Second):
			t.Fatalf("with a sidecar %t: does not end", withSidecar)
		}
	}
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of ")
	a.Signal(t, syscall.SIGTERM)
	a.WantExit(t, 1)
}

// fakeSidecar answers the awaits of a pod with what the function says of the n-th question.
func fakeSidecar(t *testing.T, podUID string, answer func(n int, conn net.Conn)) {
	t.Helper()
	l, err := net.ListenUnix("unix", awaitSocket(podUID))
	rig.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for n := 1; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			answer(n, conn)
			conn.Close()
		}
	}()
}

// The answer that the token is held counts only if it comes soon after the question: what is between them may be a pause of the
// whole pod, in which the token was given to another. (A real sidecar hangs up instead of answering late.)
func TestAwaitWantsAFreshAnswer(t *testing.T) {
	t.Parallel()
	podUID := uuid.NewString()
	asked := make(chan int, 10)
	var paused atomic.Int64 // for how long the pod was, in all
	fakeSidecar(t, podUID, func(n int, conn net.Conn) {
		asked <- n
		switch n {
		case 1: // late
			paused.Add(int64(answerFresh))
			fmt.Fprintln(conn, heldText)
		case 2: // cut off
			fmt.Fprint(conn, heldText)
		case 3: // no answer
		case 4:
			fmt.Fprintln(conn, heldText+" of another")
		default:
			fmt.Fprintln(conn, heldText)
		}
	})
	a := newAwait(podUID, slog.New(slog.DiscardHandler))
	a.now = func() time.Time { return time.Now().Add(time.Duration(paused.Load())) }
	rig.Must(t, a.run(t.Context()))
	if n := len(asked); n != 5 {
		t.Errorf("asked %d times", n)
	}
}

// An await that no sidecar answers says so after a while, and what is to be looked at.
func TestAwaitWithoutSidecar(t *testing.T) {
	var b rig.Log
	a := newAwait(uuid.NewString(), slog.New(slog.NewJSONHandler(&b, nil)))
	a.answered = time.Now().Add(-awaitPatience)
	for range 3 {
		_, err := a.ask(t.Context())
		a.complain(err)
	}
	lines := b.Lines(t, "the sidecar does not answer, to be asked again; it must be the init container before this one, and run")
	if len(lines) != 1 || lines[0]["container"] != sidecarName || !strings.Contains(lines[0]["error"].(string), "connection refused") {
		t.Errorf("logged %s", b.String())
	}
}

// A sidecar that no await asks says so: the app may run without a token.
func TestNobodyAsksAtTheDoor(t *testing.T) {
	var b rig.Log
	d := newAwaitServer(startMark{}, "", slog.New(slog.NewJSONHandler(&b, nil)))
	d.warnUnheard()
	d.asked()
	d.warnUnheard()
	if n := strings.Count(b.String(), "no init container asks for the token"); n != 1 {
		t.Errorf("logged %d times: %s", n, b.String())
	}
}

// The door lets one await pass while it is open, and closes behind it and by itself.
func TestDoor(t *testing.T) {
	newTestDoor := func() *awaitServer {
		mark := newStartMark("pod", uuid.NewString())
		t.Cleanup(func() { os.Remove(mark.path) })
		return newAwaitServer(mark, "", slog.New(slog.DiscardHandler))
	}
	d := newTestDoor()
	if d.pass() {
		t.Error("passed while it was never opened")
	}
	d.openUntil(time.Now().Add(time.Hour))
	if !d.pass() || d.pass() || !d.mark.isSet() {
		t.Error("want one to pass, and to be noted")
	}
	d.asked()
	select {
	case <-d.askedAgain:
	default:
		t.Error("an await that asks again is not noticed")
	}
	if d.mark.isSet() {
		t.Error("the app is taken for started while an init container runs")
	}

	d = newTestDoor()
	if passed, err := d.admitOne(t.Context(), time.Now().Add(10*time.Millisecond)); passed || err != nil {
		t.Errorf("passed %t, %v, and nobody was there", passed, err)
	}
	if d.pass() {
		t.Error("passed too late")
	}
	d.openUntil(time.Now().Add(-time.Second)) // the answer was old when it was read
	if d.pass() || d.mark.isSet() {
		t.Error("passed on an old answer")
	}
}
