package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// startLockedWebhook starts a webhook whose queue is on the common Redis and whose lock is on s.
func startLockedWebhook(t *testing.T, s lockServers) (*testWebhook, *rig.Redis) {
	t.Helper()
	queue := rig.CommonRedis(t)
	c := testConfig(queue.Address)
	s.configure(&c)
	return startWebhook(t, c), queue
}

// One lock server of three is down, whichever, killed or hanging: admissions that need the lock go on, within a second.
func TestOneLockServerDown(t *testing.T) {
	for _, down := range []string{"hangs", "first killed", "last killed"} { // of etcd, the first is the leader
		t.Run(down, func(t *testing.T) {
			t.Parallel()
			forEachLock(t, 3, func(t *testing.T, s lockServers) {
				w, queue := startLockedWebhook(t, s)
				wantQuick := func(what string) {
					t.Helper()
					id := freshID()
					start := time.Now()
					w.wantAdmitted(t, id, 3)
					if took := time.Since(start); took > time.Second {
						t.Errorf("%s: took %s", what, took)
					} else {
						t.Logf("%s: took %s", what, took)
					}
					queue.WantCounts(t, id, 2, 1)
				}
				wantQuick("all up")
				switch down {
				case "first killed":
					s.kill(0)
				case "last killed":
					s.kill(2)
				default:
					for i := range s.addresses() {
						s.pause(t, i)
						for range 3 {
							wantQuick(fmt.Sprintf("server %d hangs", i))
						}
						s.resume(t, i)
						rig.Eventually(t, 20*time.Second, s.healthy)
					}
				}
				for range 3 {
					wantQuick(down)
				}
			})
		})
	}
}

// Two of three are down: what needs the lock fails, naming the servers, well before the API server gives up; what needs
// no repair goes on.
func TestTwoLockServersDown(t *testing.T) {
	t.Parallel()
	for _, hangs := range []bool{true, false} {
		t.Run(fmt.Sprintf("hangs=%t", hangs), func(t *testing.T) {
			t.Parallel()
			forEachLock(t, 3, func(t *testing.T, s lockServers) {
				w, queue := startLockedWebhook(t, s)
				steady, fresh := freshID(), freshID()
				w.wantAdmitted(t, steady, 3)
				for i := range 2 {
					if hangs {
						s.pause(t, i)
					} else {
						s.kill(i)
					}
				}
				wantFailure := func(timeout string, within time.Duration) {
					start := time.Now()
					status, text, err := w.post(context.Background(), rig.Review(t, fresh, 3), timeout)
					if took := time.Since(start); err != nil || status != http.StatusInternalServerError || took > within {
						t.Errorf("answered %d after %s: %s, %v", status, took, text, err)
					}
					wantNamed(t, strings.TrimSpace(text), s.addresses()[:2]...)
				}
				var wg sync.WaitGroup
				for range 20 {
					wg.Go(func() { wantFailure("10s", 6*time.Second) })
				}
				wg.Wait()
				wantFailure("1s", time.Second)
				queue.WantCounts(t, fresh, 0, 0)

				w.wantAdmitted(t, steady, 3)
				w.wantAdmitted(t, steady, 3)
				w.wantFull(t, steady, 3, 3)
			})
		})
	}
}

// The same for Redlock over TLS, whose handshake a server that hangs does not answer either, with the shortest expiration.
func TestOneLockServerHangsBehindTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	var addresses []string
	var servers []*rig.Redis
	for range 3 {
		r := startSecureRedis(t, dir)
		servers = append(servers, r)
		addresses = append(addresses, "rediss://"+r.Address)
	}
	l := newRedlock(addresses, redisSettings{username: "webhook", password: rig.Password, caFile: filepath.Join(dir, "tls.crt")}, lockConnections)
	defer l.close()
	servers[1].Pause(t)
	for range 3 {
		start := time.Now()
		unlock, err := l.tryLock(context.Background(), "lock/{shop/web}", time.Second)
		rig.Must(t, err)
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %s", took)
		}
		rig.Must(t, unlock(context.Background()))
	}
}

// Many admissions that wait for a lock that somebody holds ask for it, and for tokens, only so often.
func TestWaitingForALockIsCheap(t *testing.T) {
	lock := rig.StartRedis(t)
	w, _ := startLockedWebhook(t, redlockServers{lock})
	id := freshID()
	unlock, err := w.semaphores.locks.tryLock(context.Background(), id.lockKey(), time.Minute)
	rig.Must(t, err)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			status, text, err := w.post(context.Background(), rig.Review(t, id, 50), "1s")
			if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, id.lockKey()+" is held by another") {
				t.Errorf("answered %d %s, %v", status, text, err)
			}
		})
	}
	wg.Wait()
	// 0.9 s in steps of 5 ms at the least, if they all went alone.
	if tried := lock.CommandCalls(t)["set"]; tried > 50*180 {
		t.Errorf("the lock was tried %d times", tried)
	} else {
		t.Logf("the lock was tried %d times", tried)
	}
	rig.Must(t, unlock(context.Background()))
}

