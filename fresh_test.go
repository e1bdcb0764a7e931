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
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

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
