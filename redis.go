package main

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"github.com/gomodule/redigo/redis"
)

// redisConnectTimeout bounds a dial, redisWriteTimeout the writing of a command.
const (
	redisConnectTimeout = 2 * time.Second
	redisWriteTimeout   = 2 * time.Second
)

// redisCredentials are those of all Redis servers; empty for none.
type redisCredentials struct{ username, password string }

// newRedisPool makes a pool that keeps up to maxIdle connections for minutes. Commands that are not given
// a shorter time by their context fail after readTimeout.
//
// There is no limit to the connections in use: a hung server must not make admissions queue up behind
// connections that will never answer when its successor is there already.
func newRedisPool(address string, credentials redisCredentials, maxIdle int, readTimeout time.Duration) *redis.Pool {
	return &redis.Pool{
		MaxIdle:     maxIdle,
		IdleTimeout: 4 * time.Minute,
		DialContext: func(ctx context.Context) (redis.Conn, error) {
			return dialRedis(ctx, address, credentials, readTimeout)
		},
		TestOnBorrow: func(c redis.Conn, _ time.Time) error {
			return c.(*redisConn).idleError()
		},
	}
}

// redisConn is a connection that can tell for nothing whether it is still good.
type redisConn struct {
	contextConn
	tcp syscall.Conn
}

type contextConn interface {
	redis.ConnWithContext
	redis.ConnWithTimeout
}

func dialRedis(ctx context.Context, address string, credentials redisCredentials, readTimeout time.Duration) (redis.Conn, error) {
	var tcp syscall.Conn
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		dialer := net.Dialer{Timeout: redisConnectTimeout}
		c, err := dialer.DialContext(ctx, network, address)
		if err == nil {
			tcp = c.(syscall.Conn)
		}
		return c, err
	}
	c, err := redis.DialContext(ctx, "tcp", address,
		redis.DialContextFunc(dial),
		redis.DialReadTimeout(readTimeout),
		redis.DialWriteTimeout(redisWriteTimeout),
		redis.DialUsername(credentials.username),
		redis.DialPassword(credentials.password))
	if err != nil {
		return nil, err
	}
	return &redisConn{contextConn: c.(contextConn), tcp: tcp}, nil
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
