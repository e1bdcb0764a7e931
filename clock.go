package main

import (
	"sync"
	"time"
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
