package main

import (
	"cmp"
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
	limits     *limitKeeper
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
	// An old view does no harm here: each write, and each changed limit, follows a fresh
	// read. Where nothing changes, the API server sends no bookmarks, and the client
	// would list again after each silence.
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
	s.limits = newLimitKeeper(c, k, s.secrets, usersChanged.wake, log)
	s.users = newUserKeeper(c, k, s.secrets, s.limits.settings, usersChanged, log)
	s.registry.MustRegister(s.expiry, s.failures)
	s.users.register(s.registry)
	s.limits.register(s.registry)
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
	for _, run := range []func(context.Context){s.kubernetes.run, s.secrets.run, s.users.run, s.limits.run} {
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
	done, last = s.limits.state()
	note(limitsStep, done, last)
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

// ownerMap is the ConfigMap of the owners' settings, and its only key.
const ownerMap = "semaphores"

const (
	// Redis may lose limits, and semaphores are made at any time. So a limitKeeper looks
	// at all of them every limitsEvery; while nothing is set, only every overridesEvery,
	// for overrides.
	limitsEvery    = 3 * time.Second
	overridesEvery = 30 * time.Second
	limitsWithin   = 10 * time.Second // bounds a look at Redis

	// limitsStep is the name of a limitKeeper among the steps of setup.
	limitsStep = "limits"

	reasonSettings = "SettingsNotTaken" // of events

	// overridesLogged caps the lines about overrides in a minute: the sidecars of a
	// namespace can write what Redis says of its semaphores.
	overridesLogged = 20
)

// limitKeeper tells Redis the lengths that the ConfigMap semaphores sets. It compares
// what Redis knows with what it should know: after each change, and every few seconds.
type limitKeeper struct {
	config   setupConfig
	k        *kubernetes
	secrets  *mirror[*corev1.Secret]    // of our own namespace
	maps     *mirror[*corev1.ConfigMap] // ownerMap
	changed  wakeup                     // the watch tells of a change
	onChange func()                     // runs when there are other settings
	log      *slog.Logger

	// Only look uses these.
	queue         *semaphores // nil: not connected
	login         redisSettings
	read          string                         // what the last ConfigMap held
	bad           error                          // why that is not taken
	looked        time.Time                      // when Redis last knew all limits; zero: the settings are new
	overrides     map[semaphoreID]semaphoreState // the semaphores that had an override then
	limit         logLimiter                     // of lines about failures
	overrideLimit logLimiter

	mu     sync.Mutex     // guards the fields below
	owners *ownerSettings // nil: there have been no good ones
	failed error          // of the last look
}

func newLimitKeeper(c setupConfig, k *kubernetes, secrets *mirror[*corev1.Secret], onChange func(),
	log *slog.Logger) *limitKeeper {
	l := &limitKeeper{config: c, k: k, secrets: secrets, changed: newWakeup(), onChange: onChange, log: log,
		read: "not read", overrides: map[semaphoreID]semaphoreState{}, overrideLimit: logLimiter{most: overridesLogged}}
	l.maps = k.configMapNamed(c.namespace, ownerMap, l.changed.wake)
	return l
}

// run looks until ctx is done.
func (l *limitKeeper) run(ctx context.Context) {
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(func() { l.maps.run(ctx) })
	for start := time.Now(); ctx.Err() == nil && l.maps.check() != nil && time.Since(start) < limitsEvery; {
		_ = l.changed.waitFor(ctx, limitsEvery)
	}
	for ctx.Err() == nil {
		l.note(ctx, l.look(ctx))
		_ = l.changed.waitFor(ctx, limitsEvery)
	}
	l.disconnect()
}

// note keeps the result of a look, and logs a failure. A bad ConfigMap was logged when it
// was read.
func (l *limitKeeper) note(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	isFailure := err != nil && !errors.As(err, new(*waiting))
	if isFailure {
		if dropped, ok := l.limit.allow(); ok {
			l.log.Warn("a step failed, to be repeated", "step", limitsStep, "error", err.Error(), "notLoggedBefore", dropped)
		}
	}
	switch {
	case l.bad != nil && isFailure:
		err = serverErrors{l.bad, err}
	case l.bad != nil:
		err = l.bad
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = err
}

// settings returns the last good settings. known is false before there are any.
func (l *limitKeeper) settings() (s ownerSettings, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owners == nil {
		return s, false
	}
	return *l.owners, true
}

// look reads the ConfigMap and makes Redis know the limits. While the ConfigMap is bad,
// the last good one stays in force; without any, Redis stays as it is.
func (l *limitKeeper) look(ctx context.Context) error {
	if err := l.maps.check(); err != nil {
		return err
	}
	l.readMap(l.maps.get(l.config.namespace, ownerMap))
	owners, known := l.settings()
	every := limitsEvery / 2
	if len(owners.lines)+len(l.overrides) == 0 {
		every = overridesEvery
	}
	if !known || l.config.queue.queueRedisAddress.text == "" || time.Since(l.looked) < every {
		return nil
	}
	err := l.tell(ctx, owners)
	if err != nil && len(owners.lines) == 0 {
		// A Redis of one's own may have no user for this. Without settings, it needs
		// none.
		return waitingFor("Redis, to look for overrides: %v", err)
	}
	return err
}

// tell makes Redis know the limits.
func (l *limitKeeper) tell(ctx context.Context, owners ownerSettings) error {
	if err := l.connect(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limitsWithin)
	defer cancel()
	states, err := l.queue.survey(ctx, "")
	switch err = new(spoiltErrors).add(err); {
	case err == nil: // else some only seem to be gone
		l.noteOverrides(states)
	case len(states) == 0:
		return err
	}
	var old error // why no limit may be replaced
	check := sync.OnceValue(func() error { return l.checkMap(ctx) })
	_, failed := l.queue.keepLimits(ctx, states, owners, func(semaphoreID) bool {
		old = check()
		return old == nil
	})
	if err = cmp.Or(err, failed, old); err == nil {
		l.looked = time.Now()
	}
	return err
}

// checkMap reads the ConfigMap, and returns why a limit that Redis knows must not be
// replaced: the view of the ConfigMap is old. Another setup, or a webhook, may know
// better.
func (l *limitKeeper) checkMap(ctx context.Context) error {
	m := new(corev1.ConfigMap)
	path := "/api/v1/namespaces/" + l.config.namespace + "/configmaps/" + ownerMap
	err := l.k.exchangeObject(ctx, http.MethodGet, path, nil, m)
	if errors.Is(err, errNotFound) {
		m, err = nil, nil
	}
	if text, problem := textOf(m); err == nil && fmt.Sprint(problem, text) != l.read {
		err = waitingFor("the watch of the ConfigMap %s", ownerMap)
	}
	return err
}

// textOf returns the settings that a ConfigMap has, which may be nil.
func textOf(m *corev1.ConfigMap) (text string, problem error) {
	if m == nil {
		return "", nil
	}
	text, ok := m.Data[ownerMap]
	if !ok && len(m.Data)+len(m.BinaryData) > 0 {
		problem = fmt.Errorf("it has no key %s", ownerMap)
	}
	return text, problem
}

// readMap takes the settings of the ConfigMap, which may be nil, if they have changed.
func (l *limitKeeper) readMap(m *corev1.ConfigMap) {
	text, problem := textOf(m)
	read := fmt.Sprint(problem, text)
	if read == l.read {
		return
	}
	l.read, l.bad = read, nil
	var owners ownerSettings
	if problem == nil {
		owners, problem = parseOwnerSettings([][]byte{[]byte(text)})
	}
	if problem != nil {
		l.bad = fmt.Errorf("the ConfigMap %s is not taken: %w", ownerMap, problem)
		const kept = "what it held before stays in force"
		l.log.Warn("the ConfigMap of semaphores is not taken, "+kept, "error", problem.Error())
		l.k.createEvent(objectEvent{reporter: "setup", warning: true, reason: reasonSettings, action: "ReadingSettings",
			note: kept + ": " + problem.Error(), id: m.ResourceVersion,
			about: corev1.ObjectReference{APIVersion: "v1", Kind: "ConfigMap", Namespace: m.Namespace, Name: m.Name,
				UID: m.UID, ResourceVersion: m.ResourceVersion}})
		return
	}
	l.looked = time.Time{}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owners != nil || len(owners.lines) > 0 {
		l.log.Info("settings of semaphores taken", "lines", len(owners.lines))
	}
	l.owners = &owners
	l.onChange()
}

// connect connects to the queue as the user status, which may set limits. It connects
// again when the password or the authority has changed.
func (l *limitKeeper) connect() error {
	c := l.config.queue
	c.redis.username, c.redis.caFile = "status", l.config.redisCAFile
	c.redis.password = value(l.secrets.get(l.config.namespace, ownSecret), "status-password")
	if c.redis.caFile == "" && len(l.config.redisAddresses) > 0 {
		c.redis.ca = value(l.secrets.get(l.config.namespace, secretRedis), "ca.crt")
	}
	switch {
	case c.redis.password == "":
		return waitingFor("the key status-password of the Secret %s", ownSecret)
	case l.queue != nil && l.login == c.redis:
		return nil
	}
	l.disconnect()
	l.queue, l.login = newSemaphores(c, nil, 1, l.log), c.redis
	return nil
}

func (l *limitKeeper) disconnect() {
	if l.queue != nil {
		l.queue.stop()
		_ = l.queue.queue.close()
	}
}

// noteOverrides logs the overrides that have come, and those that are gone before their
// end.
func (l *limitKeeper) noteOverrides(states []semaphoreState) {
	now, overrides := map[semaphoreID]semaphoreState{}, map[semaphoreID]semaphoreState{}
	for _, st := range states {
		now[st.id] = st
		if st.setting.override.until.IsZero() {
			continue
		}
		overrides[st.id] = st
		if l.overrides[st.id].setting.override != st.setting.override {
			if words, ok := l.words(st); ok {
				l.log.Info("override seen", words...)
			}
		}
	}
	for id, before := range l.overrides {
		if _, ok := overrides[id]; ok || !before.setting.override.in(time.Now().Add(limitsEvery)) {
			continue
		}
		words, ok := l.words(before)
		if !ok {
			continue
		}
		if st, ok := now[id]; ok && !st.created.After(before.created) {
			l.log.Info("override cleared", words...)
		} else {
			l.log.Warn("Redis has lost an override with its data: set it again", words...)
		}
	}
	l.overrides = overrides
}

// words returns what a line of the log says of an override. ok is false if there are too
// many lines.
func (l *limitKeeper) words(st semaphoreState) (words []any, ok bool) {
	o := st.setting.override
	dropped, ok := l.overrideLimit.allow()
	return []any{"namespace", st.id.namespace, "key", st.id.key, "length", o.length,
		"until", o.until.UTC().Format(time.RFC3339), "note", displayNote(o.note), "by", displayNote(o.by),
		"notLoggedBefore", dropped}, ok
}

// state returns why the last look failed. The step is always done: an installation is
// complete without limits.
func (l *limitKeeper) state() (done bool, last error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return true, l.failed
}

// register adds the metrics.
func (l *limitKeeper) register(r *prometheus.Registry) {
	r.MustRegister(failingGauge(limitsStep, l.state))
}
