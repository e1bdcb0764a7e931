package main

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// newWaiter is a waiter of this process, with a token of its own, that says nothing.
func newWaiter(s *semaphores, id semaphoreID, length int) *waiter {
	return &waiter{semaphores: s, id: id, token: uuid.NewString(), length: length, expiration: 10 * time.Second,
		say: func(string) {}, log: slog.New(slog.DiscardHandler)}
}

// waitOnly is wait without what it returns besides the error.
func (w *waiter) waitOnly(ctx context.Context) error {
	_, _, err := w.wait(ctx)
	return err
}

// queueUp starts a waiter in this process and waits until it is in line; the channel has what became of it.
func queueUp(t *testing.T, ctx context.Context, s *semaphores, id semaphoreID, length int, r *rig.Redis) (token string, done <-chan error) {
	t.Helper()
	before, err := r.Line(id)
	rig.Must(t, err)
	result := make(chan error, 1)
	w := newWaiter(s, id, length)
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		result <- w.waitOnly(ctx)
	}()
	t.Cleanup(func() { // before the semaphores are closed
		cancel()
		<-ended
	})
	r.WantLine(t, id, append(before, w.token)...)
	return w.token, result
}

func wantDone(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		rig.Must(t, err)
	case <-time.After(20 * time.Second):
		t.Fatal("still waiting")
	}
}

func giveBack(t *testing.T, s *semaphores, id semaphoreID, token string) {
	t.Helper()
	_, err := s.release(context.Background(), id, token)
	rig.Must(t, err)
}

// stand puts somebody in line, reachable or not, who never comes.
func stand(t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, reachable bool) (token string, leave func()) {
	t.Helper()
	token = uuid.NewString()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if reachable {
		subscribed := newWakeup()
		calls := newSubscription(s.queue, id, s.log)
		calls.add(subscribed, id, token)
		go func() { _ = calls.receive(ctx) }()
		<-subscribed
	}
	if a, err := s.runAcquire(ctx, id, acquireRequest{token, 1, joinLine, ""}); err != nil || a.status != acquireFull {
		t.Fatalf("got %+v, %v", a, err)
	}
	return token, func() {
		cancel()
		rig.Eventually(t, 10*time.Second, func() error {
			n, err := redis.Values(r.Control.Do("PUBSUB", "NUMSUB", id.channel(token)))
			if err == nil && n[1] != int64(0) {
				err = errors.New("still subscribed")
			}
			return err
		})
	}
}

// deafSemaphores subscribe for the first time at a server that nobody publishes to.
func deafSemaphores(t *testing.T, address string) *semaphores {
	t.Helper()
	s, elsewhere := testSemaphores(t, address), rig.StartRedis(t)
	pool := serverOf(t, s, freshID()).pool
	dial, dialled := pool.DialContext, 0
	pool.DialContext = func(ctx context.Context) (redis.Conn, error) {
		if dialled++; dialled == 2 { // the first is for the claims
			return dialRedis(ctx, elsewhere.Address, redisSettings{}, time.Minute)
		}
		return dial(ctx)
	}
	return s
}
