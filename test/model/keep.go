package model

import (
	"maps"
	"slices"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// playHold refreshes the tokens of all pods in one command. Its process does not know
// which tokens were given back or reclaimed.
func (w *world) playHold() {
	var tokens []any
	var want []string
	for _, p := range w.order {
		tokens = append(tokens, p.token, p.tokens)
	}
	w.arrive(w.settings[0])
	_, rest, d := w.command(w.scripts.hold, tokens...)
	for _, p := range w.order {
		if _, held := w.expected.holders[p.token]; held {
			w.expected.holders[p.token] = w.now
		} else {
			want = append(want, p.token)
		}
	}
	var lost []string
	_, err := redis.Scan(rest, &lost)
	rig.Must(w.test, err)
	if !slices.Equal(lost, want) {
		w.fail("hold answered that %v are lost, want %v", lost, want)
	}
	for _, p := range w.order {
		if at, ok := d.inflight[p.token]; ok && at < int(w.second)-1 {
			w.fail("%s is held, and its last heartbeat was %d s ago", p.token, int(w.second)-at)
		}
	}
	if d.free != w.last.free {
		w.fail("hold made %d free tokens %d", w.last.free, d.free)
	}
	w.check(d, false)
	w.last = d
	w.logf("all tokens are held: %d in flight", d.used)
}

// playKeep refreshes the places of all pods in line, and of all that have got a token
// since. It may add a pod that came long ago, and may name a pod that is gone.
func (w *world) playKeep() {
	var gone []*actor
	if len(w.order) > 0 && rapid.Bool().Draw(w.t, "one is gone") {
		gone = append(gone, w.pick(anyPod))
	}
	w.arrive(w.settings[0])
	var stay []*actor
	places := map[string]int{}
	for _, p := range w.order {
		at, inLine := w.expected.line[p.token]
		if _, held := w.expected.holders[p.token]; (inLine || held) && !slices.Contains(gone, p) {
			if !inLine {
				at = 1
			}
			later := rapid.SampledFrom([]int{0, 0, 1e6}).Draw(w.t, "microseconds later than its place")
			stay, places[p.token] = append(stay, p), at+later
		}
	}
	if rapid.Bool().Draw(w.t, "a new one") {
		p := w.newPod()
		p.isWaiter, p.kept, p.waiting, p.pace, p.due = true, true, true, pollMost, w.now+pollMost
		w.drawWait(p)
		w.drawTokens(p)
		age := rapid.SampledFrom([]int{0, 10, 1000}).Draw(w.t, "seconds old")
		p.arrival = (int(w.second)-age)*1e6 + len(w.order)
		p.ahead = p.headStart * 1e6
		stay, places[p.token] = append(stay, p), p.place()
	}
	w.keep(gone, stay, places)
}

// keep refreshes the places of the pods that stay, and removes the pods that are gone
// from the line. Call arrive before.
func (w *world) keep(gone, stay []*actor, places map[string]int) {
	args := []any{0, len(gone)}
	for _, p := range gone {
		args = append(args, p.token)
	}
	for _, p := range stay {
		ahead := p.headStart * 1e6
		args = append(args, p.token, places[p.token]+ahead, p.wish(), p.waitingPod(), ahead)
	}
	k := w.expected
	if len(stay) > 0 {
		clockSet, most := k.clockSet, 0
		for _, p := range stay {
			most = max(most, p.length)
		}
		w.note(most)
		k.clockSet = clockSet
	}
	_, rest, d := w.command(w.scripts.keep, args...)
	for _, p := range gone {
		if _, ok := k.line[p.token]; ok {
			p.waiting = false
		}
		k.leave(p.token)
	}
	var held []string
	for _, p := range stay {
		if _, ok := k.holders[p.token]; ok {
			held = append(held, p.token)
			continue
		}
		at, ok := k.line[p.token]
		if !ok && k.lentTo >= places[p.token] {
			k.lentTo = places[p.token] - 1 // it was not in line when a caller lent its length
		}
		if !ok || places[p.token] < at {
			k.line[p.token] = places[p.token]
		}
		k.asked[p.token], k.askedAt[p.token] = w.now, w.micros()
		delete(k.heardIn, p.token)
	}
	w.check(d, false)
	w.checkKept(rest, d, held)
	if len(gone) > 0 {
		w.checkCalled(d)
	}
	if d.free != w.last.free || !maps.Equal(d.inflight, w.last.inflight) && len(d.inflight) != len(w.last.inflight) {
		w.fail("keep changed the holders of tokens")
	}
	w.last = d
	w.logf("places were kept: %d in flight, %d free, line %v", d.used, d.free, k.inLine())
}

// checkKept compares the reply of keep with the state.
func (w *world) checkKept(rest []any, d dump, wantHeld []string) {
	var created, inUse, waiters, length, doubt int
	var served, held []string
	var joined, holders, set []any
	_, err := redis.Scan(rest, &created, &served, &held, &joined, &inUse, &waiters, &length, &doubt, &holders, &set)
	rig.Must(w.test, err)
	if inUse != d.used || waiters != len(d.waiters) || !slices.Equal(held, wantHeld) ||
		created != d.state["created"] {
		w.fail("keep answered created %d, %d in use, %d waiters, held %v; want %d, %d, %d, %v",
			created, inUse, waiters, held, d.state["created"], d.used, len(d.waiters), wantHeld)
	}
	unsettled := int(w.second)-max(d.state["resumed"], d.state["lost"]) <= w.quiet
	if want := w.setting(); !slices.Equal(numbers(set), want) {
		w.fail("keep answered the setting %v, want %v", set, want)
	}
	if want := d.free == 0 && inUse < w.lengthFor(d.state["length"]) && unsettled; want != (doubt > 0) {
		w.fail("keep answered a doubt of %d s", doubt)
	}
	if want := w.served(d); !slices.Equal(served, want) {
		w.fail("keep answered that a token is free for %v, want %v", served, want)
	}
}
