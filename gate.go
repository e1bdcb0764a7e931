package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The reasons of events.
const (
	reasonWaiting = "WaitingForToken"
	reasonBlocked = "WaitingForGates"
	reasonTaken   = "TokenTaken"
	reasonLate    = "TokenLetGo"
	reasonGaveUp  = "GaveUp" // also of a pod's status
	reasonInvalid = "InvalidAnnotations"
)

// watchPatience is how long the gate leaves a pod alone that it has changed: by then, the
// watch shows the change.
const watchPatience = 200 * time.Millisecond

// labelRetry is the pause before the gate removes a label again that the API server has
// refused to remove.
const labelRetry = 30 * time.Second

// gate waits in line for the pods that have our scheduling gate. It lifts the gate of a
// pod that has a token, and keeps the token until the pod's sidecar does. All its work is
// named by the pods' UIDs and safe to do twice, so several gates may run at once.
type gate struct {
	kubernetes    *kubernetes
	semaphores    *semaphores
	subscription  *subscription
	unschedulable time.Duration
	metrics       *gateMetrics
	log           *slog.Logger
	background    sync.WaitGroup // lines, and changes of pods
	ctx           context.Context

	views map[string]*podWatch // by namespace; "" is all namespaces

	owners ownerFile

	mu        sync.Mutex
	lines     map[semaphoreID]*gateLine
	strangers map[string]*watchedPod // by UID: pods that have our label, and no sidecar of the webhook
}

// runGate runs the gate mode until ctx is done.
func runGate(ctx context.Context, c gateConfig, log *slog.Logger) (err error) {
	listener, err := listen("--metrics-bind-address", c.metricsBindAddress)
	if err != nil {
		return err
	}
	defer listener.Close()
	g, err := newGate(c, log)
	if err != nil {
		return err
	}
	server := newHealthServer(g.healthRoutes(), newHTTPErrors(log))
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	go func() { fail(server.Serve(listener)) }()
	log.Info("standing in line for gated pods", "version", version, "lockMode", c.lockMode,
		"queueRedis", c.queueRedisAddress.text, "apiServer", g.kubernetes.address,
		"namespaces", strings.Join(c.kubernetes.namespaces, ","))
	g.run(ctx)
	cause := context.Cause(ctx)
	log.Info("stopping", "reason", cause.Error())
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackGrace)
	defer cancel()
	err = errors.Join(g.semaphores.close(ending), server.Close())
	if !errors.Is(cause, context.Canceled) {
		err = errors.Join(cause, err)
	}
	return err
}

func newGate(c gateConfig, log *slog.Logger) (*gate, error) {
	k, err := newKubernetes(c.kubernetes, log)
	if err != nil {
		return nil, err
	}
	c.redis.counts = new(redisCounts)
	s := newSemaphores(c.settings, newLocker(c.settings, lockConnections), idleConnections, log)
	s.metrics = newMetrics(c.redis.counts)
	namespaces := c.kubernetes.namespaces
	if len(namespaces) == 0 {
		namespaces = []string{""}
	}
	g := &gate{
		kubernetes:    k,
		semaphores:    s,
		subscription:  newSubscription(s.queue, auxiliaryID, log),
		unschedulable: c.unschedulable,
		log:           log,
		views:         map[string]*podWatch{},
		lines:         map[semaphoreID]*gateLine{},
		strangers:     map[string]*watchedPod{},
	}
	g.owners = newOwnerFile(c.semaphoresFile, log, g.readmit)
	for _, namespace := range namespaces {
		g.views[namespace] = k.newPodWatch(labelGated, namespace, g)
	}
	g.metrics = newGateMetrics(g)
	s.metrics.watchSettings(g.owners)
	return g, nil
}

// run works until ctx is done. It leaves places and tokens: another process, or this one
// after a restart, keeps them.
func (g *gate) run(ctx context.Context) {
	g.ctx = ctx
	g.background.Go(func() { g.kubernetes.run(ctx) })
	g.background.Go(func() { g.subscription.receiveRetrying(ctx) })
	g.background.Go(func() { g.pulse(ctx) })
	g.background.Go(func() { g.owners.watch(ctx, fileInterval) })
	for _, view := range g.views {
		g.background.Go(func() { view.run(ctx) })
	}
	<-ctx.Done()
	g.background.Wait()
}

