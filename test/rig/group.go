package rig

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// DownAfter is the silence after which Sentinels, and the nodes of a Cluster, consider a
// server down.
const DownAfter = time.Second

// ClusterSlots is the number of slots of a Redis Cluster.
const ClusterSlots = 16384

// Group is a queue of several servers, or one whose server changes.
type Group interface {
	Address() string

	// Holder returns the server that holds a semaphore now.
	Holder(t testing.TB, id fmt.Stringer) *Redis
}

// GroupOptions are the options for the servers of a group.
type GroupOptions struct {
	Args  []string                      // more arguments of the servers, not of Sentinels
	Env   func(address string) []string // added to the environment of all; nil: nothing
	Bare  bool                          // see RedisOptions
	Young bool                          // see RedisOptions
}

// SentinelGroup is a primary with two replicas, and three Sentinels.
type SentinelGroup struct {
	Servers   []*Redis
	Sentinels []*Redis
}

// StartSentinelGroup starts a group and waits until it is complete. args are added to the
// arguments of the servers.
func StartSentinelGroup(t testing.TB, args ...string) *SentinelGroup {
	t.Helper()
	return StartSentinelGroupWith(t, GroupOptions{Args: args})
}

// StartSentinelGroupWith is StartSentinelGroup with options.
func StartSentinelGroupWith(t testing.TB, o GroupOptions) *SentinelGroup {
	t.Helper()
	g := new(SentinelGroup)
	for i := range 3 {
		args := func(port string) []string {
			args := append([]string{"--port", port, "--repl-diskless-sync-delay", "0",
				"--repl-ping-replica-period", "1"}, o.Args...)
			if i > 0 {
				args = append(args, "--replicaof", "127.0.0.1 "+Port(g.Servers[0].Address))
			}
			return args
		}
		g.Servers = append(g.Servers, StartRedisWith(t, RedisOptions{Args: args, Env: o.Env, Kind: SingleQueue,
			Bare: o.Bare, Young: o.Young}))
	}
	dir := t.TempDir()
	for range 3 {
		s := startSentinel(t, dir, o.Env)
		s.Do(t, "SENTINEL", "MONITOR", "tokens", "127.0.0.1", Port(g.Servers[0].Address), 2)
		s.Do(t, "SENTINEL", "SET", "tokens", "down-after-milliseconds", DownAfter.Milliseconds(),
			"failover-timeout", 6000, "auth-user", AdminUser, "auth-pass", Password)
		g.Sentinels = append(g.Sentinels, s)
	}
	g.WantReady(t, 2)
	return g
}

// StartSentinel starts a Sentinel that watches no primary yet.
func StartSentinel(t testing.TB) *Redis {
	t.Helper()
	return startSentinel(t, t.TempDir(), nil)
}

func startSentinel(t testing.TB, dir string, env func(address string) []string) *Redis {
	t.Helper()
	s, err := launchSentinel(dir, env)
	Must(t, err)
	t.Cleanup(s.Stop)
	return s
}

// WantReady waits until all Sentinels have found each other and the same primary, and
// this many of its replicas are in sync.
func (g *SentinelGroup) WantReady(t testing.TB, replicas int) {
	t.Helper()
	Eventually(t, 40*time.Second, func() error {
		primary := g.Primary(t)
		if primary == nil {
			var roles []string
			for _, s := range g.Servers {
				roles = append(roles, s.Address+": "+s.Role(t))
			}
			return fmt.Errorf("there is not one primary: %v", roles)
		}
		info, err := redis.String(primary.Control.Do("INFO", "replication"))
		if n := strings.Count(info, "state=online"); err != nil || n < replicas {
			return fmt.Errorf("%d replicas of %s are online, %v", n, primary.Address, err)
		}
		for _, s := range g.Sentinels {
			m, err := redis.StringMap(s.Control.Do("SENTINEL", "MASTER", "tokens"))
			if err != nil || m["num-other-sentinels"] != "2" || m["num-slaves"] < fmt.Sprint(replicas) ||
				m["ip"]+":"+m["port"] != primary.Address || m["flags"] != "master" {
				return fmt.Errorf("the Sentinel %s knows %s other Sentinels and %s replicas of %s (%s), %v", s.Address,
					m["num-other-sentinels"], m["num-slaves"], m["ip"]+":"+m["port"], m["flags"], err)
			}
		}
		return nil
	})
}

