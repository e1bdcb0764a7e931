package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	redisReadTimeout  = 30 * time.Second // for an answer; a context may give less
	connectTimeout    = 2 * time.Second  // for the look-up of a name and the connection
	redisWriteTimeout = 2 * time.Second  // for sending a command

	// silentAfter is how long a connection may leave a command unanswered before it counts as
	// broken. A caller that gave up sooner says nothing of the server.
	silentAfter = 500 * time.Millisecond

	// scriptsWithin is the time in which a webhook loads the scripts that a server lacks, and
	// scriptsEvery the time between two of its looks.
	scriptsWithin = 2 * time.Second
	scriptsEvery  = 700 * time.Millisecond
)

// redisSettings are the settings that all Redis servers share.
type redisSettings struct {
	username, password                 string // empty for none
	passwordFile                       string // read at each dial instead of password, so that a new one needs no restart
	sentinelUsername, sentinelPassword string // those of the Sentinels; empty for none
	caFile                             string // PEM certificates to trust for rediss://; empty for the system's
	ca                                 string // takes the place of caFile: its content
	loadsScripts                       bool   // this user may EVAL, and loads the scripts that a server lacks; see loadScripts
	counts                             *redisCounts
	resolver                           *resolver // nil: processResolver
}

// hasPassword reports whether connections log in.
func (s redisSettings) hasPassword() bool { return s.password != "" || s.passwordFile != "" }

// ofSentinels returns the settings for connections to Sentinels.
func (s redisSettings) ofSentinels() redisSettings {
	return redisSettings{username: s.sentinelUsername, password: s.sentinelPassword, caFile: s.caFile,
		ca: s.ca, counts: s.counts, resolver: s.resolver}
}

// roots returns the certificates to trust. It reads their file at each dial, so that a new
// CA needs no restart.
func (s redisSettings) roots() (*x509.CertPool, error) {
	if s.ca != "" {
		return parseCA([][]byte{[]byte(s.ca)})
	}
	return readCA(s.caFile)
}

// redisPool keeps idle connections to one server for minutes. It does not cap the
// connections in use: commands that time out at a hanging server must not block other
// commands. Acquires are capped separately; a waiting one gives up its place when a new
// primary is found.
type redisPool struct {
	*redis.Pool

	// brokeAt is when a connection broke last (Unix nanoseconds). Idle connections from
	// before count as broken, too.
	brokeAt atomic.Int64
}

// newRedisPool makes a pool that keeps up to maxIdle idle connections. Commands time out
// after readTimeout, or earlier if their context says so.
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
			if used.UnixNano() <= p.brokeAt.Load() {
				return errors.New("as old as one that broke")
			}
			return c.(*redisConn).idleError()
		},
	}
	return p
}

// redisConn is a connection that detects, without a round trip, that it is broken.
type redisConn struct {
	contextConn
	tcp     syscall.Conn
	pool    *redisPool // nil for a connection outside of a pool
	refusal error      // the answer after which this connection is not used again
	expire  func()     // expires the answer of DNS that led to this server
	closed  func()     // counts the closing, once
}

// Close implements redis.Conn. After an error, the server's name may lead to another
// server: a provider moves it.
func (c *redisConn) Close() error {
	if c.Err() != nil {
		c.expire()
	}
	c.closed()
	return c.contextConn.Close()
}

// resettingConn drops unsent data when it is closed. Otherwise, the kernel would go on
// sending a command that has timed out.
type resettingConn struct{ *net.TCPConn }

func (c resettingConn) Close() error {
	_ = c.SetLinger(0) // fails only on a closed connection
	return c.TCPConn.Close()
}

type contextConn interface {
	redis.ConnWithContext
	redis.ConnWithTimeout
}

