package model

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The model moves time without waiting for it. To a script, time that passes, and a clock that is set, are the same: what is stored
// comes to lie further back from now, or less far. So instead of the clock, everything moves that was ever read off it, and the
// clock stands still: what is stored (modelShift), and what processes were told and tell again, which is their arrival (see
// world.shift). What tells the two apart lies outside of Redis. Time passes for the processes, too: their heartbeats and questions
// become due, and their estimate of the server's clock keeps step. A clock that is set changes nothing of that, and the estimate is
// wrong until the next answer.
var modelShift = redis.NewScript(2*keyCount, `
local by = tonumber(ARGV[1])
local function shiftScores(key, by)
  local all = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do
    redis.call('ZADD', key, string.format('%.0f', all[i + 1] + by), all[i])
  end
end
for base = 0, 6, 6 do
  shiftScores(KEYS[base + 2], by)
  shiftScores(KEYS[base + 3], by * 1000000)
  shiftScores(KEYS[base + 4], by)
  for _, field in ipairs({'created', 'touched', 'resumed', 'lost', 'asked'}) do
    local at = redis.call('HGET', KEYS[base + 6], field)
    if at and tonumber(at) ~= 0 then -- 0 is never
      redis.call('HSET', KEYS[base + 6], field, string.format('%.0f', at + by))
    end
  end
  local names = redis.call('HGETALL', KEYS[base + 5])
  for i = 1, #names, 2 do
    local since, pod = string.match(names[i + 1], '^(%d+) (.*)$')
    if since and since ~= '0' then
      redis.call('HSET', KEYS[base + 5], names[i], string.format('%.0f %s', since + by, pod))
    end
  end
  for i = 1, 6 do
    local left = redis.call('PTTL', KEYS[base + i])
    if left >= 0 then
      redis.call('PEXPIRE', KEYS[base + i], left + by * 1000) -- deletes it if that is over
    end
  end
end`)

// keyCount is how many keys a semaphore has.
const keyCount = 6

// modelDump returns all that a semaphore's keys hold.
var modelDump = redis.NewScript(keyCount, `
local expiry = {}
for i, key in ipairs(KEYS) do
  expiry[i] = redis.call('PEXPIRETIME', key)
end
return {redis.call('LLEN', KEYS[1]), redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES'), redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES'),
  redis.call('ZRANGE', KEYS[4], 0, -1, 'WITHSCORES'), redis.call('HGETALL', KEYS[5]), redis.call('HGETALL', KEYS[6]), expiry}`)

// dump is what a semaphore's keys hold.
type dump struct {
	free     int
	inflight map[string]int
	waiters  map[string]int
	seen     map[string]int
	lengths  map[string]int
	since    map[string]int    // token -> when its pod took it; 0 of a waiter
	pods     map[string]string // token -> the pod
	state    map[string]int
	expiry   []int // Unix milliseconds, -1 for never, -2 where there is no such key
}

func (d dump) equal(other dump) bool {
	return d.equalButExpiry(other) && slices.Equal(d.expiry, other.expiry)
}

func (d dump) equalButExpiry(other dump) bool {
	return d.free == other.free && maps.Equal(d.inflight, other.inflight) && maps.Equal(d.waiters, other.waiters) &&
		maps.Equal(d.seen, other.seen) && maps.Equal(d.lengths, other.lengths) && maps.Equal(d.since, other.since) && maps.Equal(d.pods, other.pods) && maps.Equal(d.state, other.state)
}

// scripts are the scripts that are tested.
type scripts struct{ acquire, maintain, heartbeat, release, keep, hold *redis.Script }

// programScripts are those of the program.
func programScripts() scripts {
	return scripts{
		acquire: rig.Script("acquire"), maintain: rig.Script("maintain"), heartbeat: rig.Script("heartbeat"),
		release: rig.Script("release"), keep: rig.Script("keep"), hold: rig.Script("hold"),
	}
}

// estimate is what a client believes of the server's clock.
type estimate struct {
	micros int64     // what the server said last (Unix microseconds); zero: nothing yet
	heard  time.Time // when that was read
}

// at is the server's time at a moment here; zero, which is always too late, while the server has said nothing.
func (e *estimate) at(t time.Time) int64 {
	if e.micros == 0 {
		return 0
	}
	return e.micros + t.Sub(e.heard).Microseconds()
}

// store is the Redis side of the model: one semaphore, time that is moved by hand, and a replica that may take over.
type store struct {
	test    *testing.T
	redis   *rig.Redis
	clock   *estimate
	timing  rig.Timing
	scripts scripts
	ears    redis.PubSubConn // where waiters hear that they are called
	id      rig.ID
	second  int64 // of the real clock: now
}

