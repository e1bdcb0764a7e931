package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// semaphoreID names a semaphore: a namespace, and the key that its pods share.
type semaphoreID struct{ namespace, key string }

// newSemaphoreID returns the semaphore that a pod of a namespace names by a key.
func newSemaphoreID(namespace, key string) semaphoreID {
	if shares, ok := strings.CutPrefix(key, shared); ok {
		return semaphoreID{shared, shares}
	}
	return semaphoreID{namespace, key}
}

// parseSemaphoreID reads what String writes; ok is false if that is no name of a
// semaphore.
func parseSemaphoreID(text string) (id semaphoreID, ok bool) {
	if strings.HasPrefix(text, shared) {
		id = newSemaphoreID("", text)
	} else {
		id.namespace, id.key, _ = strings.Cut(text, "/")
	}
	return id, id.namespace != "" && checkKey(id.key) == ""
}

// String returns the name for people: NAMESPACE/KEY, or @KEY if it is shared.
func (id semaphoreID) String() string {
	if id.namespace == shared {
		return shared + id.key
	}
	return id.tag()
}

func (id semaphoreID) tag() string { return id.namespace + "/" + id.key }

// The keys in Redis. The braces are a hash tag of Redis Cluster: all keys of a semaphore
// are in one slot.
func (id semaphoreID) queueKey() string    { return "queue/{" + id.tag() + "}" }
func (id semaphoreID) inflightKey() string { return "inflight/{" + id.tag() + "}" }
func (id semaphoreID) waitersKey() string  { return "waiters/{" + id.tag() + "}" }
func (id semaphoreID) seenKey() string     { return "seen/{" + id.tag() + "}" }
func (id semaphoreID) namesKey() string    { return "names/{" + id.tag() + "}" }
func (id semaphoreID) stateKey() string    { return "state/{" + id.tag() + "}" }
func (id semaphoreID) historyKey() string  { return "history/{" + id.tag() + "}" }
func (id semaphoreID) lockKey() string     { return "lock/{" + id.tag() + "}" }

// channel is the Pub/Sub channel of a waiter. Redis publishes to it when a token is free
// for the waiter.
func (id semaphoreID) channel(token string) string { return id.waitersKey() + "/" + token }

// keys returns the KEYS of the scripts, in their order.
func (id semaphoreID) keys() []any {
	return []any{id.queueKey(), id.inflightKey(), id.waitersKey(), id.seenKey(), id.namesKey(), id.stateKey(), id.historyKey()}
}

// queueKind says how the queue's Redis fails over.
type queueKind int

const (
	queueServerAlone queueKind = iota // one server, or a provider's address that leads to the primary
	queueSentinel                     // the primary that Sentinels name
	queueCluster                      // a Redis Cluster
)

// queueAddress is the address of the queue's Redis.
type queueAddress struct {
	kind    queueKind
	servers []string // the server, the Sentinels, or some nodes of the Cluster: [SCHEME]HOST:PORT
	name    string   // the primary's name at the Sentinels
	text    string   // the value of the flag
}

func (a queueAddress) String() string { return a.text }

// scheme returns the scheme of the servers: "", "redis://" or "rediss://".
func (a queueAddress) scheme() string {
	scheme, _, found := strings.Cut(a.servers[0], "://")
	if !found {
		return ""
	}
	return scheme + "://"
}

// tokenServers is the Redis that holds the tokens: one server, a Sentinel group or a
// Cluster. It finds the server of a semaphore, and looks it up again after a failure.
type tokenServers interface {
	// find returns the server that holds a semaphore. Its errors wrap errUnreached, or
	// ctx's error.
	find(ctx context.Context, id semaphoreID) (*queueServer, error)

	// failed reports that a server has not run a command, with its error reply or the
	// reason that there is none.
	failed(server *queueServer, id semaphoreID, err error)

	// at returns the server at an address that a redirection of a Cluster names.
	at(address string) *queueServer

	// primaries returns all servers that take writes. They hold all semaphores.
	primaries(ctx context.Context) ([]*queueServer, error)

	// part identifies the part of the queue that holds a semaphore. A part fails and
	// recovers as a whole.
	part(id semaphoreID) int

	// checks returns semaphores that no pod can have, to test whether the queue takes
	// writes. If one test succeeds, the queue serves some pods.
	checks() []semaphoreID

	close() error
}

