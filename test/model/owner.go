package model

import (
	"slices"
	"strconv"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// text returns the limit as the scripts take it.
func (l limit) text() string {
	if !l.isSet {
		return ""
	}
	return strconv.Itoa(l.length)
}

// playSet sets or clears a limit, or an override.
func (w *world) playSet() {
	w.arrive(w.settings[0])
	k, length, seconds := w.expected, "", 0
	what := rapid.SampledFrom([]string{"limit", "override"}).Draw(w.t, "what")
	n := rapid.IntRange(-1, 5).Draw(w.t, "length or none")
	if n >= 0 {
		length = strconv.Itoa(n)
		seconds = rapid.SampledFrom([]int{1, 3, 30, 600, 100000}).Draw(w.t, "seconds")
	}
	k.clockSet = false
	switch {
	case what == "limit":
		k.limit = limit{known: true, isSet: n >= 0, length: max(0, n)}
	case n < 0:
		k.override = override{}
	default:
		k.override = override{n, int(w.second) + seconds}
	}
	overtake := rapid.SampledFrom([]int{0, 10, 600}).Draw(w.t, "overtake")
	_, _, d := w.command(w.scripts.set, what, length, seconds, "a note", "somebody", overtake)
	if what == "override" && n >= 0 { // a new second may have begun
		k.override = override{n, int(w.second) + seconds}
	}
	w.check(d, false)
	w.checkRoom(d)
	w.checkCalled(d)
	set, ok := k.set(int(w.second))
	if total := d.free + d.used; ok && len(k.line) > 0 && w.settled() && total < min(set, portion) {
		w.fail("%d were set, and %d tokens are there for the line", set, total)
	}
	w.last = d
	w.logf("%s is set to %q for %d s: %d in flight, %d free, line %v", what, length, seconds,
		d.used, d.free, k.inLine())
}

// playFirst moves a waiter to the front of the line.
func (w *world) playFirst() {
	p := w.pick(anyPod)
	w.arrive(w.settings[0])
	k := w.expected
	k.clockSet = false
	status, _, d := w.command(w.scripts.set, "first", p.token, 0, "", "")
	line := k.inLine()
	if _, ok := k.line[p.token]; ok != (status == 1) {
		w.fail("first answered %d, and %s is in line: %t", status, p.token, ok)
	} else if ok && line[0] != p.token {
		k.joined = max(k.joined, k.line[p.token]+w.last.aheads[p.token])
		k.line[p.token] = k.line[line[0]] - 1
	}
	w.check(d, false)
	w.checkRoom(d)
	w.checkCalled(d)
	w.last = d
	w.logf("%s is to be first: %d in flight, %d free, line %v", p.token, d.used, d.free, k.inLine())
}

// setting returns what the scripts must say of what is set.
func (w *world) setting() (list []int) {
	const none, unknown = -1, -2
	k, known := w.expected, unknown
	if k.limit.isSet {
		known = k.limit.length
	} else if k.limit.known {
		known = none
	}
	switch {
	case k.override.ends > int(w.second):
		return []int{known, k.override.length, k.override.ends}
	case known != unknown:
		return []int{known}
	}
	return nil
}

// numbers returns the numbers of what a script says of what is set, without the note.
func numbers(set []any) (list []int) {
	for _, one := range set {
		if n, ok := one.(int64); ok {
			list = append(list, int(n))
		}
	}
	return list
}

// checkSetting checks what a request of p was told of what is set. p learns the limit.
func (w *world) checkSetting(p *actor, a rig.Acquired) {
	if a.Status != rig.AcquireFull && a.Status != rig.AcquireGaveUp {
		return
	}
	if got, want := numbers(a.Setting), w.setting(); !slices.Equal(got, want) {
		w.fail("%s was told that %v is set, not %v", p.token, got, want)
	}
	if w.expected.limit.known {
		p.limit = w.expected.limit
	}
}
