package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// lockServers are the servers of one kind of lock.
type lockServers interface {
	newLocker() locker
	addresses() []string
	expire(t *testing.T, name string) // does what the expiry of a lock does
	locksLeft() error
	connectionsLeft() error
	pause(t *testing.T, i int)
	resume(t *testing.T, i int)
	kill(i int)
	healthy() error
	configure(c *webhookConfig)
}

type redlockServers []*redisServer

func (s redlockServers) newLocker() locker {
	return newRedlock(s.addresses(), redisSettings{}, lockConnections)
}

func (s redlockServers) addresses() []string {
	var addresses []string
	for _, r := range s {
		addresses = append(addresses, r.address)
	}
	return addresses
}

func (s redlockServers) expire(t *testing.T, name string) {
	for _, r := range s {
		r.do(t, "DEL", name)
	}
}

func (s redlockServers) locksLeft() error {
	for _, r := range s {
		if n, err := redis.Int(r.control.Do("DBSIZE")); err != nil || n > 0 {
			return fmt.Errorf("%d keys left, %v", n, err)
		}
	}
	return nil
}

func (s redlockServers) connectionsLeft() error {
	for _, r := range s {
		clients, err := redis.String(r.control.Do("CLIENT", "LIST"))
		if n := strings.Count(clients, "\n"); err != nil || n > 1 {
			return fmt.Errorf("%d connections left, %v", n-1, err)
		}
	}
	return nil
}

func (s redlockServers) pause(t *testing.T, i int)  { s[i].pause(t) }
func (s redlockServers) resume(t *testing.T, i int) { s[i].resume(t) }
func (s redlockServers) kill(i int)                 { s[i].stop() }

func (s redlockServers) healthy() error {
	for _, r := range s {
		if _, err := r.control.Do("PING"); err != nil {
			return err
		}
	}
	return nil
}

func (s redlockServers) configure(c *webhookConfig) {
	c.lockMode, c.redisAddresses = lockModeRedlock, s.addresses()
}

type etcdServers []*etcdMember

func (s etcdServers) newLocker() locker   { return newEtcdLock(s.addresses(), etcdSettings{}) }
func (s etcdServers) addresses() []string { return etcdAddresses(s) }

func (s etcdServers) expire(t *testing.T, name string) {
	got, err := s[0].control.Get(context.Background(), name)
	must(t, err)
	_, err = s[0].control.Revoke(context.Background(), clientv3.LeaseID(got.Kvs[0].Lease))
	must(t, err)
}

