package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// serviceAccount is the directory where the kubelet mounts the CA and the token for the
// API server. The kubelet replaces the token before it expires.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

const (
	// callTimeout bounds a request for one object, listTimeout one page of a list. The
	// API server's own limit is a minute.
	callTimeout = 10 * time.Second
	listTimeout = time.Minute

	// callsInFlight and callsPerSecond cap our calls, so that other clients of the API
	// server keep their share.
	callsInFlight  = 8
	callsPerSecond = 100

	// laterInFlight caps the calls that can wait: so few are ahead of any other.
	laterInFlight = 2

	// A connection that is silent for pingAfter gets a ping. It is closed if no answer
	// arrives within pingTimeout.
	pingAfter   = 5 * time.Second
	pingTimeout = 4 * time.Second

	// maxRetryAfter caps the wait that the API server asks for.
	maxRetryAfter = time.Minute
)

// The kinds of errors of the API server. People must fix any other error, such as missing
// rights; callers retry it after a while.
var (
	errNotFound = errors.New("there is no such object")    // 404: it was deleted
	errChanged  = errors.New("the object has changed")     // 409, 422: it is another version, or a test of a patch failed; read it again
	errTryAgain = errors.New("try again")                  // 401, 429, 5xx, no answer: the call may have taken effect
	errExpired  = errors.New("the version is too old now") // 410: list again
)

// kubernetesSettings are the settings for access to the API server.
type kubernetesSettings struct {
	address    string // with or without https://
	caFile     string // PEM; empty for the system's certificates
	tokenFile  string
	namespaces []string // empty for all
}

// kubernetes is a client of the API server with the calls that gate and setup need, over
// one HTTP/2 connection.
type kubernetes struct {
	address string // HOST:PORT
	http    *http.Client
	token   *watchedFile[string]
	ca      *watchedFile[*x509.CertPool] // nil for the system's certificates
	slots   slots                        // for calls in flight
	later   slots                        // for those of them that can wait: see whenQuiet
	pace    *pacer
	events  *eventQueue
	bounds  watchBounds
	log     *slog.Logger
}

// newKubernetes reads the files. The client connects at its first call. The caller starts
// its method run in the background.
func newKubernetes(c kubernetesSettings, log *slog.Logger) (*kubernetes, error) {
	k := &kubernetes{address: strings.TrimPrefix(c.address, "https://"), slots: make(slots, callsInFlight),
		later: make(slots, laterInFlight), pace: newPacer(callsPerSecond, callsPerSecond/2), events: newEventQueue(), bounds: newWatchBounds(), log: log}
	var err error
	if k.token, err = newWatchedFile(log, parseToken, func(string) {}, c.tokenFile); err != nil {
		return nil, fmt.Errorf("--kubernetes-token-file: %w", err)
	}
	if c.caFile != "" {
		if k.ca, err = newWatchedFile(log, parseCA, func(*x509.CertPool) {}, c.caFile); err != nil {
			return nil, fmt.Errorf("--kubernetes-ca-file: %w", err)
		}
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true) // for proxies in between
	protocols.SetHTTP2(true)
	k.http = &http.Client{
		Transport: &http.Transport{
			DialTLSContext: k.dial,
			Protocols:      protocols,
			HTTP2: &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout,
				WriteByteTimeout: pingAfter + pingTimeout},
			IdleConnTimeout: time.Minute,
		},
		// The target of a redirection would receive the token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return k, nil
}

// run rereads the files when they change, and sends events, until ctx is done.
func (k *kubernetes) run(ctx context.Context) {
	defer k.http.CloseIdleConnections()
	go k.token.watch(ctx, fileInterval)
	if k.ca != nil {
		go k.ca.watch(ctx, fileInterval)
	}
	k.sendEvents(ctx)
}

func (k *kubernetes) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	if k.ca != nil {
		c.RootCAs = *k.ca.current.Load()
	}
	return (&tls.Dialer{NetDialer: &net.Dialer{Timeout: callTimeout / 2}, Config: c}).DialContext(ctx, network, address)
}

func parseToken(texts [][]byte) (string, error) {
	token := strings.TrimSpace(string(texts[0]))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errors.New("is not a token: it must be one word")
	}
	return token, nil
}

// getPod reads a pod. It returns errNotFound if there is none, or another pod of that name.
// Callers use it to learn why a watch reports a pod as deleted: the pod is gone, or has
// lost its label.
func (k *kubernetes) getPod(ctx context.Context, namespace, name, uid string) (p *watchedPod, err error) {
	err = k.call(ctx, http.MethodGet, podPath(namespace, name), "", nil, func(body io.Reader) error {
		var o podObject
		err := json.NewDecoder(body).Decode(&o)
		p = o.watched()
		return err
	})
	if err == nil && p.uid != uid {
		return nil, fmt.Errorf("%s/%s has the UID %s, not %s: %w", namespace, name, p.uid, uid, errNotFound)
	}
	return p, err
}

