package model

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// knowledge is what Redis must know of the semaphore. If Redis loses data or rolls back,
// so does knowledge. Times are in seconds of the model's time, or by Redis's clock (Unix
// seconds).
type knowledge struct {
	holders      map[string]int  // token that counts as in use -> its last heartbeat
	line         map[string]int  // token in line -> its place
	asked        map[string]int  // token in line -> its last request
	askedAt      map[string]int  // the same, by Redis's clock (microseconds)
	heardIn      map[string]int  // token in line -> the reign in which it last received a message at a request
	born         int             // when the data began, by Redis's clock; 0: Redis knows that it has lost data
	touched      int             // the last command, by Redis's clock
	resumed      int             // the end of the last silence that Redis notices, or a report of a loss, by its clock
	silence      int             // the end of the last silence that Redis notices, by its clock
	disturbed    int             // the same, in the model's time; also after a clock change too small to notice
	lossReported int             // when a caller reported a loss of data
	clockSet     bool            // since the last request or repair
	greatest     []asking        // the lengths that callers asked for
	length       asking          // the greatest of them that Redis remembers
	settings     settings        // the greatest interval and threshold that Redis remembers
	settingsAt   int             // when a caller sent one of them, by Redis's clock
	lent         asking          // the length that a caller outside of the line asked for
	lentTo       int             // the place of the last waiter at that time
	joined       int             // the arrival of the last waiter with a head start
	heard        int             // the last command while there was a line, by Redis's clock (microseconds)
	paused       int             // the end of the last pause between two, likewise
	reign        int             // the reign that Redis knows
	reigned      int             // since when, by its clock (microseconds)
	guard        *guard          // nil: the server is old
	gaveUp       map[string]bool // tokens whose pods gave up and have not released them
	limit        limit           // that the owner has set
	override     override        // the same, for a time
}

// limit is a length that the owner has set.
type limit struct {
	known  bool // Redis knows it, or that there is none
	isSet  bool
	length int
}

// override is a length for a time.
type override struct{ length, ends int } // ends: by Redis's clock

// set returns the length that counts for all pods, at a second of Redis's clock.
func (k *knowledge) set(second int) (length int, ok bool) {
	if k.override.ends > second {
		return k.override.length, true
	}
	return k.limit.length, k.limit.isSet
}

// lengthFor returns the length that counts for a pod that asks for another.
func (w *world) lengthFor(length int) int {
	if set, ok := w.expected.set(int(w.second)); ok {
		return set
	}
	return length
}

// guard is what the pods know of the semaphore after another, empty server took the place of
// Redis. The holders of then may still come back.
type guard struct {
	until   int             // in the model's time
	holders map[*actor]bool // of then, and those that have put a token back since then
	taken   map[*actor]bool // pods that have taken a token since then
}

// newGuard returns the guard of a server that starts now. lost is what Redis has lost.
func (w *world) newGuard(lost *knowledge) *guard {
	g := &guard{until: never, holders: map[*actor]bool{}, taken: map[*actor]bool{}}
	for _, s := range w.settings { // the new server may only hear of the shortest
		until := w.now + s.interval + min(beatTimeout, s.interval)
		if g.until == never || until < g.until {
			g.until = until
		}
	}
	for token := range lost.holders {
		g.holders[w.pods[token]] = true
	}
	for _, p := range w.order {
		if p.alive() && p.holding {
			g.holders[p] = true
		}
	}
	return g
}

// checkGuard checks that p may have the token that it has just taken: while holders may come
// back to a new server, a pod gets only a token that one of them has given back.
func (w *world) checkGuard(p *actor, limit int) {
	g := w.expected.guard
	if g == nil || w.now > g.until {
		return
	}
	used, before := 0, 0
	for holder := range g.holders {
		before += holder.tokens
		if _, back := w.expected.holders[holder.token]; back || holder.alive() && holder.holding {
			used += holder.tokens
		}
	}
	for other := range g.taken {
		if _, holds := w.expected.holders[other.token]; holds {
			used += other.tokens
		}
	}
	if used+p.tokens > max(limit, before) {
		w.fail("%s was admitted by a server that is %d s old, and %d of %d may be back", p.token,
			int(w.second)-w.started, used, before)
	}
	g.taken[p] = true
}

// asking is a request for a length, and its time by Redis's clock.
type asking struct{ at, length int }

