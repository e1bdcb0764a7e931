package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

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
	var logged time.Time
	for retry := newBackoff(250*time.Millisecond, pollMost); ; {
		start := time.Now()
		err := hear()
		if ctx.Err() != nil {
			return
		}
		if time.Since(start) > 2*pollMost {
			retry = newBackoff(250*time.Millisecond, pollMost)
		}
		if time.Since(logged) > logEvery {
			log.Warn("cannot be called when a token comes free, asks every few seconds", "error", err.Error())
			logged = time.Now()
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
