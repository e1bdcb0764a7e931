package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

const (
	// locksPatience bounds the wait for a running repair when the pod ends.
	locksPatience = 2 * time.Second

	// awaitMissed is how long no init container may ask before a sidecar logs it: the app
	// may run without a token.
	awaitMissed = time.Minute
)

// sidecar keeps the tokens of its pod alive: one, or several.
type sidecar struct {
	semaphores *semaphores
	id         semaphoreID
	token      string // the pod's UID, if it has one
	tokens     int    // how many it keeps alive, under names that begin with token
	takenAs    string // the name under which the webhook took it; empty if it took none, or none for this pod
	pod        podName
	held       time.Time // since when it holds the token
	interval   time.Duration
	log        *slog.Logger
	grace      context.Context // done when the grace period is over, or the process ends
	failing    bool            // the last heartbeat failed
	limit      logLimiter      // of lines about that

	locksClosed chan struct{} // closed while there are no connections to lock servers
}

// runSidecar acquires the token, keeps it alive by heartbeats until ctx is done, and then
// gives it back. A token that it cannot give back is no failure: a podFailurePolicy would
// take the exit code for one of the app, and may fail the Job.
func runSidecar(ctx context.Context, c sidecarConfig, log *slog.Logger) {
	semaphores := newSemaphores(c.settings, nil, 1, log)
	defer semaphores.queue.close()
	s := &sidecar{
		semaphores:  semaphores,
		id:          c.semaphore,
		token:       c.token,
		tokens:      c.tokens,
		takenAs:     c.takenAs,
		pod:         c.pod,
		held:        time.Now(),
		interval:    c.heartbeatInterval,
		log:         log.With("namespace", c.semaphore.namespace, "key", c.semaphore.key, "token", c.token),
		locksClosed: make(chan struct{}),
	}
	grace, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	s.grace = grace
	context.AfterFunc(ctx, func() { time.AfterFunc(c.terminationGracePeriod, end) })
	close(s.locksClosed)
	var held bool
	if c.length == 0 { // a classic sidecar cannot hold the app back
		held = true
		s.logHeld()
		s.loop(ctx, 0, nil)
	} else {
		held = s.guard(ctx, c)
	}
	if held {
		s.log.Info("giving the token back")
	}
	select {
	case <-s.locksClosed:
	case <-time.After(locksPatience):
	}
	s.giveBack(held)
}

// guard holds the app back until the token is held, and then keeps the token alive until
// ctx is done. held reports whether the token was held at the end.
func (s *sidecar) guard(ctx context.Context, c sidecarConfig) (held bool) {
	mark := newStartMark(c.podUID, c.token)
	status := fmt.Sprintf("asking queue Redis %s for a token of %s", c.queueRedisAddress, s.id)
	server := newAwaitServer(mark, status, s.log)
	if c.podUID != "" {
		go server.serve(ctx, c.podUID)
	}
	if mark.isSet() {
		s.log.Info("started again in a running pod")
		s.held = mark.setAt()
		s.loop(ctx, 0, server.asked)
	} else if c.podUID != "" {
		select { // no token is of use before
		case <-server.listening:
		case <-ctx.Done():
			return false
		}
		defer time.AfterFunc(awaitMissed, server.warnNotAsked).Stop()
	}
	for ctx.Err() == nil {
		err := s.holdBack(ctx, c, server)
		if gaveUp := (*gaveUpError)(nil); errors.As(err, &gaveUp) {
			s.log.Info(gaveUp.Error())
			err = s.giveUp(ctx, c, server, gaveUp)
		} else if err == nil {
			s.loop(ctx, s.interval, server.asked)
		}
		if err != nil {
			return false
		}
	}
	return true
}

