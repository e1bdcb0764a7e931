package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestMain(m *testing.M) {
	if err := chooseTests(); err != nil {
		panic(err)
	}
	os.Exit(rig.Run(m))
}

// freshID returns a semaphore that no other test uses.
func freshID() semaphoreID { return semaphoreOf(rig.FreshID()) }

func semaphoreOf(id rig.ID) semaphoreID { return semaphoreID{id.Namespace, id.Key} }

// clientSettings returns the settings of a client of a test's API server.
func clientSettings(s *rig.APIServer) kubernetesSettings {
	return kubernetesSettings{address: s.Address, caFile: s.CAFile, tokenFile: s.TokenFile}
}

func testConfig(address string) webhookConfig {
	return webhookConfig{
		settings: settings{
			lockMode:          "redlock",
			redisAddresses:    []string{address},
			etcdAddresses:     []string{"127.0.0.1:2379"},
			queueRedisAddress: mustAddress(rig.QueueAddress(address)),
			heartbeatInterval: 30 * time.Second,
			staleThreshold:    120 * time.Second,
			redis:             redisSettings{loadsScripts: true},
		},
		sidecarImage: "example.org/sidecar:v1",
		sidecarLimits: corev1.ResourceList{
			"cpu": resource.MustParse("100m"), "memory": resource.MustParse("64Mi"),
		},
		sidecarRequests: corev1.ResourceList{
			"cpu": resource.MustParse("5m"), "memory": resource.MustParse("32Mi"),
		},
		enableSidecarContainers: true,
	}
}

// configWithInterval is testConfig with another heartbeat interval. Its stale threshold
// is longer than any test.
func configWithInterval(address string, interval time.Duration) webhookConfig {
	c := testConfig(address)
	c.heartbeatInterval = interval
	return c
}

// semaphoresOf returns the semaphores of a webhook or sidecar with a configuration.
func semaphoresOf(t *testing.T, c webhookConfig) *semaphores {
	t.Helper()
	locks := newLocker(c.settings, lockConnections)
	s := newSemaphores(c.settings, locks, idleConnections, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.close(context.Background())) })
	return s
}

func mustAddress(text string) queueAddress {
	address, err := readQueueAddress(text)
	if err != nil {
		panic(err)
	}
	return address
}

// testWebhook is a webhook behind a real TLS server.
type testWebhook struct {
	*webhook
	server *httptest.Server
	log    *rig.Log
}

// surveyPatience is the surveyTimeout of tests: on a loaded machine, a survey takes longer.
const surveyPatience = time.Minute

func startWebhook(t testing.TB, c webhookConfig) *testWebhook {
	t.Helper()
	var b rig.Log
	log := slog.New(slog.NewJSONHandler(&b, nil))
	c.redis.counts = new(redisCounts)
	who, err := newCallers(c, log)
	rig.Must(t, err)
	a := newAdmitter(c, newSemaphores(c.settings, newLocker(c.settings, lockConnections), idleConnections, log))
	w := &webhook{admitter: a, callers: who, bounds: newBounds(), limit: logLimiter{most: badRequestsLogged}, log: log}
	w.semaphores.metrics = newMetrics(c.redis.counts)
	w.semaphores.metrics.countVerdicts()
	w.semaphores.metrics.watchSemaphores(w.semaphores, surveyPatience)
	w.semaphores.metrics.watchGate(w.semaphores.queue)
	server := httptest.NewUnstartedServer(w.routes())
	w.bounds.apply(server.Config)
	server.StartTLS()
	server.Client().Transport.(*http.Transport).MaxIdleConnsPerHost = 1000
	tw := &testWebhook{webhook: w, server: server, log: &b}
	t.Cleanup(tw.close)
	return tw
}

func (w *testWebhook) close() {
	w.server.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = w.semaphores.close(ctx)
}