// whenQuiet runs a call that can wait, with few others. However many there are, they
// hardly delay the calls that lift gates.
func (k *kubernetes) whenQuiet(ctx context.Context, call func() error) error {
	free, err := k.later.take(ctx)
	if err != nil {
		return err
	}
	defer free()
	return call()
}

// patchPod changes a pod by a JSON patch. The patch should test all that it relies on,
// the UID first: then it is safe to send it twice. The errors are errNotFound,
// errChanged, errTryAgain, and others; see there.
func (k *kubernetes) patchPod(ctx context.Context, namespace, name string, patch []byte) error {
	return k.call(ctx, http.MethodPatch, podPath(namespace, name), "application/json-patch+json", patch, nil)
}

// patchPodStatus is patchPod for the status of a pod.
func (k *kubernetes) patchPodStatus(ctx context.Context, namespace, name string, patch []byte) error {
	path := podPath(namespace, name) + "/status"
	return k.call(ctx, http.MethodPatch, path, "application/json-patch+json", patch, nil)
}

func podsPath(namespace string) string {
	if namespace == "" {
		return "/api/v1/pods"
	}
	return "/api/v1/namespaces/" + namespace + "/pods"
}

func podPath(namespace, name string) string { return podsPath(namespace) + "/" + name }

// call waits for its turn, and sends a request for one object. Unless read is nil, it
// reads the answer.
func (k *kubernetes) call(ctx context.Context, method, path, contentType string, body []byte,
	read func(io.Reader) error) error {
	free, err := k.slots.take(ctx)
	if err != nil {
		return err
	}
	defer free()
	// After the slot: otherwise, a call that has passed the pacer and waits for a slot
	// would ignore Retry-After.
	if err := k.pace.wait(ctx); err != nil {
		return err
	}
	err = k.exchange(ctx, callTimeout, method, path, contentType, body, read)
	if after := retryAfter(err); after > 0 {
		k.pace.delay(after)
	}
	return err
}

