package chaos

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// These are the rules that the README and docs/ promise. Redis must count each pod with a
// token. The only excuses are a loss of data or a silence of the pod, at about that time.

const (
	// noticeDelay limits the time until this test learns that a sidecar has its token.
	noticeDelay = 3 * time.Second

	// recent is the age of writes that Redis may lose in a failover.
	recent = 1500 * time.Millisecond

	// slack allows for dozens of processes on two cores.
	slack = 2 * time.Second

	// taken limits the time until an entitled pod takes a free token: by a call, or by
	// its next request three seconds later, and after a repair; or after the pods ahead
	// of it died.
	taken = 5*time.Second + slack

	// viewTime is how long a gate acts on what it knows of the pods, if the API server is
	// silent.
	viewTime = 30 * time.Second

	// takenCalm is taken after pods ahead died whose connections were closed, and without
	// a fault.
	takenCalm = time.Second + slack
)

// violation is a broken rule.
type violation struct {
	rule      string
	semaphore string
	at        time.Duration
	text      string
}

func (v violation) String() string {
	return fmt.Sprintf("%s, %s at %.2f s: %s", v.rule, v.semaphore, v.at.Seconds(), v.text)
}

const (
	ruleCount   = "never more at work than the length"
	ruleLetIn   = "nobody is let in while the length is used up"
	ruleLifted  = "no gate is lifted while the length is used up"
	ruleOrder   = "first come, first served"
	ruleUnused  = "no free token stays unused"
	ruleDecided = "admissions are decided"
	ruleFree    = "nobody is refused where a token is free"
	ruleGaveUp  = "no app of a pod that gave up runs"
	ruleOver    = "no pod gives up before its time"
)

// owner.go has the rules about settings.

// excuse is a reason why Redis may not count a pod, and its span.
type excuse struct {
	span
	pod  string
	text string
}

// checker checks a history.
type checker struct {
	*history
	excuses     map[*podLife][]excuse
	found       []violation
	over, total time.Duration   // time with more pods at work than the length; with any
	named       map[string]bool // the excuses that explain over
	byKind      map[string][]setting
}

// check returns a checker with the rules that a history breaks.
func check(h *history) *checker {
	c := &checker{history: h, excuses: map[*podLife][]excuse{}, named: map[string]bool{}}
	groups := map[string][]*podLife{}
	for _, p := range h.pods {
		if p.took.to != 0 && p.waits {
			p.took.from = max(p.asked, c.earliest(p, p.took))
		}
		if p.lifted.to != 0 {
			p.lifted.from = max(p.asked, c.earliest(p, p.lifted))
		}
		c.excuses[p] = c.excusesOf(p)
		groups[p.semaphore] = append(groups[p.semaphore], p)
	}
	for _, pods := range groups {
		for _, p := range pods {
			p.limit = c.limitOf(pods, p, p.took)
		}
		c.checkCount(pods)
		c.checkLetIn(pods)
		c.checkLifted(pods)
		c.checkOrder(pods)
		c.checkUnused(pods)
		c.checkRefused(pods)
		c.checkDecided(pods)
		c.checkGaveUp(pods)
		c.checkSettings(pods)
		c.checkWarnings(pods)
	}
	slices.SortFunc(c.found, func(a, b violation) int { return int(a.at - b.at) })
	return c
}

func (c *checker) fail(rule, semaphore string, at time.Duration, format string, args ...any) {
	c.found = append(c.found, violation{rule, semaphore, at, fmt.Sprintf(format, args...)})
}

// quiet is the longest time between two heartbeats of a live holder.
func (c *checker) quiet() time.Duration { return c.interval + min(rig.BeatTimeout, c.interval) }

// backBy returns the time by which Redis surely counts a pod again after a loss or a
// silence that ended at that time. By then, both have worked long enough.
func (c *checker) backBy(p *podLife, at time.Duration) time.Duration {
	for again := true; again; {
		again = false
		disturbed := slices.Clone(p.silences)
		for _, f := range c.faults {
			if f.hits(p.semaphore) && (f.away || f.loses != losesNothing) {
				disturbed = append(disturbed, f.span)
			}
		}
		for _, d := range disturbed {
			if d.overlaps(span{at, at + c.quiet() + slack}) && d.to > at {
				at, again = d.to, true
			}
		}
	}
	return at + c.quiet() + slack
}

