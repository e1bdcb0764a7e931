package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Verdicts on annotated pods, as they are logged.
const (
	verdictAdmitted      = "admitted"
	verdictWait          = "wait" // admitted: the pod waits for its token
	verdictGate          = "gate" // admitted: the pod is scheduled once it has its token
	verdictFull          = "full"
	verdictInvalid       = "invalid"
	verdictDryRun        = "dry-run"
	verdictFailed        = "failed"        // no decision: Redis or the lock servers were unreachable
	verdictUndeliverable = "undeliverable" // decided, but the API server did not get the answer; a token is given back
	verdictStatic        = "static"        // left alone: the mirror of a static pod
	verdictBadRequest    = "bad request"   // no valid AdmissionReview
)

// verdicts has all of them.
var verdicts = []string{verdictAdmitted, verdictWait, verdictGate, verdictFull, verdictInvalid, verdictDryRun,
	verdictFailed, verdictUndeliverable, verdictStatic, verdictBadRequest}

// deniedWindows is the denial of pods that cannot run the sidecar.
const deniedWindows = "this is a Windows pod (by spec.os.name, or its nodeSelector " + corev1.LabelOSStable + "): " +
	"the sidecar of a semaphore runs on Linux only"

// lookTimeout bounds a read of Redis that only a warning needs.
const lookTimeout = time.Second

// mostWarning bounds a warning. Kubernetes asks for 120 characters, if possible, and may
// cut warnings of more than 256.
const mostWarning = 256

// Warnings to users.
const (
	warningWaits = "this pod may wait in Init:1/2 for a token of its semaphore; " +
		"its sidecar's log says where it stands in line"
	warningGated = "this pod stays SchedulingGated until it has a token; its events say its place in line; " +
		"without any event, no gate runs"
	warningJobGated = "the pods of this %s stay SchedulingGated until they have a token; see their events; " +
		"without any, no gate runs"
	warningNotGated = "a pod with a nodeName cannot be gated: " +
		"this one may wait in Init:1/2 for a token of its semaphore"
	warningJobWaits = "the pods of this %s may wait in Init:1/2 for a token of their semaphore; " +
		"their sidecars' logs say where they stand"
	warningNotCompleting = "this pod will not complete: " +
		"its semaphore sidecar is a classic container, which runs until the pod is deleted"
	warningGrace = "terminationGracePeriodSeconds is %d: " +
		"a sidecar that does not reach Redis at once needs %d s to give the token back"
	warningHostNetwork = "hostNetwork without dnsPolicy ClusterFirstWithHostNet: " +
		"the sidecar may not find Redis, and the app not start"
	warningSet       = "the annotation length is %d, but the ConfigMap semaphores sets %d for %s: this counts"
	warningHeadStart = "the annotation head-start is %d, but the ConfigMap semaphores allows %d for %s: this counts"
	warningStays     = "the ConfigMap semaphores lets no pod of %s run beyond the length: the pod waits until it has a token"
	warningLength    = "this pod sets the length of its semaphore to %d, others set %d lately: " +
		"a greater one also helps pods ahead in line"
	warningForgotten = "no sidecar starts here: kubectl label namespace %s " + labelSidecars + "=true"
	warningStatic    = "a static pod gets no semaphore sidecar and no token: its semaphore does not count it"
	warningJob       = "the pods of this %s will not complete: " +
		"their sidecar is a classic container, which runs until they are deleted"
	warningStuck = "updates of this Deployment will not end: with %d replicas on %d tokens%s, maxUnavailable must be " +
		"at least %d, not %d; or choose the strategy Recreate"
	warningDeadline = "this %s may fail in line: its activeDeadlineSeconds is %d, and a pod that comes now " +
		"waits for about %s"
	warningMisplaced = annotationPrefix + "* does nothing on a %s: move it to %s.metadata"
	warningRefused   = "the pods of this %s will be refused: %s"
)

// decision is the answer to a request, with what to log and to undo.
type decision struct {
	response  *admissionv1.AdmissionResponse
	verdict   string // empty if the request is of no annotated pod
	pod       string
	semaphore semaphoreID
	token     string // taken for this pod; given back if the pod does not get it
}