// post sends a body to /mutate, and returns the status and the text.
func (w *testWebhook) post(ctx context.Context, body []byte, timeout string) (int, string, error) {
	url := w.server.URL + "/mutate?timeout=" + timeout
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := w.server.Client().Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// admit sends a review, and fails if the reply has no decision.
func (w *testWebhook) admit(t *testing.T, body []byte) rig.Admission {
	t.Helper()
	a, err := w.tryAdmit(body)
	rig.Must(t, err)
	return a
}

func (w *testWebhook) tryAdmit(body []byte) (rig.Admission, error) {
	return w.tryAdmitWithin(body, "10s")
}

// tryAdmitWithin is tryAdmit with the timeout of an API server's call.
func (w *testWebhook) tryAdmitWithin(body []byte, timeout string) (rig.Admission, error) {
	status, text, err := w.post(context.Background(), body, timeout)
	if err != nil {
		return rig.Admission{}, err
	}
	return rig.ReadAdmission(status, text)
}

// wantAdmitted admits a pod that must get a token, and returns the token.
func (w *testWebhook) wantAdmitted(t *testing.T, id semaphoreID, length int) string {
	t.Helper()
	a := w.admit(t, rig.Review(t, id, length))
	if !a.Allowed || a.Token == "" {
		t.Fatalf("%s: not admitted: %d %s", id, a.Code, a.Message)
	}
	return a.Token
}

// wantFull sends a pod that must be refused, with inUse tokens in use.
func (w *testWebhook) wantFull(t *testing.T, id semaphoreID, length, inUse int) {
	t.Helper()
	a := w.admit(t, rig.Review(t, id, length))
	want := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", id, inUse, length)
	if a.Allowed || a.Code != http.StatusTooManyRequests || !strings.HasPrefix(a.Message, want) || a.Patch != nil {
		t.Fatalf("got %+v, want 429 %q", a, want)
	}
}

// gateTest is an API server with pods, and a Redis, for gates.
type gateTest struct {
	*testing.T
	redis  *rig.Redis
	api    *rig.APIServer
	config webhookConfig // shared by the gates and owner
	owner  *semaphores   // in the place of sidecars
	id     semaphoreID
	length int

	silence time.Duration // see watchBounds; zero for that of production
}

func newGateTest(t *testing.T, length int) *gateTest {
	t.Helper()
	r := rig.StartRedis(t)
	return newGateTestOn(t, r, testConfig(r.Address), length)
}

// newGateTestOn is newGateTest on an existing Redis.
func newGateTestOn(t *testing.T, r *rig.Redis, c webhookConfig, length int) *gateTest {
	t.Helper()
	s := rig.StartAPIServer(t)
	return &gateTest{t, r, s, c, semaphoresOf(t, c), semaphoreID{s.NewNamespace(t), "web"}, length, 0}
}

// start starts a gate. It ends with the test, or by stop.
func (g *gateTest) start(change ...func(*gateConfig)) (started *gate, log *rig.Log, stop func()) {
	g.Helper()
	c := gateConfig{settings: g.config.settings, kubernetes: clientSettings(g.api), unschedulable: 5 * time.Minute}
	for _, ch := range change {
		ch(&c)
	}
	log = new(rig.Log)
	started, err := newGate(c, slog.New(slog.NewJSONHandler(log, nil)))
	rig.Must(g.T, err)
	if g.silence > 0 {
		started.kubernetes.bounds.silence = g.silence
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		started.run(ctx)
		rig.Must(g.T, started.semaphores.close(context.Background()))
	}()
	stop = func() {
		cancel()
		<-done
	}
	g.Cleanup(stop)
	g.Cleanup(func() {
		if g.Failed() {
			g.Logf("log of gate:\n%s", log)
		}
	})
	return started, log, stop
}

// create creates a pod as the webhook patches it, and returns its token.
func (g *gateTest) create(name string) (token string) {
	g.Helper()
	return g.createAs(g.admitted(name))
}

// createAs is create for an existing pod object.
func (g *gateTest) createAs(p *corev1.Pod) (token string) {
	g.Helper()
	return string(g.api.CreatePod(g.T, g.id.namespace, p).UID)
}

// admitted returns a pod as the webhook patches it.
func (g *gateTest) admitted(name string) *corev1.Pod {
	return rig.AdmittedPod(name, rig.ID{Namespace: g.id.namespace, Key: g.id.key}, g.length, 10)
}

// createBlocked is createAs, and the pod has another scheduling gate, too.
func (g *gateTest) createBlocked(p *corev1.Pod) (token string) {
	g.Helper()
	p.Spec.SchedulingGates = append([]corev1.PodSchedulingGate{{Name: "example.org/other"}}, p.Spec.SchedulingGates...)
	return string(g.api.CreatePod(g.T, g.id.namespace, p).UID)
}

func (g *gateTest) createAll(names ...string) (tokens []string) {
	g.Helper()
	for _, name := range names {
		tokens = append(tokens, g.create(name))
	}
	return tokens
}

func (g *gateTest) pod(name string) *corev1.Pod {
	g.Helper()
	p, status := g.api.Store.Get(g.id.namespace, name)
	if status != nil {
		g.Fatalf("pod %s: %s", name, status.Message)
	}
	return p
}

// change changes a pod, as other controllers and the kubelet do.
func (g *gateTest) change(name string, change func(*corev1.Pod)) {
	g.Helper()
	if _, status := g.api.Store.Change(g.id.namespace, name, change); status != nil {
		g.Fatal(status.Message)
	}
}

// wantEvent waits until a pod has one event of this reason, with this text.
func (g *gateTest) wantEvent(name, reason, text string) {
	g.Helper()
	rig.Eventually(g.T, 20*time.Second, func() error {
		var notes []string
		for _, e := range g.api.Store.EventsOf(g.id.namespace) {
			if e.Reason == reason && e.Regarding.Name == name {
				notes = append(notes, e.Note)
			}
		}
		if len(notes) != 1 || !strings.Contains(notes[0], text) {
			return fmt.Errorf("the events %s of %s are %q, want one with %q", reason, name, notes, text)
		}
		return nil
	})
}

// lifted reports whether the pod's scheduling gate is lifted.
func (g *gateTest) lifted(name string) bool { return len(g.pod(name).Spec.SchedulingGates) == 0 }

// wantLifted waits until the gates of these pods are lifted. It fails if one of the pods
// gated has no gate.
func (g *gateTest) wantLifted(lifted []string, gated ...string) {
	g.Helper()
	rig.Eventually(g.T, 20*time.Second, func() error {
		for _, name := range lifted {
			if !g.lifted(name) {
				return fmt.Errorf("%s still has its gate", name)
			}
		}
		return nil
	})
	for _, name := range gated {
		if g.lifted(name) {
			g.Fatalf("the gate of %s was lifted", name)
		}
	}
}

// wantHolders waits until exactly these tokens are in flight.
func (g *gateTest) wantHolders(want ...string) {
	g.Helper()
	want = slices.Sorted(slices.Values(want))
	rig.Eventually(g.T, 20*time.Second, func() error {
		got, err := redis.Strings(g.redis.Control.Do("ZRANGE", g.id.inflightKey(), 0, -1))
		slices.Sort(got)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("in flight: %v, want %v", got, want)
		}
		return err
	})
}

