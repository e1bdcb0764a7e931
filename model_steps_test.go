package main

import (
	"slices"
	"strings"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// pick draws one of the pods for which ok holds.
func (m *model) pick(from []*modelPod, ok func(*modelPod) bool) *modelPod {
	var list []*modelPod
	for _, p := range from {
		if ok(p) {
			list = append(list, p)
		}
	}
	if len(list) == 0 {
		m.Skip("nobody")
	}
	return rapid.SampledFrom(list).Draw(m.T, "pod")
}

func (m *model) remove(p *modelPod) {
	m.pods = slices.DeleteFunc(m.pods, func(other *modelPod) bool { return other == p })
}

func anyPod(*modelPod) bool     { return true }
func holding(p *modelPod) bool  { return p.holds }
func waitsFor(p *modelPod) bool { return !p.holds }

// dump is all that Redis has of the semaphore.
func (m *model) dump() string {
	var all []string
	for _, key := range m.id.keys() {
		value, err := redis.String(m.r.control.Do("DUMP", key))
		if err != redis.ErrNil {
			m.must(err)
		}
		all = append(all, value)
	}
	return strings.Join(all, "\n")
}

// unsettle notes that Redis may not know for a while who is gone: from the first command on, which comes within seconds.
func (m *model) unsettle() { m.doubtful = m.now + modelQuiet + modelBack + 5 }

// comeBack is what happens after Redis could not be asked, or its clock was set: somebody asks before the others do, and those that
// are alive are back within seconds.
func (m *model) comeBack() {
	m.unsettle()
	m.admission()
	m.live(modelBack + 1)
}

func (m *model) admission() {
	p := m.newPod("")
	if m.ask(p, ""); p.holds {
		m.pods = append(m.pods, p)
	}
}

func (m *model) giveBack(p *modelPod) {
	m.run(m.scripts.release, p.token)
	m.remove(p)
	m.done = append(m.done, p.token)
	before := m.look()
	status, _ := m.run(m.scripts.release, p.token)
	if after := m.look(); status != 0 || after.free != before.free || len(after.inflight) != len(before.inflight) {
		m.Fatalf("released twice: %d", status)
	}
}

// actions are the steps that a model can take.
func (m *model) actions() map[string]func(*rapid.T) {
	steps := map[string]func(){
		"admission": m.admission,
		"hand over": func() { // nobody overtakes the line
			m.giveBack(m.pick(m.pods, holding))
			m.admission()
		},
		"join": func() {
			p := m.newPod(joinLine)
			m.pods = append(m.pods, p)
			m.poll(p)
		},
		"poll": func() { m.poll(m.pick(m.pods, waitsFor)) },
		"beat": func() { m.beat(m.pick(m.pods, holding)) },
		"ask again": func() { // the answer was lost
			m.ask(m.pick(m.pods, func(p *modelPod) bool { return p.holds && !p.lost }), "")
		},
		"give back": func() { m.giveBack(m.pick(m.pods, anyPod)) },
		"die": func() {
			p := m.pick(m.pods, anyPod)
			m.remove(p)
			m.dead = append(m.dead, p)
		},
		"late": func() {
			token := uuid.NewString()
			if len(m.done) > 0 {
				token = rapid.SampledFrom(m.done).Draw(m.T, "token")
			}
			script, args := m.scripts.heartbeat, []any{token}
			switch rapid.IntRange(0, 3).Draw(m.T, "command") {
			case 0:
				script, args = m.scripts.acquire, []any{4, token, joinLine}
			case 1:
				script, args = m.scripts.maintain, []any{4, "1"}
			case 2:
				script = m.scripts.release
				if len(m.pods) > 0 {
					args = []any{m.pods[0].token}
				}
			}
			before := m.dump()
			all := append(append(m.id.keys(), 1, modelInterval, modelThreshold, 1000), args...)
			reply, err := redis.Ints(script.Do(m.r.control, all...))
			m.must(err)
			if reply[0] != statusLate || m.dump() != before {
				m.Fatalf("a command that came too late was answered %v", reply)
			}
		},
		"maintain":    func() { m.maintain(rapid.IntRange(1, 4).Draw(m.T, "length"), true) },
		"time passes": func() { m.live(rapid.IntRange(1, 12).Draw(m.T, "seconds")) },
		"much time passes": func() {
			m.live(modelThreshold + 2*modelQuiet)
		},
		"Redis is away": func() {
			m.sleep(rapid.SampledFrom([]int{6, 20, 300}).Draw(m.T, "seconds"))
			m.comeBack()
		},
		"the clock is set": func() {
			m.shift(rapid.SampledFrom([]int{-600, -5, 5, 600}).Draw(m.T, "seconds"))
			m.comeBack()
		},
		"all data is lost": func() {
			m.must(errOf(m.r.control.Do("DEL", m.id.keys()...)))
			for _, p := range m.pods {
				p.lost = p.holds
			}
			m.unsettle()
		},
	}
	actions := map[string]func(*rapid.T){"": func(t *rapid.T) {
		m.T = t
		m.check()
	}}
	for name, step := range steps {
		actions[name] = func(t *rapid.T) {
			m.T = t
			step()
		}
	}
	return actions
}

// check checks what always holds.
func (m *model) check() {
	now := m.look()
	inflight, line := now.inflight, now.line
	for _, token := range inflight {
		if slices.Contains(line, token) {
			m.Fatalf("%s is in use and in line", token)
		}
		if slices.Contains(m.done, token) {
			m.Fatalf("%s was given back and is in use", token)
		}
	}
	for _, p := range m.pods {
		if p.holds && !p.lost && !slices.Contains(inflight, p.token) {
			m.Fatalf("%s is alive, and its token was reclaimed", p.token)
		}
	}
	if now.free > max(0, m.greatest-len(inflight)) {
		m.Fatalf("%d are free and %d in use, of %d", now.free, len(inflight), m.greatest)
	}
	var order []string // of those in line that are alive, as they joined
	for _, p := range m.pods {
		if slices.Contains(line, p.token) {
			order = append(order, p.token)
		}
	}
	alive := slices.DeleteFunc(slices.Clone(line), func(token string) bool { return m.lengthOf(token) == 0 })
	if !slices.Equal(order, alive) {
		m.Fatalf("in line are %v, and they joined in the order %v", alive, order)
	}
	if now.lasting > 0 {
		m.Fatalf("%d keys do not expire", now.lasting)
	}
}
