package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"
)

// lineState is where a pod is on its way from its gate to its sidecar.
type lineState int

const (
	podStands lineState = iota // in line for a token
	podHolds                   // the token is in flight: its gate is lifted, or about to be, and its sidecar has not taken over
	podEnded                   // it has failed, completed or been deleted: what it has is given back
	podLeaves                  // it needs the gate no longer: its sidecar has taken over, or it has used up its time
)

// gatedPod is a pod of a gateLine.
type gatedPod struct {
	*watchedPod
	spec    semaphoreSpec // as it was when the pod was seen first
	arrival int64         // its place in line: Unix microseconds; 0 while it has none
	state   lineState
	gone    bool      // the watch has lost it: it was deleted, or has lost the label
	placed  bool      // its place was kept, and has not become a token
	told    bool      // it was told where it stands
	taken   time.Time // when its token was
	busy    bool      // a change of it is under way
	refused bool      // its gate was not to be lifted as it is seen: the watch may be behind
	wake    time.Time // not before, as the last change failed
}

// seenGatedPod is a pod of a line as it was at the beginning of a look.
type seenGatedPod struct {
	gatedPod
	of *gatedPod
}

// isGated reports whether the pod has our gate yet.
func (p *gatedPod) isGated() bool { return slices.Contains(p.gates, gateName) }

// lifted is when the gate was lifted, by its label; zero if it was not.
func (p *gatedPod) lifted() time.Time {
	n, err := strconv.ParseInt(p.labels[labelGated], 10, 64)
	if err != nil || p.isGated() {
		return time.Time{}
	}
	return time.Unix(n, 0)
}

// hasEnded reports whether the pod has run, or failed: its sidecar does nothing any more.
func (p *gatedPod) hasEnded() bool { return p.phase == "Succeeded" || p.phase == "Failed" }

// hasStarted reports whether the pod's sidecar has confirmed the token, and keeps it from now on.
func (p *gatedPod) hasStarted() bool {
	return slices.ContainsFunc(p.initContainers, func(c initContainer) bool { return c.name == awaitName && c.state == "terminated" })
}

// sidecarRan reports whether the sidecar runs, or has run: it may have given the token back.
func (p *gatedPod) sidecarRan() bool {
	return slices.ContainsFunc(p.initContainers, func(c initContainer) bool {
		return c.name == sidecarName && (c.state == "running" || c.state == "terminated")
	})
}

const (
	// placesEvery is the time between two refreshes of the places of pods. It is at most
	// pollMost: Redis forgets a place after linePatience.
	placesEvery = 3 * time.Second

	// lineRest is between two looks at a line, however often it is called.
	lineRest = 20 * time.Millisecond

	// secondsMost is how many seconds in which pods were created a line remembers without need.
	secondsMost = 1000

	// servedMost is how many pods ask for their tokens in one look.
	servedMost = 32
)

// gateLine stands in the line of one semaphore for all pods that do not run yet.
type gateLine struct {
	gate   *gate
	id     semaphoreID
	log    *slog.Logger
	wakeup // something has happened

	mu     sync.Mutex
	pods   map[string]*gatedPod // by UID
	called map[string]bool      // tokens that Redis has called for

	// Of the loop alone.
	known      int64           // created, as Redis answered it
	next       map[int64]int64 // of each second in which pods were created, the next free place
	placesAt   time.Time       // when the places were kept last
	tokensAt   time.Time       // and the tokens
	subscribed map[string]bool // tokens
	retry      *backoff
	limit      logLimiter
}

func newGateLine(g *gate, id semaphoreID) *gateLine {
	return &gateLine{gate: g, id: id, log: g.log.With("namespace", id.namespace, "key", id.key), wakeup: newWakeup(),
		pods: map[string]*gatedPod{}, called: map[string]bool{}, next: map[int64]int64{}, subscribed: map[string]bool{}, retry: newGateBackoff()}
}

func newGateBackoff() *backoff { return newBackoff(250*time.Millisecond, pollMost) }