func (s *store) replica() []any {
	var keys []any
	for _, key := range s.id.Keys() {
		keys = append(keys, "replica/"+key.(string))
	}
	return keys
}

// shift moves all stored times.
func (s *store) shift(seconds int) {
	keys := append(s.id.Keys(), s.replica()...)
	_, err := modelShift.Do(s.redis.Control, append(keys, seconds)...)
	rig.Must(s.test, err)
}

// ticks returns how many seconds the real clock has moved on since it was asked last. It waits where the second is about to change.
func (s *store) ticks() int {
	const edge = 10 * time.Millisecond
	now := time.Now()
	if into := now.Sub(now.Truncate(time.Second)); into < edge || into > time.Second-edge {
		time.Sleep((time.Second + edge - into) % time.Second)
		now = time.Now()
	}
	ticks := now.Unix() - s.second
	s.second = now.Unix()
	return int(ticks)
}

// setClock has the server's clock set forward, or back; the times that are stored are shifted by the caller.
func (s *store) setClock(seconds int) { s.clock.micros -= int64(seconds) * 1e6 }

// run runs a script as the program does, but has all the time of the world. late is by how many seconds the clock has moved on
// meanwhile.
func (s *store) run(script *redis.Script, args ...any) (status int, rest []any, late int) {
	status = rig.StatusLate
	for try := 0; status == rig.StatusLate; try++ { // the first may not know the time
		if try == 3 {
			s.test.Fatal("refused as late")
		}
		reply, err := rig.RunScript(s.redis.Control, script, s.id, s.clock.at(time.Now().Add(time.Minute)), s.timing, args...)
		rig.Must(s.test, err)
		status, rest = reply.Status, reply.Rest
		*s.clock = estimate{reply.Micros, time.Now()}
	}
	late = int(s.clock.micros/1e6 - s.second)
	s.second += int64(late)
	return status, rest, late
}

// runLate runs a script after its deadline.
func (s *store) runLate(script *redis.Script, by time.Duration, args ...any) (status int) {
	reply, err := rig.RunScript(s.redis.Control, script, s.id, time.Now().Add(-by).UnixMicro(), s.timing, args...)
	rig.Must(s.test, err)
	return reply.Status
}

// listen subscribes to the calls of a waiter, and deafen to none any more.
func (s *store) listen(token string) { s.hear("SUBSCRIBE", s.id.Channel(token)) }
func (s *store) deafen()             { s.hear("UNSUBSCRIBE") }

// hear sends a command to the connection that listens, and returns in which channels somebody was called before it was answered.
func (s *store) hear(command string, args ...any) map[string]bool {
	rig.Must(s.test, s.ears.Conn.Send(command, args...))
	rig.Must(s.test, s.ears.Conn.Flush())
	called := map[string]bool{}
	for {
		switch reply := s.ears.Receive().(type) {
		case redis.Message:
			if string(reply.Data) == "your turn" {
				called[reply.Channel] = true
			}
		case redis.Subscription:
			if reply.Kind == "subscribe" || reply.Count == 0 {
				return called
			}
		case redis.Pong:
			return called
		case error:
			rig.Must(s.test, reply)
		}
	}
}

// replicate brings the replica up to date; failover lets it take over.
func (s *store) replicate() { s.copy(s.id.Keys(), s.replica()) }
func (s *store) failover()  { s.copy(s.replica(), s.id.Keys()) }
func (s *store) loseAll()   { s.redis.Do(s.test, "DEL", s.id.Keys()...) }

func (s *store) copy(from, to []any) {
	s.redis.Do(s.test, "DEL", to...)
	for i := range from {
		s.redis.Do(s.test, "COPY", from[i], to[i])
	}
}

func (s *store) dump() (d dump) {
	values, err := redis.Values(modelDump.Do(s.redis.Control, s.id.Keys()...))
	rig.Must(s.test, err)
	d.free = int(values[0].(int64))
	for i, m := range map[int]*map[string]int{1: &d.inflight, 2: &d.waiters, 3: &d.seen, 5: &d.state} {
		*m, err = redis.IntMap(values[i], nil)
		rig.Must(s.test, err)
	}
	names, err := redis.StringMap(values[4], nil)
	rig.Must(s.test, err)
	d.lengths, d.since, d.pods = map[string]int{}, map[string]int{}, map[string]string{}
	for field, text := range names {
		var err error
		if token, ok := strings.CutSuffix(field, "/pod"); ok {
			since, pod, _ := strings.Cut(text, " ")
			d.pods[token] = pod
			d.since[token], err = strconv.Atoi(since)
		} else {
			d.lengths[field], err = strconv.Atoi(text)
		}
		rig.Must(s.test, err)
	}
	d.expiry, err = redis.Ints(values[6], nil)
	rig.Must(s.test, err)
	return d
}
