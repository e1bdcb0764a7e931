//go:build failover

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// These tests let servers fail under load, each with servers of its own: "make test-queues".

// The primary of a Sentinel group is killed, hangs, or is replaced by hand.
func TestSentinelFailover(t *testing.T) {
	for name, c := range map[string]struct {
		bound  time.Duration
		set    []string
		strike func(t *testing.T, g *sentinelGroup, old *redisServer)
		repair func(t *testing.T, old *redisServer)
	}{
		"killed": {downAfter + 3*time.Second, nil,
			func(t *testing.T, _ *sentinelGroup, old *redisServer) { old.kill(t) },
			func(t *testing.T, old *redisServer) { must(t, old.start()) }},
		"stopped": {downAfter + 3*time.Second, nil,
			func(t *testing.T, _ *sentinelGroup, old *redisServer) { old.pause(t) },
			func(t *testing.T, old *redisServer) { old.resume(t) }},
		// The old one is a primary for some seconds more, but has no replicas.
		"by hand": {2 * time.Second, []string{"--min-replicas-to-write", "1"},
			func(t *testing.T, g *sentinelGroup, _ *redisServer) {
				g.sentinels[1].do(t, "SENTINEL", "FAILOVER", "tokens")
			},
			func(*testing.T, *redisServer) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := startSentinelGroup(t, c.set...)
			f := startTraffic(t, g, freshID())
			old := g.servers[0]
			f.strike(func() { c.strike(t, g, old) })
			f.wantRecovered(t, c.bound)

			// The old one comes back as a replica, and nothing is doubled.
			c.repair(t, old)
			g.wantReady(t, 2)
			if g.primary(t) == old {
				t.Error("the old primary is primary again")
			}
			held := g.primary(t)
			held.wantCounts(t, f.held, 0, trafficHolders)
			if reply, err := f.webhook.semaphores.heartbeat(context.Background(), f.held, f.holders[0]); reply || err != nil {
				t.Errorf("a heartbeat after it: %t, %v", reply, err)
			}
		})
	}
}

// A primary that is cut off from its replicas refuses to write, and that is an outage; when they are back, it goes on.
func TestPrimaryWithoutReplicas(t *testing.T) {
	t.Parallel()
	g := startSentinelGroup(t, "--min-replicas-to-write", "1", "--min-replicas-max-lag", "1")
	s := semaphoresOf(t, groupConfig(t, g.address()))
	id := freshID()
	token := acquire(t, s, id, 2)
	primary := g.primary(t)
	for _, r := range g.servers[1:] {
		r.pause(t)
	}
	eventually(t, 20*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		if err := s.check(ctx); err == nil || !strings.Contains(err.Error(), "NOREPLICAS") {
			return fmt.Errorf("got %v, want NOREPLICAS", err)
		}
		return nil
	})
	for _, r := range g.servers[1:] {
		r.resume(t)
	}
	acquire(t, s, id, 2) // waits until it may write
	if g.holder(t, id) != primary {
		t.Error("another is primary")
	}
	if !strings.Contains(fmt.Sprint(primary.inflight(t, id)), token) {
		t.Error("the token is gone")
	}
}

// With two of three Sentinels gone, and with all, it goes on with the primary that is known, and says so.
func TestSentinelsGone(t *testing.T) {
	t.Parallel()
	g := startSentinelGroup(t)
	w := startWebhook(t, groupConfig(t, g.address()))
	id := freshID()
	w.wantAdmitted(t, id, maxLength)
	for i, s := range g.sentinels {
		s.kill(t)
		switch i {
		case 1:
			fresh := startWebhook(t, groupConfig(t, g.address()))
			fresh.wantAdmitted(t, id, maxLength)
			if len(w.log.lines(t, "no Sentinel answers, going on with the primary that is known")) != 0 {
				t.Error("one Sentinel answers")
			}
		case 2:
			eventually(t, 20*time.Second, func() error {
				w.wantAdmitted(t, id, maxLength)
				if len(w.log.lines(t, "no Sentinel answers, going on with the primary that is known")) == 0 {
					return errors.New("it does not say so")
				}
				return nil
			})
		}
	}
	// It finds the primary again when that was away, though no Sentinel tells.
	g.servers[0].kill(t)
	back := make(chan error)
	time.AfterFunc(time.Second, func() { back <- g.servers[0].start() })
	w.wantAdmitted(t, id, maxLength)
	must(t, <-back)
	if n := len(w.log.lines(t, "no Sentinel answers, going on with the primary that is known")); n != 1 {
		t.Errorf("said %d times in a minute", n)
	}
}

