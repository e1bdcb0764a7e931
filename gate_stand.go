package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"
)

func (l *gateLine) setArrival(p *seenGatedPod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.of.arrival = p.arrival
}

// stand keeps the places of those that stand, and lets those ask whom a token is free for, and the first, who sees what is to be
// repaired. It returns in what time somebody has to ask again.
func (l *gateLine) stand(ctx context.Context, pods []*seenGatedPod) (pause time.Duration, err error) {
	var waiting, leaving []*seenGatedPod
	for _, p := range pods {
		state, gone := l.stateOf(p)
		if p.placed && (gone || state != podStands) {
			leaving = append(leaving, p)
		}
		if state != podStands || gone {
			continue
		}
		if p.arrival == 0 {
			p.arrival = l.place(p.created)
			l.setArrival(p)
		}
		waiting = append(waiting, p)
	}
	if len(waiting)+len(leaving) == 0 {
		l.subscribe(nil)
		return keepEvery, nil
	}
	slices.SortFunc(waiting, func(a, b *seenGatedPod) int { return cmp.Compare(a.arrival, b.arrival) })
	l.forgetSeconds(waiting)
	l.subscribe(waiting)
	served := l.takeCalls()
	all, err := l.keep(ctx, waiting, leaving)
	if err != nil {
		return 0, err
	}
	for _, token := range all.served {
		served[token] = true
	}
	return l.ask(ctx, waiting, served)
}

// keep keeps the places of all, or if they were kept lately, of the first and of those that are new: before anybody asks, Redis is told
// what it may have lost.
func (l *gateLine) keep(ctx context.Context, waiting, leaving []*seenGatedPod) (all kept, err error) {
	whole := time.Since(l.keptAt) >= keepEvery
	if !whole {
		some := slices.Clone(waiting[:min(len(waiting), servedMost)])
		for _, p := range waiting[len(some):] {
			if !p.placed {
				some = append(some, p)
			}
		}
		waiting = some
	}
	byToken := map[string]*seenGatedPod{}
	var places []keptPlace
	for _, p := range waiting {
		byToken[p.uid] = p
		places = append(places, keptPlace{p.uid, p.arrival, p.spec.length, newPodName(p.name, "")})
	}
	var gone []string
	for _, p := range leaving {
		gone = append(gone, p.uid)
	}
	if all, err = l.gate.semaphores.keep(ctx, l.id, l.known, gone, places); err != nil {
		return all, err
	}
	l.known = all.created
	if whole {
		l.keptAt = time.Now()
	}
	l.setPlaced(waiting, true)
	l.setPlaced(leaving, false)
	l.tellJoined(byToken, all)
	for _, token := range all.held {
		l.setState(byToken[token], podStands, podHolds)
	}
	return all, nil
}

func (l *gateLine) setPlaced(pods []*seenGatedPod, placed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range pods {
		p.of.placed = placed
	}
}

// place is where a pod stands that was created in a second: behind those of the same second that came before.
func (l *gateLine) place(created time.Time) int64 {
	second := created.Unix()
	n := l.next[second]
	l.next[second] = min(n+1, 999_999)
	return second*1_000_000 + n
}

// forgetSeconds forgets the seconds before that of the first in line, now and then: a line may be there for years.
func (l *gateLine) forgetSeconds(waiting []*seenGatedPod) {
	if len(l.next) <= secondsMost || len(waiting) == 0 {
		return
	}
	first := waiting[0].created.Unix()
	maps.DeleteFunc(l.next, func(second, _ int64) bool { return second < first })
}

// ask asks for the tokens of the first, and of those for whom one is free, for as long as there are any.
func (l *gateLine) ask(ctx context.Context, waiting []*seenGatedPod, served map[string]bool) (pause time.Duration, err error) {
	pause = pollMost
	asked := 0 // without success, since the last success
	for _, p := range waiting {
		if state, gone := l.stateOf(p); state != podStands || gone || asked > 0 && !served[p.uid] {
			continue
		}
		if asked == servedMost {
			break
		}
		asked++
		w := &waiter{semaphores: l.gate.semaphores, id: l.id, token: p.uid, pod: newPodName(p.name, ""), length: p.spec.length,
			expiration: p.spec.expiration, say: func(string) {}, log: l.log}
		a, err := l.askFor(ctx, w, p)
		if err != nil {
			return 0, err
		}
		if a.status == acquireTaken {
			l.setState(p, podStands, podHolds)
			asked = 0 // the next one may be served, too
			continue
		}
		if !a.place.reachable {
			l.gate.calls.redial(l.id.channel(p.uid))
		}
		pause = min(pause, w.untilPoll(a))
	}
	return pause, nil
}

// askFor asks for the token of a pod, within askTimeout. Where something is to be repaired first, Redis may have lost its data since it was told of the
// places: it is told again before anything is made anew.
func (l *gateLine) askFor(ctx context.Context, w *waiter, p *seenGatedPod) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	a, err := l.gate.semaphores.ask(ctx, l.id, question{w.token, w.length, joinLine, w.pod})
	if err != nil || a.status != acquireRepair {
		return a, err
	}
	if _, err := l.gate.semaphores.keep(ctx, l.id, l.known, nil, []keptPlace{{p.uid, p.arrival, p.spec.length, w.pod}}); err != nil {
		return a, err
	}
	_, a, err = w.try(ctx, joinLine)
	return a, err
}

// tellJoined says of those that have joined the line where they stand.
func (l *gateLine) tellJoined(pods map[string]*seenGatedPod, all kept) {
	for token, position := range all.joined {
		p := pods[token]
		if p == nil || p.told {
			continue
		}
		l.mu.Lock()
		p.of.told = true
		l.mu.Unlock()
		l.gate.event(p.watchedPod, false, reasonWaiting, "Waiting", "1",
			fmt.Sprintf("waiting for a token of %s: %d of %d in use, %s in line", l.id, all.inUse, p.spec.length, ordinal(position)))
	}
}

// subscribe lets Redis call for those that stand in line, and no others.
func (l *gateLine) subscribe(waiting []*seenGatedPod) {
	stand := map[string]bool{}
	var more, less []string
	for _, p := range waiting {
		stand[p.uid] = true
		if !l.subscribed[p.uid] {
			l.subscribed[p.uid] = true
			more = append(more, p.uid)
		}
	}
	for token := range l.subscribed {
		if !stand[token] {
			delete(l.subscribed, token)
			less = append(less, token)
		}
	}
	l.gate.calls.add(l, more)
	l.gate.calls.remove(l, less)
}
