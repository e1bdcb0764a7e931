package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// The scripts, played to at random beside a plain model of pods: who holds, who waits, who is alive. More of it:
// go test -run TestModel -rapid.checks=10000 -rapid.steps=60

const (
	modelInterval  = 10 // seconds
	modelThreshold = 40
	modelBack      = 3                         // as in semaphore.lua
	modelQuiet     = modelInterval + modelBack // the same
)

// scripts are those that a model plays to.
type scripts struct{ acquire, maintain, heartbeat, release *redis.Script }

// modelPod is a pod that takes a token, or waits for it.
type modelPod struct {
	token   string
	length  int
	arrival string // what it was told; joinLine before
	holds   bool   // it was told that it has the token
	lost    bool   // with the data of Redis, and not put back yet
	acted   int    // when it beat, or asked, last
}

// model is a semaphore in Redis, and what is known of its pods. Time passes for them in seconds, by shifting all that Redis has
// noted into the past.
type model struct {
	*rapid.T
	r        *redisServer
	s        *semaphores
	id       semaphoreID
	scripts  scripts
	now      int // of the pods
	pods     []*modelPod
	dead     []*modelPod // holders and waiters that are gone without a word
	done     []string    // tokens that were given back
	greatest int         // length that was asked for
	doubtful int         // until when Redis may not know who is gone
}

// shift lets the clock of Redis be set by so many seconds.
func (m *model) shift(seconds int) {
	_, err := shiftScript.Do(m.r.control, append(m.id.keys(), -seconds)...)
	m.must(err)
}

func (m *model) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

// sleep lets time pass in which nobody sends a command. What waiters remember of their arrivals grows older with it.
func (m *model) sleep(seconds int) {
	m.shift(seconds)
	m.now += seconds
	for _, p := range append(m.pods, m.dead...) {
		if p.arrival != "" && p.arrival != joinLine {
			var at int64
			_, err := fmt.Sscan(p.arrival, &at)
			m.must(err)
			p.arrival = fmt.Sprint(at - int64(seconds)*1000000)
		}
	}
}

// live lets time pass in which all that are alive do what they have to: holders beat, waiters ask.
func (m *model) live(seconds int) {
	for range seconds {
		m.sleep(1)
		for _, p := range slices.Clone(m.pods) {
			switch {
			case p.holds && m.now-p.acted >= modelInterval:
				m.beat(p)
			case !p.holds && m.now-p.acted >= 3:
				m.poll(p)
			}
		}
	}
}

func (m *model) run(script *redis.Script, args ...any) (status int, rest []any) {
	m.Helper()
	status, rest, err := m.s.run(context.Background(), script, m.id, args...)
	m.must(err)
	return status, rest
}

// snapshot is what Redis has of a semaphore.
type snapshot struct {
	free           int
	inflight, line []string
	lasting        int // how many keys do not expire
}

var snapshotScript = redis.NewScript(scriptKeys, `
local lasting = 0
for _, key in ipairs(KEYS) do if redis.call('TTL', key) == -1 then lasting = lasting + 1 end end
return {redis.call('LLEN', KEYS[1]), lasting, redis.call('ZRANGE', KEYS[2], 0, -1), redis.call('ZRANGE', KEYS[3], 0, -1)}`)

func (m *model) look() (now snapshot) {
	values, err := redis.Values(snapshotScript.Do(m.r.control, m.id.keys()...))
	m.must(err)
	_, err = redis.Scan(values, &now.free, &now.lasting, &now.inflight, &now.line)
	m.must(err)
	return now
}

// lengthOf is the length of a pod in line; zero for one that is not alive.
func (m *model) lengthOf(token string) int {
	for _, p := range m.pods {
		if p.token == token {
			return p.length
		}
	}
	return 0
}

// wantEntitled checks that a pod may have taken a token as it was before.
func (m *model) wantEntitled(p *modelPod, before snapshot) {
	used, free := len(before.inflight), before.free
	if used >= p.length {
		m.Fatalf("%s of length %d was admitted while %d were in use", p.token, p.length, used)
	}
	for _, token := range before.line {
		if token == p.token {
			break
		}
		if used < m.lengthOf(token) {
			used, free = used+1, free-1
		}
	}
	if free < 1 {
		m.Fatalf("%s has overtaken those in line: %v", p.token, before.line)
	}
}

