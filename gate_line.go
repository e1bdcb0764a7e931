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
	"strings"
	"sync"
	"time"
)

// lineState is the state of a pod between its gate and its sidecar.
type lineState int

const (
	podWaits   lineState = iota // in line for a token
	podBlocked                  // has other scheduling gates, could not use a token, and stands in no line
	podHolds                    // its token is in flight, its gate is or will be lifted, its sidecar has not taken over
	podEnded                    // failed, completed or deleted: the gate gives back its token or place
	podDone                     // it needs the gate no longer: its sidecar has taken over, or its time is up
)

// gatedPod is a pod of a gateLine.
type gatedPod struct {
	*watchedPod
	spec      semaphoreSpec // as it was when the gate first saw the pod
	arrival   int64         // its place in line: Unix microseconds; 0 while it has none
	state     lineState
	gone      bool      // the watch has lost it: it was deleted, or has lost the label
	released  bool      // it has ended, and its token or place is given back
	placed    bool      // Redis has its place, and it has no token yet
	announced bool      // an event has said where it stands
	taken     time.Time // when it got its token, or later its gate was lifted; see isLate
	refusal   error     // why its gate could not be lifted since then
	busy      bool      // a change of it is under way
	wake      time.Time // when it may be changed again
}

// podSnapshot is a pod of a line as it was when a reconcile began.
type podSnapshot struct {
	gatedPod
	live *gatedPod
}

// isGated reports whether the pod still has our gate.
func (p *gatedPod) isGated() bool { return slices.Contains(p.gates, gateName) }

// otherGates returns the names of the pod's other scheduling gates. Kubernetes allows no
// new ones.
func (p *gatedPod) otherGates() []string {
	return slices.DeleteFunc(slices.Clone(p.gates), func(name string) bool { return name == gateName })
}

// lifted returns when the gate was lifted, by the pod's label; zero if it was not.
func (p *gatedPod) lifted() time.Time {
	n, err := strconv.ParseInt(p.labels[labelGated], 10, 64)
	if err != nil || p.isGated() {
		return time.Time{}
	}
	return time.Unix(n, 0)
}

// hasEnded reports whether the pod has completed or failed: its sidecar does nothing any
// more.
func (p *gatedPod) hasEnded() bool { return p.phase == "Succeeded" || p.phase == "Failed" }

// neverRuns reports whether the pod runs no container, now and later: nothing can lift the
// gate of a pod that is being deleted.
func (p *gatedPod) neverRuns() bool { return p.hasEnded() || p.deleted && p.isGated() }

// hasStarted reports whether the pod's sidecar has confirmed the token, and keeps it from
// now on.
func (p *gatedPod) hasStarted() bool {
	return slices.ContainsFunc(p.initContainers, func(c initContainer) bool {
		return c.name == awaitName && c.state == "terminated"
	})
}

// sidecarRan reports whether the sidecar runs or has run: it may have given the token
// back.
func (p *gatedPod) sidecarRan() bool {
	return slices.ContainsFunc(p.initContainers, func(c initContainer) bool {
		return c.name == sidecarName && (c.state == "running" || c.state == "terminated")
	})
}

const (
	// placesEvery is the time between two refreshes of the places of pods. It is at most
	// pollMost: Redis forgets a place after linePatience.
	placesEvery = 3 * time.Second

	// lineRest is the least pause between two reconciles of a line.
	lineRest = 20 * time.Millisecond

	// secondsMost caps the seconds of pod creation that a line remembers without need.
	secondsMost = 1000

	// servedMost caps the pods that acquire without success in one reconcile.
	servedMost = 32
)

