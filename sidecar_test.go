package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestSidecarGivesBackOnSignal(t *testing.T) {
	t.Parallel()
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		r, s, id := newSemaphore(t)
		p := rig.StartSidecar(t, r.Address, id, acquire(t, s, id, 2))
		p.WantLog(t, "holding the token")
		r.WantCounts(t, id, 1, 1)
		p.Signal(t, signal)
		p.WantExit(t, 0)
		r.WantCounts(t, id, 2, 0)
		p.WantLog(t, "token given back")
	}
}

func TestSidecarBeats(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	rig.StartSidecar(t, r.Address, id, token)
	for range 3 { // the first at once, the next after an interval each
		r.MakeStale(t, id, token)
		rig.Eventually(t, 20*time.Second, func() error {
			score := r.Do(t, "ZSCORE", id.inflightKey(), token)
			if string(score.([]byte)) == "1" {
				return fmt.Errorf("no new heartbeat")
			}
			return nil
		})
	}
}

// Redis closes idle connections. A holder beats on after that, and a waiter keeps its
// subscription.
func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	s, id, waiting := testSemaphores(t, r.Address), freshID(), uuid.NewString()
	token := acquire(t, s, id, 1)
	holder := rig.StartSidecar(t, r.Address, id, token, "--heartbeat-interval-seconds=4")
	waiter := rig.StartWaitingSidecar(t, r.Address, id, waiting, 1)
	r.WantLine(t, id, waiting)
	begun := r.Now(t)
	r.Do(t, "CONFIG", "SET", "timeout", "1")
	rig.Eventually(t, 30*time.Second, func() error {
		conn := r.Dial(t) // Redis may close Control
		defer conn.Close()
		clients, err := redis.String(conn.Do("CLIENT", "LIST", "TYPE", "pubsub"))
		if err != nil {
			return err
		}
		last, err := redis.Int(conn.Do("ZSCORE", id.inflightKey(), token))
		var age int
		if _, text, ok := strings.Cut(clients, " age="); err == nil && ok {
			_, err = fmt.Sscan(text, &age)
		}
		if err == nil && (age < 8 || last < begun+4) {
			err = fmt.Errorf("the last heartbeat was at %d, and the waiter is subscribed for %d s", last-begun, age)
		}
		return err
	})
	holder.Signal(t, syscall.SIGTERM)
	waiter.WantLog(t, heldText)
	holder.WantExit(t, 0)
	for _, p := range []*rig.Process{holder, waiter} {
		if log := p.Log.String(); strings.Contains(log, `"level":"WARN"`) {
			t.Errorf("the timeout was noticed:\n%s", log)
		}
	}
}

// A sidecar that was paused past the threshold does not touch its successor's token. No
// other pod is admitted until the count is below the length again.
func TestPausedSidecar(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	first := w.wantAdmitted(t, id, 1)
	p := rig.StartSidecar(t, r.Address, id, first)
	p.WantLog(t, "holding the token")
	p.Signal(t, syscall.SIGSTOP)
	p.WantState(t, "T")
	r.MakeStale(t, id, first)
	second := w.wantAdmitted(t, id, 1)
	r.WantCounts(t, id, 0, 1)

	p.Signal(t, syscall.SIGCONT)
	p.WantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	r.WantCounts(t, id, 0, 2)
	w.wantFull(t, id, 1, 2)

	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	w.wantFull(t, id, 1, 1)
	r.WantCounts(t, id, 0, 1)
	r.WantInflight(t, id, second)
	w.semaphores.giveBack(id, second)
	w.wantAdmitted(t, id, 1)
}

// After Redis lost all data, live sidecars put their tokens back within an interval.
func TestRedisEmptied(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	var tokens []string
	for range 3 {
		token := w.wantAdmitted(t, id, 3)
		rig.StartSidecar(t, r.Address, id, token).WantLog(t, "holding the token")
		tokens = append(tokens, token)
	}
	r.Do(t, "FLUSHALL")
	r.WantCounts(t, id, 0, 3)
	w.wantFull(t, id, 3, 3)
	got := r.Inflight(t, id)
	slices.Sort(got)
	slices.Sort(tokens)
	if !slices.Equal(got, tokens) {
		t.Errorf("in flight: %v, want %v", got, tokens)
	}

	// Redis is refilled before the sidecars are back: they take the free tokens.
	r.Do(t, "FLUSHALL")
	maintain(t, w.semaphores, id, 3)
	r.WantCounts(t, id, 0, 3)
}

