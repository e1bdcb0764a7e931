package main

import (
	"context"
	"errors"
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