// admitter decides admission requests.
type admitter struct {
	config     webhookConfig
	semaphores *semaphores
	users      *namespaceUsers
	owners     ownerFile
	changed    wakeup // there are other settings
}

func newAdmitter(c webhookConfig, s *semaphores) admitter {
	a := admitter{config: c, semaphores: s, changed: newWakeup()}
	a.owners = newOwnerFile(c.semaphoresFile, s.log, a.changed.wake)
	if c.redis.username != "" && c.sidecarRedisSecret != "" {
		a.users = &namespaceUsers{queue: s.queue}
	}
	return a
}

// decide answers one request. Its error is *badRequest, or says why no decision was
// possible. The decision then has what to log, and a token to give back.
func (a *admitter) decide(ctx context.Context, r *admissionRequest) (decision, error) {
	d := decision{response: &admissionv1.AdmissionResponse{UID: r.UID, Allowed: true}}
	if template := templateOf(r); template != "" {
		return d, a.warnWorkload(ctx, &d, r, template)
	}
	if r.Operation != admissionv1.Create || r.Kind.Group != "" || r.Kind.Kind != "Pod" || r.SubResource != "" {
		return d, nil
	}
	p, err := decodePod(r)
	if err != nil {
		return d, err
	}
	d.warnAll(doubtfulAnnotations(p.Metadata.Annotations))
	if p.Metadata.Annotations[annotationEnabled] != "true" {
		return d, nil
	}
	d.pod = truncate(p.name(), maxKey)
	if p.isStatic() {
		d.verdict = verdictStatic
		d.warn(warningStatic)
		return d, nil
	}
	if p.isWindows() {
		d.verdict = verdictInvalid
		d.deny(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, deniedWindows)
		return d, nil
	}
	spec, problems, err := a.parse(r.Namespace, p)
	d.semaphore = newSemaphoreID(r.Namespace, truncate(spec.key, maxKey))
	if err != nil {
		d.verdict = verdictFailed
		return d, err
	}
	if len(problems) > 0 {
		d.verdict = verdictInvalid
		d.deny(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid,
			"invalid annotations: "+strings.Join(problems, "; "))
		return d, nil
	}
	if a.users.forgotten(ctx, r.Namespace) {
		d.warn(warningForgotten, r.Namespace)
	}
	d.warnOfSettings(spec, d.semaphore)
	if spec.whenFull == whenFullGate && p.Spec.NodeName != "" {
		spec.whenFull = whenFullWait
		d.warn(warningNotGated)
	} else {
		d.warnOfWait(spec.whenFull, warningWaits, warningGated)
	}
	if spec.whenFull == whenFullWait || spec.whenFull == whenFullGate { // takes no token here, dry run or not
		switch d.verdict = verdictWait; {
		case r.DryRun:
			d.verdict = verdictDryRun
		case spec.whenFull == whenFullGate:
			d.verdict = verdictGate
		}
		if spec.isSet && spec.set == 0 && !r.DryRun {
			// Redis must know the pause before the sidecar asks, which may be hours
			// later.
			owners, _ := a.owners.settings()
			if err := a.semaphores.setLimit(ctx, d.semaphore, limitOf(owners, d.semaphore), limitLife, true); err != nil {
				d.verdict = verdictFailed
				return d, err
			}
		}
		d.admit(a.config, p, spec, "")
		return d, nil
	}
	if r.DryRun {
		d.verdict = verdictDryRun
		d.admit(a.config, p, spec, uuid.Nil.String())
		return d, nil
	}
	var agreed int
	name := newPodName(d.semaphore.podName(r.Namespace, p.name()), "")
	set := limit{known: spec.isSet, length: spec.set}
	d.token, agreed, err = a.semaphores.acquire(ctx, d.semaphore, name, spec.length, set, spec.expiration)
	var full *fullError
	if errors.As(err, &full) {
		d.verdict = verdictFull
		d.deny(http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, refusal(full))
		return d, nil
	}
	if err != nil {
		d.verdict = verdictFailed
		return d, err
	}
	d.verdict = verdictAdmitted
	if agreed != 0 && agreed != spec.length && !spec.isSet {
		d.warn(warningLength, spec.length, agreed)
	}
	d.admit(a.config, p, spec, d.token)
	return d, nil
}