// settings are the interval and threshold of a process.
type settings struct{ interval, threshold int }

const never = -1 << 30

func newKnowledge() *knowledge {
	return &knowledge{
		holders: map[string]int{}, line: map[string]int{}, asked: map[string]int{},
		askedAt: map[string]int{}, heardIn: map[string]int{}, gaveUp: map[string]bool{},
		touched: never, resumed: never, silence: never, disturbed: never, lossReported: never,
	}
}

func (k *knowledge) clone() *knowledge {
	c := *k
	c.holders, c.line, c.asked = maps.Clone(k.holders), maps.Clone(k.line), maps.Clone(k.asked)
	c.askedAt, c.heardIn = maps.Clone(k.askedAt), maps.Clone(k.heardIn)
	c.greatest, c.gaveUp = slices.Clone(k.greatest), maps.Clone(k.gaveUp)
	return &c
}

// inLine returns the tokens in line, in their order.
func (k *knowledge) inLine() []string {
	return slices.SortedFunc(maps.Keys(k.line), func(a, b string) int {
		return cmp.Or(cmp.Compare(k.line[a], k.line[b]), cmp.Compare(a, b))
	})
}

// leave takes a token out of the line.
func (k *knowledge) leave(token string) {
	delete(k.line, token)
	delete(k.asked, token)
	delete(k.askedAt, token)
	delete(k.heardIn, token)
}

// forgetFuture sets the requests that lie in the future, from before the clock was set back,
// to the present second.
func (k *knowledge) forgetFuture(now int) {
	newest := slices.Max(append(slices.Collect(maps.Values(k.askedAt)), 0))
	for token, at := range k.askedAt {
		if second := now - now%1e6; newest > now && at > second {
			k.askedAt[token] = second
		}
	}
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
	linePass     = int(rig.LinePass / time.Microsecond)
	stall        = int(rig.Stall / time.Microsecond)
	lengthMemory = 300 // Redis remembers the greatest length for this time

	// Redis remembers the greatest settings for this time, or for twice their threshold.
	settingsMemory = 300
	settingsEvery  = 10 // it notes the same ones again after this time
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
	threshold := max(w.threshold, w.pods[token].settings.threshold) // its own counts, whatever Redis knows
	return w.now-beat > threshold || beat <= w.expected.disturbed
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
		return w.before(p.place())
	}
	if arrival == joinLine && p.headStart > 0 {
		return w.before(w.nextPlace(p))
	}
	return line
}

// nextPlace returns the place of p, which joins the line by the last script.
func (w *world) nextPlace(p *actor) int {
	k, arrival := w.expected, w.micros()
	if line := k.inLine(); len(line) > 0 {
		arrival = max(arrival, k.line[line[len(line)-1]]+1, k.joined+1)
	}
	if w.lends() {
		arrival = max(arrival, k.lentTo+1)
	}
	return arrival - p.headStart*1e6
}

// before returns the tokens in line before a place.
func (w *world) before(place int) []string {
	line := w.expected.inLine()
	i, _ := slices.BinarySearchFunc(line, place, func(token string, at int) int {
		return cmp.Compare(w.expected.line[token], at)
	})
	return line[:i]
}

// limits returns the length that counts for each waiter of a line: the greatest of its
// own, of those behind it, of floor, and of one that a caller lent it. Redis remembers no
// greater one.
func (w *world) limits(line []string, floor int) map[string]int {
	k, limits := w.expected, map[string]int{}
	if set, ok := k.set(int(w.second)); ok {
		for _, token := range line {
			limits[token] = set
		}
		return limits
	}
	for _, token := range slices.Backward(line) {
		floor = max(floor, w.pods[token].length)
		limit := floor
		at, ok := k.line[token]
		if !ok { // it comes back
			at = w.pods[token].place()
		}
		if at > 0 && at <= k.lentTo && w.lends() {
			limit = max(limit, k.lent.length)
		}
		limits[token] = min(limit, k.length.length)
	}
	return limits
}

// lends reports whether a length is lent to the line.
func (w *world) lends() bool {
	lent := w.expected.lent
	return lent.length > 0 && max(w.micros()/1e6-lent.at, lent.at-w.micros()/1e6) <= linePatience
}

