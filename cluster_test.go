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
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// A master of a Cluster is killed, hangs, or is replaced by hand: only what it served is affected.
func TestClusterFailover(t *testing.T) {
	for name, c := range map[string]struct {
		bound  time.Duration
		strike func(t *testing.T, c *rig.Cluster, old *rig.Redis)
	}{
		"killed":  {rig.DownAfter + 3*time.Second, func(t *testing.T, _ *rig.Cluster, old *rig.Redis) { old.Crash(t) }},
		"stopped": {rig.DownAfter + 3*time.Second, func(t *testing.T, _ *rig.Cluster, old *rig.Redis) { old.Pause(t) }},
		"by hand": {2 * time.Second, func(t *testing.T, c *rig.Cluster, old *rig.Redis) {
			c.ReplicaOf(t, old).Do(t, "CLUSTER", "FAILOVER")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := rig.StartCluster(t)
			affected := freshID()
			other := semaphoreOf(cluster.OtherID(t, affected))
			f := startTraffic(t, cluster, affected, other)
			old := cluster.Holder(t, affected)
			f.strike(func() { c.strike(t, cluster, old) })
			f.wantRecovered(t, f.recoveredBy(t, c.bound, func() bool { return cluster.Serves(t, old, affected) }), other)
		})
	}
}

// All slots of a master move to another under load: nothing fails, nothing is lost.
func TestClusterSlotsMove(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	id := freshID()
	f := startTraffic(t, c, id)
	from := c.Holder(t, id)
	to := c.Holder(t, c.OtherID(t, id))
	name := func(n *rig.Redis) string { return string(n.Do(t, "CLUSTER", "MYID").([]byte)) }
	slots := 0
	for _, r := range c.Ranges(t, from) {
		if r.Address == from.Address {
			slots += r.To - r.From + 1
		}
	}
	f.strike(func() {
		out, err := exec.Command("redis-cli", "--cluster", "reshard", from.Address, "--cluster-from", name(from), "--cluster-to", name(to),
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
	if c.Holder(t, id) != to {
		t.Error("it has not moved")
	}
	f.wantRecovered(t, time.Second)
}

// A semaphore whose slot is half moved: keys here, keys there, and a key that a script uses up.
func TestClusterSlotHalfMoved(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	s := semaphoresOf(t, groupConfig(t, c.Address()))
	id := freshID()
	tokens := []string{acquire(t, s, id, 3), acquire(t, s, id, 3)}
	from, to := c.Holder(t, id), c.Holder(t, c.OtherID(t, id))
	name := func(n *rig.Redis) string { return string(n.Do(t, "CLUSTER", "MYID").([]byte)) }
	to.Do(t, "CLUSTER", "SETSLOT", id.slot(), "IMPORTING", name(from))
	from.Do(t, "CLUSTER", "SETSLOT", id.slot(), "MIGRATING", name(to))
	move := func(key string) {
		from.Do(t, "MIGRATE", "127.0.0.1", rig.Port(to.Address), key, 0, 5000)
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
	for _, n := range []*rig.Redis{to, from} {
		n.Do(t, "CLUSTER", "SETSLOT", id.slot(), "NODE", name(to))
	}
	wantDone(t, done)
	to.WantInflight(t, id, tokens...)
	wantFullError(t, s, id, 3, 3)
	for _, token := range tokens {
		giveBack(t, s, id, token)
	}
	to.WantCounts(t, id, 3, 0)
}

// While a slot moves and all keys of a semaphore have moved already, the old node sends us to the new one, which answers who says
// ASKING; with the users of docs/security.md.
func TestClusterSlotMoving(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	rules := strings.Fields(sidecarACL + " " + clusterACL)
	for _, n := range c.Nodes {
		n.Do(t, "ACL", append([]any{"SETUSER", "sidecar", "on", ">" + rig.Password}, rig.Anys(rules)...)...)
	}
	config := groupConfig(t, c.Address())
	config.redis = redisSettings{username: "sidecar", password: rig.Password}
	s := newSemaphores(config.settings, newRedlock(config.redisAddresses, redisSettings{}, 1), 1, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.close(context.Background())) })
	id := freshID()
	// A pod of length 1 waits while others of length 3 come and go: all keys are there.
	holder := acquire(t, s, id, 3)
	gone := acquire(t, s, id, 3)
	if a, err := s.runAcquire(t.Context(), id, acquireRequest{uuid.NewString(), 1, joinLine, ""}); err != nil || a.status != acquireFull {
		t.Fatalf("got %+v, %v", a, err)
	}
	giveBack(t, s, id, gone)
	from, to := c.Holder(t, id), c.Holder(t, c.OtherID(t, id))
	name := func(n *rig.Redis) string { return string(n.Do(t, "CLUSTER", "MYID").([]byte)) }
	to.Do(t, "CLUSTER", "SETSLOT", id.slot(), "IMPORTING", name(from))
	from.Do(t, "CLUSTER", "SETSLOT", id.slot(), "MIGRATING", name(to))
	for _, key := range id.keys() {
		if answer := from.Do(t, "MIGRATE", "127.0.0.1", rig.Port(to.Address), key, 0, 5000); answer != "OK" {
			t.Fatalf("%s: %v: it is to be there", key, answer)
		}
	}
	taken := acquire(t, s, id, 3)
	for _, rule := range strings.Fields(clusterACL) {
		for _, n := range c.Nodes {
			n.Do(t, "ACL", "SETUSER", "sidecar", "-"+rule[1:])
		}
		fresh := newSemaphores(config.settings, nil, 1, slog.New(slog.DiscardHandler))
		if rule == "+role" {
			fresh.queue.(*clusterQueue).doubted[from.Address] = true
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		if _, err := fresh.heartbeat(ctx, id, holder, "", 0); err == nil || !strings.Contains(err.Error(), "NOPERM") {
			t.Errorf("without %s: %v", rule, err)
		}
		cancel()
		rig.Must(t, fresh.queue.close())
		for _, n := range c.Nodes {
			n.Do(t, "ACL", "SETUSER", "sidecar", rule)
		}
	}
	for _, n := range []*rig.Redis{to, from} {
		n.Do(t, "CLUSTER", "SETSLOT", id.slot(), "NODE", name(to))
	}
	to.WantInflight(t, id, holder, taken)
	if _, err := s.heartbeat(t.Context(), id, taken, "", 0); err != nil {
		t.Error(err)
	}
}

// The slots of the program's are those of Redis, and each third of them has one of those by which the Cluster is tried.
func TestSlots(t *testing.T) {
	t.Parallel()
	r := rig.StartRedisWith(t, rig.RedisOptions{Kind: rig.ClusterQueue})
	for range 100 {
		id := semaphoreID{"shop", uuid.NewString()}
		if got, err := redis.Int(r.Control.Do("CLUSTER", "KEYSLOT", id.queueKey())); err != nil || got != id.slot() {
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