// call implements subscriber: it notes that Redis has called for a token.
func (l *gateLine) call(token string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.called[token] = true
	l.wake()
}

// takeCalls are those since the last time.
func (l *gateLine) takeCalls() map[string]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	called := l.called
	l.called = map[string]bool{}
	return called
}

// set notes a pod, or how it is by now.
func (l *gateLine) set(w *watchedPod, spec semaphoreSpec) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.pods[w.uid]
	if !ok {
		p = &gatedPod{spec: spec}
		l.pods[w.uid] = p
	}
	p.watchedPod, p.gone, p.refused = w, false, false
	switch {
	case p.hasEnded() || p.deleted && p.isGated():
		p.state = podEnded
	case p.hasStarted():
		p.state = podLeaves
	case !ok && p.lifted() != (time.Time{}):
		p.state = podHolds // as far as its label says; Redis knows better
	}
	l.wake()
}

func (l *gateLine) drop(uid string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p, ok := l.pods[uid]; ok {
		p.gone = true
	}
	l.wake()
}

// run stands in line until there are no pods, or ctx is done.
func (l *gateLine) run(ctx context.Context) {
	defer l.subscribe(nil)
	for ctx.Err() == nil {
		pause := l.reconcile(ctx)
		if l.gate.closeIfEmpty(l) {
			return
		}
		timer := time.NewTimer(max(pause, lineRest))
		select {
		case <-timer.C:
		case <-l.wakeup:
			timer.Stop()
			_ = sleep(ctx, lineRest) // for what happens at the same time
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// reconcile does what is to be done now, and returns for how long nothing is.
func (l *gateLine) reconcile(ctx context.Context) time.Duration {
	pods := l.snapshot()
	l.finish(ctx, pods)
	pause, err := l.stand(ctx, pods)
	due, held := l.refreshTokens(ctx, pods) // whatever keeps others from getting theirs
	err = errors.Join(err, held)
	l.lift(ctx, pods)
	switch {
	case err == nil:
		l.retry = newGateBackoff()
	case ctx.Err() == nil:
		if _, ok := l.limit.allow(); ok {
			l.log.Warn("the line is not kept, to be retried", "error", err.Error())
		}
	}
	if err != nil {
		return l.retry.next()
	}
	return min(pause, due, placesEvery)
}

// snapshot is all pods, in their order.
func (l *gateLine) snapshot() []*seenGatedPod {
	l.mu.Lock()
	defer l.mu.Unlock()
	var pods []*seenGatedPod
	for _, p := range l.pods {
		pods = append(pods, &seenGatedPod{*p, p})
	}
	slices.SortFunc(pods, func(a, b *seenGatedPod) int {
		return cmp.Or(cmp.Compare(a.arrival, b.arrival), a.created.Compare(b.created), cmp.Compare(a.name, b.name))
	})
	return pods
}

// change does something to a pod in the background, unless that is under way already, and then looks again. do returns for how long
// nothing more is to be tried, and runs without the lock.
func (l *gateLine) change(seen *seenGatedPod, do func() (again time.Duration)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := seen.of
	if p.busy || time.Now().Before(p.wake) {
		return
	}
	p.busy = true
	l.gate.background.Go(func() {
		again := do()
		l.mu.Lock()
		defer l.mu.Unlock()
		p.busy, p.wake = false, time.Now().Add(again)
		l.wake()
	})
}

// forget removes a pod from the line.
func (l *gateLine) forget(uid string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.pods, uid)
}

// stateOf is where a pod is now.
func (l *gateLine) stateOf(p *seenGatedPod) (state lineState, gone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return p.of.state, p.of.gone
}

// setState moves a pod from one state to another, unless it has another by now.
func (l *gateLine) setState(seen *seenGatedPod, from, to lineState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := seen.of; p.state == from {
		p.state = to
		if to == podHolds {
			p.taken, p.placed = time.Now(), false
		}
	}
}

// refreshTokens keeps the tokens of those that hold them in flight. One that is lost stands in line again, unless its sidecar takes care of that.
func (l *gateLine) refreshTokens(ctx context.Context, pods []*seenGatedPod) (pause time.Duration, err error) {
	every := l.gate.tokensEvery()
	if due := every - time.Since(l.tokensAt); due > 0 {
		return due, nil
	}
	byToken := map[string]*seenGatedPod{}
	var tokens []string
	for _, p := range pods {
		if state, gone := l.stateOf(p); state == podHolds && !gone {
			byToken[p.uid], tokens = p, append(tokens, p.uid)
		}
	}
	if len(tokens) == 0 {
		return every, nil
	}
	lost, err := l.gate.semaphores.refreshTokens(ctx, l.id, tokens)
	if err != nil {
		return 0, err
	}
	l.tokensAt = time.Now()
	for _, token := range lost {
		p := byToken[token]
		l.change(p, func() time.Duration {
			now, err := l.gate.kubernetes.getPod(ctx, p.namespace, p.name, p.uid)
			switch {
			case err != nil:
				return time.Second // if it is gone, the watch tells
			case !now.deleted && !(&gatedPod{watchedPod: now}).sidecarRan():
				l.log.Warn("the token was not in flight (reclaimed as stale, or lost with Redis): the pod stands in line again", "pod", p.name, "token", p.uid)
				l.setState(p, podHolds, podStands)
			}
			return 0
		})
	}
	return every, nil
}

// finish gives back what pods have that have ended or are gone, and lets go those that need the gate no longer.
func (l *gateLine) finish(ctx context.Context, pods []*seenGatedPod) {
	for _, p := range pods {
		state, gone := l.stateOf(p)
		late := p.lifted()
		if late.IsZero() && !p.isGated() { // somebody else has lifted it
			late = p.taken
		}
		switch {
		case gone:
			l.change(p, func() time.Duration { return l.resolveMissing(ctx, p.watchedPod) })
		case state == podEnded:
			l.change(p, func() time.Duration {
				if again := l.giveBack(ctx, p.uid); again > 0 {
					return again
				}
				return l.gate.removeLabel(ctx, p.watchedPod)
			})
		case state == podLeaves:
			l.change(p, func() time.Duration { return l.gate.removeLabel(ctx, p.watchedPod) })
		case !late.IsZero() && time.Since(late) > l.gate.unschedulable && !p.sidecarRan():
			l.log.Warn("the pod has not started in time: its token goes stale", "pod", p.name, "token", p.uid, "reason", p.unscheduledReason)
			l.gate.event(p.watchedPod, true, reasonLate, "LettingGo", strconv.FormatInt(late.Unix(), 10), fmt.Sprintf(
				"not started %s after its gate was lifted: its token of %s goes to another pod; should it start after all, it waits in Init:1/2", roughly(l.gate.unschedulable), l.id))
			l.setState(p, state, podLeaves)
			l.wake()
		}
	}
}

// resolveMissing ends what a pod has that the watch has lost, if it was deleted, or has ended; else it has lost the label, and its sidecar has the
// token.
func (l *gateLine) resolveMissing(ctx context.Context, p *watchedPod) (again time.Duration) {
	now, err := l.gate.kubernetes.getPod(ctx, p.namespace, p.name, p.uid)
	switch {
	case err == nil && now.labels[labelGated] != "": // the watch tells it again
		return time.Second
	case err == nil && !(&gatedPod{watchedPod: now}).hasEnded():
	case err == nil || errors.Is(err, errNoPod):
		if again := l.giveBack(ctx, p.uid); again > 0 {
			return again
		}
	default:
		return time.Second
	}
	l.forget(p.uid)
	return 0
}

// giveBack gives back the token, or the place, of a pod.
func (l *gateLine) giveBack(ctx context.Context, uid string) (again time.Duration) {
	status, err := l.gate.semaphores.release(ctx, l.id, uid)
	switch {
	case err != nil:
		l.log.Warn("token not given back, to be retried", "token", uid, "error", err.Error())
		return time.Second
	case status == releaseDone:
		l.log.Info("token given back", "token", uid)
	case status == releaseLeft:
		l.log.Info("left the line", "token", uid)
	}
	return 0
}

// lift lifts the gates of those that hold a token.
func (l *gateLine) lift(ctx context.Context, pods []*seenGatedPod) {
	for _, p := range pods {
		if state, gone := l.stateOf(p); state != podHolds || gone || !p.isGated() {
			continue
		}
		l.change(p, func() time.Duration {
			if p.refused {
				return l.refetch(ctx, p)
			}
			again, refused := l.gate.lift(ctx, l.id, p.watchedPod, p.taken)
			if refused {
				l.setRefused(p)
			}
			return again
		})
	}
}

func (l *gateLine) setRefused(p *seenGatedPod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.of.refused = true
}

// refetch learns how a pod is that the watch has told nothing new of, though its gate could not be lifted. It may have ended long ago.
func (l *gateLine) refetch(ctx context.Context, p *seenGatedPod) (again time.Duration) {
	now, err := l.gate.kubernetes.getPod(ctx, p.namespace, p.name, p.uid)
	switch {
	case err == nil:
		l.set(now, p.spec)
	case !errors.Is(err, errNoPod):
		return time.Second
	}
	if err != nil || now.labels[labelGated] == "" {
		l.drop(p.uid)
	}
	return 0
}

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
		return placesEvery, nil
	}
	slices.SortFunc(waiting, func(a, b *seenGatedPod) int { return cmp.Compare(a.arrival, b.arrival) })
	l.forgetSeconds(waiting)
	l.subscribe(waiting)
	served := l.takeCalls()
	all, err := l.refreshPlaces(ctx, waiting, leaving)
	if err != nil {
		return 0, err
	}
	for _, token := range all.served {
		served[token] = true
	}
	return l.ask(ctx, waiting, served)
}