func dialRedis(ctx context.Context, address string, settings redisSettings,
	readTimeout time.Duration) (*redisConn, error) {
	resolver := cmp.Or(settings.resolver, processResolver)
	hostPort, secure := strings.CutPrefix(address, "rediss://")
	hostPort = strings.TrimPrefix(hostPort, "redis://")
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		return nil, err
	}
	var tcp syscall.Conn
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := resolver.dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		resetting := resettingConn{c.(*net.TCPConn)}
		tcp = resetting
		return resetting, nil
	}
	password := settings.password
	if settings.passwordFile != "" {
		if password, err = readPassword(settings.passwordFile); err != nil {
			return nil, fmt.Errorf("password of Redis: %w", err)
		}
	}
	options := []redis.DialOption{
		redis.DialContextFunc(dial),
		redis.DialReadTimeout(readTimeout),
		redis.DialWriteTimeout(redisWriteTimeout),
		redis.DialUsername(settings.username),
		redis.DialPassword(password),
	}
	if secure {
		roots, err := settings.roots()
		if err != nil {
			return nil, err
		}
		options = append(options, redis.DialUseTLS(true),
			redis.DialTLSHandshakeTimeout(min(connectTimeout, readTimeout)),
			redis.DialTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, RootCAs: roots}))
	}
	expire := func() { resolver.expire(host) }
	c, err := redis.DialContext(ctx, "tcp", hostPort, options...)
	if err != nil {
		expire() // also after a refused password or certificate: it may be another's server by now
		return nil, err
	}
	settings.counts.opened(1)
	closed := sync.OnceFunc(func() { settings.counts.opened(-1) })
	return &redisConn{contextConn: c.(contextConn), tcp: tcp, expire: expire, closed: closed}, nil
}

// Do implements redis.Conn.
func (c *redisConn) Do(command string, args ...any) (any, error) {
	sent := time.Now()
	reply, err := c.contextConn.Do(command, args...)
	return reply, c.noteError(err, sent)
}

// DoWithTimeout implements redis.ConnWithTimeout.
func (c *redisConn) DoWithTimeout(timeout time.Duration, command string, args ...any) (any, error) {
	sent := time.Now()
	reply, err := c.contextConn.DoWithTimeout(timeout, command, args...)
	return reply, c.noteError(err, sent)
}

// DoContext implements redis.ConnWithContext.
func (c *redisConn) DoContext(ctx context.Context, command string, args ...any) (any, error) {
	sent := time.Now()
	reply, err := c.contextConn.DoContext(ctx, command, args...)
	return reply, c.noteError(err, sent)
}

// noteError notes the error of a command and returns it. After an answer such as
// READONLY, the connection is not used again. If a connection breaks or falls silent, the
// pool's idle ones are probably broken, too.
func (c *redisConn) noteError(err error, sent time.Time) error {
	var answered redis.Error
	switch {
	case err == nil:
	case errors.As(err, &answered):
		if isOffDuty(answered) {
			c.refusal = err
		}
	case c.pool != nil && !(isTimeout(err) && time.Since(sent) < silentAfter):
		c.pool.brokeAt.Store(time.Now().UnixNano())
	}
	return err
}

// isTimeout reports whether the caller gave a command up.
func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) ||
		errors.Is(err, os.ErrDeadlineExceeded)
}

// isOffDuty reports whether a server answers that it serves no client now. By now, the
// address may lead to another server.
func isOffDuty(answered redis.Error) bool {
	switch errorCode(answered) {
	case "READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN":
		return true
	}
	return isMaxClients(answered)
}

// isMaxClients reports whether a server accepts no more connections. It closes the
// connection after this answer.
func isMaxClients(answered redis.Error) bool {
	return strings.HasPrefix(answered.Error(), "ERR max number of clients")
}

// errorCode returns the first word of an error reply.
func errorCode(answered redis.Error) string {
	code, _, _ := strings.Cut(answered.Error(), " ")
	return code
}

// Err implements redis.Conn: the pool drops a connection that has one.
func (c *redisConn) Err() error {
	if c.refusal != nil {
		return c.refusal
	}
	return c.contextConn.Err()
}

