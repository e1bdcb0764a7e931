package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/bits"
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
	podGaveUp                   // its time in line is over, it is in no line, and the gate makes it fail
)

// gatedPod is a pod of a gateLine.
type gatedPod struct {
	*watchedPod
	spec      semaphoreSpec // as it was when the gate first saw the pod
	arrival   int64         // its place in line: Unix microseconds, less its head start; 0 while it has none
	state     lineState
	gone      bool      // the watch has lost it: it was deleted, or has lost the label
	released  bool      // it has ended, and its token or place is given back
	placed    bool      // Redis has its place, and it has no token yet
	announced int       // the position in line that an event said last; 0: this gate knows of none
	taken     time.Time // when it got its token, or later its gate was lifted; see isLate
	refusal   error     // why its gate could not be lifted since then, or why it could not be made to fail
	unblocked time.Time // when it lost its other scheduling gates or its token; zero: this process did not see that
	askAgain  time.Time // its time in line is over, and Redis has answered that it still waits until then
	gaveUp    string    // with podGaveUp: after how long, and which pods had the tokens
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

// arrived returns when the pod arrived: its place, without its head start. Unix
// microseconds.
func (p *gatedPod) arrived() int64 { return p.arrival + p.spec.headStart.Microseconds() }

// ends returns when the pod stops waiting, from its arrival on. The time that it spent
// behind other scheduling gates, or with a token that it lost, does not count.
func (p *gatedPod) ends() waitEnd {
	e := p.spec.wait
	if blocked := p.unblocked.Sub(time.UnixMicro(p.arrived())); e.after > 0 && !p.unblocked.IsZero() && blocked > 0 {
		e.after += blocked.Truncate(time.Second) + time.Second
	}
	return e
}

// endsIn returns the time until the pod stops waiting, by the clock of Redis.
func (p *gatedPod) endsIn(micros int64) time.Duration {
	return time.Duration(p.arrived()-micros)*time.Microsecond + p.ends().after
}

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

	// endedMost caps the pods whose time in line is over, and that ask in one reconcile.
	endedMost = 100

	// endedRetry is the least pause until such a pod asks again that still waits.
	endedRetry = time.Second
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
	setting    setting // as Redis said it last
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
		p.state, p.unblocked = podWaits, time.Now()
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
	if l.gate.checkLine(l.id) != nil {
		l.created, l.placesAt = 0, time.Time{} // it goes on like a gate that has just started
		return placesEvery
	}
	pods := l.snapshot()
	l.finish(ctx, pods)
	pause, err := l.waitInLine(ctx, pods)
	due, held := l.refreshTokens(ctx, pods) // even if others cannot get theirs
	err = errors.Join(err, held)
	l.lift(ctx, pods)
	l.fail(ctx, pods)
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

// has reports whether the line has a pod.
func (l *gateLine) has(uid string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pods[uid] != nil
}

// snapshot returns the pods, in their order, without those of namespaces whose view may
// be old.
func (l *gateLine) snapshot() []*podSnapshot {
	l.mu.Lock()
	defer l.mu.Unlock()
	var pods []*podSnapshot
	for _, p := range l.pods {
		if l.id.namespace == shared && l.gate.checkView(p.namespace) != nil {
			continue
		}
		pods = append(pods, &podSnapshot{*p, p})
	}
	slices.SortFunc(pods, func(a, b *podSnapshot) int {
		return cmp.Or(cmp.Compare(a.arrival, b.arrival), a.created.Compare(b.created), cmp.Compare(a.name, b.name))
	})
	return pods
}

// change runs do for a pod in the background, unless another change of the pod is under
// way, or was when the reconcile began: seen does not show what it did. Then it wakes the
// loop. do runs without the lock, and returns the pause before the next change.
func (l *gateLine) change(seen *podSnapshot, do func() (again time.Duration)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := seen.live
	if seen.busy || p.busy || time.Now().Before(p.wake) {
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
	case to == podWaits:
		p.unblocked = time.Now()
		if errors.As(p.refusal, new(*apiError)) { // behind those that it has kept waiting
			p.arrival, p.spec.headStart = p.unblocked.UnixMicro(), 0
		}
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
	var tokens []heldTokens
	for _, p := range pods {
		if state, gone := l.stateOf(p); state == podHolds && !gone && !l.isLate(p) {
			byToken[p.uid], tokens = p, append(tokens, heldTokens{p.uid, p.spec.tokens})
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
		switch {
		case p.gone && p.released:
			l.forget(p.uid)
		case p.gone && !p.neverRuns():
			l.change(p, func() time.Duration { return l.resolveMissing(ctx, p) })
		case p.state == podEnded && p.released && p.deleted: // the watch will report its end
		case p.state == podEnded || p.gone:
			l.change(p, func() time.Duration {
				if !p.released {
					return l.giveBack(ctx, p)
				}
				return l.gate.removeLabel(ctx, p.watchedPod)
			})
		case p.state == podDone:
			l.change(p, func() time.Duration { return l.gate.removeLabel(ctx, p.watchedPod) })
		case p.state == podHolds && p.isGated() && l.isLate(p):
			l.change(p, func() time.Duration { return l.standAgain(ctx, p) })
		case !p.isGated() && l.isLate(p):
			l.log.Warn("the pod has not started in time: its token goes stale", "pod", p.name, "token", p.uid,
				"reason", p.unscheduledReason)
			l.gate.event(p.watchedPod, true, reasonLate, "LettingGo", p.labels[labelGated], fmt.Sprintf(
				"not started %s after its gate was lifted: its token of %s goes to another pod; "+
					"should it start after all, it waits in Init:1/2", roughly(l.gate.unschedulable), l.id))
			l.setState(p, p.state, podDone)
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
			err := l.gate.lift(ctx, l.id, p)
			if err == nil {
				return watchPatience
			}
			again, _ := l.noteRefusal(ctx, p, err)
			return again
		})
	}
}

// fail makes the pods fail that have given up. It is out of the line, and holds nothing. So
// it can wait, and the gate tries for as long as the API server refuses.
func (l *gateLine) fail(ctx context.Context, pods []*podSnapshot) {
	for _, p := range pods {
		if state, gone := l.stateOf(p); state != podGaveUp || gone {
			continue
		}
		if !p.isGated() { // its sidecar hears that it gave up
			l.setState(p, podGaveUp, podDone)
			continue
		}
		l.change(p, func() time.Duration {
			err := l.gate.kubernetes.whenQuiet(ctx, func() error {
				if state, gone := l.stateOf(p); state != podGaveUp || gone { // the other gate was quicker
					return nil
				}
				return l.gate.fail(ctx, l.id, p)
			})
			if err == nil {
				return watchPatience
			}
			again, same := l.noteRefusal(ctx, p, err)
			if same && errors.As(err, new(*apiError)) && !errors.Is(err, errTryAgain) {
				l.gate.event(p.watchedPod, true, reasonGaveUp, "Failing", "refused", fmt.Sprintf(
					"%s; its status could not be made Failed (%v): it stays gated, and is not in line", p.gaveUp, err))
			}
			return again
		})
	}
}

// noteRefusal notes that the gate of a pod could not be lifted, or that it could not be made
// to fail. It returns the pause before the next attempt, which grows if the API server has
// refused, and whether the pod is the same as before.
func (l *gateLine) noteRefusal(ctx context.Context, p *podSnapshot, refusal error) (again time.Duration, same bool) {
	if errors.Is(refusal, errNotFound) || errors.Is(refusal, errChanged) {
		if same, again := l.isUnchanged(ctx, p); !same {
			return again, false
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	gaveUp := p.live.state == podGaveUp
	switch before := p.live.refusal; {
	case ctx.Err() != nil || before != nil && before.Error() == refusal.Error():
	case gaveUp:
		l.log.Warn("a pod that gave up not made to fail, to be retried", "pod", p.name, "token", p.uid,
			"error", refusal.Error())
	default:
		l.log.Warn("gate not lifted, to be retried", "pod", p.name, "token", p.uid, "error", refusal.Error())
	}
	p.live.refusal = refusal
	if errors.Is(refusal, errTryAgain) {
		return time.Second, true
	}
	held := time.Since(p.live.taken)
	if gaveUp {
		return max(time.Second, min(held/4, l.gate.unschedulable)), true
	}
	return max(time.Second, min(held/4, l.gate.unschedulable-held)), true
}

// isUnchanged reads a pod and reports whether it still has the gates that the watch has
// shown. If not, it tells the line.
func (l *gateLine) isUnchanged(ctx context.Context, p *podSnapshot) (same bool, again time.Duration) {
	now, err := l.gate.kubernetes.getPod(ctx, p.namespace, p.name, p.uid)
	switch {
	case err == nil && slices.Equal(now.gates, p.gates) && now.phase == p.phase && !now.deleted && now.labels[labelGated] != "":
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

func (l *gateLine) podName(p *podSnapshot) podName {
	return newPodName(l.id.podName(p.namespace, p.name), "")
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
			p.arrival = l.place(p.created) - p.spec.headStart.Microseconds()
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
		places = append(places, l.placeOf(p))
	}
	var gone []string
	for _, p := range leaving {
		gone = append(gone, p.uid)
	}
	if all, err = l.gate.semaphores.refreshPlaces(ctx, l.id, l.created, gone, places); err != nil {
		return all, err
	}
	l.created = all.created
	if len(places)+len(gone) > 0 {
		l.setting.learn(all.setting)
	}
	if whole {
		l.placesAt = time.Now()
	}
	l.setPlaced(waiting, true)
	l.setPlaced(leaving, false)
	l.announceJoined(byToken, all)
	for _, token := range all.held {
		l.setState(byToken[token], podWaits, podHolds)
	}
	if whole {
		l.announceMoved(waiting, all)
	}
	return all, nil
}

func (l *gateLine) placeOf(p *podSnapshot) placeRequest {
	return placeRequest{p.uid, p.arrived(), p.spec.headStart.Microseconds(), p.spec.length, p.spec.tokens,
		l.podName(p), p.ends()}
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

// forgetSeconds drops the seconds before the first in which a waiting pod was created: a
// line may live for years.
func (l *gateLine) forgetSeconds(waiting []*podSnapshot) {
	if len(l.next) <= secondsMost || len(waiting) == 0 {
		return
	}
	first := slices.MinFunc(waiting, func(a, b *podSnapshot) int { return a.created.Compare(b.created) }).created.Unix()
	maps.DeleteFunc(l.next, func(second, _ int64) bool { return second < first })
}

// acquireServed acquires for the first pod, for the pods that a token is free for, and for
// those whose time in line is over. After each success it also tries the next pod. It stops
// after servedMost acquires without success.
func (l *gateLine) acquireServed(ctx context.Context, waiting []*podSnapshot,
	served map[string]bool) (pause time.Duration, err error) {
	pause = pollMost
	asked := 0 // acquires since the last success
	ended := 0 // acquires because the time was over
	now := l.redisTime(ctx)
	for _, p := range waiting {
		left := pollMost
		if p.spec.wait.after > 0 {
			left = max(p.endsIn(now), time.Until(p.askAgain))
		}
		isOver := left <= 0 && ended < endedMost
		pause = min(pause, max(0, left))
		if state, gone := l.stateOf(p); state != podWaits || gone || asked > 0 && !served[p.uid] && !isOver {
			continue
		}
		if asked == servedMost {
			break
		}
		if isOver {
			ended++
		} else {
			asked++
		}
		w := &waiter{semaphores: l.gate.semaphores, id: l.id, token: p.uid, pod: l.podName(p),
			length: p.spec.length, tokens: p.spec.tokens, expiration: p.spec.expiration, ends: p.ends(), setting: l.setting,
			report: func(string) {}, log: l.log}
		a, err := l.acquire(ctx, w, p)
		if err != nil {
			return 0, err
		}
		if a.status == acquireTaken {
			if a.beyond {
				w.log = l.log.With("pod", p.name, "token", p.uid)
				w.logBeyond()
			}
			l.setState(p, podWaits, podHolds)
			asked = 0 // the next one may be served, too
			continue
		}
		if a.status == acquireGaveUp {
			l.giveUp(p, w.gaveUp(a).text)
			continue
		}
		if isOver { // holders may come back
			l.askAgainIn(p, max(endedRetry, a.place.freeIn))
		}
		if !a.place.reachable && l.sharesServer(ctx) {
			l.gate.subscription.redial(l.id, p.uid)
		}
		if position := a.place.position; position > 0 {
			l.announceAt(p, position, ordinal(position), a.occupancy)
		}
		pause = min(pause, untilPoll(a))
	}
	return pause, nil
}

// sharesServer reports whether the server of the line is that of the gate's subscription. In
// a Cluster, a node knows only those of its own clients that receive its messages.
// sharesServer does not wait for a server that is away: this line may need another.
func (l *gateLine) sharesServer(ctx context.Context) bool {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	server, err := l.gate.semaphores.queue.find(ctx, l.id)
	other, err2 := l.gate.semaphores.queue.find(ctx, auxiliaryID)
	return err == nil && err2 == nil && server == other
}

// redisTime returns the time of the line's Redis, in Unix microseconds; 0 if it is not known.
func (l *gateLine) redisTime(ctx context.Context) int64 {
	server, err := l.gate.semaphores.queue.find(ctx, l.id)
	if err != nil {
		return 0
	}
	return server.clock.at(time.Now())
}

// giveUp notes that a pod has given up, and is out of the line.
func (l *gateLine) giveUp(seen *podSnapshot, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := seen.live; p.state == podWaits {
		p.state, p.gaveUp, p.placed, p.refusal, p.taken = podGaveUp, why, false, nil, time.Now()
		seen.gaveUp = why
		l.wake()
	}
}

// askAgainIn notes how long a pod whose time is over still waits.
func (l *gateLine) askAgainIn(p *podSnapshot, pause time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.live.askAgain = time.Now().Add(pause)
}

// acquire acquires the token of a pod, within acquireTimeout. If the semaphore needs a
// repair, Redis may have lost its data since the last refresh. So the place of the pod is
// refreshed again before the repair makes new tokens.
func (l *gateLine) acquire(ctx context.Context, w *waiter, p *podSnapshot) (acquireReply, error) {
	ctx, cancel := context.WithTimeout(ctx, acquireTimeout)
	defer cancel()
	a, err := l.gate.semaphores.runAcquire(ctx, l.id, acquireRequest{token: w.token, length: w.length, tokens: w.tokens,
		arrival: joinLine, pod: w.pod, limit: l.setting.limit, wait: w.ends})
	if err != nil || a.status != acquireRepair {
		return a, err
	}
	places := []placeRequest{l.placeOf(p)}
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
		if p == nil {
			continue
		}
		l.mu.Lock()
		isFirst := p.live.announced == 0
		if isFirst {
			p.live.announced = position
		}
		l.mu.Unlock()
		if isFirst {
			l.announce(p, "1", position, ordinal(position), all.occupancy)
		}
	}
}

// announceMoved creates events for the pods in line that have moved up; see announceAt.
// Redis does not tell it their positions: it knows which pods of this gate are ahead, and
// counts all other waiters as ahead.
func (l *gateLine) announceMoved(waiting []*podSnapshot, all placesReply) {
	inLine := slices.DeleteFunc(slices.Clone(waiting), func(p *podSnapshot) bool {
		state, _ := l.stateOf(p)
		return state != podWaits
	})
	others := max(0, all.waiters-len(inLine))
	for i, p := range inLine {
		position := i + 1 + others
		text := ordinal(position)
		if others > 0 {
			text = "at most " + text
		}
		l.announceAt(p, position, text, all.occupancy)
	}
}

// announceAt creates an event for a pod that has moved up to half of the position that an
// event said last, or further. While others wait to be sent, it leaves that to the next
// refresh: no event says an old position, or displaces another event. A gate that has just
// started does not know what events have said, and begins with what it finds.
func (l *gateLine) announceAt(p *podSnapshot, position int, text string, o occupancy) {
	l.mu.Lock()
	said := p.live.announced
	hasMoved := 2*position <= said && l.gate.kubernetes.hasRoomForEvents()
	if said == 0 || hasMoved {
		p.live.announced = position
	}
	l.mu.Unlock()
	if hasMoved { // two gates that find about the same position create one event
		l.announce(p, fmt.Sprintf("moved %d", bits.Len(uint(position))), position, text, o)
	}
}

// announce creates an event that says where a pod stands in line.
func (l *gateLine) announce(p *podSnapshot, id string, position int, place string, o occupancy) {
	text := fmt.Sprintf("%s: %s, %s in line%s%s", waitsFor(l.id, p.spec.tokens, o.setting.lengthFor(p.spec.length)),
		o.setting.inUse(o.inUse, p.spec.length, 0), place, o.toGo(position, p.spec.tokens), doubtText(o.doubt))
	l.gate.event(p.watchedPod, false, reasonWaiting, "Waiting", id, text)
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