// exchange sends a request and reads the answer, within timeout.
func (k *kubernetes) exchange(ctx context.Context, timeout time.Duration, method, path, contentType string, body []byte,
	read func(io.Reader) error) error {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	response, err := k.send(bounded, method, path, contentType, body)
	if err == nil {
		defer response.Body.Close()
		if read == nil {
			_, err = io.Copy(io.Discard, response.Body)
		} else {
			err = read(response.Body)
		}
		if err != nil {
			err = fmt.Errorf("API server %s: %w: read its answer: %w", k.address, errTryAgain, err)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// send sends a request. It returns an *apiError, or errTryAgain if there is no answer.
func (k *kubernetes) send(ctx context.Context, method, path, contentType string, body []byte) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "https://"+k.address+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+*k.token.current.Load())
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", "at-least-semaphore-pod-hook/"+version)
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := k.http.Do(request)
	if err != nil {
		if shown := (*url.Error)(nil); errors.As(err, &shown) {
			err = shown.Err // without the URL: our own message names the server
		}
		return nil, fmt.Errorf("API server %s: %w: %w", k.address, errTryAgain, err)
	}
	if response.StatusCode/100 != 2 {
		defer response.Body.Close()
		return nil, k.errorOf(response)
	}
	return response, nil
}

// apiStatus is a Status of the API server: the body of an error answer, or the object of
// an ERROR event.
type apiStatus struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// apiError is an error answer of the API server. errors.Is tells which of the errors
// above it is.
type apiError struct {
	apiStatus
	address    string
	retryAfter time.Duration // from the header Retry-After; zero without it
}

func (k *kubernetes) errorOf(response *http.Response) *apiError {
	e := &apiError{address: k.address}
	text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if json.Unmarshal(text, &e.apiStatus) != nil || e.Message+e.Reason == "" { // a proxy answers
		e.apiStatus = apiStatus{Message: quoteShort(strings.TrimSpace(string(text)))}
	}
	e.Code = response.StatusCode
	if n, err := strconv.Atoi(response.Header.Get("Retry-After")); err == nil && n > 0 {
		e.retryAfter = min(time.Duration(n)*time.Second, maxRetryAfter)
	}
	return e
}

func (e *apiError) Error() string {
	return fmt.Sprintf("API server %s: %d %s", e.address, e.Code, truncate(e.Message, 500))
}

// Is implements errors.Is for the errors above. A 404 without a reason is from a proxy:
// the object may exist.
func (e *apiError) Is(target error) bool {
	switch target {
	case errNotFound:
		return e.Code == http.StatusNotFound && e.Reason == "NotFound"
	case errChanged:
		return e.Code == http.StatusConflict || e.Code == http.StatusUnprocessableEntity
	case errExpired:
		return e.Code == http.StatusGone
	case errTryAgain: // 401: we reread the token's file within a second
		return e.Code == http.StatusUnauthorized || e.Code == http.StatusTooManyRequests || e.Code >= 500
	}
	return false
}

// retryAfter returns the wait that the API server asks for.
func retryAfter(err error) time.Duration {
	if e := (*apiError)(nil); errors.As(err, &e) {
		return e.retryAfter
	}
	return 0
}

const (
	eventsWaiting   = 2000 // capacity of the queue; further events are dropped
	eventsPerSecond = 20
	eventAttempts   = 3
	eventNoteMost   = 1000 // bytes; the API server accepts 1023
)

// objectEvent is a Kubernetes Event about an object.
type objectEvent struct {
	about    corev1.ObjectReference
	reporter string // the mode that tells
	warning  bool
	reason   string // one word, such as TokenTaken
	action   string // one word: the action taken or tried
	note     string
	id       string // of an object's events with equal reason and id, Kubernetes keeps one an hour
}

// eventQueue keeps events until they are sent.
type eventQueue struct {
	waiting chan objectEvent
	pace    *pacer
	limit   logLimiter
}

func newEventQueue() *eventQueue {
	return &eventQueue{waiting: make(chan objectEvent, eventsWaiting), pace: newPacer(eventsPerSecond, eventsPerSecond)}
}

// createEvent queues an event and does not block. Events can get lost: no logic may
// depend on them.
func (k *kubernetes) createEvent(e objectEvent) {
	select {
	case k.events.waiting <- e:
	default:
		k.logEventFailure(fmt.Errorf("%d events wait to be sent", eventsWaiting))
	}
}

// hasRoomForEvents reports whether an event that is created now is sent within a second.
func (k *kubernetes) hasRoomForEvents() bool { return len(k.events.waiting) < eventsPerSecond }

// sendEvents sends the queued events one by one until ctx is done.
func (k *kubernetes) sendEvents(ctx context.Context) {
	for {
		select {
		case e := <-k.events.waiting:
			if err := k.sendEvent(ctx, e); err != nil && ctx.Err() == nil {
				k.logEventFailure(err)
			}
		case <-ctx.Done():
			return
		}
	}
}

func (k *kubernetes) logEventFailure(err error) {
	if _, ok := k.events.limit.allow(); ok {
		k.log.Warn("events left out", "error", err.Error())
	}
}

// sendEvent creates the event. It succeeds if another process has already created it.
func (k *kubernetes) sendEvent(ctx context.Context, e objectEvent) error {
	body, err := json.Marshal(e.object(time.Now()))
	if err != nil {
		return err
	}
	path := "/apis/events.k8s.io/v1/namespaces/" + e.about.Namespace + "/events"
	retry := newBackoff(k.bounds.first, k.bounds.most)
	for attempt := 1; ; attempt++ {
		if err := k.events.pace.wait(ctx); err != nil {
			return err
		}
		err := k.call(ctx, http.MethodPost, path, "application/json", body, nil)
		if answer := (*apiError)(nil); errors.As(err, &answer) && answer.Reason == "AlreadyExists" {
			return nil
		}
		if !errors.Is(err, errTryAgain) || attempt == eventAttempts {
			return err
		}
		if err := sleep(ctx, retry.next()); err != nil {
			return err
		}
	}
}

// object returns the Event of events.k8s.io/v1. Processes that report the same event give
// it the same name.
func (e *objectEvent) object(now time.Time) map[string]any {
	id := fnv.New64a()
	fmt.Fprintf(id, "%s\x00%s\x00%s", e.about.UID, e.reason, e.id)
	kind := "Normal"
	if e.warning {
		kind = "Warning"
	}
	return map[string]any{
		"apiVersion": "events.k8s.io/v1",
		"kind":       "Event",
		"metadata": map[string]string{"namespace": e.about.Namespace,
			"name": fmt.Sprintf("%s.%016x", strings.TrimRight(truncate(e.about.Name, 200), ".-"), id.Sum64())},
		"regarding":           e.about,
		"eventTime":           now.UTC().Format("2006-01-02T15:04:05.000000Z"),
		"reportingController": annotationPrefix + e.reporter,
		"reportingInstance":   instanceName(),
		"type":                kind,
		"reason":              e.reason,
		"action":              e.action,
		"note":                truncate(e.note, eventNoteMost),
	}
}

// instanceName returns the pod's name, which identifies this process in its Deployment.
func instanceName() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return truncate(name, 128)
}
