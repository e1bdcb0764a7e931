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
)

// serviceAccount is where the kubelet mounts what a pod needs to speak to the API server. It replaces the token before that expires.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

const (
	// callTimeout bounds a request that is about one object, and listTimeout one page of a list; the API server gives up after a minute.
	callTimeout = 10 * time.Second
	listTimeout = time.Minute

	// callsInFlight and callsPerSecond keep changes of many pods at once from crowding out others at the API server.
	callsInFlight  = 8
	callsPerSecond = 100

	// A connection that says nothing for pingAfter is asked, and closed if it has not answered after pingTimeout.
	pingAfter   = 5 * time.Second
	pingTimeout = 4 * time.Second

	// retryAfterMost bounds the wait that the API server may ask for.
	retryAfterMost = time.Minute
)

// What the API server's answers come to. An error that is none of them, such as that the rights are missing, is for people to mend:
// it is worth another try after a while.
var (
	errNoPod      = errors.New("there is no such pod")       // 404: it was deleted
	errPodChanged = errors.New("the pod has changed")        // 409, 422: a test of the patch failed, look at the pod again
	errTryAgain   = errors.New("try again")                  // 401, 429, 5xx, no answer: it may have been done all the same
	errExpired    = errors.New("the version is too old now") // 410: list again
)

// kubernetesSettings say how to reach the API server.
type kubernetesSettings struct {
	address    string // with or without https://
	caFile     string // PEM; empty for the certificates of the system
	tokenFile  string
	namespaces []string // empty for all
}

// kubernetes is a client of the API server: all that the mode gate needs of it, over one HTTP/2 connection.
type kubernetes struct {
	address string // HOST:PORT
	http    *http.Client
	token   *watchedFile[string]
	ca      *watchedFile[*x509.CertPool] // nil for the certificates of the system
	slots   slots                        // of calls in flight
	pace    *pacer
	events  *eventQueue
	bounds  watchBounds
	log     *slog.Logger
}

// newKubernetes reads the files, and connects when it is first used. Its method run has to run beside it.
func newKubernetes(c kubernetesSettings, log *slog.Logger) (*kubernetes, error) {
	k := &kubernetes{address: strings.TrimPrefix(c.address, "https://"), slots: make(slots, callsInFlight),
		pace: newPacer(callsPerSecond, callsPerSecond/2), events: newEventQueue(), bounds: newWatchBounds(), log: log}
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
	protocols.SetHTTP1(true) // for what may stand between
	protocols.SetHTTP2(true)
	k.http = &http.Client{
		Transport: &http.Transport{
			DialTLSContext:  k.dial,
			Protocols:       protocols,
			HTTP2:           &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout, WriteByteTimeout: pingAfter + pingTimeout},
			IdleConnTimeout: time.Minute,
		},
		// A redirection would get the token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return k, nil
}

// run follows the files and sends events, until ctx is done.
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

// getPod reads a pod. Its error is errNoPod, too, if there is another one of that name. It is how to learn why a watch says that a pod
// is gone: it may have been deleted, or have lost the label.
func (k *kubernetes) getPod(ctx context.Context, namespace, name, uid string) (p *watchedPod, err error) {
	err = k.call(ctx, http.MethodGet, podPath(namespace, name), "", nil, func(body io.Reader) error {
		var o podObject
		err := json.NewDecoder(body).Decode(&o)
		p = o.watched()
		return err
	})
	if err == nil && p.uid != uid {
		return nil, fmt.Errorf("%s/%s has the UID %s, not %s: %w", namespace, name, p.uid, uid, errNoPod)
	}
	return p, err
}

// patchPod changes a pod by a JSON patch, which should test all that it relies on, the UID first: then it is safe to send it twice.
// Its errors are errNoPod, errPodChanged, errTryAgain, and others (see there).
func (k *kubernetes) patchPod(ctx context.Context, namespace, name string, patch []byte) error {
	return k.call(ctx, http.MethodPatch, podPath(namespace, name), "application/json-patch+json", patch, nil)
}

func podsPath(namespace string) string {
	if namespace == "" {
		return "/api/v1/pods"
	}
	return "/api/v1/namespaces/" + namespace + "/pods"
}

func podPath(namespace, name string) string { return podsPath(namespace) + "/" + name }

// call sends a request that is about one object, in its turn, and reads the answer by read unless that is nil.
func (k *kubernetes) call(ctx context.Context, method, path, contentType string, body []byte, read func(io.Reader) error) error {
	free, err := k.slots.take(ctx)
	if err != nil {
		return err
	}
	defer free()
	if err := k.pace.wait(ctx); err != nil { // last, so that none that waited for a slot passes while all are held
		return err
	}
	err = k.exchange(ctx, callTimeout, method, path, contentType, body, read)
	if after := retryAfter(err); after > 0 {
		k.pace.hold(after)
	}
	return err
}

// exchange sends a request and reads the answer within a time.
func (k *kubernetes) exchange(ctx context.Context, within time.Duration, method, path, contentType string, body []byte, read func(io.Reader) error) error {
	bounded, cancel := context.WithTimeout(ctx, within)
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

// send sends a request. Its errors are *apiError, and errTryAgain if there is no answer.
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
			err = shown.Err // without the URL, which says nothing more than we do
		}
		return nil, fmt.Errorf("API server %s: %w: %w", k.address, errTryAgain, err)
	}
	if response.StatusCode/100 != 2 {
		defer response.Body.Close()
		return nil, k.refused(response)
	}
	return response, nil
}

