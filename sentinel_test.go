//go:build failover

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The primary of a Sentinel group is killed, hangs, or is replaced by hand.
func TestSentinelFailover(t *testing.T) {
	for name, c := range map[string]struct {
		bound  time.Duration
		set    []string
		strike func(t *testing.T, g *rig.SentinelGroup, old *rig.Redis)
		repair func(t *testing.T, old *rig.Redis)
	}{
		"killed": {rig.DownAfter + 3*time.Second, nil,
			func(t *testing.T, _ *rig.SentinelGroup, old *rig.Redis) { old.Crash(t) },
			func(t *testing.T, old *rig.Redis) { rig.Must(t, old.Start()) }},
		"stopped": {rig.DownAfter + 3*time.Second, nil,
			func(t *testing.T, _ *rig.SentinelGroup, old *rig.Redis) { old.Pause(t) },
			func(t *testing.T, old *rig.Redis) { old.Resume(t) }},
		// The old one is a primary for some seconds more, but has no replicas.
		"by hand": {2 * time.Second, []string{"--min-replicas-to-write", "1"},
			func(t *testing.T, g *rig.SentinelGroup, _ *rig.Redis) {
				g.Sentinels[1].Do(t, "SENTINEL", "FAILOVER", "tokens")
			},
			func(*testing.T, *rig.Redis) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := rig.StartSentinelGroup(t, c.set...)
			f := startTraffic(t, g, freshID())
			old := g.Servers[0]
			f.strike(func() { c.strike(t, g, old) })
			f.wantRecovered(t, f.recoveredBy(t, c.bound, func() bool { return g.Serves(t, old, f.held) }))

			// The old one comes back as a replica, and nothing is doubled.
			c.repair(t, old)
			g.WantReady(t, 2)
			if g.Primary(t) == old {
				t.Error("the old primary is primary again")
			}
			held := g.Primary(t)
			held.WantCounts(t, f.held, 0, trafficHolders)
			if reply, err := f.webhook.semaphores.heartbeat(context.Background(), f.held, f.holders[0], "", 0); reply || err != nil {
				t.Errorf("a heartbeat after it: %t, %v", reply, err)
			}
			if f.webhook.scrape(t)[metricsPrefix+"failovers_total"] < 1 {
				t.Error("the failover is not in the metrics")
			}
		})
	}
}

// A primary that is cut off from its replicas refuses to write, and that is an outage; when they are back, it goes on.
func TestPrimaryWithoutReplicas(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t, "--min-replicas-to-write", "1", "--min-replicas-max-lag", "1")
	s := semaphoresOf(t, groupConfig(t, g.Address()))
	id := freshID()
	token := acquire(t, s, id, 2)
	primary := g.Primary(t)
	for _, r := range g.Servers[1:] {
		r.Pause(t)
	}
	rig.Eventually(t, 20*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		if err := s.check(ctx); err == nil || !strings.Contains(err.Error(), "NOREPLICAS") {
			return fmt.Errorf("got %v, want NOREPLICAS", err)
		}
		return nil
	})
	for _, r := range g.Servers[1:] {
		r.Resume(t)
	}
	acquire(t, s, id, 2) // waits until it may write
	if g.Holder(t, id) != primary {
		t.Error("another is primary")
	}
	if !strings.Contains(fmt.Sprint(primary.Inflight(t, id)), token) {
		t.Error("the token is gone")
	}
}

// With two of three Sentinels gone, and with all, it goes on with the primary that is known, and says so.
func TestSentinelsGone(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	w := startWebhook(t, groupConfig(t, g.Address()))
	id := freshID()
	w.wantAdmitted(t, id, maxLength)
	for i, s := range g.Sentinels {
		s.Crash(t)
		switch i {
		case 1:
			fresh := startWebhook(t, groupConfig(t, g.Address()))
			fresh.wantAdmitted(t, id, maxLength)
			if len(w.log.Lines(t, "no Sentinel answers, going on with the primary that is known")) != 0 {
				t.Error("one Sentinel answers")
			}
		case 2:
			rig.Eventually(t, 20*time.Second, func() error {
				w.wantAdmitted(t, id, maxLength)
				if len(w.log.Lines(t, "no Sentinel answers, going on with the primary that is known")) == 0 {
					return errors.New("it does not say so")
				}
				return nil
			})
		}
	}
	// It finds the primary again when that was away, though no Sentinel tells.
	g.Servers[0].Crash(t)
	back := make(chan error)
	time.AfterFunc(time.Second, func() { back <- g.Servers[0].Start() })
	w.wantAdmitted(t, id, maxLength)
	rig.Must(t, <-back)
	if n := len(w.log.Lines(t, "no Sentinel answers, going on with the primary that is known")); n != 1 {
		t.Errorf("said %d times in a minute", n)
	}
}

