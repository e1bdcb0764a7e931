package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

// failoverPatience is how long commands are retried while a part of the queue fails; a
// failover takes less. After that, each command is tried once, so that its caller gets
// the error at once.
const failoverPatience = 10 * time.Second

// attemptTimeout is how long a command may go unanswered before it is sent again on
// another connection. It is half the heartbeat interval, but at least one second and at
// most two. See beatTimeout, on which the scripts rely.
func (s *semaphores) attemptTimeout() time.Duration {
	return min(max(s.heartbeatInterval/2, time.Second), 2*time.Second)
}

// run runs a script and returns its status and the rest of its reply. It retries until
// ctx is done, or the queue has failed for failoverPatience. If an attempt is not
// answered within attemptTimeout, the next one gets another connection and twice the
// time. If the connection breaks, or another server is responsible, the next attempt
// follows after a pause.
//
// Redis refuses an attempt that arrives after its deadline. So no attempt is under way
// when run returns, except one whose connection broke; see noteStray. An attempt outlasts
// the end of ctx, so run may return that much later. An acquire or a release waits for a
// slot first; if ctx is done before, the error is errTooMany.
func (s *semaphores) run(ctx context.Context, script *script, id semaphoreID,
	args ...any) (status int, rest []any, err error) {
	late, sent, roomMade := 0, false, false
	var refused error // the last error that Redis returned
	part := s.queue.part(id)
	pause := newBackoff(10*time.Millisecond, 500*time.Millisecond)
	for timeout := s.attemptTimeout(); ; {
		var server *queueServer
		var free func()
		server, free, err = s.takeServer(ctx, script, id)
		start := time.Now()
		if err == nil {
			status, rest, err = s.attempt(ctx, server, timeout, script, id, args)
			free()
		}
		sent = sent || errors.Is(err, errUnanswered)
		if s.loadsScripts && isFull(err) && !roomMade && s.makeRoom(ctx, server) {
			roomMade = true
			continue
		}
		again := err != nil && canRetry(err)
		switch {
		case again:
			again = s.outages.failed(part) < failoverPatience && hasTime(ctx)
		case !errors.Is(err, errTooMany):
			s.outages.ended(part)
		}
		switch {
		case err == nil && status == statusLate && late < 3: // its reply has corrected our view of Redis's clock
			late++
			continue
		case err == nil && status == statusLate:
			err = fmt.Errorf("queue Redis %s: refused repeatedly as too late: "+
				"its clock jumps, or commands take seconds to arrive", s.address)
		case again:
			if isTransient(err) {
				refused = err
			}
			if time.Since(start) >= timeout {
				timeout *= 2
				continue
			}
			if sleep(ctx, pause.next()) == nil {
				continue
			}
		}
		if err != nil && sent && !errors.Is(err, errUnanswered) {
			err = fmt.Errorf("%w (and %w before)", err, errUnanswered)
		}
		if err != nil && refused != nil && !isTransient(err) { // ctx ended before another reply
			err = fmt.Errorf("%w (before: %w)", err, refused)
		}
		return status, rest, err
	}
}

// canRetry reports whether a command that failed with this error may work in a moment,
// here or on another server.
func canRetry(err error) bool {
	return errors.Is(err, errUnanswered) || errors.Is(err, errUnreached) || isTransient(err)
}

// isFull reports whether Redis refuses a command as its memory is used up.
func isFull(err error) bool {
	var answered redis.Error
	return errors.As(err, &answered) && errorCode(answered) == "OOM"
}

// makeRoom deletes the histories of a full server: tokens are worth more. It reports whether
// there were any.
func (s *semaphores) makeRoom(ctx context.Context, server *queueServer) bool {
	drop := s.drops.join(server, new(int), func(dropped *int) (err error) {
		ctx, cancel := context.WithTimeout(s.closing, surveyTimeout)
		defer cancel()
		*dropped, err = dropHistories(ctx, server)
		if *dropped > 0 {
			s.log.Warn("Redis is full: the histories of semaphores were deleted", "server", server.String(), "histories", *dropped)
		}
		return err
	})
	select {
	case <-drop.done:
		return *drop.state > 0
	case <-ctx.Done():
		return false
	}
}