// gateLine waits in the line of one semaphore for all its pods that do not run yet.
type gateLine struct {
	gate   *gate
	id     semaphoreID
	log    *slog.Logger
	wakeup // of the loop

	mu       sync.Mutex
	pods     map[string]*gatedPod // by UID
	notified map[string]bool      // tokens that Redis has published as free

	// Only the loop uses these.
	created    int64           // placesReply.created of the last reply
	next       map[int64]int64 // the next free place of each second in which pods were created
	placesAt   time.Time       // when the places were last refreshed
	tokensAt   time.Time       // when the tokens were last refreshed
	subscribed map[string]bool // tokens
	retry      *backoff
	limit      logLimiter
}

func newGateLine(g *gate, id semaphoreID) *gateLine {
	return &gateLine{
		gate:       g,
		id:         id,
		log:        g.log.With("namespace", id.namespace, "key", id.key),
		wakeup:     newWakeup(),
		pods:       map[string]*gatedPod{},
		notified:   map[string]bool{},
		next:       map[int64]int64{},
		subscribed: map[string]bool{},
		retry:      newGateBackoff(),
	}
}

func newGateBackoff() *backoff { return newBackoff(250*time.Millisecond, pollMost) }

// tokenFree implements subscriber.
func (l *gateLine) tokenFree(token string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notified[token] = true
	l.wake()
}

// takeNotified returns the tokens that Redis has published as free since the last time.
func (l *gateLine) takeNotified() map[string]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	notified := l.notified
	l.notified = map[string]bool{}
	return notified
}

// set stores a pod, or its new state.
func (l *gateLine) set(w *watchedPod, spec semaphoreSpec) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.pods[w.uid]
	wasGated := !ok || p.isGated()
	if !ok {
		p = &gatedPod{spec: spec}
		l.pods[w.uid] = p
	}
	p.watchedPod, p.gone = w, false
	lifted, others := p.lifted(), p.otherGates()
	if wasGated && !lifted.IsZero() {
		p.taken = time.Unix(min(lifted.Unix(), time.Now().Unix()), 0) // a user may set a later time
	}
	switch {
	case p.neverRuns():
		p.state, p.wake = podEnded, time.Time{}
	case p.hasStarted():
		p.state = podDone
	case !ok && !lifted.IsZero():
		p.state = podHolds // by its label; Redis decides
	case p.state == podWaits && len(others) > 0:
		p.state = podBlocked
		l.gate.event(w, false, reasonBlocked, "Waiting", "1", fmt.Sprintf(
			"waiting for its other scheduling gates, %s; then it takes its place in the line of %s, by its creation time",
			strings.Join(others, ", "), l.id))
	case p.state == podBlocked && len(others) == 0:
		p.state = podWaits
	}
	l.wake()
}

// drop stores the last state of a pod that the watch has lost.
func (l *gateLine) drop(w *watchedPod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p, ok := l.pods[w.uid]; ok {
		p.watchedPod, p.gone, p.wake = w, true, time.Time{}
	}
	l.wake()
}

