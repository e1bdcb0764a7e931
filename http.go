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

// maxBody is more than any AdmissionReview: etcd refuses objects over 1.5 MiB, and a review may hold two.
const maxBody = 4 << 20

// What all that call the webhook may use of it at once. Where there is more, the oldest goes: an API server uses its connections again
// and again, and its requests take milliseconds, so that it is seldom among those.
const (
	maxUnauthenticated = 512       // connections on which nobody has known the path yet
	maxAuthenticated   = 512       // other connections
	maxRequests        = 5120      // that are being read, decided on or answered
	maxBodies          = 24 << 20  // bytes of their bodies, of each at most smallBody
	maxStreams         = 100       // of an HTTP/2 connection
	frameSize          = 16 << 10  // of HTTP/2, and what a stream may send before it is read
	windowSize         = 128 << 10 // what all streams of a connection may
	maxHeaderSize      = 16 << 10

	// unauthenticatedBytes are what a connection may send, with TLS and all, before somebody on it has known the path.
	unauthenticatedBytes = 96 << 10 // more than what may come with the first request

	// restTime is for how long a new connection of a caller waits until the oldest has not been used for as long, and has to go. It is longer
	// than a request takes where all are busy: so hardly one is cut off that has one under way, unless thousands wait for Redis.
	restTime = time.Second

	// refusalTime is what an answer has to get away before the connection is closed.
	refusalTime = 50 * time.Millisecond

	// A body of more than smallBody bytes, or smallObjects JSON objects, which take more memory than their text, is large: it waits until it
	// is one of maxLarge, until its pod is decided on, and one of maxDecoded, until it is decoded. It has largeBodyTime to arrive. One of
	// more than maxObjects is refused.
	smallBody     = 32 << 10
	smallObjects  = 1000
	maxObjects    = 50000
	maxLarge      = 8
	maxDecoded    = 2
	largeBodyTime = 2 * time.Second
)

// errEvicted is why a request is given up that was begun long ago.
var errEvicted = errors.New("too many requests at once, of which this is the oldest: try again")

// bounds are what the callers of a server use of it.
type bounds struct {
	unauthenticated, authenticated, requests evictingSet
	large, decoded                           slots    // for large bodies
	connections                              sync.Map // net.Conn -> *httpConnection
}

func newBounds() *bounds {
	return &bounds{unauthenticated: evictingSet{most: maxUnauthenticated}, authenticated: evictingSet{most: maxAuthenticated}, requests: evictingSet{most: maxRequests, mostBytes: maxBodies},
		large: make(slots, maxLarge), decoded: make(slots, maxDecoded)}
}

// httpConnection is one to a server with bounds.
type httpConnection struct {
	net.Conn
	bounds *bounds

	counted *countedConn // nil in a test

	mu            sync.Mutex
	closed        bool
	authenticated bool   // one who knows the path has used it
	leave         func() // its crowd
}

type connectionKey struct{}

// apply makes a server keep the bounds.
func (b *bounds) apply(s *http.Server) {
	s.MaxHeaderBytes = maxHeaderSize
	s.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: maxStreams, MaxReadFrameSize: frameSize, MaxReceiveBufferPerConnection: windowSize, MaxReceiveBufferPerStream: frameSize}
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

// end closes the connection, without waiting for the other side.
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

