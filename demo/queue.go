package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/gomodule/redigo/redis"
)

const (
	queueKey    = "queue/{shop/web}"
	inflightKey = "inflight/{shop/web}"
	waitersKey  = "waiters/{shop/web}"
)

// queue is the Redis that holds the tokens.
type queue interface {
	// address is the value of --queue-redis-address.
	address() string
	// lockServer is the address of a Redis for the Redlock.
	lockServer() string
	// contents returns the state of the semaphore shop/web.
	contents() (contents, error)
	close()
}

// contents has the number of free tokens, the tokens in use, and the waiting tokens,
// first in line first.
type contents struct {
	free           int
	inflight, line []string
}

// embeddedQueue imitates one Redis server; it needs nothing installed.
type embeddedQueue struct{ *miniredis.Miniredis }

func (q embeddedQueue) address() string    { return q.Addr() }
func (q embeddedQueue) lockServer() string { return q.Addr() }
func (q embeddedQueue) close()             { q.Close() }

func (q embeddedQueue) contents() (contents, error) {
	free, _ := q.List(queueKey) // an error means that there is no such key
	inflight, _ := q.ZMembers(inflightKey)
	line, _ := q.ZMembers(waitersKey)
	return contents{len(free), inflight, line}, nil
}

// sentinelQueue has a primary, two replicas, three Sentinels, and a server for the lock.
type sentinelQueue struct {
	servers   map[string]*process // by address
	sentinels []string            // addresses
	lock      string
}

// startSentinelQueue starts the servers from redis-server's file, and waits until they
// have found each other.
func (s *setup) startSentinelQueue(ctx context.Context, redisServer string) (*sentinelQueue, error) {
	q := &sentinelQueue{servers: map[string]*process{}}
	start := func(settings ...string) (string, error) {
		address, err := freeAddress()
		if err != nil {
			return "", err
		}
		_, port, _ := net.SplitHostPort(address)
		args := append([]string{"--bind", "127.0.0.1", "--port", port, "--dir", s.dir,
			"--save", "", "--appendonly", "no"}, settings...)
		p, err := s.start(nil, redisServer, args...)
		q.servers[address] = p
		return address, err
	}
	var err error
	if q.lock, err = start(); err != nil {
		return nil, err
	}
	primary, err := start("--min-replicas-to-write", "1")
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(primary)
	monitored := "sentinel monitor tokens 127.0.0.1 " + port + " 2\n" +
		"sentinel down-after-milliseconds tokens 1000\nsentinel failover-timeout tokens 6000\n"
	for range 2 {
		replica, err := start("--replicaof", "127.0.0.1 "+port,
			"--repl-diskless-sync-delay", "0", "--min-replicas-to-write", "1")
		if err != nil {
			return nil, err
		}
		_, own, _ := net.SplitHostPort(replica)
		// Without it, the Sentinels may find the replica only after ten seconds.
		monitored += "sentinel known-replica tokens 127.0.0.1 " + own + "\n"
	}
	for i := range 3 {
		address, err := freeAddress()
		if err != nil {
			return nil, err
		}
		_, own, _ := net.SplitHostPort(address)
		file := filepath.Join(s.dir, fmt.Sprintf("sentinel-%d.conf", i))
		settings := "bind 127.0.0.1\nport " + own + "\ndir " + s.dir + "\n" + monitored
		if err := os.WriteFile(file, []byte(settings), 0o600); err != nil {
			return nil, err
		}
		if q.servers[address], err = s.start(nil, redisServer, file, "--sentinel"); err != nil {
			return nil, err
		}
		q.sentinels = append(q.sentinels, address)
	}
	return q, poll(ctx, "the Sentinels are not ready", func() error {
		for address, p := range q.servers {
			if p.ended() {
				return fmt.Errorf("%s has ended:\n%s", address, p.log.String())
			}
		}
		for _, sentinel := range q.sentinels {
			state, err := redis.StringMap(send(sentinel, "SENTINEL", "MASTER", "tokens"))
			if err != nil || state["num-other-sentinels"] != "2" || state["num-slaves"] != "2" {
				return fmt.Errorf("%s has found %s others and %s replicas, %v",
					sentinel, state["num-other-sentinels"], state["num-slaves"], err)
			}
		}
		info, err := redis.String(send(primary, "INFO", "replication"))
		if err != nil || strings.Count(info, "state=online") != 2 {
			return fmt.Errorf("replication is %s, %v", info, err)
		}
		return nil
	})
}

// send sends a command to a server, on a new connection.
func send(address, command string, args ...any) (any, error) {
	c, err := redis.Dial("tcp", address, redis.DialConnectTimeout(time.Second), redis.DialReadTimeout(time.Second))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Do(command, args...)
}

func (q *sentinelQueue) address() string {
	return "redis+sentinel://" + strings.Join(q.sentinels, ",") + "/tokens"
}

func (q *sentinelQueue) lockServer() string { return q.lock }

// primary returns the address of the primary, as the Sentinels report it.
func (q *sentinelQueue) primary() (string, error) {
	name, err := redis.Strings(send(q.sentinels[0], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "tokens"))
	return strings.Join(name, ":"), err
}

func (q *sentinelQueue) contents() (c contents, err error) {
	primary, err := q.primary()
	if err != nil {
		return c, err
	}
	var errs [3]error
	c.free, errs[0] = redis.Int(send(primary, "LLEN", queueKey))
	c.inflight, errs[1] = redis.Strings(send(primary, "ZRANGE", inflightKey, 0, -1))
	c.line, errs[2] = redis.Strings(send(primary, "ZRANGE", waitersKey, 0, -1))
	return c, errors.Join(errs[:]...)
}

// close implements queue. stopAll ends the processes.
func (q *sentinelQueue) close() {}

// storyOfFailover is the part about a lost primary. web-5, web-6 and web-7 have a token
// before it.
func (s *setup) storyOfFailover(ctx context.Context, q *sentinelQueue) error {
	primary, err := q.primary()
	if err != nil {
		return err
	}
	s.tell("The primary of Redis is killed. The webhook holds web-9 until a replica is promoted.")
	if _, err := q.servers[primary].end(syscall.SIGKILL); err != nil {
		return err
	}
	killed := time.Now()
	_, err = s.refuse("web-9", allInUse)
	for errors.Is(err, errUndecided) && time.Since(killed) < stepTimeout { // the Sentinels vote again
		_, err = s.refuse("web-9", allInUse)
	}
	if err != nil {
		return err
	}
	refused := time.Since(killed)
	next, err := q.primary()
	if err != nil {
		return err
	}
	if next == primary {
		return fmt.Errorf("%s is still the primary", primary)
	}
	s.detail("the primary was %s", primary)
	if err := s.wantTokens(ctx, "", tokens{0, 3, 0}); err != nil {
		return err
	}
	if err := s.end("web-5"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, "", tokens{1, 2, 0}); err != nil {
		return err
	}
	if err := s.wantAdmitted(ctx, "web-9"); err != nil {
		return err
	}
	text := fmt.Sprintf("web-9 refused %.1f s after the kill, the primary is %s; web-5 ended; web-9 admitted",
		refused.Seconds(), next)
	return s.wantTokens(ctx, text, tokens{0, 3, 0})
}

// isUsed reports whether a token is in flight.
func (c contents) isUsed(token string) bool { return slices.Contains(c.inflight, token) }
