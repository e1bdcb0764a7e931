package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

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