// giveUp tells the pod's await that the pod has given up, and returns when the next await
// asks: then the pod joins the line again. Redis keeps its answer until this await knows,
// for a sidecar that is killed before. Its error is ctx's, or gaveUp if there is no await.
func (s *sidecar) giveUp(ctx context.Context, c sidecarConfig, server *awaitServer, gaveUp *gaveUpError) error {
	if c.podUID == "" {
		return gaveUp
	}
	if err := server.tellGaveUp(ctx, gaveUp.Error()); err != nil {
		return err
	}
	if _, err := s.semaphores.releaseWithin(ctx, s.id, s.token, s.takenAs); err != nil {
		return err
	}
	select {
	case <-server.asked:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// holdBack acquires the token and lets the pod's await pass. Its error is that the pod gave
// up, or ctx's. Until the app may run, it keeps the token by acquiring it again, not by
// heartbeats: a pod whose token is lost meanwhile goes back to the line.
func (s *sidecar) holdBack(ctx context.Context, c sidecarConfig, server *awaitServer) error {
	<-s.locksClosed // by the last call
	s.semaphores.locks = newLocker(c.settings, 0)
	defer s.closeLocks()
	w := &waiter{semaphores: s.semaphores, id: s.id, token: s.token, takenAs: s.takenAs, pod: s.pod, length: c.length,
		tokens: c.tokens, headStart: c.headStart, expiration: c.expiration, ends: c.wait, report: server.setStatus, log: s.log}
	fresh := min(c.heartbeatInterval, c.staleThreshold/4)
	for first := true; ; first = false {
		asked, inLine, err := w.wait(ctx)
		s.takenAs = w.takenAs
		if err != nil {
			return err
		}
		if first || inLine {
			s.held = asked
			s.logHeld()
		}
		if c.podUID == "" { // there is no await
			return nil
		}
		if passed, err := server.admitOne(ctx, asked.Add(fresh)); passed || err != nil {
			return nil
		}
	}
}

func (s *sidecar) logHeld() {
	s.log.Info(heldText, "heartbeatInterval", s.interval.String(), "queueRedis", s.semaphores.address.text)
}

// closeLocks closes the connections to the lock servers once all background work of the
// acquire has ended.
func (s *sidecar) closeLocks() {
	closed := make(chan struct{})
	s.locksClosed = closed
	go func() {
		defer close(closed)
		if err := s.semaphores.closeLocks(s.grace); err != nil {
			s.log.Warn("close the connections to the lock servers", "error", err.Error())
		}
	}()
}

// loop sends a heartbeat after first, and then every interval; after a failure, sooner.
// It ends when ctx is done or the pod's await asks.
func (s *sidecar) loop(ctx context.Context, first time.Duration, asked <-chan struct{}) {
	retry := s.newBackoff()
	for pause := first; ; {
		beat := time.NewTimer(pause)
		select {
		case <-beat.C:
		case <-asked:
			beat.Stop()
			s.log.Info("the pod is started again: its init container asks for the token")
			return
		case <-ctx.Done():
			beat.Stop()
			return
		}
		next := time.Now().Add(s.interval)
		if s.beat(ctx) == nil {
			retry = s.newBackoff()
		} else if sooner := time.Now().Add(retry.next()); sooner.Before(next) {
			next = sooner
		}
		pause = time.Until(next)
	}
}

func (s *sidecar) newBackoff() *backoff {
	return newBackoff(min(holderRetry, s.interval)/4, min(holderRetry, s.interval/2))
}

// beat sends one heartbeat, and repeats it if no reply comes. The end of ctx does not cut
// it off: a heartbeat under way when the token is released would count the token again.
func (s *sidecar) beat(ctx context.Context) error {
	attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(beatTimeout, s.interval))
	defer cancel()
	rejoined, err := s.semaphores.heartbeat(attempt, s.id, s.token, s.takenAs, s.pod, time.Since(s.held), s.tokens)
	switch {
	case err != nil:
		if _, ok := s.limit.allow(); ok {
			s.log.Warn("heartbeat failed, to be retried", "error", err.Error())
		}
	case rejoined:
		s.takenAs = ""
		s.log.Warn("the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	case s.failing:
		s.log.Info("heartbeat succeeds again")
	}
	if s.failing = err != nil; !s.failing {
		s.limit.reset()
	}
	return err
}

// giveBack releases the token, or leaves the line. It retries until the grace period is
// over.
func (s *sidecar) giveBack(held bool) {
	switch status, err := s.semaphores.releaseWithin(s.grace, s.id, s.token, s.takenAs); {
	case err != nil && held:
		s.log.Warn("token left to go stale", "staleAfter", s.semaphores.staleThreshold.String(), "error", err.Error())
	case err != nil: // a token may already be taken for it
		s.log.Warn("place in line left to go stale", "error", err.Error())
	case status == releaseDone:
		s.log.Info("token given back")
	case status == releaseLeft:
		s.log.Info("left the line")
	default:
		s.log.Info("nothing to give back: the token had been reclaimed, lost or given back before")
	}
}