// newTokenServers makes the queue of an address. It keeps up to maxIdle idle connections
// to each server. If maxIdle is more than one, it asks Sentinels every second for a new
// primary.
func newTokenServers(address queueAddress, settings redisSettings, maxIdle int, log *slog.Logger) tokenServers {
	switch address.kind {
	case queueSentinel:
		return newSentinelQueue(address, settings, maxIdle, log)
	case queueCluster:
		return newClusterQueue(address, settings, maxIdle, log)
	}
	return oneServer{newQueueServer(address.servers[0], settings, maxIdle)}
}

// queueServer is a Redis server of the queue.
type queueServer struct {
	address string
	pool    *redisPool
	clock   serverClock
	closed  atomic.Bool // the pool is closed: another server has replaced this one, or the queue is closed

	acquires, releases, repairs slots // of this process; see maxAcquires
}

func newQueueServer(address string, settings redisSettings, maxIdle int) *queueServer {
	return &queueServer{
		address:  address,
		pool:     newRedisPool(address, settings, maxIdle, redisReadTimeout),
		acquires: make(slots, maxAcquires),
		releases: make(slots, maxReleases),
		repairs:  make(slots, maxRepairing),
	}
}

func (s *queueServer) String() string { return "queue Redis " + s.address }

func (s *queueServer) close() error {
	s.closed.Store(true)
	return s.pool.Close()
}

// oneServer is a queue of one server, or of a provider's address that may lead to another
// server at any time.
type oneServer struct{ server *queueServer }

func (q oneServer) find(context.Context, semaphoreID) (*queueServer, error) { return q.server, nil }
func (q oneServer) failed(*queueServer, semaphoreID, error)                 {}
func (q oneServer) at(string) *queueServer                                  { return q.server }
func (q oneServer) part(semaphoreID) int                                    { return 0 }
func (q oneServer) checks() []semaphoreID                                   { return []semaphoreID{checkID(0)} }
func (q oneServer) primaries(context.Context) ([]*queueServer, error) {
	return []*queueServer{q.server}, nil
}
func (q oneServer) close() error { return q.server.close() }

// auxiliaryTimeout bounds a query whose result is optional for the caller.
const auxiliaryTimeout = 300 * time.Millisecond

// runCommand sends a command that concerns no semaphore of a pod. It tries once, for at
// most auxiliaryTimeout.
func runCommand(ctx context.Context, q tokenServers, command string, args ...any) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, auxiliaryTimeout)
	defer cancel()
	server, err := q.find(ctx, auxiliaryID)
	if err != nil {
		return nil, err
	}
	conn, err := server.pool.GetContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", server, err)
	}
	defer conn.Close()
	return redis.DoContext(conn, ctx, command, args...)
}

// evicting returns the servers of the queue that may evict keys, with their policy; empty
// if there are none. Its error may be that the user may not ask.
func evicting(ctx context.Context, q tokenServers) (string, error) {
	var found []string
	err := eachInfo(ctx, q, "memory", func(server *queueServer, info string) {
		policy := infoField(info, "maxmemory_policy")
		if infoField(info, "maxmemory") != "0" && policy != "noeviction" && policy != "" {
			found = append(found, fmt.Sprintf("%s (%s)", server.address, policy))
		}
	})
	if len(found) > 0 {
		err = nil
	}
	slices.Sort(found)
	return strings.Join(found, ", "), err
}

// tellsAge returns the refusal if a server of the queue does not tell its age; see the birth
// guard in semaphore.lua. Its error says why that is not known.
func tellsAge(ctx context.Context, q tokenServers) (refusal, err error) {
	err = eachInfo(ctx, q, "server", func(*queueServer, string) {})
	var answered redis.Error
	if errors.As(err, &answered) && !isTransient(answered) {
		return answered, nil
	}
	return nil, err
}

// eachInfo asks each server of the queue for a section of INFO. It passes the answers to
// note, one at a time.
func eachInfo(ctx context.Context, q tokenServers, section string, note func(server *queueServer, info string)) error {
	ctx, cancel := context.WithTimeout(ctx, auxiliaryTimeout)
	defer cancel()
	servers, err := q.primaries(ctx)
	if err != nil {
		return err
	}
	type answer struct {
		server *queueServer
		info   string
	}
	return fanOut(ctx, servers, func(ctx context.Context, server *queueServer) (answer, error) {
		conn, err := server.pool.GetContext(ctx)
		if err != nil {
			return answer{}, err
		}
		defer conn.Close()
		info, err := redis.String(redis.DoContext(conn, ctx, "INFO", section))
		return answer{server, info}, err
	}, func(a answer) (enough bool) {
		note(a.server, a.info)
		return false
	})
}

