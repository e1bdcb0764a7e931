package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// semaphoreID names a semaphore: a namespace, and the key that its pods share.
type semaphoreID struct{ namespace, key string }

func (id semaphoreID) String() string { return id.namespace + "/" + id.key }

// The keys in Redis. The braces are a Redis Cluster hash tag: all keys of a script lie in one slot.
func (id semaphoreID) queueKey() string    { return "queue/{" + id.String() + "}" }
func (id semaphoreID) inflightKey() string { return "inflight/{" + id.String() + "}" }
func (id semaphoreID) waitersKey() string  { return "waiters/{" + id.String() + "}" }
func (id semaphoreID) seenKey() string     { return "seen/{" + id.String() + "}" }
func (id semaphoreID) namesKey() string    { return "names/{" + id.String() + "}" }
func (id semaphoreID) stateKey() string    { return "state/{" + id.String() + "}" }
func (id semaphoreID) lockKey() string     { return "lock/{" + id.String() + "}" }

// channel is where a waiter is called when a token is free for it.
func (id semaphoreID) channel(token string) string { return id.waitersKey() + "/" + token }

// keys are those of the scripts, in their order.
func (id semaphoreID) keys() []any {
	return []any{id.queueKey(), id.inflightKey(), id.waitersKey(), id.seenKey(), id.namesKey(), id.stateKey()}
}

// queueKind is how the queue's Redis outlives a failure.
type queueKind int

const (
	queueServerAlone queueKind = iota // one server, or an address behind which a provider puts the primary
	queueSentinel                     // the primary that Sentinels name
	queueCluster                      // a Redis Cluster
)

// queueAddress is where the queue's Redis is found.
type queueAddress struct {
	kind    queueKind
	servers []string // HOST:PORT with the scheme of one server: the server, the Sentinels, or some nodes of the Cluster
	name    string   // of the primary, for the Sentinels
	text    string   // as in the flag
}

func (a queueAddress) String() string { return a.text }

// scheme is that of the servers: "", "redis://" or "rediss://".
func (a queueAddress) scheme() string {
	scheme, _, found := strings.Cut(a.servers[0], "://")
	if !found {
		return ""
	}
	return scheme + "://"
}

// tokenServers is the Redis that holds the tokens: one server, a Sentinel group or a Cluster. It knows which server to ask, and learns it
// anew when that one fails.
type tokenServers interface {
	// find returns the server that holds a semaphore. Its errors are errUnreached, or ctx's.
	find(ctx context.Context, id semaphoreID) (*queueServer, error)

	// failed is told why a server has not run a command: what it answered, or that it did not.
	failed(server *queueServer, id semaphoreID, err error)

	// at returns the server of an address, as a Cluster names it in its answers.
	at(address string) *queueServer

	// primaries are all servers that take writes: all semaphores are on them.
	primaries(ctx context.Context) ([]*queueServer, error)

	// part names the part of the queue that a semaphore is in: all of a part fails, and comes back, together.
	part(id semaphoreID) int

	// checks are semaphores that no pod can have, on which to try whether the queue takes writes: if one works, some pods are served.
	checks() []semaphoreID

	close() error
}

// newTokenServers makes the queue of an address. maxIdle is how many idle connections are kept to each server; a process that keeps
// several looks every second whether a Sentinel group has another primary by now.
func newTokenServers(address queueAddress, settings redisSettings, maxIdle int, log *slog.Logger) tokenServers {
	if address.kind != queueServerAlone { // whose name a provider may move to another address at any time
		settings.resolver = newResolver()
	}
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
	left    atomic.Bool // the queue has another server now, and the pool is closed

	asking, repairing slots // of this process, for its semaphores
}

func newQueueServer(address string, settings redisSettings, maxIdle int) *queueServer {
	return &queueServer{address: address, pool: newRedisPool(address, settings, maxIdle, redisReadTimeout),
		asking: make(slots, maxAsking), repairing: make(slots, maxRepairing)}
}

