//go:build failover

package main

import (
	"fmt"
	"testing"
	"time"
)

// servedGroup is a group that tells which server serves a semaphore.
type servedGroup interface {
	testGroup
	serves(t *testing.T, s *redisServer, id semaphoreID) bool
}

// Gated pods stand in line while the primary is killed, at rest and in the middle of a hand-over: the line keeps its order, nothing is lost
// or doubled, and gates are lifted again soon after.
func TestGateFailover(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) servedGroup{
		"Sentinel": func(t *testing.T) servedGroup { return startSentinelGroup(t) },
		"Cluster":  func(t *testing.T) servedGroup { return startCluster(t) },
	} {
		begin := func(t *testing.T) (r *relay, kill func()) {
			t.Parallel()
			group := start(t)
			c := groupConfig(t, group.address())
			c.staleThreshold = 8 * time.Second
			g := newGateTestOn(t, nil, c, 2)
			g.redis = group.holder(t, g.id)
			r, _ = startRelay(g, 8)
			r.handOvers(3, 0)
			r.wantWhole()
			return r, func() {
				old := g.redis
				old.kill(t)
				eventually(t, 20*time.Second, func() error {
					if group.serves(t, old, g.id) {
						return fmt.Errorf("%s is the primary yet", old.address)
					}
					return nil
				})
				g.redis = group.holder(t, g.id)
			}
		}
		t.Run(name+", at rest", func(t *testing.T) {
			r, kill := begin(t)
			wantInStep(t, r.redis)
			kill()
			over := time.Now()
			r.handOver(func() {})
			if took := time.Since(over); took > 2*time.Second+pollMost {
				t.Errorf("the next gate was lifted %s after the servers had failed over", took)
			}
			r.handOvers(4, pollMost)
			r.wantWhole()
		})
		t.Run(name+", in a hand-over", func(t *testing.T) {
			r, kill := begin(t)
			r.handOver(kill)
			r.wantWhole() // if need be, once the token that was given back without its knowledge is stale
			r.handOvers(4, pollMost)
			r.wantWhole()
		})
	}
}
