//go:build failover || chaos

package main

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// downAfter is after how long without an answer the Sentinels, and the nodes of a Cluster, take a server for gone.
const downAfter = time.Second

// testGroup is a queue of several servers, or whose server changes.
type testGroup interface {
	address() string
	holder(t *testing.T, id semaphoreID) *redisServer
}

// kill ends the server as the loss of its machine does.
func (s *redisServer) kill(t *testing.T) {
	t.Helper()
	must(t, s.cmd.Process.Signal(syscall.SIGKILL))
	_ = s.cmd.Wait()
}

// wantInStep waits until all replicas have what a server has, which takes no more writes.
func wantInStep(t *testing.T, primary *redisServer) {
	eventually(t, 10*time.Second, func() error {
		info, err := redis.String(primary.control.Do("INFO", "replication"))
		if err != nil {
			return err
		}
		_, rest, _ := strings.Cut(info, "master_repl_offset:")
		offset, _, _ := strings.Cut(rest, "\r")
		if strings.Count(info, ",offset="+offset+",") != strings.Count(info, ",offset=") {
			return fmt.Errorf("not in step: %s", info)
		}
		return nil
	})
}

func (s *redisServer) role(t *testing.T) string {
	t.Helper()
	reply, err := redis.Values(s.control.Do("ROLE"))
	if err != nil {
		return err.Error()
	}
	return string(reply[0].([]byte))
}

// redial is for after a failover, in which servers close their connections.
func (s *redisServer) redial(t *testing.T) {
	t.Helper()
	c, err := redis.Dial("tcp", s.address, s.options...)
	must(t, err)
	s.control.Close()
	s.control = c
}

// sentinelGroup is a primary with two replicas, and three Sentinels.
type sentinelGroup struct {
	servers   []*redisServer
	sentinels []*redisServer
}

func startSentinelGroup(t *testing.T, settings ...string) *sentinelGroup {
	t.Helper()
	g := new(sentinelGroup)
	for i := range 3 {
		s, err := launchRedisOf("", t.TempDir(), func(port string) []string {
			args := append([]string{"--port", port, "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"}, settings...)
			if i > 0 {
				args = append(args, "--replicaof", "127.0.0.1 "+portOf(g.servers[0].address))
			}
			return args
		})
		must(t, err)
		t.Cleanup(s.stop)
		g.servers = append(g.servers, s)
	}
	dir := t.TempDir()
	for range 3 {
		s, err := launchSentinel(dir)
		must(t, err)
		t.Cleanup(s.stop)
		s.do(t, "SENTINEL", "MONITOR", "tokens", "127.0.0.1", portOf(g.servers[0].address), 2)
		s.do(t, "SENTINEL", "SET", "tokens", "down-after-milliseconds", downAfter.Milliseconds(), "failover-timeout", 6000)
		g.sentinels = append(g.sentinels, s)
	}
	g.wantReady(t, 2)
	return g
}

// wantReady waits until all Sentinels know each other and a primary with so many replicas that are in step.
func (g *sentinelGroup) wantReady(t *testing.T, replicas int) {
	t.Helper()
	eventually(t, 40*time.Second, func() error {
		primary := g.primary(t)
		if primary == nil {
			var roles []string
			for _, s := range g.servers {
				roles = append(roles, s.address+": "+s.role(t))
			}
			return fmt.Errorf("there is not one primary: %v", roles)
		}
		info, err := redis.String(primary.control.Do("INFO", "replication"))
		if n := strings.Count(info, "state=online"); err != nil || n < replicas {
			return fmt.Errorf("%d replicas of %s are online, %v", n, primary.address, err)
		}
		for _, s := range g.sentinels {
			m, err := redis.StringMap(s.control.Do("SENTINEL", "MASTER", "tokens"))
			if err != nil || m["num-other-sentinels"] != "2" || m["num-slaves"] < fmt.Sprint(replicas) || m["port"] != portOf(primary.address) || m["flags"] != "master" {
				return fmt.Errorf("Sentinel %s knows %s other Sentinels and %s replicas of %s (%s), %v", s.address, m["num-other-sentinels"], m["num-slaves"], m["port"], m["flags"], err)
			}
		}
		return nil
	})
}

// primary is the only server that is a primary, or nil.
func (g *sentinelGroup) primary(t *testing.T) (primary *redisServer) {
	t.Helper()
	for _, s := range g.servers {
		if s.cmd.ProcessState != nil {
			continue
		}
		if _, err := s.control.Do("PING"); err != nil {
			s.redial(t)
		}
		if s.role(t) == "master" {
			if primary != nil {
				return nil
			}
			primary = s
		}
	}
	return primary
}

func (g *sentinelGroup) address() string {
	var addresses []string
	for _, s := range g.sentinels {
		addresses = append(addresses, s.address)
	}
	return "redis+sentinel://" + strings.Join(addresses, ",") + "/tokens"
}

// holder is the server that holds the semaphore now, as the Sentinels see it.
func (g *sentinelGroup) holder(t *testing.T, _ semaphoreID) *redisServer {
	t.Helper()
	for _, s := range g.sentinels {
		if s.cmd.ProcessState != nil {
			continue
		}
		named, err := redis.Strings(s.control.Do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "tokens"))
		must(t, err)
		for _, s := range g.servers {
			if portOf(s.address) == named[1] {
				s.redial(t)
				return s
			}
		}
	}
	t.Fatal("no Sentinel knows a primary")
	return nil
}