// run works until the line has no pods, or ctx is done.
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
			_ = sleep(ctx, lineRest) // collects what happens at the same time
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// reconcile does what is due, and returns the time until the next work.
func (l *gateLine) reconcile(ctx context.Context) time.Duration {
	if l.gate.checkView(l.id.namespace) != nil {
		l.created, l.placesAt = 0, time.Time{} // it goes on like a gate that has just started
		return placesEvery
	}
	pods := l.snapshot()
	l.finish(ctx, pods)
	pause, err := l.waitInLine(ctx, pods)
	due, held := l.refreshTokens(ctx, pods) // even if others cannot get theirs
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

// snapshot returns all pods, in their order.
func (l *gateLine) snapshot() []*podSnapshot {
	l.mu.Lock()
	defer l.mu.Unlock()
	var pods []*podSnapshot
	for _, p := range l.pods {
		pods = append(pods, &podSnapshot{*p, p})
	}
	slices.SortFunc(pods, func(a, b *podSnapshot) int {
		return cmp.Or(cmp.Compare(a.arrival, b.arrival), a.created.Compare(b.created), cmp.Compare(a.name, b.name))
	})
	return pods
}

// change runs do for a pod in the background, unless another change of the pod is under
// way. Then it wakes the loop. do runs without the lock, and returns the pause before the
// next change.
func (l *gateLine) change(seen *podSnapshot, do func() (again time.Duration)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := seen.live
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

// forget removes a pod from the line, unless the watch has reported it again.
func (l *gateLine) forget(uid string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p, ok := l.pods[uid]; ok && p.gone {
		delete(l.pods, uid)
	}
}

// stateOf returns the current state of a pod.
func (l *gateLine) stateOf(p *podSnapshot) (state lineState, gone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return p.live.state, p.live.gone
}

// setState moves a pod from one state to another, unless its state has changed meanwhile.
func (l *gateLine) setState(seen *podSnapshot, from, to lineState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := seen.live
	if p.state != from {
		return
	}
	p.state = to
	switch {
	case to == podHolds:
		p.placed, p.refusal = false, nil
		if p.isGated() || p.taken.IsZero() {
			p.taken = time.Now()
		}
		seen.taken = p.taken
	case to == podWaits && errors.As(p.refusal, new(*apiError)): // behind those that it has kept waiting
		p.arrival = time.Now().UnixMicro()
	}
}

// isLate reports whether the pod has held its token for long enough: the gate keeps no
// token without a bound.
func (l *gateLine) isLate(p *podSnapshot) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !p.live.taken.IsZero() && time.Since(p.live.taken) > l.gate.unschedulable
}

// refreshTokens keeps the tokens of starting pods in flight. A pod that has lost its
// token goes back to the line, unless its sidecar takes care of that.
func (l *gateLine) refreshTokens(ctx context.Context, pods []*podSnapshot) (pause time.Duration, err error) {
	every := l.gate.tokensEvery()
	if due := every - time.Since(l.tokensAt); due > 0 {
		return due, nil
	}
	byToken := map[string]*podSnapshot{}
	var tokens []string
	for _, p := range pods {
		if state, gone := l.stateOf(p); state == podHolds && !gone && !l.isLate(p) {
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
				return time.Second // if it is gone, the watch reports it
			case !now.deleted && !(&gatedPod{watchedPod: now}).sidecarRan():
				l.log.Warn(
					"the token was not in flight (reclaimed as stale, or lost with Redis): the pod stands in line again",
					"pod", p.name, "token", p.uid)
				l.setState(p, podHolds, podWaits)
			}
			return 0
		})
	}
	return every, nil
}

// finish gives back the tokens and places of pods that have ended or are gone, and
// removes pods that no longer need the gate.
func (l *gateLine) finish(ctx context.Context, pods []*podSnapshot) {
	for _, p := range pods {
		state, gone := l.stateOf(p)
		switch {
		case gone && p.released:
			l.forget(p.uid)
		case gone && !p.neverRuns():
			l.change(p, func() time.Duration { return l.resolveMissing(ctx, p) })
		case state == podEnded && p.released && p.deleted: // the watch will report its end
		case state == podEnded || gone:
			l.change(p, func() time.Duration {
				if !p.released {
					return l.giveBack(ctx, p)
				}
				return l.gate.removeLabel(ctx, p.watchedPod)
			})
		case state == podDone:
			l.change(p, func() time.Duration { return l.gate.removeLabel(ctx, p.watchedPod) })
		case state == podHolds && p.isGated() && l.isLate(p):
			l.change(p, func() time.Duration { return l.standAgain(ctx, p) })
		case !p.isGated() && l.isLate(p):
			l.log.Warn("the pod has not started in time: its token goes stale", "pod", p.name, "token", p.uid,
				"reason", p.unscheduledReason)
			l.gate.event(p.watchedPod, true, reasonLate, "LettingGo", p.labels[labelGated], fmt.Sprintf(
				"not started %s after its gate was lifted: its token of %s goes to another pod; "+
					"should it start after all, it waits in Init:1/2", roughly(l.gate.unschedulable), l.id))
			l.setState(p, state, podDone)
			l.wake()
		}
	}
}