func (s *queueServer) String() string { return "queue Redis " + s.address }

func (s *queueServer) close() error {
	s.left.Store(true)
	return s.pool.Close()
}

// oneServer is a queue of one server, or of an address behind which another may be at any time.
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

// sideTimeout bounds a question to the queue that an answer does not depend on.
const sideTimeout = 300 * time.Millisecond

// runCommand sends a command that is about no semaphore of a pod, once, and no longer than sideTimeout.
func runCommand(ctx context.Context, q tokenServers, command string, args ...any) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, sideTimeout)
	defer cancel()
	server, err := q.find(ctx, sideID)
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

// sideID is a semaphore that no pod can have, whose keys are for all else that is to be known: in a Cluster, they are on one node.
var sideID = semaphoreID{checkID(0).namespace, "side"}

// checkID is a semaphore that no pod can have: there is no such namespace.
func checkID(n int) semaphoreID { return semaphoreID{"-", fmt.Sprintf("check-%d", n)} }

// errUnanswered is in the error of a command that may have been run, as its answer did not come; errUnreached in that of one that
// was not sent, as there was no server to send it to.
var (
	errUnanswered = errors.New("no answer")
	errUnreached  = errors.New("out of reach")
)

// isUnreachable reports whether the error of a connection that was to be made says that the server is away, and may be back, or have
// a successor, in a moment. It is not for one that will not take our certificate or password.
func isUnreachable(err error) bool {
	var network *net.OpError
	return errors.As(err, &network) || errors.Is(err, io.EOF) || errors.Is(err, context.DeadlineExceeded) || isTransient(err)
}

// isTransient reports whether a server answers that it is not, or not yet, or no longer, the one to ask: soon it, or another, may be.
func isTransient(err error) bool {
	var answered redis.Error
	if !errors.As(err, &answered) {
		return false
	}
	code, _, _ := strings.Cut(answered.Error(), " ")
	switch code {
	case "READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN", "MOVED", "ASK":
		return true
	}
	return isPartlyRun(answered)
}

// isPartlyRun reports whether a script was cut off, as a key that it had used up was looked for where its slot is moving to. What it
// has done stays done; it goes on when it is run again.
func isPartlyRun(answered redis.Error) bool {
	return strings.Contains(answered.Error(), "non local key")
}

// discovery finds out which servers there are. One look-up runs at a time, and all that want its result share it.
type discovery struct {
	// look returns nil once it knows more, or ctx's error. It passes each error on the way to note, or nil.
	look func(ctx context.Context, note func(error)) error

	lookups flights[struct{}, struct{}]

	mu      sync.Mutex
	last    error // noted since a look-up succeeded
	closing context.Context
	stop    context.CancelFunc
	all     sync.WaitGroup
}

const (
	// lookupPause is the time between two look-ups.
	lookupPause = 100 * time.Millisecond

	// lookupTimeout bounds a look-up, and with it what a command that fails meanwhile says.
	lookupTimeout = 2 * time.Second

	// askAgain is how long a look-up waits for a server to answer before it asks anew who it is that should.
	askAgain = 500 * time.Millisecond
)

var errQueueClosed = errors.New("this process is stopping")

func newDiscovery(look func(ctx context.Context, note func(error)) error) *discovery {
	closing, stop := context.WithCancel(context.Background())
	d := &discovery{look: look, closing: closing, stop: stop}
	d.lookups.keep, d.lookups.group = lookupPause, &d.all
	return d
}

// start begins a look-up, or joins the one that runs. Its result is nil once the queue is closed.
func (d *discovery) start() *flight[struct{}] {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closing.Err() != nil {
		return nil
	}
	return d.lookups.join(struct{}{}, struct{}{}, func(struct{}) error {
		ctx, cancel := context.WithTimeout(d.closing, lookupTimeout)
		defer cancel()
		err := d.look(ctx, d.note)
		d.mu.Lock()
		defer d.mu.Unlock()
		if err == nil {
			d.last = nil
			return nil
		}
		return d.notFoundLocked(err)
	})
}

