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

	// lineQuiet is the longest time without a command while live waiters are in line. Redis
	// takes a longer silence for a failure of its own.
	lineQuiet = 5 * time.Second

	// linePatience is the silence after which Redis drops a waiter from the line. A live
	// waiter asks within pollMost. Then Redis may be away for lineQuiet unnoticed, and the
	// waiter asks again within pollMost. One more second is for fractions of seconds.
	linePatience = pollMost + lineQuiet + pollMost + time.Second

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
	called := newWakeup()
	calls := newSubscription(w.semaphores.queue, w.id, w.log)
	calls.add(called, w.id, w.token)
	go calls.receiveRetrying(ctx) // before it joins the line, so that no call is missed
	if err := called.waitFor(ctx, subscribePatience); err != nil {
		return asked, false, err
	}
	asked, err = w.stand(ctx, calls, called)
	return asked, true, err
}

// stand joins the line and stands in it until the token is in flight, or ctx is done.
func (w *waiter) stand(ctx context.Context, calls *subscription, called wakeup) (asked time.Time, err error) {
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
				calls.redial(w.id, w.token)
			}
			w.tell(a)
		}
		if err := called.waitFor(ctx, pause); err != nil {
			return asked, err
		}
	}
}

func (w *waiter) newBackoff() *backoff { return newBackoff(250*time.Millisecond, pollMost) }

// try asks for the token, and if something is to be repaired first, repairs it and asks again. asked is when it asked last.
func (w *waiter) try(ctx context.Context, arrival string) (asked time.Time, a acquireReply, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	q := acquireRequest{w.token, w.length, arrival, w.pod}
	for repaired := false; ; repaired = true {
		asked = time.Now()
		a, err = w.semaphores.runAcquire(ctx, w.id, q)
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
func (w *waiter) repair(ctx context.Context, asked time.Time, q acquireRequest) error {
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
func (w *waiter) untilPoll(a acquireReply) time.Duration {
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
func (w *waiter) tell(a acquireReply) {
	text := waitingText(w.id, w.length, a)
	w.say(text)
	since := time.Since(w.logged)
	if since > logEvery || a.place.position != w.loggedPosition && since > logMoved {
		w.log.Info(text)
		w.logged, w.loggedPosition = time.Now(), a.place.position
	}
}

// waitingText says what a waiter waits for.
func waitingText(id semaphoreID, length int, a acquireReply) string {
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

// wakeup wakes a loop; several wakes before it runs are one.
type wakeup chan struct{}

func newWakeup() wakeup { return make(wakeup, 1) }

func (w wakeup) wake() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// call implements subscriber, for a loop that has one token.
func (w wakeup) call(string) { w.wake() }

// waitFor waits for a wake, but no longer than d. Its error is that of ctx.
func (w wakeup) waitFor(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-w:
		return nil
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// subscriber is told what a subscription receives. Its methods must not block.
type subscriber interface {
	// wake is for a channel that has just been subscribed: what was published before was not received.
	wake()
	// call is for a token that is free for the pod of this name.
	call(token string)
}

// subscription receives the calls of Redis for the pods that a process has in line: one for a sidecar, thousands for a gate.
type subscription struct {
	queue tokenServers
	id    semaphoreID // the subscription is on its server; in a Cluster, each node publishes what any of them does
	log   *slog.Logger

	mu       sync.Mutex
	channels map[string]*channel // by name
	conn     *redis.PubSubConn   // nil while there is none
}

// channel is where the scripts call for one token.
type channel struct {
	to    subscriber
	token string
	since time.Time // when it was subscribed; zero while it is not
}

// subscribeMost is how many channels one command subscribes.
const subscribeMost = 500

func newSubscription(q tokenServers, id semaphoreID, log *slog.Logger) *subscription {
	return &subscription{queue: q, id: id, log: log, channels: map[string]*channel{}}
}

// add subscribes the channels of tokens.
func (s *subscription) add(to subscriber, id semaphoreID, tokens ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []any
	for _, token := range tokens {
		name := id.channel(token)
		s.channels[name] = &channel{to: to, token: token}
		names = append(names, name)
	}
	s.send(names, (*redis.PubSubConn).Subscribe)
}

// remove unsubscribes the channels of tokens.
func (s *subscription) remove(id semaphoreID, tokens ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []any
	for _, token := range tokens {
		name := id.channel(token)
		delete(s.channels, name)
		names = append(names, name)
	}
	s.send(names, (*redis.PubSubConn).Unsubscribe)
}

// send sends a command for channels on the connection, if there is one; if it fails, the connection ends.
func (s *subscription) send(names []any, command func(*redis.PubSubConn, ...any) error) {
	for some := range slices.Chunk(names, subscribeMost) {
		if s.conn == nil {
			return
		}
		if err := command(s.conn, some...); err != nil {
			s.conn.Close()
			return
		}
	}
}

// redial ends the connection if the channel of a token has been subscribed for a while. It is for a token whose messages reach
// nobody: the server has forgotten the subscription, or is another one by now.
func (s *subscription) redial(id semaphoreID, token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.channels[id.channel(token)]
	if ok && s.conn != nil && !c.since.IsZero() && time.Since(c.since) > time.Second {
		s.conn.Close()
	}
}

// receiveRetrying receives until ctx is done, over a new connection each time that one fails.
func (s *subscription) receiveRetrying(ctx context.Context) {
	var limit logLimiter
	for retry := newBackoff(250*time.Millisecond, pollMost); ; {
		start := time.Now()
		err := s.receive(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(start) > 2*pollMost {
			retry = newBackoff(250*time.Millisecond, pollMost)
		}
		if _, ok := limit.allow(); ok {
			s.log.Warn("cannot be called when a token comes free, asks every few seconds", "error", err.Error())
		}
		if sleep(ctx, retry.next()) != nil {
			return
		}
	}
}

// receive subscribes all channels and passes on what is published, until the connection fails or ctx is done.
func (s *subscription) receive(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	server, err := s.queue.find(ctx, s.id)
	if err != nil {
		return err
	}
	conn, err := server.pool.DialContext(ctx) // not the pool's: it would keep it
	if err != nil {
		return fmt.Errorf("connect to %s: %w", server, err)
	}
	defer conn.Close()
	context.AfterFunc(ctx, func() { conn.Close() })
	pubsub := &redis.PubSubConn{Conn: conn}
	s.setConnection(pubsub)
	defer s.setConnection(nil)
	for {
		switch message := pubsub.ReceiveWithTimeout(0).(type) {
		case error:
			return fmt.Errorf("%s: subscription: %w", server, message)
		case redis.Subscription:
			if message.Kind == "subscribe" {
				s.pass(message.Channel, "")
			}
		case redis.Message:
			s.pass(message.Channel, string(message.Data))
		}
	}
}

// setConnection notes the connection, and subscribes all channels on it.
func (s *subscription) setConnection(conn *redis.PubSubConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = conn
	var names []any
	for name, c := range s.channels {
		c.since = time.Time{}
		names = append(names, name)
	}
	s.send(names, (*redis.PubSubConn).Subscribe)
}

// pass passes on a message; an empty one says that the channel is subscribed now.
func (s *subscription) pass(name, message string) {
	s.mu.Lock()
	c, ok := s.channels[name]
	if ok && message == "" {
		c.since = time.Now()
	}
	s.mu.Unlock()
	switch {
	case !ok:
	case message == "":
		c.to.wake()
	case message == yourTurn:
		c.to.call(c.token)
	}
}
