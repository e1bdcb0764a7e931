package model

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// actor is the process of a pod that asks for a token or has one.
type actor struct {
	token     string // the name by which it asks for its token
	takenAs   string // the name under which the webhook took the token, unless Redis has denied that
	name      string // of the pod
	length    int
	tokens    int // that it needs, all or none
	settings  settings
	isWaiter  bool  // it joins the line; else it is an admission
	waiting   bool  // it believes that it is in line
	holding   bool  // it believes that it has a token
	unstarted int   // seconds after which its token is stale if its sidecar does not start; 0: the threshold
	pending   bool  // admitted with a token; its sidecar has not started
	kept      bool  // another process refreshes its place and asks for it
	silent    bool  // paused or killed: it sends nothing, but may resume
	wait      int   // seconds in line after which it gives up; 0: never
	runs      bool  // then it takes a token beyond the length instead
	gaveUp    bool  // it was told that it gave up
	listens   bool  // it subscribes whenever it can
	reachable bool  // it receives the calls of Redis
	arrival   int   // as Redis replied (Unix microseconds); 0: no reply yet
	headStart int   // seconds
	ahead     int   // microseconds that its place is before its arrival, as Redis replied
	pace      int   // seconds between two requests
	due       int   // the time of its next request or heartbeat
	since     int   // when it took its token
	limit     limit // that it knows, from Redis or, for an admission, from the owner
	missed    bool  // it has sent no command since Redis was away or its clock was set
}

// pod returns p's pod, as the scripts take it.
func (p *actor) pod() string { return p.name + " node" }

// waitingPod returns p's pod as Redis knows it while p is in line.
func (p *actor) waitingPod() string {
	switch {
	case p.wait == 0:
		return p.pod()
	case p.runs:
		return fmt.Sprintf("%s %d run", p.pod(), p.wait)
	}
	return fmt.Sprintf("%s %d", p.pod(), p.wait)
}

// ending returns when p stops waiting, as the acquire script takes it.
func (p *actor) ending() []any {
	switch {
	case p.wait == 0:
		return []any{"", ""}
	case p.runs:
		return []any{p.wait, "run"}
	}
	return []any{p.wait, ""}
}

// alive reports whether p sends its commands in time.
func (p *actor) alive() bool { return !p.silent && !p.pending && (p.waiting || p.holding) }

// owns reports whether p keeps a token of this name.
func (p *actor) owns(token string) bool { return token == p.token || token == p.takenAs }

// stalesAfter returns p.unstarted as the acquire script takes it.
func (p *actor) stalesAfter() string {
	if p.unstarted == 0 {
		return ""
	}
	return strconv.Itoa(p.unstarted)
}

// nextArrival returns the arrival of p's next request.
func (p *actor) nextArrival() string {
	switch {
	case !p.isWaiter:
		return ""
	case p.arrival == 0 || p.kept:
		return joinLine
	}
	return strconv.Itoa(p.arrival)
}

// place returns p's place in line, as Redis replied.
func (p *actor) place() int { return p.arrival - p.ahead }

// nextAhead returns how far p's next request says that it stands ahead.
func (p *actor) nextAhead() int {
	if p.arrival == 0 || p.kept {
		return p.headStart * 1e6
	}
	return p.ahead
}

// wish returns what p asks for, as the scripts take it.
func (p *actor) wish() string {
	if p.tokens > 1 {
		return fmt.Sprintf("%d*%d", p.length, p.tokens)
	}
	return strconv.Itoa(p.length)
}

// drawTokens draws how many tokens p, which waits, needs: sometimes more than there are.
func (w *world) drawTokens(p *actor) {
	if rapid.IntRange(0, 3).Draw(w.t, "several tokens") == 3 {
		p.tokens = rapid.IntRange(2, 4).Draw(w.t, "its tokens")
	}
}

// drawLength draws the length that a pod asks for.
func (w *world) drawLength() int {
	if rapid.IntRange(0, 2).Draw(w.t, "another length") == 2 {
		return rapid.IntRange(1, 4).Draw(w.t, "its length")
	}
	return w.length
}

// drawSettings draws the interval and threshold of a process.
func (w *world) drawSettings() settings {
	return w.settings[max(0, rapid.IntRange(-2, len(w.settings)-1).Draw(w.t, "its settings"))]
}