// named is the port of the primary that the first Sentinel names.
func (g *sentinelGroup) named(t *testing.T) string {
	named, err := redis.Strings(g.sentinels[0].do(t, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "tokens"), nil)
	must(t, err)
	return named[1]
}

// serves reports whether a server is the primary, as the first Sentinel sees it.
func (g *sentinelGroup) serves(t *testing.T, s *redisServer, _ semaphoreID) bool {
	return g.named(t) == portOf(s.address)
}

// redisCluster is a Cluster of three masters and three replicas.
type redisCluster struct{ nodes []*redisServer }

func startCluster(t *testing.T) *redisCluster {
	t.Helper()
	c := new(redisCluster)
	create := []string{"--cluster", "create", "--cluster-replicas", "1", "--cluster-yes"}
	for range 6 {
		bus := freeAddress(t)
		s, err := launchRedisOf("", t.TempDir(), func(port string) []string {
			return []string{"--port", port, "--repl-diskless-sync-delay", "0", "--cluster-enabled", "yes", "--cluster-port", portOf(bus),
				"--cluster-node-timeout", fmt.Sprint(downAfter.Milliseconds()), "--cluster-require-full-coverage", "no",
				"--cluster-allow-replica-migration", "no"} // or a master without slots becomes a replica, of which redis-cli complains
		})
		must(t, err)
		t.Cleanup(s.stop)
		c.nodes = append(c.nodes, s)
		create = append(create, s.address)
	}
	eventually(t, 30*time.Second, func() error {
		if out, err := exec.Command("redis-cli", create...).CombinedOutput(); err != nil && !strings.Contains(string(out), "is not empty") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	c.wantReady(t, 3)
	return c
}

// wantReady waits until all nodes agree, and so many replicas are in step.
func (c *redisCluster) wantReady(t *testing.T, replicas int) {
	t.Helper()
	eventually(t, 40*time.Second, func() error {
		online := 0
		var seen string
		for _, n := range c.nodes {
			if n.cmd.ProcessState != nil {
				continue
			}
			info, err := redis.String(n.control.Do("INFO", "replication"))
			if err != nil {
				return err
			}
			online += strings.Count(info, "state=online")
			slots := fmt.Sprint(c.ranges(t, n))
			if state, err := redis.String(n.control.Do("CLUSTER", "INFO")); err != nil || !strings.Contains(state, "cluster_state:ok") {
				return fmt.Errorf("%s: %s, %v", n.address, state, err)
			}
			if seen != "" && seen != slots {
				return fmt.Errorf("one node says %s, another %s", seen, slots)
			}
			seen = slots
		}
		if online < replicas {
			return fmt.Errorf("%d replicas are online", online)
		}
		return nil
	})
}

func (c *redisCluster) ranges(t *testing.T, asked *redisServer) []slotRange {
	t.Helper()
	ranges, err := (&clusterQueue{}).askOne(t.Context(), asked.address)
	must(t, err)
	slices.SortFunc(ranges, func(a, b slotRange) int { return a.from - b.from })
	return ranges
}

func (c *redisCluster) address() string {
	return "redis+cluster://" + c.nodes[0].address + "," + c.nodes[1].address + "," + c.nodes[2].address
}

func (c *redisCluster) node(address string) *redisServer {
	for _, n := range c.nodes {
		if n.address == address {
			return n
		}
	}
	return nil
}

// holder is the server that holds the semaphore now.
func (c *redisCluster) holder(t *testing.T, id semaphoreID) *redisServer {
	t.Helper()
	for _, n := range c.nodes {
		if n.cmd.ProcessState != nil {
			continue
		}
		ranges, err := (&clusterQueue{}).askOne(t.Context(), n.address)
		if err != nil { // it is stopped
			continue
		}
		for _, r := range ranges {
			if r.from <= id.slot() && id.slot() <= r.to {
				if found := c.node(r.address); found.cmd.ProcessState == nil {
					return found
				}
			}
		}
	}
	t.Fatal("no node knows who serves", id)
	return nil
}

// replicaOf is the replica of a master.
func (c *redisCluster) replicaOf(t *testing.T, master *redisServer) *redisServer {
	t.Helper()
	for _, n := range c.nodes {
		reply, err := redis.Values(n.control.Do("ROLE"))
		must(t, err)
		if string(reply[0].([]byte)) == "slave" && fmt.Sprint(reply[2]) == portOf(master.address) {
			return n
		}
	}
	t.Fatal("no replica of", master.address)
	return nil
}

// otherID is a semaphore that another master serves than this one.
func (c *redisCluster) otherID(t *testing.T, id semaphoreID) semaphoreID {
	t.Helper()
	for {
		if other := freshID(); c.holder(t, other) != c.holder(t, id) {
			return other
		}
	}
}

// serves reports whether a node serves a semaphore, as another one sees it.
func (c *redisCluster) serves(t *testing.T, s *redisServer, id semaphoreID) bool {
	for _, n := range c.nodes {
		if n == s {
			continue
		}
		for _, r := range c.ranges(t, n) {
			if r.from <= id.slot() && id.slot() <= r.to {
				return r.address == s.address
			}
		}
	}
	return false
}