// A Sentinel that was cut off, or is of an older group, does not lead back to a primary of before when no other answers.
func TestSentinelOfThePast(t *testing.T) {
	t.Parallel()
	g := startSentinelGroup(t)
	past, err := launchSentinel(t.TempDir())
	must(t, err)
	t.Cleanup(past.stop)
	past.do(t, "SENTINEL", "MONITOR", "tokens", "127.0.0.1", portOf(startRedis(t).address), 1)
	g.sentinels[0].do(t, "SENTINEL", "FAILOVER", "tokens")
	g.wantReady(t, 2)
	address := strings.Replace(g.address(), "//", "//"+past.address+",", 1)
	w := startWebhook(t, groupConfig(t, address))
	id := freshID()
	token := w.wantAdmitted(t, id, maxLength)
	primary := g.primary(t)
	primary.wantInflight(t, id, token)
	for _, s := range g.sentinels {
		s.kill(t)
	}
	eventually(t, 20*time.Second, func() error { // it goes on asking all of them
		info, err := redis.String(past.control.Do("INFO", "stats"))
		if n := strings.TrimSpace(regexp.MustCompile(`total_connections_received:(\d+)`).FindStringSubmatch(info)[1]); err != nil || len(n) < 2 {
			w.wantAdmitted(t, id, maxLength)
			return fmt.Errorf("it was asked %s times, %v", n, err)
		}
		return nil
	})
	w.wantAdmitted(t, id, maxLength)
	if _, inflight, err := primary.counts(id); err != nil || inflight < 2 {
		t.Errorf("%d in flight at the primary, %v", inflight, err)
	}
	if lines := w.log.lines(t, "the queue has another primary"); len(lines) != 0 {
		t.Errorf("logged %v", lines)
	}
}

// What is wrong with the address, or the password of the Sentinels, is said.
func TestSentinelsThatCannotHelp(t *testing.T) {
	t.Parallel()
	g := startSentinelGroup(t)
	sentinel := g.sentinels[0]
	for name, c := range map[string]struct{ address, want string }{
		"no such name": {"redis+sentinel://" + sentinel.address + "/other", "No such master with that name"},
		"nobody there": {"redis+sentinel://" + freeAddress(t) + "/tokens", "connection refused"},
		"no Sentinel":  {"redis+sentinel://" + g.servers[0].address + "/tokens", "unknown command"},
	} {
		s := semaphoresOf(t, groupConfig(t, c.address))
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		if _, err := s.acquire(ctx, freshID(), 1, time.Second); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		cancel()
	}
	sentinel.do(t, "ACL", "SETUSER", "default", "resetpass", ">"+testPassword)
	c := groupConfig(t, "redis+sentinel://"+sentinel.address+"/tokens")
	c.redis.sentinelPassword = testPassword
	acquire(t, semaphoresOf(t, c), freshID(), 1)
	c.redis.sentinelPassword = "wrong"
	if err := semaphoresOf(t, c).check(t.Context()); err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
		t.Errorf("with a wrong password: %v", err)
	}
}

// A master of a Cluster is killed, hangs, or is replaced by hand: only what it served is affected.
func TestClusterFailover(t *testing.T) {
	for name, c := range map[string]struct {
		bound  time.Duration
		strike func(t *testing.T, c *redisCluster, old *redisServer)
	}{
		"killed":  {downAfter + 3*time.Second, func(t *testing.T, _ *redisCluster, old *redisServer) { old.kill(t) }},
		"stopped": {downAfter + 3*time.Second, func(t *testing.T, _ *redisCluster, old *redisServer) { old.pause(t) }},
		"by hand": {2 * time.Second, func(t *testing.T, c *redisCluster, old *redisServer) {
			c.replicaOf(t, old).do(t, "CLUSTER", "FAILOVER")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := startCluster(t)
			affected := freshID()
			other := cluster.otherID(t, affected)
			f := startTraffic(t, cluster, affected, other)
			old := cluster.holder(t, affected)
			f.strike(func() { c.strike(t, cluster, old) })
			eventually(t, 20*time.Second, func() error {
				for _, n := range cluster.nodes {
					if n == old {
						continue
					}
					for _, r := range cluster.ranges(t, n) {
						if r.address == old.address {
							return fmt.Errorf("for %s, %s is still a master", n.address, old.address)
						}
					}
				}
				return nil
			})
			f.wantRecovered(t, c.bound, other)
		})
	}
}