// setPod receives each gated pod, and each change of it.
func (g *gate) setPod(p *watchedPod) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.admit(p)
}

// admit puts a pod in the line of its semaphore, unless it must not be there. Call it
// with mu.
func (g *gate) admit(p *watchedPod) {
	c, err := gatedToken(strings.Split(p.sidecarArgs, argsSeparator), p.namespace, p.uid)
	why := "invalid arguments of " + sidecarName
	if err == nil {
		why, err = "it stays gated", g.mayShare(p, c.semaphore)
	}
	if err != nil { // the webhook admits no such pod
		if text := strings.ReplaceAll(err.Error(), "\n", ""); g.strangers[p.uid] == nil {
			g.log.Warn("a gated pod has no sidecar that waits for a token of its own, and stays gated",
				"namespace", p.namespace, "pod", p.name, "error", text)
			g.event(p, true, reasonInvalid, "Waiting", "1", why+": "+text)
		}
		g.strangers[p.uid] = p
		return
	}
	delete(g.strangers, p.uid)
	l := g.lines[c.semaphore]
	if l == nil {
		l = newGateLine(g, c.semaphore)
		g.lines[c.semaphore] = l
		g.background.Go(func() { l.run(g.ctx) })
	}
	if owners, err := g.owners.settings(); err == nil {
		line, isSet := owners.lineOf(c.semaphore.namespace, c.semaphore.key)
		if line.capped {
			c.headStart = min(c.headStart, line.headStart)
		}
		if isSet && !line.runs && c.wait.runs() {
			c.wait = waitEnd{}
		}
	}
	l.set(p, semaphoreSpec{key: c.semaphore.key, length: c.length, tokens: c.tokens, headStart: c.headStart,
		expiration: c.expiration, wait: c.wait})
}

// mayShare returns why a pod that is still gated may not use a shared semaphore, or nil.
// A pod that is in line keeps its place. Call it with mu.
func (g *gate) mayShare(p *watchedPod, id semaphoreID) error {
	if id.namespace != shared || !slices.Contains(p.gates, gateName) {
		return nil
	}
	if l := g.lines[id]; l != nil && l.has(p.uid) {
		return nil
	}
	owners, err := g.owners.settings()
	if err != nil {
		return err
	}
	return owners.mayShare(p.namespace, id.key)
}

// readmit looks again at the pods that were refused: there are other settings.
func (g *gate) readmit() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range slices.Collect(maps.Values(g.strangers)) {
		g.admit(p)
	}
}

// dropPod receives each pod that is gone, or no longer needs the gate.
func (g *gate) dropPod(p *watchedPod) {
	c, err := gatedToken(strings.Split(p.sidecarArgs, argsSeparator), p.namespace, p.uid)
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.strangers, p.uid)
	if l := g.lines[c.semaphore]; err == nil && l != nil {
		l.drop(p)
	}
}

// synced wakes the lines of a namespace after each list: they may have waited for it.
func (g *gate) synced(namespace string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for id, l := range g.lines {
		if namespace == "" || namespace == id.namespace || id.namespace == shared {
			l.wake()
		}
	}
}

// checkView returns why the gate must not act on the pods of a namespace: what it knows of
// them is not complete yet, or may be old.
func (g *gate) checkView(namespace string) error {
	if all := g.views[""]; all != nil {
		return all.check()
	}
	return g.views[namespace].check()
}

// checkLine is checkView for the pods of a line. Those of a shared semaphore may be in
// several views: see gateLine.snapshot.
func (g *gate) checkLine(id semaphoreID) error {
	if id.namespace == shared && g.views[""] == nil {
		return nil
	}
	return g.checkView(id.namespace)
}

// closeIfEmpty removes a line without pods.
func (g *gate) closeIfEmpty(l *gateLine) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pods) > 0 {
		return false
	}
	delete(g.lines, l.id)
	return true
}

