package model

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// knowledge is what Redis must know of the semaphore. If Redis loses data or rolls back,
// so does knowledge. Times are in seconds of the model's time, or by Redis's clock (Unix
// seconds).
type knowledge struct {
	holders      map[string]int // token that counts as in use -> its last heartbeat
	line         map[string]int // token in line -> its arrival
	asked        map[string]int // token in line -> its last request
	born         int            // when the data began, by Redis's clock; 0: Redis knows that it has lost data
	touched      int            // the last command, by Redis's clock
	resumed      int            // the end of the last silence that Redis notices, by its clock
	disturbed    int            // the same, in the model's time; also after a clock change too small to notice
	lossReported int            // when a caller reported a loss of data
	clockSet     bool           // since the last request or repair
	greatest     []asking       // the lengths that callers asked for
}

// asking is a request for a length, and its time by Redis's clock.
type asking struct{ at, length int }

const never = -1 << 30

func newKnowledge() *knowledge {
	return &knowledge{
		holders: map[string]int{}, line: map[string]int{}, asked: map[string]int{},
		touched: never, resumed: never, disturbed: never, lossReported: never,
	}
}

func (k *knowledge) clone() *knowledge {
	c := *k
	c.holders, c.line, c.asked = maps.Clone(k.holders), maps.Clone(k.line), maps.Clone(k.asked)
	c.greatest = slices.Clone(k.greatest)
	return &c
}

// inLine returns the tokens in line, in their order.
func (k *knowledge) inLine() []string {
	return slices.SortedFunc(maps.Keys(k.line), func(a, b string) int {
		return cmp.Or(cmp.Compare(k.line[a], k.line[b]), cmp.Compare(a, b))
	})
}

// greatestLength returns the greatest length that callers have asked for recently.
func (k *knowledge) greatestLength() int {
	greatest := 0
	for _, a := range k.greatest {
		if a.at >= k.greatest[len(k.greatest)-1].at-lengthMemory {
			greatest = max(greatest, a.length)
		}
	}
	return greatest
}

// The rules below are those of the README and docs/. They are independent of the scripts,
// and read no number from them: a script with another number breaks a rule. Times are in
// seconds.
const (
	beatTimeout  = int(rig.BeatTimeout / time.Second)
	pollMost     = int(rig.PollMost / time.Second)
	lineQuiet    = int(rig.LineQuiet / time.Second)
	linePatience = int(rig.LinePatience / time.Second)
	lengthMemory = 300 // Redis remembers the greatest length for this time
)

const (
	joinLine = "0" // the arrival of a waiter that joins the line
	portion  = 256 // the most free tokens that one repair makes
)

// settled reports whether holders and waiters have had time to come back since Redis was
// away, lost data, or had its clock set.
func (w *world) settled() bool { return w.now-w.expected.disturbed > w.quiet }

// stale reports whether a repair must reclaim a holder.
func (w *world) stale(token string) bool {
	return w.settled() && w.now-max(w.expected.holders[token], w.expected.disturbed) > w.threshold
}

// mayBeStale reports whether a repair may reclaim a holder: it has been silent for the
// threshold, by Redis's clock at that time.
func (w *world) mayBeStale(token string) bool {
	beat := w.expected.holders[token]
	return w.now-beat > w.threshold || beat <= w.expected.disturbed
}

// keepsPlace reports whether a waiter must keep its place.
func (w *world) keepsPlace(token string) bool {
	p := w.pods[token]
	return p.waiting && p.alive()
}

// mayBeGone reports whether Redis may drop a waiter from the line.
func (w *world) mayBeGone(token string) bool {
	return w.now-w.expected.asked[token] > linePatience || w.expected.asked[token] <= w.expected.disturbed
}

// gone reports whether a waiter must no longer keep others from free tokens.
func (w *world) gone(token string) bool {
	return w.now-max(w.expected.asked[token], w.expected.disturbed) > linePatience
}

// ahead returns the tokens in line before p, if p asks with this arrival.
func (w *world) ahead(p *actor, arrival string) []string {
	line := w.expected.inLine()
	if i := slices.Index(line, p.token); i >= 0 {
		return line[:i]
	}
	if arrival != "" && arrival != joinLine {
		i, _ := slices.BinarySearchFunc(line, p.arrival, func(token string, at int) int {
			return cmp.Compare(w.expected.line[token], at)
		})
		return line[:i]
	}
	return line
}

// entitled returns how many of the given waiters may take a free token, if used tokens
// are in use.
func (w *world) entitled(tokens []string, used int, counts func(string) bool) (n int) {
	for _, token := range tokens {
		if counts(token) && w.pods[token].length > used+n {
			n++
		}
	}
	return n
}

