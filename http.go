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
	"time"
)

// maxBody is more than any review of a pod that etcd accepts: 1.5 MiB by default. The API
// server escapes < > & and control characters, so six bytes may stand for one: 9 MiB, and
// room for the rest of the review. A review of a creation has one object. While Redis
// hangs, each large body keeps up to maxBody in memory, and each that is read or decoded
// four times that: maxLarge follows.
const maxBody = 10 << 20

// Limits on all clients together. A connection is authenticated once a request on it was.
// Servers with these limits speak HTTP/1.1, as API servers do with webhooks. So they also
// limit the requests in hand.
const (
	maxUnauthenticated = 1024 // beyond that, the oldest is closed
	maxAuthenticated   = 1024 // beyond that, the one that was idle longest is closed
	maxHeaderSize      = 16 << 10

	// A body is large if it has more than smallBody bytes, or more than smallObjects JSON
	// objects, which take more memory than their text. At most maxLarge are held, each
	// until its pod is decided; others wait. A body must arrive within bodyTime, the rest of
	// a large one within largeBodyTime.
	// A body of more than maxObjects is refused.
	smallBody     = 32 << 10
	smallObjects  = 1000
	maxObjects    = 50000
	maxLarge      = 2
	bodyTime      = 10 * time.Second
	largeBodyTime = 2 * time.Second
)

// bounds limits what the clients of a server use.
type bounds struct {
	large slots // for large bodies

	mu                             sync.Mutex
	connections                    map[net.Conn]*httpConnection
	unauthenticated, authenticated list.List // of *httpConnection, those first that had no request for longest
}

func newBounds() *bounds {
	return &bounds{large: make(slots, maxLarge), connections: map[net.Conn]*httpConnection{}}
}

// httpConnection is an open connection of a client.
type httpConnection struct {
	net.Conn
	in    *list.List // unauthenticated or authenticated
	place *list.Element
	busy  bool // it has a request in hand
}

type connectionKey struct{}

// apply sets the bounds of a server.
func (b *bounds) apply(s *http.Server) {
	s.MaxHeaderBytes = maxHeaderSize
	s.Protocols = new(http.Protocols)
	s.Protocols.SetHTTP1(true)
	s.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, connectionKey{}, conn)
	}
	s.ConnState = b.note
}

// note follows the states of a connection.
func (b *bounds) note(conn net.Conn, state http.ConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if state == http.StateNew {
		c := &httpConnection{Conn: conn}
		b.connections[conn] = c
		c.enter(&b.unauthenticated)
		if b.unauthenticated.Len() > maxUnauthenticated {
			b.unauthenticated.Front().Value.(*httpConnection).end()
		}
		return
	}
	c := b.connections[conn]
	c.busy = state == http.StateActive
	switch state {
	case http.StateIdle:
		c.in.MoveToBack(c.place)
	case http.StateClosed:
		c.in.Remove(c.place)
		delete(b.connections, conn)
	}
}

// enter appends the connection to a list.
func (c *httpConnection) enter(l *list.List) { c.in, c.place = l, l.PushBack(c) }

// end closes the connection without waiting for the client.
func (c *httpConnection) end() {
	c.in.Remove(c.place)
	raw := c.Conn
	if t, ok := raw.(*tls.Conn); ok {
		raw = t.NetConn()
	}
	go raw.Close()
}

// noteAuthenticated notes that the client of the request is known. If there are too many
// known ones, it closes the one that was idle longest, or fails if all are busy.
func (b *bounds) noteAuthenticated(r *http.Request) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	conn, _ := r.Context().Value(connectionKey{}).(net.Conn)
	c := b.connections[conn]
	if c == nil || c.in == &b.authenticated { // nil: evicted, or in a test
		return nil
	}
	if b.authenticated.Len() >= maxAuthenticated {
		idle := b.authenticated.Front()
		for idle != nil && idle.Value.(*httpConnection).busy {
			idle = idle.Next()
		}
		if idle == nil {
			return &badRequest{http.StatusServiceUnavailable, "too many requests at once: try again"}
		}
		idle.Value.(*httpConnection).end()
	}
	c.in.Remove(c.place)
	c.enter(&b.authenticated)
	return nil
}

// open returns the number of open connections.
func (b *bounds) open() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.connections)
}

// readJSON reads the JSON body of an authenticated POST within the bounds and decodes it.
// The caller must call release when it no longer needs the decoded value. Its errors are
// *badRequest, and those of decode.
func (b *bounds) readJSON(ctx context.Context, rw http.ResponseWriter, r *http.Request,
	decode func(text []byte) error) (release func(), err error) {
	release = func() {}
	if err := b.noteAuthenticated(r); err != nil {
		return release, err
	}
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
	if r.ContentLength > 0 {
		buffer.Grow(int(min(r.ContentLength, smallBody)) + bytes.MinRead)
	}
	control := http.NewResponseController(rw)
	_, failed := io.CopyN(&buffer, limited, smallBody)
	more := failed == nil
	if more || objects(buffer.Bytes()) > smallObjects {
		if release, err = b.large.take(ctx); err != nil {
			return release, &badRequest{http.StatusServiceUnavailable, "large requests: " + err.Error()}
		}
	}
	if more {
		if r.ContentLength > 0 {
			buffer.Grow(int(r.ContentLength) - buffer.Len() + bytes.MinRead)
		}
		_ = control.SetReadDeadline(time.Now().Add(largeBodyTime)) // fails without a connection, as in a test
		_, failed = buffer.ReadFrom(limited)
	}
	if failed == nil || failed == io.EOF {
		_ = control.SetReadDeadline(time.Time{}) // else the request's context would end with the deadline
	}
	var over *http.MaxBytesError
	switch n := objects(buffer.Bytes()); {
	case errors.As(failed, &over):
		return release, tooLarge
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
// not ready, or a warning if it is.
func newHealthRoutes(ready func(context.Context) (warning string, err error), metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprintln(rw, "ok") })
	mux.HandleFunc("GET /readyz", func(rw http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 900*time.Millisecond) // the kubelet's probes time out after 1 s
		defer cancel()
		warning, err := ready(ctx)
		if err != nil {
			http.Error(rw, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(rw, strings.TrimSpace("ok\n"+warning))
	})
	mux.Handle("GET /metrics", metrics)
	return mux
}
