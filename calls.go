package main

import (
	"context"
	"fmt"
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
	server, err := w.semaphores.queue.find(ctx, w.id) // messages reach those that listen on the server that runs the scripts
	if err != nil {
		return err
	}
	conn, err := server.pool.DialContext(ctx) // not the pool's: it would keep it
	if err != nil {
		return fmt.Errorf("connect to %s: %w", server, err)
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
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
