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
		case <-time.After(time.Minute):
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
		a.logUnanswered(err)
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
	d.warnNotAsked()
	d.asked()
	d.warnNotAsked()
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

// Until the app may run, a token that was lost is not put back by a heartbeat: it has been given to another.
func TestTokenLostBeforeTheAppStarts(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1) // with a heartbeat interval of 1 s
	p.WantLog(t, heldText)
	r.MakeStale(t, id, token)
	rig.Eventually(t, 20*time.Second, func() error { // it is kept alive meanwhile
		if score := string(r.Do(t, "ZSCORE", id.inflightKey(), token).([]byte)); score == "1" {
			return errors.New("not renewed")
		}
		return nil
	})
	other := r.GiveToAnother(t, id, token)
	r.WantLine(t, id, token)
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of ")
	r.WantCounts(t, id, 0, 1)
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
	r.WantLine(t, id)
	r.WantInflight(t, id, token)
}

// An init container that asks again shows that the app does not run: the pod was started again. Its token is asked for anew,
// and not put back by a heartbeat should it have been given to another.
func TestPodStartedAgain(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--heartbeat-interval-seconds=60")
	rig.StartAwait(t).WantExit(t, 0)
	other := r.GiveToAnother(t, id, token)
	a := rig.StartAwait(t)
	p.WantLog(t, "the pod is started again: its init container asks for the token")
	r.WantLine(t, id, token)
	a.WantNotEnded(t)
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
}

// In a pod that was admitted with a token, the app starts only if the token is still there; if it was reclaimed while the pod was
// Pending, the pod waits in line.
func TestAdmittedPodConfirmsItsToken(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	s, id := testSemaphores(t, r.Address), freshID()
	token := w.wantAdmitted(t, id, 1)
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLog(t, "holding the token")
	rig.StartAwait(t).WantExit(t, 0)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	r.WantCounts(t, id, 1, 0)

	late := w.wantAdmitted(t, id, 1)
	rig.InPod(t, late)
	r.MakeStale(t, id, late)
	other := w.wantAdmitted(t, id, 1)
	p = rig.StartWaitingSidecar(t, r.Address, id, late, 1)
	r.WantLine(t, id, late)
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
	p.WantLog(t, "holding the token")
	r.WantInflight(t, id, late)
}

// A sidecar that is killed in a running pod takes up its token again; if it was reclaimed meanwhile, it is counted again and
// does not wait, as the app runs.
func TestSidecarStartedAgainInARunningPod(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	start := func() *rig.Process { return rig.StartWaitingSidecar(t, r.Address, id, token, 1) }
	kill := func(p *rig.Process) {
		p.Signal(t, syscall.SIGKILL)
		<-p.Done()
	}
	p := start()
	rig.StartAwait(t).WantExit(t, 0)
	kill(p)
	p = start()
	p.WantLog(t, "started again in a running pod")
	r.WantCounts(t, id, 0, 1)
	kill(p)
	r.MakeStale(t, id, token)
	acquire(t, s, id, 1)
	start().WantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	r.WantCounts(t, id, 0, 2)
}

// While Redis is out of reach the app does not start, and the init container's log says why; when it is back, it does.
func TestSidecarStartsWithoutRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	token := acquire(t, s, id, 1)
	rig.InPod(t, token)
	r.Stop()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLog(t, "no token yet, to be retried")
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, fmt.Sprintf("acquire %s: %s", id, rig.UnreachedText(r.Address)))
	rig.Must(t, r.Start())
	a.WantExit(t, 0)
}

// wantInUse waits until a token is in use.
func wantInUse(t *testing.T, s *rig.Redis, id semaphoreID, token string) {
	t.Helper()
	rig.Eventually(t, 10*time.Second, func() error {
		if s.LastHeartbeat(t, id, token) == 0 {
			return errors.New("the token is not taken yet")
		}
		return nil
	})
}

// holdAnswer lets a sidecar that starts take its token and keeps back the answer, until the function that is returned is called.
func holdAnswer(t *testing.T, p *rig.Proxy, start func()) (deliver func()) {
	t.Helper()
	first := p.HoldFirst(t, acquireScript.made().Hash(), false) // is answered with Redis's time only
	start()
	<-first.Held
	second := p.HoldFirst(t, acquireScript.made().Hash(), false)
	first.Deliver()
	<-second.Held
	p.Answers.Lock()
	second.Deliver()
	return p.Answers.Unlock
}

