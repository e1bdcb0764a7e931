package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// testSemaphores is the semaphores of one webhook.
func testSemaphores(t *testing.T, address string) *semaphores {
	t.Helper()
	c := testConfig(address)
	s := newSemaphores(c.settings, newLocker(c.settings, lockConnections), idleConnections, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.close(context.Background())) })
	return s
}

// serverOf is the server that holds a semaphore.
func serverOf(t *testing.T, s *semaphores, id semaphoreID) *queueServer {
	t.Helper()
	server, err := s.queue.find(context.Background(), id)
	rig.Must(t, err)
	return server
}

// newSemaphore is a semaphore of a test's own on the common Redis.
func newSemaphore(t *testing.T) (*rig.Redis, *semaphores, semaphoreID) {
	t.Helper()
	return newSemaphoreOn(t, rig.CommonRedis(t))
}

func newSemaphoreOn(t *testing.T, r *rig.Redis) (*rig.Redis, *semaphores, semaphoreID) {
	t.Helper()
	return r, testSemaphores(t, r.Address), freshID()
}

// maintain repairs for somebody who was not in line.
func maintain(t *testing.T, s *semaphores, id semaphoreID, length int) {
	t.Helper()
	rig.Must(t, s.maintain(context.Background(), id, length, true))
}

func acquire(t *testing.T, s *semaphores, id semaphoreID, length int) string {
	t.Helper()
	token, _, err := s.acquire(context.Background(), id, "", length, 10*time.Second)
	rig.Must(t, err)
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
