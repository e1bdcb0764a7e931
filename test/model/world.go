package model

import (
	"fmt"
	"strconv"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// world is a semaphore, its pods, and what the rules require of them. Times and durations
// are in seconds.
type world struct {
	store
	t         *rapid.T
	broken    func(rule string) // receives the broken rule, and does not return
	settings  []settings        // of processes; most have the first
	interval  int               // the greatest of late: see judge
	threshold int
	quiet     int
	length    int // the length that most pods ask for

	now        int // the model's time
	pods       map[string]*actor
	order      []*actor // in order of creation
	expected   *knowledge
	replicated *knowledge // of a replica that may be promoted; nil: none
	started    int        // when the server started, by its clock
	reigns     int        // the number of the present reign of Redis: a restart or a failover ends it
	paused     int        // knowledge.paused, as the last script took it
	repeated   int        // until then, by its clock, Redis may see times again: it was set back (microseconds)
	last       dump
	confirmed  confirmed
	commands   int
}

func (w *world) fail(format string, args ...any) { w.broken(fmt.Sprintf(format, args...)) }

// logf logs an event. rapid prints the log of the shortest failure.
func (w *world) logf(format string, args ...any) {
	w.t.Logf("%5d s: %s", w.now, fmt.Sprintf(format, args...))
}

// shift moves all times that came from Redis's clock; see modelShift.
func (w *world) shift(seconds int) {
	w.store.shift(seconds)
	w.started += seconds
	w.repeated += seconds * 1e6
	for _, p := range w.order {
		if p.arrival != 0 {
			p.arrival += seconds * 1e6
		}
	}
	for _, k := range []*knowledge{w.expected, w.replicated} {
		if k == nil {
			continue
		}
		for token := range k.line {
			k.line[token] += seconds * 1e6
		}
		k.born += seconds
		k.touched += seconds
		k.resumed += seconds
		k.silence += seconds
		for i := range k.greatest {
			k.greatest[i].at += seconds
		}
		k.length.at += seconds
		k.settingsAt += seconds
		k.lent.at += seconds
		k.lentTo += seconds * 1e6
		k.joined += seconds * 1e6
		k.override.ends += seconds
		for token := range k.askedAt {
			k.askedAt[token] += seconds * 1e6
		}
		k.heard += seconds * 1e6
		k.paused += seconds * 1e6
		k.reigned += seconds * 1e6
	}
	w.last = w.dump()
}

// pass passes time without a command.
func (w *world) pass(seconds int) {
	if seconds > 0 {
		w.shift(-seconds)
		w.now += seconds
	}
}

// step sets Redis's clock.
func (w *world) step(seconds int) {
	w.repeated = max(w.repeated, w.micros())
	w.shift(-seconds)
	w.setClock(seconds)
	w.expected.clockSet = true
}

// arrive prepares for a command that arrives now, of a process with these settings.
func (w *world) arrive(by settings) {
	if ticks := w.ticks(); ticks != 0 {
		w.shift(ticks) // the model's time stands still
	}
	k := w.expected
	if len(w.last.state) == 0 { // deleted, or expired
		guard := k.guard
		*k = *newKnowledge()
		k.born, k.guard = int(w.second), guard
	}
	k.born = min(k.born, int(w.second))
	w.judge(by)
	if age := max(0, int(w.second)-w.started); len(w.last.state) == 0 && age <= w.quiet {
		// The server may have replaced one that knew the semaphore: as if a caller had
		// reported a loss when it started.
		k.born = 0
		k.lossReported, k.disturbed, k.resumed = w.now-age, w.now-age, int(w.second)-age
	}
	silence := w.quiet
	if len(k.line) > 0 {
		silence = lineQuiet
	}
	second := int(w.second)
	if k.touched > 0 && (second-k.touched > silence || second < k.touched) {
		k.disturbed, k.resumed, k.silence = w.now, second, second
	}
	if (k.clockSet || second < k.touched) && k.lossReported != never {
		k.lossReported = w.now // the report may lie in the repeated time
	}
	if k.clockSet || second-k.touched > max(w.interval, lineQuiet) {
		k.disturbed = w.now // a second silence shortly after the first
	}
	k.touched = second
}

// judge determines the interval and threshold by which Redis judges all holders: the
// greatest that it heard of lately. A silence, or a clock that was set, ends no memory.
func (w *world) judge(by settings) {
	w.timing.Interval = time.Duration(by.interval) * time.Second
	w.timing.Threshold = time.Duration(by.threshold) * time.Second
	k, now := w.expected, int(w.second)
	last := now
	if k.touched != never {
		last = min(k.touched, now)
	}
	since := max(min(k.settingsAt, now), w.last.state["resumed"])
	known := k.settings
	if last-since > max(settingsMemory, 2*known.threshold) {
		known = settings{}
	}
	same := by.interval == known.interval || by.threshold == known.threshold
	if by.interval > known.interval || by.threshold > known.threshold || same && now-k.settingsAt >= settingsEvery {
		k.settingsAt = now
	}
	k.settings = settings{max(by.interval, known.interval), max(by.threshold, known.threshold)}
	w.interval = k.settings.interval
	w.quiet = w.interval + min(beatTimeout, w.interval)
	w.threshold = max(k.settings.threshold, 2*w.quiet)
}

// command runs a script.
func (w *world) command(script *redis.Script, args ...any) (status int, rest []any, d dump) {
	w.commands++
	status, rest, elapsed := w.run(script, args...)
	w.now += elapsed
	w.expected.touched += elapsed
	if k := w.expected; k.override.ends <= int(w.second) {
		k.override = override{}
	}
	k, now := w.expected, w.micros()
	if script != w.scripts.heartbeat && script != w.scripts.release && script != w.scripts.hold {
		k.forgetFuture(now)
	}
	w.paused = now
	if len(k.line) > 0 {
		if now-k.heard > stall || k.heard > now || k.paused > now {
			k.paused = now
		}
		k.heard, w.paused = now, k.paused
	}
	return status, rest, w.dump()
}

// note records a request or a repair for a length.
func (w *world) note(length int) {
	k := w.expected
	k.clockSet = false
	k.greatest = append(k.greatest, asking{int(w.second), length})
	if now := int(w.second); length >= k.length.length || now-k.length.at > lengthMemory {
		k.length = asking{now, length}
	} else {
		k.length.at = min(k.length.at, now)
	}
}

// lend records the length of a caller outside of the line.
func (w *world) lend(length int) {
	k := w.expected
	line := k.inLine()
	if len(line) == 0 {
		return
	}
	if last := k.line[line[len(line)-1]]; !w.lends() || length >= k.lent.length || last > k.lentTo {
		k.lent, k.lentTo = asking{w.micros() / 1e6, length}, last
	}
}

// ask runs the acquire script for p. must reports whether p had to get a token.
func (w *world) ask(p *actor, arrival string) (a rig.Acquired, must bool) {
	w.note(p.length)
	held := w.confirm(p)
	used, free := w.used(), w.last.free
	gaveUp := w.expected.gaveUp[p.token] && p.wait > 0 && !held
	if k := w.expected; p.limit.isSet && !k.limit.known {
		k.limit = p.limit
	}
	args := []any{p.wish(), p.token, arrival, p.pod(), p.takenAs, p.stalesAfter(), p.limit.text(), p.nextAhead()}
	status, rest, d := w.command(w.scripts.acquire, append(args, p.ending()...)...)
	must = !gaveUp && w.mustGet(p, arrival)
	a, err := rig.ReadAcquired(rig.Reply{Status: status, Rest: rest})
	rig.Must(w.test, err)
	if !held {
		w.checkEnd(p, arrival, gaveUp, a)
	}
	k := w.expected
	switch {
	case a.Status == rig.AcquireTaken:
		if !held {
			w.checkTake(p, arrival, d)
			w.noteComing(p, arrival)
			if d.free != w.last.free-p.tokens && !(d.free == 0 && w.runsBeyond(p, arrival)) {
				w.fail("%s took its tokens, and then %d of %d are free", p.token, d.free, w.last.free)
			}
		} else if d.free != w.last.free {
			w.fail("%s took a token twice", p.token)
		}
		k.holders[p.token] = w.now
		if p.unstarted > 0 {
			k.holders[p.token] -= max(0, w.threshold-p.unstarted)
		}
		k.leave(p.token)
	case held:
		w.fail("holder %s asked and was answered %d", p.token, a.Status)
	case a.Status == rig.AcquireGaveUp:
		if _, ok := k.line[p.token]; !ok && !gaveUp { // it came back
			w.noteComing(p, arrival)
			w.noteReign()
		}
		k.leave(p.token)
		k.gaveUp[p.token] = true
	case d.free != w.last.free:
		w.fail("%s took no token, and then %d of %d are free", p.token, d.free, w.last.free)
	case arrival != "":
		if _, ok := k.line[p.token]; !ok {
			w.join(p, arrival, d)
			w.noteReign()
		}
		k.asked[p.token], k.askedAt[p.token] = w.now, w.micros()
		if delete(k.heardIn, p.token); p.reachable {
			k.heardIn[p.token] = w.reigns
		}
		if a.Status == rig.AcquireFull && (a.Reachable != p.reachable || d.hears[p.token] != p.reachable) {
			w.fail("%s is reachable: %t, and Redis answered %t and notes %t",
				p.token, p.reachable, a.Reachable, d.hears[p.token])
		}
	}
	w.check(d, false)
	w.checkSetting(p, a)
	if arrival == "" && !held && !gaveUp && free >= p.tokens && used+p.tokens <= w.lengthFor(p.length) {
		w.lend(p.length)
	}
	if a.Status == rig.AcquireTaken || a.Status == rig.AcquireGaveUp {
		w.checkCalled(d)
	}
	w.last = d
	return a, must
}

// noteReign records that Redis has noted its present reign, as it does when a pod joins.
func (w *world) noteReign() {
	if k := w.expected; k.reign != w.reigns {
		k.reign, k.reigned = w.reigns, w.micros()
	}
}

// join updates p, which has just joined the line.
func (w *world) join(p *actor, arrival string, d dump) {
	at, k := d.waiters[p.token], w.expected
	ahead := p.nextAhead()
	if arrival == joinLine {
		for token, other := range d.waiters {
			if token != p.token && (other >= at+ahead || ahead > 0 && !w.pods[token].kept && other+d.aheads[token] >= at+ahead) {
				w.fail("%s joined the line, and did not arrive last", p.token)
			}
		}
		if at+ahead < w.micros() || at > w.nextPlace(p) {
			w.fail("%s joined the line at %d with the head start %d, and the time is %d", p.token, at, ahead, w.micros())
		}
	} else if at != p.place() {
		w.fail("%s came back to the line, and has another place", p.token)
	}
	w.noteHeadStart(p, arrival, at)
	k.line[p.token] = at
}

// noteComing notes that p joins the line, or comes back, and leaves it by the same command.
func (w *world) noteComing(p *actor, arrival string) {
	switch _, ok := w.expected.line[p.token]; {
	case ok || arrival == "":
	case arrival == joinLine:
		w.noteHeadStart(p, arrival, w.nextPlace(p))
	default:
		w.noteHeadStart(p, arrival, p.place())
	}
}

// noteHeadStart notes that p joins the line at a place.
func (w *world) noteHeadStart(p *actor, arrival string, place int) {
	k, ahead := w.expected, p.nextAhead()
	if ahead == 0 {
		return
	}
	if len(k.line) == 0 {
		k.joined = never * 1e6 // a line that is gone keeps nobody back
	}
	k.joined = max(k.joined, place+ahead)
	if arrival == joinLine {
		k.lentTo = min(k.lentTo, place-1) // it was not in line when a caller lent its length
	}
}

// noteLoss handles a waiter or holder that is older than the data in Redis. Callers that
// did not know of the holders made the free tokens.
func (w *world) noteLoss() {
	k := w.expected
	w.last.free = 0
	k.born = 0 // one report is enough
	k.lossReported, k.disturbed, k.resumed = w.now, w.now, int(w.second)
}

// try asks for a token for p. If Redis replies that a repair comes first, try repairs and
// asks again.
func (w *world) try(p *actor) rig.Acquired {
	if p.kept { // the process that refreshes its place does so before it asks
		w.arrive(w.settings[0])
		w.keep(nil, []*actor{p}, map[string]int{p.token: p.arrival - p.headStart*1e6}) // also if it was moved
	}
	empty := len(w.last.state) == 0 // p's arrival may be later than now, if the clock was set back
	w.arrive(p.settings)
	k, arrival := w.expected, p.nextArrival()
	gaveUp := k.gaveUp[p.token]
	if p.arrival != 0 && !p.kept && (empty && k.born != 0 || p.arrival < k.born*1e6) { // p is older than the data in Redis
		w.noteLoss()
	}
	a, mustGet := w.ask(p, arrival)
	if a.Status == rig.AcquireRepair {
		if isNew := arrival == "" || arrival == joinLine; isNew && !a.Newcomer || !isNew && a.Newcomer && p.arrival < k.silence*1e6 {
			w.fail("%s is told that it is a newcomer: %t", p.token, a.Newcomer)
		}
		w.maintain(p.length, a.Newcomer, p.settings)
		w.arrive(p.settings)
		arrival = p.nextArrival() // the same unless a new second has begun
		again, must := w.ask(p, arrival)
		a, mustGet = again, mustGet || must
		if a.Status == rig.AcquireRepair {
			w.fail("%s has repaired, and Redis still asks for a repair", p.token)
		}
	}
	if mustGet && a.Status != rig.AcquireTaken {
		w.fail("%s is entitled to a token, but does not get it", p.token)
	}
	if a.Status != rig.AcquireTaken && !(gaveUp && a.Status == rig.AcquireGaveUp) {
		w.checkReclaims(p)
	}
	w.logf("%s of length %s asks with arrival %s: %s; %d in flight, %d free, line %v", p.token, p.wish(),
		map[bool]string{true: "that it was answered", false: strconv.Quote(arrival)}[len(arrival) > 1],
		map[int]string{rig.AcquireTaken: "taken", rig.AcquireFull: "full", rig.AcquireGaveUp: "gave up"}[a.Status],
		w.last.used, w.last.free, w.expected.inLine())
	return a
}

// maintain repairs the semaphore.
func (w *world) maintain(length int, newcomer bool, by settings) {
	w.arrive(by)
	w.note(length)
	flag := "0"
	if newcomer {
		flag = "1"
	}
	_, _, d := w.command(w.scripts.maintain, length, flag)
	w.check(d, true)
	w.checkRoom(d)
	w.checkCalled(d)
	total, before := d.free+d.used, w.last.free+w.last.used
	if w.settled() && total < min(w.lengthFor(length), portion) {
		w.fail("a repair left %d tokens of %d", total, length)
	}
	if int(w.second)-w.expected.resumed <= w.quiet && !newcomer && total > before {
		w.fail("a repair replaced tokens, and their holders may come back")
	}
	w.last = d
	w.logf("repaired: %d in flight, %d free", d.used, d.free)
}

// beat sends a heartbeat of p.
func (w *world) beat(p *actor) {
	w.arrive(p.settings)
	k := w.expected
	held := w.confirm(p)
	seconds := w.now - p.since
	status, _, d := w.command(w.scripts.heartbeat, p.token, p.pod(), seconds, p.takenAs, p.tokens)
	if !held && int(w.second)-seconds < k.born { // p is older than the data in Redis
		w.noteLoss()
	}
	if (status == rig.HeartbeatRejoined) == held {
		w.fail("a heartbeat of %s was answered %d", p.token, status)
	}
	free := w.last.free
	if !held {
		free = max(0, free-p.tokens) // a running pod counts
		p.takenAs = ""
	}
	if d.free != free {
		w.fail("after a heartbeat of %s, %d tokens are free, not %d", p.token, d.free, free)
	}
	k.holders[p.token] = w.now
	if k.guard != nil && !held {
		k.guard.holders[p] = true
	}
	k.leave(p.token)
	w.check(d, false)
	w.last = d
	w.logf("%s beats: %d in flight, %d free", p.token, d.used, d.free)
}

// giveBack releases p's token or its place in line.
func (w *world) giveBack(p *actor) {
	w.arrive(p.settings)
	k := w.expected
	want, free := 0, w.last.free
	if _, ok := k.line[p.token]; !ok {
		w.confirm(p) // and give it back at once
	}
	if _, ok := k.holders[p.token]; ok {
		want = rig.ReleaseDone
		last := 0 // without a length, Redis keeps no free tokens
		if n := len(k.greatest); n > 0 {
			last = k.greatest[n-1].length
		}
		last = w.lengthFor(last)
		free = min(free+p.tokens, max(0, last-w.used()+p.tokens))
	} else if _, ok := k.line[p.token]; ok {
		want = rig.ReleaseLeft
	} else if k.gaveUp[p.token] {
		want = rig.ReleaseLeft
		delete(k.gaveUp, p.token)
	}
	status, _, d := w.command(w.scripts.release, p.token, p.takenAs)
	delete(k.holders, p.token)
	k.leave(p.token)
	if status != want {
		w.fail("a release of %s was answered %d, not %d", p.token, status, want)
	}
	if d.free < free || d.free > w.last.free+p.tokens || want != rig.ReleaseDone && d.free != free {
		w.fail("a release of %s made %d free tokens %d", p.token, w.last.free, d.free)
	}
	w.check(d, false)
	if want == rig.ReleaseDone {
		w.checkRoom(d)
	}
	w.checkCalled(d)
	w.last = d
	w.logf("%s released: %d in flight, %d free, line %v", p.token, d.used, d.free, k.inLine())
}

func newWorld(t *rapid.T, s store, broken func(rule string)) *world {
	w := &world{store: s, t: t, broken: broken, reigns: 1, pods: map[string]*actor{}, expected: newKnowledge()}
	w.second = time.Now().Unix()
	some := []settings{{5, 16}, {10, 40}, {2, 1}}
	w.settings = []settings{rapid.SampledFrom(some).Draw(t, "interval and threshold")}
	if rapid.Bool().Draw(t, "they change") {
		w.settings = append(w.settings, rapid.SampledFrom(some).Draw(t, "and others"))
	}
	w.length = rapid.IntRange(1, 4).Draw(t, "length")
	w.id = rig.FreshID()
	w.started = int(w.second) - 1e6
	w.setStarted(int64(w.started))
	w.logf("interval and threshold %v, length %d", w.settings, w.length)
	w.last = w.dump()
	w.judge(w.settings[0])
	w.expected.settings, w.expected.settingsAt = settings{}, 0
	return w
}
