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

// waitsFor makes a pod wait for some seconds at most.
func (p *podLife) waitsFor(seconds int, runs bool) *podLife {
	p.wait, p.runs = time.Duration(seconds)*time.Second, runs
	return p
}

// givesUpAt makes a pod give up.
func (p *podLife) givesUpAt(at int) *podLife {
	p.gaveUp = time.Duration(at) * time.Second
	return p.deletedAt(at)
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

func (p *podLife) ahead(seconds int) *podLife {
	p.headStart = time.Duration(seconds) * time.Second
	return p
}

func (p *podLife) needs(tokens int) *podLife {
	p.tokens = tokens
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
		"one runs beyond the length": {[]*podLife{worker("a", 1, 1, 20),
			inLineSince("b", 1, 2, 7, 20).waitsFor(5, true)}, nil, ""},
		"others wait for it": {[]*podLife{inLineSince("b", 1, 2, 7, 20).waitsFor(5, true), worker("a", 1, 9, 20)}, nil,
			ruleLetIn},
		"one gives up": {[]*podLife{worker("a", 1, 1, 20), inLineSince("b", 1, 2, 0, 0).waitsFor(5, false).givesUpAt(7),
			inLineSince("c", 1, 3, 21, 30)}, nil, ""},
		"one gives up too early": {[]*podLife{worker("a", 1, 1, 20),
			inLineSince("b", 1, 2, 0, 0).waitsFor(9, false).givesUpAt(7)}, nil, ruleOver},
		"one gives up, and works": {[]*podLife{worker("a", 1, 1, 6),
			inLineSince("b", 1, 2, 8, 20).waitsFor(5, false).givesUpAt(7)}, nil, ruleGaveUp},
		"two of two, and a third": {[]*podLife{worker("a", 2, 1, 9), worker("b", 2, 2, 9), worker("c", 2, 3, 9)},
			nil, ruleCount},
		"a greater length": {[]*podLife{worker("a", 1, 1, 9), worker("b", 2, 6, 9)}, nil, ""},
		"a smaller length": {[]*podLife{worker("a", 2, 1, 9), worker("b", 1, 6, 9)}, nil, ruleLetIn},
		"after a loss":     {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 6, 20)}, []fault{lost(5)}, ""},
		"after an empty start": {[]*podLife{worker("a", 1, 1, 20), worker("b", 1, 6, 20)},
			[]fault{during(fault{loses: losesByStart, away: true}, 4, 5)}, ruleCount},
		"after an empty start in a silence": {[]*podLife{worker("a", 1, 1, 20).silent(4, 6), worker("b", 1, 6, 20)},
			[]fault{during(fault{loses: losesByStart, away: true}, 4, 5)}, ""},
		"after a death on a node that is cut off later": {
			[]*podLife{worker("a", 1, 1, 9).diesAt(5).silent(40, 44), worker("b", 1, 16, 20)},
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
		"a silence, and a failover to a clock that is ahead": {
			[]*podLife{worker("a", 1, 1, 20).silent(2, 6), worker("b", 1, 7, 20)}, []fault{during(fault{away: true}, 5, 5)}, ""},
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
		"passed with a head start": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), inLineSince("c", 1, 4, 10, 20).ahead(3)},
			nil, "",
		},
		"passed with a short head start": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), inLineSince("c", 1, 4, 10, 20).ahead(1)},
			nil, ruleOrder,
		},
		"in line, and passed though it has a head start": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 4, 20, 30).ahead(5), inLineSince("c", 1, 2, 10, 20)},
			nil, ruleOrder,
		},
		"gated, and passed with a head start": {
			[]*podLife{worker("a", 1, 1, 10), gatedSince("b", 1, 2, 20, 30), gatedSince("c", 1, 4, 10, 20).ahead(4)},
			nil, "",
		},
		"several tokens": {[]*podLife{worker("a", 3, 1, 9).needs(2), worker("b", 3, 6, 9)}, nil, ""},
		"several tokens, and one too many": {[]*podLife{worker("a", 3, 1, 9).needs(2), worker("b", 3, 6, 9).needs(2)},
			nil, ruleCount},
		"passed by a lighter pod": {[]*podLife{worker("a", 3, 1, 10).needs(2), inLineSince("b", 3, 2, 11, 20).needs(2),
			inLineSince("c", 3, 4, 8, 9)}, nil, ruleOrder},
		"passed, as it needs more than the length": {[]*podLife{worker("a", 3, 1, 10).needs(2),
			inLineSince("b", 3, 2, 0, 0).needs(4), inLineSince("c", 3, 4, 8, 9)}, nil, ""},
		"a token is kept for a pod that needs several": {[]*podLife{worker("a", 3, 1, 30).needs(2),
			inLineSince("b", 3, 2, 31, 40).needs(2), inLineSince("c", 3, 4, 31, 40)}, nil, ""},
		"tokens for a pod that needs several stay unused": {[]*podLife{worker("a", 3, 1, 30),
			inLineSince("b", 3, 2, 31, 40).needs(2)}, nil, ruleUnused},
		"overtaken by a pod that does not wait": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), worker("c", 1, 10, 20)},
			nil, ruleOrder,
		},
		"out of order after a loss": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), inLineSince("c", 1, 4, 10, 20)},
			[]fault{lost(9)}, "",
		},
		"out of order long after a loss": {
			[]*podLife{worker("a", 1, 1, 30), inLineSince("b", 1, 2, 40, 50), inLineSince("c", 1, 12, 30, 40)},
			[]fault{lost(9)}, ruleOrder,
		},
		"out of order long after a loss, and a failover before it": {
			[]*podLife{worker("a", 1, 1, 30), inLineSince("b", 1, 2, 40, 50), inLineSince("c", 1, 12, 30, 40)},
			[]fault{during(fault{away: true}, 5, 6), lost(9)}, "",
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
			wantRule(t, h, c.rule)
		})
	}
}

