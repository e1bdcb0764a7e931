package main

import (
	"bytes"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// maxBody is more than any review of a pod that etcd accepts: 1.5 MiB by default. The API
// server escapes < > & and control characters, so six bytes may stand for one: 9 MiB, and
// room for the rest of the review. A review of a creation has one object. While Redis
// hangs, each large body keeps up to maxBody in memory, and each that is read or decoded
// four times that: maxLarge follows.
const maxBody = 10 << 20

// Limits on all clients together. Beyond a limit, the oldest is evicted: that is seldom
// an API server, which reuses its connections and whose requests take milliseconds. A
// request is authenticated if its path is the one of the webhook, with the secret.
const (
	maxUnauthenticated = 512       // connections that have had no authenticated request yet
	maxAuthenticated   = 512       // other connections
	maxRequests        = 5120      // that are being read, decided or answered
	maxBodies          = 24 << 20  // bytes of their bodies, at most smallBody of each
	maxStreams         = 100       // of an HTTP/2 connection
	frameSize          = 16 << 10  // of HTTP/2, and the unread bytes of a stream
	windowSize         = 128 << 10 // unread bytes of all streams of a connection
	maxHeaderSize      = 16 << 10

	// unauthenticatedBytes is what a connection may send, with TLS and all, before its
	// first authenticated request. It is more than may come with that request.
	unauthenticatedBytes = 96 << 10

	// restTime is how long the oldest authenticated connection must be unused before a
	// new one evicts it; the new one waits that long at most. It is longer than a request
	// takes while all are busy. So eviction hardly ever cuts off a request, unless
	// thousands wait for Redis.
	restTime = time.Second

	// refusalTime is how long a refusal has to reach the client before the connection is
	// closed.
	refusalTime = 50 * time.Millisecond

	// A body is large if it has more than smallBody bytes, or more than smallObjects JSON
	// objects, which take more memory than their text. At most maxLarge are held, each
	// until its pod is decided, and at most maxDecoded are decoded at once; others wait.
	// A large body must arrive within largeBodyTime. A body of more than maxObjects is
	// refused.
	smallBody     = 32 << 10
	smallObjects  = 1000
	maxObjects    = 50000
	maxLarge      = 4
	maxDecoded    = 2
	largeBodyTime = 2 * time.Second
)

// errEvicted ends the oldest request.
var errEvicted = errors.New("too many requests at once, of which this is the oldest: try again")

// bounds limits what the clients of a server use.
type bounds struct {
	unauthenticated, authenticated, requests evictingSet
	large, decoded                           slots    // for large bodies
	connections                              sync.Map // net.Conn -> *httpConnection
}

func newBounds() *bounds {
	return &bounds{
		unauthenticated: evictingSet{most: maxUnauthenticated},
		authenticated:   evictingSet{most: maxAuthenticated},
		requests:        evictingSet{most: maxRequests, mostBytes: maxBodies},
		large:           make(slots, maxLarge),
		decoded:         make(slots, maxDecoded),
	}
}

// httpConnection is a connection to a server with bounds.
type httpConnection struct {
	net.Conn
	bounds *bounds

	counted *countedConn // nil in a test

	mu            sync.Mutex
	closed        bool
	authenticated bool   // it has had an authenticated request
	leave         func() // leaves its evictingSet
}

type connectionKey struct{}

// apply sets the bounds of a server.
func (b *bounds) apply(s *http.Server) {
	s.MaxHeaderBytes = maxHeaderSize
	s.HTTP2 = &http.HTTP2Config{
		MaxConcurrentStreams:          maxStreams,
		MaxReadFrameSize:              frameSize,
		MaxReceiveBufferPerConnection: windowSize,
		MaxReceiveBufferPerStream:     frameSize,
	}
	s.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		c := &httpConnection{Conn: conn, bounds: b}
		if t, ok := conn.(*tls.Conn); ok {
			c.counted, _ = t.NetConn().(*countedConn)
		}
		c.leave = b.unauthenticated.add(0, c.end)
		b.connections.Store(conn, c)
		return context.WithValue(ctx, connectionKey{}, c)
	}
	s.ConnState = func(conn net.Conn, state http.ConnState) {
		if state != http.StateClosed {
			return
		}
		if c, ok := b.connections.LoadAndDelete(conn); ok {
			c.(*httpConnection).ended()
		}
	}
}

// end closes the connection without waiting for the client.
func (c *httpConnection) end() {
	if t, ok := c.Conn.(*tls.Conn); ok {
		_ = t.NetConn().Close()
		return
	}
	_ = c.Conn.Close()
}