// mustGet reports whether p's request must get a token at once, or after one repair.
func (w *world) mustGet(p *actor, arrival string) bool {
	used, free := len(w.expected.holders), w.last.free
	ahead := w.ahead(p, arrival)
	present := func(token string) bool { return !w.gone(token) }
	first := w.entitled(ahead, used, present)
	if free > first && used+first < p.length {
		return true
	}
	newcomer := arrival == "" || arrival == joinLine
	if newcomer && free == 0 && first == 0 && used < p.length && w.now-w.expected.lossReported > w.quiet {
		return true // a newcomer cannot know that holders may come back
	}
	for token := range w.expected.holders {
		if w.stale(token) {
			used--
		}
	}
	return w.settled() && used < p.length && w.entitled(ahead, used, present) == 0
}

// checkTake checks that p may have the token that it has just taken.
func (w *world) checkTake(p *actor, arrival string) {
	used := len(w.expected.holders)
	if used >= p.length {
		w.fail("%s was admitted with %d in flight of its length %d", p.token, used, p.length)
	}
	if w.last.free == 0 {
		w.fail("%s took a token, and none was free", p.token)
	}
	first := w.entitled(w.ahead(p, arrival), used, w.keepsPlace)
	if w.last.free <= first || used+first >= p.length {
		w.fail("%s overtook %d live waiters", p.token, first)
	}
}

// checkReclaimed checks that the repair could reclaim the holder.
func (w *world) checkReclaimed(token string) {
	if w.pods[token].alive() {
		w.fail("live holder %s was reclaimed", token)
	}
	if !w.mayBeStale(token) {
		w.fail("holder %s was reclaimed %d s after its heartbeat", token, w.now-w.expected.holders[token])
	}
}

// checkDropped checks that Redis could drop the waiter from the line.
func (w *world) checkDropped(token string) {
	if w.keepsPlace(token) {
		w.fail("live waiter %s was dropped from the line", token)
	}
	if !w.mayBeGone(token) {
		w.fail("waiter %s was dropped from the line %d s after it asked", token, w.now-w.expected.asked[token])
	}
}

// checkCalled checks that Redis has called each reachable waiter for whom a token is
// free.
func (w *world) checkCalled(d dump) {
	if !w.subscribed || d.free == 0 || len(w.expected.line) == 0 {
		return
	}
	called := w.receiveCalls("PING")
	free, used := d.free, len(d.inflight)
	for _, token := range w.expected.inLine() {
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

// checkRoom checks that no more tokens are free than callers can use.
func (w *world) checkRoom(d dump) {
	if greatest := w.expected.greatestLength(); greatest > 0 && d.free > max(0, greatest-len(d.inflight)) {
		w.fail("%d free and %d in flight, and callers asked for at most %d", d.free, len(d.inflight), greatest)
	}
}

// checkReclaims checks a request of p that got no token: no dead holder's token is left
// that p could use.
func (w *world) checkReclaims(p *actor) {
	dead := 0
	for token := range w.expected.holders {
		if w.stale(token) {
			dead++
		}
	}
	if dead > 0 && len(w.expected.holders)-dead < p.length {
		w.fail("%s asked, and %d dead holders were not reclaimed", p.token, dead)
	}
}

// check compares the data in Redis with the knowledge that it must have, and checks the
// rules that always hold.
func (w *world) check(d dump, reclaims bool) {
	for _, token := range slices.Sorted(maps.Keys(w.expected.holders)) {
		if _, ok := d.inflight[token]; ok {
			continue
		}
		if !reclaims {
			w.fail("holder %s is not in flight any more", token)
		}
		w.checkReclaimed(token)
		delete(w.expected.holders, token)
	}
	for _, token := range slices.Sorted(maps.Keys(d.inflight)) {
		if _, ok := w.expected.holders[token]; !ok {
			w.fail("%s is in flight and should not be", token)
		}
		if _, ok := d.waiters[token]; ok {
			w.fail("%s is in flight and in line", token)
		}
	}
	for _, token := range w.expected.inLine() {
		if _, ok := d.waiters[token]; !ok {
			w.checkDropped(token)
			delete(w.expected.line, token)
			delete(w.expected.asked, token)
		}
	}
	if !maps.Equal(d.waiters, w.expected.line) {
		w.fail("the places in line are not those that the waiters were answered")
	}
	for _, token := range w.expected.inLine() {
		_, seen := d.seen[token]
		if !seen || d.lengths[token] != w.pods[token].length {
			w.fail("%s is in line, and Redis does not know its last request or its length", token)
		}
	}
	if len(d.seen) != len(d.waiters) || len(d.lengths) != len(d.waiters) {
		w.fail("Redis knows more waiters than are in line")
	}
	for token, since := range d.since {
		_, held := d.inflight[token]
		if _, waits := d.waiters[token]; held == waits || held != (since > 0) || d.pods[token] != w.pods[token].pod() {
			w.fail("%s has pod %q since %d", token, d.pods[token], since)
		}
	}
	if len(d.since) != len(d.inflight)+len(d.waiters) {
		w.fail("Redis knows %d pods, and %d tokens are in use or waited for",
			len(d.since), len(d.inflight)+len(d.waiters))
	}
	for i, at := range d.expiry {
		if at == -1 {
			w.fail("key %d does not expire", i+1)
		}
	}
}
