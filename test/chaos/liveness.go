package chaos

import (
	"cmp"
	"slices"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// disturbed returns the spans in which a semaphore's queue was away, needed a command
// from each pod first, or could not be repaired.
func (c *checker) disturbed(semaphore string) (all []span) {
	for _, f := range c.faults {
		if !f.hits(semaphore) {
			continue
		}
		switch {
		case f.away || f.recovering || f.loses != losesNothing:
			all = append(all, span{f.from - slack, f.to + max(c.quiet(), rig.LinePatience) + slack})
		case f.blind: // a gate retries its watch some seconds later
			all = append(all, span{f.from - slack, f.to + taken})
		case f.unrepaired:
			all = append(all, span{f.from - slack, f.to + 2*slack})
		}
	}
	return all
}

// occupies returns the spans in which a pod may keep a token from others, or may be
// giving it back.
func (c *checker) occupies(p *podLife) (all []span) {
	stale := c.threshold + slack + time.Second // after its last heartbeat
	const passed = 5 * time.Second             // others pass it in line
	switch {
	case p.took.to != 0 || p.lifted.to != 0:
		end, from := unending, p.took.from
		if p.lifted.to != 0 {
			from = p.lifted.from
		}
		if p.released != notYet {
			end = p.released
		}
		if p.died != notYet {
			end = min(end, p.died+stale)
		}
		all = append(all, span{from, c.kept(p, end)})
	case !p.waits && !p.refused:
		all = append(all, span{p.asked, cmp.Or(p.answered, c.end) + stale + slack})
	case !p.waits:
		all = append(all, span{p.asked, p.answered})
	}
	if p.waits {
		if p.inLine == notYet && p.took.to == 0 { // it may be in line
			all = append(all, span{p.asked, min(c.end, c.ended(p)+passed)})
		}
		if p.ended != notYet && p.took.to == 0 && !p.gated {
			all = append(all, span{p.ended, cmp.Or(p.released, c.end) + slack})
		}
		// A gate may have taken a token for it, and must learn of its deletion.
		if p.gated && p.ended != notYet && p.lifted.to == 0 {
			all = append(all, span{p.ended - noticeDelay, c.kept(p, p.ended+taken)})
		}
		for _, s := range p.silences {
			all = append(all, span{s.from, min(s.to, s.from+passed) + slack})
		}
	}
	return all
}

// kept returns until when a gated pod may keep a token that others could have at a time:
// a gate that is cut off from the API server keeps it while its view may be old.
func (c *checker) kept(p *podLife, at time.Duration) time.Duration {
	for _, f := range c.faults {
		if p.gated && f.outdated && f.overlaps(span{c.ended(p), at}) {
			at = max(at, min(f.to+taken, f.from+viewTime)+c.threshold+2*slack)
		}
	}
	return at
}

// calm reports whether no fault and no silence of a pod disturbs a semaphore in a span.
func (c *checker) calm(pods []*podLife, s span) bool {
	return !slices.ContainsFunc(c.faults, func(f fault) bool { return f.hits(pods[0].semaphore) && f.overlaps(s) }) &&
		!slices.ContainsFunc(pods, func(p *podLife) bool { return slices.ContainsFunc(p.silences, s.overlaps) })
}

// checkUnused finds spans in which a pod in line was entitled to a token that no other
// pod could have. A free token that a pod takes in time does not count: this test may
// learn of that after noticeDelay. The time begins anew when a pod dies in line.
func (c *checker) checkUnused(pods []*podLife) {
	const step = 250 * time.Millisecond
	disturbed := c.disturbed(pods[0].semaphore)
	occupied := map[*podLife][]span{}
	for _, p := range pods {
		occupied[p] = c.occupies(p)
	}
	in := func(spans []span, at time.Duration) bool {
		return slices.ContainsFunc(spans, func(s span) bool { return s.from <= at && at <= s.to })
	}
	var since, death time.Duration
	for at := time.Duration(0); at < c.end; at += step {
		used, heaviest := 0, 1
		var waiter *podLife
		for _, p := range pods {
			if p.asked == notYet || p.asked > at {
				continue
			}
			if in(occupied[p], at) {
				used += tokensOf(p)
			}
			if p.died != notYet && p.took.to == 0 && at-step < p.died && p.died <= at {
				since, death = at, at
			}
		}
		for _, p := range pods {
			waits := p.inLine != notYet && p.inLine <= at && at < c.leaves(p) &&
				(p.took.to == 0 || at < p.took.from) && !in(occupied[p], at)
			if waits && (waiter == nil || p.length > waiter.length) {
				waiter = p
			}
			if waits {
				heaviest = max(heaviest, tokensOf(p))
			}
		}
		// Redis may keep the free tokens for a pod that needs several.
		if in(disturbed, at) || waiter == nil || used+heaviest > c.leastOf(waiter, span{at - step, at}) {
			since = at
			continue
		}
		most := taken
		if death != 0 && at-death < rig.LinePatience && c.calm(pods, span{death - rig.LinePatience, at}) {
			most = takenCalm
		} else if c.overrideEnded(waiter.semaphore, span{since - step, since}, at) {
			most = takenAfter
		}
		if at-since > most {
			c.fail(ruleUnused, waiter.semaphore, at,
				"%s of length %d waits, %d tokens can be in use, and one more was free for %s",
				waiter.name, waiter.length, used, at-since)
			return
		}
	}
}

// checkRefused finds pods that the webhook refused although tokens were free: fewer than
// the length could be in use or awaited.
func (c *checker) checkRefused(pods []*podLife) {
	disturbed := c.disturbed(pods[0].semaphore)
	for _, p := range pods {
		if !p.refused {
			continue
		}
		asks := span{p.asked, p.answered}
		if slices.ContainsFunc(disturbed, asks.overlaps) {
			continue
		}
		used := 0
		for _, q := range pods {
			if q == p {
				continue
			}
			occupies := slices.ContainsFunc(c.occupies(q), asks.overlaps)
			waits := q.waits && asks.overlaps(span{q.asked, c.ended(q) + taken}) &&
				(q.took.to == 0 || q.took.to >= asks.from)
			if occupies || waits {
				used += tokensOf(q)
			}
		}
		if used < c.leastOf(p, asks) {
			c.fail(ruleFree, p.semaphore, p.answered,
				"%s of length %d was refused, and at most %d others had a token or waited",
				p.name, p.length, used)
		}
	}
}

// checkDecided finds admissions without an answer and without a recent fault. A busy
// machine may cause a few.
func (c *checker) checkDecided(pods []*podLife) {
	const few, while = 3, 10 * time.Second
	failed := 0
	for _, p := range pods {
		asks := span{p.asked - while, p.answered}
		if !p.failed || slices.ContainsFunc(c.faults, func(f fault) bool { return f.overlaps(asks) }) {
			continue
		}
		if failed++; failed > few {
			c.fail(ruleDecided, p.semaphore, p.answered,
				"%s is one of %d pods whose admission no webhook decided, and no fault explains it",
				p.name, failed)
			return
		}
	}
}
