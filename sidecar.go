package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

const (
	// beatTimeout bounds one heartbeat.
	beatTimeout = 3 * time.Second

	// holderRetry is the longest wait before a heartbeat that failed is tried again: when Redis is back, all are counted again
	// soon.
	holderRetry = 2 * time.Second

	// answerPatience is for how long the answer to a claim is waited for when the pod ends.
	answerPatience = 2 * time.Second
)

// sidecar keeps one token alive.
type sidecar struct {
	semaphores *semaphores
	id         semaphoreID
	token      string
	interval   time.Duration
	log        *slog.Logger
	failing    bool      // the last heartbeat failed
	logged     time.Time // when that was logged
}

// runSidecar gets the token, keeps it alive by heartbeats until ctx is done, and gives it back then. Its error is that it could
// not.
func runSidecar(ctx context.Context, c sidecarConfig, log *slog.Logger) error {
	log = log.With("namespace", c.semaphore.namespace, "key", c.semaphore.key, "token", c.token)
	semaphores := newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, 0), 1, log)
	defer semaphores.pool.Close()
	s := &sidecar{semaphores: semaphores, id: c.semaphore, token: c.token, interval: c.heartbeatInterval, log: log}
	grace, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	context.AfterFunc(ctx, func() { time.AfterFunc(c.terminationGracePeriod, end) })
	held, err := s.get(ctx, c)
	if err != nil {
		return err
	}
	acquired := make(chan struct{}) // closed when nothing is left of what was begun to get the token
	go func() {
		defer close(acquired)
		if err := semaphores.closeLocks(grace); err != nil {
			log.Warn("close the connections to the lock servers", "error", err.Error())
		}
	}()
	if held {
		log.Info("holding the token", "heartbeatInterval", c.heartbeatInterval.String(), "queueRedis", c.queueRedisAddress)
		s.loop(ctx)
		log.Info("giving the token back")
	}
	select { // what has been asked for may still be granted
	case <-acquired:
	case <-time.After(answerPatience):
	}
	return s.giveBack(grace, held)
}

// get returns when the token is held, or with false when ctx is done before. Its error is that the startup probe cannot be
// answered.
func (s *sidecar) get(ctx context.Context, c sidecarConfig) (held bool, err error) {
	if c.length == 0 { // the pod's containers run, whatever we do
		return true, nil
	}
	probes := newReadiness(fmt.Sprintf("asking queue Redis %s for a token of %s", c.queueRedisAddress, s.id))
	if c.podUID != "" {
		if err := probes.serve(c.podUID); err != nil {
			return false, err
		}
	}
	running := newPassed(c.podUID, c.token)
	if running.is() {
		s.log.Info("started again in a running pod")
	} else {
		w := &waiter{semaphores: s.semaphores, id: s.id, token: s.token, length: c.length, expiration: c.expiration,
			heartbeatInterval: c.heartbeatInterval, note: probes.note, log: s.log}
		if w.wait(ctx) != nil {
			return false, nil
		}
		if err := running.set(); err != nil {
			s.log.Warn("should this sidecar be killed and the token be reclaimed, it will have to wait in line again", "error", err.Error())
		}
	}
	probes.hold()
	return true, nil
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
	return newBackoff(min(time.Second, s.interval/4), min(holderRetry, s.interval))
}

// beat sends one heartbeat. It is not cut off by the end of ctx: one that is still on its way when the token is released
// would count it again.
func (s *sidecar) beat(ctx context.Context) error {
	attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(beatTimeout, s.interval))
	defer cancel()
	rejoined, err := s.semaphores.heartbeat(attempt, s.id, s.token)
	switch {
	case err != nil && (!s.failing || time.Since(s.logged) > logEvery):
		s.log.Warn("heartbeat failed, to be retried", "error", err.Error())
		s.logged = time.Now()
	case err != nil:
	case rejoined:
		s.log.Warn("the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	case s.failing:
		s.log.Info("heartbeat succeeds again")
	}
	s.failing = err != nil
	return err
}

// giveBack releases the token, or leaves the line, retrying until ctx is done.
func (s *sidecar) giveBack(ctx context.Context, held bool) error {
	status, err := s.semaphores.releaseWithin(ctx, s.id, s.token)
	if err != nil && !held {
		return fmt.Errorf("the line of %s not left within the grace period, it forgets this pod within seconds; a token that was already taken for it (%s) will be reclaimed: %w",
			s.id, s.token, err)
	}
	if err != nil {
		return fmt.Errorf("token %s of %s not given back within the grace period, it will be reclaimed %s after its last heartbeat: %w",
			s.token, s.id, s.semaphores.staleThreshold, err)
	}
	switch status {
	case releaseDone:
		s.log.Info("token given back")
	case releaseLeft:
		s.log.Info("left the line")
	default:
		s.log.Info("nothing to give back: the token had been reclaimed, lost or given back before")
	}
	return nil
}
