package failover

import (
	"fmt"
	"os/exec"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// A master of a Cluster is killed, hangs, or is replaced by hand. Only its semaphores are
// affected.
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
			cluster := rig.StartClusterWith(t, rig.GroupOptions{Bare: true})
			affected := rig.FreshID()
			other := cluster.OtherID(t, affected)
			f := startTraffic(t, cluster, affected, other)
			old := cluster.Holder(t, affected)
			f.strike(t, func() { c.strike(t, cluster, old) })
			bound := f.recoveredBy(t, c.bound, func() bool { return cluster.Serves(t, old, affected) })
			f.wantRecovered(t, bound, other)
		})
	}
}

// All slots of a master move to another master under load. No admission fails, and no
// token is lost.
func TestClusterSlotsMove(t *testing.T) {
	t.Parallel()
	c := rig.StartClusterWith(t, rig.GroupOptions{Bare: true})
	id := rig.FreshID()
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
	f.strike(t, func() {
		out, err := exec.Command("redis-cli", "--user", rig.AdminUser, "--pass", rig.Password, "--cluster", "reshard", from.Address,
			"--cluster-from", name(from), "--cluster-to", name(to),
			"--cluster-slots", fmt.Sprint(slots), "--cluster-yes").CombinedOutput()
		if err != nil {
			t.Errorf("%v: %s", err, out[max(0, len(out)-2000):])
		}
		t.Logf("%d slots moved in %s", slots, time.Since(f.fault))
	})
	for _, a := range f.since(0) {
		if a.err != nil && a.took < shortTimeout/2 {
			t.Errorf("%s after the start, an admission failed after %s: %v", a.start, a.took, a.err)
		}
	}
	if c.Holder(t, id) != to {
		t.Error("the semaphore has not moved")
	}
	f.wantRecovered(t, time.Second)
}
