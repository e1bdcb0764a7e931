package rig

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// RedisProgram is the server that the tests start: REDIS_SERVER, or redis-server.
var RedisProgram = cmp.Or(os.Getenv("REDIS_SERVER"), "redis-server")

// Redis is a real redis-server. Process is the running one: Start replaces it.
type Redis struct {
	Address string
	Args    []string
	*Process
	Control redis.Conn // the test's own connection

	program    string // empty: RedisProgram
	dial       []redis.DialOption
	env        func(address string) []string
	allSlots   bool // it is a Cluster of one node
	hasScripts bool // it knows the scripts of lua/, as if a webhook had loaded them
	young      bool // see RedisOptions
}

// RedisOptions are the options of a redis-server.
type RedisOptions struct {
	// Args returns its arguments, except for the folder. Nil: it listens on the port
	// without TLS.
	Args func(port string) []string

	Dial []redis.DialOption            // for the test's own connections
	Env  func(address string) []string // added to the environment; nil: nothing
	Kind string                        // SingleQueue or ClusterQueue; empty: as TEST_QUEUE selects
	Bare bool                          // it knows no script until a webhook loads it

	// Young: clients learn its age, so the birth guard holds for a heartbeat interval and
	// three seconds after each start. Otherwise, the user "default" may not ask for it.
	Young bool
}

// PlainPort returns the arguments for a port without TLS.
func PlainPort(port string) []string { return []string{"--port", port} }

// StartRedis starts a new redis-server. It has an append-only file: Stop and Start
// restart it with its data.
func StartRedis(t testing.TB) *Redis {
	t.Helper()
	return StartRedisWith(t, RedisOptions{})
}

// StartRedisWith is StartRedis with options.
func StartRedisWith(t testing.TB, o RedisOptions) *Redis {
	t.Helper()
	r, err := launchRedis(t.TempDir(), o)
	Must(t, err)
	t.Cleanup(r.Stop)
	return r
}

func launchRedis(dir string, o RedisOptions) (*Redis, error) {
	if o.Args == nil {
		o.Args = PlainPort
	}
	address := freeAddress()
	r := &Redis{Address: address, dial: append(o.Dial, redis.DialReadTimeout(5*time.Second)), env: o.Env,
		hasScripts: !o.Bare, young: o.Young}
	// A process that is killed loses nothing without fsync, which may stall a server for
	// seconds on a busy disk.
	r.Args = append(o.Args(Port(address)), "--bind", "127.0.0.1", "--dir", dir, "--save", "",
		"--appendonly", "yes", "--appendfsync", "no")
	if cmp.Or(o.Kind, TestQueue) == ClusterQueue {
		r.allSlots = true
		r.Args = append(r.Args, "--cluster-enabled", "yes",
			"--cluster-config-file", "nodes-"+Port(address)+".conf", "--cluster-port", Port(freeAddress()))
	}
	return r, r.Start()
}

// Start starts or restarts the server, and waits until it answers.
func (r *Redis) Start() error {
	if err := r.begin(); err != nil {
		return err
	}
	return r.answered(30 * time.Second)
}

// begin starts the server, and does not wait.
func (r *Redis) begin() error {
	r.Process = NewProcess(cmp.Or(r.program, RedisProgram), r.Args...)
	if r.env != nil {
		r.Cmd.Env = append(os.Environ(), r.env(r.Address)...)
	}
	if err := r.Launch(); err != nil {
		return fmt.Errorf("%s is needed (apt-get install redis-server): %w", RedisProgram, err)
	}
	return nil
}

// answered waits until the server answers.
func (r *Redis) answered(patience time.Duration) error {
	err := poll(patience, func() error {
		c, err := redis.Dial("tcp", r.Address, r.dial...)
		if err != nil {
			return err
		}
		if _, err = c.Do("PING"); err != nil {
			c.Close()
			return err
		}
		r.Control = r.lasting(c)
		return nil
	})
	if err != nil {
		r.Stop()
		output := r.Stdout.String() + r.Log.String()
		return fmt.Errorf("%s did not answer at %s: %w: %s", RedisProgram, r.Address, err, output)
	}
	if r.allSlots {
		err = r.serveAllSlots()
	}
	if err == nil {
		_, err = r.Control.Do("ACL", "SETUSER", AdminUser, "on", "nopass", "~*", "&*", "+@all")
	}
	if err == nil && !r.young {
		err = r.hideAge()
	}
	if err == nil && r.hasScripts {
		err = r.LoadScripts()
	}
	return err
}

