package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/net/dns/dnsmessage"
)

func TestLock(t *testing.T) {
	t.Parallel()
	forEachLock(t, 3, func(t *testing.T, s lockServers) {
		ctx := context.Background()
		l, another := s.newLocker(), s.newLocker()
		t.Cleanup(func() {
			rig.Must(t, l.close())
			rig.Must(t, another.close())
		})

		t.Run("one holder at a time", func(t *testing.T) {
			var holders, locked atomic.Int32
			var wg sync.WaitGroup
			for i := range 16 {
				l := []locker{l, another}[i%2]
				wg.Go(func() {
					for locked.Load() < 20 {
						unlock, err := l.tryLock(ctx, "lock/{one}", time.Minute)
						if errors.Is(err, errLockTaken) || errors.Is(err, context.DeadlineExceeded) {
							continue // the latter on a slow machine; what such an attempt took is freed
						}
						if err != nil {
							t.Error(err)
							return
						}
						if n := holders.Add(1); n != 1 {
							t.Errorf("%d holders at once", n)
						}
						runtime.Gosched()
						locked.Add(1)
						holders.Add(-1)
						if err := unlock(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
		})

		t.Run("unlock frees at once", func(t *testing.T) {
			for range 20 {
				for _, l := range []locker{l, another} {
					unlock, err := l.tryLock(ctx, "lock/{free}", time.Minute)
					rig.Must(t, err)
					wantTaken(t, l, "lock/{free}")
					rig.Must(t, unlock(ctx))
				}
			}
		})

		t.Run("expires by itself", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{expires}", time.Second)
			rig.Must(t, err)
			wantTaken(t, another, "lock/{expires}")
			second := lockWithin(t, another, "lock/{expires}", time.Minute)
			rig.Must(t, unlock(ctx)) // does not free the other's lock
			wantTaken(t, l, "lock/{expires}")
			rig.Must(t, second(ctx))
		})

		t.Run("late unlock", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{late}", time.Minute)
			rig.Must(t, err)
			s.expire(t, "lock/{late}")
			rig.Must(t, unlock(ctx)) // no error: the lock has expired
			second, err := another.tryLock(ctx, "lock/{late}", time.Minute)
			rig.Must(t, err)
			rig.Must(t, unlock(ctx))
			wantTaken(t, l, "lock/{late}")
			rig.Must(t, second(ctx))
		})

		t.Run("cancelled before", func(t *testing.T) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			// The attempt may succeed before it notices the cancellation.
			if unlock, err := l.tryLock(ctx, "lock/{cancelled}", time.Minute); err == nil {
				rig.Must(t, unlock(context.Background()))
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want the context canceled", err)
			}
			rig.Must(t, lockWithin(t, another, "lock/{cancelled}", time.Minute)(context.Background()))
		})

		t.Run("cancelled while a server hangs", func(t *testing.T) {
			for i := range s.addresses() {
				s.pause(t, i)
			}
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(50*time.Millisecond, cancel)
			start := time.Now()
			if _, err := l.tryLock(ctx, "lock/{hangs}", time.Minute); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want the context's error", err)
			}
			rig.WantWithin(t, time.Since(start), time.Second, "a cancelled attempt")
			for i := range s.addresses() {
				s.resume(t, i)
			}
			rig.Must(t, lockWithin(t, another, "lock/{hangs}", time.Minute)(context.Background()))
		})

		t.Run("unreachable", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{unreachable}", time.Minute)
			rig.Must(t, err)
			for i := range s.addresses() {
				s.kill(i)
			}
			for _, l := range []locker{l, another} {
				_, err = l.tryLock(ctx, "lock/{unreachable}", time.Minute)
				if err == nil || errors.Is(err, errLockTaken) {
					t.Fatalf("got %v, want an error about unreachable servers", err)
				}
				wantNamed(t, err.Error(), s.addresses()...)
			}
			wantNamed(t, unlock(ctx).Error(), s.addresses()...)
		})
	})
}