// idleError returns why an idle connection cannot be used again, or nil. It asks the
// kernel, because a PING before each command would double the cost of an admission.
// Without this check, we might send a script over a closed connection, and could not know
// whether Redis ran it.
//
// A server sends nothing on an idle connection unless it closes it. Readable data means
// that it is closed.
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

// scriptedServer is a server that clients without the right to EVAL run scripts on.
type scriptedServer struct {
	name    string
	pool    *redisPool
	scripts []*redis.Script
	nothing []any       // keys and arguments with which each script does nothing
	failed  func(error) // notes that the server has not answered
}

// loadScripts makes the server know its scripts: it runs each with arguments that do
// nothing. It returns how many the server did not know.
func (s scriptedServer) loadScripts(ctx context.Context) (loaded int, err error) {
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	unknown, err := runAll(ctx, conn, s.scripts, (*redis.Script).SendHash, s.nothing)
	if err == nil && len(unknown) > 0 {
		_, err = runAll(ctx, conn, unknown, (*redis.Script).Send, s.nothing)
	}
	return len(unknown), err
}

// runAll sends scripts in one round trip. It returns those that the server does not know.
func runAll(ctx context.Context, conn redis.Conn, scripts []*redis.Script,
	send func(*redis.Script, redis.Conn, ...any) error, keysAndArgs []any) (unknown []*redis.Script, err error) {
	for _, s := range scripts {
		err = errors.Join(err, send(s, conn, keysAndArgs...))
	}
	if err != nil {
		return nil, err
	}
	replies, err := redis.Values(redis.DoContext(conn, ctx, ""))
	for i, r := range replies {
		answered, failed := r.(redis.Error)
		switch {
		case failed && isNoScript(answered):
			unknown = append(unknown, scripts[i])
		case failed:
			err = answered
		}
	}
	return unknown, err
}

// isNoScript reports whether a server does not know the script of an EVALSHA.
func isNoScript(err error) bool {
	var answered redis.Error
	return errors.As(err, &answered) && errorCode(answered) == "NOSCRIPT"
}

// redisCounts are the counters that all connections to Redis share. A nil *redisCounts
// counts nothing.
type redisCounts struct {
	open      atomic.Int64 // connections
	failovers atomic.Int64 // times that another primary was found, or a changed Cluster
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
	// resolveFresh is the age up to which a dial uses an answer of DNS without asking
	// again.
	resolveFresh = 10 * time.Second

	// resolveGrace is the time that a dial waits for a new answer if it has an old one.
	resolveGrace = 200 * time.Millisecond

	// resolveRescue is the time after which a query is repeated for IPv4 addresses only.
	resolveRescue = time.Second

	// resolveTimeout bounds a query to DNS. Go's resolver sends a question again after five
	// seconds. A name of Kubernetes takes three or four questions, one after the other.
	resolveTimeout = time.Minute
)

// resolver queries DNS in the background of the dials, and caches the answers. DNS may
// take longer than an attempt to connect can wait: then a later attempt uses the answer.
// When a node is lost, DNS is often slow, and its last answer is mostly still right.
//
// A name may lead to another server at any time: that of a provider, or of a pod that was
// created again. So a failed connection expires the answer, and so does a server that
// refuses commands.
type resolver struct {
	lookUp func(ctx context.Context, host string) ([]string, error) // queries DNS

	lookups flights[string, *resolvedHost]

	mu    sync.Mutex
	hosts map[string]resolvedHost
}

// resolvedHost is an answer of DNS for a host.
type resolvedHost struct {
	addresses []string  // nil: none yet
	at        time.Time // zero: expired
}

// processResolver is the resolver of all connections of this process.
var processResolver = newResolver(net.DefaultResolver)

func newResolver(dns *net.Resolver) *resolver {
	lookUp := func(ctx context.Context, host string) ([]string, error) { return queryDNS(ctx, dns, host) }
	return &resolver{lookUp: lookUp, hosts: map[string]resolvedHost{}}
}

