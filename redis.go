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
	return reply, c.noteError(err)
}

// DoWithTimeout implements redis.ConnWithTimeout.
func (c *redisConn) DoWithTimeout(timeout time.Duration, command string, args ...any) (any, error) {
	reply, err := c.contextConn.DoWithTimeout(timeout, command, args...)
	return reply, c.noteError(err)
}

// DoContext implements redis.ConnWithContext.
func (c *redisConn) DoContext(ctx context.Context, command string, args ...any) (any, error) {
	reply, err := c.contextConn.DoContext(ctx, command, args...)
	return reply, c.noteError(err)
}

// noteError keeps what is to be concluded from an error. Answers such as READONLY or LOADING mean that this server is not, or no
// longer, the one to talk to; behind the same address there may be another by now. A connection that breaks, or falls silent, is
// seldom the only one.
func (c *redisConn) noteError(err error) error {
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

// redisCounts are what the connections to Redis have in common. A nil one counts nothing.
type redisCounts struct {
	open      atomic.Int64 // connections
	failovers atomic.Int64 // that another server was found in the place of one
}

func (c *redisCounts) opened(n int64) {
	if c != nil {
		c.open.Add(n)
	}
}

func (c *redisCounts) failedOver() {
	if c != nil {
		c.failovers.Add(1)
	}
}

const (
	// resolvedFor is for how long an answer of DNS is taken for new.
	resolvedFor = 10 * time.Second

	// resolveGrace is how long a dial waits for a new answer where it has an old one.
	resolveGrace = 200 * time.Millisecond

	// resolveTimeout bounds a question to DNS. The system's resolver asks again after five seconds.
	resolveTimeout = 15 * time.Second
)

// resolver asks DNS beside the dials that need its answers, and remembers them: DNS may be slow just when a node is lost, slower than
// a dial has time, and what it answered before is mostly still right.
type resolver struct {
	ask func(ctx context.Context, host string) ([]string, error)

	questions flights[string, *resolvedHost]

	mu    sync.Mutex
	hosts map[string]resolvedHost
}

// resolvedHost is an answer of DNS for a name.
type resolvedHost struct {
	addresses []string // nil: none yet
	at        time.Time
}

func newResolver() *resolver {
	return &resolver{ask: net.DefaultResolver.LookupHost, hosts: map[string]resolvedHost{}}
}

// resolve returns the addresses of a host, and an error where none has been known before ctx is done.
func (r *resolver) resolve(ctx context.Context, host string) ([]string, error) {
	if net.ParseIP(host) != nil {
		return []string{host}, nil
	}
	known, asked := r.start(host)
	if asked == nil {
		return known, nil
	}
	var grace <-chan time.Time
	if known != nil {
		grace = time.After(resolveGrace)
	}
	select {
	case <-asked.done:
		if asked.err == nil || known == nil {
			return asked.state.addresses, asked.err
		}
	case <-grace:
	case <-ctx.Done():
		if known == nil {
			return nil, &net.DNSError{Err: "no answer yet", Name: host, IsTimeout: true}
		}
	}
	return known, nil
}

// start returns the known addresses of a host, and the question under way if they are old.
func (r *resolver) start(host string) (known []string, asked *flight[*resolvedHost]) {
	r.mu.Lock()
	h := r.hosts[host]
	r.mu.Unlock()
	if h.addresses != nil && time.Since(h.at) < resolvedFor {
		return h.addresses, nil
	}
	return h.addresses, r.questions.join(host, new(resolvedHost), func(answer *resolvedHost) (err error) {
		ctx, cancel := context.WithTimeout(context.Background(), resolveTimeout)
		defer cancel()
		if answer.addresses, err = r.ask(ctx, host); err != nil {
			return err
		}
		answer.at = time.Now()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.hosts[host] = *answer
		return nil
	})
}

// doubt makes an answer old: who is to be found there does not answer.
func (r *resolver) doubt(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts[host] = resolvedHost{addresses: r.hosts[host].addresses}
}

// dial connects to the first of a host's addresses that answers. Without a resolver, the dialer asks DNS.
func (r *resolver) dial(ctx context.Context, dialer *net.Dialer, network, address string) (net.Conn, error) {
	if r == nil {
		return dialer.DialContext(ctx, network, address)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addresses, err := r.resolve(ctx, host)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err} // as a dialer does
	}
	var failed []error
	for i, a := range addresses {
		c, err := dialWithin(ctx, dialer, network, net.JoinHostPort(a, port), len(addresses)-i)
		if err == nil {
			return c, nil
		}
		failed = append(failed, err)
	}
	r.doubt(host)
	return nil, errors.Join(failed...)
}

// dialWithin gives a dial its share of the time that is left for several.
func dialWithin(ctx context.Context, dialer *net.Dialer, network, address string, several int) (net.Conn, error) {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(several))
		defer cancel()
	}
	return dialer.DialContext(ctx, network, address)
}
