package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-redsync/redsync/v4"
	redsyncredis "github.com/go-redsync/redsync/v4/redis"
	"github.com/go-redsync/redsync/v4/redis/redigo"
	"github.com/gomodule/redigo/redis"
)

// redlockTimeout bounds a command to one lock server.
const redlockTimeout = 300 * time.Millisecond

// redlock is the Redlock algorithm over independent Redis servers: whoever has set the key on most of them
// holds the lock. With one server it is a plain lock there.
type redlock struct {
	addresses []string
	pools     []*redis.Pool
	sync      *redsync.Redsync
	attempts  sync.WaitGroup
}

func newRedlock(addresses []string, credentials redisCredentials) *redlock {
	l := &redlock{addresses: addresses}
	var pools []redsyncredis.Pool
	for _, a := range addresses {
		p := newRedisPool(a, credentials, 4, redlockTimeout)
		l.pools = append(l.pools, p)
		pools = append(pools, redigo.NewPool(p))
	}
	l.sync = redsync.New(pools...)
	return l
}

// tryLock implements locker. The attempt itself is not bound to ctx, but to redlockTimeout: one that was cut
// off between two servers could not free what it had taken.
func (l *redlock) tryLock(ctx context.Context, name string, expiration time.Duration) (func(context.Context) error, error) {
	mutex := l.sync.NewMutex(name,
		redsync.WithExpiry(expiration),
		redsync.WithTimeoutFactor(float64(redlockTimeout)/float64(expiration)))
	unlock := func(ctx context.Context) error {
		// A lock that has expired, or is another's by now, is as good as unlocked.
		_, err := mutex.UnlockContext(ctx)
		return errors.Join(l.failures(err)...)
	}
	done := make(chan error, 1)
	l.attempts.Go(func() { done <- mutex.TryLockContext(context.WithoutCancel(ctx)) })
	select {
	case err := <-done:
		if err == nil {
			return unlock, nil
		}
		// Taken, unless too few servers answered for anybody to take it.
		if failures := l.failures(err); len(l.addresses)-len(failures) < len(l.addresses)/2+1 {
			return nil, errors.Join(failures...)
		}
		return nil, errLockTaken
	case <-ctx.Done():
		l.attempts.Go(func() {
			if <-done == nil {
				_ = unlock(context.WithoutCancel(ctx)) // what cannot be freed expires
			}
		})
		return nil, context.Cause(ctx)
	}
}

// failures are the servers that did not answer, one error for each, out of an error of redsync's, which
// numbers them and joins them with those that answered that the lock is taken.
func (l *redlock) failures(err error) []error {
	errs := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		errs = joined.Unwrap()
	}
	var failures []error
	for _, err := range errs {
		var failed *redsync.RedisError
		if errors.As(err, &failed) {
			failures = append(failures, fmt.Errorf("lock Redis %s: %w", l.addresses[failed.Node], failed.Err))
		}
	}
	return failures
}

func (l *redlock) close() error {
	l.attempts.Wait()
	var errs []error
	for _, p := range l.pools {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}
