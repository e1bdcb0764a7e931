package model

import (
	"cmp"
	"maps"
	"slices"
)

// knowledge is what Redis has to know, with all times in seconds of the model's time. It is lost and rolled back with Redis's data.
type knowledge struct {
	holders  map[string]int // those that count as holders -> their last heartbeat
	line     map[string]int // those in line -> their arrival
	asked    map[string]int // those in line -> when they asked last
	born     int            // when its data began, by Redis's clock (Unix seconds); 0: it is known to have lost data
	touched  int            // the last command, by Redis's clock
	resumed  int            // the same by Redis's clock
	shaken   int            // the same; also where Redis's clock was set by so little that it cannot notice, the first question since
	told     int            // when a loss of data was told
	clockSet bool           // since the last question or repair
	greatest []asking       // the lengths that were asked for
}

// asking is that somebody asked for a length, when by Redis's clock.
type asking struct{ at, length int }

const never = -1 << 30

func newKnowledge() *knowledge {
	return &knowledge{holders: map[string]int{}, line: map[string]int{}, asked: map[string]int{}, touched: never, resumed: never, shaken: never, told: never}
}

func (k *knowledge) clone() *knowledge {
	c := *k
	c.holders, c.line, c.asked, c.greatest = maps.Clone(k.holders), maps.Clone(k.line), maps.Clone(k.asked), slices.Clone(k.greatest)
	return &c
}

// inLine are those in line, the first first.
func (k *knowledge) inLine() []string {
	return slices.SortedFunc(maps.Keys(k.line), func(a, b string) int {
		return cmp.Or(cmp.Compare(k.line[a], k.line[b]), cmp.Compare(a, b))
	})
}

// greatestLength is the greatest length that was asked for lately.
func (k *knowledge) greatestLength() int {
	greatest := 0
	for _, a := range k.greatest {
		if a.at >= k.greatest[len(k.greatest)-1].at-300 {
			greatest = max(greatest, a.length)
		}
	}
	return greatest
}

// The rules that follow are what the README and docs/ say, and know nothing of how scripts do it.

// patience is after how long a waiter that does not ask is gone.
const patience = 14

// lineQuiet is within how long some command comes while waiters live.
const lineQuiet = 5

// joinLine is the arrival of a waiter that joins the line now.
const joinLine = "0"

// settled reports whether holders and waiters have had the time to come back since Redis was away, its clock set, or data lost.
func (w *world) settled() bool { return w.now-w.known.shaken > w.quiet }

// stale reports whether a holder must count as dead.
func (w *world) stale(token string) bool {
	return w.settled() && w.now-max(w.known.holders[token], w.known.shaken) > w.threshold
}

// mayBeStale reports whether a holder may count as dead: it has been silent for the threshold, by the clock that Redis had meanwhile.
func (w *world) mayBeStale(token string) bool {
	beat := w.known.holders[token]
	return w.now-beat > w.threshold || beat <= w.known.shaken
}

// keepsPlace reports whether one in line must not lose its place.
func (w *world) keepsPlace(token string) bool {
	p := w.pods[token]
	return p.waiting && p.alive()
}

// mayBeGone reports whether one in line may be dropped; gone, whether it must not keep others from what is free any more.
func (w *world) mayBeGone(token string) bool {
	return w.now-w.known.asked[token] > patience || w.known.asked[token] <= w.known.shaken
}

func (w *world) gone(token string) bool {
	return w.now-max(w.known.asked[token], w.known.shaken) > patience
}

// ahead are those in line before p, if it asks with that arrival.
func (w *world) ahead(p *actor, arrival string) []string {
	line := w.known.inLine()
	if i := slices.Index(line, p.token); i >= 0 {
		return line[:i]
	}
	if arrival != "" && arrival != joinLine {
		i, _ := slices.BinarySearchFunc(line, p.arrival, func(token string, at int) int { return cmp.Compare(w.known.line[token], at) })
		return line[:i]
	}
	return line
}

// entitled returns how many of those get a token of the free ones in their turn, where so many are in use.
func (w *world) entitled(tokens []string, used int, counts func(string) bool) (n int) {
	for _, token := range tokens {
		if counts(token) && w.pods[token].length > used+n {
			n++
		}
	}
	return n
}

// mustGet reports whether p, which asks, must get a token at once, or after one repair.
func (w *world) mustGet(p *actor, arrival string) bool {
	used, free := len(w.known.holders), w.last.free
	ahead := w.ahead(p, arrival)
	present := func(token string) bool { return !w.gone(token) }
	first := w.entitled(ahead, used, present)
	if free > first && used+first < p.length {
		return true
	}
	newcomer := arrival == "" || arrival == joinLine
	if newcomer && free == 0 && first == 0 && used < p.length && w.now-w.known.told > w.quiet {
		return true // it cannot know that holders may be about to come back
	}
	for token := range w.known.holders {
		if w.stale(token) {
			used--
		}
	}
	return w.settled() && used < p.length && w.entitled(ahead, used, present) == 0
}

