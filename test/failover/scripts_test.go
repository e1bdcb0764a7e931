package failover

import (
	"fmt"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// group is a queue that fails over.
type group interface {
	rig.Group
	Serves(t testing.TB, server *rig.Redis, id fmt.Stringer) bool
}

// A webhook loads the scripts into a new primary within two seconds. No pod is admitted,
// and no sidecar runs.
func TestScriptsOfANewPrimary(t *testing.T) {
	id := rig.FreshID()
	for name, c := range map[string]struct {
		start  func(t *testing.T) group
		strike func(t *testing.T, g group, old *rig.Redis)
	}{
		"Sentinel, killed": {startBareSentinelGroup, func(t *testing.T, _ group, old *rig.Redis) { old.Crash(t) }},
		"Sentinel, by hand": {startBareSentinelGroup, func(t *testing.T, g group, _ *rig.Redis) {
			g.(*rig.SentinelGroup).Sentinels[1].Do(t, "SENTINEL", "FAILOVER", "tokens")
		}},
		"Cluster, killed": {startBareCluster, func(t *testing.T, _ group, old *rig.Redis) { old.Crash(t) }},
		"Cluster, by hand": {startBareCluster, func(t *testing.T, g group, old *rig.Redis) {
			g.(*rig.Cluster).ReplicaOf(t, old).Do(t, "CLUSTER", "FAILOVER")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := c.start(t)
			newInstallation(t, g.Address(), slowTiming).startWebhook(t)
			hasScripts := func() error {
				there, err := redis.Ints(g.Holder(t, id).Control.Do("SCRIPT", "EXISTS",
					rig.Script("acquire").Hash(), rig.Script("heartbeat").Hash(), rig.Script("hold").Hash()))
				if err == nil && (there[0] == 0 || there[1] == 0 || there[2] == 0) {
					err = fmt.Errorf("%s knows %v of the scripts", g.Holder(t, id).Address, there)
				}
				return err
			}
			rig.Eventually(t, patience, hasScripts)
			old := g.Holder(t, id)
			c.strike(t, g, old)
			rig.Eventually(t, patience, func() error {
				if g.Serves(t, old, id) {
					return fmt.Errorf("%s is still the primary", old.Address)
				}
				return nil
			})
			start := time.Now()
			rig.Eventually(t, patience, hasScripts)
			rig.WantWithin(t, time.Since(start), 2*time.Second, "loading the scripts into a new primary")
		})
	}
}

func startBareSentinelGroup(t *testing.T) group {
	return rig.StartSentinelGroupWith(t, rig.GroupOptions{Bare: true})
}

func startBareCluster(t *testing.T) group {
	return rig.StartClusterWith(t, rig.GroupOptions{Bare: true})
}
