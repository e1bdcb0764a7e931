package chaos

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The kinds of settings, as the script set knows them.
const (
	kindLimit    = "limit"
	kindOverride = "override"
)

// unset is the length of a setting that sets none.
const unset = -1

// setting is a command of an owner, or a later look at what is set. A look at a missing
// limit is not sure: pods may tell Redis the limit that it has lost.
type setting struct {
	span            // from the command until its reply; without a reply, until Redis refuses the command
	semaphore, kind string
	length          int           // unset: none
	lasts           time.Duration // of an override, from the moment of the command
	sure            bool          // it was surely in force when the span ended
	look            bool
}

func (s setting) String() string {
	switch {
	case s.length == unset:
		return "no " + s.kind
	case s.kind == kindLimit:
		return fmt.Sprintf("the limit %d", s.length)
	}
	return fmt.Sprintf("an override of %d for %s", s.length, s.lasts)
}

// sighting is the line of a semaphore, as an owner saw it.
type sighting struct {
	span
	semaphore string
	pods      []string // their names
}

// warning is a warning or an error that a process logged about a semaphore.
type warning struct {
	at        time.Duration
	semaphore string
	text      string
}

// owner sets the limit of a semaphore, and overrides. Each second, it looks at what is
// set, and sets its limit again if Redis has another. Its connections are its own: the
// nemesis uses those of the servers.
type owner struct {
	w         *world
	semaphore string
	id        rig.ID
	rng       *rand.Rand
	servers   []*rig.Redis // the last holder first
	limit     int          // that it set last
}

const (
	// setWithin is the time after which Redis refuses a command of an owner.
	setWithin = 2 * time.Second

	// ownerPatience limits the time until a server answers an owner.
	ownerPatience = time.Second

	// keptFor is the time to live of a limit.
	keptFor = 10 * time.Minute
)

// startOwners starts the owners of two semaphores. stop ends them, and clears what they
// set.
func (w *world) startOwners(seed uint64) (stop func()) {
	var owners sync.WaitGroup
	end := make(chan struct{})
	for i, name := range []string{"shop/two", "shop/some"} {
		o := &owner{w: w, semaphore: name, id: rig.ParseID(name), rng: rand.New(rand.NewPCG(seed, 1<<33+uint64(i))),
			servers: slices.Clone(w.queue.data()), limit: unset}
		owners.Go(func() { o.work(end) })
	}
	return func() {
		close(end)
		owners.Wait()
	}
}

// work sets lengths until the end, and then none.
func (o *owner) work(end <-chan struct{}) {
	for next := time.Duration(0); ; {
		select {
		case <-time.After(time.Second):
		case <-end:
			o.clear()
			return
		}
		limit, err := o.look()
		switch {
		case err != nil:
		case limit != o.limit:
			o.set(kindLimit, o.limit, keptFor)
		case o.w.now() > next:
			next = o.w.now() + o.change() + 2*time.Second + within(o.rng, 4*time.Second)
		}
	}
}

// change sets or clears the limit or an override, and returns how long that stays at
// least. A limit of 0 does not stay.
func (o *owner) change() time.Duration {
	switch k := o.rng.IntN(7); {
	case o.limit == 0, k == 0:
		o.set(kindLimit, 1+o.rng.IntN(5), keptFor)
	case k == 1:
		o.set(kindLimit, o.rng.IntN(6), keptFor)
	case k == 2:
		o.set(kindLimit, unset, 0)
	case k == 3:
		o.set(kindOverride, unset, 0)
	default:
		lasts := time.Duration(2+o.rng.IntN(14)) * time.Second
		o.set(kindOverride, max(0, o.rng.IntN(8)-2), lasts)
		return lasts * time.Duration(o.rng.IntN(2)) // some end by themselves
	}
	return 0
}

// clear clears what is set.
func (o *owner) clear() {
	const tries = 60
	for range tries {
		if o.set(kindLimit, unset, 0) && o.set(kindOverride, unset, 0) {
			return
		}
		time.Sleep(time.Second)
	}
	o.w.complain("the settings of %s cannot be cleared", o.semaphore)
}