// checkTake is for a token that p has just taken; before is what was there then.
func (w *world) checkTake(p *actor, arrival string) {
	used := len(w.known.holders)
	if used >= p.length {
		w.fail("%s was admitted with %d in flight of its length %d", p.token, used, p.length)
	}
	if w.last.free == 0 {
		w.fail("%s took a token where none was free", p.token)
	}
	first := w.entitled(w.ahead(p, arrival), used, w.keepsPlace)
	if w.last.free <= first || used+first >= p.length {
		w.fail("%s overtook %d live waiters", p.token, first)
	}
}

// checkReclaimed is for a holder that a repair has reclaimed.
func (w *world) checkReclaimed(token string) {
	if w.pods[token].alive() {
		w.fail("live holder %s was reclaimed", token)
	}
	if !w.mayBeStale(token) {
		w.fail("holder %s was reclaimed %d s after its heartbeat", token, w.now-w.known.holders[token])
	}
}

// checkDropped is for one that was in line and is not there any more.
func (w *world) checkDropped(token string) {
	if w.keepsPlace(token) {
		w.fail("live waiter %s was dropped from the line", token)
	}
	if !w.mayBeGone(token) {
		w.fail("waiter %s was dropped from the line %d s after it asked", token, w.now-w.known.asked[token])
	}
}

// checkCalled sees to it that those for whom a token is free have been called, if they can hear it.
func (w *world) checkCalled(d dump) {
	if !w.listening || d.free == 0 || len(w.known.line) == 0 {
		return
	}
	called := w.hear("PING")
	free, used := d.free, len(d.inflight)
	for _, token := range w.known.inLine() {
		p := w.pods[token]
		if free == 0 {
			return
		}
		if used >= p.length {
			continue
		}
		if p.reachable && !called[w.id.Channel(token)] {
			w.fail("%s is in line, a token is free for it, and it was not called", token)
		}
		free, used = free-1, used+1
	}
}

// checkRoom sees to it that what is free can be used.
func (w *world) checkRoom(d dump) {
	if greatest := w.known.greatestLength(); greatest > 0 && d.free > max(0, greatest-len(d.inflight)) {
		w.fail("%d free and %d in flight, where at most %d were asked for", d.free, len(d.inflight), greatest)
	}
}

// checkReclaims is for p that asked, and got nothing: what dead holders had and it could use has been reclaimed.
func (w *world) checkReclaims(p *actor) {
	dead := 0
	for token := range w.known.holders {
		if w.stale(token) {
			dead++
		}
	}
	if dead > 0 && len(w.known.holders)-dead < p.length {
		w.fail("%s asked, and %d dead holders were not reclaimed", p.token, dead)
	}
}

// check compares what Redis holds now with what it has to know, and with the rules that always hold.
func (w *world) check(d dump, reclaims bool) {
	for _, token := range slices.Sorted(maps.Keys(w.known.holders)) {
		if _, ok := d.inflight[token]; ok {
			continue
		}
		if !reclaims {
			w.fail("holder %s is not in flight any more", token)
		}
		w.checkReclaimed(token)
		delete(w.known.holders, token)
	}
	for _, token := range slices.Sorted(maps.Keys(d.inflight)) {
		if _, ok := w.known.holders[token]; !ok {
			w.fail("%s is in flight and should not be", token)
		}
		if _, ok := d.waiters[token]; ok {
			w.fail("%s is in flight and in line", token)
		}
	}
	for _, token := range w.known.inLine() {
		if _, ok := d.waiters[token]; !ok {
			w.checkDropped(token)
			delete(w.known.line, token)
			delete(w.known.asked, token)
		}
	}
	if !maps.Equal(d.waiters, w.known.line) {
		w.fail("the places in line are not those that waiters were told")
	}
	for _, token := range w.known.inLine() {
		_, seen := d.seen[token]
		if !seen || d.lengths[token] != w.pods[token].length {
			w.fail("%s is in line, and when it asked, and its length, is not known", token)
		}
	}
	if len(d.seen) != len(d.waiters) || len(d.lengths) != len(d.waiters) {
		w.fail("more is known of waiters than wait")
	}
	for token, since := range d.since {
		_, held := d.inflight[token]
		if _, waits := d.waiters[token]; held == waits || held != (since > 0) || d.pods[token] != w.pods[token].pod() {
			w.fail("%s has pod %q since %d", token, d.pods[token], since)
		}
	}
	if len(d.since) != len(d.inflight)+len(d.waiters) {
		w.fail("%d pods are known, and %d tokens in use or waited for", len(d.since), len(d.inflight)+len(d.waiters))
	}
	for i, at := range d.expiry {
		if at == -1 {
			w.fail("key %d does not expire", i+1)
		}
	}
}