// An unreachable Redis ends no sidecar, at start or later. A sidecar that got SIGTERM
// gives its token back when Redis is reachable.
func TestSidecarOutlivesRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	token := acquire(t, s, id, 1)
	r.Stop()
	p := rig.StartSidecar(t, r.Address, id, token, "--termination-grace-period-seconds=60")
	p.WantLog(t, "heartbeat failed, to be retried")
	rig.Must(t, r.Start())
	p.WantLog(t, "heartbeat succeeds again")
	r.Stop()
	p.Signal(t, syscall.SIGTERM)
	p.WantLog(t, "giving the token back")
	p.WantLog(t, "release failed, to be retried")
	p.Signal(t, syscall.SIGTERM) // one signal is enough: the sidecar keeps retrying
	rig.Must(t, r.Start())
	p.WantExit(t, 0)
	r.WantCounts(t, id, 1, 0)
}

// A sidecar that cannot give its token back ends with 0, too: with another code, a
// podFailurePolicy could fail the Job of an app that Kubernetes was to run again.
func TestSidecarThatCannotGiveBack(t *testing.T) {
	t.Parallel()
	address := rig.FreeAddress(t)
	token := uuid.NewString()
	p := rig.StartSidecar(t, address, semaphoreID{"shop", "web"}, token, "--termination-grace-period-seconds=1")
	p.WantLog(t, "heartbeat failed, to be retried")
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	line := p.WantLog(t, "token left to go stale")
	want := "release shop/web: " + rig.UnreachedText(address)
	if got := line["error"].(string); !strings.HasPrefix(got, want) {
		t.Errorf("logged %q, want %q", got, want)
	}
	if line["token"] != token || line["staleAfter"] != "2m0s" {
		t.Errorf("logged %v", line)
	}
}

// If a server became a read-only replica, the client drops its connections and asks the
// address again.
func TestReadOnlyServerIsDropped(t *testing.T) {
	if rig.TestQueue == rig.ClusterQueue {
		t.Skip("a Cluster's replica sends us to its master")
	}
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	token := acquire(t, s, id, 1)
	connection := func() int64 { // on which the server answered last
		conn, err := serverOf(t, s, id).pool.GetContext(t.Context())
		rig.Must(t, err)
		defer conn.Close()
		n, err := redis.Int64(conn.Do("CLIENT", "ID"))
		rig.Must(t, err)
		return n
	}
	old := connection()
	r.Do(t, "REPLICAOF", "127.0.0.1", rig.Port(rig.FreeAddress(t)))
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, err := s.heartbeat(ctx, id, token, "", "", 0, 1)
	if err == nil || !strings.Contains(err.Error(), "READONLY") && !strings.Contains(err.Error(), "is not a primary") {
		t.Errorf("got %v, want READONLY", err)
	}
	rig.Eventually(t, 10*time.Second, func() error {
		list, err := redis.String(r.Control.Do("CLIENT", "LIST", "ID", old))
		if err == nil && list != "" {
			err = fmt.Errorf("the connection to the read-only server is still open: %s", list)
		}
		return err
	})
	r.Do(t, "REPLICAOF", "NO", "ONE")
	_, err = s.heartbeat(context.Background(), id, token, "", "", 0, 1)
	rig.Must(t, err)
}

// A sidecar uses one connection.
func TestSidecarUsesOneConnection(t *testing.T) {
	r := rig.StartRedis(t)
	id := freshID()
	sidecarSemaphores := newSemaphores(testConfig(r.Address).settings, nil, 1, slog.New(slog.DiscardHandler))
	defer sidecarSemaphores.queue.close()
	s := &sidecar{semaphores: sidecarSemaphores, id: id, token: uuid.NewString(), interval: time.Second,
		grace: context.Background(), log: slog.New(slog.DiscardHandler)}
	for range 10 {
		rig.Must(t, s.beat(context.Background()))
	}
	s.giveBack(true)
	clients := string(r.Do(t, "CLIENT", "LIST").([]byte))
	if n := strings.Count(clients, "\n") - strings.Count(clients, " name=sentinel-"); n != 2 { // the test has one
		t.Errorf("got these connections, want one of the sidecar:\n%s", clients)
	}
}

