package model

import (
	"strconv"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// actor is a process of a pod that asks for a token, or has one.
type actor struct {
	token     string
	length    int
	stands    bool // asks as one who waits in line, not for an admission
	waiting   bool // in line, as far as it knows
	holding   bool // a token, as far as it knows
	kept      bool // another process stands for it, which keeps its place and asks
	silent    bool // paused or killed: does nothing, but may wake up
	reachable bool // hears when it is called
	arrival   int  // that it was told, by Redis's clock (Unix microseconds); 0: none yet
	pace      int  // seconds between two questions
	due       int  // when it asks or beats next
	since     int  // when it took its token
	missed    bool // has not been heard since Redis was last away, or its clock was set
}

// pod is what p tells of its pod.
func (p *actor) pod() string { return p.token + " node" }

// alive reports whether it does in time what it has to do.
func (p *actor) alive() bool { return !p.silent && (p.waiting || p.holding) }

// arrivalOf is what p tells when it asks now.
func (p *actor) arrivalOf() string {
	switch {
	case !p.stands:
		return ""
	case p.arrival == 0 || p.kept:
		return joinLine
	}
	return strconv.Itoa(p.arrival)
}

func (w *world) drawLength() int {
	if rapid.IntRange(0, 2).Draw(w.t, "another length") == 2 {
		return rapid.IntRange(1, 4).Draw(w.t, "its length")
	}
	return w.length
}

func (w *world) newPod() *actor {
	p := &actor{token: "p" + strconv.Itoa(len(w.order)+1), length: w.drawLength()}
	w.pods[p.token] = p
	w.order = append(w.order, p)
	return p
}

// pick draws one of the pods that are so.
func (w *world) pick(are func(*actor) bool) *actor {
	var some []*actor
	for _, p := range w.order {
		if are(p) {
			some = append(some, p)
		}
	}
	if len(some) == 0 {
		w.t.SkipNow()
	}
	return some[rapid.IntRange(0, len(some)-1).Draw(w.t, "which")]
}

func anyPod(*actor) bool { return true }

// act is what p does when it is its time.
func (w *world) act(p *actor) {
	p.missed = false
	if p.holding {
		w.beat(p)
		p.due = w.now + w.interval
		return
	}
	w.answered(p, w.try(p))
}

// takes is for p, which knows now that it has its token.
func (w *world) takes(p *actor) {
	p.waiting, p.holding, p.since, p.due = false, true, w.now, w.now+w.interval
}

// answered is for an answer that p reads.
func (w *world) answered(p *actor, a rig.Acquired) {
	if a.Status == rig.AcquireTaken {
		w.takes(p)
		return
	}
	p.waiting, p.due = true, w.now+p.pace
	at, err := strconv.Atoi(a.Arrival)
	rig.Must(w.test, err)
	p.arrival = at
}

// live lets time pass in which those that are alive do what they do.
func (w *world) live(seconds int) {
	for end := w.now + seconds; ; {
		var next *actor
		for _, p := range w.order {
			if p.alive() && p.due <= end && (next == nil || p.due < next.due) {
				next = p
			}
		}
		if next == nil {
			w.pass(end - w.now)
			return
		}
		w.pass(next.due - w.now)
		w.act(next)
	}
}

// calm lets all that are alive be heard again after the last time that Redis was away.
func (w *world) calm() {
	latest := w.now
	for _, p := range w.order {
		if p.alive() && p.missed {
			latest = max(latest, p.due)
		}
	}
	w.live(latest - w.now)
	for _, p := range w.order {
		p.missed = p.alive()
	}
}
