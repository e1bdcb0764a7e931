package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestRedlockOverSeveralServers(t *testing.T) {
	var addresses []string
	var servers []*redisServer
	for range 3 {
		r := startRedis(t)
		servers = append(servers, r)
		addresses = append(addresses, r.address)
	}
	ctx := context.Background()
	l := newRedlock(addresses, redisCredentials{})
	defer l.close()
	another := newRedlock(addresses, redisCredentials{})
	defer another.close()
	const name = "lock/{shop/web}"

	unlock, err := l.tryLock(ctx, name, time.Minute)
	must(t, err)
	if _, err := another.tryLock(ctx, name, time.Minute); !errors.Is(err, errLockTaken) {
		t.Errorf("second holder: %v", err)
	}
	must(t, unlock(ctx))
	unlock, err = another.tryLock(ctx, name, time.Minute)
	must(t, err)
	must(t, unlock(ctx))

	servers[0].stop()
	unlock, err = l.tryLock(ctx, name, time.Minute)
	must(t, err)
	if _, err := another.tryLock(ctx, name, time.Minute); !errors.Is(err, errLockTaken) {
		t.Errorf("second holder with a server down: %v", err)
	}
	must(t, unlock(ctx))

	servers[1].stop()
	_, err = l.tryLock(ctx, name, time.Minute)
	if err == nil || errors.Is(err, errLockTaken) || !strings.Contains(err.Error(), "lock Redis "+addresses[0]) || !strings.Contains(err.Error(), "lock Redis "+addresses[1]) {
		t.Errorf("two servers down: %v", err)
	}
}

// A lock that has expired can be taken by another, whose lock a late unlock leaves alone.
func TestRedlockExpired(t *testing.T) {
	r := commonRedis(t)
	l := newRedlock([]string{r.address}, redisCredentials{})
	defer l.close()
	ctx, name := context.Background(), freshID().lockKey()
	unlock, err := l.tryLock(ctx, name, time.Minute)
	must(t, err)
	r.do(t, "DEL", name) // what its expiry does
	must(t, unlock(ctx))
	second, err := l.tryLock(ctx, name, time.Minute)
	must(t, err)
	must(t, unlock(ctx))
	if _, err := l.tryLock(ctx, name, time.Minute); !errors.Is(err, errLockTaken) {
		t.Errorf("the late unlock freed another's lock: %v", err)
	}
	must(t, second(ctx))
	if n := r.do(t, "EXISTS", name); n != int64(0) {
		t.Error("the lock is left")
	}
}

// An attempt that is cancelled leaves no lock.
func TestRedlockCancelled(t *testing.T) {
	r := startRedis(t)
	l := newRedlock([]string{r.address}, redisCredentials{})
	name := freshID().lockKey()
	unlock, err := l.tryLock(context.Background(), name, time.Minute) // makes the connection
	must(t, err)
	must(t, unlock(context.Background()))
	r.pause(t)
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := l.tryLock(ctx, name, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	r.resume(t)
	must(t, l.close())
	eventually(t, 5*time.Second, func() error {
		if r.do(t, "EXISTS", name) != int64(0) {
			return errors.New("the lock is left")
		}
		return nil
	})
}