// hideAge takes the right to ask for the age of the server from the user "default". Sentinels
// and redis-cli need it: they log in as AdminUser.
func (r *Redis) hideAge() error {
	rules := []any{"SETUSER", "default", "-info"}
	for _, section := range []string{"clients", "commandstats", "cpu", "latencystats", "memory", "replication", "stats"} {
		rules = append(rules, "+info|"+section)
	}
	_, err := r.Control.Do("ACL", rules...)
	return err
}

// LoseData deletes the data of a server that has ended, as if the next one ran elsewhere.
func (r *Redis) LoseData(t testing.TB) {
	t.Helper()
	Must(t, os.RemoveAll(filepath.Join(r.Args[slices.Index(r.Args, "--dir")+1], "appendonlydir")))
}

// WantAge waits until a Young server is older than this.
func (r *Redis) WantAge(t testing.TB, age time.Duration) {
	t.Helper()
	Eventually(t, age+patience, func() error {
		if up := r.Info(t, "server", "uptime_in_seconds:"); up <= seconds(age) {
			return fmt.Errorf("%s is %d s old, want more than %s", r.Address, up, age)
		}
		return nil
	})
}

// Stop shuts the server down in order. A replica that writes its first append-only file after
// a resync refuses to end, so Stop asks again, and kills the server in the end.
func (r *Redis) Stop() {
	if r.Control != nil {
		r.Control.Close()
	}
	_ = r.Cmd.Process.Signal(syscall.SIGCONT)
	for range 30 {
		_ = r.Cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-r.Done():
			return
		case <-time.After(time.Second):
		}
	}
	r.Kill()
}

// Crash kills the server, like the loss of its machine.
func (r *Redis) Crash(t testing.TB) {
	t.Helper()
	r.Signal(t, syscall.SIGKILL)
	<-r.Done()
}

// Redial replaces the test's own connection, which a failover closes.
func (r *Redis) Redial(t testing.TB) {
	t.Helper()
	r.Control.Close()
	r.Control = r.lasting(r.Dial(t))
}

// lasting returns a connection that outlasts the server's timeout of idle clients.
func (r *Redis) lasting(c redis.Conn) redis.Conn {
	if !slices.Contains(r.Args, "--timeout") {
		return c
	}
	return &lastingConn{c, func() (redis.Conn, error) { return redis.Dial("tcp", r.Address, r.dial...) }, time.Now()}
}

// lastingConn dials again for a command after a second without one, and after an error.
type lastingConn struct {
	redis.Conn
	dial func() (redis.Conn, error)
	used time.Time
}

func (c *lastingConn) Do(command string, args ...any) (any, error) {
	if time.Since(c.used) > time.Second || c.Conn.Err() != nil {
		fresh, err := c.dial()
		if err != nil {
			return nil, err
		}
		c.Conn.Close()
		c.Conn = fresh
	}
	c.used = time.Now()
	return c.Conn.Do(command, args...)
}

// Dial makes another connection. The caller closes it.
func (r *Redis) Dial(t testing.TB) redis.Conn {
	t.Helper()
	c, err := redis.Dial("tcp", r.Address, r.dial...)
	Must(t, err)
	return c
}

// Do sends a command, which must succeed.
func (r *Redis) Do(t testing.TB, command string, args ...any) any {
	t.Helper()
	reply, err := r.Control.Do(command, args...)
	Must(t, err)
	return reply
}

var (
	sharedRedis     *Redis
	sharedRedisErr  error
	sharedRedisOnce sync.Once
)

// CommonRedis returns one server for all tests that do not disturb it. Each test has its
// own connection.
func CommonRedis(t testing.TB) *Redis {
	t.Helper()
	sharedRedisOnce.Do(func() { sharedRedis, sharedRedisErr = launchRedis(Folder(), RedisOptions{}) })
	Must(t, sharedRedisErr)
	r := &Redis{Address: sharedRedis.Address, Process: sharedRedis.Process}
	r.Control = r.Dial(t)
	t.Cleanup(func() { r.Control.Close() })
	return r
}

// stopShared stops the servers that all tests share.
func stopShared() {
	for _, r := range []*Redis{sharedRedis, sharedSentinel} {
		if r != nil {
			r.Stop()
		}
	}
}

// Now returns the server's time, in Unix seconds.
func (r *Redis) Now(t testing.TB) int {
	t.Helper()
	now, err := redis.Ints(r.Do(t, "TIME"), nil)
	Must(t, err)
	return now[0]
}

// Role returns the server's role: master, slave or sentinel. If the server does not
// answer, it returns why.
func (r *Redis) Role(t testing.TB) string {
	t.Helper()
	reply, err := redis.Values(r.Control.Do("ROLE"))
	if err != nil {
		return err.Error()
	}
	return string(reply[0].([]byte))
}