// parse reads the annotations of a pod in a namespace, and returns all problems for which
// this webhook refuses it. Its error is that the owner's settings are needed, and not
// known.
func (a *admitter) parse(namespace string, p *pod) (spec semaphoreSpec, problems []string, err error) {
	annotations := p.Metadata.Annotations
	owners, err := a.owners.settings()
	spec, problems = parseAnnotations(namespace, annotations, a.config.whenFull, a.config.maxHeadStart, owners)
	if err != nil && (annotations[annotationLength] == "" || spec.headStart > 0 || spec.wait.runs() ||
		strings.HasPrefix(spec.key, shared)) {
		return spec, nil, fmt.Errorf("the settings of semaphores are needed: %w", err)
	}
	if (spec.whenFull == whenFullWait || spec.whenFull == whenFullGate) && !a.config.enableSidecarContainers {
		problems = append(problems, fmt.Sprintf("%s is %q: this needs native sidecars, "+
			"and the webhook injects classic ones (--enable-sidecar-containers=false)",
			annotationWhenFull, spec.whenFull))
	}
	if policy := p.Spec.RestartPolicy; spec.wait.fails() && policy != "Never" && policy != "OnFailure" {
		problems = append(problems, fmt.Sprintf("%s needs restartPolicy Never or OnFailure, as the pod fails then: "+
			"with Always, it would wait again for ever; or set %s to %q",
			annotationWait, strings.TrimPrefix(annotationWhenWaited, annotationPrefix), whenWaitedRun))
	}
	return spec, problems, nil
}

// limitsMissing is the time between two looks for semaphores of which Redis knows no
// limit.
const limitsMissing = 10 * time.Second

// keepLimits makes Redis know the limits that it has lost or not heard of, and those that
// have changed in the file. Where setup is at work, it has told Redis before.
func (a *admitter) keepLimits(ctx context.Context) {
	go a.owners.watch(ctx, fileInterval)
	told, _ := a.owners.settings()
	var untold map[semaphoreID]bool // of the changes
	var warnings logLimiter
	for ctx.Err() == nil {
		_ = a.changed.waitFor(ctx, limitsMissing)
		owners, err := a.owners.settings()
		if err != nil || len(owners.lines)+len(told.lines) == 0 {
			continue
		}
		look, cancel := context.WithTimeout(ctx, limitsMissing)
		states, err := a.semaphores.survey(look, "")
		if err = new(spoiltErrors).add(err); err == nil || len(states) > 0 {
			failed, failure := a.semaphores.keepLimits(look, states, owners, func(id semaphoreID) bool {
				return limitOf(owners, id) != limitOf(told, id) || untold[id]
			})
			if err == nil { // with another file, all that is left is what failed
				told, untold = owners, failed
			}
			err = cmp.Or(err, failure)
		}
		cancel()
		if err == nil || ctx.Err() != nil {
			continue
		}
		if _, ok := warnings.allow(); ok {
			a.semaphores.log.Warn("limits not told to Redis, to be retried", "error", err.Error())
		}
	}
}

// refusal is the denial of a pod that gets no token.
func refusal(e *fullError) string {
	text := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use%s", e.id, e.inUse,
		e.setting.lengthFor(e.length), byPods(podsOf(e.holders, e.inUse)))
	if set := e.setting.text(); set != "" {
		text = fmt.Sprintf("no semaphore available: %s is %s; %d in use", e.id, set, e.inUse)
	}
	if by := byHolders(e.holders, e.inUse); by != "" {
		text += ", " + by
	}
	if e.waiters > 0 {
		text += fmt.Sprintf("; %d waiting in line", e.waiters)
	}
	if wait, ok := e.startsIn(e.waiters+1, 1); ok {
		text += "; the next free one is expected in about " + roughly(wait)
	}
	return text + doubtText(e.doubt)
}

// admit adds the patch to the response: with a token, or without one for a pod that
// waits.
func (d *decision) admit(c webhookConfig, p *pod, spec semaphoreSpec, token string) {
	d.response.Patch = sidecarPatch(c, p, d.semaphore, spec, token)
	d.response.PatchType = new(admissionv1.PatchTypeJSONPatch)
	if !c.enableSidecarContainers && (p.Spec.RestartPolicy == "Never" || p.Spec.RestartPolicy == "OnFailure") {
		d.warn(warningNotCompleting)
	}
	d.warnOfPod(c, p)
}