// A waiting sidecar logs its place, and leaves the line on SIGTERM.
func TestWaitingSidecar(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	first, second := uuid.NewString(), uuid.NewString()
	a := rig.StartWaitingSidecar(t, r.Address, id, first, 1)
	a.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, 0 s")
	b := rig.StartWaitingSidecar(t, r.Address, id, second, 1)
	b.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 2nd in line, 0 s")
	r.WantLine(t, id, first, second)

	a.Signal(t, syscall.SIGTERM)
	a.WantExit(t, 0)
	a.WantLog(t, "left the line")
	r.WantLine(t, id, second)

	giveBack(t, s, id, holder)
	b.WantLog(t, "holding the token")
	b.Signal(t, syscall.SIGTERM)
	b.WantExit(t, 0)
	b.WantLog(t, "token given back")
	r.WantCounts(t, id, 1, 0)
}

// A waiting sidecar that is killed, and restarted by the kubelet, keeps its place.
func TestKilledWaiterKeepsItsPlace(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	first := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, first, 1)
	r.WantLine(t, id, first)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	p.Signal(t, syscall.SIGKILL)
	<-p.Done()
	p = rig.StartWaitingSidecar(t, r.Address, id, first, 1)
	rig.Eventually(t, 20*time.Second, func() error {
		if !strings.Contains(p.Log.String(), "1st in line, ") {
			return errors.New(p.Log.String())
		}
		return nil
	})
	r.WantLine(t, id, first, second)
}

// A sidecar that got its token after waiting has one connection again.
func TestHolderUsesOneConnection(t *testing.T) {
	rig.SkipUnderSentinel(t)
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	r.WantLine(t, id, token)
	connections := func() (mine int) {
		// The test, its semaphores and their lock have one connection each.
		return strings.Count(string(r.Do(t, "CLIENT", "LIST").([]byte)), "\n") - 3
	}
	if n := connections(); n != 2 {
		t.Errorf("%d connections while the sidecar waits", n)
	}
	giveBack(t, s, id, holder)
	p.WantLog(t, "holding the token")
	rig.Eventually(t, 10*time.Second, func() error {
		if n := connections(); n != 1 {
			return fmt.Errorf("%d connections, want 1", n)
		}
		return nil
	})
}

