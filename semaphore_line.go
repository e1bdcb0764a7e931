package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

// A waiter asks again when it is called, and after a while in any case: that is how it keeps its place, how a call that went
// lost costs no more than seconds, and how stale tokens are reclaimed where nobody else asks.
const (
	pollLeast = 2 * time.Second
	pollMost  = 4 * time.Second

	// pollFirst is the longest wait of the first in line. Should its connections have fallen silent, it hears no call, and its next
	// question costs it an attemptTimeout; all in all it is not more than four seconds late.
	pollFirst = 1800 * time.Millisecond

	// pollAhead is the wait where a token is free, and those ahead have yet to come for it.
	pollAhead = time.Second

	// askTimeout bounds a question of a waiter, with what it repairs. It does not wait for a repair longer than pollMost after it has
	// asked: it has to go on asking, as Redis would take a silence of all that wait for one of its own.
	askTimeout = 6 * time.Second

	// subscribePatience is for how long a waiter tries to be reachable before it joins the line.
	subscribePatience = 2 * time.Second

	// Everybody asks at once when a token goes stale, within this time.
	staleJitter = 500 * time.Millisecond

	// logMoved is how often a waiter logs that it waits, if it has moved up meanwhile; see logEvery.
	logMoved = 5 * time.Second
)

// errKeptRepairing says that a repair was done and has not helped.
var errKeptRepairing = errors.New("other processes kept repairing it, or their pods took what was there")

// waiter gets a token for a pod, however long it takes.
type waiter struct {
	semaphores *semaphores
	id         semaphoreID
	token      string
	pod        podName
	length     int
	expiration time.Duration
	say        func(string) // is told what is waited for
	log        *slog.Logger

	logged         time.Time // that it waits
	loggedPosition int
	limit          logLimiter // of lines about why there is no token yet
}