// warnOfPod warns of what hinders the sidecar of a pod.
func (d *decision) warnOfPod(c webhookConfig, p *pod) {
	if grace := p.Spec.GracePeriod; grace != nil && *grace < giveBackSeconds {
		d.warn(warningGrace, *grace, giveBackSeconds)
	}
	if p.asksNodeForNames() {
		d.warn(warningHostNetwork)
	}
	for _, name := range slices.Sorted(maps.Keys(c.podAnnotations)) {
		if own, ok := p.Metadata.Annotations[name]; ok && own != c.podAnnotations[name] {
			d.warn("the pod keeps its own annotation %s; the cluster's is %s",
				name, quoteShort(c.podAnnotations[name]))
		}
	}
}

// warnWorkload allows an object with a pod template. Warnings about its pods go to a
// controller; the user sees only those about this object.
func (a *admitter) warnWorkload(ctx context.Context, d *decision, r *admissionRequest, template string) error {
	var w workload
	if err := json.Unmarshal(r.Object, &w); err != nil {
		return badRequestf("decode request.object: %v", err)
	}
	p := w.pod()
	annotations, kind := p.Metadata.Annotations, r.Kind.Kind
	if w.misplaces(annotations) {
		d.warn(warningMisplaced, kind, template)
	}
	d.warnAll(doubtfulAnnotations(annotations))
	if annotations[annotationEnabled] != "true" {
		return nil
	}
	spec, problems, err := a.parse(r.Namespace, p)
	if err != nil { // its pods will hear of it
		return nil
	}
	if p.isWindows() {
		problems = []string{deniedWindows}
	}
	for _, text := range problems {
		d.warn(warningRefused, kind, text)
	}
	if len(problems) > 0 {
		return nil
	}
	if a.users.forgotten(ctx, r.Namespace) {
		d.warn(warningForgotten, r.Namespace)
	}
	d.warnOfSettings(spec, newSemaphoreID(r.Namespace, spec.key))
	each := ""
	if spec.tokens > 1 {
		each = fmt.Sprintf(", %d each", spec.tokens)
	}
	if unavailable, enough, ok := w.canRoll(spec.length / spec.tokens); !ok && kind == "Deployment" {
		d.warn(warningStuck, *w.Spec.Replicas, spec.length, each, enough, unavailable)
	}
	a.warnOfDeadline(ctx, d, w.deadline(), kind, newSemaphoreID(r.Namespace, spec.key), spec)
	switch {
	case kind != "Job" && kind != "CronJob":
	case !a.config.enableSidecarContainers:
		d.warn(warningJob, kind)
	default:
		d.warnOfWait(spec.whenFull, fmt.Sprintf(warningJobWaits, kind), fmt.Sprintf(warningJobGated, kind))
	}
	d.warnOfPod(a.config, p)
	return nil
}

// warnOfDeadline warns of a Job that fails before the line has come to it.
func (a *admitter) warnOfDeadline(ctx context.Context, d *decision, deadline int64, kind string, id semaphoreID,
	spec semaphoreSpec) {
	if deadline == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	now, err := a.semaphores.inspect(ctx, id, 5)
	if err != nil { // a warning is worth no error
		return
	}
	if wait, ok := now.forecast().startsIn(spec.length, now.waiting, spec.tokens); ok && int64(seconds(wait)) > deadline {
		d.warn(warningDeadline, kind, deadline, roughly(wait))
	}
}

// warnOfSettings warns a user whose length, head start or when-waited does not count.
func (d *decision) warnOfSettings(spec semaphoreSpec, id semaphoreID) {
	if spec.isSet && spec.asked != 0 && spec.asked != spec.set {
		d.warn(warningSet, spec.asked, spec.set, id)
	}
	if spec.headStart < spec.wishes {
		d.warn(warningHeadStart, seconds(spec.wishes), seconds(spec.headStart), id)
	}
	if spec.stays {
		d.warn(warningStays, id)
	}
}

