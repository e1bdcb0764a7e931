//go:build failover

package main

import (
	"fmt"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// servedGroup is a group that tells which server serves a semaphore.
type servedGroup interface {
	rig.Group
	Serves(t testing.TB, s *rig.Redis, id fmt.Stringer) bool
}

// Gated pods stand in line while the primary is killed, at rest and in the middle of a hand-over: the line keeps its order, nothing is lost
// or doubled, and gates are lifted again soon after.
func TestGateFailover(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) servedGroup{
		"Sentinel": func(t *testing.T) servedGroup { return rig.StartSentinelGroup(t) },
		"Cluster":  func(t *testing.T) servedGroup { return rig.StartCluster(t) },
	} {
		begin := func(t *testing.T) (r *relay, kill func()) {
			t.Parallel()
			group := start(t)
			c := groupConfig(t, group.Address())
			c.staleThreshold = 8 * time.Second
			g := newGateTestOn(t, nil, c, 2)
			g.redis = group.Holder(t, g.id)
			r, _ = startRelay(g, 8)
			r.handOvers(3, 0)
			r.wantWhole()
			return r, func() {
				old := g.redis
				old.Crash(t)
				rig.Eventually(t, 20*time.Second, func() error {
					if group.Serves(t, old, g.id) {
						return fmt.Errorf("%s is the primary yet", old.Address)
					}
					return nil
				})
				g.redis = group.Holder(t, g.id)
			}
		}
		t.Run(name+", at rest", func(t *testing.T) {
			r, kill := begin(t)
			r.redis.WantReplicasInSync(t)
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
