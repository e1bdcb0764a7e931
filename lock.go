package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// The locks to choose from.
const (
	lockModeRedlock = "redlock"
	lockModeEtcd    = "etcd"
)

// errLockTaken is what a locker answers when somebody else holds the lock.
var errLockTaken = errors.New("lock taken")

// unlockFunc frees a lock if it is still held.
type unlockFunc = func(context.Context) error

// locker is a distributed lock.
type locker interface {
	// tryLock tries once to take the named lock, which frees itself after expiration. Its errors are errLockTaken, if somebody
	// else holds the lock, or that the lock servers are out of reach, or ctx's. An attempt that fails leaves nothing behind.
	tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error)
	// servers names the lock servers, for errors: "lock Redis HOST:PORT".
	servers() []string
	close() error
}

// newLocker makes the lock of the chosen mode; maxIdle is how many connections to each Redis server are kept.
func newLocker(c sharedConfig, maxIdle int) locker {
	if c.lockMode == lockModeEtcd {
		return newEtcdLock(c.etcdAddresses, c.etcd)
	}
	return newRedlock(c.redisAddresses, c.redis, maxIdle)
}

// serverErrors are the errors of several servers, on one line.
type serverErrors []error

func (e serverErrors) Unwrap() []error { return e }

func (e serverErrors) Error() string {
	var texts []string
	for _, err := range e {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

// unanswered is the error of an attempt that was given up before the servers had answered.
func unanswered(servers []string, cause error) error {
	var errs serverErrors
	for _, s := range servers {
		errs = append(errs, fmt.Errorf("%s: no answer yet: %w", s, cause))
	}
	return errs
}

// attempts are attempts to lock that outlive the contexts of their callers: one that was cut off between two servers could not
// free what it had taken.
type attempts struct{ sync.WaitGroup }

// do runs attempt, which is not bound to ctx. If ctx ends before it does, the lock is freed again as soon as it is taken.
func (a *attempts) do(ctx context.Context, servers []string, attempt func(context.Context) (unlockFunc, error)) (unlockFunc, error) {
	type outcome struct {
		unlock unlockFunc
		err    error
	}
	done := make(chan outcome) // whoever is there to receive from it has the lock
	a.Go(func() {
		var o outcome
		o.unlock, o.err = attempt(context.WithoutCancel(ctx))
		select {
		case done <- o:
		case <-ctx.Done():
			if o.err == nil {
				_ = o.unlock(context.WithoutCancel(ctx)) // what cannot be freed expires
			}
		}
	})
	select {
	case o := <-done:
		return o.unlock, o.err
	case <-ctx.Done():
		return nil, unanswered(servers, context.Cause(ctx))
	}
}