func (s etcdServers) locksLeft() error {
	ctx := context.Background()
	leases, err := s[0].control.Leases(ctx)
	if err != nil || len(leases.Leases) > 0 {
		return fmt.Errorf("leases %v left, %v", leases, err)
	}
	keys, err := s[0].control.Get(ctx, "", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || keys.Count > 0 {
		return fmt.Errorf("%d keys left, %v", keys.Count, err)
	}
	return nil
}

func (s etcdServers) connectionsLeft() error {
	for _, m := range s {
		if n, err := establishedTo(m.address); err != nil || n > 1 { // one is the test's
			return fmt.Errorf("%d connections left, %v", n-1, err)
		}
	}
	return nil
}

func (s etcdServers) pause(t *testing.T, i int)  { s[i].pause(t) }
func (s etcdServers) resume(t *testing.T, i int) { s[i].resume(t) }
func (s etcdServers) kill(i int)                 { s[i].kill() }

func (s etcdServers) healthy() error {
	for _, m := range s {
		if err := m.answers(); err != nil {
			return err
		}
	}
	return nil
}

func (s etcdServers) configure(c *webhookConfig) {
	c.lockMode, c.etcdAddresses = lockModeEtcd, s.addresses()
}

// forEachLock runs a test over both locks, each with servers of its own.
func forEachLock(t *testing.T, servers int, test func(t *testing.T, s lockServers)) {
	t.Run("redlock", func(t *testing.T) {
		var s redlockServers
		for range servers {
			s = append(s, startRedis(t))
		}
		test(t, s)
	})
	t.Run("etcd", func(t *testing.T) { test(t, etcdServers(leaderFirst(t, startEtcd(t, servers)))) })
}

// lockWithin takes a lock that is to become free.
func lockWithin(t *testing.T, l locker, name string, expiration time.Duration) func(context.Context) error {
	t.Helper()
	var unlock func(context.Context) error
	eventually(t, 20*time.Second, func() (err error) {
		unlock, err = l.tryLock(context.Background(), name, expiration)
		return err
	})
	return unlock
}

func wantTaken(t *testing.T, l locker, name string) {
	t.Helper()
	if _, err := l.tryLock(context.Background(), name, time.Minute); !errors.Is(err, errLockTaken) {
		t.Fatalf("got %v, want that the lock is taken", err)
	}
}

func TestLock(t *testing.T) {
	forEachLock(t, 3, func(t *testing.T, s lockServers) {
		ctx := context.Background()
		l, another := s.newLocker(), s.newLocker()
		t.Cleanup(func() {
			must(t, l.close())
			must(t, another.close())
		})

		t.Run("one holder at a time", func(t *testing.T) {
			var holders, locked atomic.Int32
			var wg sync.WaitGroup
			for i := range 16 {
				l := []locker{l, another}[i%2]
				wg.Go(func() {
					for locked.Load() < 50 {
						unlock, err := l.tryLock(ctx, "lock/{one}", time.Minute)
						if errors.Is(err, errLockTaken) {
							continue
						}
						if err != nil {
							t.Error(err)
							return
						}
						if n := holders.Add(1); n != 1 {
							t.Errorf("%d holders", n)
						}
						runtime.Gosched()
						locked.Add(1)
						holders.Add(-1)
						if err := unlock(ctx); err != nil {
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
					must(t, err)
					wantTaken(t, l, "lock/{free}")
					must(t, unlock(ctx))
				}
			}
		})

		t.Run("expires by itself", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{expires}", time.Second)
			must(t, err)
			wantTaken(t, another, "lock/{expires}")
			second := lockWithin(t, another, "lock/{expires}", time.Minute)
			must(t, unlock(ctx)) // leaves the other's alone
			wantTaken(t, l, "lock/{expires}")
			must(t, second(ctx))
		})

		t.Run("late unlock", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{late}", time.Minute)
			must(t, err)
			s.expire(t, "lock/{late}")
			must(t, unlock(ctx)) // as good as unlocked
			second, err := another.tryLock(ctx, "lock/{late}", time.Minute)
			must(t, err)
			must(t, unlock(ctx))
			wantTaken(t, l, "lock/{late}")
			must(t, second(ctx))
		})

		t.Run("cancelled before", func(t *testing.T) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			// The attempt may be over before it is seen that nobody waits for it.
			if unlock, err := l.tryLock(ctx, "lock/{cancelled}", time.Minute); err == nil {
				must(t, unlock(context.Background()))
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			must(t, lockWithin(t, another, "lock/{cancelled}", time.Minute)(context.Background()))
		})

		t.Run("cancelled while a server hangs", func(t *testing.T) {
			for i := range s.addresses() {
				s.pause(t, i)
			}
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(50*time.Millisecond, cancel)
			start := time.Now()
			if _, err := l.tryLock(ctx, "lock/{hangs}", time.Minute); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if took := time.Since(start); took > time.Second {
				t.Errorf("the cancelled attempt took %s", took)
			}
			for i := range s.addresses() {
				s.resume(t, i)
			}
			must(t, lockWithin(t, another, "lock/{hangs}", time.Minute)(context.Background()))
		})

		t.Run("unreachable", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{unreachable}", time.Minute)
			must(t, err)
			for i := range s.addresses() {
				s.kill(i)
			}
			for _, l := range []locker{l, another} {
				_, err = l.tryLock(ctx, "lock/{unreachable}", time.Minute)
				if err == nil || errors.Is(err, errLockTaken) {
					t.Fatalf("got %v, want that the servers are out of reach", err)
				}
				wantNamed(t, err.Error(), s.addresses()...)
			}
			wantNamed(t, unlock(ctx).Error(), s.addresses()...)
		})
	})
}

func wantNamed(t *testing.T, text string, addresses ...string) {
	t.Helper()
	for _, a := range addresses {
		if !strings.Contains(text, a+": ") {
			t.Errorf("%s is not named in %q", a, text)
		}
	}
	if strings.Contains(text, "\n") {
		t.Errorf("more than one line: %q", text)
	}
}

// Whatever becomes of attempts, nothing is left of them, neither while the locker is in use nor after it.
func TestLockLeavesNothing(t *testing.T) {
	forEachLock(t, 1, func(t *testing.T, s lockServers) {
		before := runtime.NumGoroutine()
		l := s.newLocker()
		must(t, lockWithin(t, l, "lock/{first}", time.Minute)(context.Background()))
		inUse := runtime.NumGoroutine()
		var wg sync.WaitGroup
		var locked, cancelled atomic.Int32
		for worker := range 10 {
			wg.Go(func() {
				for i := range 100 {
					ctx, cancel := context.WithCancel(context.Background())
					if i%2 == 1 { // somewhere in the middle of it
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
					case !errors.Is(err, errLockTaken): // by the attempt before, which was cancelled
						t.Error(err)
					}
					cancel()
				}
			})
		}
		wg.Wait()
		t.Logf("%d locked, %d cancelled", locked.Load(), cancelled.Load())
		if locked.Load() < 100 || cancelled.Load() < 50 {
			t.Errorf("%d locked, %d cancelled", locked.Load(), cancelled.Load())
		}
		wantNoMore := func(goroutines int) {
			t.Helper()
			eventually(t, 10*time.Second, func() error {
				if n := runtime.NumGoroutine(); n > goroutines {
					return fmt.Errorf("%d goroutines, %d before\n%s", n, goroutines, stacks())
				}
				return s.locksLeft()
			})
		}
		wantNoMore(inUse)
		must(t, l.close())
		wantNoMore(before)
		eventually(t, 10*time.Second, s.connectionsLeft)
	})
}
