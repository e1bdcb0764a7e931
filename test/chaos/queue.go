package chaos

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// queue is a queue with servers that the nemesis can disturb.
type queue interface {
	rig.Group
	data() []*rig.Redis      // the servers with tokens
	sentinels() []*rig.Redis // the servers that only watch the others
	WantReady(t testing.TB, replicas int)
	replica(t *testing.T, primary *rig.Redis) *rig.Redis
	handOver(t *testing.T, primary *rig.Redis)                    // to a replica with all data
	Serves(t testing.TB, server *rig.Redis, id fmt.Stringer) bool // as the others see it
	rejoin(t *testing.T, back *rig.Redis)                         // after a pause
	restart(t *testing.T, server *rig.Redis)                      // after a kill
}

// startQueue starts a queue of this kind. env is the environment of its servers. Webhooks
// load their scripts.
func startQueue(t *testing.T, kind string, env func(address string) []string) queue {
	o := rig.GroupOptions{Env: env, Args: serverArgs(queueUsers), Bare: true, Young: true}
	if kind == rig.ClusterQueue {
		return &clusterQueue{rig.StartClusterWith(t, o)}
	}
	o.Args = append(o.Args, "--min-replicas-to-write", "1", "--min-replicas-max-lag", "3")
	return &sentinelQueue{rig.StartSentinelGroupWith(t, o)}
}

// sentinelQueue is a queue that Sentinels watch.
type sentinelQueue struct{ *rig.SentinelGroup }

func (q *sentinelQueue) data() []*rig.Redis      { return q.Servers }
func (q *sentinelQueue) sentinels() []*rig.Redis { return q.Sentinels }

func (q *sentinelQueue) replica(_ *testing.T, primary *rig.Redis) *rig.Redis {
	for _, s := range q.Servers {
		if s != primary {
			return s
		}
	}
	return nil
}

// handOver stops writes on the primary, waits until the replicas are in sync, and asks
// for a failover. Sentinels that were paused are in TILT mode: they do nothing for half a
// minute.
func (q *sentinelQueue) handOver(t *testing.T, primary *rig.Redis) {
	const try = 6 * time.Second
	var asked time.Time
	rig.Eventually(t, 40*time.Second, func() error {
		if q.Named(t) != primary.Address {
			return nil
		}
		if time.Since(asked) > try {
			primary.Do(t, "CLIENT", "PAUSE", (try + 2*time.Second).Milliseconds(), "WRITE")
			primary.WantReplicasInSync(t)
			if _, err := q.Sentinels[0].Control.Do("SENTINEL", "FAILOVER", "tokens"); err != nil {
				return err
			}
			asked = time.Now()
		}
		return fmt.Errorf("%s is still the primary", primary.Address)
	})
	q.rejoin(t, primary)
	primary.Do(t, "CLIENT", "UNPAUSE")
}

// rejoin makes a running server a replica of the primary that the Sentinels report. They
// would do that themselves about ten seconds later.
func (q *sentinelQueue) rejoin(t *testing.T, back *rig.Redis) {
	if named := q.Named(t); named != back.Address {
		back.Redial(t)
		back.Do(t, "REPLICAOF", "127.0.0.1", rig.Port(named))
	}
}

// restart starts a killed server. Its arguments name its primary, as it has no
// configuration file.
func (q *sentinelQueue) restart(t *testing.T, server *rig.Redis) {
	if i := slices.Index(server.Args, "--replicaof"); i >= 0 {
		server.Args = slices.Delete(server.Args, i, i+2)
	}
	if named := q.Named(t); named != server.Address {
		server.Args = append(server.Args, "--replicaof", "127.0.0.1 "+rig.Port(named))
	}
	rig.Must(t, server.Start())
}

// clusterQueue is a queue on a Cluster.
type clusterQueue struct{ *rig.Cluster }

func (q *clusterQueue) data() []*rig.Redis      { return q.Nodes }
func (q *clusterQueue) sentinels() []*rig.Redis { return nil }

func (q *clusterQueue) replica(t *testing.T, primary *rig.Redis) *rig.Redis {
	return q.ReplicaOf(t, primary)
}

func (q *clusterQueue) handOver(t *testing.T, primary *rig.Redis) {
	replica := q.ReplicaOf(t, primary)
	replica.Do(t, "CLUSTER", "FAILOVER")
	rig.Eventually(t, 20*time.Second, func() error {
		if role := replica.Role(t); role != "master" {
			return fmt.Errorf("%s is a %s", replica.Address, role)
		}
		return nil
	})
}

func (q *clusterQueue) rejoin(*testing.T, *rig.Redis)           {}
func (q *clusterQueue) restart(t *testing.T, server *rig.Redis) { rig.Must(t, server.Start()) }