// resolveMissing handles a pod that the watch has lost and that may run. If the pod was
// deleted or has ended, its token or place is given back. If not, the pod has only lost
// the label: its sidecar has the token.
func (l *gateLine) resolveMissing(ctx context.Context, p *podSnapshot) (again time.Duration) {
	var now *watchedPod
	err := l.gate.kubernetes.whenQuiet(ctx, func() (err error) {
		now, err = l.gate.kubernetes.getPod(ctx, p.namespace, p.name, p.uid)
		return err
	})
	switch {
	case err == nil && now.labels[labelGated] != "": // the watch will report it again
		return time.Second
	case err == nil && !(&gatedPod{watchedPod: now}).hasEnded():
		l.forget(p.uid)
		return 0
	case err == nil || errors.Is(err, errNotFound):
		return l.giveBack(ctx, p)
	}
	return time.Second
}

// giveBack gives back the token or place of a pod that has ended.
func (l *gateLine) giveBack(ctx context.Context, p *podSnapshot) (again time.Duration) {
	if again := l.release(ctx, p); again > 0 {
		return again
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p.live.released = true
	return 0
}

func (l *gateLine) release(ctx context.Context, p *podSnapshot) (again time.Duration) {
	status, err := l.gate.semaphores.release(ctx, l.id, p.uid, "")
	switch {
	case err != nil:
		l.log.Warn("token not given back, to be retried", "token", p.uid, "error", err.Error())
		return time.Second
	case status == releaseDone:
		l.log.Info("token given back", "token", p.uid)
	case status == releaseLeft:
		l.log.Info("left the line", "token", p.uid)
	}
	return 0
}

// lift lifts the gates of pods that hold a token.
func (l *gateLine) lift(ctx context.Context, pods []*podSnapshot) {
	for _, p := range pods {
		if state, gone := l.stateOf(p); state != podHolds || gone || !p.isGated() {
			continue
		}
		l.change(p, func() time.Duration {
			err := l.gate.lift(ctx, l.id, p.watchedPod, p.taken)
			if err == nil {
				return watchPatience
			}
			return l.noteRefusal(ctx, p, err)
		})
	}
}

// noteRefusal notes that the gate of a pod could not be lifted. It returns the pause
// before the next attempt, which grows if the API server has refused.
func (l *gateLine) noteRefusal(ctx context.Context, p *podSnapshot, refusal error) (again time.Duration) {
	if errors.Is(refusal, errNotFound) || errors.Is(refusal, errChanged) {
		if same, again := l.isUnchanged(ctx, p); !same {
			return again
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if before := p.live.refusal; ctx.Err() == nil && (before == nil || before.Error() != refusal.Error()) {
		l.log.Warn("gate not lifted, to be retried", "pod", p.name, "token", p.uid, "error", refusal.Error())
	}
	p.live.refusal = refusal
	if errors.Is(refusal, errTryAgain) {
		return time.Second
	}
	held := time.Since(p.live.taken)
	return max(time.Second, min(held/4, l.gate.unschedulable-held))
}

// isUnchanged reads a pod and reports whether it still has the gates that the watch has
// shown. If not, it tells the line.
func (l *gateLine) isUnchanged(ctx context.Context, p *podSnapshot) (same bool, again time.Duration) {
	now, err := l.gate.kubernetes.getPod(ctx, p.namespace, p.name, p.uid)
	switch {
	case err == nil && slices.Equal(now.gates, p.gates) && !now.deleted && now.labels[labelGated] != "":
		return true, 0
	case err == nil:
		l.set(now, p.spec)
	case !errors.Is(err, errNotFound):
		return false, time.Second
	}
	if err != nil || now.labels[labelGated] == "" {
		l.drop(p.watchedPod)
	}
	return false, watchPatience
}

// standAgain gives back the token of a pod whose gate could not be lifted. The pod stands
// in line again: behind the others if the API server has refused, until a gate restarts.
func (l *gateLine) standAgain(ctx context.Context, p *podSnapshot) (again time.Duration) {
	if same, again := l.isUnchanged(ctx, p); !same {
		return again
	}
	if again := l.release(ctx, p); again > 0 {
		return again
	}
	why := cmp.Or(p.refusal, errTryAgain).Error()
	l.log.Warn("a gate could not be lifted: its token goes to the next pod", "pod", p.name, "token", p.uid, "error", why)
	l.gate.event(p.watchedPod, true, reasonLate, "LettingGo", "refused", fmt.Sprintf(
		"its scheduling gate could not be lifted for %s (%s): its token of %s goes to another pod; it stands in line again",
		roughly(l.gate.unschedulable), why, l.id))
	l.setState(p, podHolds, podWaits)
	return 0
}

func (l *gateLine) setArrival(p *podSnapshot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.live.arrival = p.arrival
}

// waitInLine refreshes the places of waiting pods. Then it acquires for the pods that a
// token is free for, and for the first, whose reply shows what needs repair. It returns
// the time until the next acquire is due.
func (l *gateLine) waitInLine(ctx context.Context, pods []*podSnapshot) (pause time.Duration, err error) {
	var waiting, leaving []*podSnapshot
	for _, p := range pods {
		state, gone := l.stateOf(p)
		if p.placed && (gone || state != podWaits) {
			leaving = append(leaving, p)
		}
		if p.arrival == 0 { // blocked pods reserve their place among those of their second
			p.arrival = l.place(p.created)
			l.setArrival(p)
		}
		if state != podWaits || p.state != podWaits || gone { // one that waits again has a new arrival
			continue
		}
		waiting = append(waiting, p)
	}
	if len(waiting)+len(leaving) == 0 {
		l.subscribe(nil)
		return placesEvery, nil
	}
	slices.SortFunc(waiting, func(a, b *podSnapshot) int { return cmp.Compare(a.arrival, b.arrival) })
	l.forgetSeconds(waiting)
	l.subscribe(waiting)
	served := l.takeNotified()
	all, err := l.refreshPlaces(ctx, waiting, leaving)
	if err != nil {
		return 0, err
	}
	for _, token := range all.served {
		served[token] = true
	}
	pause, err = l.acquireServed(ctx, waiting, served)
	return min(pause, placesEvery-time.Since(l.placesAt)), err
}

// refreshPlaces refreshes the places of all waiting pods; between two such times, those
// of the first pods and of new ones. It comes before every acquire, so that Redis knows
// again what it may have lost.
func (l *gateLine) refreshPlaces(ctx context.Context, waiting, leaving []*podSnapshot) (all placesReply, err error) {
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
	byToken := map[string]*podSnapshot{}
	var places []placeRequest
	for _, p := range waiting {
		byToken[p.uid] = p
		places = append(places, placeRequest{p.uid, p.arrival, p.spec.length, newPodName(p.name, "")})
	}
	var gone []string
	for _, p := range leaving {
		gone = append(gone, p.uid)
	}
	if all, err = l.gate.semaphores.refreshPlaces(ctx, l.id, l.created, gone, places); err != nil {
		return all, err
	}
	l.created = all.created
	if whole {
		l.placesAt = time.Now()
	}
	l.setPlaced(waiting, true)
	l.setPlaced(leaving, false)
	l.announceJoined(byToken, all)
	for _, token := range all.held {
		l.setState(byToken[token], podWaits, podHolds)
	}
	return all, nil
}

func (l *gateLine) setPlaced(pods []*podSnapshot, placed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range pods {
		p.live.placed = placed
	}
}

// place returns the place of a pod that was created in a second: behind the earlier ones
// of that second.
func (l *gateLine) place(created time.Time) int64 {
	second := created.Unix()
	n := l.next[second]
	l.next[second] = min(n+1, 999_999)
	return second*1_000_000 + n
}

// forgetSeconds drops the seconds before that of the first in line: a line may live for
// years.
func (l *gateLine) forgetSeconds(waiting []*podSnapshot) {
	if len(l.next) <= secondsMost || len(waiting) == 0 {
		return
	}
	first := waiting[0].created.Unix()
	maps.DeleteFunc(l.next, func(second, _ int64) bool { return second < first })
}

// acquireServed acquires for the first pod, and for the pods that a token is free for.
// After each success it also tries the next pod. It stops after servedMost acquires
// without success.
func (l *gateLine) acquireServed(ctx context.Context, waiting []*podSnapshot,
	served map[string]bool) (pause time.Duration, err error) {
	pause = pollMost
	asked := 0 // acquires since the last success
	for _, p := range waiting {
		if state, gone := l.stateOf(p); state != podWaits || gone || asked > 0 && !served[p.uid] {
			continue
		}
		if asked == servedMost {
			break
		}
		asked++
		w := &waiter{semaphores: l.gate.semaphores, id: l.id, token: p.uid, pod: newPodName(p.name, ""),
			length: p.spec.length, expiration: p.spec.expiration, report: func(string) {}, log: l.log}
		a, err := l.acquire(ctx, w, p)
		if err != nil {
			return 0, err
		}
		if a.status == acquireTaken {
			l.setState(p, podWaits, podHolds)
			asked = 0 // the next one may be served, too
			continue
		}
		if !a.place.reachable {
			l.gate.subscription.redial(l.id, p.uid)
		}
		pause = min(pause, untilPoll(a))
	}
	return pause, nil
}

// acquire acquires the token of a pod, within acquireTimeout. If the semaphore needs a
// repair, Redis may have lost its data since the last refresh. So the place of the pod is
// refreshed again before the repair makes new tokens.
func (l *gateLine) acquire(ctx context.Context, w *waiter, p *podSnapshot) (acquireReply, error) {
	ctx, cancel := context.WithTimeout(ctx, acquireTimeout)
	defer cancel()
	a, err := l.gate.semaphores.runAcquire(ctx, l.id, acquireRequest{token: w.token, length: w.length, arrival: joinLine, pod: w.pod})
	if err != nil || a.status != acquireRepair {
		return a, err
	}
	places := []placeRequest{{p.uid, p.arrival, p.spec.length, w.pod}}
	if _, err := l.gate.semaphores.refreshPlaces(ctx, l.id, l.created, nil, places); err != nil {
		return a, err
	}
	_, a, err = w.acquireOnce(ctx, joinLine)
	return a, err
}

// announceJoined creates an event for each pod that has joined the line.
func (l *gateLine) announceJoined(pods map[string]*podSnapshot, all placesReply) {
	for token, position := range all.joined {
		p := pods[token]
		if p == nil || p.announced {
			continue
		}
		l.mu.Lock()
		p.live.announced = true
		l.mu.Unlock()
		l.gate.event(p.watchedPod, false, reasonWaiting, "Waiting", "1",
			fmt.Sprintf("waiting for a token of %s: %d of %d in use, %s in line%s",
				l.id, all.inUse, p.spec.length, ordinal(position), doubtText(all.doubt)))
	}
}

// subscribe subscribes to the channels of the waiting pods, and to no others.
func (l *gateLine) subscribe(waiting []*podSnapshot) {
	inLine := map[string]bool{}
	var added, removed []string
	for _, p := range waiting {
		inLine[p.uid] = true
		if !l.subscribed[p.uid] {
			l.subscribed[p.uid] = true
			added = append(added, p.uid)
		}
	}
	for token := range l.subscribed {
		if !inLine[token] {
			delete(l.subscribed, token)
			removed = append(removed, token)
		}
	}
	l.gate.subscription.add(l, l.id, added...)
	l.gate.subscription.remove(l.id, removed...)
}
