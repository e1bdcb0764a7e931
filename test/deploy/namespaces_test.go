package deploy

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// deployedServers has a Redis for tokens and one for locks. Both may be the same.
type deployedServers struct {
	tokens, locks *rig.Redis

	// For TLS: before an address, for the program, and for connections of the test.
	scheme string
	flags  []string
	dial   []redis.DialOption
}

// connect logs in as the sidecars of a namespace.
func (s *deployedServers) connect(t *testing.T, server *rig.Redis, namespace, password string) redis.Conn {
	t.Helper()
	conn, err := redis.Dial("tcp", server.Address,
		append(s.dial, redis.DialUsername(namespaceUser(namespace)), redis.DialPassword(password))...)
	rig.Must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// program returns the program as a user of Redis.
func (s *deployedServers) program(t *testing.T, user, password string, args ...string) *rig.Process {
	t.Helper()
	p := rig.NewProcess(rig.Program(t), slices.Concat(args[:1], s.flags, args[1:])...)
	p.Cmd.Env = append(os.Environ(), "REDIS_USERNAME="+user, "REDIS_PASSWORD="+password)
	p.Start(t)
	return p
}

// sidecar is a sidecar that logs in as the user of a namespace.
type sidecar struct {
	*rig.Process
	servers *deployedServers
	id      rig.ID
	token   string
}

// startSidecar starts a sidecar whose token is already taken. flags are added to its
// flags.
func (s *deployedServers) startSidecar(t *testing.T, namespace, password string, id rig.ID, flags ...string) *sidecar {
	t.Helper()
	c := &sidecar{servers: s, id: id, token: uuid.NewString()}
	args := append([]string{"sidecar", "--queue-redis-address=" + s.scheme + s.tokens.Address,
		"--heartbeat-interval-seconds=1", "--stale-threshold-seconds=120"}, flags...)
	c.Process = s.program(t, namespaceUser(namespace), password, append(args, id.String(), c.token)...)
	return c
}

// startWaiting starts a sidecar that acquires the only token itself.
func (s *deployedServers) startWaiting(t *testing.T, namespace, password string, id rig.ID) *sidecar {
	t.Helper()
	return s.startSidecar(t, namespace, password, id, "--length=1", "--redis-addresses="+s.scheme+s.locks.Address)
}

// holds waits until the sidecar holds its token. If Redis refuses the sidecar, holds
// returns why.
func (c *sidecar) holds(t *testing.T) (refused error) {
	t.Helper()
	rig.Eventually(t, 30*time.Second, func() error {
		log := c.Log.String()
		switch {
		case isRefusal(log):
			refused = errors.New(log)
		case len(c.Log.Lines(t, rig.HeldText)) == 0:
			return errors.New("no token yet: " + log)
		}
		return nil
	})
	return refused
}

// wantBeat waits for a heartbeat that starts after this call.
func (c *sidecar) wantBeat(t *testing.T) {
	t.Helper()
	r := c.servers.tokens
	old := r.Now(t) - 60
	r.Do(t, "ZADD", c.id.InflightKey(), "XX", old, c.token)
	rig.Eventually(t, 20*time.Second, func() error {
		if at := r.LastHeartbeat(t, c.id, c.token); at <= old {
			return fmt.Errorf("no heartbeat of %s, the last is of %d: %s", c.token, at, c.Log.String())
		}
		return nil
	})
}

// end ends the sidecar, which gives its token back.
func (c *sidecar) end(t *testing.T) error {
	t.Helper()
	c.Signal(t, syscall.SIGTERM)
	c.WantExit(t, 0)
	c.WantLog(t, "token given back")
	if log := c.Log.String(); isRefusal(log) {
		return errors.New(log)
	}
	return nil
}

// live runs every command of a sidecar on a new semaphore of a namespace. If Redis
// refuses one, live returns why.
func (s *deployedServers) live(t *testing.T, namespace, password string) (refused error) {
	t.Helper()
	id := rig.ID{Namespace: namespace, Key: uuid.NewString()}
	holder := s.startWaiting(t, namespace, password, id) // a new semaphore needs a repair
	if err := holder.holds(t); err != nil {
		return err
	}
	waiter := s.startWaiting(t, namespace, password, id)
	s.tokens.WantLine(t, id, waiter.token)
	holder.wantBeat(t)
	if err := holder.end(t); err != nil {
		return err
	}
	if err := waiter.holds(t); err != nil {
		return err
	}
	return waiter.end(t)
}

// isDenied reports whether a text denies the user a command, directly or, since Redis
// 7.0, in a script.
func isDenied(text string) bool {
	for _, denial := range []string{"NOPERM", "can't run this command",
		"can't access at least one of the keys", "ACL failure in script"} {
		if strings.Contains(text, denial) {
			return true
		}
	}
	return false
}

// isRefusal reports whether Redis refuses a password or denies a command in a text.
func isRefusal(text string) bool { return strings.Contains(text, "WRONGPASS") || isDenied(text) }

// wantIsolated wants the user of the namespace shop, with this password, to reach nothing
// of the namespace shop-2, and to run no script of its own.
func (s *deployedServers) wantIsolated(t *testing.T, password string) {
	t.Helper()
	id := rig.ID{Namespace: "shop-2", Key: "web"}
	token := s.tokens.Acquire(t, id, 2)
	rig.Must(t, s.tokens.Maintain(id, rig.DefaultTiming, 2, true))
	before := s.tokens.Dump(t, id)
	wantDenied := func(what string, err error) {
		t.Helper()
		if err == nil || !isDenied(err.Error()) {
			t.Errorf("%s: %v", what, err)
		}
	}
	ofTokens := s.connect(t, s.tokens, "shop", password)
	deadline := (int64(s.tokens.Now(t)) + 3600) * 1e6
	for _, script := range []struct {
		what, name string
		args       []any
	}{
		{"acquire", "acquire", []any{2, uuid.NewString(), "", ""}},
		{"join the line", "acquire", []any{2, uuid.NewString(), "0", ""}},
		{"heartbeat", "heartbeat", []any{uuid.NewString(), "", 0}},
		{"release", "release", []any{token}},
		{"maintain", "maintain", []any{2, "1"}},
		{"hold", "hold", []any{token, 1}},
		{"keep", "keep", []any{0, 0, uuid.NewString(), 1, 2, ""}},
	} {
		_, err := rig.RunScript(ofTokens, rig.Script(script.name), id, deadline, rig.DefaultTiming, script.args...)
		wantDenied(script.what, err)
	}
	for _, command := range [][]any{
		{"SUBSCRIBE", id.Channel(token)}, {"PSUBSCRIBE", "*"}, {"PUBLISH", id.Channel(token), "your turn"},
		{"SCAN", 0}, {"KEYS", "*"}, {"RANDOMKEY"}, {"ACL", "LIST"}, {"ACL", "USERS"}, {"ACL", "WHOAMI"},
		{"CONFIG", "GET", "*"}, {"MONITOR"}, {"FLUSHALL"}, {"PUBSUB", "CHANNELS"}, {"OBJECT", "FREQ", id.QueueKey()},
		{"ZRANGE", id.InflightKey(), 0, -1}, {"HMGET", id.NamesKey(), token}, {"LLEN", id.QueueKey()},
		{"RPUSH", id.QueueKey(), "free"}, {"DEL", id.StateKey()},
		{"EVAL", "return redis.call('LPOP', '" + id.QueueKey() + "')", 0},
		{"EVAL", "return redis.call('DEL', KEYS[1])", 1, id.WaitersKey()},
	} {
		_, err := ofTokens.Do(command[0].(string), command[1:]...)
		wantDenied(fmt.Sprint(command), err)
	}
	ofLocks := s.connect(t, s.locks, "shop", password)
	for _, command := range [][]any{
		{"SET", id.LockKey(), "x", "NX", "PX", 1000}, {"GET", id.LockKey()}, {"DEL", id.LockKey()},
		{"EVAL", "return redis.call('DEL', KEYS[1])", 1, id.LockKey()},
	} {
		_, err := ofLocks.Do(command[0].(string), command[1:]...)
		wantDenied(fmt.Sprint(command), err)
	}

	// Scripts of their own are refused, also for their own semaphores: one that does not end
	// would stop all others.
	own := rig.ID{Namespace: "shop", Key: "web"}
	for conn, key := range map[redis.Conn]string{ofTokens: own.InflightKey(), ofLocks: own.LockKey()} {
		for _, command := range [][]any{
			{"EVAL", "return 1", 1, key}, {"EVAL_RO", "return 1", 1, key}, {"SCRIPT", "LOAD", "return 1"},
			{"SCRIPT", "FLUSH"}, {"SCRIPT", "KILL"}, {"FUNCTION", "LOAD", "#!lua name=f"}, {"FCALL", "f", 1, key},
		} {
			_, err := conn.Do(command[0].(string), command[1:]...)
			wantDenied(fmt.Sprint(command), err)
		}
	}

	// The program is refused, too.
	wantLoggedDenial := func(p *sidecar, message string) {
		t.Helper()
		if line := p.WantLog(t, message); !isDenied(fmt.Sprint(line["error"])) {
			t.Errorf("%v", line)
		}
	}
	waiter := s.startWaiting(t, "shop", password, id)
	holder := s.startSidecar(t, "shop", password, id)
	wantLoggedDenial(waiter, "no token yet, to be retried")
	wantLoggedDenial(holder, "heartbeat failed, to be retried")
	for _, shown := range []string{"shop-2", id.String()} {
		p := s.program(t, namespaceUser("shop"), password,
			"status", "--queue-redis-address="+s.scheme+s.tokens.Address, shown)
		p.WantExit(t, 1)
		wantDenied("status "+shown, errors.New(p.Log.String()))
	}
	s.tokens.WantCounts(t, id, 1, 1)
	s.tokens.WantInflight(t, id, token)
	if after := s.tokens.Dump(t, id); !slices.Equal(after, before) {
		t.Error("the semaphore has changed")
	}
}
