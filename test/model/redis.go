package model

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// modelShift moves all stored times of a semaphore and of its replica. The model uses it
// to move time without waiting.
//
// A script cannot distinguish passing time from a clock change: in both cases the stored
// times are further from now, or nearer. So the server's clock stands still, and every
// time that came from it moves. modelShift moves the stored times. world.shift moves the
// arrivals that waiters received and send again.
//
// The two cases differ outside of Redis. If time passes, heartbeats and requests become
// due, and the client's estimate of the server's clock stays right. If the clock is set,
// nothing becomes due, and the estimate is wrong until the next reply.
var modelShift = redis.NewScript(2*keyCount, `
local by = tonumber(ARGV[1])
local function shiftScores(key, by)
  local all = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do
    redis.call('ZADD', key, string.format('%.6f', all[i + 1] + by), all[i])
  end
end
for base = 0, 7, 7 do
  shiftScores(KEYS[base + 2], by)
  shiftScores(KEYS[base + 3], by * 1000000)
  shiftScores(KEYS[base + 4], by)
  for field, unit in pairs({created = 1, touched = 1, resumed = 1, lost = 1, asked = 1, sent = 1, lentAt = 1, lentTo = 1e6, joined = 1e6, ends = 1,
      kept = 1, heard = 1e6, paused = 1e6, reigned = 1e6}) do
    local at = redis.call('HGET', KEYS[base + 6], field)
    if at and tonumber(at) ~= 0 then -- 0 is never
      redis.call('HSET', KEYS[base + 6], field, string.format('%.0f', at + by * unit))
    end
  end
  local names = redis.call('HGETALL', KEYS[base + 5])
  for i = 1, #names, 2 do
    if string.find(names[i], '/first$') then
      redis.call('HINCRBY', KEYS[base + 5], names[i], by)
    end
    local since, pod = string.match(names[i + 1], '^(%d+)(%+?%d* .*)$')
    if since and since ~= '0' then
      redis.call('HSET', KEYS[base + 5], names[i], string.format('%.0f%s', since + by, pod))
    end
  end
  local started = KEYS[base + 6] .. '/started'
  if redis.call('EXISTS', started) == 1 then
    redis.call('INCRBY', started, by)
  end
  for i = 1, 7 do
    local left = redis.call('PTTL', KEYS[base + i])
    if left >= 0 then
      redis.call('PEXPIRE', KEYS[base + i], left + by * 1000) -- deletes an expired key
    end
  end
end`)

// keyCount is the number of keys of a semaphore.
const keyCount = 7

// modelDump returns everything that the keys of a semaphore hold.
var modelDump = redis.NewScript(keyCount, `
local expiry = {}
for i, key in ipairs(KEYS) do
  expiry[i] = redis.call('PEXPIRETIME', key)
end
return {
  redis.call('LLEN', KEYS[1]),
  redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES'),
  redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES'),
  redis.call('ZRANGE', KEYS[4], 0, -1, 'WITHSCORES'),
  redis.call('HGETALL', KEYS[5]),
  redis.call('HGETALL', KEYS[6]),
  expiry,
  redis.call('LRANGE', KEYS[7], 0, -1),
}`)

// dump is everything that the keys of a semaphore hold.
type dump struct {
	free     int
	used     int            // tokens in flight
	parts    map[string]int // token -> how many its pod has
	inflight map[string]int
	waiters  map[string]int
	seen     map[string]int // microseconds
	wishes   map[string]string
	firsts   map[string]int    // token of a waiter -> since when it is the first that does not fit
	hears    map[string]bool   // waiters that received a message at their last request
	passed   map[string]bool   // waiters that missed a call since then
	aheads   map[string]int    // token of a waiter -> microseconds that it stands ahead
	since    map[string]int    // token -> when its pod took it; 0: a waiter
	pods     map[string]string // token -> its pod
	gaveUp   map[string]string // token that gave up -> how long it waited; and the places of these notes
	state    map[string]int    // without the texts
	limit    string            // in state; empty: there is none, or it is not known
	holds    string            // in state: how long the last pods had their tokens
	waited   map[string]string // token in use -> how long its pod had waited; missing: it did not
	history  []string
	expiry   []int // Unix milliseconds; -1: never; -2: no such key
}

func (d dump) equal(other dump) bool {
	return d.equalButExpiry(other) && slices.Equal(d.expiry, other.expiry)
}

func (d dump) equalButExpiry(other dump) bool {
	return d.free == other.free && maps.Equal(d.inflight, other.inflight) &&
		maps.Equal(d.waiters, other.waiters) && maps.Equal(d.seen, other.seen) &&
		maps.Equal(d.parts, other.parts) && maps.Equal(d.wishes, other.wishes) && maps.Equal(d.firsts, other.firsts) &&
		maps.Equal(d.aheads, other.aheads) && maps.Equal(d.since, other.since) &&
		maps.Equal(d.hears, other.hears) && maps.Equal(d.passed, other.passed) &&
		maps.Equal(d.pods, other.pods) && maps.Equal(d.gaveUp, other.gaveUp) && maps.Equal(d.state, other.state) &&
		d.limit == other.limit && d.holds == other.holds && maps.Equal(d.waited, other.waited) &&
		slices.Equal(d.history, other.history)
}