// wantRule checks that a history breaks a rule, perhaps with others; empty: none.
func wantRule(t *testing.T, h *history, rule string) {
	t.Helper()
	found := check(h).found
	switch {
	case rule == "" && len(found) > 0:
		t.Errorf("refused: %s", found[0])
	case rule != "" && len(found) == 0:
		t.Errorf("accepted, and it breaks the rule %q", rule)
	case rule != "" && !slices.ContainsFunc(found, func(v violation) bool { return v.rule == rule }):
		t.Errorf("refused by %s, want the rule %q", found[0], rule)
	}
}

// limitAt returns a limit that is set at a second.
func limitAt(at, length int) setting {
	from := time.Duration(at) * time.Second
	return setting{span: span{from, from + 50*time.Millisecond}, semaphore: "shop/web", kind: kindLimit, length: length,
		sure: true}
}

// overrideAt returns an override that is set at a second, for some seconds.
func overrideAt(at, length, lasts int) setting {
	s := limitAt(at, length)
	s.kind, s.lasts = kindOverride, time.Duration(lasts)*time.Second
	return s
}

// unanswered returns the same setting, without a reply.
func (s setting) unanswered() setting {
	s.to, s.sure = s.from+3*time.Second, false
	return s
}

// seen returns the same setting as a look that finds it.
func (s setting) seen() setting {
	s.look = true
	return s
}