// apiStatus is the API server's Status, as the body of an answer or the object of an ERROR event.
type apiStatus struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// apiError is an answer of the API server other than the one that was asked for. It is one of the errors above.
type apiError struct {
	apiStatus
	address    string
	retryAfter time.Duration // zero if the API server asks for no wait
}

func (k *kubernetes) refused(response *http.Response) *apiError {
	e := &apiError{address: k.address}
	text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if json.Unmarshal(text, &e.apiStatus) != nil || e.Message+e.Reason == "" { // it is not the API server that answers
		e.apiStatus = apiStatus{Message: quoteShort(strings.TrimSpace(string(text)))}
	}
	e.Code = response.StatusCode
	if n, err := strconv.Atoi(response.Header.Get("Retry-After")); err == nil && n > 0 {
		e.retryAfter = min(time.Duration(n)*time.Second, retryAfterMost)
	}
	return e
}

func (e *apiError) Error() string {
	return fmt.Sprintf("API server %s: %d %s", e.address, e.Code, truncate(e.Message, 500))
}

// Is tells which of the errors above it is. A 404 without a reason is not of the API server, and says nothing of the pod.
func (e *apiError) Is(target error) bool {
	switch target {
	case errNoPod:
		return e.Code == http.StatusNotFound && e.Reason == "NotFound"
	case errPodChanged:
		return e.Code == http.StatusConflict || e.Code == http.StatusUnprocessableEntity
	case errExpired:
		return e.Code == http.StatusGone
	case errTryAgain: // 401: the file has another token within a second
		return e.Code == http.StatusUnauthorized || e.Code == http.StatusTooManyRequests || e.Code >= 500
	}
	return false
}

// retryAfter is for how long the API server asks to be left alone.
func retryAfter(err error) time.Duration {
	if e := (*apiError)(nil); errors.As(err, &e) {
		return e.retryAfter
	}
	return 0
}

// eventReporter is who the events are from.
const eventReporter = annotationPrefix + "gate"

const (
	eventsWaiting   = 2000 // those that find so many before them are left out
	eventsPerSecond = 20
	eventAttempts   = 3
	eventNoteMost   = 1000 // bytes; the API server takes 1023
)

// podEvent is an event of Kubernetes about a pod.
type podEvent struct {
	pod     *watchedPod
	warning bool
	reason  string // one word, such as TokenTaken
	action  string // one word: what was done, or tried
	note    string
	id      string // tells events of the pod with the same reason apart; of those with the same, in an hour, one is shown
}

// eventQueue keeps events until they are sent.
type eventQueue struct {
	waiting chan podEvent
	pace    *pacer
	limit   logLimiter
}

func newEventQueue() *eventQueue {
	return &eventQueue{waiting: make(chan podEvent, eventsWaiting), pace: newPacer(eventsPerSecond, eventsPerSecond)}
}

// createEvent has an event sent, soon and if that is possible: nothing may depend on it. It does not block.
func (k *kubernetes) createEvent(e podEvent) {
	select {
	case k.events.waiting <- e:
	default:
		k.logEventFailure(fmt.Errorf("%d events wait to be sent", eventsWaiting))
	}
}

// sendEvents sends events one by one until ctx is done.
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
		k.log.Warn("events of pods left out", "error", err.Error())
	}
}

// sendEvent creates the event; that another process has done so before is as good.
func (k *kubernetes) sendEvent(ctx context.Context, e podEvent) error {
	body, err := json.Marshal(e.object(time.Now()))
	if err != nil {
		return err
	}
	path := "/apis/events.k8s.io/v1/namespaces/" + e.pod.namespace + "/events"
	retry := newBackoff(k.bounds.first, k.bounds.most)
	for attempt := 1; ; attempt++ {
		if err := k.events.pace.wait(ctx); err != nil {
			return err
		}
		err := k.call(ctx, http.MethodPost, path, "application/json", body, nil)
		if refused := (*apiError)(nil); errors.As(err, &refused) && refused.Reason == "AlreadyExists" {
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

// object is the Event of events.k8s.io/v1. Its name is the same in all processes that tell the same.
func (e *podEvent) object(now time.Time) map[string]any {
	id := fnv.New64a()
	fmt.Fprintf(id, "%s\x00%s\x00%s", e.pod.uid, e.reason, e.id)
	kind := "Normal"
	if e.warning {
		kind = "Warning"
	}
	return map[string]any{
		"apiVersion": "events.k8s.io/v1",
		"kind":       "Event",
		"metadata":   map[string]string{"namespace": e.pod.namespace, "name": fmt.Sprintf("%s.%016x", truncate(e.pod.name, 200), id.Sum64())},
		"regarding": map[string]string{"apiVersion": "v1", "kind": "Pod", "namespace": e.pod.namespace, "name": e.pod.name, "uid": e.pod.uid,
			"resourceVersion": e.pod.version},
		"eventTime":           now.UTC().Format("2006-01-02T15:04:05.000000Z"),
		"reportingController": eventReporter,
		"reportingInstance":   instanceName(),
		"type":                kind,
		"reason":              e.reason,
		"action":              e.action,
		"note":                truncate(e.note, eventNoteMost),
	}
}

// instanceName tells the processes of a Deployment apart: the pod's name.
func instanceName() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return truncate(name, 128)
}
