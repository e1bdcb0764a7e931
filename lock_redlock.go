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

const (
	// redlockTimeout bounds a command to one of several lock servers: the others may make a
	// majority.
	redlockTimeout = 500 * time.Millisecond

	// loneLockTimeout bounds a command to the only lock server, and its connection before: on
	// a starved node, a name, a connection and TLS take long.
	loneLockTimeout = time.Second
)

// redlock is the Redlock algorithm over independent Redis servers: a process that has set
// the key on a majority holds the lock. With one server it is a plain lock there.
type redlock struct {
	addresses []string
	timeout   time.Duration // of a command
	pools     []*redisPool
	sync      *redsync.Redsync
	attempts  attempts
}

// lockConnections is the number of connections that a webhook keeps to each lock server.
const lockConnections = 32

func newRedlock(addresses []string, settings redisSettings, maxIdle int) *redlock {
	l := &redlock{addresses: addresses, timeout: redlockTimeout}
	if len(addresses) == 1 {
		l.timeout = loneLockTimeout
	}
	var pools []redsyncredis.Pool
	for _, a := range addresses {
		p := newRedisPool(a, settings, maxIdle, l.timeout)
		l.pools = append(l.pools, p)
		pools = append(pools, lockPool{p, settings.loadsScripts})
	}
	l.sync = redsync.New(pools...)
	return l
}

// lockPool adapts redisPool to redsync.
type lockPool struct {
	pool         *redisPool
	loadsScripts bool
}

// Get implements redsync's Pool.
func (p lockPool) Get(ctx context.Context) (redsyncredis.Conn, error) {
	conn, err := p.pool.GetContext(ctx)
	if err != nil {
		return nil, err
	}
	adapted, err := redigo.NewPool(connection{conn}).Get(ctx)
	return lockConn{adapted, conn, p.loadsScripts}, err
}

// connection is a pool of one connection, for redsync's adapter.
type connection struct{ redis.Conn }

func (c connection) Get() redis.Conn                                { return c.Conn }
func (c connection) GetContext(context.Context) (redis.Conn, error) { return c.Conn, nil }

// lockConn runs scripts by one command. redsync's own sends EVALSHA, and then EVAL if the
// server does not know the script. If the first answer is late, it does not send EVAL: the
// lock would not be freed.
type lockConn struct {
	redsyncredis.Conn
	conn         redis.Conn
	loadsScripts bool
}

// Eval implements redsync's Conn. If it may not load the script, it waits until a webhook
// has loaded it.
func (c lockConn) Eval(script *redsyncredis.Script, keysAndArgs ...any) (any, error) {
	command, name := "EVALSHA", script.Hash
	if c.loadsScripts {
		command, name = "EVAL", script.Src
	}
	for end := time.Now().Add(scriptsWithin); ; time.Sleep(scriptsWithin / 20) {
		reply, err := c.conn.Do(command, append([]any{name, script.KeyCount}, keysAndArgs...)...)
		if !isNoScript(err) || time.Now().After(end) {
			return reply, err
		}
	}
}

// unlockScript returns the script by which redsync unlocks. redsync does not export it,
// but shows it to a connection.
var unlockScript = sync.OnceValue(func() *redis.Script {
	shown := new(shownScript)
	_, _ = redsync.New(shown).NewMutex("").Unlock()
	return redis.NewScript(shown.KeyCount, shown.Src)
})

// shownScript is a pool whose connections run nothing, and keep the script.
type shownScript struct{ redsyncredis.Script }

// Get implements redsync's Pool.
func (s *shownScript) Get(context.Context) (redsyncredis.Conn, error) { return showConn{shown: s}, nil }

type showConn struct {
	redsyncredis.Conn
	shown *shownScript
}

func (c showConn) Eval(script *redsyncredis.Script, _ ...any) (any, error) {
	c.shown.Script = *script
	return int64(1), nil
}

func (c showConn) Close() error { return nil }

// scripted implements locker.
func (l *redlock) scripted() (all []scriptedServer) {
	for i, p := range l.pools {
		all = append(all, scriptedServer{l.servers()[i], p, []*redis.Script{unlockScript()}, []any{"lock/{-}", ""},
			func(error) {}})
	}
	return all
}

// tryLock implements locker. An attempt takes at most the timeout, and as long again
// to undo its changes.
func (l *redlock) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	return l.attempts.do(ctx, l.servers(), func(ctx context.Context) (unlockFunc, error) {
		mutex := l.sync.NewMutex(name,
			redsync.WithExpiry(expiration),
			redsync.WithTimeoutFactor(float64(l.timeout)/float64(expiration)))
		err := mutex.TryLockContext(ctx)
		if err == nil {
			return func(ctx context.Context) error { return l.unlock(ctx, mutex) }, nil
		}
		// The lock is taken, unless too few servers answered for a majority, or they
		// answered too late.
		failures := l.failures(err)
		var node *redsync.ErrNodeTaken
		var most *redsync.ErrTaken
		taken := errors.As(err, &node) || errors.As(err, &most)
		if len(failures) > len(l.addresses)-len(l.addresses)/2-1 || len(failures) > 0 && !taken {
			return nil, serverErrors(failures)
		}
		return nil, errLockTaken
	})
}

// unlock frees the lock. A lock that has expired, or that another process holds by now,
// counts as freed.
func (l *redlock) unlock(ctx context.Context, mutex *redsync.Mutex) error {
	_, err := mutex.UnlockContext(ctx)
	if failures := l.failures(err); len(failures) > 0 {
		return serverErrors(failures)
	}
	return nil
}

// servers implements locker.
func (l *redlock) servers() []string {
	var names []string
	for _, a := range l.addresses {
		names = append(names, "lock Redis "+a)
	}
	return names
}

// failures returns one error for each server that did not answer. redsync numbers the
// servers, and nests their errors together with those of servers that answered "taken".
func (l *redlock) failures(err error) []error {
	var failures []error
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range joined.Unwrap() {
			failures = append(failures, l.failures(err)...)
		}
		return failures
	}
	var failed *redsync.RedisError
	if errors.As(err, &failed) {
		failures = append(failures, fmt.Errorf("%s: %w", l.servers()[failed.Node], failed.Err))
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