// The checker knows what the owner of a semaphore has set.
func TestChaosCheckerOfSettings(t *testing.T) {
	t.Parallel()
	at := func(second int) span {
		return span{time.Duration(second) * time.Second, time.Duration(second) * time.Second}
	}
	lost := fault{span: at(5), loses: losesAll}
	failover := fault{span: span{6 * time.Second, 7 * time.Second}, loses: losesRecent, away: true}
	emptied := failover
	emptied.emptied = true
	clock := fault{span: at(5), recovering: true}
	two := func(length, from int) []*podLife {
		return []*podLife{worker("a", length, 1, 49), worker("b", length, from, 49)}
	}
	waits := func(to int) []*podLife { return []*podLife{inLineSince("a", 1, 4, to, 45)} }
	for name, c := range map[string]struct {
		pods     []*podLife
		settings []setting
		faults   []fault
		rule     string // the rule that the history breaks, perhaps with others; empty: none
	}{
		"above the limit":         {two(2, 10), []setting{limitAt(5, 1)}, nil, ruleLetIn},
		"too many for the limit":  {two(2, 10), []setting{limitAt(0, 1)}, nil, ruleCount},
		"a limit that allows it":  {two(1, 10), []setting{limitAt(5, 2)}, nil, ""},
		"above a limit that ends": {two(2, 10), []setting{limitAt(5, 1), limitAt(8, unset)}, nil, ""},
		"before the limit":        {two(2, 10), []setting{limitAt(12, 1)}, nil, ""},
		"while the limit is set": {
			two(2, 10),
			[]setting{limitAt(5, 1), {span: span{9 * time.Second, 11 * time.Second}, semaphore: "shop/web",
				kind: kindLimit, length: 2, sure: true}},
			nil, "",
		},
		"as another limit may be set": {
			two(2, 10), []setting{limitAt(5, 1), limitAt(6, 2).unanswered()}, nil, "",
		},
		"as another limit was not set": {
			two(2, 10), []setting{limitAt(5, 1), limitAt(6, 2).unanswered(), limitAt(9, 1).seen()}, nil, ruleLetIn,
		},
		"the limit of another": {
			two(2, 10), []setting{{span: at(5), semaphore: "shop/other", kind: kindLimit, sure: true}}, nil, "",
		},
		"above a limit that Redis lost": {two(2, 6), []setting{limitAt(2, 1)}, []fault{lost}, ""},
		"above a limit that is set again": {
			two(2, 20), []setting{limitAt(2, 1), limitAt(7, 1)}, []fault{lost}, ruleLetIn,
		},
		"a limit that pods remember":   {two(1, 20), []setting{limitAt(1, 2), limitAt(2, 1)}, []fault{lost}, ""},
		"a limit that no pod can know": {two(1, 20), []setting{limitAt(2, 1)}, []fault{lost}, ruleLetIn},
		"just before a failover": {
			two(2, 10), []setting{limitAt(2, 2), limitAt(5, 1)}, []fault{failover}, "",
		},
		"well before a failover": {
			two(2, 10), []setting{limitAt(1, 2), limitAt(3, 1)}, []fault{failover}, ruleLetIn,
		},
		"above an override":              {two(2, 10), []setting{overrideAt(5, 1, 10)}, nil, ruleLetIn},
		"after an override":              {two(2, 16), []setting{overrideAt(5, 1, 10)}, nil, ""},
		"an override precedes the limit": {two(1, 10), []setting{limitAt(5, 1), overrideAt(6, 2, 10)}, nil, ""},
		"after an override, above the limit": {
			two(2, 17), []setting{limitAt(5, 1), overrideAt(6, 2, 10)}, nil, ruleLetIn,
		},
		"as a clock is set": {two(2, 10), []setting{overrideAt(3, 1, 10)}, []fault{clock}, ""},
		"as a clock is set, and an owner looks": {
			two(2, 10), []setting{overrideAt(3, 1, 10), overrideAt(7, 1, 10).seen()},
			[]fault{clock}, ruleLetIn},
		"a clock is set, and an override lives again": {
			nil, []setting{overrideAt(2, 0, 1), overrideAt(4, unset, 0).seen(), overrideAt(6, 0, 9).seen()},
			[]fault{clock}, "",
		},
		"started in a pause": {[]*podLife{worker("a", 1, 10, 20)}, []setting{overrideAt(5, 0, 10)}, nil, ruleLetIn},
		"lifted in a pause": {[]*podLife{gatedSince("a", 1, 4, 10, 20)}, []setting{overrideAt(2, 0, 10)}, nil,
			ruleLifted},
		"works on in a pause": {
			[]*podLife{worker("a", 1, 1, 20)}, []setting{overrideAt(5, 0, 10)}, nil, "",
		},
		"in line in a pause":              {waits(31), []setting{overrideAt(2, 0, 28)}, nil, ""},
		"in line after a pause, too long": {waits(36), []setting{overrideAt(2, 0, 28)}, nil, ruleUnused},
		"in line after a pause that is cleared": {
			waits(35), []setting{limitAt(2, 0), limitAt(30, unset)}, nil, "",
		},
		"in line after a pause, too long after that": {
			waits(39), []setting{limitAt(2, 0), limitAt(30, unset)}, nil, ruleUnused,
		},
		"in line after a pause, with a silence": {waits(36), []setting{overrideAt(2, 0, 28)},
			[]fault{{span: at(29), silent: true}}, ""},
		"in line, as a limit may be 0": {waits(40), []setting{limitAt(2, 0).unanswered()}, nil, ""},
		"in line below a greater limit": {[]*podLife{worker("a", 1, 1, 49), inLineSince("b", 1, 4, 40, 45)},
			[]setting{limitAt(10, 2)}, nil, ruleUnused},
		"out of order below a limit": {
			[]*podLife{worker("a", 1, 1, 10), inLineSince("b", 1, 2, 20, 30), inLineSince("c", 1, 4, 10, 20)},
			[]setting{limitAt(0, 1)}, nil, ruleOrder,
		},
		"refused in a pause": {[]*podLife{refusedAt("a", 1, 10)}, []setting{overrideAt(5, 0, 10)}, nil, ""},
		"refused after a pause": {
			[]*podLife{refusedAt("a", 1, 20)}, []setting{overrideAt(5, 0, 10)}, nil, ruleFree,
		},
		"refused below a limit": {
			[]*podLife{worker("a", 1, 1, 49), refusedAt("b", 1, 10)}, []setting{limitAt(5, 2)}, nil, ruleFree,
		},
		"a limit stays":              {nil, []setting{limitAt(5, 1), limitAt(6, 1).seen()}, nil, ""},
		"a limit vanishes":           {nil, []setting{limitAt(5, 1), limitAt(6, unset).seen()}, nil, ruleStays},
		"a limit vanishes in a loss": {nil, []setting{limitAt(2, 1), limitAt(6, unset).seen()}, []fault{lost}, ""},
		"a limit vanishes from an empty server": {
			nil, []setting{limitAt(2, 1), limitAt(6, unset).seen()}, []fault{emptied}, "",
		},
		"an empty server with a limit": {
			nil, []setting{limitAt(2, 1), limitAt(6, 3).seen()}, []fault{emptied}, ruleStays,
		},
		"a limit vanishes after an empty server": {
			nil, []setting{limitAt(2, 1), limitAt(8, unset).seen()}, []fault{emptied}, ruleStays,
		},
		"an override ends": {nil, []setting{overrideAt(5, 1, 10), overrideAt(16, unset, 0).seen()}, nil, ""},
		"an override ends too early": {
			nil, []setting{overrideAt(5, 1, 10), overrideAt(14, unset, 0).seen()}, nil, ruleStays,
		},
		"an override does not end": {
			nil, []setting{overrideAt(5, 1, 10), overrideAt(16, 1, 4).seen()}, nil, ruleStays,
		},
	} {
		t.Run(name, func(t *testing.T) {
			pods := append(c.pods, refusedAt("asks first", 0, 0)) // a semaphore has a pod
			wantRule(t, &history{interval: 2 * time.Second, threshold: 8 * time.Second, end: 50 * time.Second,
				pods: pods, faults: c.faults, settings: c.settings}, c.rule)
		})
	}
}