// A sidecar is stopped after its token is taken and before its app is started: before it has read Redis's answer, before the init
// container asks, or while it does. Meanwhile the token is reclaimed and given to another. The app does not start before that one has
// given it back.
func TestStoppedSidecarStartsNoApp(t *testing.T) {
	t.Parallel()
	const (
		beforeAnswer = iota
		beforeQuestion
		duringQuestion
	)
	for when, name := range []string{"before the answer", "before the question", "during the question"} {
		for round := range 3 {
			t.Run(fmt.Sprint(name, " ", round), func(t *testing.T) {
				t.Parallel()
				r, s, id := newSemaphore(t)
				p := rig.StartProxy(t, r.Address)
				giveBack(t, s, id, acquire(t, s, id, 1)) // Redis knows the script
				token := uuid.NewString()
				podUID := rig.InPod(t, token)
				var sidecar *rig.Process
				start := func() { sidecar = rig.StartWaitingSidecar(t, p.Address, id, token, 1) } // with an interval of 1 s
				if when == beforeAnswer {
					deliver := holdAnswer(t, p, start)
					wantInUse(t, r, id, token)
					sidecar.Pause(t)
					deliver()
				} else {
					start()
					sidecar.WantLog(t, heldText)
					sidecar.Pause(t)
				}
				stopped := time.Now()
				r.MakeStale(t, id, token)
				other := acquire(t, s, id, 1)
				rig.Eventually(t, 10*time.Second, func() error { // the answer counts for an interval
					if since := time.Since(stopped); since < 1100*time.Millisecond {
						return fmt.Errorf("stopped for %s", since)
					}
					return nil
				})
				var await *rig.Process
				if when == duringQuestion {
					await = rig.StartAwait(t)
					wantAsking(t, podUID)
				}
				sidecar.Signal(t, syscall.SIGCONT)
				if await == nil {
					await = rig.StartAwait(t)
				}
				await.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
				await.WantNotEnded(t)
				r.WantLine(t, id, token)
				r.WantInflight(t, id, other)
				giveBack(t, s, id, other)
				await.WantExit(t, 0)
				r.WantInflight(t, id, token)
			})
		}
	}
}

// wantAsking waits until an await has connected to its sidecar, whether that has accepted or not: beside the socket that listens,
// the kernel lists one for each connection under the same name.
func wantAsking(t *testing.T, podUID string) {
	t.Helper()
	rig.Eventually(t, 10*time.Second, func() error {
		table, err := os.ReadFile("/proc/net/unix")
		if n := strings.Count(string(table), awaitSocket(podUID).Name); err == nil && n < 2 {
			err = fmt.Errorf("%d sockets", n)
		}
		return err
	})
}

// Nothing is stopped, but Redis's answer is long on its way, and older than a quarter of the threshold when it is read: it counts for
// nothing, as the token may have been given to another.
func TestLateAnswerStartsNoApp(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	p := rig.StartProxy(t, r.Address)
	giveBack(t, s, id, acquire(t, s, id, 1))
	token := uuid.NewString()
	rig.InPod(t, token)
	await := rig.StartAwait(t)
	deliver := holdAnswer(t, p, func() {
		rig.StartWaitingSidecar(t, p.Address, id, token, 1, "--stale-threshold-seconds=2") // an attempt has 1 s
	})
	sent := time.Now()
	wantInUse(t, r, id, token)
	r.MakeStale(t, id, token)
	other := acquire(t, s, id, 1)
	holder := rig.StartSidecar(t, r.Address, id, other)
	rig.Eventually(t, 10*time.Second, func() error {
		if since := time.Since(sent); since < 600*time.Millisecond {
			return fmt.Errorf("the answer is %s old", since)
		}
		return nil
	})
	deliver()
	await.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	await.WantNotEnded(t)
	r.WantInflight(t, id, other)
	holder.Signal(t, syscall.SIGTERM)
	await.WantExit(t, 0)
	r.WantInflight(t, id, token)
}

// An answer that was long on its way is as old as its question.
func TestAgeOfAnAnswer(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	p := rig.StartProxy(t, r.Address)
	giveBack(t, s, id, acquire(t, s, id, 1))
	waiting := semaphoresOf(t, testConfig(p.Address))
	rig.Must(t, errOf(waiting.heartbeat(context.Background(), freshID(), "x", "", 0))) // Redis's clock is known
	w := newWaiter(waiting, id, 1)
	p.Answers.Lock()
	done := make(chan time.Time, 1)
	sent := time.Now()
	go func() {
		asked, _, err := w.wait(context.Background())
		if err != nil {
			t.Error(err)
		}
		done <- asked
	}()
	wantInUse(t, r, id, w.token)
	r.MakeStale(t, id, w.token)
	other := acquire(t, s, id, 1)
	rig.Eventually(t, 10*time.Second, func() error {
		if since := time.Since(sent); since < 1500*time.Millisecond {
			return fmt.Errorf("the answer is %s old", since)
		}
		return nil
	})
	p.Answers.Unlock()
	asked := <-done
	if late := asked.Sub(sent); late > 500*time.Millisecond {
		t.Errorf("what Redis said is %s younger than it is", late)
	}
	r.WantInflight(t, id, other)
}