// tokensEvery is how often the gate refreshes tokens: like sidecars, but at least four
// times in a threshold.
func (g *gate) tokensEvery() time.Duration {
	return min(g.semaphores.heartbeatInterval, g.semaphores.staleThreshold/4)
}

// event creates a Kubernetes event for a pod.
func (g *gate) event(p *watchedPod, warning bool, reason, action, id, note string) {
	g.kubernetes.createEvent(objectEvent{about: p.reference(), reporter: "gate", warning: warning, reason: reason,
		action: action, note: note, id: id})
}

// testGated makes a patch fail unless the pod has our gate at this place, and, if it may
// have given up, has not failed.
func (p *gatedPod) testGated(steps *patch) (index int) {
	index = slices.Index(p.gates, gateName)
	steps.test(p.uid, "metadata", "uid")
	steps.test(gateName, "spec", "schedulingGates", strconv.Itoa(index), "name")
	if p.spec.wait.fails() {
		steps.test("Pending", "status", "phase")
	}
	return index
}

// fail makes the status of a gated pod Failed. It has given up.
func (g *gate) fail(ctx context.Context, id semaphoreID, p *podSnapshot) error {
	var steps patch
	p.testGated(&steps)
	steps.add("Failed", "status", "phase")
	steps.add(reasonGaveUp, "status", "reason")
	steps.add(p.gaveUp, "status", "message")
	condition := map[string]string{"type": conditionGaveUp, "status": "True", "reason": reasonGaveUp,
		"message": p.gaveUp, "lastTransitionTime": time.Now().UTC().Format(time.RFC3339)}
	if i := slices.Index(p.conditions, conditionScheduled); i >= 0 { // its reason is what kubectl shows
		steps.test(conditionScheduled, "status", "conditions", strconv.Itoa(i), "type")
		steps.add(reasonGaveUp, "status", "conditions", strconv.Itoa(i), "reason")
	}
	if len(p.conditions) > 0 {
		steps.add(condition, "status", "conditions", "-")
	} else {
		steps.add([]any{condition}, "status", "conditions")
	}
	if err := g.kubernetes.patchPodStatus(ctx, p.namespace, p.name, steps.json()); err != nil {
		return err
	}
	g.log.Info("pod failed", "namespace", id.namespace, "key", id.key, "pod", p.name, "token", p.uid, "reason", p.gaveUp)
	g.event(p.watchedPod, true, reasonGaveUp, "Failing", "1", p.gaveUp)
	return nil
}

// lift lifts the gate of a pod that holds a token.
func (g *gate) lift(ctx context.Context, id semaphoreID, p *podSnapshot) error {
	var steps patch
	index := p.testGated(&steps)
	steps.remove("spec", "schedulingGates", strconv.Itoa(index))
	steps.add(strconv.FormatInt(time.Now().Unix(), 10), "metadata", "labels", labelGated)
	if err := g.kubernetes.patchPod(ctx, p.namespace, p.name, steps.json()); err != nil {
		return err
	}
	waited := time.Since(p.created)
	g.metrics.lifted(waited, p.taken)
	g.log.Info("gate lifted", "namespace", id.namespace, "key", id.key, "pod", p.name, "token", p.uid,
		"waitedSeconds", seconds(waited))
	g.event(p.watchedPod, false, reasonTaken, "LiftingGate", "1",
		fmt.Sprintf("token of %s taken after %s in line", id, roughly(max(0, waited))))
	return nil
}

// removeLabel removes our label from a pod that no longer needs the gate. Nothing waits for
// that, so a refused removal is retried seldom.
func (g *gate) removeLabel(ctx context.Context, p *watchedPod) (again time.Duration) {
	var steps patch
	steps.test(p.uid, "metadata", "uid")
	steps.remove("metadata", "labels", labelGated)
	err := g.kubernetes.whenQuiet(ctx, func() error {
		return g.kubernetes.patchPod(ctx, p.namespace, p.name, steps.json())
	})
	if errors.Is(err, errChanged) { // another gate has removed it, or the API server refuses
		now, gone := g.kubernetes.getPod(ctx, p.namespace, p.name, p.uid)
		if gone != nil || now.labels[labelGated] == "" {
			return watchPatience
		}
	}
	if err == nil || errors.Is(err, errNotFound) || ctx.Err() != nil {
		return watchPatience
	}
	g.log.Warn("label not removed, to be retried", "namespace", p.namespace, "pod", p.name, "error", err.Error())
	if errors.Is(err, errTryAgain) {
		return time.Second
	}
	return labelRetry
}