func (c *httpConnection) ended() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.leave()
}

// used notes an authenticated request. The first one of a connection waits for room.
func (c *httpConnection) used(ctx context.Context) {
	if c.counted != nil {
		c.counted.authenticated.Store(true)
	}
	c.mu.Lock()
	authenticated := c.authenticated
	c.mu.Unlock()
	if !authenticated {
		c.bounds.authenticated.waitForRoom(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || ctx.Err() != nil {
		return
	}
	c.leave()
	c.authenticated, c.leave = true, c.bounds.authenticated.add(0, c.end)
}

// refuseMore ends the connection of an unauthenticated request, unless it has had an
// authenticated one: a client that does not know the path has no business here.
func refuseMore(r *http.Request) {
	if c, ok := r.Context().Value(connectionKey{}).(*httpConnection); ok && c.counted != nil {
		c.counted.refused.Store(true)
	}
}

// countingListener counts the bytes that arrive on each connection.
type countingListener struct{ net.Listener }

func (l countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &countedConn{Conn: conn}, nil
}

// countedConn fails after unauthenticatedBytes, or after a refusal, unless it has had an
// authenticated request.
type countedConn struct {
	net.Conn
	authenticated atomic.Bool
	refused       atomic.Bool
	read          int // by one reader at a time
}

func (c *countedConn) Read(b []byte) (int, error) {
	if c.authenticated.Load() {
		return c.Conn.Read(b)
	}
	if c.refused.Load() {
		time.Sleep(refusalTime)
		return 0, errTooMuch
	}
	if c.read >= unauthenticatedBytes {
		return 0, errTooMuch
	}
	n, err := c.Conn.Read(b)
	c.read += n
	return n, err
}

// errTooMuch closes a connection.
var errTooMuch = errors.New("an unauthenticated client has sent too much, or was refused")

// begin begins an authenticated request, which may be evicted: that ends its context. The
// caller must call done at its end.
func (b *bounds) begin(rw http.ResponseWriter, r *http.Request) (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(r.Context())
	var mu sync.Mutex
	over := false
	leave := b.requests.add(initialBytes(r), func() {
		mu.Lock()
		defer mu.Unlock()
		cancel(errEvicted)
		if control := http.NewResponseController(rw); !over { // without a connection, as in a test, these fail
			_ = control.SetReadDeadline(time.Now())
			_ = control.SetWriteDeadline(time.Now().Add(time.Second))
		}
	})
	if c, ok := r.Context().Value(connectionKey{}).(*httpConnection); ok {
		c.used(ctx)
	}
	return ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		leave()
		cancel(nil)
	}
}

// initialBytes returns how many bytes of a body are read before it counts as large.
func initialBytes(r *http.Request) int {
	if r.ContentLength < 0 { // unknown
		return smallBody
	}
	return int(min(r.ContentLength, smallBody))
}

// readJSON reads the JSON body of a POST within the bounds and decodes it. The caller
// must call release when it no longer needs the decoded value. Its errors are
// *badRequest, and those of decode.
func (b *bounds) readJSON(ctx context.Context, rw http.ResponseWriter, r *http.Request,
	decode func(text []byte) error) (release func(), err error) {
	release = func() {}
	if r.Method != http.MethodPost {
		return release, &badRequest{http.StatusMethodNotAllowed,
			fmt.Sprintf("method %s is not allowed: POST an AdmissionReview", r.Method)}
	}
	contentType := r.Header.Get("Content-Type")
	if media, _, err := mime.ParseMediaType(contentType); err != nil || media != "application/json" {
		return release, &badRequest{http.StatusUnsupportedMediaType,
			fmt.Sprintf("Content-Type is %s: it must be application/json", quoteShort(contentType))}
	}
	tooLarge := &badRequest{http.StatusRequestEntityTooLarge,
		fmt.Sprintf("the body is larger than %d bytes", maxBody)}
	if r.ContentLength > maxBody {
		return release, tooLarge
	}
	var buffer bytes.Buffer
	limited := http.MaxBytesReader(rw, r.Body, maxBody)
	buffer.Grow(initialBytes(r) + bytes.MinRead)
	_, failed := io.CopyN(&buffer, limited, smallBody)
	more := failed == nil
	if more || objects(buffer.Bytes()) > smallObjects {
		if release, err = b.large.take(ctx); err != nil {
			return release, &badRequest{http.StatusServiceUnavailable, "large requests: " + err.Error()}
		}
		decoded, err := b.decoded.take(ctx)
		if err != nil {
			return release, &badRequest{http.StatusServiceUnavailable, "large requests: " + err.Error()}
		}
		defer decoded()
	}
	if more {
		if r.ContentLength > 0 {
			buffer.Grow(int(r.ContentLength) - buffer.Len() + bytes.MinRead)
		}
		control := http.NewResponseController(rw)
		_ = control.SetReadDeadline(time.Now().Add(largeBodyTime)) // fails without a connection, as in a test
		if _, failed = buffer.ReadFrom(limited); failed == nil {
			_ = control.SetReadDeadline(time.Time{})
		}
	}
	var over *http.MaxBytesError
	switch n := objects(buffer.Bytes()); {
	case errors.As(failed, &over):
		return release, tooLarge
	case context.Cause(ctx) == errEvicted:
		return release, &badRequest{http.StatusServiceUnavailable, errEvicted.Error()}
	case errors.Is(failed, os.ErrDeadlineExceeded):
		return release, &badRequest{http.StatusServiceUnavailable, "the body did not arrive in time"}
	case failed != nil && failed != io.EOF:
		return release, badRequestf("read the body: %v", failed)
	case n > maxObjects:
		return release, &badRequest{http.StatusRequestEntityTooLarge,
			fmt.Sprintf("the body has %d objects: at most %d are decoded", n, maxObjects)}
	}
	return release, decode(buffer.Bytes())
}

// objects returns the greatest number of JSON objects that a text may have.
func objects(text []byte) int { return bytes.Count(text, []byte("{")) }

// badRequestsLogged caps the lines about bad requests and connections in each logEvery.
const badRequestsLogged = 10

// httpErrors logs the errors of a net/http server.
type httpErrors struct {
	log   *slog.Logger
	limit logLimiter
}

func newHTTPErrors(to *slog.Logger) *log.Logger {
	return log.New(&httpErrors{log: to, limit: logLimiter{most: badRequestsLogged}}, "", 0)
}

// Write implements io.Writer.
func (e *httpErrors) Write(line []byte) (int, error) {
	if dropped, ok := e.limit.allow(); ok {
		e.log.Warn("a connection or request failed", "error", strings.TrimSpace(string(line)),
			"notLoggedBefore", dropped)
	}
	return len(line), nil
}

// evictingSet is a set of entries. When it has more than most, or more than mostBytes, it
// evicts the oldest.
type evictingSet struct {
	most, mostBytes int

	mu    sync.Mutex
	all   list.List // of *entry, the oldest first
	bytes int       // of all
}

// entry is an entry of an evictingSet.
type entry struct {
	since time.Time
	bytes int
	evict func()
}

// add adds an entry. The caller must call leave when the entry is gone, whatever the
// reason.
func (c *evictingSet) add(bytes int, evict func()) (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.all.PushBack(&entry{time.Now(), bytes, evict})
	c.bytes += bytes
	for c.all.Len() > c.most || c.bytes > c.mostBytes {
		go c.remove(c.all.Front()).evict()
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.remove(e)
	}
}

// remove removes an entry, unless it is gone already.
func (c *evictingSet) remove(e *list.Element) *entry {
	m := c.all.Remove(e).(*entry)
	c.bytes -= m.bytes
	m.bytes = 0
	return m
}

// waitForRoom waits until one more entry evicts none that is younger than restTime. It
// waits for restTime at most, and no longer than ctx.
func (c *evictingSet) waitForRoom(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, restTime)
	defer cancel()
	for {
		wait := c.untilOldestRested()
		if wait <= 0 || sleep(ctx, wait) != nil {
			return
		}
	}
}

// untilOldestRested returns the time until the oldest entry of a full set is restTime
// old.
func (c *evictingSet) untilOldestRested() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all.Len() < c.most {
		return 0
	}
	return time.Until(c.all.Front().Value.(*entry).since.Add(restTime))
}

func listen(flag, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return l, nil
}

// newHealthServer serves /healthz, /readyz and /metrics over plain HTTP, within bounds of
// its own.
func newHealthServer(routes http.Handler, errorLog *log.Logger) *http.Server {
	s := &http.Server{
		Handler:           routes,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      5 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          errorLog,
	}
	newBounds().apply(s)
	return s
}

// newHealthRoutes returns the routes of a health server. ready returns why the process is
// not ready.
func newHealthRoutes(ready func(context.Context) error, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprintln(rw, "ok") })
	mux.HandleFunc("GET /readyz", func(rw http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 900*time.Millisecond) // the kubelet's probes time out after 1 s
		defer cancel()
		if err := ready(ctx); err != nil {
			http.Error(rw, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(rw, "ok")
	})
	mux.Handle("GET /metrics", metrics)
	return mux
}
