package failover

import (
	"fmt"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// servingGroup is a group that reports which server serves a semaphore.
type servingGroup interface {
	rig.Group
	Serves(t testing.TB, s *rig.Redis, id fmt.Stringer) bool
}

// The primary is killed while gated pods are in line, at rest and during a hand-over. The
// line keeps its order, no token is lost or doubled, and gates are soon lifted again.
func TestGateFailover(t *testing.T) {
	t.Parallel()
	// If the new server does not call a gate, the gate asks again within four seconds.
	const delay = 2*time.Second + 4*time.Second
	for name, start := range map[string]func(*testing.T) servingGroup{
		"Sentinel": func(t *testing.T) servingGroup { return rig.StartSentinelGroup(t) },
		"Cluster":  func(t *testing.T) servingGroup { return rig.StartCluster(t) },
	} {
		begin := func(t *testing.T) (r *relay, kill func()) {
			t.Parallel()
			group := start(t)
			i := newInstallation(t, group.Address(), rig.Timing{Interval: 2 * time.Second, Threshold: 8 * time.Second})
			r = newRelayOn(t, i, 2, func(id rig.ID) *rig.Redis { return group.Holder(t, id) })
			r.beginWithTwoGates(8)
			r.rest()
			r.wantWhole()
			return r, func() {
				old := r.redis
				old.Crash(t)
				rig.Eventually(t, patience, func() error {
					if group.Serves(t, old, r.id) {
						return fmt.Errorf("%s is still the primary", old.Address)
					}
					return nil
				})
				r.redis = group.Holder(t, r.id)
			}
		}
		t.Run(name+", at rest", func(t *testing.T) {
			r, kill := begin(t)
			r.redis.WantReplicasInSync(t)
			kill()
			took := r.handOvers(5)
			r.wantWhole()
			r.wantQuick("after the servers had failed over", delay, took)
		})
		t.Run(name+", in a hand-over", func(t *testing.T) {
			r, kill := begin(t)
			r.handOver(kill)
			// The new primary may not know that the token was given back. Then the token
			// is free once it is stale.
			r.wantWhole()
			took := r.handOvers(4)
			r.wantWhole()
			r.wantQuick("after the servers had failed over", delay, took)
		})
	}
}
