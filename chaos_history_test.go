package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// history is what happened in a run, for the checker. All moments are since the start of the run, by one monotonic clock.
type history struct {
	interval, threshold time.Duration
	pods                []*podLife
	faults              []fault
	end                 time.Duration
}

// span is a time from one moment to another.
type span struct{ from, to time.Duration }

func (s span) String() string { return fmt.Sprintf("%.2f-%.2f s", s.from.Seconds(), s.to.Seconds()) }

func (s span) overlaps(other span) bool { return s.from <= other.to && other.from <= s.to }

// notYet is a moment that did not come.
const notYet time.Duration = 0

// unending is the end of what did not end.
const unending = 1000 * time.Hour

// podLife is what became of a pod. What is notYet did not happen.
type podLife struct {
	name      string
	semaphore string
	length    int
	waits     bool // it waits in line where no token is free; else it is refused
	gated     bool // it waits before it is scheduled
	started   time.Duration
	asked     time.Duration // when its admission was asked for
	answered  time.Duration // when that was over
	admitted  bool
	refused   bool          // as all tokens are in use
	failed    bool          // no webhook answered: a token may have been taken for it
	inLine    time.Duration // when it was heard that it stands in line
	lifted    span          // of a gated pod: in which the token was taken for which its gate was lifted
	took      span          // in which its token was taken; zero: it has none. Nobody knows the moment better
	ended     time.Duration // when its work ended, or it was told to end before: from here on its token may be given back
	released  time.Duration // when its sidecar had ended in order
	died      time.Duration // when its sidecar was killed for good
	silences  []span        // in which its sidecar could not beat: it was paused, killed, or cut off
}

// holds reports whether the pod has had a token, and not been told to end, all that time.
func (p *podLife) holds(s span) bool {
	return p.took.to != 0 && p.took.to <= s.from && s.to <= cmp.Or(p.ended, unending)
}

func (p *podLife) works(at time.Duration) bool {
	return p.started != notYet && p.started <= at && at < cmp.Or(p.ended, p.died, unending)
}

// manner is what becomes of the pod where no token is free.
func (p *podLife) manner() string {
	switch {
	case p.gated:
		return "waits gated"
	case p.waits:
		return "waits"
	}
	return "does not wait"
}

// loss is what a fault makes Redis lose.
type loss int

const (
	losesNothing loss = iota
	losesRecent       // what was written just before, and meanwhile
	losesAll
)

// fault is what the nemesis did, or the world did by itself.
type fault struct {
	span
	name       string
	semaphores []string // on which it has its effect; nil: all
	loses      loss     // what happens to their data
	away       bool     // their Redis does not answer
	shaken     bool     // their Redis, afterwards, first has to hear from all
	silent     bool     // commands may be carried out whose answers do not arrive
	unrepaired bool     // most lock servers are away
	unlifted   bool     // a gate is away: tokens may be taken long before the gates of their pods are lifted
	blind      bool     // so it is with all gates, or they do not see the pods
}

func (f fault) hits(semaphore string) bool {
	return f.semaphores == nil || slices.Contains(f.semaphores, semaphore)
}

func (f fault) String() string { return f.span.String() + " " + f.name }

// around tells what happened to a semaphore at about that time.
func (h *history) around(semaphore string, s span) string {
	type line struct {
		at   time.Duration
		text string
	}
	var lines []line
	say := func(at time.Duration, format string, args ...any) {
		if at >= s.from && at <= s.to && at != notYet {
			lines = append(lines, line{at, fmt.Sprintf(format, args...)})
		}
	}
	for _, f := range h.faults {
		if f.hits(semaphore) {
			say(f.from, "fault begins: %s", f.name)
			say(f.to, "fault ends: %s", f.name)
		}
	}
	for _, p := range h.pods {
		if p.semaphore != semaphore {
			continue
		}
		say(p.asked, "%s asks, length %d, %s", p.name, p.length, p.manner())
		say(p.answered, "%s is answered: admitted %t, refused %t, failed %t", p.name, p.admitted, p.refused, p.failed)
		say(p.inLine, "%s is in line", p.name)
		say(p.lifted.to, "the gate of %s is lifted, its token taken within %s", p.name, p.lifted)
		say(p.took.to, "%s has a token, taken within %s", p.name, p.took)
		say(p.started, "%s works", p.name)
		say(p.ended, "%s ends", p.name)
		say(p.released, "%s is gone in order", p.name)
		say(p.died, "%s is killed for good", p.name)
		for _, q := range p.silences {
			say(q.from, "%s falls silent", p.name)
			say(q.to, "%s is back", p.name)
		}
	}
	slices.SortStableFunc(lines, func(a, b line) int { return cmp.Compare(a.at, b.at) })
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "%9.3f %s\n", l.at.Seconds(), l.text)
	}
	return b.String()
}

// String is the whole history.
func (h *history) String() string {
	var b strings.Builder
	names := map[string]bool{}
	for _, p := range h.pods {
		names[p.semaphore] = true
	}
	for name := range names {
		fmt.Fprintf(&b, "%s\n%s\n", name, h.around(name, span{0, unending}))
	}
	return b.String()
}