// wait waits for the end of a look-up, at most until ctx is done.
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

// noteFailed notes why a command was not run. (One that may have been is another matter.)
func (d *discovery) noteFailed(err error) {
	if !errors.Is(err, errUnanswered) {
		d.note(err)
	}
}

// notFoundLocked is the error of a look-up that has not succeeded, or not yet, and ended for cause. It is errUnreached where the
// servers may be back, or have successors, in a moment.
func (d *discovery) notFoundLocked(cause error) error {
	switch {
	case d.last == nil:
		return fmt.Errorf("%w: %w", errUnreached, cause)
	case isUnreachable(d.last) || errors.Is(d.last, errNotPrimary):
		return fmt.Errorf("%w: %w", errUnreached, d.last)
	}
	return d.last
}

// close ends the look-up that runs, if any; there are no others then.
func (d *discovery) close() {
	d.mu.Lock()
	d.stop()
	d.mu.Unlock()
	d.all.Wait()
}

// errNotPrimary says that a server that should be a primary is not.
var errNotPrimary = errors.New("is not a primary")

// roleChecks ask servers whether they are primaries.
type roleChecks struct {
	settings redisSettings
	asked    map[string]bool
	answers  chan roleAnswer
}

type roleAnswer struct {
	address string
	err     error // nil for a primary
}

func newRoleChecks(settings redisSettings) *roleChecks {
	return &roleChecks{settings, map[string]bool{}, make(chan roleAnswer)}
}

// start asks a server, until ctx is done, unless it is being asked already.
func (c *roleChecks) start(ctx context.Context, address string) {
	if c.asked[address] {
		return
	}
	c.asked[address] = true
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

// wait waits for an answer, and returns who gave it, or an error that says that it is not a primary, or does not answer. After a
// while it returns without one.
func (c *roleChecks) wait(ctx context.Context) (address string, err error) {
	select {
	case a := <-c.answers:
		delete(c.asked, a.address)
		if a.err != nil {
			_ = sleep(ctx, lookupPause)
		}
		return a.address, a.err
	case <-time.After(askAgain):
	case <-ctx.Done():
	}
	return "", nil
}

// fanOut asks several servers at once and passes on their answers, each as it comes, until take returns true or all have answered.
// It returns nil in the first case, else the errors of those that failed, if any. ask has to end when ctx does.
func fanOut[S, A any](ctx context.Context, servers []S, ask func(context.Context, S) (A, error), take func(A) (enough bool)) error {
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

// query sends a command over a connection of its own, which is closed then.
func query(ctx context.Context, address string, settings redisSettings, command string, args ...any) (any, error) {
	conn, err := dialRedis(ctx, address, settings, lookupTimeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.DoContext(ctx, command, args...)
}

// Of each process, at each server of the queue: so many take a token at once, over a connection each, and so many semaphores are repaired.
// The others wait for their turn: hundreds of connections that are opened at once take longer than all of that.
const (
	maxAsking    = 128
	maxRepairing = lockConnections
)

// serverClock estimates the clock of a Redis server, by which commands have their deadlines. The estimate is never ahead of the
// server, unless its clock was set back since: a command that was given up here is late there, too. Where it is behind, the server
// refuses a command and tells the time again.
type serverClock struct {
	mu     sync.Mutex
	micros int64     // what the server said (Unix microseconds); zero: nothing yet
	heard  time.Time // when that was read here
}

// observe takes the time that the server said in an answer that has just been read.
func (c *serverClock) observe(micros int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.micros, c.heard = micros, time.Now()
}

// at is the server's time (Unix microseconds) at a moment here; zero, which is always too late, while the server has said nothing.
func (c *serverClock) at(t time.Time) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.micros == 0 {
		return 0
	}
	return c.micros + t.Sub(c.heard).Microseconds()
}
