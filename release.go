package main

import (
	"context"
	"fmt"
	"time"
)

// release gives a token back, or leaves the line; status is releaseDone, releaseLeft, or zero if there was nothing to do.
func (s *semaphores) release(ctx context.Context, id semaphoreID, token string) (status int, err error) {
	status, _, err = s.run(ctx, releaseScript, id, token)
	if err != nil {
		return 0, fmt.Errorf("release %s: %w", id, err)
	}
	return status, nil
}

// releaseWithin releases a token and retries until it is released or ctx is done; then the error is that of the last attempt. Where
// an earlier command may still come and count the token again, it releases it once more after that.
func (s *semaphores) releaseWithin(ctx context.Context, id semaphoreID, token string) (status int, err error) {
	status, err = s.releaseRetrying(ctx, id, token)
	if wait := s.straying(); err == nil && wait > 0 && sleep(ctx, wait) == nil {
		_, err = s.releaseRetrying(ctx, id, token)
	}
	return status, err
}

func (s *semaphores) releaseRetrying(ctx context.Context, id semaphoreID, token string) (status int, err error) {
	for retry := newBackoff(50*time.Millisecond, time.Second); ; {
		attempt, cancel := context.WithTimeout(ctx, s.attemptTimeout())
		status, err = s.release(attempt, id, token)
		cancel()
		if err == nil {
			return status, nil
		}
		if sleep(ctx, retry.next()) != nil {
			return 0, err
		}
		s.log.Warn("release failed, to be retried", "namespace", id.namespace, "key", id.key, "token", token, "error", err.Error())
	}
}

// giveBack releases a token that nobody will use, and retries until it is stale anyway.
func (s *semaphores) giveBack(id semaphoreID, token string) {
	ctx, cancel := context.WithTimeout(context.Background(), s.staleThreshold)
	defer cancel()
	s.releasing <- struct{}{} // a Redis that is slow is not asked by hundreds at once
	defer func() { <-s.releasing }()
	status, err := s.releaseWithin(ctx, id, token)
	log := s.log.With("namespace", id.namespace, "key", id.key, "token", token)
	switch {
	case err != nil:
		log.Error("unused token left to go stale", "staleThreshold", s.staleThreshold.String(), "error", err.Error())
	case status == releaseDone:
		log.Info("unused token given back")
	}
}

// giveBackLater is giveBack in the background; close waits for it.
func (s *semaphores) giveBackLater(id semaphoreID, token string) {
	s.background.Go(func() { s.giveBack(id, token) })
}
