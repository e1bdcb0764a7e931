package main

import (
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

// Warnings to users. Kubernetes cuts them at 120 characters.
const (
	warningWaits = "this pod may wait in Init:1/2 for a token of its semaphore; " +
		"its sidecar's log says where it stands in line"
	warningGated = "this pod stays SchedulingGated until it has a token of its semaphore; " +
		"its events say where it stands in line"
	warningJobGated = "the pods of this Job stay SchedulingGated until they have a token of their semaphore; " +
		"see their events"
	warningNotGated = "a pod with a nodeName cannot be gated: " +
		"this one may wait in Init:1/2 for a token of its semaphore"
	warningNoGate = "no gate is at work, so pods stay SchedulingGated: " +
		"ask an operator to check deployment/gate"
	warningJobWaits = "the pods of this Job may wait in Init:1/2 for a token of their semaphore; " +
		"their sidecars' logs say where they stand"
	warningNotCompleting = "this pod will not complete: " +
		"its semaphore sidecar is a classic container, which runs until the pod is deleted"
	warningGrace = "terminationGracePeriodSeconds is %d: " +
		"a sidecar that does not reach Redis at once needs %d s to give the token back"
	warningLength = "this pod sets the length of its semaphore to %d, others set %d lately: " +
		"a greater one also helps pods ahead in line"
	warningForgotten = "no sidecar starts here: Redis knows no user of this namespace; " +
		"run deploy/namespace.sh %s"
	warningStatic = "a static pod gets no semaphore sidecar and no token: its semaphore does not count it"
	warningJob    = "this Job will not complete: " +
		"its pods' semaphore sidecar is a classic container, which runs until they are deleted"
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
	injector   *injector
	semaphores *semaphores
	users      *namespaceUsers
	pulse      *gatePulse
}

func newAdmitter(c webhookConfig, s *semaphores) (admitter, error) {
	i, err := newInjector(c)
	users := newNamespaceUsers(s.queue, c.redis.username != "" && c.sidecarRedisSecret != "")
	return admitter{c, i, s, users, newGatePulse(s.queue)}, err
}

// decide answers one request. Its error is *badRequest, or says why no decision was
// possible. The decision then has what to log, and a token to give back.
func (a *admitter) decide(ctx context.Context, r *admissionRequest) (decision, error) {
	d := decision{response: &admissionv1.AdmissionResponse{UID: r.UID, Allowed: true}}
	if r.Operation == admissionv1.Create && r.Kind.Group == "batch" && r.Kind.Kind == "Job" && r.SubResource == "" {
		return d, a.warnJob(ctx, &d, r)
	}
	if r.Operation != admissionv1.Create || r.Kind.Group != "" || r.Kind.Kind != "Pod" || r.SubResource != "" {
		return d, nil
	}
	p, err := decodePod(r)
	if err != nil {
		return d, err
	}
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
	spec, problems := parseAnnotations(p.Metadata.Annotations, a.config.whenFull)
	if (spec.whenFull == whenFullWait || spec.whenFull == whenFullGate) && !a.config.enableSidecarContainers {
		problems = append(problems, fmt.Sprintf("%s is %q: this needs native sidecars, "+
			"and the webhook injects classic ones (--enable-sidecar-containers=false)",
			annotationWhenFull, spec.whenFull))
	}
	d.semaphore = semaphoreID{r.Namespace, truncate(spec.key, maxKey)}
	if len(problems) > 0 {
		d.verdict = verdictInvalid
		d.deny(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid,
			"invalid annotations: "+strings.Join(problems, "; "))
		return d, nil
	}
	if a.users.forgotten(ctx, r.Namespace) {
		d.warn(warningForgotten, r.Namespace)
	}
	if spec.whenFull == whenFullGate && p.Spec.NodeName != "" {
		spec.whenFull = whenFullWait
		d.warn(warningNotGated)
	} else {
		d.response.Warnings = append(d.response.Warnings,
			a.waitWarnings(ctx, spec.whenFull, warningWaits, warningGated)...)
	}
	if spec.whenFull == whenFullWait || spec.whenFull == whenFullGate { // takes no token here, dry run or not
		switch d.verdict = verdictWait; {
		case r.DryRun:
			d.verdict = verdictDryRun
		case spec.whenFull == whenFullGate:
			d.verdict = verdictGate
		}
		d.admit(a.injector, p, spec, "")
		return d, nil
	}
	if r.DryRun {
		d.verdict = verdictDryRun
		d.admit(a.injector, p, spec, uuid.Nil.String())
		return d, nil
	}
	var agreed int
	name := newPodName(p.name(), "")
	d.token, agreed, err = a.semaphores.acquire(ctx, d.semaphore, name, spec.length, spec.expiration)
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
	if agreed != 0 && agreed != spec.length {
		d.warn(warningLength, spec.length, agreed)
	}
	d.admit(a.injector, p, spec, d.token)
	return d, nil
}

// refusal is the denial of a pod that gets no token.
func refusal(e *fullError) string {
	text := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", e.id, e.inUse, e.length)
	if by := byHolders(e.holders, e.inUse); by != "" {
		text += ", " + by
	}
	if e.waiters > 0 {
		text += fmt.Sprintf("; %d waiting in line", e.waiters)
	}
	return text + doubtText(e.doubt)
}

// admit adds the patch to the response: with a token, or without one for a pod that
// waits.
func (d *decision) admit(i *injector, p *pod, spec semaphoreSpec, token string) {
	c := i.config
	d.response.Patch = i.patch(p, d.semaphore, spec, token)
	d.response.PatchType = new(admissionv1.PatchTypeJSONPatch)
	if !c.enableSidecarContainers && (p.Spec.RestartPolicy == "Never" || p.Spec.RestartPolicy == "OnFailure") {
		d.warn(warningNotCompleting)
	}
	if grace := p.Spec.GracePeriod; grace != nil && *grace < giveBackSeconds {
		d.warn(warningGrace, *grace, giveBackSeconds)
	}
	for _, name := range slices.Sorted(maps.Keys(c.podAnnotations)) {
		if own, ok := p.Metadata.Annotations[name]; ok && own != c.podAnnotations[name] {
			d.warn("this pod keeps its own annotation %s; the cluster's is %s",
				name, quoteShort(c.podAnnotations[name]))
		}
	}
}

// warnJob allows a Job. It warns if the Job's pods will not complete, or may wait.
// Warnings about pods go to the Job controller; the user sees only those about the Job.
func (a *admitter) warnJob(ctx context.Context, d *decision, r *admissionRequest) error {
	var job struct {
		Spec struct {
			Template pod `json:"template"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(r.Object, &job); err != nil {
		return badRequestf("decode request.object: %v", err)
	}
	annotations := job.Spec.Template.Metadata.Annotations
	if annotations[annotationEnabled] != "true" {
		return nil
	}
	if a.users.forgotten(ctx, r.Namespace) {
		d.warn(warningForgotten, r.Namespace)
	}
	if !a.config.enableSidecarContainers {
		d.warn(warningJob)
		return nil
	}
	whenFull := whenFullOf(annotations, a.config.whenFull)
	d.response.Warnings = append(d.response.Warnings,
		a.waitWarnings(ctx, whenFull, warningJobWaits, warningJobGated)...)
	return nil
}

// waitWarnings returns the warnings to users whose pods may wait.
func (a *admitter) waitWarnings(ctx context.Context, whenFull, waits, gated string) (warnings []string) {
	switch whenFull {
	case whenFullWait:
		warnings = append(warnings, waits)
	case whenFullGate:
		warnings = append(warnings, gated)
		if a.pulse.missing(ctx) {
			warnings = append(warnings, warningNoGate)
		}
	}
	return warnings
}

// audit adds the decision for the API server's audit log. Kubernetes prefixes these names
// with the webhook's.
func (d *decision) audit() {
	if d.verdict == "" {
		return
	}
	d.response.AuditAnnotations = map[string]string{"verdict": d.verdict}
	if d.semaphore.key != "" {
		d.response.AuditAnnotations["semaphore"] = d.semaphore.String()
	}
	if d.token != "" {
		d.response.AuditAnnotations["token"] = d.token
	}
}

// warn adds a warning to the user, whatever the decision.
func (d *decision) warn(format string, args ...any) {
	d.response.Warnings = append(d.response.Warnings, fmt.Sprintf(format, args...))
}

// deny turns the response into a denial.
func (d *decision) deny(code int32, reason metav1.StatusReason, message string) {
	d.response = &admissionv1.AdmissionResponse{
		UID:    d.response.UID,
		Result: &metav1.Status{Status: metav1.StatusFailure, Code: code, Reason: reason, Message: message},
	}
}

// pulseKey is the key by which webhooks see that a gate is at work.
var pulseKey = auxiliaryID.stateKey()

const (
	pulseEvery = 5 * time.Second
	pulseTime  = 30 * time.Second // after which pulseKey expires: no gate is at work
)

// cachedQuery caches the answer to a query of the queue that an admission can do without.
// One caller at a time runs the query. Meanwhile the others get no answer, and neither
// does any caller while the query fails.
type cachedQuery[A any] struct {
	run func(context.Context) (A, error) // within auxiliaryTimeout

	mu     sync.Mutex
	ran    time.Time
	answer A
	known  bool
}

// get returns the answer, and whether it is known. It runs the query again once isOld
// reports that the answer is too old.
func (q *cachedQuery[A]) get(ctx context.Context, isOld func(answer A, age time.Duration) bool) (answer A, known bool) {
	if !q.mu.TryLock() {
		return answer, false
	}
	defer q.mu.Unlock()
	if isOld(q.answer, time.Since(q.ran)) {
		var err error
		q.answer, err = q.run(ctx)
		q.ran, q.known = time.Now(), err == nil
	}
	return q.answer, q.known
}

// gatePulse knows whether a gate is at work, by pulseKey.
type gatePulse struct{ cachedQuery[bool] }

func newGatePulse(q tokenServers) *gatePulse {
	g := new(gatePulse)
	g.run = func(ctx context.Context) (bool, error) { return redis.Bool(runCommand(ctx, q, "EXISTS", pulseKey)) }
	return g
}

// missing reports whether no gate is at work; false while that is unknown.
func (g *gatePulse) missing(ctx context.Context) bool {
	exists, known := g.get(ctx, func(_ bool, age time.Duration) bool { return age > pulseEvery })
	return known && !exists
}

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
func (m *metrics) watchGate(g *gatePulse) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "gate_at_work",
		Help: "1 if a gate is at work, which lifts the gates of pods, and 0 if none is."}, func() float64 {
		exists, err := g.run(context.Background())
		switch {
		case err != nil:
			return math.NaN()
		case exists:
			return 1
		}
		return 0
	}))
}

// namespacesUser is the Redis user that creates the users of namespaces:
// deploy/namespace.sh logs in as it.
const namespacesUser = "namespaces"

// namespaceUser is the Redis user of the sidecars of a namespace.
func namespaceUser(namespace string) string { return "sidecar/" + namespace }

// namespaceUsers knows which namespaces have a Redis user, to warn if one is missing.
type namespaceUsers struct{ cachedQuery[map[string]bool] }

// newNamespaceUsers queries the queue, or nothing if the queue has no users.
func newNamespaceUsers(q tokenServers, hasUsers bool) *namespaceUsers {
	n := new(namespaceUsers)
	n.run = func(ctx context.Context) (map[string]bool, error) {
		if !hasUsers {
			return nil, nil
		}
		return readUsers(runCommand(ctx, q, "ACL", "USERS")) // the webhook's user has +acl|users
	}
	return n
}

// A list of users is valid for usersTime. If it lacks a namespace, it is read again, but
// at most once in usersPause.
const (
	usersTime  = time.Minute
	usersPause = time.Second
)

// forgotten reports whether the sidecars of a namespace cannot log in to Redis, because
// deploy/namespace.sh was not run for it. It is false if that is unknown, or if users are
// made by other means.
func (n *namespaceUsers) forgotten(ctx context.Context, namespace string) bool {
	user := namespaceUser(namespace)
	users, _ := n.get(ctx, func(users map[string]bool, age time.Duration) bool {
		return age > usersTime || age > usersPause && !users[user]
	})
	return users[namespacesUser] && !users[user]
}

// readUsers parses the names of users that deploy/namespace.sh makes.
func readUsers(reply any, err error) (map[string]bool, error) {
	names, err := redis.Strings(reply, err)
	users := map[string]bool{}
	for _, name := range names {
		if name == namespacesUser || strings.HasPrefix(name, namespaceUser("")) {
			users[name] = true
		}
	}
	return users, err
}