// inSeconds returns d without the fractions of seconds: a repeated command changes these.
func (d dump) inSeconds() dump {
	d.seen, d.state = maps.Clone(d.seen), maps.Clone(d.state)
	for token := range d.seen {
		d.seen[token] /= 1e6
	}
	for _, field := range []string{"heard", "paused", "reigned"} {
		delete(d.state, field)
	}
	return d
}

// scripts are the scripts under test.
type scripts struct{ acquire, maintain, heartbeat, release, keep, hold, set *redis.Script }

// scriptsOf makes the scripts from their texts. They take the age of the server from a key
// of the model, see setStarted.
func scriptsOf(t *testing.T, text func(name string) string) scripts {
	script := func(name string) *redis.Script {
		const asks = "redis.pcall('INFO', 'server')"
		before, after, ok := strings.Cut(text(name), asks)
		if !ok {
			t.Fatalf("the script %s does not ask for the age by %s", name, asks)
		}
		return rig.NewScript(before + "'uptime_in_seconds:' .. (now - redis.call('GET', KEYS[6] .. '/started'))" + after)
	}
	return scripts{
		acquire:   script("acquire"),
		maintain:  script("maintain"),
		heartbeat: script("heartbeat"),
		release:   script("release"),
		keep:      script("keep"),
		hold:      script("hold"),
		set:       script("set"),
	}
}

// estimate is a client's estimate of the server's clock.
type estimate struct {
	micros int64     // the time in the last reply (Unix microseconds); 0: no reply yet
	readAt time.Time // when the client read it
}

// at returns the server's time at a moment of the client's clock. Without a reply it
// returns 0, a deadline in the past.
func (e *estimate) at(t time.Time) int64 {
	if e.micros == 0 {
		return 0
	}
	return e.micros + t.Sub(e.readAt).Microseconds()
}

// store is the Redis side of the model: one semaphore, a clock that the model moves, and
// a replica that may be promoted.
type store struct {
	test       *testing.T
	redis      *rig.Redis
	clock      *estimate
	timing     rig.Timing
	scripts    scripts
	subscriber redis.PubSubConn // receives the calls for waiters
	id         rig.ID
	second     int64 // the present second of the real clock
}

// micros returns the time of the last script, by the server's clock.
func (s *store) micros() int { return int(s.clock.micros) }

