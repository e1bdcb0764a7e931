package model

import (
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// TestModel plays random sequences of commands, failures and clock changes on a real
// Redis, and checks the rules after each command. It reports the shortest sequence that
// breaks a rule. RAPID_CHECKS=10000 plays more sequences, RAPID_STEPS=100 longer ones.
func TestModel(t *testing.T) {
	t.Parallel()
	s := newStore(t, scriptsOf(t, rig.ScriptSource))
	commands := 0
	rapid.Check(t, func(t *rapid.T) {
		commands += playModel(t, s, func(rule string) { t.Fatal(rule) })
	})
	t.Logf("%d commands", commands)
}

// newStore starts a new Redis that writes nothing to disk.
func newStore(t *testing.T, scripts scripts) store {
	t.Helper()
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "appendonly", "no")
	subscriber, err := redis.Dial("tcp", r.Address)
	rig.Must(t, err)
	t.Cleanup(func() { subscriber.Close() })
	return store{
		test: t, redis: r, clock: new(estimate), scripts: scripts, subscriber: redis.PubSubConn{Conn: subscriber},
	}
}

// playModel plays one random sequence. broken receives the first broken rule.
func playModel(t *rapid.T, s store, broken func(rule string)) (commands int) {
	w := newWorld(t, s, broken)
	defer func() {
		s.redis.Do(s.test, "DEL", append(append(w.id.Keys(), w.startedKey()), w.replica()...)...)
		if w.subscribed() {
			s.unsubscribe()
		}
	}()
	actions := map[string]func(*rapid.T){}
	for name, action := range map[string]struct {
		often int
		play  func()
	}{
		"admit":    {4, w.playAdmission},
		"wait":     {4, w.playWaiter},
		"start":    {2, w.playStart},
		"copy":     {1, w.playCopy},
		"act":      {3, w.playAct},
		"gaveup":   {2, w.playGaveUp},
		"release":  {4, w.playRelease},
		"silence":  {2, w.playSilence},
		"wake":     {2, w.playWake},
		"late":     {2, w.playLate},
		"repeat":   {2, w.playRepeat},
		"unheard":  {1, w.playUnheard},
		"missed":   {2, w.playMissed},
		"lateback": {1, w.playLateBack},
		"maintain": {1, w.playMaintain},
		"keep":     {3, w.playKeep},
		"hold":     {1, w.playHold},
		"set":      {2, w.playSet},
		"first":    {1, w.playFirst},
		"live":     {6, w.playLive},
		"outage":   {1, w.playOutage},
		"clock":    {1, w.playClock},
		"loss":     {1, w.playLoss},
		"failover": {1, w.playFailover},
		"restart":  {1, w.playRestart},
	} {
		for i := range action.often {
			actions[name+string(rune('a'+i))] = func(t *rapid.T) {
				w.t = t
				action.play()
			}
		}
	}
	t.Repeat(actions)
	return w.commands
}

func (w *world) playAdmission() {
	p := w.newPod()
	pending := rapid.IntRange(0, 2).Draw(w.t, "its sidecar starts later") == 0
	if pending {
		p.unstarted = rapid.SampledFrom([]int{0, 1, p.settings.threshold}).Draw(w.t, "stale after")
	}
	if w.try(p).Status == rig.AcquireTaken {
		w.startHolding(p)
		p.pending = pending
	}
	p.unstarted = 0
}

// playStart starts the sidecar of a pod that was admitted with a token. It keeps the token
// under its own name.
func (w *world) playStart() {
	p := w.pick(func(p *actor) bool { return p.pending })
	p.pending, p.holding, p.pace = false, false, pollMost
	w.rename(p, p.token)
	if rapid.Bool().Draw(w.t, "classic") {
		w.startHolding(p)
		w.act(p)
		return
	}
	w.startWaiting(p)
}

// playCopy starts a copy of a pod that was admitted with a token. It has the same
// arguments.
func (w *world) playCopy() {
	of := w.pick(func(p *actor) bool { return p.pending || p.takenAs != "" })
	p := w.newPod()
	p.pace, p.length = pollMost, of.length
	takenAs := of.takenAs
	if of.pending {
		takenAs = of.token
	}
	w.rename(p, takenAs)
	w.logf("%s is a copy of %s", p.name, of.name)
	w.startWaiting(p)
}

// playWaiter starts a pod that joins the line if no token is free for it.
func (w *world) playWaiter() {
	p := w.newPod()
	w.drawWait(p)
	w.drawTokens(p)
	w.startWaiting(p)
}

// playGaveUp starts the sidecar of a pod again that gave up. Or the pod has ended its wait:
// it releases its token, and joins the line again.
func (w *world) playGaveUp() {
	p := w.pick(func(p *actor) bool { return p.gaveUp && !p.waiting && !p.holding })
	told := rapid.Bool().Draw(w.t, "it was told")
	if told {
		w.giveBack(p)
		p.gaveUp = false
	}
	if p.kept {
		if !told { // another process keeps its place, and asks
			w.readAnswer(p, w.try(p))
		}
		return
	}
	p.silent, p.isWaiter, p.arrival = false, false, 0
	w.startWaiting(p)
}