// set sets a length for a time, and reports whether Redis has confirmed that.
func (o *owner) set(kind string, length int, lasts time.Duration) bool {
	if kind == kindLimit {
		o.limit = length
	}
	text := strconv.Itoa(length)
	if length == unset {
		text = ""
	}
	err := o.ask(func(conn redis.Conn) error {
		now, err := redis.Ints(conn.Do("TIME"))
		if err != nil {
			return err
		}
		deadline := int64(now[0])*1e6 + int64(now[1]) + setWithin.Microseconds()
		noted := o.note(setting{span: span{o.w.now(), unending}, semaphore: o.semaphore, kind: kind, length: length,
			lasts: lasts})
		reply, err := rig.RunScript(conn, rig.Script("set"), o.id, deadline, timing, kind, text,
			int(lasts/time.Second), "a note", "an owner")
		if err == nil && reply.Status == rig.StatusLate {
			err = errors.New("the command came late")
		}
		if refused := redis.Error(""); err != nil && !errors.As(err, &refused) {
			time.Sleep(noted.from + setWithin + slack - o.w.now()) // until then it may have an effect
		}
		o.w.mu.Lock()
		defer o.w.mu.Unlock()
		noted.to, noted.sure = o.w.now(), err == nil
		if kind == kindOverride && noted.sure { // Redis ends it at a full second
			noted.lasts -= time.Duration(reply.Micros%1e6) * time.Microsecond
		}
		return err
	})
	return err == nil
}

// note adds a setting to the history.
func (o *owner) note(s setting) *setting {
	o.w.mu.Lock()
	defer o.w.mu.Unlock()
	o.w.settings = append(o.w.settings, &s)
	return &s
}

// look notes what is set and who is in line, and returns the limit.
func (o *owner) look() (limit int, err error) {
	var now float64
	var set []any
	var tokens []string
	var from, to time.Duration
	err = o.ask(func(conn redis.Conn) error {
		from = o.w.now()
		time, err := redis.Float64s(conn.Do("TIME"))
		if err == nil {
			now = time[0] + time[1]/1e6
			set, err = redis.Values(conn.Do("HMGET", o.id.StateKey(), "limit", "override", "ends"))
		}
		if err == nil {
			tokens, err = redis.Strings(conn.Do("ZRANGE", o.id.WaitersKey(), 0, -1))
		}
		to = o.w.now()
		return err
	})
	if err != nil {
		return unset, err
	}
	seen := setting{span: span{from, to}, semaphore: o.semaphore, kind: kindLimit, length: unset, look: true,
		sure: set[0] != nil}
	override := seen
	override.kind, override.sure = kindOverride, true
	if text, _ := redis.String(set[0], nil); text != "" {
		if seen.length, err = strconv.Atoi(text); err != nil {
			return unset, err
		}
	}
	if ends, _ := redis.Float64(set[2], nil); ends >= math.Floor(now)+1 {
		override.length, err = redis.Int(set[1], nil)
		override.lasts = time.Duration((ends - now) * float64(time.Second))
	}
	o.note(seen)
	o.note(override)
	o.noteLine(span{from, to}, tokens)
	return seen.length, err
}

// noteLine adds a line to the history.
func (o *owner) noteLine(s span, tokens []string) {
	seen := sighting{span: s, semaphore: o.semaphore}
	o.w.mu.Lock()
	defer o.w.mu.Unlock()
	for _, p := range o.w.pods {
		p.mu.Lock()
		if slices.Contains(tokens, p.uid) {
			seen.pods = append(seen.pods, p.life.name)
		}
		p.mu.Unlock()
	}
	o.w.lines = append(o.w.lines, seen)
}