// reign gives the server another replication ID, as a restart and a promotion do.
func (s *store) reign() {
	s.redis.Do(s.test, "REPLICAOF", "127.0.0.1", "1")
	s.redis.Do(s.test, "REPLICAOF", "NO", "ONE")
	time.Sleep(time.Millisecond) // as a restart does: seen notes a request by its millisecond
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

// ticks returns the seconds that the real clock has advanced since the last call. Near
// the end of a second it waits for the next one.
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

// setClock moves the server's clock forward or back. The caller shifts the stored times.
func (s *store) setClock(seconds int) { s.clock.micros -= int64(seconds) * 1e6 }

// run runs a script as the program does, but with a deadline of a minute. elapsed is the
// number of seconds that the clock has advanced meanwhile.
func (s *store) run(script *redis.Script, args ...any) (status int, rest []any, elapsed int) {
	status = rig.StatusLate
	for try := 0; status == rig.StatusLate; try++ { // the first deadline may be wrong; the reply has the time
		if try == 3 {
			s.test.Fatal("Redis refused three deadlines as late")
		}
		deadline := s.clock.at(time.Now().Add(time.Minute))
		reply, err := rig.RunScript(s.redis.Control, script, s.id, deadline, s.timing, args...)
		rig.Must(s.test, err)
		status, rest = reply.Status, reply.Rest
		*s.clock = estimate{reply.Micros, time.Now()}
	}
	elapsed = int(s.clock.micros/1e6 - s.second)
	s.second += int64(elapsed)
	return status, rest, elapsed
}

// runLate runs a script after its deadline.
func (s *store) runLate(script *redis.Script, by time.Duration, args ...any) (status int) {
	deadline := time.Now().Add(-by).UnixMicro()
	reply, err := rig.RunScript(s.redis.Control, script, s.id, deadline, s.timing, args...)
	rig.Must(s.test, err)
	return reply.Status
}

// leave unsubscribes from the channel of a waiter.
func (s *store) leave(token string) { s.receiveCalls("UNSUBSCRIBE", s.id.Channel(token)) }

// subscribe subscribes to the channel of a waiter.
func (s *store) subscribe(token string) { s.receiveCalls("SUBSCRIBE", s.id.Channel(token)) }

// unsubscribe unsubscribes from all channels.
func (s *store) unsubscribe() { s.receiveCalls("UNSUBSCRIBE") }

// receiveCalls sends a command over the subscribed connection. It returns the channels of the
// calls that came before the reply.
func (s *store) receiveCalls(command string, args ...any) map[string]bool {
	rig.Must(s.test, s.subscriber.Conn.Send(command, args...))
	rig.Must(s.test, s.subscriber.Conn.Flush())
	called := map[string]bool{}
	for {
		switch reply := s.subscriber.Receive().(type) {
		case redis.Message:
			if string(reply.Data) == rig.YourTurn {
				called[reply.Channel] = true
			}
		case redis.Subscription:
			if reply.Kind == "subscribe" || reply.Count == 0 || len(args) > 0 {
				return called
			}
		case redis.Pong:
			return called
		case error:
			rig.Must(s.test, reply)
		}
	}
}

// replicate copies the data to the replica.
func (s *store) replicate() { s.copy(s.id.Keys(), s.replica()) }

// failover promotes the replica.
func (s *store) failover() { s.copy(s.replica(), s.id.Keys()) }

// setStarted sets when the server started, by its clock.
func (s *store) setStarted(second int64) { s.redis.Do(s.test, "SET", s.startedKey(), second) }

func (s *store) startedKey() string { return s.id.StateKey() + "/started" }

// loseAll deletes the data of the semaphore.
func (s *store) loseAll() { s.redis.Do(s.test, "DEL", s.id.Keys()...) }

func (s *store) copy(from, to []any) {
	s.redis.Do(s.test, "DEL", to...)
	for i := range from {
		s.redis.Do(s.test, "COPY", from[i], to[i])
	}
}

// dump reads everything that the keys of the semaphore hold.
func (s *store) dump() (d dump) {
	values, err := redis.Values(modelDump.Do(s.redis.Control, s.id.Keys()...))
	rig.Must(s.test, err)
	d.free = int(values[0].(int64))
	for i, m := range map[int]*map[string]int{1: &d.inflight, 2: &d.waiters} {
		*m, err = redis.IntMap(values[i], nil)
		rig.Must(s.test, err)
	}
	d.used, d.parts = len(d.inflight), map[string]int{}
	for name, at := range d.inflight {
		token, _, isMore := strings.Cut(name, "/")
		if d.parts[token]++; isMore {
			delete(d.inflight, name)
		}
		if first, ok := d.inflight[token]; ok && first != at {
			d.parts[token] = -1 // no pod has tokens of two ages
		}
	}
	state, err := redis.StringMap(values[5], nil)
	rig.Must(s.test, err)
	d.state, d.limit, d.holds = map[string]int{}, state["limit"], state["holds"]
	for field, text := range state {
		if !slices.Contains([]string{"limit", "note", "by", "holds"}, field) {
			d.state[field], err = strconv.Atoi(text)
			rig.Must(s.test, err)
		}
	}
	seen, err := redis.Float64Map(values[3], nil)
	rig.Must(s.test, err)
	d.seen, d.hears, d.passed = map[string]int{}, map[string]bool{}, map[string]bool{}
	for token, at := range seen {
		d.seen[token] = int(math.Round(at * 1e6))
	}
	names, err := redis.StringMap(values[4], nil)
	rig.Must(s.test, err)
	d.wishes, d.aheads, d.since, d.pods = map[string]string{}, map[string]int{}, map[string]int{}, map[string]string{}
	d.gaveUp, d.firsts, d.waited = map[string]string{}, map[string]int{}, map[string]string{}
	for field, text := range names {
		var err error
		if token, ok := strings.CutSuffix(field, "/ahead"); ok {
			d.aheads[token], err = strconv.Atoi(text)
		} else if token, ok := strings.CutSuffix(field, "/first"); ok {
			d.firsts[token], err = strconv.Atoi(text)
		} else if token, ok := strings.CutSuffix(field, "/pod"); ok {
			since, pod, _ := strings.Cut(text, " ")
			d.pods[token] = pod
			if before, waited, ok := strings.Cut(since, "+"); ok {
				since, d.waited[token] = before, waited
			}
			d.since[token], err = strconv.Atoi(since)
		} else if strings.HasSuffix(field, "/gaveUp") || strings.HasPrefix(field, "gaveUp/") {
			d.gaveUp[field] = text
		} else {
			d.wishes[field] = strings.TrimLeft(text, "+-")
			if strings.HasPrefix(text, "+") {
				d.hears[field] = true
			} else if strings.HasPrefix(text, "-") {
				d.passed[field] = true
			}
		}
		rig.Must(s.test, err)
	}
	d.history, err = redis.Strings(values[7], nil)
	rig.Must(s.test, err)
	d.expiry, err = redis.Ints(values[6], nil)
	rig.Must(s.test, err)
	return d
}
