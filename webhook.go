package main

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// defaultTimeout and maxTimeout are the API server's for webhooks.
	defaultTimeout = 10 * time.Second
	maxTimeout     = 30 * time.Second

	// admissionGrace is how long after SIGTERM running admissions may take. After that
	// they get an error, and giveBackGrace begins. Kubernetes kills after 30 seconds.
	admissionGrace = 20 * time.Second

	// drainTime is how long after SIGTERM a connection may stay idle before it is closed.
	drainTime = 3 * time.Second

	// readyTimeout bounds a check of readiness: the kubelet's probes time out after a second.
	// readyFor is how long callers share its result, so that they do not load Redis.
	readyTimeout = 800 * time.Millisecond
	readyFor     = time.Second
)

// runWebhook serves until ctx is done, and then finishes running admissions.
func runWebhook(ctx context.Context, c webhookConfig, log *slog.Logger) error {
	cert, err := loadCertificate(c.certDir, log)
	if err != nil {
		return err
	}
	clients, err := newCallers(c, log)
	if err != nil {
		return err
	}
	webhookListener, err := listen("--host and --port", net.JoinHostPort(c.host, strconv.Itoa(c.port)))
	if err != nil {
		return err
	}
	defer webhookListener.Close()
	healthListener, err := listen("--metrics-bind-address", c.metricsBindAddress)
	if err != nil {
		return err
	}
	defer healthListener.Close()

	c.redis.counts, c.redis.loadsScripts = new(redisCounts), true
	s := newSemaphores(c.settings, newLocker(c.settings, lockConnections), idleConnections, log)
	s.metrics = newMetrics(c.redis.counts)
	s.metrics.countVerdicts()
	s.metrics.watchCertificate(cert)
	s.metrics.watchSemaphores(s, surveyTimeout)
	s.metrics.watchGate(s.queue)
	s.keepScripts()
	w := &webhook{
		admitter: newAdmitter(c, s),
		callers:  clients,
		bounds:   newBounds(),
		limit:    logLimiter{most: badRequestsLogged},
		log:      log,
		stopping: ctx.Done(),
	}
	s.metrics.watchSettings(w.owners)
	w.readiness.keep = readyFor
	admissions, endAdmissions := context.WithCancelCause(context.Background())
	defer endAdmissions(nil)
	errorLog := newHTTPErrors(log)
	webhookServer := newWebhookServer(w.routes(), clients.tls(cert), w.bounds)
	webhookServer.BaseContext = func(net.Listener) context.Context { return admissions }
	webhookServer.ErrorLog = errorLog
	healthServer := newHealthServer(w.healthRoutes(), errorLog)

	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	go cert.watch(ctx, fileInterval)
	clients.watch(ctx)
	go w.keepLimits(ctx)
	go func() { fail(webhookServer.ServeTLS(webhookListener, "", "")) }()
	go func() { fail(healthServer.Serve(healthListener)) }()
	log.Info("serving", "address", webhookListener.Addr().String(), "healthAddress", healthListener.Addr().String(),
		"version", version, "lockMode", c.lockMode, "queueRedis", c.queueRedisAddress.text)

	<-ctx.Done()
	cause := context.Cause(ctx)
	log.Info("stopping", "reason", cause.Error())
	time.AfterFunc(admissionGrace, func() { endAdmissions(errors.New("this webhook is stopping")) })
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), admissionGrace+giveBackGrace/2)
	defer cancel()
	drain(w.bounds)
	if err = webhookServer.Shutdown(ending); err != nil {
		err = fmt.Errorf("finish admissions: %w", err)
	}
	ending, cancel = context.WithTimeout(context.WithoutCancel(ctx), giveBackGrace)
	defer cancel()
	err = errors.Join(err, s.close(ending), healthServer.Close())
	if !errors.Is(cause, context.Canceled) {
		err = errors.Join(cause, err)
	}
	if err == nil {
		log.Info("stopped")
	}
	return err
}

// drain lets the clients leave: each answer of a stopping webhook ends its connection. An
// idle connection gets no answer, and Shutdown closes it, maybe just when the API server
// uses it. The API server cannot repeat that admission. But it prefers connections that
// it used last, and these have got an answer by the end of drainTime.
func drain(b *bounds) {
	for end := time.Now().Add(drainTime); b.open() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
}

