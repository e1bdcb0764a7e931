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

// A waiter acquires again when Redis notifies it, and after a few seconds in any case.
// That keeps its place. If a notification is lost, it costs only seconds. If no other
// process acquires, it still reclaims stale tokens.
const (
	pollLeast = 2 * time.Second
	pollMost  = 3 * time.Second

	// lineQuiet is the longest time without a command while live waiters are in line. Redis
	// takes a longer silence for a failure of its own.
	lineQuiet = 5 * time.Second

	// linePatience is the silence after which Redis drops a waiter from the line. A live
	// waiter asks within pollMost. Then Redis may be away for lineQuiet unnoticed, and the
	// waiter asks again within pollMost. One more second is for fractions of seconds.
	linePatience = pollMost + lineQuiet + pollMost + time.Second

	// linePass is the silence after which others pass a waiter, which keeps its place. A
	// live one asks within pollMost, and stall is an outage too short to notice.
	linePass = pollMost + stall
	stall    = 1500 * time.Millisecond

	// pollFirst is the longest wait of the first in line. If its connections fall silent,
	// it gets no notification, and its next acquire takes an attemptTimeout more:
	// together at most four seconds.
	pollFirst = 1800 * time.Millisecond

	// acquireTimeout bounds an acquire of a waiter, with its repair. The waiter does not
	// wait for a repair longer than pollMost after its request: it must keep asking,
	// because Redis takes a silence of all waiters for an outage of its own.
	acquireTimeout = 6 * time.Second

	// subscribePatience is how long a waiter tries to subscribe before it joins the line.
	subscribePatience = 2 * time.Second

	// freeJitter spreads the acquires of waiters when a token may come free.
	freeJitter = 200 * time.Millisecond

	// logMoved is how often a waiter logs its place if that has changed; if not, see
	// logEvery.
	logMoved = 5 * time.Second
)

// errKeptRepairing says that a repair was done and has not helped.
var errKeptRepairing = errors.New("other processes kept repairing it, or their pods took what was there")

// waiter acquires a token for a pod, however long that takes.
type waiter struct {
	semaphores *semaphores
	id         semaphoreID
	token      string
	takenAs    string // the name under which the webhook took the token, or empty; see acquireOnce
	pod        podName
	length     int
	tokens     int // that the pod needs
	headStart  time.Duration
	ahead      int64 // see acquireRequest
	expiration time.Duration
	ends       waitEnd
	setting    setting      // as Redis said it last
	report     func(string) // receives a text that says why the pod waits
	log        *slog.Logger

	logged         time.Time // when it last logged its place
	loggedPosition int
	loggedSetting  string     // the text of what was set then
	limit          logLimiter // of warnings
}

// gaveUpError says that the time of a pod in line was over, and it is out of the line.
type gaveUpError struct{ text string }

func (e *gaveUpError) Error() string { return e.text }

// logBeyond logs that the pod may run, although as many others do as may.
func (w *waiter) logBeyond() {
	w.log.Info("took a token beyond the length: the time in line is over", "waitSeconds", seconds(w.ends.after))
}

// gaveUpPrefix begins the text of each gaveUpError.
const gaveUpPrefix = "gave up after "

func (w *waiter) gaveUp(a acquireReply) *gaveUpError {
	text := fmt.Sprintf(gaveUpPrefix+"%s in line of %s: %s",
		roughly(a.place.waited), w.id, a.setting.inUse(a.inUse, w.length, podsOf(a.holders, a.inUse)))
	if by := byHolders(a.holders, a.inUse); by != "" {
		text += " " + by
	}
	return &gaveUpError{text}
}