// infoField returns a field of the answer to INFO; empty if it is missing.
func infoField(info, name string) string {
	_, rest, _ := strings.Cut("\n"+info, "\n"+name+":")
	value, _, _ := strings.Cut(rest, "\r")
	return value
}

// auxiliaryID is a semaphore that no pod can have. Its keys hold all other state, so that a
// Cluster keeps them on one node.
var auxiliaryID = semaphoreID{checkID(0).namespace, "side"}

// checkID returns a semaphore that no pod can have: "-" is no valid namespace.
func checkID(n int) semaphoreID { return semaphoreID{"-", fmt.Sprintf("check-%d", n)} }

var (
	errUnanswered = errors.New("no answer")    // Redis may have run the command
	errUnreached  = errors.New("out of reach") // there was no server to send the command to
)

// isUnreachable reports whether a dial failed because the server is away: it, or a new
// primary, may answer in a moment. It is false if the server refuses our certificate or
// password.
func isUnreachable(err error) bool {
	var network *net.OpError
	return errors.As(err, &network) || errors.Is(err, io.EOF) || errors.Is(err, context.DeadlineExceeded) ||
		isTransient(err)
}

// isTransient reports whether a server answers that it cannot serve the command now: it,
// or another server, may do so soon. That holds while it runs a long script (BUSY), while
// it has too many connections, and until a webhook has loaded the scripts (NOSCRIPT). It
// does not hold for OOM and MISCONF, which last until an administrator makes room in
// memory or on the disk.
func isTransient(err error) bool {
	var answered redis.Error
	if !errors.As(err, &answered) {
		return false
	}
	switch errorCode(answered) {
	case "BUSY", "TRYAGAIN", "MOVED", "ASK", "NOSCRIPT":
		return true
	}
	return isOffDuty(answered) || isPartlyRun(answered)
}

// isPartlyRun reports whether a script ended half-way: it emptied a key, and Redis then
// looked for that key on the node that its slot is moving to. The changes stay, and the
// next run completes them.
func isPartlyRun(answered redis.Error) bool {
	return strings.Contains(answered.Error(), "non local key")
}

// discovery looks up the servers of the queue. One look-up runs at a time, and all
// callers share its result.
type discovery struct {
	// lookUp returns nil once it has found servers, or ctx's error. It passes the errors
	// on the way to note.
	lookUp func(ctx context.Context, note func(error)) error

	lookups flights[struct{}, struct{}]

	mu      sync.Mutex
	last    error // last error since a look-up succeeded
	closing context.Context
	stop    context.CancelFunc
	running sync.WaitGroup
}

const (
	// lookupPause is the shortest time between two look-ups, and between two queries of
	// one.
	lookupPause = 100 * time.Millisecond

	// lookupTimeout bounds a look-up, and a command's wait for it.
	lookupTimeout = 2 * time.Second

	// requeryAfter is the time after which a look-up repeats its queries if a server does not
	// answer.
	requeryAfter = 500 * time.Millisecond
)

var errQueueClosed = errors.New("this process is stopping")

func newDiscovery(lookUp func(ctx context.Context, note func(error)) error) *discovery {
	closing, stop := context.WithCancel(context.Background())
	d := &discovery{lookUp: lookUp, closing: closing, stop: stop}
	d.lookups.keep, d.lookups.group = lookupPause, &d.running
	return d
}

// start begins a look-up, or joins the running one. It returns nil once the queue is
// closed.
func (d *discovery) start() *flight[struct{}] {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closing.Err() != nil {
		return nil
	}
	return d.lookups.join(struct{}{}, struct{}{}, func(struct{}) error {
		ctx, cancel := context.WithTimeout(d.closing, lookupTimeout)
		defer cancel()
		err := d.lookUp(ctx, d.note)
		d.mu.Lock()
		defer d.mu.Unlock()
		if err == nil {
			d.last = nil
			return nil
		}
		return d.notFoundLocked(err)
	})
}

// wait waits for the end of a look-up, until ctx is done.
func (d *discovery) wait(ctx context.Context) error {
	lookup := d.start()
	if lookup == nil {
		return errQueueClosed
	}
	select {
	case <-lookup.done:
		return lookup.err
	case <-ctx.Done():
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.notFoundLocked(ctx.Err())
	}
}

func (d *discovery) note(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.last = err
	}
}

// noteFailed notes why a command was not run. It skips commands that Redis may have run.
func (d *discovery) noteFailed(err error) {
	if !errors.Is(err, errUnanswered) {
		d.note(err)
	}
}