// All slots of a master move to another under load: nothing fails, nothing is lost.
func TestClusterSlotsMove(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	id := freshID()
	f := startTraffic(t, c, id)
	from := c.holder(t, id)
	to := c.holder(t, c.otherID(t, id))
	name := func(n *redisServer) string { return string(n.do(t, "CLUSTER", "MYID").([]byte)) }
	slots := 0
	for _, r := range c.ranges(t, from) {
		if r.address == from.address {
			slots += r.to - r.from + 1
		}
	}
	f.strike(func() {
		out, err := exec.Command("redis-cli", "--cluster", "reshard", from.address, "--cluster-from", name(from), "--cluster-to", name(to),
			"--cluster-slots", fmt.Sprint(slots), "--cluster-yes").CombinedOutput()
		if err != nil {
			t.Errorf("%v: %s", err, out[max(0, len(out)-2000):])
		}
		t.Logf("%d slots moved in %s", slots, time.Since(f.fault))
	})
	for _, a := range f.since(0) {
		if a.err != nil || a.took > time.Second {
			t.Errorf("%s after the start: took %s, %v", a.start, a.took, a.err)
		}
	}
	if c.holder(t, id) != to {
		t.Error("it has not moved")
	}
	f.wantRecovered(t, time.Second)
}

// A semaphore whose slot is half moved: keys here, keys there, and a key that a script uses up.
func TestClusterSlotHalfMoved(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	s := semaphoresOf(t, groupConfig(t, c.address()))
	id := freshID()
	tokens := []string{acquire(t, s, id, 3), acquire(t, s, id, 3)}
	from, to := c.holder(t, id), c.holder(t, c.otherID(t, id))
	name := func(n *redisServer) string { return string(n.do(t, "CLUSTER", "MYID").([]byte)) }
	to.do(t, "CLUSTER", "SETSLOT", id.slot(), "IMPORTING", name(from))
	from.do(t, "CLUSTER", "SETSLOT", id.slot(), "MIGRATING", name(to))
	move := func(key string) {
		from.do(t, "MIGRATE", "127.0.0.1", portOf(to.address), key, 0, 5000)
	}
	done := make(chan error, 1)
	ask := func() {
		token, err := s.acquire(context.Background(), id, 3, time.Second)
		tokens = append(tokens, token)
		done <- err
	}
	go ask()
	move(id.queueKey())
	move(id.stateKey())
	move(id.inflightKey())
	for _, n := range []*redisServer{to, from} {
		n.do(t, "CLUSTER", "SETSLOT", id.slot(), "NODE", name(to))
	}
	wantDone(t, done)
	to.wantInflight(t, id, tokens...)
	wantFullError(t, s, id, 3, 3)
	for _, token := range tokens {
		giveBack(t, s, id, token)
	}
	to.wantCounts(t, id, 3, 0)
}