// checkViews returns whether the gate hears of the pods of any namespace. unheard tells of
// each namespace of which it does not.
func (g *gate) checkViews() (atWork bool, unheard error) {
	var problems serverErrors
	for _, namespace := range slices.Sorted(maps.Keys(g.views)) {
		switch err := g.views[namespace].check(); {
		case err == nil:
			atWork = true
		case namespace == "":
			problems = append(problems, err)
		default:
			problems = append(problems, fmt.Errorf("%s: %w", namespace, err))
		}
	}
	if problems == nil {
		return atWork, nil
	}
	return atWork, problems
}

// healthRoutes reports the gate as ready while it hears of any namespace. Otherwise one
// deleted namespace would block roll-outs, and drains of nodes, of a gate that works.
func (g *gate) healthRoutes() http.Handler {
	return newHealthRoutes(func(context.Context) (string, error) {
		atWork, unheard := g.checkViews()
		if unheard == nil {
			return "", nil
		}
		if !atWork {
			return "", unheard
		}
		return fmt.Sprintf("warning: not for all namespaces: %v", unheard), nil
	}, g.semaphores.metrics.handler(g.log))
}

// pulse refreshes the key by which webhooks see that a gate is at work.
func (g *gate) pulse(ctx context.Context) {
	for ctx.Err() == nil {
		if atWork, _ := g.checkViews(); atWork {
			_, err := runCommand(ctx, g.semaphores.queue, "HSET", pulseKey, "version", version)
			if err == nil {
				_, err = runCommand(ctx, g.semaphores.queue, "EXPIRE", pulseKey, seconds(pulseTime))
			}
			if err != nil && ctx.Err() == nil {
				g.log.Debug("pulse not written, to be retried", "error", err.Error())
			}
		}
		_ = sleep(ctx, pulseEvery)
	}
}

// gateMetrics are the gate's metrics, beside those of semaphores.
type gateMetrics struct {
	waits prometheus.Histogram
	lifts prometheus.Histogram
}

func newGateMetrics(g *gate) *gateMetrics {
	m := &gateMetrics{
		waits: prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricsPrefix + "gate_wait_seconds",
			Help:    "Time from a pod's creation to the lifting of its gate.",
			Buckets: []float64{.1, .5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 14400, 86400}}),
		lifts: prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricsPrefix + "gate_lift_seconds",
			Help:    "Time from a token that was taken for a pod to the lifting of its gate.",
			Buckets: durationBuckets}),
	}
	r := g.semaphores.metrics.registry
	r.MustRegister(m.waits, m.lifts)
	for namespace, view := range g.views {
		// An empty label keeps a scrape from putting the gate's own namespace there.
		labels := prometheus.Labels{"namespace": namespace}
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "gate_heard_seconds_ago",
			Help:        "Time since the API server confirmed what the gate knows of the pods of a namespace, or of all.",
			ConstLabels: labels}, func() float64 { return view.silent().Seconds() }))
	}
	for state, name := range map[lineState]string{podWaits: "waiting", podBlocked: "blocked", podHolds: "starting"} {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "gated_pods",
			Help:        "Pods in the care of this process: waiting in line, blocked by other gates, or starting with a token.",
			ConstLabels: prometheus.Labels{"state": name}}, func() float64 { return float64(g.count(state)) }))
	}
	return m
}

func (m *gateMetrics) lifted(waited time.Duration, taken time.Time) {
	m.waits.Observe(waited.Seconds())
	if !taken.IsZero() {
		m.lifts.Observe(time.Since(taken).Seconds())
	}
}

// count returns the number of pods in a state.
func (g *gate) count(state lineState) (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, l := range g.lines {
		l.mu.Lock()
		for _, p := range l.pods {
			if p.state == state {
				n++
			}
		}
		l.mu.Unlock()
	}
	return n
}
