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
	// address is what the program takes for --queue-redis-address.
	address() string
	// lockServer is the address of a Redis for the redlock.
	lockServer() string
	// contents are those of the semaphore shop/web.
	contents() (contents, error)
	close()
}

// contents are how many tokens are free, those that are used, and those that wait in line, the first one first.
type contents struct {
	free           int
	inflight, line []string
}

// embeddedQueue is a look-alike of one Redis server, which needs nothing installed.
type embeddedQueue struct{ *miniredis.Miniredis }

func (q embeddedQueue) address() string    { return q.Addr() }
func (q embeddedQueue) lockServer() string { return q.Addr() }
func (q embeddedQueue) close()             { q.Close() }

func (q embeddedQueue) contents() (contents, error) {
	free, _ := q.List(queueKey) // an error is that there is no such key
	inflight, _ := q.ZMembers(inflightKey)
	line, _ := q.ZMembers(waitersKey)
	return contents{len(free), inflight, line}, nil
}

// sentinelQueue is a primary, two replicas and three Sentinels, and a server for the lock.
type sentinelQueue struct {
	servers   map[string]*process // by address
	sentinels []string            // addresses
	lock      string
}

// startSentinelQueue starts the servers from redis-server's file and waits until they know each other.
func (s *setup) startSentinelQueue(ctx context.Context, redisServer string) (*sentinelQueue, error) {
	q := &sentinelQueue{servers: map[string]*process{}}
	start := func(settings ...string) (string, error) {
		address, err := freeAddress()
		if err != nil {
			return "", err
		}
		_, port, _ := net.SplitHostPort(address)
		p, err := s.start(nil, redisServer, append([]string{"--bind", "127.0.0.1", "--port", port, "--dir", s.dir, "--save", "", "--appendonly", "no"}, settings...)...)
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
		replica, err := start("--replicaof", "127.0.0.1 "+port, "--repl-diskless-sync-delay", "0", "--min-replicas-to-write", "1")
		if err != nil {
			return nil, err
		}
		_, own, _ := net.SplitHostPort(replica)
		monitored += "sentinel known-replica tokens 127.0.0.1 " + own + "\n" // or they may find it ten seconds later only
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
			known, err := redis.StringMap(ask(sentinel, "SENTINEL", "MASTER", "tokens"))
			if err != nil || known["num-other-sentinels"] != "2" || known["num-slaves"] != "2" {
				return fmt.Errorf("%s knows %s others and %s replicas, %v", sentinel, known["num-other-sentinels"], known["num-slaves"], err)
			}
		}
		if info, err := redis.String(ask(primary, "INFO", "replication")); err != nil || strings.Count(info, "state=online") != 2 {
			return fmt.Errorf("replication is %s, %v", info, err)
		}
		return nil
	})
}

// ask sends a command to a server on a connection of its own.
func ask(address, command string, args ...any) (any, error) {
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

// primary is the address of the one that the Sentinels name.
func (q *sentinelQueue) primary() (string, error) {
	name, err := redis.Strings(ask(q.sentinels[0], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "tokens"))
	return strings.Join(name, ":"), err
}

func (q *sentinelQueue) contents() (c contents, err error) {
	primary, err := q.primary()
	if err != nil {
		return c, err
	}
	var errs [3]error
	c.free, errs[0] = redis.Int(ask(primary, "LLEN", queueKey))
	c.inflight, errs[1] = redis.Strings(ask(primary, "ZRANGE", inflightKey, 0, -1))
	c.line, errs[2] = redis.Strings(ask(primary, "ZRANGE", waitersKey, 0, -1))
	return c, errors.Join(errs[:]...)
}

// close implements queue; the processes end with all others.
func (q *sentinelQueue) close() {}

// tellOfFailover tells of a primary that is lost. Before it, web-5, web-6 and web-7 have a token.
func (s *setup) tellOfFailover(ctx context.Context, q *sentinelQueue) error {
	primary, err := q.primary()
	if err != nil {
		return err
	}
	say("The primary of Redis is killed. The Sentinels see it after a second, and promote a replica: a pod that is created meanwhile\n" +
		"   waits for that, and is refused, because the new primary knows all tokens.")
	if _, err := q.servers[primary].end(syscall.SIGKILL); err != nil {
		return err
	}
	killed := time.Now()
	err = s.wantRefused("web-9", allInUse)
	for errors.Is(err, errUndecided) && time.Since(killed) < failoverTimeout { // the Sentinels agreed on none, and vote again
		err = s.wantRefused("web-9", allInUse)
	}
	if err != nil {
		return err
	}
	next, err := q.primary()
	if err != nil {
		return err
	}
	if next == primary {
		return fmt.Errorf("%s is still the primary", primary)
	}
	fmt.Printf("   that was %.1f s after the kill; the primary was %s, and is %s\n", time.Since(killed).Seconds(), primary, next)
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	say("web-5 ends, and gives its token back to the new primary. web-9 is tried again: it is admitted.")
	if err := s.wantEnd("web-5"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 1, 2); err != nil {
		return err
	}
	if err := s.wantAdmitted(ctx, "web-9"); err != nil {
		return err
	}
	return s.wantTokens(ctx, 0, 3)
}

// isUsed tells whether a token is in flight.
func (c contents) isUsed(token string) bool { return slices.Contains(c.inflight, token) }