// warnOfWait warns a user whose pods may wait.
func (d *decision) warnOfWait(whenFull, waits, gated string) {
	switch whenFull {
	case whenFullWait:
		d.warn("%s", waits)
	case whenFullGate:
		d.warn("%s", gated)
	}
}

// audit adds the decision for the API server's audit log. Kubernetes prefixes these names
// with the webhook's. The token of a pod that waits is its UID, which no request to create
// it has. So the pod's name, or the beginning of it, leads from the audit log to status.
func (d *decision) audit() {
	if d.verdict == "" {
		return
	}
	d.response.AuditAnnotations = map[string]string{"verdict": d.verdict, "pod": d.pod}
	if d.semaphore.key != "" {
		d.response.AuditAnnotations["semaphore"] = d.semaphore.String()
	}
	if d.token != "" {
		d.response.AuditAnnotations["token"] = d.token
	}
}

// warn adds a warning to the user, whatever the decision.
func (d *decision) warn(format string, args ...any) {
	d.response.Warnings = append(d.response.Warnings, truncate(fmt.Sprintf(format, args...), mostWarning))
}

func (d *decision) warnAll(texts []string) {
	for _, text := range texts {
		d.warn("%s", text)
	}
}

// deny turns the response into a denial.
func (d *decision) deny(code int32, reason metav1.StatusReason, message string) {
	d.response = &admissionv1.AdmissionResponse{
		UID:      d.response.UID,
		Warnings: d.response.Warnings,
		Result:   &metav1.Status{Status: metav1.StatusFailure, Code: code, Reason: reason, Message: message},
	}
}

// pulseKey is the key by which webhooks see that a gate is at work.
var pulseKey = auxiliaryID.stateKey()

const (
	pulseEvery = 5 * time.Second
	pulseTime  = 30 * time.Second // after which pulseKey expires: no gate is at work
)

// countVerdicts registers the metric of admissions, with each verdict at zero.
func (m *metrics) countVerdicts() {
	m.admissions = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    metricsPrefix + "admission_duration_seconds",
		Help:    "Time from an admission request for an annotated pod to its answer.",
		Buckets: durationBuckets,
	}, []string{"verdict"})
	m.registry.MustRegister(m.admissions)
	for _, verdict := range verdicts {
		m.admissions.WithLabelValues(verdict)
	}
}

func (m *metrics) admission(verdict string, took time.Duration) {
	if m != nil {
		m.admissions.WithLabelValues(verdict).Observe(took.Seconds())
	}
}

// watchGate registers a metric that says whether a gate is at work; NaN while the queue
// does not answer.
func (m *metrics) watchGate(q tokenServers) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "gate_at_work",
		Help: "1 if a gate is at work, which lifts the gates of pods, and 0 if none is."}, func() float64 {
		gates, err := redis.Int(runCommand(context.Background(), q, "EXISTS", pulseKey))
		if err != nil {
			return math.NaN()
		}
		return float64(gates)
	}))
}

// namespaceUsers caches the names of the users of Redis, to warn if a namespace has none.
// It is nil if Redis has no users.
type namespaceUsers struct {
	queue tokenServers

	mu    sync.Mutex
	read  time.Time
	names []string
}

// A list of users is valid for usersTime. If it lacks a namespace, it is read again, but
// at most once in usersPause.
const (
	usersTime  = time.Minute
	usersPause = time.Second
)

// forgotten reports whether the sidecars of a namespace cannot log in to Redis, because it
// has not got the label. It is false if that is unknown, or if setup makes no users. One
// caller at a time asks Redis, for at most auxiliaryTimeout; no other waits for it.
func (n *namespaceUsers) forgotten(ctx context.Context, namespace string) bool {
	if n == nil || !n.mu.TryLock() {
		return false
	}
	defer n.mu.Unlock()
	has := func(user string) bool { return slices.Contains(n.names, user) }
	if age := time.Since(n.read); age > usersTime || age > usersPause && !has(namespaceUser(namespace)) {
		n.names, _ = redis.Strings(runCommand(ctx, n.queue, "ACL", "USERS")) // the webhook has +acl|users
		n.read = time.Now()
	}
	return has(userOfSetup) && !has(namespaceUser(namespace))
}