// Primary returns the only server that is a primary, or nil.
func (g *SentinelGroup) Primary(t testing.TB) (primary *Redis) {
	t.Helper()
	for _, s := range g.Servers {
		if s.Ended() {
			continue
		}
		if _, err := s.Control.Do("PING"); err != nil {
			s.Redial(t)
		}
		if s.Role(t) == "master" {
			if primary != nil {
				return nil
			}
			primary = s
		}
	}
	return primary
}

// Address returns the address of the group.
func (g *SentinelGroup) Address() string {
	var addresses []string
	for _, s := range g.Sentinels {
		addresses = append(addresses, s.Address)
	}
	return "redis+sentinel://" + strings.Join(addresses, ",") + "/tokens"
}

// Holder returns the primary, as the first running Sentinel reports it.
func (g *SentinelGroup) Holder(t testing.TB, _ fmt.Stringer) *Redis {
	t.Helper()
	named := g.Named(t)
	for _, s := range g.Servers {
		if s.Address == named {
			s.Redial(t)
			return s
		}
	}
	t.Fatalf("the Sentinels name %s, which is no server of the group", named)
	return nil
}

// Named returns the address of the primary that the first running Sentinel reports.
func (g *SentinelGroup) Named(t testing.TB) string {
	t.Helper()
	for _, s := range g.Sentinels {
		if !s.Ended() {
			named, err := redis.Strings(s.Do(t, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "tokens"), nil)
			Must(t, err)
			return net.JoinHostPort(named[0], named[1])
		}
	}
	t.Fatal("no Sentinel runs")
	return ""
}

// Serves reports whether a server is the primary, by the first running Sentinel.
func (g *SentinelGroup) Serves(t testing.TB, s *Redis, _ fmt.Stringer) bool {
	t.Helper()
	return g.Named(t) == s.Address
}

// Cluster is a Redis Cluster of three masters and three replicas.
type Cluster struct{ Nodes []*Redis }

// StartCluster starts a Cluster and waits until it is complete.
func StartCluster(t testing.TB) *Cluster {
	t.Helper()
	return StartClusterWith(t, GroupOptions{})
}

