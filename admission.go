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
	verdictWait          = "wait" // admitted, to wait for its token
	verdictGate          = "gate" // admitted, to be scheduled when it has its token
	verdictFull          = "full"
	verdictInvalid       = "invalid"
	verdictDryRun        = "dry-run"
	verdictFailed        = "failed"        // no decision: Redis or the lock servers were out of reach
	verdictUndeliverable = "undeliverable" // decided, but nobody was there to hear it; what was taken is given back
	verdictStatic        = "static"        // left alone: the mirror of a static pod
	verdictBadRequest    = "bad request"   // no AdmissionReview, or none that makes sense
)

// verdicts are all of them.
var verdicts = []string{verdictAdmitted, verdictWait, verdictGate, verdictFull, verdictInvalid, verdictDryRun, verdictFailed, verdictUndeliverable,
	verdictStatic, verdictBadRequest}

// deniedWindows is the message to users whose pods cannot run the sidecar.
const deniedWindows = "this is a Windows pod (by spec.os.name, or its nodeSelector " + corev1.LabelOSStable + "): the sidecar of a semaphore runs on Linux only"

// The warnings to users. Kubernetes cuts them at 120 characters.
const (
	warningWaits         = "this pod may wait in Init:1/2 for a token of its semaphore; its sidecar's log says where it stands in line"
	warningGated         = "this pod stays SchedulingGated until it has a token of its semaphore; its events say where it stands in line"
	warningJobGated      = "the pods of this Job stay SchedulingGated until they have a token of their semaphore; see their events"
	warningNotGated      = "a pod with a nodeName cannot be gated: this one may wait in Init:1/2 for a token of its semaphore"
	warningNoGate        = "no gate is at work, so that pods stay SchedulingGated: an operator has to look at deployment/gate"
	warningJobWaits      = "the pods of this Job may wait in Init:1/2 for a token of their semaphore; their sidecars' logs say where they stand"
	warningNotCompleting = "this pod will not complete: its semaphore sidecar is a classic container, which runs until the pod is deleted"
	warningGrace         = "terminationGracePeriodSeconds is %d: a sidecar that does not reach Redis at once wants %d s to give the token back"
	warningLength        = "this pod says that its semaphore has the length %d, others said %d lately: each gets tokens by its own"
	warningForgotten     = "no sidecar starts here: Redis knows no user of this namespace; run deploy/namespace.sh %s"
	warningStatic        = "a static pod gets no semaphore sidecar and no token: its semaphore does not count it"
	warningJob           = "this Job will not complete: its pods' semaphore sidecar is a classic container, which runs until they are deleted"
)

// decision is the answer to a request, and what there is to log and to undo of it.
type decision struct {
	response  *admissionv1.AdmissionResponse
	verdict   string // empty for what is none of our business
	pod       string
	semaphore semaphoreID
	token     string // taken for this pod; to be given back if the pod does not get it
}

// admitter decides on admission requests.
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

// decide answers one request. An error is *badRequest, or that no decision could be made; what the decision
// holds then is for the log, and a token to be given back.
func (a *admitter) decide(ctx context.Context, r *admissionRequest) (decision, error) {
	d := decision{response: &admissionv1.AdmissionResponse{UID: r.UID, Allowed: true}}
	if r.Operation == admissionv1.Create && r.Kind.Group == "batch" && r.Kind.Kind == "Job" && r.SubResource == "" {
		return d, a.warnOfJob(ctx, &d, r)
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
		problems = append(problems, fmt.Sprintf("%s is %q: this needs native sidecars, and the webhook injects classic ones (--enable-sidecar-containers=false)",
			annotationWhenFull, spec.whenFull))
	}
	d.semaphore = semaphoreID{r.Namespace, truncate(spec.key, maxKey)}
	if len(problems) > 0 {
		d.verdict = verdictInvalid
		d.deny(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "invalid annotations: "+strings.Join(problems, "; "))
		return d, nil
	}
	if a.users.forgotten(ctx, r.Namespace) {
		d.warn(warningForgotten, r.Namespace)
	}
	if spec.whenFull == whenFullGate && p.Spec.NodeName != "" {
		spec.whenFull = whenFullWait
		d.warn(warningNotGated)
	} else {
		d.response.Warnings = append(d.response.Warnings, a.warningsOfWaiting(ctx, spec.whenFull, warningWaits, warningGated)...)
	}
	if spec.whenFull == whenFullWait || spec.whenFull == whenFullGate { // takes nothing here, dry run or not
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
	d.token, agreed, err = a.semaphores.acquire(ctx, d.semaphore, newPodName(p.name(), ""), spec.length, spec.expiration)
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

// refusal is the message to a user whose pod gets no token.
func refusal(e *fullError) string {
	text := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", e.id, e.inUse, e.length)
	if by := byHolders(e.holders, e.inUse); by != "" {
		text += ", " + by
	}
	if e.waiters > 0 {
		text += fmt.Sprintf("; %d waiting in line", e.waiters)
	}
	return text + inDoubt(e.doubt)
}

// admit puts the patch into the response: for a token, or without one for a pod that waits.
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
			d.warn("this pod keeps its own annotation %s; the cluster's is %s", name, quoteShort(c.podAnnotations[name]))
		}
	}
}