// refreshPlaces keeps the places of all, or if they were kept lately, of the first and of those that are new: before anybody asks, Redis is told
// what it may have lost.
func (l *gateLine) refreshPlaces(ctx context.Context, waiting, leaving []*seenGatedPod) (all placesReply, err error) {
	whole := time.Since(l.placesAt) >= placesEvery
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
	var places []placeRequest
	for _, p := range waiting {
		byToken[p.uid] = p
		places = append(places, placeRequest{p.uid, p.arrival, p.spec.length, newPodName(p.name, "")})
	}
	var gone []string
	for _, p := range leaving {
		gone = append(gone, p.uid)
	}
	if all, err = l.gate.semaphores.refreshPlaces(ctx, l.id, l.known, gone, places); err != nil {
		return all, err
	}
	l.known = all.created
	if whole {
		l.placesAt = time.Now()
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
			l.gate.subscription.redial(l.id, p.uid)
		}
		pause = min(pause, w.untilPoll(a))
	}
	return pause, nil
}

// askFor asks for the token of a pod, within askTimeout. Where something is to be repaired first, Redis may have lost its data since it was told of the
// places: it is told again before anything is made anew.
func (l *gateLine) askFor(ctx context.Context, w *waiter, p *seenGatedPod) (acquireReply, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	a, err := l.gate.semaphores.runAcquire(ctx, l.id, acquireRequest{w.token, w.length, joinLine, w.pod})
	if err != nil || a.status != acquireRepair {
		return a, err
	}
	if _, err := l.gate.semaphores.refreshPlaces(ctx, l.id, l.known, nil, []placeRequest{{p.uid, p.arrival, p.spec.length, w.pod}}); err != nil {
		return a, err
	}
	_, a, err = w.try(ctx, joinLine)
	return a, err
}

// tellJoined says of those that have joined the line where they stand.
func (l *gateLine) tellJoined(pods map[string]*seenGatedPod, all placesReply) {
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
	l.gate.subscription.add(l, l.id, more...)
	l.gate.subscription.remove(l.id, less...)
}
