package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// After an outage nobody is stale before the holders had time to come back: the waiters ask first.
func TestOutageIsNotHeldAgainstHolders(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	now, err := redis.Ints(r.do(t, "TIME"), nil)
	must(t, err)
	r.do(t, "ZADD", id.inflightKey(), now[0]-seconds(s.staleThreshold)-60, holder)

	after := testSemaphores(t, r.address)
	after.outage.note(time.Now().Add(-5*time.Minute), errors.New("refused"), time.Hour)
	wantFullError(t, after, id, 1, 1)
	if got := r.inflight(t, id); !slices.Equal(got, []string{holder}) {
		t.Errorf("in flight is %v, want %s", got, holder)
	}
	after.outage.until = time.Now() // all should be back
	if second := acquire(t, after, id, 1); second == holder {
		t.Error("not reclaimed")
	}
}

func TestOutage(t *testing.T) {
	ago := func(d time.Duration) time.Time { return time.Now().Add(-d) }
	failed := errors.New("refused")
	for name, c := range map[string]struct {
		note func(*outage)
		want time.Duration
	}{
		"nothing":        {func(o *outage) { o.note(ago(0), nil, time.Minute) }, 0},
		"short":          {func(o *outage) { o.note(ago(3*time.Second), failed, time.Minute); o.note(ago(0), nil, time.Minute) }, 0},
		"long":           {func(o *outage) { o.note(ago(time.Hour), failed, time.Minute); o.note(ago(0), nil, time.Minute) }, time.Hour},
		"still going on": {func(o *outage) { o.note(ago(time.Hour), failed, time.Minute) }, 0},
		"several attempts": {func(o *outage) {
			o.note(ago(time.Hour), failed, time.Minute)
			o.note(ago(time.Minute), failed, time.Minute)
			o.note(ago(0), nil, time.Minute)
		}, time.Hour},
		"hung": {func(o *outage) { o.note(ago(time.Minute), nil, time.Minute) }, time.Minute},
		"nobody waits": {func(o *outage) {
			o.note(ago(time.Hour), context.Canceled, time.Minute)
			o.note(ago(0), nil, time.Minute)
		}, 0},
		"long ago": {func(o *outage) { o.note(ago(time.Hour), failed, time.Minute); o.note(ago(0), nil, -time.Hour) }, 0},
	} {
		s := &semaphores{staleThreshold: time.Minute}
		c.note(&s.outage)
		if got := s.threshold(); got != time.Minute+c.want {
			t.Errorf("%s: the threshold is %s, want %s", name, got, time.Minute+c.want)
		}
	}
}