// newWebhookServer makes the server that the API server calls.
func newWebhookServer(handler http.Handler, tls *tls.Config, b *bounds) *http.Server {
	// An API server closes a connection after 90 s without a request. In a burst it opens
	// some that it does not use at once, and does not repeat a request on one that the
	// webhook closed just then. So the webhook also waits long for the first request.
	s := &http.Server{
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			_ = http.NewResponseController(rw).SetReadDeadline(time.Now().Add(bodyTime))
			handler.ServeHTTP(rw, r)
		}),
		TLSConfig:         tls,
		ReadHeaderTimeout: 2 * time.Minute,
		WriteTimeout:      maxTimeout + 5*time.Second,
		IdleTimeout:       2 * time.Minute,
	}
	b.apply(s)
	return s
}

// webhook is the HTTP side of the admitter.
type webhook struct {
	admitter
	callers  *callers
	bounds   *bounds
	limit    logLimiter // of warnings about bad requests
	log      *slog.Logger
	stopping <-chan struct{}

	readiness  flights[struct{}, *string] // its state is a warning
	eviction   string                     // the warning that Redis may evict tokens
	evictionAt time.Time                  // when Redis last told
	ageAsked   bool                       // Redis has told its age, or has refused to
}

func (w *webhook) routes() http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if w.isStopping() {
			rw.Header().Set("Connection", "close")
		}
		mayCall := w.callers.mayCall(r.URL.Path)
		if r.Method == http.MethodOptions { // setup asks whether this webhook knows a new path
			rw.Header().Set("Connection", "close")
			rw.Header().Set("Allow", http.MethodPost)
			rw.WriteHeader(map[bool]int{true: http.StatusNoContent, false: http.StatusNotFound}[mayCall])
			return
		}
		if !mayCall {
			rw.Header().Set("Connection", "close") // a client that does not know the path has no business here
			http.Error(rw, w.callers.refuse(r.RemoteAddr), http.StatusNotFound)
			return
		}
		w.mutate(rw, r)
	})
}

func (w *webhook) healthRoutes() http.Handler {
	return newHealthRoutes(w.ready, w.semaphores.metrics.handler(w.log))
}

