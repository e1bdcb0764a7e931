package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// A semaphore costs what its pods need, not what its length allows.
func TestMemoryOfGreatLengths(t *testing.T) {
	t.Parallel()
	const keys, most = 300, 20 << 20
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	acquire(t, s, id, maxLength) // so that the scripts are there
	before := r.Info(t, "memory", "used_memory:")
	for range keys {
		acquire(t, s, freshID(), maxLength)
	}
	grown := r.Info(t, "memory", "used_memory:") - before
	t.Logf("%d bytes for %d semaphores", grown, keys)
	if grown > most {
		t.Errorf("Redis has grown by %d bytes, want at most %d", grown, most)
	}
}

// What nobody uses any more goes within minutes, whoever was the last to leave; what is in use stays.
func TestUnusedSemaphoresExpire(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	wantTTL := func(what string, busy bool) {
		t.Helper()
		keys := 0
		for _, key := range id.keys() {
			ttl, err := redis.Int(r.Do(t, "TTL", key), nil)
			rig.Must(t, err)
			if ttl == -2 {
				continue
			}
			keys++
			if ttl < 0 || busy && ttl < 86400/2 || !busy && ttl > 300 {
				t.Errorf("%s: %s has a time to live of %d", what, key, ttl)
			}
		}
		if keys == 0 {
			t.Errorf("%s: there are no keys", what)
		}
	}
	token := acquire(t, s, id, 2)
	wantTTL("held", true)
	giveBack(t, s, id, token)
	wantTTL("given back", false)
	_, err := s.heartbeat(ctx, id, token, "", 0)
	rig.Must(t, err)
	wantTTL("back late", true)
	giveBack(t, s, id, token)
	giveBack(t, s, id, token)
	wantTTL("given back twice", false)

	token = acquire(t, s, id, 1)
	waiting, _ := stand(t, r, s, id, false)
	wantTTL("waited for", true)
	giveBack(t, s, id, token)
	wantTTL("kept for the one that waits", true)
	wantFullError(t, s, id, 1, 0)
	wantTTL("refused", true)
	giveBack(t, s, id, waiting)
	wantTTL("the line left", false)

	r.MakeStale(t, id, acquire(t, s, id, 1))
	maintain(t, s, id, 1)
	wantTTL("reclaimed", false)
	token = acquire(t, s, id, 1)
	wantTTL("held again", true)

	silent, _ := stand(t, r, s, id, false)
	r.Unseen(t, id, silent, time.Minute)
	giveBack(t, s, id, token) // finds the one in line gone
	r.WantLine(t, id)
	wantTTL("the last in line dropped", false)
}

// scriptCost is what scripts have done so far.
type scriptCost struct{ commands, published, micros int }

func costSoFar(t *testing.T, s *rig.Redis) (c scriptCost) {
	t.Helper()
	for name, n := range s.CommandCalls(t) {
		if name != "info" && name != "evalsha" && name != "eval" {
			c.commands += n
		}
	}
	c.published = s.CommandCalls(t)["publish"]
	c.micros = s.Info(t, "commandstats", `cmdstat_evalsha:calls=\d+,usec=`)
	return c
}

// during is what scripts do while f runs.
func costDuring(t *testing.T, s *rig.Redis, f func()) scriptCost {
	t.Helper()
	before := costSoFar(t, s)
	f()
	after := costSoFar(t, s)
	return scriptCost{after.commands - before.commands, after.published - before.published, after.micros - before.micros}
}

// median sorts the values.
func median[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

// A great length costs an admission no more than a small one: the first of a semaphore, which makes its tokens, and all others.
func TestAdmissionCostsTheSameForAnyLength(t *testing.T) {
	t.Parallel()
	const small, pairs = 3, 50
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	giveBack(t, s, id, acquire(t, s, id, 1)) // so that the scripts are there
	commands, micros := map[string][]int{}, map[string][]int{}
	name := func(admission, length int) string { return fmt.Sprintf("admission %d of length %d", admission, length) }
	for range pairs { // in turn, so that what disturbs one disturbs the other
		for _, length := range []int{small, maxLength} {
			id := freshID()
			for i := range small {
				c := costDuring(t, r, func() { acquire(t, s, id, length) })
				commands[name(i, length)] = append(commands[name(i, length)], c.commands)
				micros[name(i, length)] = append(micros[name(i, length)], c.micros)
			}
		}
	}
	for i := range small {
		for what, c := range map[string]struct {
			values map[string][]int
			factor int // for how much longer a command may take
		}{"commands": {commands, 1}, "µs": {micros, 2}} {
			few, lots := median(c.values[name(i, small)]), median(c.values[name(i, maxLength)])
			t.Logf("admission %d: %d %s with length %d, %d with length %d", i+1, few, what, small, lots, maxLength)
			if lots > c.factor*few {
				t.Error("too many")
			}
		}
	}
}
