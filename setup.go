package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// setupBounds are the times of setup. Tests use others.
type setupBounds struct {
	now     func() time.Time
	every   time.Duration // between two passes, for what no watch tells
	waiting time.Duration // between two passes while a step waits
	settle  time.Duration // until all API servers know a changed webhook configuration
	refresh time.Duration // until the kubelets have written a changed Secret into all pods
	answer  time.Duration // for a webhook's answer

	authorityLife, certificateLife time.Duration // a pair is renewed after two thirds of it
}

func newSetupBounds() setupBounds {
	return setupBounds{now: time.Now, every: 10 * time.Second, waiting: 2 * time.Second, settle: 30 * time.Second,
		refresh: 3 * time.Minute, answer: 2 * time.Second, authorityLife: 10 * 365 * 24 * time.Hour, certificateLife: 90 * 24 * time.Hour}
}

// setup makes what an installation needs, and keeps it so. Each step compares what is
// there with what should be, and makes the difference: it is safe to repeat, and several
// setups at once do no harm.
type setup struct {
	config     setupConfig
	kubernetes *kubernetes
	secrets    *mirror[*corev1.Secret] // of our own namespace
	changed    wakeup                  // something that the watch tells has changed
	users      *userKeeper
	steps      []*setupStep
	since      sinceTimes
	authority  *keyPair // of this pass; nil if it is not known
	trust      trust    // of this pass
	bounds     setupBounds
	registry   *prometheus.Registry
	expiry     *prometheus.GaugeVec
	failures   *prometheus.CounterVec
	log        *slog.Logger
}

// ownPassword is a key of ownSecret, with the users that have its password.
type ownPassword struct {
	key   string
	users []string
}

// ownPasswords returns the passwords of ownSecret.
func (c setupConfig) ownPasswords() (all []ownPassword) {
	for _, user := range []string{userOfSetup, "webhook", "gate", "status"} {
		all = append(all, ownPassword{user + "-password", []string{user}})
	}
	if c.replicationUser {
		all = append(all, ownPassword{"replication-password", []string{userOfReplicas, userOfSentinels}})
	}
	return all
}

// duties returns what the servers are for, those of the tokens first.
func (c setupConfig) duties() []redisDuty {
	if len(c.lockAddresses) > 0 {
		return []redisDuty{holdsTokens, holdsLocks}
	}
	return []redisDuty{holdsAll}
}

// setupStep keeps one part of the installation. Its error does not stop the others.
type setupStep struct {
	name  string
	run   func(context.Context) error // a *waiting is no failure
	limit logLimiter

	mu   sync.Mutex
	done bool  // it has succeeded once
	last error // of the last pass
}

// waiting says what a step waits for. It is no failure, and the step is repeated soon.
type waiting struct{ text string }

func (w *waiting) Error() string { return w.text }

func waitingFor(format string, args ...any) error { return &waiting{fmt.Sprintf(format, args...)} }

// runSetup runs the mode setup until ctx is done.
func runSetup(ctx context.Context, c setupConfig, log *slog.Logger) error {
	listener, err := listen("--metrics-bind-address", c.metricsBindAddress)
	if err != nil {
		return err
	}
	defer listener.Close()
	s, err := newSetup(c, log)
	if err != nil {
		return err
	}
	server := newHealthServer(s.healthRoutes(), newHTTPErrors(log))
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	go func() { fail(server.Serve(listener)) }()
	log.Info("keeping the installation", "version", version, "apiServer", s.kubernetes.address, "namespace", c.namespace)
	s.run(ctx)
	cause := context.Cause(ctx)
	log.Info("stopping", "reason", cause.Error())
	err = server.Close()
	if !errors.Is(cause, context.Canceled) {
		err = errors.Join(cause, err)
	}
	return err
}