// A lock server that stalls for a moment costs a moment, not the admission; and nothing of the attempt that timed out
// stays behind, though the server has seen none of our scripts before.
func TestStallingLockServer(t *testing.T) {
	t.Parallel()
	lock := rig.StartRedis(t)
	proxy := rig.StartProxy(t, lock.Address)
	w, queue := startLockedWebhook(t, redlockServers{{Address: proxy.Address}})
	id := freshID()
	lock.Pause(t)
	answered := make(chan error, 1)
	go func() {
		a, err := w.tryAdmit(rig.Review(t, id, 3))
		if err == nil && !a.Allowed {
			err = errors.New(a.Message)
		}
		answered <- err
	}()
	rig.Eventually(t, 10*time.Second, func() error { // the attempt has timed out, and has been repeated
		select {
		case err := <-answered:
			return fmt.Errorf("answered too early: %w", err)
		default:
		}
		if n := proxy.Made.Load(); n < 2 {
			return fmt.Errorf("%d connections", n)
		}
		return nil
	})
	lock.Resume(t)
	rig.Must(t, <-answered)
	queue.WantCounts(t, id, 2, 1)
	rig.Eventually(t, 10*time.Second, func() error {
		if keys := fmt.Sprint(lock.Do(t, "KEYS", "*")); keys != "[]" {
			return fmt.Errorf("left: %s", keys)
		}
		return nil
	})
}

// A webhook is paused while it holds the lock and is about to maintain. Its lock expires, another webhook maintains and
// admits, and then the first one's script is run after all: the semaphore is as if it had not been.
func TestPausedMaintainer(t *testing.T) {
	t.Parallel()
	forEachLock(t, 1, func(t *testing.T, s lockServers) {
		queue := rig.StartRedis(t)
		proxy := rig.StartProxy(t, queue.Address)
		maintain := proxy.HoldFirst(t, maintainScript.made().Hash(), false)
		id := freshID()
		const length = 5
		body := rig.Review(t, id, length, func(request map[string]any) { rig.AnnotationsOf(request)[annotationExpiration] = "1" })

		c := testConfig(queue.Address)
		s.configure(&c)
		paused := rig.StartWebhook(t, proxy.Address, "--lock-mode="+c.lockMode, "--redis-addresses="+strings.Join(c.redisAddresses, ","),
			"--etcd-addresses="+strings.Join(c.etcdAddresses, ","))
		answered := make(chan error, 1)
		go func() {
			status, text, _, err := paused.Post(body)
			if err == nil && (status != 200 || !strings.Contains(text, `"allowed":true`)) {
				err = fmt.Errorf("%d %s", status, text)
			}
			answered <- err
		}()
		<-maintain.Held
		paused.Signal(t, syscall.SIGSTOP)
		paused.WantState(t, "T")
		l := s.newLocker()
		defer l.close()
		wantTaken(t, l, id.lockKey())

		w := startWebhook(t, c)
		for range 2 {
			a := w.admit(t, body) // waits until the lock has expired
			if !a.Allowed {
				t.Fatalf("not admitted: %+v", a)
			}
		}
		queue.WantCounts(t, id, length-2, 2)
		before := queue.Inflight(t, id)

		maintain.Deliver()
		paused.Signal(t, syscall.SIGCONT)
		rig.Must(t, <-answered)
		queue.WantCounts(t, id, length-3, 3)
		for _, token := range before {
			if !slices.Contains(queue.Inflight(t, id), token) {
				t.Errorf("token %s was lost", token)
			}
		}
	})
}

// Sixty-four webhooks get the first admissions of one key at once: whoever fits is admitted, and few of them take the
// lock.
func TestManyWebhooks(t *testing.T) {
	forEachLock(t, 1, func(t *testing.T, s lockServers) {
		const webhooks, length = 64, 48
		queue := rig.StartRedis(t)
		id := freshID()
		c := testConfig(queue.Address)
		s.configure(&c)
		lockers := make([]*countingLocker, webhooks)
		start := make(chan struct{})
		admitted := make(chan string, webhooks)
		var wg sync.WaitGroup
		for i := range webhooks {
			one := testSemaphores(t, queue.Address)
			rig.Must(t, one.locks.close())
			lockers[i] = &countingLocker{locker: newLocker(c.settings, lockConnections)}
			one.locks = lockers[i]
			wg.Go(func() {
				<-start
				token, _, err := one.acquire(context.Background(), id, "", length, 10*time.Second)
				var full *fullError
				if err == nil {
					admitted <- token
				} else if !errors.As(err, &full) || full.inUse != length {
					t.Error(err)
				}
			})
		}
		close(start)
		wg.Wait()
		close(admitted)
		locked := 0
		for _, l := range lockers {
			locked += int(l.locked.Load())
		}
		t.Logf("the lock was taken %d times", locked)
		if len(admitted) != length || locked < 1 || locked > 12 {
			t.Errorf("%d admitted, the lock was taken %d times", len(admitted), locked)
		}
		queue.WantCounts(t, id, 0, length)
	})
}