// run marks a pod as running, as a kubelet does, and waits until its label is gone.
func (g *gateTest) run(name string) {
	g.Helper()
	g.change(name, rig.MarkRunning)
	rig.Eventually(g.T, 10*time.Second, func() error {
		if label, ok := g.pod(name).Labels[labelGated]; ok {
			return fmt.Errorf("%s still has the label %q", name, label)
		}
		return nil
	})
}

// newWaiter returns a waiter of this process with a fresh token, which reports nothing.
func newWaiter(s *semaphores, id semaphoreID, length int) *waiter {
	return &waiter{semaphores: s, id: id, token: uuid.NewString(), length: length, expiration: 10 * time.Second,
		report: func(string) {}, log: slog.New(slog.DiscardHandler)}
}

// waitOnly is wait with its error only.
func (w *waiter) waitOnly(ctx context.Context) error {
	_, _, err := w.wait(ctx)
	return err
}

// queueUp starts a waiter in this process, and waits until it is in line. The channel
// gets the result of its wait.
func queueUp(
	t *testing.T, ctx context.Context, s *semaphores, id semaphoreID, length int, r *rig.Redis,
) (token string, done <-chan error) {
	t.Helper()
	before, err := r.Line(id)
	rig.Must(t, err)
	w := newWaiter(s, id, length)
	done = w.start(t, ctx)
	r.WantLine(t, id, append(before, w.token)...)
	return w.token, done
}

// start starts to wait. done receives the error of wait.
func (w *waiter) start(t *testing.T, ctx context.Context) (done <-chan error) {
	result := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		result <- w.waitOnly(ctx)
	}()
	t.Cleanup(func() { // runs before the semaphores are closed
		cancel()
		<-ended
	})
	return result
}

func wantDone(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		rig.Must(t, err)
	case <-time.After(90 * time.Second):
		t.Fatal("the waiter was not served within 90 s")
	}
}

func giveBack(t *testing.T, s *semaphores, id semaphoreID, token string) {
	t.Helper()
	_, err := s.release(context.Background(), id, token, "")
	rig.Must(t, err)
}

// standInLine joins the line for a pod that never polls again. If reachable, the pod is
// subscribed, until leave ends that.
func standInLine(
	t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, reachable bool,
) (token string, leave func()) {
	t.Helper()
	token = uuid.NewString()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if reachable {
		subscribed := newWakeup()
		calls := newSubscription(s.queue, id, s.log)
		calls.add(subscribed, id, token)
		go func() { _ = calls.receive(ctx) }()
		<-subscribed
	}
	if a, err := s.runAcquire(ctx, id, acquireRequest{token: token, length: 1, arrival: joinLine}); err != nil || a.status != acquireFull {
		t.Fatalf("got %+v, %v, want a place in line", a, err)
	}
	return token, func() {
		cancel()
		rig.Eventually(t, 10*time.Second, func() error {
			n, err := redis.Values(r.Control.Do("PUBSUB", "NUMSUB", id.channel(token)))
			if err == nil && n[1] != int64(0) {
				err = errors.New("still subscribed")
			}
			return err
		})
	}
}

