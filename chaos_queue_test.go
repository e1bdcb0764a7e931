//go:build chaos

package main

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// chaosQueue is a queue whose servers can be struck.
type chaosQueue interface {
	testGroup
	data() []*redisServer     // those with tokens
	sentries() []*redisServer // those that only watch the others
	wantReady(t *testing.T, replicas int)
	replica(t *testing.T, primary *redisServer) *redisServer
	handOver(t *testing.T, primary *redisServer)              // to a replica that has all
	serves(t *testing.T, s *redisServer, id semaphoreID) bool // as the others see it
	rejoin(t *testing.T, back *redisServer)                   // a server that was paused
	restart(t *testing.T, s *redisServer)                     // a server that was killed
}

func startChaosQueue(t *testing.T, kind string) chaosQueue {
	if kind == clusterTests {
		return &chaosCluster{startCluster(t)}
	}
	return &chaosGroup{startSentinelGroup(t, "--min-replicas-to-write", "1", "--min-replicas-max-lag", "3")}
}

type chaosGroup struct{ *sentinelGroup }

func (g *chaosGroup) data() []*redisServer     { return g.servers }
func (g *chaosGroup) sentries() []*redisServer { return g.sentinels }

func (g *chaosGroup) replica(_ *testing.T, primary *redisServer) *redisServer {
	for _, s := range g.servers {
		if s != primary {
			return s
		}
	}
	return nil
}

// handOver lets the primary take no more writes, and a replica take over once it has all. Sentinels that were paused do nothing for half a
// minute (TILT).
func (g *chaosGroup) handOver(t *testing.T, primary *redisServer) {
	const try = 6 * time.Second
	var asked time.Time
	eventually(t, 40*time.Second, func() error {
		if g.named(t) != portOf(primary.address) {
			return nil
		}
		if time.Since(asked) > try {
			primary.do(t, "CLIENT", "PAUSE", (try + 2*time.Second).Milliseconds(), "WRITE")
			wantInStep(t, primary)
			if _, err := g.sentinels[0].control.Do("SENTINEL", "FAILOVER", "tokens"); err != nil {
				return err
			}
			asked = time.Now()
		}
		return fmt.Errorf("%s is still the primary", primary.address)
	})
	g.rejoin(t, primary)
	primary.do(t, "CLIENT", "UNPAUSE")
}

// rejoin makes a server that runs, and that the Sentinels do not name any more, a replica of the one that they do. They would do it
// themselves some ten seconds later.
func (g *chaosGroup) rejoin(t *testing.T, back *redisServer) {
	if port := g.named(t); port != portOf(back.address) {
		back.redial(t)
		back.do(t, "REPLICAOF", "127.0.0.1", port)
	}
}

// restart starts a server that was killed. It has no configuration that tells it whose replica it was.
func (g *chaosGroup) restart(t *testing.T, s *redisServer) {
	if i := slices.Index(s.args, "--replicaof"); i >= 0 {
		s.args = slices.Delete(s.args, i, i+2)
	}
	if port := g.named(t); port != portOf(s.address) {
		s.args = append(s.args, "--replicaof", "127.0.0.1 "+port)
	}
	must(t, s.start())
}

type chaosCluster struct{ *redisCluster }

func (c *chaosCluster) data() []*redisServer     { return c.nodes }
func (c *chaosCluster) sentries() []*redisServer { return nil }

func (c *chaosCluster) replica(t *testing.T, primary *redisServer) *redisServer {
	return c.replicaOf(t, primary)
}

func (c *chaosCluster) handOver(t *testing.T, primary *redisServer) {
	replica := c.replicaOf(t, primary)
	replica.do(t, "CLUSTER", "FAILOVER")
	eventually(t, 20*time.Second, func() error {
		if role := replica.role(t); role != "master" {
			return fmt.Errorf("%s is a %s", replica.address, role)
		}
		return nil
	})
}

func (c *chaosCluster) rejoin(*testing.T, *redisServer)      {}
func (c *chaosCluster) restart(t *testing.T, s *redisServer) { must(t, s.start()) }