// A Sentinel that was cut off, or is of an older group, does not lead back to a primary of before when no other answers.
func TestSentinelOfThePast(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	past := rig.StartSentinel(t)
	past.Do(t, "SENTINEL", "MONITOR", "tokens", "127.0.0.1", rig.Port(rig.StartRedis(t).Address), 1)
	g.Sentinels[0].Do(t, "SENTINEL", "FAILOVER", "tokens")
	g.WantReady(t, 2)
	address := strings.Replace(g.Address(), "//", "//"+past.Address+",", 1)
	w := startWebhook(t, groupConfig(t, address))
	id := freshID()
	token := w.wantAdmitted(t, id, maxLength)
	primary := g.Primary(t)
	primary.WantInflight(t, id, token)
	for _, s := range g.Sentinels {
		s.Crash(t)
	}
	rig.Eventually(t, 20*time.Second, func() error { // it goes on asking all of them
		info, err := redis.String(past.Control.Do("INFO", "stats"))
		if n := strings.TrimSpace(regexp.MustCompile(`total_connections_received:(\d+)`).FindStringSubmatch(info)[1]); err != nil || len(n) < 2 {
			w.wantAdmitted(t, id, maxLength)
			return fmt.Errorf("it was asked %s times, %v", n, err)
		}
		return nil
	})
	w.wantAdmitted(t, id, maxLength)
	if _, inflight, err := primary.Counts(id); err != nil || inflight < 2 {
		t.Errorf("%d in flight at the primary, %v", inflight, err)
	}
	if lines := w.log.Lines(t, "the queue has another primary"); len(lines) != 0 {
		t.Errorf("logged %v", lines)
	}
}

// What is wrong with the address, or the password of the Sentinels, is said.
func TestSentinelsThatCannotHelp(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	sentinel := g.Sentinels[0]
	for name, c := range map[string]struct{ address, want string }{
		"no such name": {"redis+sentinel://" + sentinel.Address + "/other", "No such master with that name"},
		"nobody there": {"redis+sentinel://" + rig.FreeAddress(t) + "/tokens", "connection refused"},
		"no Sentinel":  {"redis+sentinel://" + g.Servers[0].Address + "/tokens", "unknown command"},
	} {
		s := semaphoresOf(t, groupConfig(t, c.address))
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		if _, _, err := s.acquire(ctx, freshID(), "", 1, time.Second); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		cancel()
	}
	sentinel.Do(t, "ACL", "SETUSER", "default", "resetpass", ">"+rig.Password)
	c := groupConfig(t, "redis+sentinel://"+sentinel.Address+"/tokens")
	c.redis.sentinelPassword = rig.Password
	acquire(t, semaphoresOf(t, c), freshID(), 1)
	c.redis.sentinelPassword = "wrong"
	if err := semaphoresOf(t, c).check(t.Context()); err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
		t.Errorf("with a wrong password: %v", err)
	}
}

// The users of a Sentinel group need what docs/security.md says.
func TestSentinelUsers(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	rules := strings.Fields(sidecarACL + " " + sentinelACL)
	for _, s := range g.Servers {
		s.Do(t, "ACL", append([]any{"SETUSER", "sidecar", "on", ">" + rig.Password}, rig.Anys(rules)...)...)
	}
	for _, s := range g.Sentinels {
		s.Do(t, "ACL", append([]any{"SETUSER", "hook", "on", ">" + rig.Password}, rig.Anys(strings.Fields(ofSentinelsACL))...)...)
	}
	config := groupConfig(t, g.Address())
	config.redis = redisSettings{username: "sidecar", password: rig.Password, sentinelUsername: "hook", sentinelPassword: rig.Password}
	beat := func() error {
		s := newSemaphores(config.settings, nil, 1, slog.New(slog.DiscardHandler))
		defer s.queue.close()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		_, err := s.heartbeat(ctx, freshID(), uuid.NewString(), "", 0)
		return err
	}
	rig.Must(t, beat())
	for _, c := range []struct {
		user, rules string
		servers     []*rig.Redis
	}{{"sidecar", sentinelACL, g.Servers}, {"hook", ofSentinelsACL, g.Sentinels}} {
		for _, rule := range strings.Fields(c.rules) {
			for _, s := range c.servers {
				s.Do(t, "ACL", "SETUSER", c.user, "-"+rule[1:])
			}
			if err := beat(); err == nil || !strings.Contains(err.Error(), "NOPERM") {
				t.Errorf("without %s: %v", rule, err)
			}
			for _, s := range c.servers {
				s.Do(t, "ACL", "SETUSER", c.user, rule)
			}
		}
	}
	rig.Must(t, beat())
}

// DNS that answers once, and later than the Sentinels are waited for, and then no more, does not hide them, or another primary.
func TestSentinelsBehindSlowDNS(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	s := semaphoresOf(t, groupConfig(t, strings.ReplaceAll(g.Address(), "127.0.0.1", "sentinel.test")))
	r, _, answer := testResolver(t)
	s.queue.(*sentinelQueue).settings.resolver = r
	go func() {
		_ = sleep(t.Context(), 2*askAgain)
		answer <- dnsAnswer{addresses: []string{"127.0.0.1"}}
	}()
	id := freshID()
	acquire(t, s, id, maxLength)
	r.doubt("sentinel.test")
	g.Servers[0].Crash(t)
	acquire(t, s, id, maxLength)
}

// Who only looks, as "status --watch" does, finds the new primary.
func TestSentinelLook(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	id := freshID()
	acquire(t, semaphoresOf(t, groupConfig(t, g.Address())), id, 3)
	s := newSemaphores(groupConfig(t, g.Address()).settings, nil, 1, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.queue.close()) })
	look := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		d, err := s.inspect(ctx, id)
		if err == nil && d.inUse != 1 {
			err = fmt.Errorf("%d in use", d.inUse)
		}
		return err
	}
	rig.Must(t, look())
	s.queue.(*sentinelQueue).checked = time.Now().Add(-time.Hour) // it has looked for long, and asks no Sentinel any more
	g.Servers[0].Crash(t)
	rig.Eventually(t, 20*time.Second, look)
}
