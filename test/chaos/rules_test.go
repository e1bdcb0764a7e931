package chaos

import (
	"slices"
	"testing"
	"time"
)

// worker returns a pod that took its token at second from, worked, and ended at second
// to; 0: not yet.
func worker(name string, length, from, to int) *podLife {
	at := time.Duration(from) * time.Second
	l := &podLife{name: name, semaphore: "shop/web", length: length, asked: at, answered: at + 50*time.Millisecond,
		admitted: true, took: span{at, at + 50*time.Millisecond}, started: at + 100*time.Millisecond}
	if to > 0 {
		l.ended = time.Duration(to) * time.Second
		l.released = l.ended + 100*time.Millisecond
	}
	return l
}

// inLineSince returns a pod that waits from second from and works from second to; 0:
// never.
func inLineSince(name string, length, from, to, end int) *podLife {
	l := &podLife{name: name, semaphore: "shop/web", length: length, waits: true}
	if to > 0 {
		l = worker(name, length, to, end)
		l.waits = true
	}
	l.asked = time.Duration(from) * time.Second
	l.answered, l.inLine, l.admitted = l.asked+50*time.Millisecond, l.asked+200*time.Millisecond, true
	return l
}

// gatedSince returns a pod that waits gated from second from. At second to, its gate is
// lifted; it works half a second later.
func gatedSince(name string, length, from, to, end int) *podLife {
	l := inLineSince(name, length, from, to, end)
	l.gated = true
	if to > 0 {
		lifted := time.Duration(to) * time.Second
		l.lifted = span{lifted, lifted + 100*time.Millisecond}
		l.took = span{l.lifted.from, lifted + 400*time.Millisecond}
		l.started = lifted + 500*time.Millisecond
	}
	return l
}

func refusedAt(name string, length, at int) *podLife {
	asked := time.Duration(at) * time.Second
	answered := asked + 50*time.Millisecond
	return &podLife{name: name, semaphore: "shop/web", length: length, asked: asked, answered: answered, refused: true,
		ended: answered}
}

func undecided(at int) *podLife {
	p := refusedAt("undecided", 1, at)
	p.refused, p.failed = false, true
	return p
}

func (p *podLife) silent(from, to int) *podLife {
	p.silences = append(p.silences, span{time.Duration(from) * time.Second, time.Duration(to) * time.Second})
	return p
}

func (p *podLife) deletedAt(at int) *podLife {
	p.ended = time.Duration(at) * time.Second
	return p
}

func (p *podLife) diesAt(at int) *podLife {
	p.died, p.ended, p.released = time.Duration(at)*time.Second, notYet, notYet
	return p
}