// warnOfJob lets a Job pass, with a warning if its pods will not complete, or may wait. The warnings of its pods are for the
// Job's controller: the user only hears those of the Job.
func (a *admitter) warnOfJob(ctx context.Context, d *decision, r *admissionRequest) error {
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
	d.response.Warnings = append(d.response.Warnings, a.warningsOfWaiting(ctx, whenFull, warningJobWaits, warningJobGated)...)
	return nil
}

// warningsOfWaiting are those for who creates pods that may wait.
func (a *admitter) warningsOfWaiting(ctx context.Context, whenFull, waits, gated string) (warnings []string) {
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

// audit tells the API server's audit log what was decided; Kubernetes puts the webhook's name before the names.
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

// warn tells the user something, whatever the decision.
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

// pulseKey tells webhooks that a gate is at work.
var pulseKey = sideID.stateKey()

const (
	pulseEvery = 5 * time.Second
	pulseTime  = 30 * time.Second // without one for so long, none is at work
)

// sideQuestion remembers the answer to a question to the queue that an admission can do without. One caller at a time asks
// it; the others do without meanwhile, as they do while there is no answer.
type sideQuestion[A any] struct {
	ask func(context.Context) (A, error) // within sideTimeout

	asking sync.Mutex
	asked  time.Time
	answer A
	known  bool
}

// get returns the answer, and whether it is known. It asks again once isOld says so of the answer's age.
func (q *sideQuestion[A]) get(ctx context.Context, isOld func(answer A, age time.Duration) bool) (answer A, known bool) {
	if !q.asking.TryLock() {
		return answer, false
	}
	defer q.asking.Unlock()
	if isOld(q.answer, time.Since(q.asked)) {
		var err error
		q.answer, err = q.ask(ctx)
		q.asked, q.known = time.Now(), err == nil
	}
	return q.answer, q.known
}

// gatePulse knows whether a gate is at work, by what it tells the queue.
type gatePulse struct{ sideQuestion[bool] }

func newGatePulse(q tokenServers) *gatePulse {
	g := new(gatePulse)
	g.ask = func(ctx context.Context) (bool, error) { return redis.Bool(runCommand(ctx, q, "EXISTS", pulseKey)) }
	return g
}

// missing reports whether no gate is at work. While that is not known, it is false.
func (g *gatePulse) missing(ctx context.Context) bool {
	there, known := g.get(ctx, func(_ bool, age time.Duration) bool { return age > pulseEvery })
	return known && !there
}

// countVerdicts adds the metric of admissions, with each verdict at zero.
func (m *metrics) countVerdicts() {
	m.admissions = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricsPrefix + "admission_duration_seconds",
		Help: "Time from an admission request for an annotated pod to its answer.", Buckets: durationBuckets}, []string{"verdict"})
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

// watchGate adds whether a gate is at work; NaN while the queue does not answer.
func (m *metrics) watchGate(g *gatePulse) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "gate_at_work",
		Help: "1 if a gate is at work, which lifts the gates of pods, and 0 if none is."}, func() float64 {
		there, err := g.ask(context.Background())
		switch {
		case err != nil:
			return math.NaN()
		case there:
			return 1
		}
		return 0
	}))
}

// namespacesUser is the user of Redis that makes those of the namespaces: deploy/namespace.sh logs in as it.
const namespacesUser = "namespaces"

// namespaceUser is the user of Redis for the sidecars of a namespace.
func namespaceUser(namespace string) string { return "sidecar/" + namespace }

// namespaceUsers knows which namespaces have a user of Redis, to tell of one that was forgotten.
type namespaceUsers struct{ sideQuestion[map[string]bool] }

// newNamespaceUsers asks the queue, or nothing if it has no users.
func newNamespaceUsers(q tokenServers, hasUsers bool) *namespaceUsers {
	n := new(namespaceUsers)
	n.ask = func(ctx context.Context) (map[string]bool, error) {
		if !hasUsers {
			return nil, nil
		}
		return readUsers(runCommand(ctx, q, "ACL", "USERS")) // which the webhook's user may do by +acl|users
	}
	return n
}

// The answer about users is believed for usersTime. A namespace that is not among them is asked for, but not more often than
// each usersPause.
const (
	usersTime  = time.Minute
	usersPause = time.Second
)

// forgotten reports whether the sidecars of a namespace cannot log in to Redis, as nobody has run deploy/namespace.sh for it. Where
// that is not known, or users are made by other means, it is false.
func (n *namespaceUsers) forgotten(ctx context.Context, namespace string) bool {
	user := namespaceUser(namespace)
	users, _ := n.get(ctx, func(users map[string]bool, age time.Duration) bool {
		return age > usersTime || age > usersPause && !users[user]
	})
	return users[namespacesUser] && !users[user]
}

// readUsers reads the names of users that deploy/namespace.sh makes.
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