// used notes that a caller who knows the path has used the connection. The first time, it waits for its turn while all others are busy.
func (c *httpConnection) used(ctx context.Context) {
	if c.counted != nil {
		c.counted.trusted.Store(true)
	}
	c.mu.Lock()
	known := c.authenticated
	c.mu.Unlock()
	if !known {
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

// refuseMore ends the connection of a request, unless a caller who knows the path has used it: who does not has nothing to ask.
func refuseMore(r *http.Request) {
	if c, ok := r.Context().Value(connectionKey{}).(*httpConnection); ok && c.counted != nil {
		c.counted.refused.Store(true)
	}
}

// countingListener counts what comes on each connection.
type countingListener struct{ net.Listener }

func (l countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &countedConn{Conn: conn}, nil
}

// countedConn fails when more than unauthenticatedBytes have come, or somebody on it was refused, unless somebody is trusted.
type countedConn struct {
	net.Conn
	trusted atomic.Bool
	refused atomic.Bool
	read    int // by one reader at a time
}

func (c *countedConn) Read(b []byte) (int, error) {
	if c.trusted.Load() {
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

// errTooMuch is why a connection is closed.
var errTooMuch = errors.New("too much was sent by a client that does not know the path")

// begin is for a request of a caller who knows the path: it is one of those that may be given up. The context ends when it is; done has
// to be called at its end.
func (b *bounds) begin(rw http.ResponseWriter, r *http.Request) (ctx context.Context, done func()) {
	ctx, giveUp := context.WithCancelCause(r.Context())
	var mu sync.Mutex
	over := false
	leave := b.requests.add(bytesInHand(r), func() {
		mu.Lock()
		defer mu.Unlock()
		giveUp(errEvicted)
		if control := http.NewResponseController(rw); !over { // they fail where there are none, as in a test
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
		giveUp(nil)
	}
}

// bytesInHand is how many bytes of a request's body are read before it is known to be large.
func bytesInHand(r *http.Request) int {
	if r.ContentLength < 0 { // it does not say
		return smallBody
	}
	return int(min(r.ContentLength, smallBody))
}

// readJSON reads the JSON body of a POST, within the bounds, and decodes it. release has to be called once the decoded value is
// needed no longer. Its errors are *badRequest, and those of decode.
func (b *bounds) readJSON(ctx context.Context, rw http.ResponseWriter, r *http.Request, decode func(text []byte) error) (release func(), err error) {
	release = func() {}
	if r.Method != http.MethodPost {
		return release, &badRequest{http.StatusMethodNotAllowed, fmt.Sprintf("method %s is not allowed: POST an AdmissionReview", r.Method)}
	}
	contentType := r.Header.Get("Content-Type")
	if media, _, err := mime.ParseMediaType(contentType); err != nil || media != "application/json" {
		return release, &badRequest{http.StatusUnsupportedMediaType, fmt.Sprintf("Content-Type is %s: it must be application/json", quoteShort(contentType))}
	}
	tooLarge := &badRequest{http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is larger than %d bytes", maxBody)}
	if r.ContentLength > maxBody {
		return release, tooLarge
	}
	var buffer bytes.Buffer
	limited := http.MaxBytesReader(rw, r.Body, maxBody)
	buffer.Grow(bytesInHand(r) + bytes.MinRead)
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
		_ = control.SetReadDeadline(time.Now().Add(largeBodyTime)) // fails where there is none, as in a test
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
		return release, &badRequest{http.StatusRequestEntityTooLarge, fmt.Sprintf("the body has %d objects: at most %d are decoded", n, maxObjects)}
	}
	return release, decode(buffer.Bytes())
}

// objects is how many JSON objects a text has, at most.
func objects(text []byte) int { return bytes.Count(text, []byte("{")) }

// badRequestsLogged is how many lines about bad requests and connections are logged in each logEvery.
const badRequestsLogged = 10

// httpErrors logs what a server of net/http has to say.
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
		e.log.Warn("a connection or request failed", "error", strings.TrimSpace(string(line)), "notLoggedBefore", dropped)
	}
	return len(line), nil
}

// evictingSet is a number of things that come and go. If there are more than so many, or they have more bytes than all may, the oldest have to
// go.
type evictingSet struct {
	most, mostBytes int

	mu    sync.Mutex
	all   list.List // of *entry, the oldest first
	bytes int       // of all
}

// entry is one of a crowd: since when, how many bytes it has, and what makes it go.
type entry struct {
	since time.Time
	bytes int
	evict func()
}

// add adds one. leave has to be called once it is gone, whatever the reason.
func (c *evictingSet) add(bytes int, goAway func()) (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.all.PushBack(&entry{time.Now(), bytes, goAway})
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

// remove takes one out, unless it is not there any more.
func (c *evictingSet) remove(e *list.Element) *entry {
	m := c.all.Remove(e).(*entry)
	c.bytes -= m.bytes
	m.bytes = 0
	return m
}

// waitForRoom waits until one more would make nobody go who has joined less than restTime ago; for restTime at most, or until ctx is done.
func (c *evictingSet) waitForRoom(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, restTime)
	defer cancel()
	for {
		wait := c.untilRested()
		if wait <= 0 || sleep(ctx, wait) != nil {
			return
		}
	}
}

// untilRested is how long it takes until the oldest of a crowd that is full has joined restTime ago.
func (c *evictingSet) untilRested() time.Duration {
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

// newHealthServer serves /healthz, /readyz and /metrics over plain HTTP, within bounds of its own.
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

// newHealthRoutes are the routes of a health server. ready returns why the process is not ready.
func newHealthRoutes(ready func(context.Context) error, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprintln(rw, "ok") })
	mux.HandleFunc("GET /readyz", func(rw http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 900*time.Millisecond) // kubelet's probes give up after 1 s
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