// No attempt leaves locks, connections or goroutines behind, during and after the use of
// the locker.
func TestLockLeavesNothing(t *testing.T) {
	for name, start := range startLockServers { // not in parallel: the test counts goroutines
		t.Run(name, func(t *testing.T) { wantNothingLeft(t, start(t, 1)) })
	}
}

func wantNothingLeft(t *testing.T, s lockServers) {
	before := runtime.NumGoroutine()
	l := s.newLocker()
	rig.Must(t, lockWithin(t, l, "lock/{first}", time.Minute)(context.Background()))
	inUse := runtime.NumGoroutine()
	var wg sync.WaitGroup
	var locked, cancelled atomic.Int32
	for worker := range 10 {
		wg.Go(func() {
			for i := range 100 {
				ctx, cancel := context.WithCancel(context.Background())
				if i%2 == 1 { // at some point of the attempt
					time.AfterFunc(rand.N(2*time.Millisecond), cancel)
				}
				unlock, err := l.tryLock(ctx, fmt.Sprintf("lock/{%d}", worker), time.Minute)
				switch {
				case err == nil:
					locked.Add(1)
					if err := unlock(context.Background()); err != nil {
						t.Error(err)
					}
				case errors.Is(err, context.Canceled):
					cancelled.Add(1)
				case !errors.Is(err, errLockTaken): // a lock of the previous, cancelled attempt
					t.Error(err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	t.Logf("%d locked, %d cancelled", locked.Load(), cancelled.Load())
	if locked.Load() < 20 || cancelled.Load() < 20 { // on a slow machine, most find a lock of a cancelled attempt
		t.Errorf("%d locked and %d cancelled, want at least 20 of each", locked.Load(), cancelled.Load())
	}
	wantNoMore := func(goroutines int) {
		t.Helper()
		rig.Eventually(t, 10*time.Second, func() error {
			if n := runtime.NumGoroutine(); n > goroutines {
				return fmt.Errorf("%d goroutines, want %d\n%s", n, goroutines, stacks())
			}
			return s.locksLeft()
		})
	}
	wantNoMore(inUse)
	rig.Must(t, l.close())
	wantNoMore(before)
	rig.Eventually(t, 10*time.Second, s.connectionsLeft)
}

// lockServers are the servers of one kind of lock.
type lockServers interface {
	newLocker() locker
	addresses() []string
	expire(t *testing.T, name string) // removes a lock, as its expiry does
	locksLeft() error
	connectionsLeft() error
	pause(t *testing.T, i int)
	resume(t *testing.T, i int)
	kill(i int)
	healthy() error
	configure(c *webhookConfig)
}

type redlockServers []*rig.Redis

func (s redlockServers) newLocker() locker {
	return newRedlock(s.addresses(), redisSettings{}, lockConnections)
}

func (s redlockServers) addresses() []string {
	var addresses []string
	for _, r := range s {
		addresses = append(addresses, r.Address)
	}
	return addresses
}

func (s redlockServers) expire(t *testing.T, name string) {
	for _, r := range s {
		r.Do(t, "DEL", name)
	}
}

func (s redlockServers) locksLeft() error {
	for _, r := range s {
		if n, err := redis.Int(r.Control.Do("DBSIZE")); err != nil || n > 0 {
			return fmt.Errorf("%d keys left, %v", n, err)
		}
	}
	return nil
}

func (s redlockServers) connectionsLeft() error {
	for _, r := range s {
		clients, err := redis.String(r.Control.Do("CLIENT", "LIST"))
		if n := strings.Count(clients, "\n"); err != nil || n > 1 {
			return fmt.Errorf("%d connections left, %v", n-1, err)
		}
	}
	return nil
}

func (s redlockServers) pause(t *testing.T, i int)  { s[i].Pause(t) }
func (s redlockServers) resume(t *testing.T, i int) { s[i].Resume(t) }
func (s redlockServers) kill(i int)                 { s[i].Stop() }

func (s redlockServers) healthy() error {
	for _, r := range s {
		if _, err := r.Control.Do("PING"); err != nil {
			return err
		}
	}
	return nil
}

func (s redlockServers) configure(c *webhookConfig) {
	c.lockMode, c.redisAddresses = lockModeRedlock, s.addresses()
}

type etcdServers []*rig.Etcd

func (s etcdServers) newLocker() locker   { return newEtcdLock(s.addresses(), etcdSettings{}) }
func (s etcdServers) addresses() []string { return rig.EtcdAddresses(s) }

func (s etcdServers) expire(t *testing.T, name string) {
	got, err := s[0].Control.Get(context.Background(), name)
	rig.Must(t, err)
	_, err = s[0].Control.Revoke(context.Background(), clientv3.LeaseID(got.Kvs[0].Lease))
	rig.Must(t, err)
}

func (s etcdServers) locksLeft() error {
	ctx := context.Background()
	leases, err := s[0].Control.Leases(ctx)
	if err != nil || len(leases.Leases) > 0 {
		return fmt.Errorf("leases %v left, %v", leases, err)
	}
	keys, err := s[0].Control.Get(ctx, "", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || keys.Count > 0 {
		return fmt.Errorf("%d keys left, %v", keys.Count, err)
	}
	return nil
}

func (s etcdServers) connectionsLeft() error {
	for _, m := range s {
		if n, err := rig.EstablishedConnections(m.Address); err != nil || n > 1 { // the test has one
			return fmt.Errorf("%d connections left, %v", n-1, err)
		}
	}
	return nil
}

func (s etcdServers) pause(t *testing.T, i int)  { s[i].Pause(t) }
func (s etcdServers) resume(t *testing.T, i int) { s[i].Resume(t) }
func (s etcdServers) kill(i int)                 { s[i].Kill() }

func (s etcdServers) healthy() error {
	for _, m := range s {
		if err := m.Answers(); err != nil {
			return err
		}
	}
	return nil
}

func (s etcdServers) configure(c *webhookConfig) {
	c.lockMode, c.etcdAddresses = lockModeEtcd, s.addresses()
}

// forEachLock runs a test in parallel for both locks, each with its own servers.
func forEachLock(t *testing.T, servers int, test func(t *testing.T, s lockServers)) {
	for name, start := range startLockServers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, start(t, servers))
		})
	}
}

var startLockServers = map[string]func(t *testing.T, servers int) lockServers{
	lockModeRedlock: func(t *testing.T, servers int) lockServers {
		var s redlockServers
		for range servers {
			s = append(s, rig.StartRedis(t))
		}
		return s
	},
	lockModeEtcd: func(t *testing.T, servers int) lockServers {
		return etcdServers(rig.LeaderFirst(t, rig.StartEtcd(t, servers)))
	},
}

// lockWithin takes a lock as soon as it is free.
func lockWithin(t *testing.T, l locker, name string, expiration time.Duration) func(context.Context) error {
	t.Helper()
	var unlock func(context.Context) error
	rig.Eventually(t, 20*time.Second, func() (err error) {
		unlock, err = l.tryLock(context.Background(), name, expiration)
		return err
	})
	return unlock
}

func wantTaken(t *testing.T, l locker, name string) {
	t.Helper()
	if _, err := l.tryLock(context.Background(), name, time.Minute); !errors.Is(err, errLockTaken) {
		t.Fatalf("got %v, want errLockTaken", err)
	}
}

func wantNamed(t *testing.T, text string, addresses ...string) {
	t.Helper()
	for _, a := range addresses {
		if !strings.Contains(text, a+": ") {
			t.Errorf("the error does not name %s: %q", a, text)
		}
	}
	if strings.Contains(text, "\n") {
		t.Errorf("more than one line: %q", text)
	}
}

// startLockedWebhook starts a webhook with its queue on the common Redis and its locks on
// s.
func startLockedWebhook(t *testing.T, s lockServers) (*testWebhook, *rig.Redis) {
	t.Helper()
	queue := rig.CommonRedis(t)
	c := testConfig(queue.Address)
	s.configure(&c)
	return startWebhook(t, c), queue
}

// Lock servers by name: DNS takes longer to answer than an attempt to lock may take. Its
// answer serves later attempts, also when DNS is gone.
func TestLockServersBehindSlowDNS(t *testing.T) {
	t.Parallel()
	forEachLock(t, 3, func(t *testing.T, s lockServers) {
		d := rig.StartDNS(t, "127.0.0.1:0")
		var names []string
		for i, address := range s.addresses() {
			d.Set(fmt.Sprintf("lock-%d.test", i), "127.0.0.1")
			names = append(names, fmt.Sprintf("lock-%d.test.:%s", i, rig.Port(address)))
		}
		resolver := resolverOf(d)
		newLocker := func() locker {
			if _, ok := s.(etcdServers); ok {
				return newEtcdLock(names, etcdSettings{resolver: resolver})
			}
			return newRedlock(names, redisSettings{resolver: resolver}, 1)
		}
		d.Delay.Store(int64(etcdTimeout + time.Second))
		for range 2 {
			l := newLocker()
			t.Cleanup(func() { rig.Must(t, l.close()) })
			rig.Must(t, lockWithin(t, l, "lock/{slow}", time.Minute)(context.Background()))
			d.SetFault(func(dnsmessage.Question, int) (dnsmessage.RCode, bool) { return 0, true })
		}
	})
}

// One of three lock servers, whichever, is killed or hangs. Admissions that need the lock
// still succeed within a second.
func TestOneLockServerDown(t *testing.T) {
	t.Parallel()
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
					rig.WantWithin(t, time.Since(start), time.Second, "an admission while "+what)
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

// Two of three lock servers are down. Admissions that need the lock fail before the API
// server's time-out, and name the servers. Admissions that need no repair succeed.
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
					if err != nil || status != http.StatusInternalServerError {
						t.Errorf("got %d: %s, %v", status, text, err)
					}
					rig.WantWithin(t, time.Since(start), within, "a failure with a timeout of "+timeout)
					wantNamed(t, strings.TrimSpace(text), s.addresses()[:2]...)
				}
				var wg sync.WaitGroup
				for range 8 {
					wg.Go(func() { wantFailure("10s", 9500*time.Millisecond) })
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

// The same for Redlock over TLS, with the shortest expiration. A server that hangs does
// not answer the TLS handshake either.
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
	settings := redisSettings{username: "webhook", password: rig.Password, caFile: filepath.Join(dir, "tls.crt")}
	l := newRedlock(addresses, settings, lockConnections)
	defer l.close()
	servers[1].Pause(t)
	for range 3 {
		var took time.Duration
		rig.Eventually(t, 30*time.Second, func() error { // the handshakes may take too long
			start := time.Now()
			unlock, err := l.tryLock(context.Background(), "lock/{shop/web}", time.Second)
			if took = time.Since(start); err != nil {
				return err
			}
			return unlock(context.Background())
		})
		rig.WantWithin(t, took, time.Second, "a lock with one hanging server")
	}
}

// Many admissions that wait for a held lock poll the lock and the tokens at a limited
// rate.
func TestWaitingForALockIsCheap(t *testing.T) {
	t.Parallel()
	lock := rig.StartRedis(t)
	w, _ := startLockedWebhook(t, redlockServers{lock})
	id := freshID()
	unlock, err := w.semaphores.locks.tryLock(context.Background(), id.lockKey(), time.Minute)
	rig.Must(t, err)
	var wg sync.WaitGroup
	var held atomic.Int32
	for range 50 {
		wg.Go(func() {
			status, text, err := w.post(context.Background(), rig.Review(t, id, 50), "2s")
			saysHeld := strings.Contains(text, id.lockKey()+" is held by another")
			if saysHeld {
				held.Add(1)
			}
			// On a starved machine, the lock server may not have answered in time.
			isLate := strings.Contains(text, lock.Address+": no answer yet")
			if err != nil || status != http.StatusInternalServerError || !saysHeld && !isLate {
				t.Errorf("got %d %s, %v", status, text, err)
			}
		})
	}
	wg.Wait()
	if held.Load() == 0 {
		t.Error("no admission says that the lock is held")
	}
	// If each polled alone, it would poll for 1.5 s, at most every 5 ms.
	if tried := lock.CommandCalls(t)["set"]; tried > 50*300 {
		t.Errorf("%d attempts to take the lock, want at most 15000", tried)
	} else {
		t.Logf("%d attempts to take the lock", tried)
	}
	rig.Must(t, unlock(context.Background()))
}

// A lock server that stalls for a moment delays an admission, but does not fail it. The
// timed-out attempt leaves no lock, though the server has not loaded our scripts before.
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
	rig.Eventually(t, 10*time.Second, func() error { // the attempt timed out and was retried
		select {
		case err := <-answered:
			return fmt.Errorf("the admission ended too early: %w", err)
		default:
		}
		if n := proxy.Made.Load(); n < 2 {
			return fmt.Errorf("%d connections are open", n)
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

// A webhook is paused while it has the lock, just before maintain. Its lock expires, and
// another webhook maintains and admits. The first one's script then runs late, and
// changes nothing.
func TestPausedMaintainer(t *testing.T) {
	t.Parallel()
	forEachLock(t, 1, func(t *testing.T, s lockServers) {
		queue := rig.StartRedis(t)
		proxy := rig.StartProxy(t, queue.Address)
		id := freshID()
		const length = 5
		body := rig.Review(t, id, length, func(request map[string]any) {
			rig.AnnotationsOf(request)[annotationExpiration] = "2"
		})

		c := testConfig(queue.Address)
		s.configure(&c)
		paused := rig.StartWebhook(t, proxy.Address, "--lock-mode="+c.lockMode,
			"--redis-addresses="+strings.Join(c.redisAddresses, ","),
			"--etcd-addresses="+strings.Join(c.etcdAddresses, ","))
		// The webhook also sends each hash without keys, to load the scripts.
		maintain := proxy.HoldFirst(t, maintainScript.made().Hash()+fmt.Sprintf("\r\n$1\r\n%d\r\n", scriptKeys), false)
		answered := make(chan error, 1)
		go func() {
			status, text, _, err := paused.Post(body)
			if err == nil && (status != 200 || !strings.Contains(text, `"allowed":true`)) {
				err = fmt.Errorf("the admission got %d %s", status, text)
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
			a := w.admit(t, body) // waits until the lock expires
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

// Sixty-four webhooks get the first admissions of one key at once. As many pods as fit
// are admitted, and few webhooks take the lock.
func TestManyWebhooks(t *testing.T) {
	t.Parallel()
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
				token, _, err := one.acquire(context.Background(), id, "", length, limit{}, 10*time.Second)
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
			t.Errorf("%d admitted, %d locks taken", len(admitted), locked)
		}
		queue.WantCounts(t, id, 0, length)
	})
}

func TestEtcdWithTLSAndAuth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	files := etcdSettings{caFile: crt, certFile: crt, keyFile: key}
	tlsConfig, err := files.tls()
	rig.Must(t, err)
	m := &rig.Etcd{Address: rig.FreeAddress(t)}
	peer := "http://" + rig.FreeAddress(t)
	m.Serve(t, "https://"+m.Address, tlsConfig, "--cert-file", crt, "--key-file", key, "--trusted-ca-file", crt,
		"--client-cert-auth", "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
		"--initial-cluster", "default="+peer, "--bcrypt-cost", "4")
	m.WantServing(t)
	ctx := context.Background()
	for _, step := range []func() error{
		func() error { return errOf(m.Control.UserAdd(ctx, "root", "admin")) },
		func() error { return errOf(m.Control.UserGrantRole(ctx, "root", "root")) },
		func() error { return errOf(m.Control.RoleAdd(ctx, "locks")) },
		func() error {
			return errOf(m.Control.RoleGrantPermission(ctx, "locks", "lock/", clientv3.GetPrefixRangeEnd("lock/"),
				clientv3.PermissionType(clientv3.PermReadWrite)))
		},
		func() error { return errOf(m.Control.UserAdd(ctx, "webhook", rig.Password)) },
		func() error { return errOf(m.Control.UserGrantRole(ctx, "webhook", "locks")) },
		func() error { return errOf(m.Control.AuthEnable(ctx)) },
	} {
		rig.Must(t, step())
	}
	admin, err := clientv3.New(clientv3.Config{Endpoints: []string{m.Address}, TLS: tlsConfig,
		Username: "root", Password: "admin", DialTimeout: 5 * time.Second})
	rig.Must(t, err)
	defer admin.Close()

	settings := files
	settings.username, settings.password = "webhook", rig.Password
	for _, address := range []string{m.Address, "https://" + m.Address} {
		l := newEtcdLock([]string{address}, settings)
		for range 3 {
			var unlock func(context.Context) error
			rig.Must(t, inTime(func() (err error) {
				unlock, err = l.tryLock(ctx, "lock/{shop/web}", time.Minute)
				return err
			}))
			wantTaken(t, l, "lock/{shop/web}")
			rig.Must(t, unlock(ctx))
			// Each change of users makes etcd reject all earlier log-ins.
			rig.Must(t, errOf(admin.UserAdd(ctx, "another-"+uuid.NewString(), "x")))
		}
		_, err := l.tryLock(ctx, "elsewhere", time.Minute)
		if err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("a key outside the role: got %v, want permission denied", err)
		}
		rig.Must(t, l.close())
	}

	for want, change := range map[string]func(*etcdSettings){
		"invalid user ID or password": func(s *etcdSettings) { s.password = "wrong-" + rig.Password },
		"no such file":                func(s *etcdSettings) { s.caFile = filepath.Join(dir, "none") },
		"Unavailable":                 func(s *etcdSettings) { s.certFile, s.username, s.password = "", "", "" },
	} {
		wrong := settings
		change(&wrong)
		l := newEtcdLock([]string{m.Address}, wrong)
		_, err := l.tryLock(ctx, "lock/{shop/web}", time.Minute)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), m.Address) ||
			strings.Contains(err.Error(), rig.Password) {
			t.Errorf("got %v, want %q", err, want)
		}
		rig.Must(t, l.close())
	}
}

// The arguments, logs and replies of a webhook that cannot log in show no secret.
func TestSecretsAreNotShown(t *testing.T) {
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "requirepass", "something-else")
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	t.Setenv("REDIS_PASSWORD", rig.Password)
	t.Setenv("ETCD_USERNAME", "webhook")
	t.Setenv("ETCD_PASSWORD", rig.Password)
	address := rig.FreeAddress(t)
	p := rig.StartProgram(t, "webhook", "--host=127.0.0.1", "--port="+rig.Port(address),
		"--metrics-bind-address="+rig.FreeAddress(t), "--certDir="+dir, "--queue-redis-address="+r.Address,
		"--redis-addresses="+r.Address, "--lock-mode=etcd", "--sidecar-redis-secret=redis",
		"--sidecar-etcd-secret=etcd")
	p.WantLog(t, "serving")
	body := filepath.Join(dir, "review.json")
	rig.Must(t, os.WriteFile(body, rig.Review(t, freshID(), 1), 0o600))
	answer, err := exec.Command("curl", "-sS", "--cacert", filepath.Join(dir, "tls.crt"),
		"-H", "Content-Type: application/json",
		"--data", "@"+body, "https://"+address+"/mutate").CombinedOutput()
	rig.Must(t, err)
	if !strings.Contains(string(answer), "WRONGPASS") || strings.Contains(string(answer), rig.Password) {
		t.Errorf("the reply shows a secret, or is no error: %s", answer)
	}
	p.Log.WantLines(t, "admission", 1)
	p.WantNoSecret(t)
}
