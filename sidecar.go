package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// beatTimeout bounds one heartbeat.
const beatTimeout = 3 * time.Second

// sidecar keeps one token alive.
type sidecar struct {
	semaphores *semaphores
	id         semaphoreID
	token      string
	interval   time.Duration
	log        *slog.Logger
	failing    bool // the last heartbeat failed
}

// runSidecar sends heartbeats until ctx is done and gives the token back then. Its error is that it could not.
func runSidecar(ctx context.Context, c sidecarConfig, log *slog.Logger) error {
	log = log.With("namespace", c.semaphore.namespace, "key", c.semaphore.key, "token", c.token)
	semaphores := newSemaphores(c.sharedConfig, nil, 1, log)
	defer semaphores.pool.Close()
	s := &sidecar{semaphores: semaphores, id: c.semaphore, token: c.token, interval: c.heartbeatInterval, log: log}
	log.Info("holding the token", "heartbeatInterval", c.heartbeatInterval.String(), "queueRedis", c.queueRedisAddress)
	grace, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	context.AfterFunc(ctx, func() {
		log.Info("giving the token back")
		time.AfterFunc(c.terminationGracePeriod, end)
	})
	s.loop(ctx)
	return s.giveBack(grace)
}

// loop sends a heartbeat at once and then every interval, and retries sooner while they fail.
func (s *sidecar) loop(ctx context.Context) {
	retry := s.newBackoff()
	for {
		next := time.Now().Add(s.interval)
		if s.beat(ctx) == nil {
			retry = s.newBackoff()
		} else if sooner := time.Now().Add(retry.next()); sooner.Before(next) {
			next = sooner
		}
		if sleep(ctx, time.Until(next)) != nil {
			return
		}
	}
}

func (s *sidecar) newBackoff() *backoff {
	return newBackoff(min(time.Second, s.interval/4), s.interval)
}

// beat sends one heartbeat. It is not cut off by the end of ctx: one that is still on its way when the token is released
// would count it again.
func (s *sidecar) beat(ctx context.Context) error {
	attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(beatTimeout, s.interval))
	defer cancel()
	rejoined, err := s.semaphores.heartbeat(attempt, s.id, s.token)
	switch {
	case err != nil:
		s.log.Warn("heartbeat failed, to be retried", "error", err.Error())
	case rejoined:
		s.log.Warn("the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	case s.failing:
		s.log.Info("heartbeat succeeds again")
	}
	s.failing = err != nil
	return err
}

// giveBack releases the token, retrying until ctx is done.
func (s *sidecar) giveBack(ctx context.Context) error {
	released, err := s.semaphores.releaseWithin(ctx, s.id, s.token)
	if err != nil {
		return fmt.Errorf("token %s of %s not given back within the grace period, it will be reclaimed %s after its last heartbeat: %w",
			s.token, s.id, s.semaphores.staleThreshold, err)
	}
	if released {
		s.log.Info("token given back")
	} else {
		s.log.Info("nothing to give back: the token had been reclaimed, lost or given back before")
	}
	return nil
}
