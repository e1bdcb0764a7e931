package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
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
		if n, err := rig.EstablishedConnections(m.Address); err != nil || n > 1 { // one is the test's
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

// forEachLock runs a test over both locks at once, each with servers of its own.
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

// lockWithin takes a lock that is to become free.
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
		t.Fatalf("got %v, want that the lock is taken", err)
	}
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
