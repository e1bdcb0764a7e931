package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gomodule/redigo/redis"
)

// redisConnectTimeout bounds a dial, redisWriteTimeout the writing of a command, and redisReadTimeout the wait for an answer where a
// context gives no shorter time.
const (
	redisReadTimeout    = 30 * time.Second
	redisConnectTimeout = 2 * time.Second
	redisWriteTimeout   = 2 * time.Second
)

// redisSettings is what all Redis servers have in common.
type redisSettings struct {
	username, password                 string // empty for none
	sentinelUsername, sentinelPassword string // the same for the Sentinels
	caFile                             string // PEM certificates to trust for rediss://; empty for those of the system
	counts                             *redisCounts
	resolver                           *resolver // nil: each dial asks DNS
}

// ofSentinels are the settings for connections to Sentinels.
func (s redisSettings) ofSentinels() redisSettings {
	return redisSettings{username: s.sentinelUsername, password: s.sentinelPassword, caFile: s.caFile, counts: s.counts, resolver: s.resolver}
}

// redisPool keeps connections to one server for minutes. It does not limit those in use: what is given up at a server that hangs must not stand in
// the way of what else is asked. Questions for tokens have slots for that, which who waits for one leaves when the server has a successor.
type redisPool struct {
	*redis.Pool
	broke atomic.Int64 // when a connection broke last (Unix nanoseconds): idle ones from before are as good as broken
}

// newRedisPool makes a pool that keeps up to maxIdle connections. Commands that are not given a shorter time by their context
// fail after readTimeout.
func newRedisPool(address string, settings redisSettings, maxIdle int, readTimeout time.Duration) *redisPool {
	p := new(redisPool)
	p.Pool = &redis.Pool{
		MaxIdle:     maxIdle,
		IdleTimeout: 4 * time.Minute,
		DialContext: func(ctx context.Context) (redis.Conn, error) {
			c, err := dialRedis(ctx, address, settings, readTimeout)
			if err != nil {
				return nil, err
			}
			c.pool = p
			return c, nil
		},
		TestOnBorrow: func(c redis.Conn, used time.Time) error {
			if used.UnixNano() <= p.broke.Load() {
				return errors.New("as old as one that broke")
			}
			return c.(*redisConn).idleError()
		},
	}
	return p
}

// redisConn is a connection that can tell for nothing whether it is still good.
type redisConn struct {
	contextConn
	tcp     syscall.Conn
	pool    *redisPool // nil for one that is in no pool
	refused error      // what the server answered, if that is a reason not to ask it again
	closed  func()     // counts that it is closed, once
}

// Close implements redis.Conn.
func (c *redisConn) Close() error {
	c.closed()
	return c.contextConn.Close()
}

// hardConn is closed without a word: the kernel would go on sending what it has of a command that was given up.
type hardConn struct{ *net.TCPConn }

func (c hardConn) Close() error {
	_ = c.SetLinger(0) // fails only on a closed one
	return c.TCPConn.Close()
}

type contextConn interface {
	redis.ConnWithContext
	redis.ConnWithTimeout
}

func dialRedis(ctx context.Context, address string, settings redisSettings, readTimeout time.Duration) (*redisConn, error) {
	var tcp syscall.Conn
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		dialer := &net.Dialer{
			Timeout:         redisConnectTimeout,
			KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		}
		c, err := settings.resolver.dial(ctx, dialer, network, address)
		if err != nil {
			return nil, err
		}
		hard := hardConn{c.(*net.TCPConn)}
		tcp = hard
		return hard, nil
	}
	hostPort, secure := strings.CutPrefix(address, "rediss://")
	hostPort = strings.TrimPrefix(hostPort, "redis://")
	options := []redis.DialOption{
		redis.DialContextFunc(dial),
		redis.DialReadTimeout(readTimeout),
		redis.DialWriteTimeout(redisWriteTimeout),
		redis.DialUsername(settings.username),
		redis.DialPassword(settings.password),
	}
	if secure {
		host, _, err := net.SplitHostPort(hostPort)
		if err != nil {
			return nil, err
		}
		roots, err := readCA(settings.caFile) // at each dial, so that a new authority needs no restart
		if err != nil {
			return nil, err
		}
		options = append(options, redis.DialUseTLS(true), redis.DialTLSHandshakeTimeout(min(redisConnectTimeout, readTimeout)),
			redis.DialTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, RootCAs: roots}))
	}
	c, err := redis.DialContext(ctx, "tcp", hostPort, options...)
	if err != nil {
		return nil, err
	}
	settings.counts.opened(1)
	return &redisConn{contextConn: c.(contextConn), tcp: tcp, closed: sync.OnceFunc(func() { settings.counts.opened(-1) })}, nil
}

// Do implements redis.Conn.
func (c *redisConn) Do(command string, args ...any) (any, error) {
	reply, err := c.contextConn.Do(command, args...)
	return reply, c.remember(err)
}

// DoWithTimeout implements redis.ConnWithTimeout.
func (c *redisConn) DoWithTimeout(timeout time.Duration, command string, args ...any) (any, error) {
	reply, err := c.contextConn.DoWithTimeout(timeout, command, args...)
	return reply, c.remember(err)
}

// DoContext implements redis.ConnWithContext.
func (c *redisConn) DoContext(ctx context.Context, command string, args ...any) (any, error) {
	reply, err := c.contextConn.DoContext(ctx, command, args...)
	return reply, c.remember(err)
}

// remember keeps what is to be concluded from an error. Answers such as READONLY or LOADING mean that this server is not, or no
// longer, the one to talk to; behind the same address there may be another by now. A connection that breaks, or falls silent, is
// seldom the only one.
func (c *redisConn) remember(err error) error {
	var answered redis.Error
	switch {
	case err == nil:
	case !errors.As(err, &answered):
		if c.pool != nil {
			c.pool.broke.Store(time.Now().UnixNano())
		}
	case !strings.HasPrefix(answered.Error(), "NOSCRIPT "):
		c.refused = err
	}
	return err
}

// Err implements redis.Conn: the pool drops a connection that has one.
func (c *redisConn) Err() error {
	if c.refused != nil {
		return c.refused
	}
	return c.contextConn.Err()
}

// idleError is the reason why an idle connection cannot be used again. It asks the kernel and not the
// server: a PING before each command would double the cost of an admission, and a script that is sent
// into a connection that the server has closed cannot be told from one that was run.
//
// A server says nothing on an idle connection, unless it closes it: whatever can be read is a bad sign.
func (c *redisConn) idleError() error {
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		return err
	}
	var peeked error
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, peeked = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	switch {
	case err != nil:
		return err
	case errors.Is(peeked, syscall.EAGAIN):
		return nil
	case peeked != nil:
		return peeked
	}
	return errors.New("closed by the server")
}
