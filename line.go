package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

// A waiter asks again when it is called, and after a while in any case: that is how it keeps its place, how a call that went
// lost costs no more than seconds, and how stale tokens are reclaimed where nobody else asks.
const (
	pollLeast = 2 * time.Second
	pollMost  = 4 * time.Second

	// pollAhead is the wait where a token is free, and those ahead have yet to come for it.
	pollAhead = time.Second

	// subscribePatience is for how long a waiter tries to be reachable before it joins the line.
	subscribePatience = 2 * time.Second

	// Everybody asks at once when a token goes stale, within this time.
	staleJitter = 500 * time.Millisecond

	// logEvery is how often a waiter logs that it waits; logMoved, if it has moved up meanwhile.
	logEvery = time.Minute
	logMoved = 5 * time.Second
)

// yourTurn is the message to a waiter for which a token is free; see line.lua.
const yourTurn = "your turn"

// waiter gets a token for a pod, however long it takes.
type waiter struct {
	semaphores *semaphores
	id         semaphoreID
	token      string
	length     int
	expiration time.Duration
	note       func(string) // is told what is waited for
	log        *slog.Logger

	heartbeatInterval time.Duration // of the holders

	logged         time.Time // that it waits
	loggedPosition int
	failed         time.Time // logged why there is no token yet
	missing        time.Time // since when tokens are missing
}

// wait returns when the token is in flight: when Redis was asked that said so, and whether the waiter stood in line before; or the
// error of ctx. In the latter case the caller has to release the token, which may be in line, or in flight without our knowing.
func (w *waiter) wait(ctx context.Context) (asked time.Time, inLine bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := claim{token: w.token, once: true}
	retry := newBackoff(250*time.Millisecond, pollMost)
	var calls *calls
	for {
		asked = time.Now()
		err := w.semaphores.claim(ctx, w.id, w.length, w.expiration, c)
		if err == nil {
			return asked, c.arrival != "", nil
		}
		if ctx.Err() != nil {
			return asked, false, ctx.Err()
		}
		var pause time.Duration
		var full *fullError
		switch {
		case calls == nil: // be reachable first, and join the line then
			calls = w.listen(ctx)
			c.arrival, pause = joinLine, subscribePatience
			if !errors.As(err, &full) {
				w.fail(err)
				pause = retry.next()
			}
		case errors.As(err, &full):
			retry = newBackoff(250*time.Millisecond, pollMost)
			c.arrival, pause = full.arrival, w.untilPoll(full)
			c.expectMissing, w.missing = true, time.Time{}
			if full.deaf {
				calls.redial()
			}
			w.tell(full)
		case errors.Is(err, errMissing):
			w.note(err.Error())
			c.expectMissing, pause = w.missingIsExpected(), w.poll()
		default: // also while somebody else has the lock
			w.fail(err)
			pause = retry.next()
		}
		if calls.waitFor(ctx, pause) != nil {
			return asked, false, ctx.Err()
		}
	}
}

// missingIsExpected tells whether tokens may be missing because Redis has lost them. Then those who hold them put them back
// within a heartbeat interval, and those in line have found their places by then, too.
func (w *waiter) missingIsExpected() bool {
	if w.missing.IsZero() {
		w.missing = time.Now()
	}
	return time.Since(w.missing) < w.heartbeatInterval+2*holderRetry
}

// fail notes why there is no token yet.
func (w *waiter) fail(err error) {
	w.note(err.Error())
	if time.Since(w.failed) > logEvery {
		w.log.Warn("no token yet, to be retried", "error", err.Error())
		w.failed = time.Now()
	}
}

func (w *waiter) poll() time.Duration { return pollLeast + rand.N(pollMost-pollLeast) }

// untilPoll is how long a waiter waits for a call. Those at the front do not sleep past the moment at which a token goes
// stale.
func (w *waiter) untilPoll(full *fullError) time.Duration {
	poll := w.poll()
	if full.position <= w.length && full.inUse < full.length { // kept for those ahead, unless they are gone
		poll = pollAhead
	}
	if full.position <= w.length {
		poll = min(poll, full.staleIn+rand.N(staleJitter))
	}
	return max(poll, 50*time.Millisecond)
}

// tell logs where the waiter stands, if that is news.
func (w *waiter) tell(full *fullError) {
	text := full.waiting()
	w.note(text)
	since := time.Since(w.logged)
	if since > logEvery || full.position != w.loggedPosition && since > logMoved {
		w.log.Info(text)
		w.logged, w.loggedPosition = time.Now(), full.position
	}
}

// waiting says what a waiter waits for.
func (e *fullError) waiting() string {
	return fmt.Sprintf("waiting for a token of %s: %d of %d in use, %s in line, %s", e.id, e.inUse, e.length, ordinal(e.position), roughly(e.waited))
}

func ordinal(n int) string {
	suffix := "th"
	if n/10%10 != 1 {
		switch n % 10 {
		case 1:
			suffix = "st"
		case 2:
			suffix = "nd"
		case 3:
			suffix = "rd"
		}
	}
	return fmt.Sprintf("%d%s", n, suffix)
}

// roughly is a duration for people.
func roughly(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d h", d/time.Hour)
}

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
	go func() {
		var logged time.Time
		for retry := newBackoff(250*time.Millisecond, pollMost); ; {
			start := time.Now()
			err := w.hear(ctx, c)
			if ctx.Err() != nil {
				return
			}
			if time.Since(start) > 2*pollMost {
				retry = newBackoff(250*time.Millisecond, pollMost)
			}
			if time.Since(logged) > logEvery {
				w.log.Warn("cannot be called when a token comes free, asks every few seconds", "error", err.Error())
				logged = time.Now()
			}
			if sleep(ctx, retry.next()) != nil {
				return
			}
		}
	}()
	return c
}

// hear subscribes and passes on each call until the connection fails or ctx is done.
func (w *waiter) hear(ctx context.Context, c *calls) error {
	conn, err := w.semaphores.pool.DialContext(ctx) // not the pool's: it would keep it
	if err != nil {
		return fmt.Errorf("connect to queue Redis %s: %w", w.semaphores.address, err)
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer conn.Close()
	defer c.subscribed(nil)
	subscription := redis.PubSubConn{Conn: conn}
	if err := subscription.Subscribe(w.id.channel(w.token)); err != nil {
		return fmt.Errorf("queue Redis %s: subscribe: %w", w.semaphores.address, err)
	}
	for {
		switch message := subscription.ReceiveWithTimeout(0).(type) {
		case error:
			return fmt.Errorf("queue Redis %s: subscription: %w", w.semaphores.address, message)
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