// StartClusterWith is StartCluster with options.
func StartClusterWith(t testing.TB, o GroupOptions) *Cluster {
	t.Helper()
	c := new(Cluster)
	create := []string{"--user", AdminUser, "--pass", Password, "--no-auth-warning",
		"--cluster", "create", "--cluster-replicas", "1", "--cluster-yes"}
	for range 6 {
		bus := FreeAddress(t)
		args := func(port string) []string {
			return append([]string{"--port", port, "--repl-diskless-sync-delay", "0", "--cluster-enabled", "yes",
				"--cluster-port", Port(bus), "--cluster-node-timeout", fmt.Sprint(DownAfter.Milliseconds()),
				"--cluster-require-full-coverage", "no",
				// Otherwise a master without slots becomes a replica, and redis-cli
				// fails.
				"--cluster-allow-replica-migration", "no"}, o.Args...)
		}
		s := StartRedisWith(t, RedisOptions{Args: args, Env: o.Env, Kind: SingleQueue,
			Bare: o.Bare, Young: o.Young})
		c.Nodes = append(c.Nodes, s)
		create = append(create, s.Address)
	}
	Eventually(t, 30*time.Second, func() error {
		out, err := exec.Command("redis-cli", create...).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "is not empty") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	c.WantReady(t, 3)
	return c
}

// WantReady waits until all nodes agree, and this many replicas are in sync.
func (c *Cluster) WantReady(t testing.TB, replicas int) {
	t.Helper()
	Eventually(t, 40*time.Second, func() error {
		online := 0
		var seen string
		for _, n := range c.Nodes {
			if n.Ended() {
				continue
			}
			info, err := redis.String(n.Control.Do("INFO", "replication"))
			if err != nil {
				return err
			}
			online += strings.Count(info, "state=online")
			slots := fmt.Sprint(c.Ranges(t, n))
			state, err := redis.String(n.Control.Do("CLUSTER", "INFO"))
			if err != nil || !strings.Contains(state, "cluster_state:ok") {
				return fmt.Errorf("%s: %s, %v", n.Address, state, err)
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

// SlotRange has slots, and the address of their master.
type SlotRange struct {
	From, To int
	Address  string
}

// Ranges returns the slots of the Cluster, as a node reports them.
func (c *Cluster) Ranges(t testing.TB, node *Redis) (ranges []SlotRange) {
	t.Helper()
	Must(t, node.besides(func(conn redis.Conn) (err error) {
		ranges, err = readSlots(conn)
		return err
	}))
	return ranges
}

// besides uses a new connection, which times out after two seconds: the node may be
// paused.
func (r *Redis) besides(use func(conn redis.Conn) error) error {
	const patience = 2 * time.Second
	conn, err := redis.Dial("tcp", r.Address, redis.DialConnectTimeout(patience), redis.DialReadTimeout(patience))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := use(conn); err != nil {
		return fmt.Errorf("%s: %w", r.Address, err)
	}
	return nil
}

func readSlots(conn redis.Conn) (ranges []SlotRange, err error) {
	entries, err := redis.Values(conn.Do("CLUSTER", "SLOTS"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		var r SlotRange
		var master []any
		var host string
		var port int
		fields, err := redis.Values(e, nil)
		if err == nil {
			_, err = redis.Scan(fields, &r.From, &r.To, &master)
		}
		if err == nil {
			_, err = redis.Scan(master, &host, &port)
		}
		if err != nil {
			return nil, err
		}
		r.Address = net.JoinHostPort(cmp.Or(host, "127.0.0.1"), fmt.Sprint(port)) // a node may not know its own host
		ranges = append(ranges, r)
	}
	if len(ranges) == 0 {
		return nil, errors.New("it knows no master")
	}
	slices.SortFunc(ranges, func(a, b SlotRange) int { return a.From - b.From })
	return ranges, nil
}

// masterOf returns the address of the master of a semaphore's slot, as a node reports it,
// or "".
func masterOf(node *Redis, id fmt.Stringer) (address string, err error) {
	err = node.besides(func(conn redis.Conn) error {
		ranges, err := readSlots(conn)
		if err != nil {
			return err
		}
		slot, err := redis.Int(conn.Do("CLUSTER", "KEYSLOT", idOf(id).QueueKey()))
		for _, r := range ranges {
			if r.From <= slot && slot <= r.To {
				address = r.Address
			}
		}
		return err
	})
	return address, err
}

// Address returns the address of the Cluster.
func (c *Cluster) Address() string {
	return "redis+cluster://" + c.Nodes[0].Address + "," + c.Nodes[1].Address + "," + c.Nodes[2].Address
}

// Node returns the node with an address.
func (c *Cluster) Node(address string) *Redis {
	for _, n := range c.Nodes {
		if n.Address == address {
			return n
		}
	}
	return nil
}

// Holder returns the master of the semaphore's slot, as the first node that answers
// reports it.
func (c *Cluster) Holder(t testing.TB, id fmt.Stringer) *Redis {
	t.Helper()
	for _, n := range c.Nodes {
		if n.Ended() {
			continue
		}
		master, err := masterOf(n, id)
		if err != nil { // it is paused
			continue
		}
		if found := c.Node(master); found != nil && !found.Ended() {
			return found
		}
	}
	t.Fatal("no node knows the master of", id)
	return nil
}

// ReplicaOf returns the replica of a master.
func (c *Cluster) ReplicaOf(t testing.TB, master *Redis) *Redis {
	t.Helper()
	for _, n := range c.Nodes {
		reply, err := redis.Values(n.Control.Do("ROLE"))
		Must(t, err)
		if string(reply[0].([]byte)) == "slave" && fmt.Sprint(reply[2]) == Port(master.Address) {
			return n
		}
	}
	t.Fatal("no replica of", master.Address)
	return nil
}

// OtherID returns a new semaphore on another master than that of id.
func (c *Cluster) OtherID(t testing.TB, id fmt.Stringer) ID {
	t.Helper()
	for {
		if other := FreshID(); c.Holder(t, other) != c.Holder(t, id) {
			return other
		}
	}
}

// Serves reports whether a node serves a semaphore, by another node.
func (c *Cluster) Serves(t testing.TB, s *Redis, id fmt.Stringer) bool {
	t.Helper()
	for _, n := range c.Nodes {
		if n == s {
			continue
		}
		master, err := masterOf(n, id)
		Must(t, err)
		if master != "" {
			return master == s.Address
		}
	}
	return false
}