// ask asks for a token, and repairs and asks again where it is told so.
func (m *model) ask(p *modelPod, arrival string) {
	m.greatest = max(m.greatest, p.length)
	for range 2 {
		before := m.look()
		status, rest := m.run(m.scripts.acquire, p.length, p.token, arrival)
		a, err := parseAnswer(status, rest)
		m.must(err)
		switch a.status {
		case acquireTaken:
			if !slices.Contains(before.inflight, p.token) {
				m.wantEntitled(p, before)
			}
			p.holds = true
			return
		case acquireRepair:
			m.maintain(p.length, question{arrival: arrival}.newcomer())
			continue
		}
		if arrival != "" {
			p.arrival = a.place.arrival
		}
		m.wantFull(p, arrival)
		return
	}
	if m.now > m.doubtful {
		m.Fatalf("%s of length %d was told to repair twice", p.token, p.length)
	}
}

// wantFull checks that nothing is there for a pod that was refused, or is to wait.
func (m *model) wantFull(p *modelPod, arrival string) {
	after := m.look()
	if m.now <= m.doubtful || len(after.inflight) >= p.length {
		return
	}
	for _, token := range after.line {
		if token == p.token {
			break
		}
		if length := m.lengthOf(token); length == 0 || length > len(after.inflight) {
			return // somebody ahead may be entitled, or gone
		}
	}
	m.Fatalf("%s of length %d (arrival %q) is entitled and got nothing: %d free, %d in use", p.token, p.length, arrival, after.free, len(after.inflight))
}

func (m *model) poll(p *modelPod) {
	p.acted = m.now
	m.ask(p, p.arrival)
}

func (m *model) beat(p *modelPod) {
	p.acted, p.lost = m.now, false
	m.run(m.scripts.heartbeat, p.token)
}

func (m *model) maintain(length int, newcomer bool) {
	m.greatest = max(m.greatest, length)
	m.run(m.scripts.maintain, length, yesNo(newcomer))
}

func (m *model) newPod(arrival string) *modelPod {
	return &modelPod{token: uuid.NewString(), length: rapid.IntRange(1, 4).Draw(m.T, "length"), arrival: arrival, acted: m.now}
}

// end lets all pods go, and checks that all tokens come back.
func (m *model) end() {
	for _, p := range m.pods {
		m.run(m.scripts.release, p.token)
	}
	m.dead, m.pods = nil, nil
	m.sleep(1000)
	const length = 4
	var taken []string
	for range 30 {
		m.sleep(3)
		p := &modelPod{token: uuid.NewString(), length: length}
		if m.ask(p, ""); p.holds {
			taken = append(taken, p.token)
		}
		for _, token := range taken {
			m.run(m.scripts.heartbeat, token)
		}
	}
	if now := m.look(); len(taken) != length || len(now.inflight) != length || now.free != 0 || len(now.line) != 0 {
		m.Fatalf("in the end %d of %d could be taken: %+v", len(taken), length, now)
	}
}

// playModel plays to scripts.
func playModel(r *redisServer, s *semaphores, with scripts) func(*rapid.T) {
	return func(t *rapid.T) {
		m := &model{T: t, r: r, s: s, id: freshID(), scripts: with}
		t.Repeat(m.actions())
		m.T = t
		m.end()
	}
}

func modelSemaphores(t *testing.T, r *redisServer) *semaphores {
	t.Helper()
	c := testConfig(r.address)
	c.heartbeatInterval, c.staleThreshold = modelInterval*time.Second, modelThreshold*time.Second
	s := newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, 1), 1, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { must(t, s.close(context.Background())) })
	return s
}

func TestModel(t *testing.T) {
	t.Parallel()
	r := commonRedis(t)
	rapid.Check(t, playModel(r, modelSemaphores(t, r), brokenScripts(t, os.Getenv(breakVariable))))
}