func newSetup(c setupConfig, log *slog.Logger) (*setup, error) {
	k, err := newKubernetes(c.kubernetes, log)
	if err != nil {
		return nil, err
	}
	// An old view does no harm here: each write follows a fresh read. Where nothing changes,
	// the API server sends no bookmarks, and the client would list again after each silence.
	k.bounds.length, k.bounds.silence = 5*time.Minute, 10*time.Minute
	s := &setup{config: c, kubernetes: k, changed: newWakeup(), bounds: newSetupBounds(), log: log,
		registry: prometheus.NewRegistry(),
		expiry: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: metricsPrefix + "setup_certificate_expiry_timestamp_seconds",
			Help: "Unix time at which a certificate that setup keeps expires."}, []string{"certificate"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricsPrefix + "setup_failures_total",
			Help: "Passes of setup in which a step failed. It is repeated."}, []string{"step"}),
	}
	usersChanged := newWakeup()
	s.secrets = k.secretsOf(c.namespace, func() {
		s.changed.wake()
		usersChanged.wake()
	})
	s.users = newUserKeeper(c, k, s.secrets, usersChanged, log)
	s.registry.MustRegister(s.expiry, s.failures)
	s.users.register(s.registry)
	registerProcess(s.registry)
	s.addStep("authority", s.keepAuthority)
	s.addStep("redis-certificate", s.keepRedisCertificate)
	if c.webhookCertificate == certificateOwn {
		s.addStep("trust", s.keepTrust)
		s.addStep("webhook-certificate", s.keepWebhookCertificate)
	}
	s.addStep("webhook-path", s.keepPath)
	return s, nil
}

// addStep adds a step behind the others.
func (s *setup) addStep(name string, run func(context.Context) error) {
	step := &setupStep{name: name, run: run}
	s.steps = append(s.steps, step)
	s.failures.WithLabelValues(name)
	s.registry.MustRegister(failingGauge(name, step.state))
}

// failingGauge returns the metric that tells whether a step fails.
func failingGauge(name string, state func() (done bool, last error)) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "setup_failing",
		Help:        "1 if a step of setup failed in the last pass, else 0.",
		ConstLabels: prometheus.Labels{"step": name}}, func() float64 {
		if _, last := state(); last != nil && !errors.As(last, new(*waiting)) {
			return 1
		}
		return 0
	})
}

// run works until ctx is done.
func (s *setup) run(ctx context.Context) {
	var background sync.WaitGroup
	for _, run := range []func(context.Context){s.kubernetes.run, s.secrets.run, s.users.run} {
		background.Go(func() { run(ctx) })
	}
	for ctx.Err() == nil {
		again := time.NewTimer(s.reconcile(ctx))
		select {
		case <-s.changed:
		case <-again.C:
		case <-ctx.Done():
		}
		again.Stop()
	}
	background.Wait()
}

// reconcile runs every step, in their order. It returns the time until the next pass.
func (s *setup) reconcile(ctx context.Context) (again time.Duration) {
	again = s.bounds.every
	s.authority, s.trust = nil, trust{}
	for _, step := range s.steps {
		err := step.run(ctx)
		if ctx.Err() != nil {
			return again
		}
		changed := step.note(err)
		if changed {
			step.limit.reset()
		}
		switch isWaiting := errors.As(err, new(*waiting)); {
		case err == nil:
			continue
		case isWaiting:
			again = min(again, s.bounds.waiting)
		default:
			s.failures.WithLabelValues(step.name).Inc()
			if dropped, ok := step.limit.allow(); ok {
				s.log.Warn("a step failed, to be repeated", "step", step.name, "error", err.Error(), "notLoggedBefore", dropped)
			}
			continue
		}
		if _, ok := step.limit.allow(); ok {
			s.log.Info("a step waits", "step", step.name, "for", err.Error())
		}
	}
	return again
}

// note keeps the result of a step, and reports whether its kind has changed.
func (s *setupStep) note(err error) (changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	kind := func(err error) int {
		switch {
		case err == nil:
			return 0
		case errors.As(err, new(*waiting)):
			return 1
		}
		return 2
	}
	changed = kind(s.last) != kind(err)
	s.last, s.done = err, s.done || kind(err) < 2
	return changed
}