// isPassed reports whether Redis gives a free token to those behind a waiter, at the time
// of the last script: the waiter missed a call, or has not asked for too long. d is what
// Redis has then.
func (w *world) isPassed(token string, d dump) bool {
	k, now := w.expected, w.micros()
	return d.passed[token] || now-k.askedAt[token] > linePass && now-w.paused > stall && now/1e6-k.silence > linePatience
}

// mustMiss reports whether a call for a waiter that nobody receives must pass it: Redis
// knows that it has not changed since the waiter last received a message.
func (w *world) mustMiss(token string, d dump) bool {
	k := w.expected
	return d.hears[token] && !w.pods[token].reachable && k.heardIn[token] == w.reigns && k.reign == w.reigns &&
		k.askedAt[token] >= max(k.reigned, w.repeated)
}

// checkMissed checks the waiters that Redis has passed because nobody received its call.
func (w *world) checkMissed(d dump) {
	for token := range d.passed {
		if w.last.passed[token] {
			continue
		}
		if p := w.pods[token]; p.reachable || w.expected.heardIn[token] != w.reigns {
			w.fail("%s is passed; it is reachable: %t, it received a message in reign %d, and now is reign %d",
				token, p.reachable, w.expected.heardIn[token], w.reigns)
		}
	}
}

// used returns the number of tokens in use.
func (w *world) used() (n int) {
	for token := range w.expected.holders {
		n += w.pods[token].tokens
	}
	return n
}

// letsPass reports whether lighter waiters may pass one that is the first that does not fit.
func (w *world) letsPass(token string) bool {
	overtake, since := w.last.state["overtake"], w.last.firsts[token]
	now := w.micros() / 1e6
	return overtake > 0 && (since == 0 || since > now || now-since < overtake)
}

// renamed returns the former name of the token that a pod has just confirmed, if it had one.
func (w *world) renamed(d dump) string {
	if _, ok := d.inflight[w.confirmed.token]; ok {
		return w.pods[w.confirmed.token].takenAs
	}
	return ""
}

// checkHolds checks that Redis notes once for how long a pod had its tokens: "!" is a second,
// and each next character 17 % longer. It knows the last 64.
func (w *world) checkHolds(d dump) {
	var noted []byte
	renamed := w.renamed(d)
	for token := range w.last.inflight {
		if _, held := d.inflight[token]; !held && token != renamed {
			second := max(1, int(w.second)-w.last.since[token])
			noted = append(noted, byte(33+int(math.Round(math.Log(float64(second))/0.16))))
		}
	}
	slices.Sort(noted)
	before := w.last.holds[max(0, min(len(w.last.holds), len(w.last.holds)+len(noted)-64)):]
	after := []byte(d.holds[min(len(before), len(d.holds)):])
	slices.Sort(after)
	if want := noted[:min(len(noted), 64)]; !strings.HasPrefix(d.holds, before) || len(noted) <= 64 && !slices.Equal(after, want) {
		w.fail("Redis notes the holds %q, and before %q; pods have ended that held for %q", d.holds, w.last.holds, noted)
	}
}

// checkHistory checks that the history gets one entry for each pod whose time ends: with
// tokens, or in line. Redis keeps how long a pod waited while the pod has its tokens.
func (w *world) checkHistory(d dump) {
	renamed := w.renamed(d)
	var want []string
	entry := func(waited string, held, tokens int, pod string) {
		want = append(want, fmt.Sprintf("%d %s %d %d %s", w.second, waited, held, tokens, pod))
	}
	waited := func(token string) string {
		return strconv.Itoa(max(0, int(w.second)-(w.last.waiters[token]+w.last.aheads[token])/1e6))
	}
	for token := range w.last.inflight {
		if _, held := d.inflight[token]; !held && token != renamed {
			entry(cmp.Or(w.last.waited[token], "0"), max(0, int(w.second)-w.last.since[token]), w.last.parts[token],
				w.last.pods[token])
		}
	}
	for token := range w.last.waiters {
		_, waits := d.waiters[token]
		_, held := d.inflight[token]
		if !waits && !held {
			entry(waited(token), -1, w.pods[token].tokens, w.pods[token].pod())
		}
		rejoined := d.state["rejoined"] > w.last.state["rejoined"] // Redis had it in line, as it has lost its last commands
		if _, before := w.last.inflight[token]; held && !before && !rejoined && d.waited[token] != waited(token) {
			w.fail("%s has waited for %s s, and Redis notes %q", token, waited(token), d.waited[token])
		}
	}
	for field, text := range d.gaveUp { // at its first request after Redis has lost its place
		token, ok := strings.CutSuffix(field, "/gaveUp")
		if _, waits := w.last.waiters[token]; ok && !waits && w.last.gaveUp[field] == "" {
			waited, _, _ := strings.Cut(text, " ")
			entry(waited, -1, w.pods[token].tokens, w.pods[token].pod())
		}
	}
	new := max(0, len(d.history)-len(want))
	var got []string
	for _, text := range d.history[new:] {
		ended, rest, _ := strings.Cut(text, " ")
		how, rest, _ := strings.Cut(rest, " ")
		if waits := strings.Contains(rest, " -1 "); waits == slices.Contains([]string{"released", "reclaimed"}, how) {
			w.fail("wrong history: %q", text)
		}
		got = append(got, ended+" "+rest)
	}
	slices.Sort(got)
	slices.Sort(want)
	before := w.last.history[max(0, len(w.last.history)-new):]
	if len(want) < 100 && (!slices.Equal(got, want) || !slices.Equal(d.history[:new], before) || len(before) < min(len(w.last.history), 100-len(want))) {
		w.fail("the history has %q; before %q; these pods have ended: %q", d.history, w.last.history, want)
	}
}