// wait returns when the token is in flight: when Redis was asked that said so, and whether the waiter stood in line before; or the
// error of ctx. In the latter case the caller has to release the token, which may be in line, or in flight.
func (w *waiter) wait(ctx context.Context) (asked time.Time, inLine bool, err error) {
	asked, a, err := w.try(ctx, "")
	if err == nil && a.status == acquireTaken {
		return asked, false, nil
	}
	if err != nil {
		w.fail(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	calls := w.listen(ctx) // first, so as to hear of what happens once it is in line
	if err := calls.waitFor(ctx, subscribePatience); err != nil {
		return asked, false, err
	}
	asked, err = w.stand(ctx, calls)
	return asked, true, err
}

// stand joins the line and stands in it until the token is in flight, or ctx is done.
func (w *waiter) stand(ctx context.Context, calls *calls) (asked time.Time, err error) {
	arrival := joinLine
	for retry := w.newBackoff(); ; {
		asked, a, err := w.try(ctx, arrival)
		pause := w.untilPoll(a)
		switch {
		case ctx.Err() != nil:
			return asked, ctx.Err()
		case err != nil:
			w.fail(err)
			pause = retry.next()
			if a.status == acquireRepair { // Redis has answered
				pause = min(pause, max(0, time.Until(asked.Add(pollMost))))
			}
		case a.status == acquireTaken:
			return asked, nil
		default:
			arrival, retry = a.place.arrival, w.newBackoff()
			if !a.place.reachable {
				calls.redial()
			}
			w.tell(a)
		}
		if err := calls.waitFor(ctx, pause); err != nil {
			return asked, err
		}
	}
}

func (w *waiter) newBackoff() *backoff { return newBackoff(250*time.Millisecond, pollMost) }

// try asks for the token, and if something is to be repaired first, repairs it and asks again. asked is when it asked last.
func (w *waiter) try(ctx context.Context, arrival string) (asked time.Time, a answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	q := question{w.token, w.length, arrival, w.pod}
	for repaired := false; ; repaired = true {
		asked = time.Now()
		a, err = w.semaphores.ask(ctx, w.id, q)
		if err != nil || a.status != acquireRepair {
			return asked, a, err
		}
		if repaired {
			return asked, a, fmt.Errorf("acquire %s: %w", w.id, errKeptRepairing)
		}
		if err := w.repair(ctx, asked, q); err != nil {
			return asked, a, err
		}
	}
}

// repair repairs the semaphore for a question that was asked, and does not keep the next one from being asked in time; what it has
// begun goes on.
func (w *waiter) repair(ctx context.Context, asked time.Time, q question) error {
	ctx, cancel := context.WithDeadline(ctx, asked.Add(pollMost))
	defer cancel()
	return w.semaphores.repair(ctx, w.id, w.length, w.expiration, q.newcomer())
}

// fail says why there is no token yet.
func (w *waiter) fail(err error) {
	w.say(err.Error())
	if _, ok := w.limit.allow(); ok {
		w.log.Warn("no token yet, to be retried", "error", err.Error())
	}
}

// untilPoll is how long a waiter waits for a call. Those at the front do not sleep past the moment at which a token goes
// stale.
func (w *waiter) untilPoll(a answer) time.Duration {
	poll := pollLeast + rand.N(pollMost-pollLeast)
	if a.place.position > w.length {
		return poll
	}
	if a.place.position == 1 {
		poll = pollFirst/2 + rand.N(pollFirst/2)
	}
	if a.inUse < w.length { // kept for those ahead, unless they are gone
		poll = min(poll, pollAhead)
	}
	return max(min(poll, a.place.staleIn+rand.N(staleJitter)), 50*time.Millisecond)
}

// tell says where the waiter stands, and logs it if it is news.
func (w *waiter) tell(a answer) {
	text := waitingText(w.id, w.length, a)
	w.say(text)
	since := time.Since(w.logged)
	if since > logEvery || a.place.position != w.loggedPosition && since > logMoved {
		w.log.Info(text)
		w.logged, w.loggedPosition = time.Now(), a.place.position
	}
}

// waitingText says what a waiter waits for.
func waitingText(id semaphoreID, length int, a answer) string {
	text := fmt.Sprintf("waiting for a token of %s: %d of %d in use, %s in line, %s", id, a.inUse, length, ordinal(a.place.position), roughly(a.place.waited))
	if by := byHolders(a.holders, a.inUse); by != "" {
		text += "; in use " + by
	}
	return text + inDoubt(a.doubt)
}

// inDoubt says why nobody gets what seems to be free.
func inDoubt(doubt time.Duration) string {
	if doubt <= 0 {
		return ""
	}
	return fmt.Sprintf("; Redis was away or has lost data, in %s it is known who is gone", roughly(doubt))
}

// yourTurn is the message to a waiter for which a token is free; see semaphore.lua.
const yourTurn = "your turn"

// calls are what a waiter hears from Redis.
type calls struct {
	ring chan struct{}

	mu    sync.Mutex
	conn  redis.Conn // while it is subscribed
	since time.Time
}

// waitFor waits for a call, but no longer than d. Its error is that of ctx.
func (c *calls) waitFor(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c.ring:
		return nil
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *calls) subscribed(conn redis.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn, c.since = conn, time.Now()
}

// redial is for a subscription that is no good: the server has forgotten it, or is another one by now.
func (c *calls) redial() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil && time.Since(c.since) > time.Second {
		c.conn.Close()
	}
}

// listen subscribes to the waiter's channel until ctx is done. To be subscribed counts as a call: what happened before was not
// heard.
func (w *waiter) listen(ctx context.Context) *calls {
	c := &calls{ring: make(chan struct{}, 1)}
	go hearAgain(ctx, w.log, func() error { return w.hear(ctx, c) })
	return c
}

// hearAgain listens by hear, which returns when the subscription fails, until ctx is done.
func hearAgain(ctx context.Context, log *slog.Logger, hear func() error) {
	var limit logLimiter
	for retry := newBackoff(250*time.Millisecond, pollMost); ; {
		start := time.Now()
		err := hear()
		if ctx.Err() != nil {
			return
		}
		if time.Since(start) > 2*pollMost {
			retry = newBackoff(250*time.Millisecond, pollMost)
		}
		if _, ok := limit.allow(); ok {
			log.Warn("cannot be called when a token comes free, asks every few seconds", "error", err.Error())
		}
		if sleep(ctx, retry.next()) != nil {
			return
		}
	}
}

// dialToHear connects to the server on which is heard what the scripts of a semaphore say. The connection is closed when ctx is done.
func dialToHear(ctx context.Context, q queue, id semaphoreID) (redis.Conn, *queueServer, error) {
	server, err := q.find(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	conn, err := server.pool.DialContext(ctx) // not the pool's: it would keep it
	if err != nil {
		return nil, nil, fmt.Errorf("connect to %s: %w", server, err)
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	return conn, server, nil
}

// hear subscribes and passes on each call until the connection fails or ctx is done.
func (w *waiter) hear(ctx context.Context, c *calls) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, server, err := dialToHear(ctx, w.semaphores.queue, w.id)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer c.subscribed(nil)
	subscription := redis.PubSubConn{Conn: conn}
	if err := subscription.Subscribe(w.id.channel(w.token)); err != nil {
		return fmt.Errorf("%s: subscribe: %w", server, err)
	}
	for {
		switch message := subscription.ReceiveWithTimeout(0).(type) {
		case error:
			return fmt.Errorf("%s: subscription: %w", server, message)
		case redis.Subscription:
			c.subscribed(conn)
		case redis.Message:
			if string(message.Data) != yourTurn {
				continue
			}
		}
		select {
		case c.ring <- struct{}{}:
		default:
		}
	}
}

// gateCalls is one subscription for all pods that a process stands in line for.
type gateCalls struct {
	queue queue
	log   *slog.Logger

	mu       sync.Mutex
	channels map[string]*gateCall // by name
	conn     *redis.PubSubConn    // nil while there is none
}

// gateCall is the channel of one pod.
type gateCall struct {
	line  *gateLine
	token string
	heard time.Time // since when it is subscribed; zero while it is not
}

// subscribeMost is how many channels one command subscribes to.
const subscribeMost = 500

func newGateCalls(q queue, log *slog.Logger) *gateCalls {
	return &gateCalls{queue: q, log: log, channels: map[string]*gateCall{}}
}

// add subscribes to the channels of pods, which are given by their tokens.
func (c *gateCalls) add(line *gateLine, tokens []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var names []any
	for _, token := range tokens {
		name := line.id.channel(token)
		c.channels[name] = &gateCall{line: line, token: token}
		names = append(names, name)
	}
	c.send(names, (*redis.PubSubConn).Subscribe)
}

func (c *gateCalls) remove(line *gateLine, tokens []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var names []any
	for _, token := range tokens {
		name := line.id.channel(token)
		delete(c.channels, name)
		names = append(names, name)
	}
	c.send(names, (*redis.PubSubConn).Unsubscribe)
}

// send sends a command for channels on the connection, if there is one; if it fails, the connection ends.
func (c *gateCalls) send(names []any, command func(*redis.PubSubConn, ...any) error) {
	for some := range slices.Chunk(names, subscribeMost) {
		if c.conn == nil {
			return
		}
		if err := command(c.conn, some...); err != nil {
			c.conn.Close()
			return
		}
	}
}

// redial is for a channel on which Redis reaches nobody: the subscription is no good, or on a server that is another one by now.
func (c *gateCalls) redial(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call, ok := c.channels[name]
	if ok && c.conn != nil && !call.heard.IsZero() && time.Since(call.heard) > time.Second {
		c.conn.Close()
	}
}

// run listens until ctx is done.
func (c *gateCalls) run(ctx context.Context) {
	hearAgain(ctx, c.log, func() error { return c.hear(ctx) })
}

// hear subscribes to all channels and passes on the calls, until the connection fails or ctx is done.
func (c *gateCalls) hear(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, server, err := dialToHear(ctx, c.queue, sideID) // in a Cluster, each node hears what is said on any
	if err != nil {
		return err
	}
	defer conn.Close()
	subscription := &redis.PubSubConn{Conn: conn}
	c.connected(subscription)
	defer c.connected(nil)
	for {
		switch message := subscription.ReceiveWithTimeout(0).(type) {
		case error:
			return fmt.Errorf("%s: subscription: %w", server, message)
		case redis.Subscription:
			if message.Kind == "subscribe" {
				c.pass(message.Channel, "")
			}
		case redis.Message:
			c.pass(message.Channel, string(message.Data))
		}
	}
}

// connected notes the connection, and subscribes to all channels.
func (c *gateCalls) connected(subscription *redis.PubSubConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = subscription
	var names []any
	for name, call := range c.channels {
		call.heard = time.Time{}
		names = append(names, name)
	}
	c.send(names, (*redis.PubSubConn).Subscribe)
}

// pass passes on what was heard on a channel. To be subscribed counts as a call of the line: what happened before was not heard.
func (c *gateCalls) pass(name, message string) {
	c.mu.Lock()
	call, ok := c.channels[name]
	if ok && message == "" {
		call.heard = time.Now()
	}
	c.mu.Unlock()
	switch {
	case !ok:
	case message == "":
		call.line.wake()
	case message == yourTurn:
		call.line.call(call.token)
	}
}
