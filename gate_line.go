package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	// keepEvery is how often the places of pods are kept: Redis forgets one after "patience" seconds; see semaphore.lua.
	keepEvery = 3 * time.Second

	// lineRest is between two looks at a line, however often it is called.
	lineRest = 20 * time.Millisecond

	// secondsMost is how many seconds in which pods were created a line remembers without need.
	secondsMost = 1000

	// servedMost is how many pods ask for their tokens in one look.
	servedMost = 32
)

// gateLine stands in the line of one semaphore for all pods that do not run yet.
type gateLine struct {
	gate *gate
	id   semaphoreID
	log  *slog.Logger
	ring chan struct{} // something has happened

	mu     sync.Mutex
	pods   map[string]*gatedPod // by UID
	called map[string]bool      // tokens that Redis has called for

	// Of the loop alone.
	known      int64           // created, as Redis answered it
	next       map[int64]int64 // of each second in which pods were created, the next free place
	keptAt     time.Time       // when the places were kept last
	heldAt     time.Time       // and the tokens
	subscribed map[string]bool // tokens
	retry      *backoff
	logged     time.Time
}

func newGateLine(g *gate, id semaphoreID) *gateLine {
	return &gateLine{gate: g, id: id, log: g.log.With("namespace", id.namespace, "key", id.key), ring: make(chan struct{}, 1),
		pods: map[string]*gatedPod{}, called: map[string]bool{}, next: map[int64]int64{}, subscribed: map[string]bool{}, retry: newGateBackoff()}
}

func newGateBackoff() *backoff { return newBackoff(250*time.Millisecond, pollMost) }

func (l *gateLine) wake() {
	select {
	case l.ring <- struct{}{}:
	default:
	}
}

// call notes that Redis has called for a token.
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
		pause := l.look(ctx)
		if l.gate.closeIfEmpty(l) {
			return
		}
		timer := time.NewTimer(max(pause, lineRest))
		select {
		case <-timer.C:
		case <-l.ring:
			timer.Stop()
			_ = sleep(ctx, lineRest) // for what happens at the same time
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// look does what is to be done now, and returns for how long nothing is.
func (l *gateLine) look(ctx context.Context) time.Duration {
	pods := l.snapshot()
	l.settle(ctx, pods)
	pause, err := l.stand(ctx, pods)
	due, held := l.hold(ctx, pods) // whatever keeps others from getting theirs
	err = errors.Join(err, held)
	l.lift(ctx, pods)
	switch {
	case err == nil:
		l.retry = newGateBackoff()
	case ctx.Err() == nil && time.Since(l.logged) > logEvery:
		l.log.Warn("the line is not kept, to be retried", "error", err.Error())
		l.logged = time.Now()
	}
	if err != nil {
		return l.retry.next()
	}
	return min(pause, due, keepEvery)
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

// hold keeps the tokens of those that hold them in flight. One that is lost stands in line again, unless its sidecar takes care of that.
func (l *gateLine) hold(ctx context.Context, pods []*seenGatedPod) (pause time.Duration, err error) {
	every := l.gate.holdEvery()
	if due := every - time.Since(l.heldAt); due > 0 {
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
	lost, err := l.gate.semaphores.hold(ctx, l.id, tokens)
	if err != nil {
		return 0, err
	}
	l.heldAt = time.Now()
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

// settle gives back what pods have that have ended or are gone, and lets go those that need the gate no longer.
func (l *gateLine) settle(ctx context.Context, pods []*seenGatedPod) {
	for _, p := range pods {
		state, gone := l.stateOf(p)
		late := p.lifted()
		if late.IsZero() && !p.isGated() { // somebody else has lifted it
			late = p.taken
		}
		switch {
		case gone:
			l.change(p, func() time.Duration { return l.giveUp(ctx, p.watchedPod) })
		case state == podEnded:
			l.change(p, func() time.Duration {
				if again := l.giveBack(ctx, p.uid); again > 0 {
					return again
				}
				return l.gate.letGo(ctx, p.watchedPod)
			})
		case state == podLeaves:
			l.change(p, func() time.Duration { return l.gate.letGo(ctx, p.watchedPod) })
		case !late.IsZero() && time.Since(late) > l.gate.unschedulable && !p.sidecarRan():
			l.log.Warn("the pod has not started in time: its token goes stale", "pod", p.name, "token", p.uid, "reason", p.scheduled.reason)
			l.gate.event(p.watchedPod, true, reasonLate, "LettingGo", strconv.FormatInt(late.Unix(), 10), fmt.Sprintf(
				"not started %s after its gate was lifted: its token of %s goes to another pod; should it start after all, it waits in Init:1/2", roughly(l.gate.unschedulable), l.id))
			l.setState(p, state, podLeaves)
			l.wake()
		}
	}
}

// giveUp ends what a pod has that the watch has lost, if it was deleted, or has ended; else it has lost the label, and its sidecar has the
// token.
func (l *gateLine) giveUp(ctx context.Context, p *watchedPod) (again time.Duration) {
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
				return l.lookAgain(ctx, p)
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

// lookAgain learns how a pod is that the watch has told nothing new of, though its gate could not be lifted. It may have ended long ago.
func (l *gateLine) lookAgain(ctx context.Context, p *seenGatedPod) (again time.Duration) {
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
