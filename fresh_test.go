package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

// stop stops a process, as a node that hangs does.
func (p *process) stop(t *testing.T) {
	t.Helper()
	p.signal(t, syscall.SIGSTOP)
	waitState(t, p.Process.Pid, "T")
}

// wantInUse waits until a token is in use.
func (s *redisServer) wantInUse(t *testing.T, id semaphoreID, token string) {
	t.Helper()
	eventually(t, 10*time.Second, func() error {
		if s.lastBeat(t, id, token) == 0 {
			return errors.New("the token is not taken yet")
		}
		return nil
	})
}

// holdAnswer lets a sidecar that starts take its token and keeps back the answer, until the function that is returned is called.
func holdAnswer(t *testing.T, p *faultyProxy, start func()) (deliver func()) {
	t.Helper()
	first := p.holdFirst(t, acquireScript.made().Hash(), false) // is answered with Redis's time only
	start()
	<-first.held
	second := p.holdFirst(t, acquireScript.made().Hash(), false)
	first.deliver()
	<-second.held
	p.answers.Lock()
	second.deliver()
	return p.answers.Unlock
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
				p := startFaultyProxy(t, r.address)
				giveBack(t, s, id, acquire(t, s, id, 1)) // Redis knows the script
				token := uuid.NewString()
				podUID := inPod(t, token)
				var sidecar *process
				start := func() { sidecar = startWaitingSidecar(t, p.address, id, token, 1) } // with an interval of 1 s
				if when == beforeAnswer {
					deliver := holdAnswer(t, p, start)
					r.wantInUse(t, id, token)
					sidecar.stop(t)
					deliver()
				} else {
					start()
					sidecar.wantLog(t, heldText)
					sidecar.stop(t)
				}
				stopped := time.Now()
				r.makeStale(t, id, token)
				other := acquire(t, s, id, 1)
				eventually(t, 10*time.Second, func() error { // the answer counts for an interval
					if since := time.Since(stopped); since < 1100*time.Millisecond {
						return fmt.Errorf("stopped for %s", since)
					}
					return nil
				})
				var await *process
				if when == duringQuestion {
					await = startAwait(t)
					wantAsking(t, podUID)
				}
				sidecar.signal(t, syscall.SIGCONT)
				if await == nil {
					await = startAwait(t)
				}
				await.wantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
				await.wantNotEnded(t)
				r.wantLine(t, id, token)
				r.wantInflight(t, id, other)
				giveBack(t, s, id, other)
				await.wantExit(t, 0)
				r.wantInflight(t, id, token)
			})
		}
	}
}

// wantAsking waits until an await has connected to its sidecar, whether that has accepted or not: beside the socket that listens,
// the kernel lists one for each connection under the same name.
func wantAsking(t *testing.T, podUID string) {
	t.Helper()
	eventually(t, 10*time.Second, func() error {
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
	p := startFaultyProxy(t, r.address)
	giveBack(t, s, id, acquire(t, s, id, 1))
	token := uuid.NewString()
	inPod(t, token)
	await := startAwait(t)
	deliver := holdAnswer(t, p, func() {
		startWaitingSidecar(t, p.address, id, token, 1, "--stale-threshold-seconds=2") // an attempt has 1 s
	})
	sent := time.Now()
	r.wantInUse(t, id, token)
	r.makeStale(t, id, token)
	other := acquire(t, s, id, 1)
	holder := startSidecar(t, r.address, id, other)
	eventually(t, 10*time.Second, func() error {
		if since := time.Since(sent); since < 600*time.Millisecond {
			return fmt.Errorf("the answer is %s old", since)
		}
		return nil
	})
	deliver()
	await.wantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	await.wantNotEnded(t)
	r.wantInflight(t, id, other)
	holder.signal(t, syscall.SIGTERM)
	await.wantExit(t, 0)
	r.wantInflight(t, id, token)
}

// An answer that was long on its way is as old as its question.
func TestAgeOfAnAnswer(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	p := startFaultyProxy(t, r.address)
	giveBack(t, s, id, acquire(t, s, id, 1))
	waiting := semaphoresOf(t, testConfig(p.address))
	must(t, errOf(waiting.heartbeat(context.Background(), freshID(), "x", "", 0))) // Redis's clock is known
	w := newWaiter(waiting, id, 1)
	p.answers.Lock()
	done := make(chan time.Time, 1)
	sent := time.Now()
	go func() {
		asked, _, err := w.wait(context.Background())
		if err != nil {
			t.Error(err)
		}
		done <- asked
	}()
	r.wantInUse(t, id, w.token)
	r.makeStale(t, id, w.token)
	other := acquire(t, s, id, 1)
	eventually(t, 10*time.Second, func() error {
		if since := time.Since(sent); since < 1500*time.Millisecond {
			return fmt.Errorf("the answer is %s old", since)
		}
		return nil
	})
	p.answers.Unlock()
	asked := <-done
	if late := asked.Sub(sent); late > 500*time.Millisecond {
		t.Errorf("what Redis said is %s younger than it is", late)
	}
	r.wantInflight(t, id, other)
}