// ready returns why this webhook cannot decide: it is stopping, or the queue takes no
// writes. If it can, the warning says that the queue may evict tokens.
func (w *webhook) ready(ctx context.Context) (warning string, err error) {
	if w.isStopping() {
		return "", errors.New("stopping")
	}
	check := w.readiness.join(struct{}{}, new(string), func(warning *string) error {
		ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
		defer cancel()
		if err := w.semaphores.check(ctx); err != nil {
			return err
		}
		w.checkEviction(ctx)
		w.checkGuard(ctx)
		*warning = w.eviction
		return nil
	})
	select {
	case <-check.done:
		return *check.state, check.err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// checkEviction asks the queue once in logEvery whether it may evict tokens. One check of
// readiness at a time calls it.
func (w *webhook) checkEviction(ctx context.Context) {
	if time.Since(w.evictionAt) < logEvery {
		return
	}
	servers, err := evicting(ctx, w.semaphores.queue)
	if err != nil {
		return
	}
	w.evictionAt, w.eviction = time.Now(), ""
	if servers != "" {
		w.eviction = "warning: Redis may evict tokens, set maxmemory-policy noeviction: " + servers
		w.log.Warn("Redis may evict tokens", "servers", servers)
	}
}

// checkGuard logs once if Redis does not tell its age: then it has no birth guard.
func (w *webhook) checkGuard(ctx context.Context) {
	if w.ageAsked {
		return
	}
	refusal, err := tellsAge(ctx, w.semaphores.queue)
	if w.ageAsked = err == nil; refusal != nil {
		w.log.Warn("no birth guard: the user may not ask for INFO server", "error", refusal.Error())
	}
}

func (w *webhook) isStopping() bool {
	select {
	case <-w.stopping:
		return true
	default:
		return false
	}
}

// mutate speaks HTTP with the API server. It answers with status 200 and an
// AdmissionReview that has a decision; or with another status and the reason as text, and
// then the administrator's failurePolicy decides.
func (w *webhook) mutate(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	ctx, cancel := context.WithDeadline(r.Context(), start.Add(answerWithin(r.URL.Query().Get("timeout"))))
	defer cancel()

	var d decision
	var request *admissionRequest
	release, err := w.bounds.readJSON(ctx, rw, r, func(text []byte) (err error) {
		request, err = decodeReview(text)
		return err
	})
	defer release()
	if err == nil {
		d, err = w.decide(ctx, request)
	}
	if err == nil {
		d.audit()
		err = deliver(ctx, rw, d.response)
		if err == nil && d.verdict != "" {
			err = flush(rw)
		}
		if err != nil && d.verdict != "" {
			d.verdict = verdictUndeliverable
		}
	} else {
		refuse(rw, err)
	}
	if err != nil && d.token != "" {
		w.semaphores.giveBackLater(d.semaphore, d.token)
	}
	if d.verdict == "" && err != nil {
		d.verdict = verdictOf(err)
	}
	took := time.Since(start)
	if d.verdict != "" {
		w.semaphores.metrics.admission(d.verdict, took)
	}
	w.logAdmission(r, d, err, took)
}

// verdictOf returns the verdict on a request that was not read: a good request may have
// found no room.
func verdictOf(err error) string {
	var wrong *badRequest
	if errors.As(err, &wrong) && wrong.status == http.StatusServiceUnavailable {
		return verdictFailed
	}
	return verdictBadRequest
}

// refuse answers a request without a decision.
func refuse(rw http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	var wrong *badRequest
	if errors.As(err, &wrong) {
		status = wrong.status
	}
	switch status {
	case http.StatusMethodNotAllowed:
		rw.Header().Set("Allow", http.MethodPost)
	case http.StatusServiceUnavailable:
		rw.Header().Set("Retry-After", "1")
	}
	http.Error(rw, err.Error(), status)
}

// logAdmission writes the one line about an annotated pod or a bad request.
func (w *webhook) logAdmission(r *http.Request, d decision, err error, took time.Duration) {
	level := slog.LevelInfo
	switch {
	case err == nil:
	case d.verdict == verdictUndeliverable: // its token is given back
		level = slog.LevelWarn
	default:
		level = slog.LevelError
	}
	attrs := []slog.Attr{slog.Float64("durationMs", float64(took.Microseconds())/1000)}
	switch d.verdict {
	case "":
		return
	case verdictBadRequest:
		dropped, ok := w.limit.allow()
		if !ok {
			return
		}
		level = slog.LevelWarn
		attrs = append(attrs, slog.String("remote", r.RemoteAddr), slog.String("verdict", d.verdict),
			slog.Int("notLoggedBefore", dropped))
	default:
		attrs = append(attrs, slog.String("namespace", d.semaphore.namespace), slog.String("key", d.semaphore.key),
			slog.String("pod", d.pod), slog.String("verdict", d.verdict), slog.String("token", d.token))
		if d.response != nil && d.response.Result != nil {
			attrs = append(attrs, slog.String("message", d.response.Result.Message))
		}
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	w.log.LogAttrs(context.WithoutCancel(r.Context()), level, "admission", attrs...)
}

// answerWithin returns how long an answer may take. An API server gives up after its
// ?timeout=; some of that is left for the way back.
func answerWithin(timeout string) time.Duration {
	d, err := time.ParseDuration(timeout)
	if err != nil || d <= 0 {
		d = defaultTimeout
	}
	d = min(d, maxTimeout)
	return d - min(d/10, 500*time.Millisecond)
}

// deliver writes an answer. An error says that the API server does not get it.
func deliver(ctx context.Context, rw http.ResponseWriter, response *admissionv1.AdmissionResponse) error {
	body, err := json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: admissionv1.SchemeGroupVersion.String(), Kind: "AdmissionReview"},
		Response: response,
	})
	if err != nil {
		http.Error(rw, err.Error(), http.StatusInternalServerError)
		return fmt.Errorf("encode the answer: %w", err)
	}
	if err := ctx.Err(); err != nil {
		http.Error(rw, "too late to answer", http.StatusInternalServerError)
		return fmt.Errorf("deliver the answer: %w", err)
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if _, err := rw.Write(body); err != nil {
		return fmt.Errorf("deliver the answer: %w", err)
	}
	return nil
}

// flush sends what deliver has written. It costs a packet more than to leave that to the
// server, but an error says that the API server does not get the answer.
func flush(rw http.ResponseWriter) error {
	if err := http.NewResponseController(rw).Flush(); err != nil {
		return fmt.Errorf("deliver the answer: %w", err)
	}
	return nil
}

// pathDigest is the digest of a valid path. A comparison of digests reveals nothing of
// the path, not even by its time.
type pathDigest [sha256.Size]byte

func newPathDigest(path string) pathDigest { return sha256.Sum256([]byte(path)) }

// pathDigests are the valid paths of a file.
type pathDigests struct {
	paths  []pathDigest
	digest string // of the file's content
}

// parsePathSecrets reads one secret from each line.
func parsePathSecrets(texts [][]byte) (good pathDigests, err error) {
	good.digest = fmt.Sprintf("%x", sha256.Sum256(texts[0]))[:16]
	for n, line := range strings.Split(strings.TrimSpace(string(texts[0])), "\n") {
		line = strings.TrimSpace(line)
		if !isPathSecret(line) {
			// The error does not show the line: it may be a secret.
			return good, fmt.Errorf("line %d is no secret: "+
				"it must be 16 to 128 of a-z 0-9 -, with no - at either end, as Kubernetes wants paths", n+1)
		}
		good.paths = append(good.paths, newPathDigest(mutatePath+"/"+line))
	}
	return good, nil
}

// callers authenticates the clients of the webhook: by the path, and by a certificate if
// one is required.
type callers struct {
	secrets     *watchedFile[pathDigests] // nil: the path has no secret
	authorities *watchedFile[*x509.CertPool]
	names       []string // of certificates; empty accepts any that an authority has signed
	log         *slog.Logger

	limit logLimiter // of warnings about unauthenticated clients
}

// newCallers reads the files.
func newCallers(c webhookConfig, log *slog.Logger) (*callers, error) {
	w := &callers{names: c.clientNames, limit: logLimiter{most: badRequestsLogged}, log: log}
	var err error
	if c.pathSecretFile != "" {
		taken := func(good pathDigests) { // a person can compare the digest
			log.Info("path secret taken", "digest", good.digest, "paths", len(good.paths))
		}
		if w.secrets, err = newWatchedFile(log, parsePathSecrets, taken, c.pathSecretFile); err != nil {
			return nil, fmt.Errorf("--path-secret-file: %w", err)
		}
	}
	if c.clientCAFile != "" {
		taken := func(*x509.CertPool) { log.Info("authorities of clients taken") }
		w.authorities, err = newWatchedFile(log, parseCA, taken, c.clientCAFile)
		if err != nil {
			return nil, fmt.Errorf("--client-ca-file: %w", err)
		}
	}
	return w, nil
}

// watch watches the files until ctx is done.
func (w *callers) watch(ctx context.Context) {
	if w.secrets != nil {
		go w.secrets.watch(ctx, fileInterval)
	}
	if w.authorities != nil {
		go w.authorities.watch(ctx, fileInterval)
	}
}

// mayCall reports whether admission reviews are served at a path. It takes the same time
// for each path.
func (w *callers) mayCall(path string) bool {
	if w.secrets == nil {
		return path == mutatePath
	}
	asked := newPathDigest(path)
	found := 0
	for _, good := range w.secrets.current.Load().paths {
		found |= subtle.ConstantTimeCompare(asked[:], good[:])
	}
	return found == 1
}

// refuse returns the text for an unauthenticated client. It logs some of these, because
// one may be an API server with another secret.
func (w *callers) refuse(remote string) string {
	if w.secrets == nil {
		return "not found: admission reviews are served at " + mutatePath
	}
	if dropped, ok := w.limit.allow(); ok {
		w.log.Warn("a client calls without the path's secret, or with another", "remote", remote,
			"notLoggedBefore", dropped)
	}
	return "not found: the path must end with the secret of --path-secret-file"
}

// tls returns the TLS settings of the server.
func (w *callers) tls(cert *certificate) *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cert.get, NextProtos: []string{"http/1.1"}}
	if w.authorities == nil {
		return c
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.VerifyConnection = w.checkName
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		now := c.Clone()
		now.ClientCAs = *w.authorities.current.Load()
		return now, nil
	}
	return c
}

// checkName refuses a client whose certificate has another name.
func (w *callers) checkName(state tls.ConnectionState) error {
	if len(w.names) == 0 {
		return nil
	}
	if len(state.PeerCertificates) == 0 {
		return errors.New("no client certificate")
	}
	leaf := state.PeerCertificates[0]
	for _, name := range append(leaf.DNSNames, leaf.Subject.CommonName) {
		if slices.Contains(w.names, name) {
			return nil
		}
	}
	return fmt.Errorf("the client certificate is of %s: --client-name is %s",
		quoteShort(leaf.Subject.CommonName), strings.Join(w.names, ","))
}