// startWaiting starts the sidecar of a pod, which joins the line if no token is free for
// it.
func (w *world) startWaiting(p *actor) {
	p.pace = rapid.IntRange(2, pollMost).Draw(w.t, "seconds between two requests")
	switch a := w.try(p); a.Status {
	case rig.AcquireTaken:
		w.startHolding(p)
		return
	case rig.AcquireGaveUp:
		w.readAnswer(p, a)
		return
	}
	p.takenAs = ""
	if p.listens = rapid.Bool().Draw(w.t, "reachable"); p.listens {
		w.connect(p)
	}
	p.isWaiter = true
	w.readAnswer(p, w.try(p))
}

func (w *world) playAct() { w.act(w.pick((*actor).alive)) }

// playRelease releases the token or the place of a pod, which may have neither.
func (w *world) playRelease() {
	p := w.pick(anyPod)
	if p.pending && rapid.Bool().Draw(w.t, "its sidecar ends before it is answered") {
		w.rename(p, p.token)
		p.pending = false
	}
	w.giveBack(p)
	p.waiting, p.holding = false, false
}

// playTurn releases the token of a holder; then the first pod in line asks.
func (w *world) playTurn() {
	p := w.pick(func(p *actor) bool { return p.alive() && p.holding })
	w.giveBack(p)
	p.holding = false
	for _, token := range w.expected.inLine() {
		if first := w.pods[token]; first.alive() && first.waiting {
			w.act(first)
			return
		}
	}
}

// playSilence pauses or kills a live pod.
func (w *world) playSilence() {
	p := w.pick((*actor).alive)
	p.silent = true
	if p.reachable && rapid.Bool().Draw(w.t, "its connections end") {
		w.leave(p.token)
		p.reachable = false
	}
	w.logf("%s falls silent; it has connections: %t", p.token, p.reachable)
}

// playWake resumes a pod that was paused.
func (w *world) playWake() {
	p := w.pick(func(p *actor) bool { return p.silent && (p.waiting || p.holding) })
	p.silent = false
	w.logf("%s wakes up", p.token)
	w.act(p)
}

// playLate sends a command that arrives after its deadline.
func (w *world) playLate() {
	p := w.pick(anyPod)
	c := w.drawCommand(p)
	by := time.Duration(rapid.SampledFrom([]int{1, 1000, 600000}).Draw(w.t, "ms late")) * time.Millisecond
	before := w.dump()
	if status := w.runLate(c.script, by, c.args...); status != rig.StatusLate {
		w.fail("a late %s was answered %d", c.name, status)
	}
	if !before.equal(w.dump()) {
		w.fail("a late %s changed something", c.name)
	}
}

// modelCommand is a command of a pod.
type modelCommand struct {
	name   string
	script *redis.Script
	args   []any
}

func (w *world) drawCommand(p *actor) modelCommand {
	return rapid.SampledFrom([]modelCommand{
		{"heartbeat", w.scripts.heartbeat, []any{p.token, p.pod(), 0, p.takenAs, p.tokens}},
		{"release", w.scripts.release, []any{p.token, p.takenAs}},
		{"request without waiting", w.scripts.acquire, []any{p.wish(), p.token, "", p.pod(), p.takenAs}},
		{"request", w.scripts.acquire, []any{p.wish(), p.token, p.nextArrival(), p.pod(), p.takenAs}},
		{"repair", w.scripts.maintain, []any{p.length, "1"}},
	}).Draw(w.t, "command")
}

// playRepeat sends a command twice. The second one must change nothing.
func (w *world) playRepeat() {
	p := w.pick((*actor).alive)
	what := rapid.IntRange(0, 2).Draw(w.t, "what")
	once := func() { w.act(p) }
	switch {
	case what == 1:
		once = func() {
			w.giveBack(p)
			p.waiting, p.holding = false, false
		}
	case what == 2:
		once = func() {
			w.maintain(w.length, true, w.settings[0])
		}
	}
	once()
	second, waiting, reachable, before := w.second, p.waiting, p.reachable, w.last
	if what == 0 && p.holding { // p asks for the token that it already has
		w.try(p)
		before = w.last
	}
	once()
	again := p.kept && p.gaveUp // it was put in line again, and a loan does not count for it
	if w.second == second && p.waiting == waiting && p.reachable == reachable && !again &&
		!before.inSeconds().equalButExpiry(w.last.inSeconds()) {
		w.fail("a repeated command of %s changed something", p.token)
	}
}