// ask runs do at the server that holds the semaphore. If that server refuses, ask tries
// the others.
func (o *owner) ask(do func(conn redis.Conn) error) error {
	last := errors.New("there is no master")
	for i, s := range o.servers {
		conn, err := redis.Dial("tcp", s.Address, redis.DialConnectTimeout(ownerPatience),
			redis.DialReadTimeout(ownerPatience), redis.DialWriteTimeout(ownerPatience))
		if err != nil {
			continue
		}
		defer conn.Close()
		if role, err := redis.Values(conn.Do("ROLE")); err != nil || string(role[0].([]byte)) != "master" {
			continue
		}
		err = do(conn)
		if refused := redis.Error(""); errors.As(err, &refused) {
			last = err
			continue
		}
		if err == nil {
			o.servers[0], o.servers[i] = s, o.servers[0]
		}
		return err
	}
	return last
}

// readNamedWarning is readWarning for a log of all semaphores.
func (w *world) readNamedWarning(line string) {
	for _, name := range w.semaphores() {
		if strings.Contains(line, `"key":"`+rig.ParseID(name).Key+`"`) {
			w.readWarning(name, line)
		}
	}
}

// readWarning notes a line of a log about a semaphore if it is a warning or an error, but
// not of a server that does not answer: this machine may be slow.
func (w *world) readWarning(semaphore, line string) {
	if !strings.Contains(line, `"level":"WARN"`) && !strings.Contains(line, `"level":"ERROR"`) {
		return
	}
	for _, reason := range []string{"no answer", "i/o timeout", "asking Sentinel"} {
		if strings.Contains(line, reason) {
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.warnings = append(w.warnings, warning{w.now(), semaphore, line})
}

// The rules about settings.
const (
	ruleStays  = "what is set stays set"
	rulePlaces = "nobody alive is dropped from the line"
	rulePause  = "a pause causes no error"
)

// takenAfter is taken after an override that ended by itself: the first in line knows
// when that is.
const takenAfter = 2*time.Second + slack

// inForce returns the lengths that may have counted for a semaphore at some time in a
// span, as its owner set them. asked stands for none.
func (c *checker) inForce(semaphore string, s span, asked int) (all []int) {
	limits := c.mayBeSet(c.settingsOf(semaphore, kindLimit), s)
	for _, length := range c.mayBeSet(c.settingsOf(semaphore, kindOverride), s) {
		if length != unset {
			all = append(all, length)
		} else {
			all = append(all, limits...)
		}
	}
	for i, length := range all {
		if length == unset {
			all[i] = asked
		}
	}
	return all
}

// settingsOf returns the settings of one kind of a semaphore, in their order.
func (c *checker) settingsOf(semaphore, kind string) []setting {
	if c.byKind == nil {
		c.byKind = map[string][]setting{}
		for _, s := range c.settings {
			c.byKind[s.semaphore+" "+s.kind] = append(c.byKind[s.semaphore+" "+s.kind], s)
		}
	}
	return c.byKind[semaphore+" "+kind]
}

// mayBeSet returns the lengths that settings of one kind may have set at some time in a
// span: those within the span, and the last sure one before. What Redis may have lost
// does not replace the earlier ones.
func (c *checker) mayBeSet(settings []setting, s span) (all []int) {
	for i, r := range slices.Backward(settings) {
		if r.from > s.to {
			continue
		}
		ends := span{r.from + r.lasts, r.to + r.lasts}
		jumped := r.kind == kindOverride && c.clockMayJump(r.semaphore, span{r.from, s.to})
		if r.kind == kindLimit || r.length == unset || jumped {
			ends.to = unending
		}
		if s.from <= ends.to {
			all = append(all, r.length)
		}
		if r.kind == kindOverride && (ends.from <= s.to || ends.to == unending) {
			all = append(all, unset)
		}
		revives := r.look && r.length == unset && jumped // an override that ended lives again if the clock is set back
		if !r.sure || r.to > s.from || revives {
			continue
		}
		switch c.lostSetting(r, s.to) {
		case losesNothing:
			return all
		case losesAll: // waiting pods remember a limit
			for _, before := range settings[:i] {
				if r.kind == kindLimit {
					all = append(all, before.length)
				}
			}
			return append(all, unset)
		}
	}
	return append(all, unset)
}

// lostSetting returns what Redis may have lost of a setting until a time: losesAll, with
// all others; losesRecent, without some earlier ones; or losesNothing.
func (c *checker) lostSetting(r setting, until time.Duration) loss {
	lost := losesNothing
	for _, f := range c.faults {
		switch {
		case !f.hits(r.semaphore) || f.loses == losesNothing:
		case f.loses != losesRecent && f.overlaps(span{r.from, until}):
			return losesAll
		case f.loses == losesRecent && r.overlaps(span{f.from - recent, f.to}):
			lost = losesRecent
		}
	}
	return lost
}

// clockMayJump reports whether a semaphore may have changed to another clock in a span.
func (c *checker) clockMayJump(semaphore string, s span) bool {
	return slices.ContainsFunc(c.faults, func(f fault) bool {
		return f.hits(semaphore) && (f.recovering || f.away || f.loses != losesNothing) && f.overlaps(s)
	})
}

// overrideEnded reports whether an override ended by itself in a span, and no fault
// delays the pods in line until a time.
func (c *checker) overrideEnded(semaphore string, s span, until time.Duration) bool {
	around := span{s.from - rig.LinePatience, until}
	delays := func(f fault) bool {
		return f.hits(semaphore) && (f.silent || f.unlifted || f.blind) && f.overlaps(around)
	}
	if slices.ContainsFunc(c.faults, delays) {
		return false
	}
	commands := slices.DeleteFunc(slices.Clone(c.settingsOf(semaphore, kindOverride)),
		func(r setting) bool { return r.look })
	for i, r := range commands {
		end := r.to + r.lasts
		replaced := i+1 < len(commands) && commands[i+1].from <= end
		if r.sure && r.length != unset && s.from <= end && end <= s.to && !replaced &&
			!c.clockMayJump(semaphore, span{r.from, end}) {
			return true
		}
	}
	return false
}

// checkSettings checks what owners saw: no setting was lost without a loss of data, and
// no pod lost its place. An owner may have seen an empty server, where nothing is set.
func (c *checker) checkSettings(pods []*podLife) {
	semaphore := pods[0].semaphore
	for _, kind := range []string{kindLimit, kindOverride} {
		settings := c.settingsOf(semaphore, kind)
		for i, r := range settings {
			emptied := slices.ContainsFunc(c.faults, func(f fault) bool {
				return f.emptied && f.hits(semaphore) && f.overlaps(r.span)
			})
			if !r.look || emptied && r.length == unset {
				continue
			}
			if may := c.mayBeSet(settings[:i], r.span); !slices.Contains(may, r.length) {
				c.fail(ruleStays, semaphore, r.to, "Redis has %s; the lengths that may be set are %v", r, may)
				break
			}
		}
	}
	disturbed := c.disturbed(semaphore)
	for _, l := range c.lines {
		if l.semaphore != semaphore || slices.ContainsFunc(disturbed, l.overlaps) {
			continue
		}
		for _, p := range pods {
			stands := p.waits && p.inLine != notYet && p.inLine < l.from && c.leaves(p) > l.to &&
				(p.took.to == 0 || p.took.from > l.to) && (p.lifted.to == 0 || p.lifted.from > l.to)
			if stands && !c.displaced(p, l.from) && !slices.Contains(l.pods, p.name) {
				c.fail(rulePlaces, semaphore, l.to, "%s is in line since %.2f s, and Redis knows only %v",
					p.name, p.inLine.Seconds(), l.pods)
				return
			}
		}
	}
}

// checkWarnings finds warnings and errors in a pause that no recent fault explains.
func (c *checker) checkWarnings(pods []*podLife) {
	const while = 10 * time.Second
	for _, w := range c.warnings {
		before := span{w.at - while, w.at}
		paused := slices.Max(c.inForce(w.semaphore, span{w.at - slack, w.at}, math.MaxInt)) == 0
		fault := slices.ContainsFunc(c.faults, func(f fault) bool { return f.overlaps(before) })
		if w.semaphore != pods[0].semaphore || !paused || fault || !c.calm(pods, before) {
			continue
		}
		c.fail(rulePause, w.semaphore, w.at, "a process logged in a pause: %s", w.text)
	}
}
