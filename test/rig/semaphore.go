package rig

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// ID names a semaphore. The helpers below accept any id with the same String:
// NAMESPACE/KEY.
type ID struct{ Namespace, Key string }

func (id ID) String() string { return id.Namespace + "/" + id.Key }

// ParseID parses the String of an ID, or @KEY of a shared semaphore.
func ParseID(text string) ID {
	if key, ok := strings.CutPrefix(text, "@"); ok {
		return ID{"@", strings.TrimPrefix(key, "/")}
	}
	namespace, key, _ := strings.Cut(text, "/")
	return ID{namespace, key}
}

func idOf(id fmt.Stringer) ID { return ParseID(id.String()) }

// FreshID returns a semaphore that no other test uses.
func FreshID() ID { return ID{"shop", fmt.Sprintf("web-%d", lastKey.Add(1))} }

var lastKey atomic.Int64

// The keys of a semaphore in Redis; see lua/semaphore.lua.
func (id ID) QueueKey() string    { return "queue/{" + id.String() + "}" }
func (id ID) InflightKey() string { return "inflight/{" + id.String() + "}" }
func (id ID) WaitersKey() string  { return "waiters/{" + id.String() + "}" }
func (id ID) SeenKey() string     { return "seen/{" + id.String() + "}" }
func (id ID) HistoryKey() string  { return "history/{" + id.String() + "}" }
func (id ID) NamesKey() string    { return "names/{" + id.String() + "}" }
func (id ID) StateKey() string    { return "state/{" + id.String() + "}" }
func (id ID) LockKey() string     { return "lock/{" + id.String() + "}" }

// Channel returns the channel on which Redis calls a waiter when a token is free.
func (id ID) Channel(token string) string { return id.WaitersKey() + "/" + token }

// Keys returns the keys of the scripts, in their order.
func (id ID) Keys() []any {
	return []any{id.QueueKey(), id.InflightKey(), id.WaitersKey(), id.SeenKey(), id.NamesKey(), id.StateKey(), id.HistoryKey()}
}

// Counts returns the numbers of free tokens and of tokens in use.
func (r *Redis) Counts(id fmt.Stringer) (queue, inflight int, err error) {
	if queue, err = redis.Int(r.Control.Do("LLEN", idOf(id).QueueKey())); err == nil {
		inflight, err = redis.Int(r.Control.Do("ZCARD", idOf(id).InflightKey()))
	}
	return queue, inflight, err
}

// WantCounts waits until the semaphore has these numbers of free and used tokens.
func (r *Redis) WantCounts(t testing.TB, id fmt.Stringer, queue, inflight int) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		q, i, err := r.Counts(id)
		if err == nil && (q != queue || i != inflight) {
			err = fmt.Errorf("%s: queue %d, inflight %d; want %d, %d", id, q, i, queue, inflight)
		}
		return err
	})
}

// WantInflightCount waits until n tokens are in use.
func (r *Redis) WantInflightCount(t testing.TB, id fmt.Stringer, n int) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		_, inflight, err := r.Counts(id)
		if err == nil && inflight != n {
			err = fmt.Errorf("%d in flight, want %d", inflight, n)
		}
		return err
	})
}

// Inflight returns the tokens in use, ordered by their heartbeats.
func (r *Redis) Inflight(t testing.TB, id fmt.Stringer) []string {
	t.Helper()
	tokens, err := redis.Strings(r.Control.Do("ZRANGE", idOf(id).InflightKey(), 0, -1))
	Must(t, err)
	return tokens
}

// WantInflight fails the test unless exactly these tokens are in use.
func (r *Redis) WantInflight(t testing.TB, id fmt.Stringer, want ...string) {
	t.Helper()
	got := r.Inflight(t, id)
	slices.Sort(got)
	if want = slices.Sorted(slices.Values(want)); !slices.Equal(got, want) {
		t.Fatalf("in flight are %v, want %v", got, want)
	}
}

// LastHeartbeat returns the time of a token's last heartbeat, in Unix seconds; 0: not in
// use.
func (r *Redis) LastHeartbeat(t testing.TB, id fmt.Stringer, token string) int {
	t.Helper()
	score, err := redis.Int(r.Control.Do("ZSCORE", idOf(id).InflightKey(), token))
	if err != nil && !errors.Is(err, redis.ErrNil) {
		t.Fatal(err)
	}
	return score
}

// MakeStale sets a token's last heartbeat to long ago.
func (r *Redis) MakeStale(t testing.TB, id fmt.Stringer, token string) {
	t.Helper()
	r.Do(t, "ZADD", idOf(id).InflightKey(), "XX", 1, token)
}

// TryMakeStale is MakeStale over a new connection, for other goroutines than the test's.
func (r *Redis) TryMakeStale(id fmt.Stringer, token string) error {
	return r.besides(func(conn redis.Conn) error {
		_, err := conn.Do("ZADD", idOf(id).InflightKey(), "XX", 1, token)
		return err
	})
}

// MakeFree leaves the semaphore with n free tokens and none in use.
func (r *Redis) MakeFree(t testing.TB, id fmt.Stringer, n int) {
	t.Helper()
	r.Do(t, "DEL", idOf(id).QueueKey(), idOf(id).InflightKey(), idOf(id).NamesKey())
	r.AddFree(t, id, n)
}

// AddFree adds n free tokens.
func (r *Redis) AddFree(t testing.TB, id fmt.Stringer, n int) {
	t.Helper()
	for left := n; left > 0; left -= 1000 {
		tokens := Anys(slices.Repeat([]string{"free"}, min(left, 1000)))
		r.Do(t, "RPUSH", append([]any{idOf(id).QueueKey()}, tokens...)...)
	}
}

