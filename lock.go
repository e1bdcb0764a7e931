package main

import (
	"context"
	"errors"
	"sync"
	"time"
)

// The values of --lock-mode.
const (
	lockModeRedlock = "redlock"
	lockModeEtcd    = "etcd"
)

// errLockTaken means that another process holds the lock.
var errLockTaken = errors.New("lock taken")

// unlockFunc frees a lock if it is still held.
type unlockFunc = func(context.Context) error

// locker is a distributed lock.
type locker interface {
	// tryLock tries once to take the named lock, which expires after expiration. It
	// returns errLockTaken if another process holds the lock, an error that names the
	// servers if they do not answer, or ctx's error. A failed attempt leaves nothing
	// behind.
	tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error)
	// servers returns the names of the lock servers for errors: "lock Redis HOST:PORT".
	servers() []string
	// scripted returns the servers that clients run scripts on.
	scripted() []scriptedServer
	close() error
}

// attempts run to their end even if the caller's context ends. An attempt that stopped
// between two servers could not free the servers that it had locked.
type attempts struct{ sync.WaitGroup }

// do runs attempt, which is not bound to ctx. If ctx ends first, do frees the lock as
// soon as the attempt has taken it.
func (a *attempts) do(ctx context.Context, servers []string,
	attempt func(context.Context) (unlockFunc, error)) (unlockFunc, error) {
	type outcome struct {
		unlock unlockFunc
		err    error
	}
	done := make(chan outcome) // unbuffered: the lock belongs to the caller only if it receives
	a.Go(func() {
		var o outcome
		o.unlock, o.err = attempt(context.WithoutCancel(ctx))
		select {
		case done <- o:
		case <-ctx.Done():
			if o.err == nil {
				_ = o.unlock(context.WithoutCancel(ctx)) // if that fails, the lock expires
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