func (s *setupStep) state() (done bool, last error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done, s.last
}

// ready returns why the installation is not complete. After each step has succeeded once,
// that of the users among them, it only warns.
func (s *setup) ready(context.Context) (warning string, err error) {
	var problems []string
	missing := false
	note := func(name string, done bool, last error) {
		missing = missing || !done
		switch {
		case errors.As(last, new(*waiting)):
			problems = append(problems, name+" waits: "+last.Error())
		case last != nil:
			problems = append(problems, name+": "+last.Error())
		case !done:
			problems = append(problems, name+": not tried yet")
		}
	}
	for _, step := range s.steps {
		done, last := step.state()
		note(step.name, done, last)
	}
	done, last := s.users.state()
	note(usersStep, done, last)
	text := strings.Join(problems, "; ")
	if missing {
		return "", errors.New(text)
	}
	if text != "" {
		text = "warning: " + text
	}
	return text, nil
}

func (s *setup) healthRoutes() http.Handler {
	return newHealthRoutes(s.ready, (&metrics{registry: s.registry}).handler(s.log))
}

// writeAttempts is how often a change is tried that another process overtakes.
const writeAttempts = 5

// keep makes a Secret of our own namespace what it should be. want receives it as it is,
// or an empty new one; changes it; and returns a text of what it changed, for people, or
// an empty text. keep returns the Secret as it is then.
func (s *setup) keep(ctx context.Context, name string, kind corev1.SecretType,
	want func(*corev1.Secret) (made string, err error)) (*corev1.Secret, error) {
	for attempt := 1; ; attempt++ {
		secret, err := s.kubernetes.getSecret(ctx, s.config.namespace, name)
		if errors.Is(err, errNotFound) {
			secret, err = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.config.namespace, Name: name}, Type: kind}, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the Secret %s: %w", name, err)
		}
		if secret.Data == nil {
			secret.Data = map[string][]byte{}
		}
		made, err := want(secret)
		if err != nil || made == "" {
			return secret, err
		}
		if secret.Type != kind { // a type cannot be changed
			if err = s.kubernetes.deleteSecret(ctx, secret); err == nil {
				made = fmt.Sprintf("%s; its type was %s", made, secret.Type)
				secret.ObjectMeta = metav1.ObjectMeta{Namespace: secret.Namespace, Name: name, Labels: secret.Labels,
					Annotations: secret.Annotations}
				secret.Type = kind
			}
		}
		if err == nil {
			secret, err = s.kubernetes.putSecret(ctx, secret)
		}
		if err == nil {
			s.tell(secret, "SecretWritten", made)
			return secret, nil
		}
		overtaken := errors.Is(err, errChanged) || errors.Is(err, errNotFound)
		if !overtaken || attempt == writeAttempts {
			return nil, fmt.Errorf("write the Secret %s (%s): %w", name, made, err)
		}
	}
}

// tell tells people what was made: by a line of the log, and by an event of the Secret.
func (s *setup) tell(about *corev1.Secret, reason, made string) {
	s.log.Info("made", "secret", about.Namespace+"/"+about.Name, "what", made)
	s.kubernetes.createEvent(objectEvent{reporter: "setup", reason: reason, action: "Writing", note: made,
		id: about.ResourceVersion, about: corev1.ObjectReference{APIVersion: "v1", Kind: "Secret",
			Namespace: about.Namespace, Name: about.Name, UID: about.UID, ResourceVersion: about.ResourceVersion}})
}

// sinceTimes remember since when something holds. A new process starts to count again.
type sinceTimes map[string]sinceTime

type sinceTime struct {
	what string
	at   time.Time
}

// of returns for how long a subject has had this state.
func (s *sinceTimes) of(subject, what string, now time.Time) time.Duration {
	if *s == nil {
		*s = sinceTimes{}
	}
	if (*s)[subject].what != what {
		(*s)[subject] = sinceTime{what, now}
	}
	return now.Sub((*s)[subject].at)
}