// misdirectedSemaphores make their first subscription at a server that publishes nothing.
func misdirectedSemaphores(t *testing.T, address string) *semaphores {
	t.Helper()
	s, elsewhere := testSemaphores(t, address), rig.StartRedis(t)
	pool := serverOf(t, s, freshID()).pool
	dial, dialled := pool.DialContext, 0
	pool.DialContext = func(ctx context.Context) (redis.Conn, error) {
		if dialled++; dialled == 2 { // the first connection is for acquires
			return dialRedis(ctx, elsewhere.Address, redisSettings{}, time.Minute)
		}
		return dial(ctx)
	}
	return s
}

// testSemaphores returns the semaphores of one webhook.
func testSemaphores(t *testing.T, address string) *semaphores {
	t.Helper()
	return semaphoresOf(t, testConfig(address))
}

// serverOf returns the server that holds a semaphore.
func serverOf(t *testing.T, s *semaphores, id semaphoreID) *queueServer {
	t.Helper()
	server, err := s.queue.find(context.Background(), id)
	rig.Must(t, err)
	return server
}

// newSemaphore returns a fresh semaphore on the common Redis.
func newSemaphore(t *testing.T) (*rig.Redis, *semaphores, semaphoreID) {
	t.Helper()
	return newSemaphoreOn(t, rig.CommonRedis(t))
}

func newSemaphoreOn(t *testing.T, r *rig.Redis) (*rig.Redis, *semaphores, semaphoreID) {
	t.Helper()
	return r, testSemaphores(t, r.Address), freshID()
}

// maintain repairs on behalf of a pod that is not in line.
func maintain(t *testing.T, s *semaphores, id semaphoreID, length int) {
	t.Helper()
	rig.Must(t, s.maintain(context.Background(), id, length, true))
}

func acquire(t *testing.T, s *semaphores, id semaphoreID, length int) string {
	t.Helper()
	token, _, err := s.acquire(context.Background(), id, "", length, limit{}, 10*time.Second)
	rig.Must(t, err)
	return token
}

func wantFullError(t *testing.T, s *semaphores, id semaphoreID, length, inUse int) {
	t.Helper()
	_, _, err := s.acquire(context.Background(), id, "", length, limit{}, 10*time.Second)
	var full *fullError
	if !errors.As(err, &full) || full.inUse != inUse || full.length != length {
		t.Fatalf("got %v, want %d of %d in use", err, inUse, length)
	}
}

// countingLocker counts the attempts to lock, and the successes.
type countingLocker struct {
	locker
	tried, locked atomic.Int32
}

func (l *countingLocker) tryLock(
	ctx context.Context, name string, expiration time.Duration,
) (func(context.Context) error, error) {
	l.tried.Add(1)
	unlock, err := l.locker.tryLock(ctx, name, expiration)
	if err == nil {
		l.locked.Add(1)
	}
	return unlock, err
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	rig.Must(t, err)
	return b
}

// concurrently calls do for 0 to n-1, sixteen at a time.
func concurrently(n int, do func(i int)) {
	var next atomic.Int64
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				do(i)
			}
		})
	}
	all.Wait()
}

// seedLine makes a semaphore with free tokens and a line of waiters that were last seen
// at the time silent ago. It returns the waiters' tokens.
func seedLine(
	t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, free, waiting int, silent time.Duration,
) []string {
	t.Helper()
	giveBack(t, s, id, acquire(t, s, id, maxLength))
	r.Do(t, "DEL", id.queueKey())
	now, err := redis.Ints(r.Do(t, "TIME"), nil)
	rig.Must(t, err)
	items := make([]any, 0, free+1)
	for range free {
		items = append(items, "free")
	}
	r.Do(t, "RPUSH", append([]any{id.queueKey()}, items...)...)
	var tokens []string
	waiters, seen, names := []any{id.waitersKey()}, []any{id.seenKey()}, []any{id.namesKey()}
	for i := range waiting {
		token := uuid.NewString()
		tokens = append(tokens, token)
		waiters = append(waiters, now[0]*1_000_000-waiting+i, token)
		seen = append(seen, now[0]-seconds(silent), token)
		names = append(names, token, maxLength)
	}
	r.Do(t, "ZADD", waiters...)
	r.Do(t, "ZADD", seen...)
	r.Do(t, "HSET", names...)
	return tokens
}

// inTime repeats work whose answers were late on a busy machine.
func inTime(work func() error) error {
	for end := time.Now().Add(time.Minute); ; {
		var network net.Error
		err := work()
		late := errors.Is(err, context.DeadlineExceeded) || errors.As(err, &network) && network.Timeout()
		if !late || time.Now().After(end) {
			return err
		}
	}
}