// Where Redis has lost all, those in line neither take what the holders have, nor lose their order.
func TestEmptiedRedisWithALine(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	first, done := queueUp(t, context.Background(), s, id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	third, _ := queueUp(t, t.Context(), s, id, 1, r)
	r.do(t, "DEL", id.queueKey(), id.inflightKey(), id.waitersKey(), id.seenKey())
	r.wantLine(t, id, first, second, third)
	r.wantCounts(t, id, 0, 0)
	if rejoined, err := s.heartbeat(context.Background(), id, holder); err != nil || !rejoined {
		t.Fatalf("rejoined %t, %v", rejoined, err)
	}
	giveBack(t, s, id, holder)
	wantDone(t, done)
	r.wantLine(t, id, second, third)
	r.wantCounts(t, id, 0, 1)
}

// What is missing for longer than a heartbeat interval is replaced.
func TestMissingTokensAreReplaced(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	acquire(t, s, id, 1)
	w := newWaiter(s, id, 1)
	done := make(chan error, 1)
	go func() { done <- w.waitOnly(context.Background()) }() // its holders' heartbeat interval is zero
	r.wantLine(t, id, w.token)
	r.do(t, "DEL", id.inflightKey())
	wantDone(t, done)

	w = &waiter{heartbeatInterval: time.Minute}
	if !w.missingIsExpected() {
		t.Error("not expected at once")
	}
	w.missing = time.Now().Add(-time.Minute - 2*holderRetry)
	if w.missingIsExpected() {
		t.Error("expected after a minute")
	}
}

// deafSemaphores subscribe for the first time at a server that nobody publishes to.
func deafSemaphores(t *testing.T, address string) *semaphores {
	t.Helper()
	s, elsewhere := testSemaphores(t, address), startRedis(t)
	dial, dialled := s.pool.DialContext, 0
	s.pool.DialContext = func(ctx context.Context) (redis.Conn, error) {
		if dialled++; dialled == 2 { // the first is for the claims
			return dialRedis(ctx, elsewhere.address, redisSettings{}, time.Minute)
		}
		return dial(ctx)
	}
	return s
}

// A waiter that cannot be called is not overtaken.
func TestDeafWaiterIsServed(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	holder := acquire(t, s, id, 1)
	_, done := queueUp(t, context.Background(), deafSemaphores(t, r.address), id, 1, r)
	second, _ := queueUp(t, t.Context(), s, id, 1, r)
	giveBack(t, s, id, holder)
	wantDone(t, done)
	r.wantLine(t, id, second)
}

// It subscribes anew.
func TestDeafWaiterSubscribesAnew(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	acquire(t, s, id, 1)
	token, _ := queueUp(t, t.Context(), deafSemaphores(t, r.address), id, 1, r)
	eventually(t, 20*time.Second, func() error {
		n, err := redis.Values(r.control.Do("PUBSUB", "NUMSUB", id.channel(token)))
		if err == nil && n[1] != int64(1) {
			err = fmt.Errorf("%d subscriptions", n[1])
		}
		return err
	})
}

// Pods of one key that disagree about the length: one whose own length is used up keeps nobody from what is free.
func TestLineOfDifferentLengths(t *testing.T) {
	r := commonRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	acquire(t, s, id, 1)
	short, _ := queueUp(t, t.Context(), s, id, 1, r)
	for range 2 {
		done := make(chan error, 1)
		w := newWaiter(s, id, 3)
		go func() { done <- w.waitOnly(context.Background()) }()
		wantDone(t, done)
	}
	r.wantCounts(t, id, 0, 3)
	r.wantLine(t, id, short)
}

// While the lock is held by somebody who is gone, a waiter says so, once, and does not hammer the servers.
func TestWaiterAndADeadLockHolder(t *testing.T) {
	r := startRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	_, err := s.locks.tryLock(context.Background(), id.lockKey(), time.Hour)
	must(t, err)
	token := uuid.NewString()
	p := startWaitingSidecar(t, r.address, id, token, 1, "--expiration-seconds=3600")
	line := p.wantLog(t, "no token yet, to be retried")
	if want := id.lockKey() + " is held by another; it frees itself 1h0m0s after it was taken: "; !strings.HasPrefix(line["error"].(string), want) {
		t.Errorf("logged %q, want %q", line["error"], want)
	}
	eventually(t, 20*time.Second, func() error {
		if n := commandCalls(t, r)["set"]; n < 6 {
			return fmt.Errorf("tried %d times", n)
		}
		return nil
	})
	if n := len(p.log.lines(t, "no token yet, to be retried")); n != 1 {
		t.Errorf("said %d times", n)
	}
	r.wantLine(t, id, token) // it has its place all the same
	p.signal(t, syscall.SIGTERM)
	p.wantExit(t, 0)
	r.wantLine(t, id)
}

// A waiter that is told to end while Redis hangs tries for its grace period, and says what becomes of its place.
func TestWaiterEndsWhileRedisHangs(t *testing.T) {
	r := startRedis(t)
	s, id := testSemaphores(t, r.address), freshID()
	acquire(t, s, id, 1)
	token := uuid.NewString()
	p := startWaitingSidecar(t, r.address, id, token, 1, "--termination-grace-period-seconds=3")
	r.wantLine(t, id, token)
	r.pause(t)
	p.signal(t, syscall.SIGTERM)
	p.wantExit(t, 1)
	if text := p.wantLog(t, "failed")["error"].(string); !strings.HasPrefix(text, "the line of "+id.String()+" not left within the grace period, it forgets this pod within seconds") {
		t.Errorf("logged %q", text)
	}
}
