package main

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// crowd is a number of things that come and go. If there are more than so many, or they have more bytes than all may, the oldest have to
// go.
type crowd struct {
	most, mostBytes int

	mu    sync.Mutex
	all   list.List // of member, the oldest first
	bytes int       // of all
}

// member is one of a crowd: since when, how many bytes it has, and what makes it go.
type member struct {
	since  time.Time
	bytes  int
	goAway func()
}

// join adds one. leave has to be called once it is gone, whatever the reason.
func (c *crowd) join(bytes int, goAway func()) (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.all.PushBack(&member{time.Now(), bytes, goAway})
	c.bytes += bytes
	for c.all.Len() > c.most || c.bytes > c.mostBytes {
		go c.remove(c.all.Front()).goAway()
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.remove(e)
	}
}

// remove takes one out, unless it is not there any more.
func (c *crowd) remove(e *list.Element) *member {
	m := c.all.Remove(e).(*member)
	c.bytes -= m.bytes
	m.bytes = 0
	return m
}

// waitToJoin waits until one more would make nobody go who has joined less than restTime ago; for restTime at most, or until ctx is done.
func (c *crowd) waitToJoin(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, restTime)
	defer cancel()
	for {
		wait := c.untilRested()
		if wait <= 0 || sleep(ctx, wait) != nil {
			return
		}
	}
}

// untilRested is how long it takes until the oldest of a crowd that is full has joined restTime ago.
func (c *crowd) untilRested() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all.Len() < c.most {
		return 0
	}
	return time.Until(c.all.Front().Value.(*member).since.Add(restTime))
}

// slots are a number of things that may happen at once.
type slots chan struct{}

// errTooMany is why something was not begun: it was not its turn in time.
var errTooMany = errors.New("too many at once: try again")

// take waits for a slot, first come, first served; free has to be called once it is not needed any more. Its error is errTooMany.
func (s slots) take(ctx context.Context) (free func(), err error) {
	free = sync.OnceFunc(func() { <-s })
	select {
	case s <- struct{}{}: // whether ctx is done or not
		return free, nil
	default:
	}
	select {
	case s <- struct{}{}:
		return free, nil
	case <-ctx.Done():
		return func() {}, fmt.Errorf("%w (%w)", errTooMany, context.Cause(ctx))
	}
}

// used reports whether none is left.
func (s slots) used() bool { return len(s) == cap(s) }