// serve gives each waiter of a line its tokens, in order, while they fit. It leaves out
// those that skip names, and those that need more than the length that counts for them. One
// that fits and misses its call gets nothing. serve returns the waiters that are served,
// and their tokens; fits is false if Redis keeps the free tokens for one that does not fit.
func (w *world) serve(line []string, limits map[string]int, used, free int,
	skip, misses func(token string) bool) (served []string, tokens int, fits bool) {
	var passes, isFirst = false, true
	for _, token := range line {
		needs := w.pods[token].tokens
		switch limit := limits[token]; {
		case skip(token) || needs > limit:
		case needs <= free-tokens && used+tokens+needs <= limit:
			if !misses(token) {
				served, tokens = append(served, token), tokens+needs
			}
		default:
			if isFirst {
				passes, isFirst = needs > 1 && w.letsPass(token), false
			}
			if !passes {
				return served, tokens, false
			}
		}
	}
	return served, tokens, true
}

func none(string) bool { return false }

// mustGet reports whether p's request had to get a token at once, or after one repair. It
// follows the request, before the rest of what Redis knows is brought up to date.
func (w *world) mustGet(p *actor, arrival string) bool {
	used, free := w.used(), w.last.free
	ahead, limit := w.ahead(p, arrival), w.lengthFor(p.length)
	line := w.expected.inLine()
	limits := w.limits(line, limit)
	if arrival != "" {
		if !slices.Contains(line, p.token) {
			line = slices.Insert(line, len(ahead), p.token)
		}
		limits = w.limits(line, 0) // the request may have dropped some: they let no more pass
		// The request may have dropped waiters: their lengths count no more.
		line = slices.DeleteFunc(line, func(token string) bool { return token != p.token && w.mayBeGone(token) })
		limit = w.limits(line, 0)[p.token]
	}
	for _, token := range ahead {
		if q := w.pods[token]; limits[token] < q.tokens && q.tokens <= w.lengthFor(q.length) {
			return false // Redis has forgotten that it asked for so many, and may keep them until it asks again
		}
	}
	serve := func(used, free int) (first int, fits bool) {
		_, first, fits = w.serve(ahead, limits, used, free,
			func(token string) bool { return w.gone(token) || w.isPassed(token, w.last) },
			func(token string) bool { return w.last.free >= w.pods[token].tokens && w.mustMiss(token, w.last) })
		return first, fits
	}
	if first, fits := serve(used, free); fits && free >= first+p.tokens && used+first+p.tokens <= limit {
		return true
	}
	const enough = 1 << 30 // a repair makes what is missing
	newcomer := arrival == "" || arrival == joinLine
	if first, fits := serve(used, enough); fits && (free < p.tokens && first == 0 && newcomer || arrival == "") &&
		used+first+p.tokens <= min(limit, portion) &&
		w.now-w.expected.lossReported > w.quiet {
		return true // a newcomer cannot know that holders may come back
	}
	for token := range w.expected.holders {
		if w.stale(token) {
			used -= w.pods[token].tokens
		}
	}
	first, fits := serve(used, enough)
	return w.settled() && fits && used+p.tokens <= limit && first == 0
}

