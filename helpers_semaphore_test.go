package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"
)

// testSemaphores is the semaphores of one webhook.
func testSemaphores(t *testing.T, address string) *semaphores {
	t.Helper()
	c := testConfig(address)
	s := newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), idleConnections, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { must(t, s.close(context.Background())) })
	return s
}

// serverOf is the server that holds a semaphore.
func serverOf(t *testing.T, s *semaphores, id semaphoreID) *queueServer {
	t.Helper()
	server, err := s.queue.find(context.Background(), id)
	must(t, err)
	return server
}

// newSemaphore is a semaphore of a test's own on the common Redis.
func newSemaphore(t *testing.T) (*redisServer, *semaphores, semaphoreID) {
	t.Helper()
	return newSemaphoreOn(t, commonRedis(t))
}

func newSemaphoreOn(t *testing.T, r *redisServer) (*redisServer, *semaphores, semaphoreID) {
	t.Helper()
	return r, testSemaphores(t, r.address), freshID()
}

// maintain repairs for somebody who was not in line.
func maintain(t *testing.T, s *semaphores, id semaphoreID, length int) {
	t.Helper()
	must(t, s.maintain(context.Background(), id, length, true))
}

func acquire(t *testing.T, s *semaphores, id semaphoreID, length int) string {
	t.Helper()
	token, _, err := s.acquire(context.Background(), id, "", length, 10*time.Second)
	must(t, err)
	return token
}

func wantFullError(t *testing.T, s *semaphores, id semaphoreID, length, inUse int) {
	t.Helper()
	_, _, err := s.acquire(context.Background(), id, "", length, 10*time.Second)
	var full *fullError
	if !errors.As(err, &full) || full.inUse != inUse || full.length != length {
		t.Fatalf("got %v, want %d of %d in use", err, inUse, length)
	}
}

// askedLongAgo lets the greatest length be forgotten.
func (s *redisServer) askedLongAgo(t *testing.T, id semaphoreID) {
	t.Helper()
	s.do(t, "HSET", id.stateKey(), "asked", 1)
}

// countingLocker counts what is asked of a locker.
type countingLocker struct {
	locker
	tried, locked atomic.Int32
}

func (l *countingLocker) tryLock(ctx context.Context, name string, expiration time.Duration) (func(context.Context) error, error) {
	l.tried.Add(1)
	unlock, err := l.locker.tryLock(ctx, name, expiration)
	if err == nil {
		l.locked.Add(1)
	}
	return unlock, err
}