// The checker knows what an owner saw of the line, and what processes logged.
func TestChaosCheckerOfPauses(t *testing.T) {
	t.Parallel()
	const at = 20 * time.Second
	pods := func() []*podLife { return []*podLife{inLineSince("a", 1, 4, 0, 0), inLineSince("b", 1, 5, 31, 40)} }
	away := []fault{{span: span{15 * time.Second, 16 * time.Second}, away: true}}
	both, one := []string{"a", "b"}, []string{"b"}
	for name, c := range map[string]struct {
		pods     []*podLife
		line     []string
		settings []setting
		faults   []fault
		logs     bool
		rule     string
	}{
		"all are in line":               {pods(), both, []setting{limitAt(1, 0)}, nil, false, ""},
		"a pod is dropped":              {pods(), one, []setting{limitAt(1, 0)}, nil, false, rulePlaces},
		"a pod is dropped by an outage": {pods(), one, []setting{limitAt(1, 0)}, away, false, ""},
		"a pod that died is dropped": {[]*podLife{inLineSince("a", 1, 4, 0, 0).diesAt(6), pods()[1]}, one,
			[]setting{limitAt(1, 0)}, nil, false, ""},
		"a process warns":                 {pods(), both, []setting{limitAt(1, 0)}, nil, true, rulePause},
		"a process warns of an outage":    {pods(), both, []setting{limitAt(1, 0)}, away, true, ""},
		"a process warns without a pause": {nil, nil, []setting{limitAt(1, 1)}, nil, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			all := append(c.pods, refusedAt("asks first", 0, 0))
			if len(c.pods) > 0 { // they start after the pause
				c.settings = append(c.settings, limitAt(30, unset))
				c.pods[0].ended = 29 * time.Second
			}
			h := &history{interval: 2 * time.Second, threshold: 8 * time.Second, end: 50 * time.Second, pods: all,
				faults: c.faults, settings: c.settings, lines: []sighting{{span{at, at}, "shop/web", c.line}}}
			if c.logs {
				h.warnings = []warning{{at, "shop/web", "no token yet"}}
			}
			wantRule(t, h, c.rule)
		})
	}
}