// isOver reports whether p's time in line is over, by Redis's clock. It follows the request,
// before the rest of what Redis knows is brought up to date.
func (w *world) isOver(p *actor, arrival string) bool {
	at, ok := w.expected.line[p.token]
	at += w.last.aheads[p.token]
	if !ok {
		at = p.arrival // it comes back
	}
	return p.wait > 0 && arrival != "" && (ok || arrival != joinLine) && w.micros() >= at+p.wait*1e6
}

// mayEnd reports whether Redis may end the wait of a pod: it knows how many tokens are in
// use, as all holders have had time to come back.
func (w *world) mayEnd() bool { return int(w.second)-w.expected.resumed > w.quiet }

// checkEnd checks an answer to p, which had gave up before or not.
func (w *world) checkEnd(p *actor, arrival string, before bool, a rig.Acquired) {
	over := w.isOver(p, arrival)
	switch gaveUp := a.Status == rig.AcquireGaveUp; {
	case before && p.wait > 0 && !gaveUp:
		w.fail("%s gave up, and was answered %d when it asked again", p.token, a.Status)
	case before || a.Status == rig.AcquireRepair:
	case gaveUp && (!over || p.runs):
		w.fail("%s gave up too early, or had to run", p.token)
	case gaveUp && !w.mayEnd():
		w.fail("%s gave up, and holders may come back", p.token)
	case a.Status == rig.AcquireFull && over && w.settled():
		w.fail("%s waits longer than for %d s", p.token, p.wait)
	}
}

// runsBeyond reports whether p may have taken a token beyond the length.
func (w *world) runsBeyond(p *actor, arrival string) bool {
	return p.runs && w.isOver(p, arrival) && w.mayEnd()
}

// checkTake checks that p may have the token that it has just taken.
func (w *world) checkTake(p *actor, arrival string, d dump) {
	used, limit := w.used(), w.lengthFor(p.length)
	ahead := w.ahead(p, arrival)
	limits := w.limits(w.expected.inLine(), limit)
	if arrival != "" {
		line := w.expected.inLine()
		if !slices.Contains(line, p.token) {
			line = slices.Insert(line, len(ahead), p.token)
		}
		limits = w.limits(line, 0)
		limit = limits[p.token]
	}
	if w.runsBeyond(p, arrival) {
		return
	}
	if used+p.tokens > limit {
		w.fail("%s was admitted with %d in flight, needs %d, and the length that counts for it is %d",
			p.token, used, p.tokens, limit)
	}
	if w.last.free < p.tokens {
		w.fail("%s took %d tokens, and %d were free", p.token, p.tokens, w.last.free)
	}
	w.checkGuard(p, limit)
	mayPass := func(skip func(token string) bool) bool {
		_, first, fits := w.serve(ahead, limits, used, w.last.free, skip, none)
		return fits && w.last.free >= first+p.tokens && used+first+p.tokens <= limit
	}
	isPassed := func(token string) bool { return w.isPassed(token, d) }
	// With an overtake, it may pass one that does not fit, as Redis keeps a token for a
	// waiter that is dead.
	if !mayPass(func(token string) bool { return !w.keepsPlace(token) || isPassed(token) }) &&
		!(w.last.state["overtake"] > 0 && mayPass(isPassed)) {
		w.fail("%s overtook live waiters", p.token)
	}
}

