//go:build failover

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

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
			f.wantRecovered(t, f.recoveredBy(t, c.bound, func() bool { return cluster.serves(t, old, affected) }), other)
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
		token, _, err := s.acquire(context.Background(), id, "", 3, time.Second)
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
// ASKING; with the users of docs/security.md.
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
	if a, err := s.ask(t.Context(), id, question{uuid.NewString(), 1, joinLine, ""}); err != nil || a.status != acquireFull {
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
		if _, err := fresh.heartbeat(ctx, id, holder, "", 0); err == nil || !strings.Contains(err.Error(), "NOPERM") {
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
	if _, err := s.heartbeat(t.Context(), id, taken, "", 0); err != nil {
		t.Error(err)
	}
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
