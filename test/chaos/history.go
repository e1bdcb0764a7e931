package chaos

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// history records a run for the checker. All times are since the start of the run, by one
// monotonic clock.
type history struct {
	interval, threshold time.Duration
	pods                []*podLife
	faults              []fault
	settings            []setting  // of one semaphore in their order
	lines               []sighting // what owners saw of the lines
	warnings            []warning
	end                 time.Duration
}

// span is a time from one moment to another.
type span struct{ from, to time.Duration }

func (s span) String() string { return fmt.Sprintf("%.2f-%.2f s", s.from.Seconds(), s.to.Seconds()) }

func (s span) overlaps(other span) bool { return s.from <= other.to && other.from <= s.to }

// notYet is the time of an event that has not happened.
const notYet time.Duration = 0

// unending is the end of a span that has not ended.
const unending = 1000 * time.Hour

// podLife is the history of a pod.
type podLife struct {
	name      string
	semaphore string
	length    int
	limit     int  // the greatest length that may have counted when it got its token
	waits     bool // if no token is free: true: it waits in line; false: the webhook refuses it
	gated     bool // it waits unscheduled
	tokens    int  // that it needs
	headStart time.Duration
	wait      time.Duration // in line; then it gives up, or runs; zero: for ever
	runs      bool          // it may then take a token beyond the length
	gaveUp    time.Duration // when this test learned that it gave up
	started   time.Duration
	asked     time.Duration // when the API server asked for its admission
	answered  time.Duration // when a webhook answered, or failed to
	admitted  bool
	refused   bool          // all tokens were in use
	failed    bool          // no webhook answered: a token may have been taken for it
	inLine    time.Duration // when this test learned that it is in line
	lifted    span          // of a gated pod: the span in which a gate took the token, then lifted the scheduling gate
	took      span          // the span in which it got its token; zero: it has none
	ended     time.Duration // when its work ended, or the signal to end came: its sidecar may give the token back
	released  time.Duration // when its sidecar had ended normally
	died      time.Duration // when its sidecar was killed for good
	silences  []span        // when its sidecar could send no heartbeat: paused, killed or cut off
}

// holds reports whether the pod had a token during all of s, without a signal to end.
func (p *podLife) holds(s span) bool {
	return p.took.to != 0 && p.took.to <= s.from && s.to <= cmp.Or(p.ended, unending)
}

func (p *podLife) works(at time.Duration) bool {
	return p.started != notYet && p.started <= at && at < cmp.Or(p.ended, p.died, unending)
}

// whenWaited is what the pod does when its time in line is over, as an annotation.
func (p *podLife) whenWaited() string {
	if p.runs {
		return "run"
	}
	return "fail"
}

// manner names what the pod does if no token is free.
func (p *podLife) manner() string {
	text := "does not wait"
	switch {
	case p.gated:
		text = "waits gated"
	case p.waits:
		text = "waits"
	}
	if p.tokens > 1 {
		text += fmt.Sprintf(" for %d tokens", p.tokens)
	}
	switch {
	case p.wait == 0:
		return text
	case p.runs:
		return fmt.Sprintf("%s for %s, then runs", text, p.wait)
	}
	return fmt.Sprintf("%s for %s, then gives up", text, p.wait)
}

// loss is the data that Redis loses by a fault.
type loss int

const (
	losesNothing loss = iota
	losesRecent       // the writes shortly before the fault and during it
	losesAll
	losesByStart // all, as an empty server starts: it admits no pod until the holders are back
)

// fault is a blow of the nemesis.
type fault struct {
	span
	name       string
	semaphores []string // the affected semaphores; nil: all
	loses      loss     // the lost data of these semaphores
	emptied    bool     // an empty server served them, until a replica took over
	away       bool     // their Redis does not answer
	recovering bool     // afterwards, their Redis needs a command from each pod first
	silent     bool     // Redis may run commands whose replies do not arrive
	unrepaired bool     // most lock servers are away
	unlifted   bool     // a gate is away: it may take a token long before it lifts the pod's scheduling gate
	outdated   bool     // a gate does not see what becomes of the pods
	blind      bool     // all gates are away or do not see the pods
}

func (f fault) hits(semaphore string) bool {
	return f.semaphores == nil || slices.Contains(f.semaphores, semaphore)
}

func (f fault) String() string { return f.span.String() + " " + f.name }

// around formats the history of a semaphore within a span.
func (h *history) around(semaphore string, s span) string {
	type line struct {
		at   time.Duration
		text string
	}
	var lines []line
	add := func(at time.Duration, format string, args ...any) {
		if at >= s.from && at <= s.to && at != notYet {
			lines = append(lines, line{at, fmt.Sprintf(format, args...)})
		}
	}
	for _, f := range h.faults {
		if f.hits(semaphore) {
			add(f.from, "fault begins: %s", f.name)
			add(f.to, "fault ends: %s", f.name)
		}
	}
	last := map[string]setting{} // by kind
	for _, s := range h.settings {
		if s.semaphore != semaphore {
			continue
		}
		switch {
		case !s.look:
			add(s.from, "the owner sets %s", s)
			add(s.to, "that is over: answered %t", s.sure)
		case s.length != last[s.kind].length:
			add(s.to, "Redis has %s", s)
		}
		last[s.kind] = s
	}
	for _, w := range h.warnings {
		if w.semaphore == semaphore {
			add(w.at, "a process logs %s", strings.TrimSpace(w.text))
		}
	}
	for _, p := range h.pods {
		if p.semaphore != semaphore {
			continue
		}
		add(p.asked, "%s asks, length %d, %s", p.name, p.length, p.manner())
		add(p.answered, "%s is answered: admitted %t, refused %t, failed %t", p.name, p.admitted, p.refused, p.failed)
		add(p.inLine, "%s is in line", p.name)
		add(p.gaveUp, "%s has given up", p.name)
		add(p.lifted.to, "the gate of %s is lifted, its token taken within %s", p.name, p.lifted)
		add(p.took.to, "%s has a token, taken within %s", p.name, p.took)
		add(p.started, "%s works", p.name)
		add(p.ended, "%s ends", p.name)
		add(p.released, "%s is gone in order", p.name)
		add(p.died, "%s is killed for good", p.name)
		for _, q := range p.silences {
			add(q.from, "%s falls silent", p.name)
			add(q.to, "%s is back", p.name)
		}
	}
	slices.SortStableFunc(lines, func(a, b line) int { return cmp.Compare(a.at, b.at) })
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "%9.3f %s\n", l.at.Seconds(), l.text)
	}
	return b.String()
}

// String formats the whole history.
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
