package main

import (
	"bytes"
	"cmp"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// redisProgram is the server that the tests start: redis-server, or what REDIS_SERVER names.
var redisProgram = cmp.Or(os.Getenv("REDIS_SERVER"), "redis-server")

// redisServer is a real redis-server.
type redisServer struct {
	address  string
	args     []string
	options  []redis.DialOption // of the test's own connections
	allSlots bool               // it is a Cluster of one node
	child
	control redis.Conn // a connection of the test's own
}

// startRedis starts a redis-server of the test's own, with an append-only file so that it can be restarted.
func startRedis(t testing.TB) *redisServer {
	t.Helper()
	s, err := launchRedis(t.TempDir(), plain)
	must(t, err)
	t.Cleanup(s.stop)
	return s
}

func plain(port string) []string { return []string{"--port", port} }

// launchRedis starts a redis-server that listens as told.
func launchRedis(dir string, listen func(port string) []string, options ...redis.DialOption) (*redisServer, error) {
	return launchRedisOf(testQueue, dir, listen, options...)
}

// launchRedisOf is launchRedis for a server of one kind of queue.
func launchRedisOf(kind, dir string, listen func(port string) []string, options ...redis.DialOption) (*redisServer, error) {
	var last error
	for range 5 { // another process may take the port before redis-server does
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		s := &redisServer{address: l.Addr().String(), options: append(options, redis.DialReadTimeout(5*time.Second))}
		l.Close()
		s.args = append(listen(portOf(s.address)), "--bind", "127.0.0.1", "--dir", dir, "--save", "", "--appendonly", "yes", "--appendfsync", "always")
		if kind == clusterTests {
			bus, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, err
			}
			bus.Close()
			s.allSlots = true
			s.args = append(s.args, "--cluster-enabled", "yes", "--cluster-config-file", "nodes-"+portOf(s.address)+".conf", "--cluster-port", portOf(bus.Addr().String()))
		}
		if last = s.start(); last == nil {
			return s, nil
		}
	}
	return nil, last
}

// redisEnvironment adds to the environment of a server; nil for nothing.
var redisEnvironment func(s *redisServer) []string

func (s *redisServer) start() error {
	s.cmd = exec.Command(redisProgram, s.args...)
	if redisEnvironment != nil {
		s.cmd.Env = append(os.Environ(), redisEnvironment(s)...)
	}
	var out bytes.Buffer
	s.cmd.Stdout, s.cmd.Stderr = &out, &out
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("%s is needed (apt-get install redis-server): %w", redisProgram, err)
	}
	for range 1000 {
		c, err := redis.Dial("tcp", s.address, s.options...)
		if err == nil {
			if _, err = c.Do("PING"); err == nil {
				s.control = c
				if s.allSlots {
					return s.serveAllSlots()
				}
				return nil
			}
			c.Close()
		}
		time.Sleep(5 * time.Millisecond)
	}
	s.stop()
	return fmt.Errorf("%s did not answer at %s: %s", redisProgram, s.address, out.String())
}

// stop ends the server as an orderly shutdown does.
func (s *redisServer) stop() {
	if s.control != nil {
		s.control.Close()
	}
	_ = s.cmd.Process.Signal(syscall.SIGCONT)
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.cmd.Wait()
}

var (
	sharedRedis     *redisServer
	sharedRedisErr  error
	sharedRedisOnce sync.Once
	lastKey         atomic.Int64
)

// commonRedis is one server for all tests that do not disturb it.
func commonRedis(t testing.TB) *redisServer {
	t.Helper()
	sharedRedisOnce.Do(func() { sharedRedis, sharedRedisErr = launchRedis(filepath.Dir(binary), plain) })
	must(t, sharedRedisErr)
	c, err := redis.Dial("tcp", sharedRedis.address)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return &redisServer{address: sharedRedis.address, child: sharedRedis.child, control: c}
}

// freshID is a semaphore that no other test uses.
func freshID() semaphoreID {
	return semaphoreID{"shop", fmt.Sprintf("web-%d", lastKey.Add(1))}
}

func (s *redisServer) do(t testing.TB, command string, args ...any) any {
	t.Helper()
	reply, err := s.control.Do(command, args...)
	must(t, err)
	return reply
}

// counts are the numbers of free and of used tokens.
func (s *redisServer) counts(id semaphoreID) (queue, inflight int, err error) {
	if queue, err = redis.Int(s.control.Do("LLEN", id.queueKey())); err == nil {
		inflight, err = redis.Int(s.control.Do("ZCARD", id.inflightKey()))
	}
	return queue, inflight, err
}

// wantCounts waits until the semaphore has so many tokens free and in use.
func (s *redisServer) wantCounts(t *testing.T, id semaphoreID, queue, inflight int) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		q, i, err := s.counts(id)
		if err == nil && (q != queue || i != inflight) {
			err = fmt.Errorf("%s: queue %d, inflight %d; want %d, %d", id, q, i, queue, inflight)
		}
		return err
	})
}

func (s *redisServer) inflight(t *testing.T, id semaphoreID) []string {
	t.Helper()
	tokens, err := redis.Strings(s.control.Do("ZRANGE", id.inflightKey(), 0, -1))
	must(t, err)
	return tokens
}

// makeStale gives a token a heartbeat of long ago.
func (s *redisServer) makeStale(t *testing.T, id semaphoreID, token string) {
	t.Helper()
	s.do(t, "ZADD", id.inflightKey(), "XX", 1, token)
}

func commandCalls(t *testing.T, r *redisServer) map[string]int {
	t.Helper()
	info, err := redis.String(r.do(t, "INFO", "commandstats"), nil)
	must(t, err)
	calls := map[string]int{}
	for _, m := range regexp.MustCompile(`cmdstat_([^:]+):calls=(\d+)`).FindAllStringSubmatch(info, -1) {
		n, err := strconv.Atoi(m[2])
		must(t, err)
		calls[m[1]] = n
	}
	return calls
}

// wantInflight fails unless exactly these tokens are in use.
func (s *redisServer) wantInflight(t *testing.T, id semaphoreID, want ...string) {
	t.Helper()
	got := s.inflight(t, id)
	slices.Sort(got)
	if want = slices.Sorted(slices.Values(want)); !slices.Equal(got, want) {
		t.Fatalf("in flight are %v, want %v", got, want)
	}
}

// state is a field of the state Hash.
func (s *redisServer) state(t *testing.T, id semaphoreID, field string) int {
	t.Helper()
	n, err := redis.Int(s.do(t, "HGET", id.stateKey(), field), nil)
	must(t, err)
	return n
}

// anys are texts as arguments of a command.
func anys(texts []string) (all []any) {
	for _, text := range texts {
		all = append(all, text)
	}
	return all
}

// userLine is a line of deploy/base/redis-scripts.yaml, as words, that begin with "user" if it makes one, if need be where there is a password.
func userLine(line string) []string {
	line = strings.TrimSpace(line)
	if _, user, ok := strings.Cut(line, "_PASSWORD:+user "); ok && strings.HasPrefix(line, "${") {
		line = "user " + strings.TrimSuffix(user, "}")
	}
	return strings.Fields(line)
}