// playUnheard sends a request whose reply is lost. It is that of a waiter or of an
// admission. playRelease may give back the admission's token later.
func (w *world) playUnheard() {
	if rapid.Bool().Draw(w.t, "admission") {
		p := w.newPod()
		w.try(p)
		w.startHolding(p)
		p.silent = true
		return
	}
	p := w.pick(func(p *actor) bool { return p.alive() && p.waiting })
	p.missed = false
	p.due = w.now + p.pace
	w.try(p)
}

// playMissed lets a waiter miss a call for a token, which another pod may take. Then the
// waiter subscribes and asks again.
func (w *world) playMissed() {
	p := w.pick(func(p *actor) bool { return p.alive() && p.waiting && p.reachable })
	holder := w.pick(func(p *actor) bool { return p.alive() && p.holding })
	w.leave(p.token)
	p.reachable = false
	w.giveBack(holder)
	holder.holding = false
	w.playAdmission()
	w.connect(p)
	w.act(p)
}

// playLateBack takes Redis away for longer than a live waiter may be silent. Then a token
// comes free, and the second in line is back before the first.
func (w *world) playLateBack() {
	var line []*actor
	for _, token := range w.expected.inLine() {
		if p := w.pods[token]; p.alive() && p.waiting {
			line = append(line, p)
		}
	}
	holder := w.pick(func(p *actor) bool { return p.alive() && p.holding })
	if len(line) < 2 {
		w.t.SkipNow()
	}
	w.liveUntilAllCame()
	w.pass(w.quiet + lineQuiet)
	w.expected.guard = nil
	w.logf("Redis was away, and the first in line comes back late")
	for _, p := range w.order {
		if p.alive() {
			p.due = max(p.due, w.now+2)
		}
	}
	line[0].due = w.now + pollMost
	w.giveBack(holder)
	holder.holding = false
	w.live(2)
}

func (w *world) playMaintain() {
	length, newcomer := w.drawLength(), rapid.Bool().Draw(w.t, "newcomer")
	w.maintain(length, newcomer, w.drawSettings())
}

func (w *world) playLive() {
	seconds := []int{1, 3, w.quiet, w.quiet + 1, w.threshold + 1, w.threshold + w.quiet + 6}
	w.live(rapid.SampledFrom(seconds).Draw(w.t, "seconds"))
}

// playOutage takes Redis away. When Redis is back, commands come again within the time
// that retries take.
func (w *world) playOutage() {
	w.liveUntilAllCame()
	seconds := rapid.SampledFrom([]int{1, 5, w.quiet, w.quiet + 1, w.threshold + 1, 600}).Draw(w.t, "seconds")
	w.pass(seconds)
	w.expected.guard = nil // the server may be older when the first command comes
	w.logf("Redis was away for %d s", seconds)
	for _, p := range w.order {
		back := min(beatTimeout, p.settings.interval)
		if p.waiting {
			back = pollMost
		}
		if p.alive() && p.due < w.now {
			p.due = w.now + rapid.IntRange(0, back).Draw(w.t, "back after")
		}
	}
}

// playClock sets the clock of Redis.
func (w *world) playClock() {
	w.liveUntilAllCame()
	seconds := rapid.SampledFrom([]int{1, 5, 30, 600}).Draw(w.t, "seconds")
	if rapid.Bool().Draw(w.t, "back") {
		seconds = -seconds
	}
	w.step(seconds)
	w.expected.guard = nil
	w.logf("Redis's clock is set by %d s", seconds)
}

func (w *world) playLoss() {
	w.liveUntilAllCame()
	w.loseAll()
	lost := w.expected
	w.expected = newKnowledge()
	if rapid.Bool().Draw(w.t, "another server takes its place") {
		w.started = int(w.second)
		w.setStarted(w.second)
		w.expected.guard = w.newGuard(lost)
	}
	w.last = w.dump()
	w.logf("Redis has lost its data; it started %d s ago", int(w.second)-w.started)
}

// playFailover promotes a replica that lacks the last few commands.
func (w *world) playFailover() {
	w.liveUntilAllCame()
	w.replicate()
	w.replicated = w.expected.clone()
	start := w.now
	for range rapid.IntRange(1, 3).Draw(w.t, "commands") {
		play := []func(){w.playAdmission, w.playWaiter, w.playAct, w.playRelease, w.playMaintain, w.playTurn}
		rapid.SampledFrom(play).Draw(w.t, "command")()
		if w.now > start {
			break
		}
	}
	w.failover()
	w.reign()
	w.disconnect()
	w.reigns++
	w.expected, w.replicated = w.replicated, nil
	w.expected.guard = nil
	w.last = w.dump()
	w.logf("a replica took over that lacks all commands since %d s", start)
}

// playRestart restarts Redis, which loses nothing but its connections.
func (w *world) playRestart() {
	w.liveUntilAllCame()
	w.reign()
	w.disconnect()
	w.reigns++
	w.logf("Redis was restarted")
}