// While a slot moves and all keys of a semaphore have moved already, the old node sends us to the new one, which answers who says
// ASKING; with the users that the README tells to make.
func TestClusterSlotMoving(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	rules := strings.Fields(sidecarACL + " " + clusterACL)
	for _, n := range c.nodes {
		n.do(t, "ACL", append([]any{"SETUSER", "sidecar", "on", ">" + testPassword}, anys(rules)...)...)
	}
	config := groupConfig(t, c.address())
	config.redis = redisSettings{username: "sidecar", password: testPassword}
	s := newSemaphores(config.sharedConfig, newRedlock(config.redisAddresses, redisSettings{}, 1), 1, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { must(t, s.close(context.Background())) })
	id := freshID()
	// A pod of length 1 waits while others of length 3 come and go: all keys are there.
	holder := acquire(t, s, id, 3)
	gone := acquire(t, s, id, 3)
	if a, err := s.ask(t.Context(), id, question{uuid.NewString(), 1, joinLine}); err != nil || a.status != acquireFull {
		t.Fatalf("got %+v, %v", a, err)
	}
	giveBack(t, s, id, gone)
	from, to := c.holder(t, id), c.holder(t, c.otherID(t, id))
	name := func(n *redisServer) string { return string(n.do(t, "CLUSTER", "MYID").([]byte)) }
	to.do(t, "CLUSTER", "SETSLOT", id.slot(), "IMPORTING", name(from))
	from.do(t, "CLUSTER", "SETSLOT", id.slot(), "MIGRATING", name(to))
	for _, key := range id.keys() {
		if answer := from.do(t, "MIGRATE", "127.0.0.1", portOf(to.address), key, 0, 5000); answer != "OK" {
			t.Fatalf("%s: %v: it is to be there", key, answer)
		}
	}
	taken := acquire(t, s, id, 3)
	for _, rule := range strings.Fields(clusterACL) {
		for _, n := range c.nodes {
			n.do(t, "ACL", "SETUSER", "sidecar", "-"+rule[1:])
		}
		fresh := newSemaphores(config.sharedConfig, nil, 1, slog.New(slog.DiscardHandler))
		if rule == "+role" {
			fresh.queue.(*clusterQueue).doubted[from.address] = true
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		if _, err := fresh.heartbeat(ctx, id, holder); err == nil || !strings.Contains(err.Error(), "NOPERM") {
			t.Errorf("without %s: %v", rule, err)
		}
		cancel()
		must(t, fresh.queue.close())
		for _, n := range c.nodes {
			n.do(t, "ACL", "SETUSER", "sidecar", rule)
		}
	}
	for _, n := range []*redisServer{to, from} {
		n.do(t, "CLUSTER", "SETSLOT", id.slot(), "NODE", name(to))
	}
	to.wantInflight(t, id, holder, taken)
	if _, err := s.heartbeat(t.Context(), id, taken); err != nil {
		t.Error(err)
	}
}

// The users of a Sentinel group need what the README says.
func TestSentinelUsers(t *testing.T) {
	t.Parallel()
	g := startSentinelGroup(t)
	rules := strings.Fields(sidecarACL + " " + sentinelACL)
	for _, s := range g.servers {
		s.do(t, "ACL", append([]any{"SETUSER", "sidecar", "on", ">" + testPassword}, anys(rules)...)...)
	}
	for _, s := range g.sentinels {
		s.do(t, "ACL", append([]any{"SETUSER", "hook", "on", ">" + testPassword}, anys(strings.Fields(ofSentinelsACL))...)...)
	}
	config := groupConfig(t, g.address())
	config.redis = redisSettings{username: "sidecar", password: testPassword, sentinelUsername: "hook", sentinelPassword: testPassword}
	beat := func() error {
		s := newSemaphores(config.sharedConfig, nil, 1, slog.New(slog.DiscardHandler))
		defer s.queue.close()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		_, err := s.heartbeat(ctx, freshID(), uuid.NewString())
		return err
	}
	must(t, beat())
	for _, c := range []struct {
		user, rules string
		servers     []*redisServer
	}{{"sidecar", sentinelACL, g.servers}, {"hook", ofSentinelsACL, g.sentinels}} {
		for _, rule := range strings.Fields(c.rules) {
			for _, s := range c.servers {
				s.do(t, "ACL", "SETUSER", c.user, "-"+rule[1:])
			}
			if err := beat(); err == nil || !strings.Contains(err.Error(), "NOPERM") {
				t.Errorf("without %s: %v", rule, err)
			}
			for _, s := range c.servers {
				s.do(t, "ACL", "SETUSER", c.user, rule)
			}
		}
	}
	must(t, beat())
}

func anys(texts []string) (all []any) {
	for _, text := range texts {
		all = append(all, text)
	}
	return all
}

// The slots of the program's are those of Redis, and each third of them has one of those by which the Cluster is tried.
func TestSlots(t *testing.T) {
	t.Parallel()
	r, err := launchRedisOf(clusterTests, t.TempDir(), plain)
	must(t, err)
	t.Cleanup(r.stop)
	for range 100 {
		id := semaphoreID{"shop", uuid.NewString()}
		if got, err := redis.Int(r.control.Do("CLUSTER", "KEYSLOT", id.queueKey())); err != nil || got != id.slot() {
			t.Errorf("%s: slot %d, want %d, %v", id, id.slot(), got, err)
		}
	}
	thirds := map[int]bool{}
	for _, id := range (&clusterQueue{}).checks() {
		thirds[id.slot()/(clusterSlots/3+1)] = true
	}
	if len(thirds) != 3 {
		t.Errorf("thirds %v", thirds)
	}
}

// movingAddress is an address of a provider: what is behind it changes, and connections to what was there hang.
type movingAddress struct {
	listener net.Listener
	server   *redisServer
	behind   chan *redisServer
}

func (m *movingAddress) address() string                             { return m.listener.Addr().String() }
func (m *movingAddress) holder(*testing.T, semaphoreID) *redisServer { return m.server }

// A provider's address moves to the replica: the old primary hangs, and connections with it.
func TestProviderFailover(t *testing.T) {
	t.Parallel()
	primary, replica := startRedis(t), startRedis(t)
	replica.do(t, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
	primary.do(t, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
	replica.do(t, "REPLICAOF", "127.0.0.1", portOf(primary.address))
	eventually(t, 20*time.Second, func() error {
		if info := string(replica.do(t, "INFO", "replication").([]byte)); !strings.Contains(info, "master_link_status:up") {
			return errors.New(info)
		}
		return nil
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	m := &movingAddress{listener: l, server: primary, behind: make(chan *redisServer, 1)}
	go func() {
		to := primary
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			select {
			case to = <-m.behind:
			default:
			}
			address := to.address
			go func() {
				defer client.Close()
				server, err := net.Dial("tcp", address)
				if err != nil {
					return
				}
				defer server.Close()
				go func() { _, _ = io.Copy(server, client) }()
				_, _ = io.Copy(client, server)
			}()
		}
	}()
	f := startTraffic(t, m, freshID())
	f.strike(func() {
		primary.pause(t)
		time.Sleep(time.Second) // the provider takes so long
		replica.do(t, "REPLICAOF", "NO", "ONE")
		m.server = replica
		m.behind <- replica
	})
	f.wantRecovered(t, 5*time.Second)
}