// The checker accepts histories that keep the rules, and names the broken rule of the
// others.
func TestChaosChecker(t *testing.T) {
	t.Parallel()
	during := func(f fault, from, to int) fault {
		f.span = span{time.Duration(from) * time.Second, time.Duration(to) * time.Second}
		return f
	}
	lost := func(at int) fault { return during(fault{name: "data lost", loses: losesAll}, at, at) }
	others := lost(5)
	others.semaphores = []string{"shop/other"}
	failover := during(fault{name: "a failover", loses: losesRecent, away: true}, 6, 7)
	for name, c := range map[string]struct {
		pods   []*podLife
		faults []fault
		rule   string // the rule that the history breaks, perhaps with others; empty: none
	}{
		"one after the other": {[]*podLife{worker("a", 1, 1, 5), worker("b", 1, 6, 9)}, nil, ""},
		"two at once":         {[]*podLife{worker("a", 1, 1, 9), worker("b", 1, 6, 9)}, nil, ruleCount},
		"two of two, and a third": {[]*podLife{worker("a", 2, 1, 9), worker("b", 2, 2, 9), worker("c", 2, 3, 9)},
			nil, ruleCount},
		"a greater length": {[]*podLife{worker("a", 1, 1, 9), worker("b", 2, 6, 9)}, nil, ""},
		"a smaller length": {[]*podLife{worker("a", 2, 1, 9), worker("b", 1, 6, 9)}, nil, ruleLetIn},
		"after a loss":     {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 6, 20)}, []fault{lost(5)}, ""},
		"after an empty start": {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 6, 20)},
			[]fault{during(fault{loses: losesByStart, away: true}, 4, 5)}, ruleCount},
		"after an empty start in a silence": {[]*podLife{worker("a", 1, 1, 20).silent(4, 6), worker("b", 1, 6, 20)},
			[]fault{during(fault{loses: losesByStart, away: true}, 4, 5)}, ""},
		"after a death on a node that is cut off later": {[]*podLife{worker("a", 1, 1, 9).diesAt(5).silent(40, 44), worker("b", 1, 16, 20)},
			nil, ""},
		"long after a loss":   {[]*podLife{worker("a", 1, 1, 30), worker("b", 1, 20, 30)}, []fault{lost(5)}, ruleLetIn},
		"before a loss":       {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 6, 20)}, []fault{lost(15)}, ruleCount},
		"the loss of another": {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 6, 20)}, []fault{others}, ruleCount},
		"one pod too many stays so": {[]*podLife{worker("a", 1, 1, 30), worker("b", 1, 6, 30), worker("c", 1, 20, 30)},
			[]fault{lost(5)}, ruleLetIn},
		"after a failover": {[]*podLife{worker("a", 1, 5, 20), worker("b", 1, 7, 20)}, []fault{failover}, ""},
		"older than a failover": {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 7, 20)},
			[]fault{failover}, ruleLetIn},
		"after an outage": {[]*podLife{worker("a", 1, 1, 30), worker("b", 1, 20, 30)},
			[]fault{during(fault{away: true}, 5, 19)}, ruleLetIn},
		"a clock that is set": {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 6, 20)},
			[]fault{during(fault{recovering: true}, 5, 5)}, ruleCount},
		"a long silence":  {[]*podLife{worker("a", 1, 1, 20).silent(2, 14), worker("b", 1, 11, 20)}, nil, ""},
		"a short silence": {[]*podLife{worker("a", 1, 1, 20).silent(2, 6), worker("b", 1, 7, 20)}, nil, ruleCount},
		"too early in a silence": {[]*podLife{worker("a", 1, 1, 20).silent(6, 18), worker("b", 1, 8, 20)},
			nil, ruleCount},
		"long after a silence": {[]*podLife{worker("a", 1, 1, 40).silent(2, 14), worker("b", 1, 30, 40)},
			nil, ruleLetIn},
		"the silence of another": {
			[]*podLife{worker("a", 2, 1, 30), worker("b", 2, 2, 9).silent(3, 8), worker("c", 2, 3, 30)},
			nil, ruleCount,
		},
		"a dead pod":            {[]*podLife{worker("a", 1, 1, 0).diesAt(5), worker("b", 1, 14, 20)}, nil, ""},
		"a dead pod, too early": {[]*podLife{worker("a", 1, 1, 0).diesAt(8), worker("b", 1, 10, 20)}, nil, ruleLetIn},
		"in line, and in order": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 10, 20), inLineSince("c", 1, 4, 20, 30)},
			nil, "",
		},
		"in line, and out of order": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), inLineSince("c", 1, 4, 10, 20)},
			nil, ruleOrder,
		},
		"overtaken by a pod that does not wait": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), worker("c", 1, 10, 20)},
			nil, ruleOrder,
		},
		"out of order after a loss": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), inLineSince("c", 1, 4, 10, 20)},
			[]fault{lost(9)}, "",
		},
		"gated, and in order": {
			[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 10, 20), gatedSince("c", 1, 4, 20, 30)},
			nil, "",
		},
		"gated, and out of order": {
			[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 20, 30), gatedSince("c", 1, 4, 10, 20)},
			nil, ruleOrder,
		},
		"gated within a second": {
			[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 20, 30), gatedSince("c", 1, 2, 10, 20)},
			nil, "",
		},
		"gated, before a pod that waits": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), gatedSince("c", 1, 4, 10, 20)},
			nil, ruleOrder,
		},
		"gated, after a clock was set": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), gatedSince("c", 1, 4, 10, 20)},
			[]fault{during(fault{recovering: true}, 1, 1)}, "",
		},
		"lifted without a token": {[]*podLife{worker("a", 1, 1, 20), gatedSince("b", 1, 2, 10, 0).diesAt(11)},
			nil, ruleLifted},
		"lifted late": {[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 13, 20)},
			[]fault{during(fault{blind: true}, 9, 12)}, ""},
		"lifted too late": {[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 22, 30)}, nil, ruleUnused},
		"a stopped gate does not stop all": {[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 22, 30)},
			[]fault{during(fault{unlifted: true}, 9, 18)}, ruleUnused},
		"deleted while it was gated, and in the way": {
			[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 0, 0).deletedAt(5), inLineSince("c", 1, 4, 30, 40)},
			nil, ruleUnused,
		},
		"passed by a greater length": {
			[]*podLife{worker("a", 1, 1, 20), inLineSince("b", 1, 2, 20, 30), worker("c", 2, 10, 20)},
			nil, ruleOrder,
		},
		"helped by a greater length": {
			[]*podLife{worker("a", 1, 1, 20), inLineSince("b", 1, 2, 10, 30), refusedAt("c", 2, 10)},
			nil, "",
		},
		"helped by a greater length of long ago": {
			[]*podLife{worker("a", 1, 1, 60), inLineSince("b", 1, 2, 40, 49), refusedAt("c", 2, 3)},
			nil, ruleLetIn,
		},
		"passed in a silence": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30).silent(8, 12), inLineSince("c", 1, 4, 10, 20)},
			nil, "",
		},
		"a token unused": {[]*podLife{worker("a", 1, 1, 5), inLineSince("b", 1, 2, 20, 30)}, nil, ruleUnused},
		"for ever":       {[]*podLife{worker("a", 1, 1, 5), inLineSince("b", 1, 2, 0, 0)}, nil, ruleUnused},
		"unused while Redis is away": {[]*podLife{worker("a", 1, 1, 5), inLineSince("b", 1, 2, 20, 30)},
			[]fault{during(fault{away: true}, 5, 12)}, ""},
		"the token of a dead pod": {[]*podLife{worker("a", 1, 1, 0).diesAt(5), inLineSince("b", 1, 2, 16, 30)},
			nil, ""},
		"the token of a dead pod stays unused": {
			[]*podLife{worker("a", 1, 1, 0).diesAt(5), inLineSince("b", 1, 2, 30, 35)},
			nil, ruleUnused,
		},
		"a dead pod in line": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 0, 0).diesAt(8), inLineSince("c", 1, 3, 12, 35)},
			nil, "",
		},
		"a dead pod in line, passed too late": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 0, 0).diesAt(8), inLineSince("c", 1, 3, 15, 35)},
			nil, ruleUnused,
		},
		"a dead pod in line, while connections are silent": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 0, 0).diesAt(8), inLineSince("c", 1, 3, 15, 35)},
			[]fault{during(fault{silent: true}, 7, 9)}, "",
		},
		"a dead pod blocks the line": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 0, 0).diesAt(8), inLineSince("c", 1, 3, 0, 0)},
			nil, ruleUnused,
		},
		"refused": {[]*podLife{worker("a", 1, 1, 10), refusedAt("b", 1, 5)}, nil, ""},
		"refused, as others wait": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 3, 10, 20), refusedAt("c", 1, 10)},
			nil, "",
		},
		"refused while a token is free": {[]*podLife{worker("a", 2, 1, 10), refusedAt("b", 2, 5)}, nil, ruleFree},
		"undecided": {[]*podLife{undecided(20), undecided(21), undecided(22), undecided(23)},
			nil, ruleDecided},
		"undecided in an outage": {[]*podLife{undecided(20), undecided(21), undecided(22), undecided(23)},
			[]fault{during(fault{away: true}, 18, 22)}, ""},
		"refused just after an outage": {[]*podLife{worker("a", 2, 1, 10), refusedAt("b", 2, 5)},
			[]fault{during(fault{away: true}, 3, 4)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			h := &history{interval: 2 * time.Second, threshold: 8 * time.Second, end: 50 * time.Second,
				pods: c.pods, faults: c.faults}
			found := check(h).found
			switch {
			case c.rule == "" && len(found) > 0:
				t.Errorf("refused: %s", found[0])
			case c.rule != "" && len(found) == 0:
				t.Errorf("accepted, and it breaks the rule %q", c.rule)
			case c.rule != "" && !slices.ContainsFunc(found, func(v violation) bool { return v.rule == c.rule }):
				t.Errorf("refused by %s, want the rule %q", found[0], c.rule)
			}
		})
	}
}
