//go:build chaos

package main

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// chaosQueue is a queue whose servers can be struck.
type chaosQueue interface {
	rig.Group
	data() []*rig.Redis     // those with tokens
	sentries() []*rig.Redis // those that only watch the others
	WantReady(t testing.TB, replicas int)
	replica(t *testing.T, primary *rig.Redis) *rig.Redis
	handOver(t *testing.T, primary *rig.Redis)               // to a replica that has all
	Serves(t testing.TB, s *rig.Redis, id fmt.Stringer) bool // as the others see it
	rejoin(t *testing.T, back *rig.Redis)                    // a server that was paused
	restart(t *testing.T, s *rig.Redis)                      // a server that was killed
}

func startChaosQueue(t *testing.T, kind string, env func(address string) []string) chaosQueue {
	if kind == rig.ClusterQueue {
		return &chaosCluster{rig.StartClusterWith(t, rig.GroupOptions{Env: env})}
	}
	return &chaosGroup{rig.StartSentinelGroupWith(t, rig.GroupOptions{Env: env, Args: []string{"--min-replicas-to-write", "1", "--min-replicas-max-lag", "3"}})}
}

type chaosGroup struct{ *rig.SentinelGroup }

func (g *chaosGroup) data() []*rig.Redis     { return g.Servers }
func (g *chaosGroup) sentries() []*rig.Redis { return g.Sentinels }

func (g *chaosGroup) replica(_ *testing.T, primary *rig.Redis) *rig.Redis {
	for _, s := range g.Servers {
		if s != primary {
			return s
		}
	}
	return nil
}

// handOver lets the primary take no more writes, and a replica take over once it has all. Sentinels that were paused do nothing for half a
// minute (TILT).
func (g *chaosGroup) handOver(t *testing.T, primary *rig.Redis) {
	const try = 6 * time.Second
	var asked time.Time
	rig.Eventually(t, 40*time.Second, func() error {
		if g.NamedPort(t) != rig.Port(primary.Address) {
			return nil
		}
		if time.Since(asked) > try {
			primary.Do(t, "CLIENT", "PAUSE", (try + 2*time.Second).Milliseconds(), "WRITE")
			primary.WantReplicasInSync(t)
			if _, err := g.Sentinels[0].Control.Do("SENTINEL", "FAILOVER", "tokens"); err != nil {
				return err
			}
			asked = time.Now()
		}
		return fmt.Errorf("%s is still the primary", primary.Address)
	})
	g.rejoin(t, primary)
	primary.Do(t, "CLIENT", "UNPAUSE")
}

// rejoin makes a server that runs, and that the Sentinels do not name any more, a replica of the one that they do. They would do it
// themselves some ten seconds later.
func (g *chaosGroup) rejoin(t *testing.T, back *rig.Redis) {
	if port := g.NamedPort(t); port != rig.Port(back.Address) {
		back.Redial(t)
		back.Do(t, "REPLICAOF", "127.0.0.1", port)
	}
}

// restart starts a server that was killed. It has no configuration that tells it whose replica it was.
func (g *chaosGroup) restart(t *testing.T, s *rig.Redis) {
	if i := slices.Index(s.Args, "--replicaof"); i >= 0 {
		s.Args = slices.Delete(s.Args, i, i+2)
	}
	if port := g.NamedPort(t); port != rig.Port(s.Address) {
		s.Args = append(s.Args, "--replicaof", "127.0.0.1 "+port)
	}
	rig.Must(t, s.Start())
}

type chaosCluster struct{ *rig.Cluster }

func (c *chaosCluster) data() []*rig.Redis     { return c.Nodes }
func (c *chaosCluster) sentries() []*rig.Redis { return nil }

func (c *chaosCluster) replica(t *testing.T, primary *rig.Redis) *rig.Redis {
	return c.ReplicaOf(t, primary)
}

func (c *chaosCluster) handOver(t *testing.T, primary *rig.Redis) {
	replica := c.ReplicaOf(t, primary)
	replica.Do(t, "CLUSTER", "FAILOVER")
	rig.Eventually(t, 20*time.Second, func() error {
		if role := replica.Role(t); role != "master" {
			return fmt.Errorf("%s is a %s", replica.Address, role)
		}
		return nil
	})
}

func (c *chaosCluster) rejoin(*testing.T, *rig.Redis)      {}
func (c *chaosCluster) restart(t *testing.T, s *rig.Redis) { rig.Must(t, s.Start()) }