// wait returns once the token is in flight. asked is when the successful request was
// sent; inLine reports whether the waiter stood in line before. If ctx is done first,
// wait returns its error. The caller must then release the token, which may be in line or
// in flight. If the error is a *gaveUpError, the caller must release the token once the
// pod knows.
func (w *waiter) wait(ctx context.Context) (asked time.Time, inLine bool, err error) {
	asked, a, err := w.acquireOnce(ctx, "")
	switch {
	case err != nil:
		w.reportError(err)
	case a.status == acquireTaken:
		return asked, false, nil
	case a.status == acquireGaveUp:
		return asked, false, w.gaveUp(a)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wakeup := newWakeup()
	subscription := newSubscription(w.semaphores.queue, w.id, w.log)
	subscription.add(wakeup, w.id, w.token)
	go subscription.receiveRetrying(ctx) // before it joins the line, so that it misses no notification
	if err := wakeup.waitFor(ctx, subscribePatience); err != nil {
		return asked, false, err
	}
	asked, err = w.waitInLine(ctx, subscription, wakeup)
	return asked, true, err
}

// waitInLine joins the line and stays there until the token is in flight, or ctx is done.
func (w *waiter) waitInLine(ctx context.Context, sub *subscription, wakeup wakeup) (asked time.Time, err error) {
	arrival := joinLine
	w.ahead = w.headStart.Microseconds()
	for retry := w.newBackoff(); ; {
		asked, a, err := w.acquireOnce(ctx, arrival)
		pause := untilPoll(a)
		switch {
		case ctx.Err() != nil:
			return asked, ctx.Err()
		case err != nil:
			w.reportError(err)
			pause = retry.next()
			if a.status == acquireRepair { // Redis has answered
				pause = min(pause, max(0, time.Until(asked.Add(pollMost))))
			}
		case a.status == acquireTaken:
			if a.beyond {
				w.logBeyond()
			}
			return asked, nil
		case a.status == acquireGaveUp:
			return asked, w.gaveUp(a)
		default:
			arrival, w.ahead, retry = a.place.arrival, a.place.ahead, w.newBackoff()
			if !a.place.reachable {
				sub.redial(w.id, w.token)
			}
			w.reportPlace(a)
		}
		if err := wakeup.waitFor(ctx, pause); err != nil {
			return asked, err
		}
	}
}

func (w *waiter) newBackoff() *backoff { return newBackoff(250*time.Millisecond, pollMost) }

// acquireOnce acquires the token. If the semaphore needs a repair first, it repairs it
// and acquires again. asked is when the last request was sent. Once Redis says that the
// webhook's token is not there, it is not this pod's, and acquireOnce forgets its name.
func (w *waiter) acquireOnce(ctx context.Context, arrival string) (asked time.Time, a acquireReply, err error) {
	ctx, cancel := context.WithTimeout(ctx, acquireTimeout)
	defer cancel()
	q := acquireRequest{token: w.token, length: w.length, tokens: w.tokens, arrival: arrival, ahead: w.ahead, pod: w.pod,
		takenAs: w.takenAs, limit: w.setting.limit, wait: w.ends}
	for repaired := false; ; repaired = true {
		asked = time.Now()
		a, err = w.semaphores.runAcquire(ctx, w.id, q)
		if err == nil && a.status != acquireTaken {
			w.takenAs = ""
		}
		if err == nil && (a.status == acquireFull || a.status == acquireGaveUp) {
			w.setting.learn(a.setting)
		}
		if err != nil || a.status != acquireRepair {
			return asked, a, err
		}
		if repaired {
			return asked, a, fmt.Errorf("acquire %s: %w", w.id, errKeptRepairing)
		}
		if err := w.repair(ctx, asked, a.newcomer); err != nil {
			return asked, a, err
		}
	}
}

// repair repairs the semaphore for a request sent at asked; for newcomer, see maintain.
// It returns in time for the next request; the repair itself goes on.
func (w *waiter) repair(ctx context.Context, asked time.Time, newcomer bool) error {
	ctx, cancel := context.WithDeadline(ctx, asked.Add(pollMost))
	defer cancel()
	return w.semaphores.repair(ctx, w.id, w.length, w.expiration, newcomer)
}

// reportError reports why there is no token yet.
func (w *waiter) reportError(err error) {
	w.report(err.Error())
	if _, ok := w.limit.allow(); ok {
		w.log.Warn("no token yet, to be retried", "error", err.Error())
	}
}

// untilPoll returns how long a waiter waits for a notification. Waiters at the front wake
// when a token may come free.
func untilPoll(a acquireReply) time.Duration {
	poll := pollLeast + rand.N(pollMost-pollLeast)
	if a.place.position == 1 {
		poll = pollFirst/2 + rand.N(pollFirst/2)
	}
	return max(min(poll, a.place.freeIn+rand.N(freeJitter)), 50*time.Millisecond)
}

// reportPlace reports the waiter's place. It logs a new place, or another length that is
// set, every logMoved, and the same every logEvery.
func (w *waiter) reportPlace(a acquireReply) {
	text := waitingText(w.id, w.length, w.tokens, w.ends, a)
	w.report(text)
	since, set := time.Since(w.logged), a.setting.text()
	isNew := a.place.position != w.loggedPosition || set != w.loggedSetting
	if since > logEvery || isNew && since > logMoved {
		w.log.Info(text)
		w.logged, w.loggedPosition, w.loggedSetting = time.Now(), a.place.position, set
	}
}

// waitingText describes what a waiter waits for.
func waitingText(id semaphoreID, length, tokens int, ends waitEnd, a acquireReply) string {
	text := fmt.Sprintf("%s: %s, %s in line, %s", waitsFor(id, tokens, a.setting.lengthFor(length)),
		a.setting.inUse(a.inUse, length, podsOf(a.holders, a.inUse)), ordinal(a.place.position), roughly(a.place.waited))
	if ends.after > 0 {
		text += " of " + roughly(ends.after)
	}
	text += a.toGo(a.place.position, tokens)
	if by := byHolders(a.holders, a.inUse); by != "" {
		text += "; in use " + by
	}
	return text + doubtText(a.doubt)
}

// toGo says when a pod at a position in line starts, if that is known.
func (o occupancy) toGo(position, tokens int) string {
	if wait, ok := o.startsIn(position, tokens); ok && tokens <= o.length {
		return ", about " + roughly(wait) + " to go"
	}
	return ""
}

// waitsFor begins the text that says what a waiter waits for.
func waitsFor(id semaphoreID, tokens, length int) string {
	switch {
	case tokens <= 1:
		return fmt.Sprintf("waiting for a token of %s", id)
	case tokens > length && length > 0:
		return fmt.Sprintf("waiting for %d tokens of %s, more than the length %d, so that others pass", tokens, id, length)
	}
	return fmt.Sprintf("waiting for %d tokens of %s", tokens, id)
}

// doubtText says why Redis hands out no free tokens.
func doubtText(doubt time.Duration) string {
	if doubt <= 0 {
		return ""
	}
	return fmt.Sprintf("; Redis has just started, was away or has lost data: in %s it knows which holders are gone", roughly(doubt))
}

// yourTurn is the message to a waiter for which a token is free; see semaphore.lua.
const yourTurn = "your turn"

// wakeup wakes a loop. Several wakes before the loop runs count as one.
type wakeup chan struct{}

func newWakeup() wakeup { return make(wakeup, 1) }

func (w wakeup) wake() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// tokenFree implements subscriber, for a loop that has one token.
func (w wakeup) tokenFree(string) { w.wake() }

// waitFor waits for a wake, at most for d. Its error is ctx's.
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

// subscriber receives the events of a subscription. Its methods must not block.
type subscriber interface {
	// wake follows a new subscription of a channel: messages before it were not received.
	wake()
	// tokenFree follows the message of Redis that the waiter of this token can have it
	// now.
	tokenFree(token string)
}

// subscription receives Redis's messages for the waiting pods of a process: one pod for a
// sidecar, thousands for a gate.
type subscription struct {
	queue tokenServers
	id    semaphoreID // selects the server; each node of a Cluster publishes the messages of all nodes
	log   *slog.Logger

	mu       sync.Mutex
	channels map[string]*channel // by name
	conn     *redis.PubSubConn   // nil while there is none
}

// channel is where the scripts publish that a token is free.
type channel struct {
	to    subscriber
	token string
	since time.Time // when it was subscribed; zero before
}

// subscribeMost caps the channels that one command subscribes.
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

// send sends a command for channels, if there is a connection. If the command fails, the
// connection ends.
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

// redial closes the connection if the token's channel was subscribed more than a second
// ago. It follows a message that Redis delivered to no subscriber: the server has
// forgotten the subscription, or another server has taken over.
func (s *subscription) redial(id semaphoreID, token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.channels[id.channel(token)]
	if ok && s.conn != nil && !c.since.IsZero() && time.Since(c.since) > time.Second {
		s.conn.Close()
	}
}

// receiveRetrying receives until ctx is done. Each time that the connection fails, it
// opens another one.
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
			s.log.Warn("not notified of free tokens, asks every few seconds instead", "error", err.Error())
		}
		if sleep(ctx, retry.next()) != nil {
			return
		}
	}
}

// receive subscribes all channels and dispatches messages until the connection fails or
// ctx is done.
func (s *subscription) receive(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	server, err := s.queue.find(ctx, s.id)
	if err != nil {
		return err
	}
	conn, err := server.pool.DialContext(ctx) // not from the pool, which would keep it
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
				s.dispatch(message.Channel, "")
			}
		case redis.Message:
			s.dispatch(message.Channel, string(message.Data))
		}
	}
}

// setConnection stores the connection and subscribes all channels on it.
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

// dispatch passes a message to its subscriber. An empty message says that the channel is
// now subscribed.
func (s *subscription) dispatch(name, message string) {
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
		c.to.tokenFree(c.token)
	}
}