// Info returns a number in a section of INFO: the digits after a pattern, or 0.
func (r *Redis) Info(t testing.TB, section, pattern string) int {
	t.Helper()
	text, err := redis.String(r.Do(t, "INFO", section), nil)
	Must(t, err)
	m := regexp.MustCompile(pattern + `(\d+)`).FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	n, err := strconv.Atoi(m[1])
	Must(t, err)
	return n
}

// CommandCalls counts the commands so far, by name in lower case.
func (r *Redis) CommandCalls(t testing.TB) map[string]int {
	t.Helper()
	info, err := redis.String(r.Do(t, "INFO", "commandstats"), nil)
	Must(t, err)
	calls := map[string]int{}
	for _, m := range regexp.MustCompile(`cmdstat_([^:]+):calls=(\d+)`).FindAllStringSubmatch(info, -1) {
		n, err := strconv.Atoi(m[2])
		Must(t, err)
		calls[m[1]] = n
	}
	return calls
}

// Fill uses up all memory, so that the server refuses writes. empty frees it.
func (r *Redis) Fill(t testing.TB) (empty func()) {
	t.Helper()
	r.Do(t, "CONFIG", "SET", "maxmemory-policy", "noeviction")
	r.Do(t, "CONFIG", "SET", "maxmemory", "1")
	if _, err := r.Control.Do("SET", "x", "x"); err == nil || !strings.HasPrefix(err.Error(), "OOM") {
		t.Fatalf("got %v, want OOM", err)
	}
	return func() { r.Do(t, "CONFIG", "SET", "maxmemory", "0") }
}

// WantReplicasInSync waits until all replicas have all data of the server, which must get
// no more writes.
func (r *Redis) WantReplicasInSync(t testing.TB) {
	t.Helper()
	Eventually(t, 10*time.Second, func() error {
		info, err := redis.String(r.Control.Do("INFO", "replication"))
		if err != nil {
			return err
		}
		_, rest, _ := strings.Cut(info, "master_repl_offset:")
		offset, _, _ := strings.Cut(rest, "\r")
		if strings.Count(info, ",offset="+offset+",") != strings.Count(info, ",offset=") {
			return fmt.Errorf("not in sync: %s", info)
		}
		return nil
	})
}

// LockServers are the Redis servers of a Redlock.
type LockServers []*Redis

// StartLockServers starts n lock servers.
func StartLockServers(t testing.TB, n int, o RedisOptions) (s LockServers) {
	t.Helper()
	for range n {
		s = append(s, StartRedisWith(t, o))
	}
	return s
}

// Addresses returns the addresses of all servers.
func (s LockServers) Addresses() (all []string) {
	for _, r := range s {
		all = append(all, r.Address)
	}
	return all
}

// LocksLeft returns an error if any server has a key.
func (s LockServers) LocksLeft() error {
	for _, r := range s {
		if n, err := redis.Int(r.Control.Do("DBSIZE")); err != nil || n > 0 {
			return fmt.Errorf("%d keys left, %v", n, err)
		}
	}
	return nil
}

// ConnectionsLeft returns an error if any server has a connection besides the test's own.
func (s LockServers) ConnectionsLeft() error {
	for _, r := range s {
		clients, err := redis.String(r.Control.Do("CLIENT", "LIST"))
		if n := strings.Count(clients, "\n"); err != nil || n > 1 {
			return fmt.Errorf("%d connections left, %v", n-1, err)
		}
	}
	return nil
}

// Anys converts texts to arguments of a command.
func Anys(texts []string) (all []any) {
	for _, text := range texts {
		all = append(all, text)
	}
	return all
}

// launchSentinel starts a Sentinel that watches no primary yet.
func launchSentinel(dir string, env func(address string) []string) (*Redis, error) {
	s := &Redis{Address: freeAddress(), dial: []redis.DialOption{redis.DialReadTimeout(5 * time.Second)}, env: env}
	file := filepath.Join(dir, "sentinel-"+Port(s.Address)+".conf")
	config := fmt.Sprintf("port %s\nbind 127.0.0.1\ndir %s\n", Port(s.Address), dir)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	s.Args = []string{file, "--sentinel"}
	return s, s.Start()
}

// serveAllSlots makes the server a Cluster of one node. A node does not serve for its
// first two seconds.
func (r *Redis) serveAllSlots() error {
	_, err := r.Control.Do("CLUSTER", "ADDSLOTSRANGE", 0, ClusterSlots-1)
	if err != nil && !strings.Contains(err.Error(), "busy") {
		return err
	}
	return poll(10*time.Second, func() error {
		info, err := redis.String(r.Control.Do("CLUSTER", "INFO"))
		if err == nil && !strings.Contains(info, "cluster_state:ok") {
			err = errors.New("the Cluster of one node does not serve")
		}
		return err
	})
}