// newPod adds a pod that has not asked yet.
func (w *world) newPod() *actor {
	name := "p" + strconv.Itoa(len(w.order)+1)
	p := &actor{token: name, name: name, length: w.drawLength(), tokens: 1, settings: w.drawSettings()}
	if rapid.IntRange(0, 3).Draw(w.t, "a head start") == 3 {
		p.headStart = rapid.SampledFrom([]int{1, 10, 600}).Draw(w.t, "seconds of head start")
	}
	w.pods[p.token] = p
	w.order = append(w.order, p)
	return p
}

// drawWait draws for how long p waits in line.
func (w *world) drawWait(p *actor) {
	if rapid.IntRange(0, 3).Draw(w.t, "waits for a time") == 3 {
		p.wait = rapid.SampledFrom([]int{1, 5, 20}).Draw(w.t, "its seconds")
		p.runs = rapid.Bool().Draw(w.t, "runs then")
	}
}

// rename gives p, whose token the webhook took as takenAs, its own name.
func (w *world) rename(p *actor, takenAs string) {
	p.token, p.takenAs = p.name+"-uid", takenAs
	w.pods[p.token] = p
}

// confirmed is a token that the last command has renamed, and since when its pod has it.
type confirmed struct {
	token string
	since int
}

// confirm records that p's command renames the token that the webhook took for it. It
// reports whether the command finds p's token in use.
func (w *world) confirm(p *actor) (held bool) {
	k := w.expected
	if _, held = k.holders[p.token]; held || p.takenAs == "" {
		return held
	}
	if _, held = k.holders[p.takenAs]; held {
		k.holders[p.token] = k.holders[p.takenAs]
		delete(k.holders, p.takenAs)
		w.confirmed = confirmed{p.token, w.last.since[p.takenAs]}
	}
	return held
}

// pick draws a pod for which are returns true.
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

// anyPod matches every pod; see pick.
func anyPod(*actor) bool { return true }

// act sends the command of p that is due.
func (w *world) act(p *actor) {
	p.missed = false
	if p.holding {
		w.beat(p)
		p.due = w.now + p.settings.interval
		return
	}
	if p.listens && !p.reachable && rapid.Bool().Draw(w.t, "subscribes again") {
		w.connect(p)
	}
	w.readAnswer(p, w.try(p))
}

// connect subscribes p to the calls of Redis.
func (w *world) connect(p *actor) {
	w.subscribe(p.token)
	p.reachable = true
}

// subscribed reports whether a pod is subscribed to the calls of Redis.
func (w *world) subscribed() bool {
	return slices.ContainsFunc(w.order, func(p *actor) bool { return p.reachable })
}

// disconnect closes the connections of all pods, as a restart of Redis does.
func (w *world) disconnect() {
	if w.subscribed() {
		w.unsubscribe()
	}
	for _, p := range w.order {
		p.reachable = false
	}
}

// startHolding updates p, which has just got its token.
func (w *world) startHolding(p *actor) {
	p.waiting, p.holding, p.since, p.due = false, true, w.now, w.now+p.settings.interval
}

// readAnswer updates the waiting p with a reply.
func (w *world) readAnswer(p *actor, a rig.Acquired) {
	if a.Status == rig.AcquireTaken {
		w.startHolding(p)
		return
	}
	p.takenAs = ""
	if a.Status == rig.AcquireGaveUp {
		p.waiting, p.gaveUp = false, true
		return
	}
	p.waiting, p.due = true, w.now+p.pace
	at, err := strconv.Atoi(a.Arrival)
	rig.Must(w.test, err)
	if p.arrival != 0 && p.arrival != at {
		w.fail("%s arrived at %d, and is told %d", p.token, p.arrival, at)
	}
	p.arrival, p.ahead = at, a.Ahead
	if p.place() != w.expected.line[p.token] {
		w.fail("%s is told that it arrived at %d and stands %d ahead; its place is %d", p.token, at, p.ahead,
			w.expected.line[p.token])
	}
}

// live passes time. All live actors send their commands when they are due.
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

// liveUntilAllCame passes time until every live actor has sent a command since Redis was
// last away.
func (w *world) liveUntilAllCame() {
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