// checkReclaimed checks that the repair could reclaim the holder.
func (w *world) checkReclaimed(token string) {
	if p := w.pods[token]; p.alive() && p.owns(token) {
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

// served returns the waiters for whom a token is free.
func (w *world) served(d dump) (tokens []string) {
	line := w.expected.inLine()
	tokens, _, _ = w.serve(line, w.limits(line, 0), d.used, d.free,
		func(token string) bool { return w.isPassed(token, d) }, none)
	return tokens
}

// checkCalled checks that Redis has called each reachable waiter for whom a token is
// free.
func (w *world) checkCalled(d dump) {
	if !w.subscribed() || d.free == 0 || len(w.expected.line) == 0 {
		return
	}
	called := w.receiveCalls("PING")
	for _, token := range w.served(d) {
		if w.pods[token].reachable && !called[w.id.Channel(token)] {
			w.fail("%s is in line, a token is free for it, and it was not called", token)
		}
	}
}

// checkRoom checks that no more tokens are free than callers can use.
func (w *world) checkRoom(d dump) {
	greatest := w.expected.greatestLength()
	set, ok := w.expected.set(int(w.second))
	if ok {
		greatest = set
	}
	if (ok || greatest > 0) && d.free > max(0, greatest-d.used) {
		w.fail("%d free and %d in flight, and callers asked for at most %d", d.free, d.used, greatest)
	}
}

// checkReclaims checks a request of p that got no token: no dead holder's token is left
// that p could use by its own length.
func (w *world) checkReclaims(p *actor) {
	dead := 0
	for token := range w.expected.holders {
		if w.stale(token) {
			dead += w.pods[token].tokens
		}
	}
	if dead > 0 && w.used()-dead+p.tokens <= w.lengthFor(p.length) {
		w.fail("%s asked, and %d tokens of dead holders were not reclaimed", p.token, dead)
	}
}

// check compares the data in Redis with the knowledge that it must have, and checks the
// rules that always hold.
func (w *world) check(d dump, reclaims bool) {
	w.checkMissed(d)
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
	for token, n := range d.parts {
		if n != w.pods[token].tokens {
			w.fail("%d tokens of %s are in flight, or not of one age, and it has %d", n, token, w.pods[token].tokens)
		}
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
			w.expected.leave(token)
		}
	}
	if !maps.Equal(d.waiters, w.expected.line) {
		w.fail("the places in line are not those that the waiters were answered")
	}
	for _, token := range w.expected.inLine() {
		_, seen := d.seen[token]
		if !seen || d.wishes[token] != w.pods[token].wish() {
			w.fail("%s is in line, and Redis does not know its last request or what it asks for", token)
		}
	}
	for token := range d.aheads {
		if _, ok := d.waiters[token]; !ok {
			w.fail("Redis knows how far %s stands ahead, and it is not in line", token)
		}
	}
	for token, since := range d.firsts {
		before, known := w.last.firsts[token]
		again := w.micros()-w.last.seen[token] > linePatience*1e6 // it left the line, and came back
		if _, ok := d.waiters[token]; !ok || w.pods[token].tokens == 1 ||
			known && !again && since > before && before <= int(w.second) {
			w.fail("Redis knows that %s is the first that does not fit since %d, before since %d", token, since, before)
		}
	}
	if len(d.seen) != len(d.waiters) || len(d.wishes) != len(d.waiters) {
		w.fail("Redis knows more waiters than are in line")
	}
	for token, since := range d.since {
		_, held := d.inflight[token]
		pod := w.pods[token].pod()
		if !held {
			pod = w.pods[token].waitingPod()
		}
		if _, waits := d.waiters[token]; held == waits || held != (since > 0) || d.pods[token] != pod {
			w.fail("%s has pod %q since %d", token, d.pods[token], since)
		}
		if _, before := w.last.inflight[token]; before && held && (since != w.last.since[token] || d.waited[token] != w.last.waited[token]) {
			w.fail("%s has its token since %d, having waited %q; before, since %d and %q", token, since, d.waited[token],
				w.last.since[token], w.last.waited[token])
		}
	}
	if since, ok := d.since[w.confirmed.token]; ok && since != w.confirmed.since {
		w.fail("%s was confirmed, and its pod has it since %d, not %d", w.confirmed.token, since, w.confirmed.since)
	}
	w.checkHolds(d)
	w.checkHistory(d)
	w.confirmed = confirmed{}
	if len(d.since) != len(d.inflight)+len(d.waiters) {
		w.fail("Redis knows %d pods, and %d tokens are in use or waited for",
			len(d.since), len(d.inflight)+len(d.waiters))
	}
	for field := range d.gaveUp {
		if token, ok := strings.CutSuffix(field, "/gaveUp"); ok && !w.expected.gaveUp[token] {
			w.fail("Redis knows that %s gave up, which has released its token since", token)
		}
	}
	if len(d.gaveUp) != 2*len(w.expected.gaveUp) {
		w.fail("%d pods gave up, and Redis knows of them %v", len(w.expected.gaveUp), d.gaveUp)
	}
	for i, at := range d.expiry {
		if at == -1 {
			w.fail("key %d does not expire", i+1)
		}
		if last := max(w.expected.override.ends, d.state["kept"]); i < 6 && at >= 0 && at/1000 < last { // the history may go
			w.fail("key %d expires %d s before what was set ends", i+1, last-at/1000)
		}
	}
}