// No pod overtakes a waiter that receives no wake-ups.
func TestMisdirectedWaiterIsServed(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	_, done := queueUp(t, context.Background(), misdirectedSemaphores(t, r.Address), id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	giveBack(t, s, id, holder)
	wantDone(t, done)
	r.WantLine(t, id, second)
}

// A waiter that receives no wake-ups subscribes again.
func TestMisdirectedWaiterSubscribesAgain(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	token, _ := queueUp(t, t.Context(), misdirectedSemaphores(t, r.Address), id, 1, r)
	rig.Eventually(t, 20*time.Second, func() error {
		n, err := redis.Values(r.Control.Do("PUBSUB", "NUMSUB", id.channel(token)))
		if err == nil && n[1] != int64(1) {
			err = fmt.Errorf("%v subscriptions, want 1", n[1])
		}
		return err
	})
}

// A process that is gone still has the lock. A waiter logs that once, and does not flood
// the servers.
func TestWaiterAndADeadLockHolder(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	_, err := s.locks.tryLock(context.Background(), id.lockKey(), time.Hour)
	rig.Must(t, err)
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--expiration-seconds=3600")
	line := p.WantLog(t, "no token yet, to be retried")
	want := id.lockKey() + " is held by another; it frees itself 1h0m0s after it was taken: "
	if !strings.HasPrefix(line["error"].(string), want) {
		t.Errorf("logged %q, want %q", line["error"], want)
	}
	rig.Eventually(t, 20*time.Second, func() error {
		if n := r.CommandCalls(t)["set"]; n < 6 {
			return fmt.Errorf("%d attempts, want more", n)
		}
		return nil
	})
	if n := len(p.Log.Lines(t, "no token yet, to be retried")); n != 1 {
		t.Errorf("logged %d times, want once", n)
	}
	r.WantLine(t, id, token) // it keeps its place
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	r.WantLine(t, id)
}

// A waiter that is terminated while Redis hangs retries for its grace period, then logs
// that Redis will drop its place.
func TestWaiterEndsWhileRedisHangs(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	acquire(t, s, id, 1)
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--termination-grace-period-seconds=3")
	r.WantLine(t, id, token)
	r.Pause(t)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	p.WantLog(t, "place in line left to go stale")
}

// "kubectl debug --copy-to" makes a pod that has the containers and the arguments of
// another. The copy stands in line for a token of its own, and gives back nothing else.
func TestCopyOfAPod(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	taken := w.wantAdmitted(t, id, 1)
	uid := rig.InPod(t, "")
	p := rig.StartWaitingSidecar(t, r.Address, id, taken, 1)
	p.WantLog(t, "holding the token")
	r.WantInflight(t, id, uid)

	copyUID := rig.InPod(t, "")
	c := rig.StartWaitingSidecar(t, r.Address, id, taken, 1)
	r.WantLine(t, id, copyUID)
	c.Signal(t, syscall.SIGTERM)
	c.WantExit(t, 0)
	c.WantLog(t, "left the line")
	r.WantInflight(t, id, uid)
	w.semaphores.giveBack(id, taken) // late
	r.WantInflight(t, id, uid)
	w.wantFull(t, id, 1, 1)

	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	p.WantLog(t, "token given back")
	r.WantCounts(t, id, 1, 0)
}

// A classic sidecar of a copy counts the copy, which runs, as one pod more.
func TestCopyOfAPodWithAClassicSidecar(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	taken := w.wantAdmitted(t, id, 1)
	uid := rig.InPod(t, "")
	rig.StartSidecar(t, r.Address, id, taken)
	rig.Eventually(t, 20*time.Second, func() error {
		if got := r.Inflight(t, id); !slices.Equal(got, []string{uid}) {
			return fmt.Errorf("in flight are %v, want %s", got, uid)
		}
		return nil
	})
	rig.InPod(t, "")
	c := rig.StartSidecar(t, r.Address, id, taken)
	r.WantCounts(t, id, 0, 2)
	c.Signal(t, syscall.SIGTERM)
	c.WantExit(t, 0)
	r.WantCounts(t, id, 0, 1)
	r.WantInflight(t, id, uid)
}

// The first pod that confirms the token of an admission owns it, and has it since the
// admission. It may confirm by asking or by a heartbeat, also if Redis is full.
func TestFirstPodOwnsTheToken(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	s := testSemaphores(t, r.Address)
	ctx := context.Background()
	pod := newPodName("web-0", "node-1")
	confirm := map[string]func(id semaphoreID, uid, taken string) error{
		"acquire": func(id semaphoreID, uid, taken string) error {
			a, err := s.runAcquire(ctx, id, acquireRequest{token: uid, length: 1, pod: pod, takenAs: taken})
			if err == nil && a.status != acquireTaken {
				err = fmt.Errorf("acquire returned status %d", a.status)
			}
			return err
		},
		"heartbeat": func(id semaphoreID, uid, taken string) error {
			rejoined, err := s.heartbeat(ctx, id, uid, taken, pod, 0, 1)
			if err == nil && rejoined {
				err = errors.New("the heartbeat reported a rejoin")
			}
			return err
		},
	}
	for _, full := range []bool{false, true} {
		for name, do := range confirm {
			id, uid := freshID(), uuid.NewString()
			taken, _, err := s.acquire(ctx, id, newPodName("web-", ""), 1, limit{}, time.Second)
			rig.Must(t, err)
			since, _, _ := strings.Cut(r.Pods(t, id)[taken], " ")
			if full {
				r.Do(t, "CONFIG", "SET", "maxmemory", 1)
			}
			for range 2 { // to ask again changes nothing
				if err := do(id, uid, taken); err != nil {
					t.Errorf("%s, full %t: %v", name, full, err)
				}
			}
			r.WantInflight(t, id, uid)
			if left := r.Do(t, "TTL", id.inflightKey()).(int64); left < 80000 {
				t.Errorf("%s, full %t: the tokens in use expire in %d s", name, full, left)
			}
			if want := map[string]string{uid: since + " " + string(pod)}; !full && !maps.Equal(r.Pods(t, id), want) {
				t.Errorf("%s: the pods are %v, want %v", name, r.Pods(t, id), want)
			}
			if status, err := s.release(ctx, id, uuid.NewString(), taken); err != nil || status != 0 {
				t.Errorf("%s, full %t: a copy's release returned status %d, %v", name, full, status, err)
			}
			if status, err := s.release(ctx, id, uid, taken); err != nil || status != releaseDone {
				t.Errorf("%s, full %t: the owner's release returned status %d, %v", name, full, status, err)
			}
			r.Do(t, "CONFIG", "SET", "maxmemory", 0)
		}
	}

	// A sidecar that ends before Redis has answered it.
	id := freshID()
	taken := acquire(t, s, id, 1)
	if status, err := s.release(ctx, id, uuid.NewString(), taken); err != nil || status != releaseDone {
		t.Errorf("release of an unconfirmed token returned status %d, %v", status, err)
	}
	r.WantCounts(t, id, 1, 0)
}