// notFoundLocked returns the error of a look-up that ended for cause, or still runs. It
// wraps errUnreached if the servers, or new primaries, may answer in a moment.
func (d *discovery) notFoundLocked(cause error) error {
	switch {
	case d.last == nil:
		return fmt.Errorf("%w: %w", errUnreached, cause)
	case isUnreachable(d.last) || errors.Is(d.last, errNotPrimary):
		return fmt.Errorf("%w: %w", errUnreached, d.last)
	}
	return d.last
}

// close ends the running look-up, and prevents new ones.
func (d *discovery) close() {
	d.mu.Lock()
	d.stop()
	d.mu.Unlock()
	d.running.Wait()
}

// errNotPrimary means that a server should be a primary, and is not.
var errNotPrimary = errors.New("is not a primary")

// roleChecks ask servers whether they are primaries.
type roleChecks struct {
	settings redisSettings
	pending  map[string]bool // by address
	answers  chan roleAnswer
}

type roleAnswer struct {
	address string
	err     error // nil for a primary
}

func newRoleChecks(settings redisSettings) *roleChecks {
	return &roleChecks{settings, map[string]bool{}, make(chan roleAnswer)}
}

// start asks a server in the background, until ctx is done, unless a query to it is
// pending.
func (c *roleChecks) start(ctx context.Context, address string) {
	if c.pending[address] {
		return
	}
	c.pending[address] = true
	go func() {
		reply, err := redis.Values(query(ctx, address, c.settings, "ROLE"))
		var role string
		if err == nil {
			_, err = redis.Scan(reply, &role)
		}
		if err == nil && role != "master" {
			err = errNotPrimary
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", address, err)
		}
		select {
		case c.answers <- roleAnswer{address, err}:
		case <-ctx.Done():
		}
	}()
}

// wait waits for an answer and returns the server's address. Its error says that the
// server is no primary, or does not answer. After requeryAfter, it returns no address.
func (c *roleChecks) wait(ctx context.Context) (address string, err error) {
	select {
	case a := <-c.answers:
		delete(c.pending, a.address)
		if a.err != nil {
			_ = sleep(ctx, lookupPause)
		}
		return a.address, a.err
	case <-time.After(requeryAfter):
	case <-ctx.Done():
	}
	return "", nil
}

// fanOut asks several servers at once and passes each answer to take as it arrives. It
// returns nil as soon as take returns true. Otherwise it waits for all servers and
// returns their errors, if any. ask must end when ctx does.
func fanOut[S, A any](ctx context.Context, servers []S, ask func(context.Context, S) (A, error),
	take func(A) (enough bool)) error {
	type result struct {
		answer A
		err    error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result, len(servers))
	for _, s := range servers {
		go func() {
			answer, err := ask(ctx, s)
			results <- result{answer, err}
		}()
	}
	var errs serverErrors
	for range servers {
		r := <-results
		if r.err != nil {
			errs = append(errs, r.err)
		} else if take(r.answer) {
			return nil
		}
	}
	if len(errs) > 0 {
		return errs
	}
	return nil
}

// query sends a command over a new connection, and closes it.
func query(ctx context.Context, address string, settings redisSettings, command string, args ...any) (any, error) {
	conn, err := dialRedis(ctx, address, settings, lookupTimeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.DoContext(ctx, command, args...)
}

// Limits per process and server: further operations wait for their turn. To open hundreds
// of connections at once would take longer than the operations do.
const (
	maxAcquires  = 128             // concurrent acquires, each over its own connection
	maxReleases  = 4               // concurrent releases: a slow Redis does not get hundreds
	maxRepairing = lockConnections // concurrent repairs
)

// serverClock estimates the clock of a Redis server, because commands carry deadlines by
// that clock. Unless the server's clock is set back, the estimate is never ahead of it: a
// command that times out here is late there, too. If the estimate is behind, the server
// refuses the command, and its answer has the time.
type serverClock struct {
	mu     sync.Mutex
	micros int64     // the server's time in its last answer (Unix microseconds); zero: no answer yet
	readAt time.Time // when we read that answer
}

// observe notes the server's time from an answer that has just been read.
func (c *serverClock) observe(micros int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.micros, c.readAt = micros, time.Now()
}

// at converts our time t to the server's (Unix microseconds). Before the first answer it
// returns zero, which the server always refuses as late.
func (c *serverClock) at(t time.Time) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.micros == 0 {
		return 0
	}
	return c.micros + t.Sub(c.readAt).Microseconds()
}