// dropHistories deletes all histories of a server, and returns their number.
func dropHistories(ctx context.Context, server *queueServer) (dropped int, err error) {
	conn, err := server.pool.GetContext(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	err = eachKey(ctx, conn, "history/{*}", func(keys []string) (err error) {
		for _, key := range keys { // in a Cluster, a command may have keys of one slot only
			err = errors.Join(err, conn.Send("DEL", key))
		}
		if err != nil || len(keys) == 0 {
			return err
		}
		replies, err := redis.Values(redis.DoContext(conn, ctx, ""))
		for _, reply := range replies {
			if reply == int64(1) { // others are errors, for which this is no reason to end
				dropped++
			}
		}
		return err
	})
	return dropped, err
}

// noteStray notes a stray command: its connection broke, and it may put the token in
// flight. Redis may still receive it before its deadline. A proxy may close its
// connection to us and still deliver on its connection to Redis. Strays are forgotten
// some seconds after their deadline.
func (s *semaphores) noteStray(token string, deadline time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	forgotten := time.Now().Add(-failoverPatience)
	maps.DeleteFunc(s.strays, func(_ string, deadline time.Time) bool { return deadline.Before(forgotten) })
	if deadline.After(s.strays[token]) {
		s.strays[token] = deadline
	}
}

// stray reports whether a token had a stray command lately, and its deadline.
func (s *semaphores) stray(token string) (deadline time.Time, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	deadline, ok = s.strays[token]
	return deadline, ok
}

// hasTime reports whether ctx leaves time for another attempt.
func hasTime(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() == nil && (!ok || time.Until(deadline) > 10*time.Millisecond)
}

// takeServer finds the server of a semaphore and waits for a slot there if the script
// needs one.
// The caller must call free after the reply. Its errors are those of find; errUnreached
// if no slot is free and the queue has failed for failoverPatience; and errTooMany, which
// is no failure of Redis.
func (s *semaphores) takeServer(ctx context.Context, script *script,
	id semaphoreID) (server *queueServer, free func(), err error) {
	defer func() {
		if err != nil && !errors.Is(err, errTooMany) {
			s.metrics.script(script.name, 0, err)
		}
	}()
	server, err = s.queue.find(ctx, id)
	for err == nil {
		var places slots
		switch script {
		case acquireScript:
			places = server.acquires
		case releaseScript:
			places = server.releases
		default:
			return server, func() {}, nil
		}
		if failing := s.outages.failingFor(s.queue.part(id)); failing > failoverPatience && places.full() {
			return nil, nil, fmt.Errorf("%w: %s has not answered for %s, and enough requests wait for it",
				errUnreached, server, failing.Round(time.Second))
		}
		free, err = places.take(ctx)
		if err != nil {
			return nil, nil, fmt.Errorf("requests to %s: %w", server, err)
		}
		before := server
		if server, err = s.queue.find(ctx, id); err == nil && server == before {
			return server, free, nil
		}
		free() // another server has taken over, or is about to
	}
	return nil, nil, err
}

// attempt runs a script once. The end of ctx does not cut it off, but it takes no more
// time than ctx has.
func (s *semaphores) attempt(ctx context.Context, server *queueServer, timeout time.Duration, script *script,
	id semaphoreID, args []any) (status int, rest []any, err error) {
	start := time.Now()
	defer func() { s.metrics.script(script.name, time.Since(start), err) }()
	deadline := start.Add(timeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	status, rest, err = s.send(ctx, server, deadline, s.runScript, script, id, args)
	if to, ok := redirection(server, err, "ASK"); ok {
		server = s.queue.at(to)
		status, rest, err = s.send(ctx, server, deadline, s.runScriptAsking, script, id, args)
	}
	if err != nil && canRetry(err) {
		s.queue.failed(server, id, err)
	}
	return status, rest, err
}

// runner sends a script over a connection.
type runner func(ctx context.Context, conn redis.Conn, script *script, keysAndArgs []any) (any, error)

// runScript sends the hash of a script. If the server does not know it, a webhook sends
// the script.
func (s *semaphores) runScript(ctx context.Context, conn redis.Conn, script *script, keysAndArgs []any) (any, error) {
	deadline, _ := ctx.Deadline()
	conn = timedConn{conn, deadline}
	if s.loadsScripts {
		return script.made().Do(conn, keysAndArgs...)
	}
	return conn.Do("EVALSHA", append([]any{script.made().Hash(), scriptKeys}, keysAndArgs...)...)
}

// timedConn is a connection whose commands time out at a deadline. A context, which could
// end at any time, costs a goroutine for each command.
type timedConn struct {
	redis.Conn
	deadline time.Time
}

// Do implements redis.Conn. If the reply does not come in time, its error is
// context.DeadlineExceeded.
func (c timedConn) Do(command string, args ...any) (any, error) {
	left := time.Until(c.deadline)
	if left <= 0 { // DoWithTimeout takes 0 for no limit
		return nil, context.DeadlineExceeded
	}
	reply, err := redis.DoWithTimeout(c.Conn, left, command, args...)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = context.DeadlineExceeded
	}
	return reply, err
}

// runScriptAsking runs a script on a node of a Cluster to which its slot is moving.
// ASKING holds for one command only. So a webhook sends the whole script, without trying
// first whether the node knows its hash.
func (s *semaphores) runScriptAsking(ctx context.Context, conn redis.Conn, script *script,
	keysAndArgs []any) (any, error) {
	send := script.made().SendHash
	if s.loadsScripts {
		send = script.made().Send
	}
	if err := errors.Join(conn.Send("ASKING"), send(conn, keysAndArgs...)); err != nil {
		return nil, err
	}
	replies, err := redis.Values(redis.DoContext(conn, ctx, "")) // all outstanding ones
	if err != nil {
		return nil, err
	}
	for _, r := range replies { // an error of ASKING explains the one after it
		if err, ok := r.(redis.Error); ok {
			return nil, err
		}
	}
	return replies[len(replies)-1], nil
}

// send runs a script on a server.
func (s *semaphores) send(ctx context.Context, server *queueServer, deadline time.Time, run runner, script *script,
	id semaphoreID, args []any) (int, []any, error) {
	conn, err := server.pool.GetContext(ctx)
	if err != nil {
		if isUnreachable(err) || server.closed.Load() {
			err = fmt.Errorf("%w: %w", errUnreached, err)
		}
		return 0, nil, fmt.Errorf("connect to %s: %w", server, err)
	}
	defer conn.Close()
	all := append(id.keys(), server.clock.at(deadline), seconds(s.heartbeatInterval), seconds(s.staleThreshold),
		s.timeToLive())
	values, err := redis.Values(run(ctx, conn, script, append(all, args...)))
	var answered redis.Error
	switch {
	case isNoScript(err):
		return 0, nil, fmt.Errorf("%s: no webhook has loaded the scripts yet: %w", server, err)
	case errors.As(err, &answered) && strings.Contains(answered.Error(), "unauthenticated"):
		// Redis limits the arguments of unauthenticated clients.
		return 0, nil, fmt.Errorf("%s: NOAUTH: it wants a password (%w)", server, err)
	case errors.As(err, &answered):
		return 0, nil, fmt.Errorf("%s: %w", server, err)
	case err != nil:
		if script.token != noToken {
			s.noteStray(args[script.token].(string), deadline)
		}
		return 0, nil, fmt.Errorf("%w of %s: %w", errUnanswered, server, err)
	}
	var status int
	var micros int64
	if values, err = redis.Scan(values, &status, &micros); err != nil {
		return 0, nil, fmt.Errorf("%s: unexpected answer: %w", server, err)
	}
	server.clock.observe(micros)
	return status, values, nil
}

// check returns an error unless the queue takes writes. It repairs a semaphore of no
// tokens: a full Redis refuses that, as it refuses admissions.
func (s *semaphores) check(ctx context.Context) error {
	return fanOut(ctx, s.queue.checks(), func(ctx context.Context, id semaphoreID) (int, error) {
		status, _, err := s.run(ctx, maintainScript, id, 0, yesNo(false))
		return status, err
	}, func(int) (enough bool) { return true })
}

// previousFiles are the scripts of the last release; see lua/previous/README.md.
//
//go:embed lua/previous
var previousFiles embed.FS

// loadedScripts returns the scripts that a webhook loads into the queue: its own, and those
// of the last release, whose sidecars may still run.
func loadedScripts(previous fs.FS) (all []*redis.Script) {
	const folder = "lua/previous/"
	for _, s := range ownScripts {
		all = append(all, redis.NewScript(0, s.text()))
	}
	common, _ := fs.ReadFile(previous, folder+"semaphore.lua") // is missing before the first release
	names, _ := fs.Glob(previous, folder+"*.lua")
	for _, name := range names {
		if text, err := fs.ReadFile(previous, name); err == nil && name != folder+"semaphore.lua" {
			all = append(all, redis.NewScript(0, string(common)+string(text)))
		}
	}
	return all
}

// keepScripts loads the scripts into each server that lacks them, until the semaphores are
// closed. It is for a webhook: sidecars and gates may not load any.
func (s *semaphores) keepScripts() {
	scripts := loadedScripts(previousFiles)
	s.background.Go(func() {
		var limit logLimiter
		for s.closing.Err() == nil {
			var answered redis.Error
			if err := s.loadScripts(scripts); errors.As(err, &answered) && !isTransient(answered) {
				if _, ok := limit.allow(); ok {
					s.log.Warn("scripts not loaded, to be retried", "error", err.Error())
				}
			}
			_ = sleep(s.closing, scriptsEvery)
		}
	})
}

// loadScripts loads the scripts that the servers of queue and locks lack. It takes less
// than scriptsWithin, with the pause before it: one server that hangs delays no other.
func (s *semaphores) loadScripts(scripts []*redis.Script) error {
	find, cancel := context.WithTimeout(s.closing, scriptsWithin/4)
	defer cancel()
	primaries, err := s.queue.primaries(find)
	servers := s.locks.scripted()
	if err == nil {
		for _, p := range primaries {
			// By the deadline 0, each script is late, and does nothing.
			servers = append(servers, scriptedServer{p.String(), p.pool, scripts, []any{0},
				func(err error) { s.noteReadError(p, semaphoreID{}, err) }})
		}
	}
	load, cancel := context.WithTimeout(s.closing, scriptsWithin/4)
	defer cancel()
	return fanOut(load, servers, func(ctx context.Context, server scriptedServer) (loaded int, err error) {
		if loaded, err = server.loadScripts(ctx); err != nil {
			server.failed(err)
			return 0, fmt.Errorf("%s: %w", server.name, err)
		}
		if loaded > 0 {
			s.log.Info("scripts loaded", "server", server.name, "scripts", loaded)
		}
		return loaded, nil
	}, func(int) (enough bool) { return false })
}

// outages are the parts of the queue that fail now.
type outages struct {
	mu    sync.Mutex
	parts map[int]outage
}

type outage struct{ began, last time.Time }

// failed notes that a command has failed. It returns how long the part has failed.
func (o *outages) failed(part int) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	known, ok := o.parts[part]
	if !ok || now.Sub(known.last) > failoverPatience { // no command for so long: a new outage
		known.began = now
	}
	known.last = now
	o.parts[part] = known
	return now.Sub(known.began)
}

// failingFor returns how long a part has failed, or 0.
func (o *outages) failingFor(part int) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	known, ok := o.parts[part]
	if !ok || time.Since(known.last) > failoverPatience {
		return 0
	}
	return time.Since(known.began)
}

// ended notes that a part answers again.
func (o *outages) ended(part int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.parts, part)
}