// GiveToAnother replaces a token in use by another.
func (r *Redis) GiveToAnother(t testing.TB, id fmt.Stringer, token string) (other string) {
	t.Helper()
	other = uuid.NewString()
	r.Do(t, "ZADD", idOf(id).InflightKey(), "9999999999", other)
	r.Do(t, "ZREM", idOf(id).InflightKey(), token)
	return other
}

// Line returns the waiting tokens, first in line first.
func (r *Redis) Line(id fmt.Stringer) ([]string, error) {
	return redis.Strings(r.Control.Do("ZRANGE", idOf(id).WaitersKey(), 0, -1))
}

// MustLine is Line, but fails the test on an error.
func (r *Redis) MustLine(t testing.TB, id fmt.Stringer) []string {
	t.Helper()
	tokens, err := r.Line(id)
	Must(t, err)
	return tokens
}

// WantLine waits until exactly these tokens wait, in this order.
func (r *Redis) WantLine(t testing.TB, id fmt.Stringer, want ...string) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		got, err := r.Line(id)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("in line are %v, want %v", got, want)
		}
		return err
	})
}

// WantLineLength waits until n tokens wait.
func (r *Redis) WantLineLength(t testing.TB, id fmt.Stringer, n int) {
	t.Helper()
	Eventually(t, 5*time.Minute, func() error {
		got, err := redis.Int(r.Control.Do("ZCARD", idOf(id).WaitersKey()))
		if err == nil && got != n {
			err = fmt.Errorf("%d in line, want %d", got, n)
		}
		return err
	})
}

// Unseen sets how long ago a waiter asked last.
func (r *Redis) Unseen(t testing.TB, id fmt.Stringer, token string, ago time.Duration) {
	t.Helper()
	r.Do(t, "ZADD", idOf(id).SeenKey(), r.Now(t)-seconds(ago), token)
}

// AllUnseen is Unseen for all waiters.
func (r *Redis) AllUnseen(t testing.TB, id fmt.Stringer, ago time.Duration) {
	t.Helper()
	r.Do(t, "EVAL", `for _, token in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
		redis.call('ZADD', KEYS[2], redis.call('TIME')[1] - ARGV[1], token)
	end`, 2, idOf(id).WaitersKey(), idOf(id).SeenKey(), seconds(ago))
}

// State returns a field of the state Hash.
func (r *Redis) State(t testing.TB, id fmt.Stringer, field string) int {
	t.Helper()
	n, err := redis.Int(r.Do(t, "HGET", idOf(id).StateKey(), field), nil)
	Must(t, err)
	return n
}

// ForgetLength makes the greatest length old enough for a smaller one to replace it.
func (r *Redis) ForgetLength(t testing.TB, id fmt.Stringer) {
	t.Helper()
	r.Do(t, "HSET", idOf(id).StateKey(), "asked", 1)
}

// Pods returns what Redis holds about pods, "SINCE NAME NODE", by token.
func (r *Redis) Pods(t testing.TB, id fmt.Stringer) map[string]string {
	t.Helper()
	names, err := redis.StringMap(r.Do(t, "HGETALL", idOf(id).NamesKey()), nil)
	Must(t, err)
	pods := map[string]string{}
	for field, text := range names {
		if token, ok := strings.CutSuffix(field, "/pod"); ok {
			pods[token] = text
		}
	}
	return pods
}

// WantPod waits until the pod of a token is "NAME NODE", and returns since when it has
// the token.
func (r *Redis) WantPod(t testing.TB, id fmt.Stringer, token, want string) (since string) {
	t.Helper()
	Eventually(t, 10*time.Second, func() error {
		var pod string
		if since, pod, _ = strings.Cut(r.Pods(t, id)[token], " "); pod != want {
			return fmt.Errorf("the pod of %s is %q, want %q", token, pod, want)
		}
		return nil
	})
	return since
}

// Dump returns everything that the keys of a semaphore hold, in the form of DUMP.
func (r *Redis) Dump(t testing.TB, id fmt.Stringer) (all []string) {
	t.Helper()
	for _, key := range idOf(id).Keys() {
		value, err := redis.String(r.Control.Do("DUMP", key))
		if err != nil && !errors.Is(err, redis.ErrNil) {
			t.Fatal(err)
		}
		all = append(all, value)
	}
	return all
}

// shiftScript adds to all times of a semaphore.
var shiftScript = redis.NewScript(scriptKeys, `
local function shift(key, by)
  local all = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do
    redis.call('ZADD', key, string.format('%.6f', tonumber(all[i + 1]) + by), all[i])
  end
end
shift(KEYS[2], ARGV[1])
shift(KEYS[3], ARGV[1] * 1000000)
shift(KEYS[4], ARGV[1])
for _, field in ipairs({'created', 'touched', 'resumed', 'lost', 'asked', 'sent', 'lentAt'}) do
  local at = tonumber(redis.call('HGET', KEYS[6], field) or 0)
  if at > 0 then
    redis.call('HSET', KEYS[6], field, at + ARGV[1])
  end
end
for _, field in ipairs({'heard', 'paused', 'lentTo', 'reigned'}) do
  local at = tonumber(redis.call('HGET', KEYS[6], field) or 0)
  if at > 0 then
    redis.call('HSET', KEYS[6], field, string.format('%.0f', at + ARGV[1] * 1000000))
  end
end`)

// Shift moves all times of a semaphore. To the past: as if Redis had been out of reach
// for that time, or its clock had been set forward. To the future: as if its clock had
// been set back.
func (r *Redis) Shift(t testing.TB, id fmt.Stringer, by time.Duration) {
	t.Helper()
	_, err := shiftScript.Do(r.Control, append(idOf(id).Keys(), seconds(by))...)
	Must(t, err)
}

func seconds(d time.Duration) int { return int(d / time.Second) }