// queryDNS returns the addresses of a host. Go's resolver asks for IPv6 and IPv4 addresses
// and waits for both answers. Some networks drop questions for IPv6 addresses, and all
// lose packets. So queryDNS then asks for IPv4 addresses alone, too. The first success
// counts.
func queryDNS(ctx context.Context, dns *net.Resolver, host string) ([]string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		ips []net.IP
		err error
	}
	answers := make(chan answer, 2)
	ask := func(network string) {
		ips, err := dns.LookupIP(ctx, network, host)
		answers <- answer{ips, err}
	}
	go ask("ip")
	rescue := time.After(resolveRescue)
	var failed error
	for pending := 1; pending > 0; {
		select {
		case <-rescue:
			pending++
			go ask("ip4")
		case a := <-answers:
			if a.err == nil {
				var addresses []string
				for _, ip := range a.ips {
					addresses = append(addresses, ip.String())
				}
				return addresses, nil
			}
			pending--
			failed = a.err
		}
	}
	return nil, failed
}

// prepare looks up the hosts of addresses in the background.
func (r *resolver) prepare(addresses ...string) {
	for _, a := range addresses {
		if _, hostPort, ok := strings.Cut(a, "://"); ok {
			a = hostPort
		}
		if host, _, err := net.SplitHostPort(a); err == nil {
			r.start(host)
		}
	}
}

// resolve returns the addresses of a host. Its error says why it has none when ctx is
// done.
func (r *resolver) resolve(ctx context.Context, host string) ([]string, error) {
	cached, lookup := r.start(host)
	if lookup == nil {
		return cached, nil
	}
	var grace <-chan time.Time
	if cached != nil {
		grace = time.After(resolveGrace)
	}
	select {
	case <-lookup.done:
		if lookup.err == nil || cached == nil {
			return lookup.state.addresses, lookup.err
		}
	case <-grace:
	case <-ctx.Done():
		if cached == nil {
			return nil, &net.DNSError{Err: "no answer yet", Name: host, IsTimeout: true}
		}
	}
	return cached, nil
}

// start returns the cached addresses of a host, and the running look-up unless they are
// fresh.
func (r *resolver) start(host string) (cached []string, lookup *flight[*resolvedHost]) {
	if net.ParseIP(host) != nil {
		return []string{host}, nil
	}
	r.mu.Lock()
	h := r.hosts[host]
	r.mu.Unlock()
	if h.addresses != nil && time.Since(h.at) < resolveFresh {
		return h.addresses, nil
	}
	return h.addresses, r.lookups.join(host, new(resolvedHost), func(answer *resolvedHost) (err error) {
		ctx, cancel := context.WithTimeout(context.Background(), resolveTimeout)
		defer cancel()
		if answer.addresses, err = r.lookUp(ctx, host); err != nil {
			return err
		}
		answer.at = time.Now()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.hosts[host] = *answer
		return nil
	})
}

// expire expires the cached answer: the next dial asks DNS again.
func (r *resolver) expire(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h, ok := r.hosts[host]; ok {
		r.hosts[host] = resolvedHost{addresses: h.addresses}
	}
}

// dial connects to the first of a host's addresses that answers, within connectTimeout.
func (r *resolver) dial(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addresses, err := r.resolve(ctx, host)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err} // as a dialer returns it
	}
	var failed []error
	for i, a := range addresses {
		c, err := dialWithin(ctx, network, net.JoinHostPort(a, port), len(addresses)-i)
		if err == nil {
			return c, nil
		}
		failed = append(failed, err)
	}
	r.expire(host)
	return nil, errors.Join(failed...)
}

// dialWithin dials within its share of the time that ctx leaves for several dials.
func dialWithin(ctx context.Context, network, address string, dials int) (net.Conn, error) {
	end, _ := ctx.Deadline()
	dialer := &net.Dialer{
		Timeout:         time.Until(end) / time.Duration(dials),
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
	}
	return dialer.DialContext(ctx, network, address)
}
