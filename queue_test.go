package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// groupConfig is a configuration whose queue is a group, with a lock server of its own.
func groupConfig(t *testing.T, address string) webhookConfig {
	t.Helper()
	c := beating(address, 2*time.Second)
	c.redisAddresses = []string{rig.StartRedis(t).Address}
	return c
}

// The program computes the slots that Redis computes. Of the semaphores by which it checks
// a Cluster, each third of the slots has one.
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

// A script runs while half of the keys of its semaphore have moved to another node. It uses
// up one of the keys.
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

// All keys of a semaphore have moved, and its slot has not. The old node redirects the
// program, and the new node answers only after ASKING. The user has only the rules of
// docs/security.md.
func TestClusterSlotMoving(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	user := append([]string{"SETUSER", "sidecar", "on", ">" + rig.Password},
		strings.Fields(rig.SidecarACL+" "+rig.ClusterACL)...)
	for _, n := range c.Nodes {
		n.Do(t, "ACL", rig.Anys(user)...)
	}
	config := groupConfig(t, c.Address())
	config.redis = redisSettings{username: "sidecar", password: rig.Password}
	locks := newRedlock(config.redisAddresses, redisSettings{}, 1)
	s := newSemaphores(config.sharedConfig, locks, 1, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.close(context.Background())) })
	id := freshID()
	// Pods of length 3 come and go while a pod of length 1 waits: then all keys exist.
	holder := acquire(t, s, id, 3)
	gone := acquire(t, s, id, 3)
	if a, err := s.ask(t.Context(), id, question{uuid.NewString(), 1, joinLine, ""}); err != nil || a.status != acquireFull {
		t.Fatalf("got %+v, %v", a, err)
	}
	giveBack(t, s, id, gone)
	from, to := c.Holder(t, id), c.Holder(t, c.OtherID(t, id))
	name := func(n *rig.Redis) string { return string(n.Do(t, "CLUSTER", "MYID").([]byte)) }
	to.Do(t, "CLUSTER", "SETSLOT", id.slot(), "IMPORTING", name(from))
	from.Do(t, "CLUSTER", "SETSLOT", id.slot(), "MIGRATING", name(to))
	for _, key := range id.keys() {
		if answer := from.Do(t, "MIGRATE", "127.0.0.1", rig.Port(to.Address), key, 0, 5000); answer != "OK" {
			t.Fatalf("%s was not moved: %v", key, answer)
		}
	}
	taken := acquire(t, s, id, 3)
	for _, rule := range strings.Fields(rig.ClusterACL) {
		for _, n := range c.Nodes {
			n.Do(t, "ACL", "SETUSER", "sidecar", "-"+rule[1:])
		}
		fresh := newSemaphores(config.sharedConfig, nil, 1, slog.New(slog.DiscardHandler))
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

// "status --watch" only reads. It finds the new primary, too.
func TestSentinelLook(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	id := freshID()
	acquire(t, semaphoresOf(t, groupConfig(t, g.Address())), id, 3)
	shared := groupConfig(t, g.Address()).sharedConfig
	s := newSemaphores(shared, nil, 1, slog.New(slog.DiscardHandler))
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
	rig.Eventually(t, 20*time.Second, look)
	// A process that has known its primary for long asks no Sentinels.
	s.queue.(*sentinelQueue).checked = time.Now().Add(-time.Hour)
	g.Servers[0].Crash(t)
	rig.Eventually(t, 20*time.Second, look)
}

// DNS answers once, later than the program waits for the Sentinels, and then never again.
// The program still finds them, and the next primary.
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