// earliest returns when Redis may first have given the pod its token. The reply may have
// arrived later.
func (c *checker) earliest(p *podLife, taken span) time.Duration {
	from := taken.from
	late := slices.Clone(p.silences)
	for _, f := range c.faults {
		delays := f.silent || f.away || f.recovering || f.loses != losesNothing || p.gated && (f.unlifted || f.blind)
		if delays && f.hits(p.semaphore) {
			late = append(late, f.span)
		}
	}
	for _, s := range late {
		if s.overlaps(span{taken.from - noticeDelay, taken.to}) {
			from = min(from, s.from)
		}
	}
	return from
}

// excusesOf returns the excuses for a pod.
func (c *checker) excusesOf(p *podLife) (all []excuse) {
	if p.took.to == 0 {
		return nil
	}
	add := func(from, to time.Duration, format string, args ...any) {
		all = append(all, excuse{span{from, to}, p.name, fmt.Sprintf(format, args...)})
	}
	for _, f := range c.faults {
		switch {
		case !f.hits(p.semaphore):
		case f.loses == losesAll && p.took.from <= f.to:
			add(f.from, c.backBy(p, f.to), "Redis lost it: %s", f)
		case f.loses == losesByStart && p.took.from <= f.to &&
			slices.ContainsFunc(p.silences, span{f.from - c.quiet() - slack, f.to + c.quiet() + slack}.overlaps):
			add(f.from, c.backBy(p, f.to), "Redis lost it, and it came back late: %s", f)
		case f.loses == losesRecent && p.took.overlaps(span{f.from - recent, f.to}):
			add(f.from-recent, c.backBy(p, f.to), "Redis lost it: %s", f)
		}
	}
	silences := slices.Clone(p.silences)
	if p.died != notYet {
		silences = append(silences, span{p.died, unending})
	}
	if p.started == notYet { // its sidecar may not run, or may not have confirmed
		silences = append(silences, span{p.took.from, unending})
	}
	slices.SortFunc(silences, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	for i := 0; i < len(silences); i++ {
		s := silences[i]
		// Redis may have had no heartbeat between two silences.
		for i+1 < len(silences) && silences[i+1].from < s.to+c.quiet()+slack {
			i++
			s.to = max(s.to, silences[i].to)
		}
		// Redis may have been away before or after, too shortly to notice that itself.
		for _, f := range c.faults {
			if f.away && f.hits(p.semaphore) && f.overlaps(span{s.from - c.quiet() - slack, s.to + c.quiet() + slack}) {
				s.from, s.to = min(s.from, f.from), max(s.to, f.to)
			}
		}
		stale := s.from - c.interval - slack/2 + c.threshold
		if c.clockMayJump(p.semaphore, s) {
			stale -= c.quiet() // Redis notices no smaller jump, and takes it for time that has passed
		}
		if stale < s.to {
			add(stale, c.backBy(p, s.to), "%s was silent, %s", p.name, s)
		}
	}
	return all
}

// excuseWithin returns an excuse for a pod at some time within s.
func (c *checker) excuseWithin(p *podLife, s span) (e excuse, ok bool) {
	for _, e := range c.excuses[p] {
		if e.overlaps(s) {
			return e, true
		}
	}
	return e, false
}

// limitOf returns the greatest length that may have counted for a pod in a span: what the
// owner set, or else what pods ask for.
func (c *checker) limitOf(pods []*podLife, p *podLife, s span) int {
	return slices.Max(c.inForce(p.semaphore, s, c.askedFor(pods, p, s)))
}

// leastOf returns the least length that may have counted for a pod alone in a span.
func (c *checker) leastOf(p *podLife, s span) int {
	return slices.Min(c.inForce(p.semaphore, s, p.length))
}

// askedFor returns the greatest length that may have counted for a pod in a span if
// nothing was set: its own, that of a pod behind it in line, or that of a pod that asked
// lately, while the pod was in line.
func (c *checker) askedFor(pods []*podLife, p *podLife, s span) int {
	limit := p.length
	for _, q := range pods {
		word := q.answered
		if q.waits {
			word = min(cmp.Or(q.took.to, unending), c.ended(q))
		}
		if q.asked <= s.to && word >= p.asked && word+rig.LinePatience+rig.LineQuiet >= s.from {
			limit = max(limit, q.length)
		}
	}
	return limit
}

// fits reports whether pods could all get their tokens, one after another, if for each at
// most its limit counts.
func fits(pods []*podLife) bool {
	used := 0
	for _, p := range slices.SortedFunc(slices.Values(pods), func(a, b *podLife) int { return cmp.Compare(a.limit, b.limit) }) {
		if used += max(1, p.tokens); used > p.limit {
			return false
		}
	}
	return true
}

// tokensOf returns the number of tokens that pods have, or need.
func tokensOf(pods ...*podLife) (n int) {
	for _, p := range pods {
		n += max(1, p.tokens)
	}
	return n
}

func names(pods []*podLife) string {
	var all []string
	for _, p := range pods {
		text := fmt.Sprintf("%s (length %d)", p.name, p.length)
		if p.tokens > 1 {
			text = fmt.Sprintf("%s (length %d, %d tokens)", p.name, p.length, p.tokens)
		}
		all = append(all, text)
	}
	return strings.Join(all, ", ")
}

// checkCount checks the pods at work at each moment. Without the excused pods, their
// number must not exceed their lengths.
func (c *checker) checkCount(pods []*podLife) {
	var moments []time.Duration
	for _, p := range pods {
		if p.started != notYet {
			moments = append(moments, p.started, min(c.end, max(p.ended, p.died)))
		}
	}
	slices.Sort(moments)
	for i, at := range moments {
		next := c.end
		if i+1 < len(moments) {
			next = moments[i+1]
		}
		var working, sure []*podLife
		var because []excuse
		for _, p := range pods {
			if !p.works(at) {
				continue
			}
			working = append(working, p)
			if p.runs {
				because = append(because, excuse{span{at, at}, p.name, "it may run beyond the length"})
				continue
			}
			if e, ok := c.excuseWithin(p, span{p.took.from, at}); ok {
				because = append(because, e)
				continue
			}
			sure = append(sure, p)
		}
		if len(working) > 0 {
			c.total += next - at
		}
		if !fits(working) {
			c.over += next - at
			for _, e := range because {
				c.named[fmt.Sprintf("%s: %s", e.pod, e.text)] = true
			}
		}
		if !fits(sure) {
			c.fail(ruleCount, pods[0].semaphore, at,
				"%d are at work, and neither loss nor silence explains it: %s", len(sure), names(sure))
			return // later moments give the same result
		}
	}
}

// certain returns the pods that surely had a token during all of s and that Redis had to
// count, except for but.
func (c *checker) certain(pods []*podLife, s span, but ...*podLife) (all []*podLife) {
	for _, p := range pods {
		if slices.Contains(but, p) || !p.holds(s) {
			continue
		}
		if _, ok := c.excuseWithin(p, s); !ok {
			all = append(all, p)
		}
	}
	return all
}

// checkLetIn checks each moment in which a pod took a token. Holders that had rejoined by
// then count: so an overshoot ends by itself.
func (c *checker) checkLetIn(pods []*podLife) {
	for _, p := range pods {
		if p.took.to == 0 || p.runs {
			continue
		}
		if others := c.certain(pods, p.took, p); tokensOf(others...)+tokensOf(p) > p.limit {
			c.fail(ruleLetIn, p.semaphore, p.took.to,
				"%s of length %d, for which at most %d counts, took a token within %s, when %d had one: %s",
				p.name, p.length, p.limit, p.took, len(others), names(others))
		}
	}
}

// checkLifted is checkLetIn for the moments in which a gate lifted a scheduling gate.
func (c *checker) checkLifted(pods []*podLife) {
	for _, p := range pods {
		if p.lifted.to == 0 || p.runs {
			continue
		}
		if others := c.certain(pods, p.lifted, p); tokensOf(others...)+tokensOf(p) > c.limitOf(pods, p, p.lifted) {
			c.fail(ruleLifted, p.semaphore, p.lifted.to,
				"the gate of %s of length %d was lifted for a token taken within %s, when %d had one: %s",
				p.name, p.length, p.lifted, len(others), names(others))
		}
	}
}

// checkOrder checks each moment in which a pod took the last token while another pod was
// surely before it in line.
func (c *checker) checkOrder(pods []*podLife) {
	for _, q := range pods {
		if q.took.to == 0 || q.runs {
			continue
		}
		for _, p := range pods {
			if p == q || p.inLine == notYet || p.inLine-p.headStart > q.asked-q.headStart || p.inLine > q.took.from ||
				p.took.to != 0 && p.took.from <= q.took.to {
				continue
			}
			if tokensOf(p) > 1 && tokensOf(p) > c.leastOf(p, q.took) { // it needs more than the length
				continue
			}
			if c.leaves(p) <= q.took.to || c.displaced(p, q.took.to) || c.mayPass(q, p) ||
				q.waits && c.reordered(p, q.took.to) {
				continue
			}
			others := c.certain(pods, q.took, p, q)
			if tokensOf(others...)+tokensOf(p, q) > c.limitOf(pods, p, q.took) {
				c.fail(ruleOrder, q.semaphore, q.took.to, "%s, which asked at %.2f s, took the last token "+
					"within %s, and %s was in line since %.2f s; %d had one: %s",
					q.name, q.asked.Seconds(), q.took, p.name, p.inLine.Seconds(), len(others), names(others))
			}
		}
	}
}

// mayPass reports whether a gated pod may pass a pod that was in line before it. A gated
// pod's place is the second of its creation, by the API server's clock, then its name. A
// pod whose sidecar waits joined by the clock of Redis.
func (c *checker) mayPass(q, p *podLife) bool {
	recovering := func(f fault) bool { return f.recovering && f.from <= q.took.to }
	return q.gated && (p.inLine-p.headStart+time.Second > q.asked-q.headStart ||
		!p.gated && slices.ContainsFunc(c.faults, recovering))
}

// ended returns when a pod ended, by itself or not.
func (c *checker) ended(p *podLife) time.Duration {
	end := unending
	for _, at := range []time.Duration{p.ended, p.died} {
		if at != notYet {
			end = min(end, at)
		}
	}
	return end
}

// reordered reports whether others in line may pass a pod whose sidecar waits: Redis has
// lost its data, and made the line again of arrivals by different clocks.
func (c *checker) reordered(p *podLife, at time.Duration) bool {
	since := func(from time.Duration, is func(f fault) bool) bool {
		return slices.ContainsFunc(c.faults, func(f fault) bool {
			return f.hits(p.semaphore) && is(f) && f.to >= from && f.from <= at
		})
	}
	return !p.gated && since(p.inLine-recent, func(f fault) bool { return f.loses != losesNothing }) &&
		since(p.asked, func(f fault) bool { return f.away || f.recovering })
}

// leaves returns from when on a pod may be out of the line: it ended, or its time was over.
func (c *checker) leaves(p *podLife) time.Duration {
	end := c.ended(p)
	if p.wait == 0 {
		return end
	}
	if c.clocksMayDiffer(p) {
		return min(end, p.asked)
	}
	return min(end, p.asked+p.wait-time.Second) // the place of a gated pod has whole seconds
}

// clocksMayDiffer reports whether Redis may have counted another time in line than this test:
// its clock was set meanwhile; or, for a gated pod, before, as the API server has another.
func (c *checker) clocksMayDiffer(p *podLife) bool {
	since := span{p.asked - time.Second, p.asked + p.wait + slack}
	if p.gated {
		since.from = 0
	}
	return c.clockMayJump(p.semaphore, since)
}

// checkGaveUp checks the pods whose time in line was over.
func (c *checker) checkGaveUp(pods []*podLife) {
	for _, p := range pods {
		switch {
		case p.gaveUp == notYet:
		case p.started != notYet || p.took.to > p.gaveUp || p.lifted.to > p.gaveUp:
			c.fail(ruleGaveUp, p.semaphore, max(p.started, p.took.to, p.lifted.to), "%s gave up at %.2f s, and has a token or works",
				p.name, p.gaveUp.Seconds())
		case p.wait == 0 || p.runs || !c.clocksMayDiffer(p) && p.gaveUp < p.asked+p.wait-time.Second:
			c.fail(ruleOver, p.semaphore, p.gaveUp, "%s, which %s, asked at %.2f s, and gave up", p.name, p.manner(),
				p.asked.Seconds())
		}
	}
}

// displaced reports whether others may pass a pod in line at a time: Redis may have lost
// its data shortly before, or the pod may have been unable to ask or to hear.
func (c *checker) displaced(p *podLife, at time.Duration) bool {
	const again = rig.PollMost + slack // a waiter asks again
	for _, f := range c.faults {
		if f.hits(p.semaphore) && f.loses != losesNothing && f.to >= p.inLine-recent &&
			f.from <= at && at <= f.to+again+c.threshold {
			return true
		}
		if f.hits(p.semaphore) && (f.silent || p.gated && f.blind) && f.from <= at && at <= f.to+again {
			return true
		}
	}
	for _, s := range p.silences {
		if s.from <= at && at <= s.to+again {
			return true
		}
	}
	return false
}
