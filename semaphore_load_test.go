package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// sidecarConfigOf is testConfig for a process that may not load scripts.
func sidecarConfigOf(address string) webhookConfig {
	c := testConfig(address)
	c.redis.loadsScripts = false
	return c
}

// wantScripts waits until a server knows scripts, no longer than a webhook may take.
func wantScripts(t *testing.T, r *rig.Redis, scripts ...*redis.Script) {
	t.Helper()
	args := []any{"EXISTS"}
	for _, s := range scripts {
		args = append(args, s.Hash())
	}
	start := time.Now()
	rig.Eventually(t, 10*time.Second, func() error {
		there, err := redis.Ints(r.Control.Do("SCRIPT", args...))
		if err == nil && slices.Contains(there, 0) {
			err = fmt.Errorf("%s knows %v of the scripts", r.Address, there)
		}
		return err
	})
	rig.WantWithin(t, time.Since(start), scriptsWithin, "loading the scripts")
}

// Without an admission, a webhook loads its scripts, and those of the last release, into
// the queue and the lock servers: at its start, and after a SCRIPT FLUSH. It writes
// nothing.
func TestWebhookLoadsScripts(t *testing.T) {
	t.Parallel()
	queue := rig.StartRedisWith(t, rig.RedisOptions{Bare: true})
	locks := rig.StartLockServers(t, 3, rig.RedisOptions{Bare: true, Kind: rig.SingleQueue})
	s, loaded := rig.StartRedisWith(t, rig.RedisOptions{Kind: rig.SingleQueue}), loadedScripts(previousFiles)
	for _, script := range loaded[:len(ownScripts)] {
		wantScripts(t, s, script) // test/rig loads the same
	}
	rig.StartWebhook(t, rig.QueueAddress(queue.Address), "--redis-addresses="+strings.Join(locks.Addresses(), ","))
	for range 2 {
		wantScripts(t, queue, loaded...)
		for _, lock := range locks {
			wantScripts(t, lock, unlockScript())
		}
		for _, r := range append(locks, queue) {
			r.Do(t, "SCRIPT", "FLUSH")
		}
	}
	rig.Must(t, locks.LocksLeft())
}

// A webhook loads each script of the last release as that release sent it.
func TestLoadedScripts(t *testing.T) {
	own := loadedScripts(fstest.MapFS{})
	all := loadedScripts(fstest.MapFS{
		"lua/previous/README.md":     {Data: []byte("text")},
		"lua/previous/semaphore.lua": {Data: []byte("local a = 1\n")},
		"lua/previous/one.lua":       {Data: []byte("return a\n")},
		"lua/previous/two.lua":       {Data: []byte("return a + 1\n")},
	})
	if len(own) != len(ownScripts) || len(all) != len(own)+2 {
		t.Fatalf("%d own scripts, and %d with those of the last release", len(own), len(all))
	}
	for i, text := range []string{"local a = 1\nreturn a\n", "local a = 1\nreturn a + 1\n"} {
		if got := all[len(own)+i].Hash(); got != redis.NewScript(0, text).Hash() {
			t.Errorf("script %d has the hash %s, not that of %q", i, got, text)
		}
	}
	for i, s := range ownScripts {
		if own[i].Hash() != s.made().Hash() {
			t.Errorf("%s is sent and loaded with different texts", s.name)
		}
	}
}

// A webhook whose user may not load scripts says so.
func TestScriptsNotLoaded(t *testing.T) {
	t.Parallel()
	r := rig.StartRedisWith(t, rig.RedisOptions{Bare: true})
	rules := strings.Fields(sidecarACL + " " + sentinelACL + " " + clusterACL)
	r.Do(t, "ACL", append([]any{"SETUSER", "webhook", "on", ">" + rig.Password}, rig.Anys(rules)...)...)
	c := testConfig(r.Address)
	c.redis = redisSettings{username: "webhook", password: rig.Password, loadsScripts: true}
	w := startWebhook(t, c)
	w.semaphores.keepScripts()
	rig.Eventually(t, 10*time.Second, func() error {
		lines := w.log.Lines(t, "scripts not loaded, to be retried")
		if len(lines) == 0 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "NOPERM") {
			return fmt.Errorf("logged %v:\n%s", lines, w.log)
		}
		return nil
	})
}

// A process that may not load scripts waits for a webhook that does. Its error says so,
// and it sends no script.
func TestWaitingForScripts(t *testing.T) {
	t.Parallel()
	r := rig.StartRedisWith(t, rig.RedisOptions{Bare: true})
	s, id, token := semaphoresOf(t, sidecarConfigOf(r.Address)), freshID(), uuid.NewString()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := s.heartbeat(ctx, id, token, "", 0)
	if err == nil || !isNoScript(err) || !strings.Contains(err.Error(), "no webhook has loaded the scripts yet") {
		t.Errorf("without scripts, the error is %v", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.heartbeat(t.Context(), id, token, "", 0)
		done <- err
	}()
	rig.Eventually(t, 10*time.Second, func() error {
		if s.outages.failingFor(s.queue.part(id)) == 0 {
			return errors.New("the heartbeat was not refused")
		}
		return nil
	})
	if calls := r.CommandCalls(t); calls["eval"] != 0 || calls["script|load"] != 0 {
		t.Errorf("a sidecar has sent a script: %v", calls)
	}
	testSemaphores(t, r.Address).keepScripts()
	rig.Must(t, <-done)
	r.WantInflight(t, id, token)
}

// While Redis lacks the scripts, commands leave no trace, so that the next one finds the
// silence: no token is stale before its holder had the time to come back.
func TestMissingScriptsAreASilence(t *testing.T) {
	t.Parallel()
	r, webhook, id := newSemaphoreOn(t, rig.StartRedis(t))
	sidecar := semaphoresOf(t, sidecarConfigOf(r.Address))
	holder := acquire(t, webhook, id, 1)
	r.Do(t, "SCRIPT", "FLUSH")
	before := r.Dump(t, id)
	for name, command := range map[string]func(ctx context.Context) error{
		"heartbeat": func(ctx context.Context) error { return errOf(sidecar.heartbeat(ctx, id, holder, "", 0)) },
		"acquire": func(ctx context.Context) error {
			return errOf(sidecar.runAcquire(ctx, id, acquireRequest{uuid.NewString(), 1, joinLine, ""}))
		},
		"release": func(ctx context.Context) error { return errOf(sidecar.release(ctx, id, holder)) },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if err := command(ctx); err == nil || !isNoScript(err) {
			t.Errorf("%s: got %v, want NOSCRIPT", name, err)
		}
		cancel()
	}
	if after := r.Dump(t, id); !slices.Equal(after, before) {
		t.Error("commands without a script have changed the semaphore")
	}
	r.Shift(t, id, -2*webhook.staleAfter())
	rig.Must(t, r.LoadScripts())
	wantFullError(t, webhook, id, 1, 1)
	if rejoined, err := sidecar.heartbeat(t.Context(), id, holder, "", 0); err != nil || rejoined {
		t.Errorf("the holder comes back: rejoined %t, %v", rejoined, err)
	}
}

// An unlock waits until a webhook has loaded its script.
func TestUnlockWaitsForScripts(t *testing.T) {
	t.Parallel()
	locks := rig.StartLockServers(t, 3, rig.RedisOptions{Bare: true, Kind: rig.SingleQueue})
	l := newRedlock(locks.Addresses(), redisSettings{}, 1)
	defer l.close()
	unlock, err := l.tryLock(t.Context(), "lock/{shop/web}", time.Minute)
	rig.Must(t, err)
	done := make(chan error, 1)
	go func() { done <- unlock(t.Context()) }()
	for _, r := range locks {
		rig.Eventually(t, 10*time.Second, func() error {
			if r.Info(t, "commandstats", `cmdstat_evalsha:calls=`) == 0 {
				return errors.New("no unlock came to " + r.Address)
			}
			return nil
		})
	}
	for _, s := range l.scripted() {
		if n, err := s.loadScripts(t.Context()); n != 1 || err != nil {
			t.Errorf("%s: %d scripts loaded, %v", s.name, n, err)
		}
	}
	rig.Must(t, <-done)
	rig.Must(t, locks.LocksLeft())
}
