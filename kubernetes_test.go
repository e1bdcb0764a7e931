package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// liftGate returns the patch that removes our gate of a testGatedPod.
func liftGate(uid string) (steps patch) {
	steps.test(uid, "metadata", "uid")
	steps.test(rig.GateName, "spec", "schedulingGates", "1", "name")
	steps.remove("spec", "schedulingGates", "1")
	return steps
}

// A patch changes the pod once, and only the pod with that UID and version.
func TestKubernetesPatch(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	k, _ := newClient(t, clientSettings(s))
	wantGates := func(gates ...string) {
		t.Helper()
		p := new(corev1.Pod)
		s.Direct(t, http.MethodGet, podPath(n, "p"), nil, p)
		var got []string
		for _, g := range p.Spec.SchedulingGates {
			got = append(got, g.Name)
		}
		if !slices.Equal(got, gates) {
			t.Fatalf("gates %q, want %q", got, gates)
		}
	}
	uid := string(s.CreatePod(t, n, rig.GatedPod("p")).UID)
	const anotherUID = "00000000-0000-0000-0000-000000000000"
	if err := k.patchPod(t.Context(), n, "p", liftGate(anotherUID).json()); !errors.Is(err, errChanged) {
		t.Errorf("with another UID: got %v", err)
	}
	wantGates("example.org/other", rig.GateName)
	rig.Must(t, k.patchPod(t.Context(), n, "p", liftGate(uid).json()))
	wantGates("example.org/other")
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errChanged) {
		t.Errorf("a second patch: got %v", err)
	}
	wantGates("example.org/other")
	var old patch
	old.test("1", "metadata", "resourceVersion")
	old.add("false", "metadata", "labels", rig.LabelGated)
	if err := k.patchPod(t.Context(), n, "p", old.json()); !errors.Is(err, errChanged) {
		t.Errorf("with another version: got %v", err)
	}
	s.DeletePod(t, n, "p")
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errNotFound) {
		t.Errorf("without the pod: got %v", err)
	}
	if err := k.patchPod(t.Context(), n+"-none", "p", liftGate(uid).json()); !errors.Is(err, errNotFound) {
		t.Errorf("without the namespace: got %v", err)
	}
}

// Temporary failures of the API server can be retried. A reply of another server, in
// front of it, says nothing about pods.
func TestKubernetesRefusals(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	uid := string(s.CreatePod(t, n, rig.GatedPod("p")).UID)
	k, _ := newClient(t, clientSettings(s))
	sentinels := []error{errNotFound, errChanged, errTryAgain, errExpired}
	for _, c := range []struct {
		code  int32
		want  error // nil: none of the sentinels
		fault rig.APIFault
	}{
		{code: http.StatusUnauthorized, want: errTryAgain},
		{code: http.StatusTooManyRequests, want: errTryAgain},
		{code: http.StatusInternalServerError, want: errTryAgain},
		{code: http.StatusServiceUnavailable, want: errTryAgain},
		{code: http.StatusGatewayTimeout, want: errTryAgain},
		{code: http.StatusConflict, want: errChanged},
		{code: http.StatusForbidden},
		{code: http.StatusBadRequest},
		{code: http.StatusNotFound, fault: func(w http.ResponseWriter, r *http.Request) bool {
			http.NotFound(w, r)
			return true
		}},
		{code: http.StatusFound, fault: func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "https://"+s.Address+"/elsewhere", http.StatusFound)
			return true
		}},
	} {
		if c.fault == nil {
			c.fault = func(w http.ResponseWriter, _ *http.Request) bool {
				rig.Respond(w, 0, nil, rig.Failure(c.code, "", "said on purpose"))
				return true
			}
		}
		s.Fail(c.fault)
		err := k.patchPod(t.Context(), n, "p", liftGate(uid).json())
		for _, sentinel := range sentinels {
			if errors.Is(err, sentinel) != (sentinel == c.want) {
				t.Errorf("status %d: errors.Is(%v, %q) is %t", c.code, err, sentinel, errors.Is(err, sentinel))
			}
		}
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("API server %s: %d", s.Address, c.code)) {
			t.Errorf("status %d: got %v", c.code, err)
		}
	}
	if s.Count(func(r string) bool { return strings.Contains(r, "elsewhere") }) > 0 {
		t.Error("the client sent its token to the target of a redirect")
	}

	s.Fail(nil)
	s.Stop()
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errTryAgain) {
		t.Errorf("without a server: got %v", err)
	}
	s.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := k.patchPod(ctx, n, "p", liftGate(uid).json())
	if !errors.Is(err, context.Canceled) || errors.Is(err, errTryAgain) {
		t.Errorf("with an ended context: got %v", err)
	}
	rig.Must(t, k.patchPod(t.Context(), n, "p", liftGate(uid).json()))
}

// A patch can be repeated if its reply was lost.
func TestKubernetesLostReply(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	uid := string(s.CreatePod(t, n, rig.GatedPod("p")).UID)
	k, _ := newClient(t, clientSettings(s))
	s.Fail(func(_ http.ResponseWriter, r *http.Request) bool {
		s.Direct(t, r.Method, r.URL.Path, liftGate(uid), nil)
		panic(http.ErrAbortHandler)
	})
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errTryAgain) {
		t.Errorf("the first patch: got %v", err)
	}
	s.Fail(nil)
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errChanged) {
		t.Errorf("the second patch: got %v", err)
	}
	p, err := k.getPod(t.Context(), n, "p", uid)
	rig.Must(t, err)
	if slices.Contains(p.gates, rig.GateName) {
		t.Errorf("the gates are %q", p.gates)
	}
}

// Concurrent changes are sent a few at a time, over one connection. They pause if the API
// server asks for it.
func TestKubernetesLimitsRequests(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	proxy := rig.StartProxy(t, s.Address)
	c := clientSettings(s)
	c.address = proxy.Address
	k, _ := newClient(t, c)
	const patches = 200
	for i := range patches {
		s.CreatePod(t, n, rig.GatedPod(fmt.Sprintf("p%d", i)))
	}
	// The first request opens the one connection: concurrent dials would open several and
	// close those they do not need.
	rig.Must(t, k.patchPod(t.Context(), n, "p0", patch{}.json()))
	var inFlight, most, done atomic.Int32
	var mu sync.Mutex
	var last time.Time
	var rest time.Duration // longest time without a request
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		now := inFlight.Add(1)
		defer inFlight.Add(-1)
		for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
		}
		mu.Lock()
		if !last.IsZero() {
			rest = max(rest, time.Since(last))
		}
		last = time.Now()
		mu.Unlock()
		time.Sleep(150 * time.Millisecond) // keeps requests in flight together, below the allowed rate
		if done.Add(1) != 100 {
			return false
		}
		w.Header().Set("Retry-After", "3")
		rig.Respond(w, 0, nil, rig.Failure(http.StatusTooManyRequests, "TooManyRequests",
			"the server has received too many requests"))
		return true
	})
	var wg sync.WaitGroup
	var refused atomic.Int32
	for i := range patches {
		wg.Go(func() {
			var steps patch
			steps.add("yes", "metadata", "labels", annotationPrefix+"changed")
			if err := k.patchPod(t.Context(), n, fmt.Sprintf("p%d", i), steps.json()); errors.Is(err, errTryAgain) {
				refused.Add(1)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() > callsInFlight || refused.Load() != 1 || proxy.Made.Load() != 1 {
		t.Errorf("%d in flight, %d refused, %d connections", most.Load(), refused.Load(), proxy.Made.Load())
	}
	if rest < 2*time.Second {
		t.Errorf("the longest pause was %s, and the API server asked for 3 s", rest)
	}
}

// After a rest, calls pass in a burst, then one for each gap.
func TestPacer(t *testing.T) {
	t.Parallel()
	const gap, burst = 10 * time.Millisecond, 5
	p := newPacer(int(time.Second/gap), burst)
	var passed []time.Time
	pass := func() time.Time {
		rig.Must(t, p.wait(t.Context()))
		passed = append(passed, time.Now())
		return passed[len(passed)-1]
	}
	start := time.Now()
	for range 30 {
		pass()
	}
	for i, at := range passed {
		if least := time.Duration(i-burst) * gap; at.Sub(start) < least {
			t.Errorf("call %d after %s, want %s at least", i, at.Sub(start), least)
		}
	}
	held := time.Now()
	p.delay(300 * time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: got %v", err)
	}
	if at := pass(); at.Sub(held) < 300*time.Millisecond {
		t.Errorf("after a hold of 300ms, the pacer passed a call after %s", at.Sub(held))
	}
	if at := pass(); at.Sub(held) < 300*time.Millisecond+gap {
		t.Errorf("after a hold, the pacer passed a burst, %s after its start", at.Sub(held))
	}
}

// Several processes send one event once. Events do not delay more important requests.
func TestKubernetesEvents(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	s.CreatePod(t, n, rig.GatedPod("p"))
	k, log := newClient(t, clientSettings(s))
	other, otherLog := newClient(t, clientSettings(s))
	var p watchedPod
	{
		created := new(corev1.Pod)
		s.Direct(t, http.MethodGet, podPath(n, "p"), nil, created)
		p = watchedPod{namespace: n, name: "p", uid: string(created.UID), version: created.ResourceVersion}
	}
	events := func() []eventsv1.Event {
		var list eventsv1.EventList
		s.Direct(t, http.MethodGet, "/apis/events.k8s.io/v1/namespaces/"+n+"/events", nil, &list)
		return list.Items
	}
	s.FailEvents(1)
	line := objectEvent{about: p.reference(), reporter: "gate", reason: "WaitingForToken", action: "Waiting",
		note: "waiting for a token of shop/web: 3 of 3 in use, 2nd in line", id: "1"}
	k.createEvent(line)
	other.createEvent(line)
	again := line
	again.id, again.warning, again.note = "2", true, strings.Repeat("x", 3000)
	k.createEvent(again)
	rig.Eventually(t, 20*time.Second, func() error {
		if got := s.Count(func(r string) bool { return strings.HasPrefix(r, "POST ") }); got != 4 {
			return fmt.Errorf("%d events sent, want 4, one of them retried", got)
		}
		if got := len(events()); got != 2 {
			return fmt.Errorf("the server has %d events, want 2", got)
		}
		return nil
	})
	inBoth := append(log.Lines(t, "events left out"), otherLog.Lines(t, "events left out")...)
	if len(inBoth) > 0 {
		t.Errorf("an event that another process sent first was logged as a failure: %v", inBoth)
	}
	list := events()
	slices.SortFunc(list, func(a, b eventsv1.Event) int { return strings.Compare(b.Note, a.Note) })
	if e := list[1]; e.Reason != "WaitingForToken" || e.Note != line.note || e.Type != "Normal" ||
		e.Regarding.Kind != "Pod" || e.Regarding.Name != "p" ||
		string(e.Regarding.UID) != p.uid || e.ReportingController != annotationPrefix+"gate" ||
		time.Since(e.EventTime.Time) > time.Minute {
		t.Errorf("got %+v", e)
	}
	if e := list[0]; e.Type != "Warning" || len(e.Note) != eventNoteMost {
		t.Errorf("got %+v", e)
	}

	// A name that is too long for an event is cut, also after a dot.
	long := line
	long.about = (&watchedPod{namespace: n, name: strings.Repeat("a", 199) + ".b." + strings.Repeat("c", 40)}).reference()
	k.createEvent(long)
	rig.Eventually(t, 20*time.Second, func() error {
		if got := len(events()); got != 3 {
			return fmt.Errorf("the server has %d events, want 3: %s", got, log)
		}
		return nil
	})

	// A thousand events are sent over time, and do not delay other requests. Events
	// beyond the limit are left out.
	sent := s.Count(func(r string) bool { return strings.HasPrefix(r, "POST ") })
	start := time.Now()
	for i := range eventsWaiting + 2*eventsPerSecond {
		e := line
		e.id = fmt.Sprint("more ", i)
		k.createEvent(e)
	}
	rig.WantWithin(t, time.Since(start), time.Second, "queueing events")
	if len(log.Lines(t, "events left out")) == 0 {
		t.Error("no event was left out")
	}
	const more = 2 * eventsPerSecond
	rig.Eventually(t, 20*time.Second, func() error {
		if got := s.Count(func(r string) bool { return strings.HasPrefix(r, "POST ") }) - sent; got < more {
			return fmt.Errorf("%d events sent, want %d", got, more)
		}
		return nil
	})
	if took := time.Since(start); took < time.Second/2 {
		t.Errorf("%d events were sent in %s", more, took)
	}
}

// The client creates a Secret once, and changes only the version that it has read.
func TestKubernetesSecrets(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	k, _ := newClient(t, clientSettings(s))
	if _, err := k.getSecret(t.Context(), n, "s"); !errors.Is(err, errNotFound) {
		t.Errorf("before it is there: got %v", err)
	}
	fresh := func() *corev1.Secret {
		return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: n, Name: "s", Labels: map[string]string{"a": "b"}},
			Type: corev1.SecretTypeOpaque, Data: map[string][]byte{"password": []byte("one"), "ca.crt": {0, 1}}}
	}
	made, err := k.putSecret(t.Context(), fresh())
	rig.Must(t, err)
	if _, err := k.putSecret(t.Context(), fresh()); !errors.Is(err, errChanged) {
		t.Errorf("created twice: got %v", err)
	}
	read, err := k.getSecret(t.Context(), n, "s")
	rig.Must(t, err)
	if string(read.Data["password"]) != "one" || !slices.Equal(read.Data["ca.crt"], []byte{0, 1}) || read.Labels["a"] != "b" ||
		read.ResourceVersion != made.ResourceVersion || read.UID == "" {
		t.Errorf("read %+v after %+v", read, made)
	}
	read.Data = map[string][]byte{"password": []byte("two")}
	now, err := k.putSecret(t.Context(), read)
	rig.Must(t, err)
	if now.ResourceVersion == made.ResourceVersion || now.UID != made.UID || len(now.Data) != 1 {
		t.Errorf("updated: got %+v", now)
	}
	if _, err := k.putSecret(t.Context(), made); !errors.Is(err, errChanged) {
		t.Errorf("update of an old version: got %v", err)
	}
	if err := k.deleteSecret(t.Context(), made); !errors.Is(err, errChanged) {
		t.Errorf("deletion of an old version: got %v", err)
	}
	rig.Must(t, k.deleteSecret(t.Context(), now))
	if err := k.deleteSecret(t.Context(), now); !errors.Is(err, errNotFound) {
		t.Errorf("deleted twice: got %v", err)
	}
	if _, err := k.putSecret(t.Context(), now); !errors.Is(err, errNotFound) {
		t.Errorf("update after the deletion: got %v", err)
	}
	gone := fresh()
	gone.Namespace += "-none"
	if _, err := k.putSecret(t.Context(), gone); !errors.Is(err, errNotFound) {
		t.Errorf("without its namespace: got %v", err)
	}
}

// Mirrors hold exactly the objects that they select, in all namespaces, and cost no
// request while nothing changes.
func TestKubernetesMirrors(t *testing.T) {
	t.Parallel()
	s := rig.StartAPIServer(t)
	k, _ := newClient(t, clientSettings(s))
	changed := newWakeup()
	named, labelled := k.secretsNamed("ours", changed.wake), k.namespacesWith("open=true", changed.wake)
	own := k.secretsOf("ns-1", changed.wake)
	put := func(namespace, name string) *corev1.Secret {
		t.Helper()
		made, err := k.putSecret(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}})
		rig.Must(t, err)
		return made
	}
	for i := range 5 {
		_, status := s.Store.Namespaces.Create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("ns-", i),
			Labels: map[string]string{"open": fmt.Sprint(i < 2)}}})
		if status != nil {
			t.Fatal(status.Message)
		}
	}
	put("ns-1", "ours")
	put("ns-1", "another")
	inBackground(t, named.run)
	inBackground(t, labelled.run)
	inBackground(t, own.run)
	want := func(secrets, ownSecrets, namespaces string) {
		t.Helper()
		var got [3][]string
		rig.Eventually(t, 20*time.Second, func() error {
			got = [3][]string{}
			for _, o := range named.all() {
				got[0] = append(got[0], o.Namespace+"/"+o.Name)
			}
			for _, o := range own.all() {
				got[1] = append(got[1], o.Name)
			}
			for _, o := range labelled.all() {
				got[2] = append(got[2], o.Name)
			}
			for i, want := range []string{secrets, ownSecrets, namespaces} {
				slices.Sort(got[i])
				if text := strings.Join(got[i], " "); text != want {
					return fmt.Errorf("mirror %d holds %q, want %q", i, text, want)
				}
			}
			return nil
		})
	}
	want("ns-1/ours", "another ours", "ns-0 ns-1")
	select {
	case <-changed:
	default:
		t.Error("no change was told")
	}
	made := put("ns-3", "ours")
	put("ns-3", "another")
	s.Store.Namespaces.Change("", "ns-0", func(n *corev1.Namespace) { delete(n.Labels, "open") })
	s.Store.Namespaces.Change("", "ns-3", func(n *corev1.Namespace) { n.Labels["open"] = "true" })
	want("ns-1/ours ns-3/ours", "another ours", "ns-1 ns-3")
	rig.Must(t, k.deleteSecret(t.Context(), made))
	again := put("ns-3", "ours")
	rig.Eventually(t, 20*time.Second, func() error {
		if got := named.get("ns-3", "ours"); got == nil || got.UID != again.UID {
			return fmt.Errorf("the mirror has %+v, want the new %s", got, again.UID)
		}
		return nil
	})
	if got := named.get("ns-3", "another"); got != nil {
		t.Errorf("the mirror of one name has %s", got.Name)
	}
	if n := s.Count(isList); n != 3 {
		t.Errorf("%d lists, want one for each mirror", n)
	}
}

// A patch of the webhook's configuration tests what it relies on.
func TestKubernetesWebhookConfiguration(t *testing.T) {
	t.Parallel()
	s := rig.StartAPIServer(t)
	k, _ := newClient(t, clientSettings(s))
	if _, err := k.getWebhookConfiguration(t.Context(), "hook"); !errors.Is(err, errNotFound) {
		t.Errorf("before it is there: got %v", err)
	}
	_, status := s.Store.Webhooks.Create(&admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "hook"},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{Name: "a.example.org",
			ClientConfig: admissionregistrationv1.WebhookClientConfig{
				Service: &admissionregistrationv1.ServiceReference{Namespace: "n", Name: "webhook"}}}}})
	if status != nil {
		t.Fatal(status.Message)
	}
	c, err := k.getWebhookConfiguration(t.Context(), "hook")
	rig.Must(t, err)
	var steps patch
	steps.test(c.Metadata.ResourceVersion, "metadata", "resourceVersion")
	steps.test("a.example.org", "webhooks", "0", "name")
	steps.add([]byte("bundle"), "webhooks", "0", "clientConfig", "caBundle")
	steps.add("/mutate/x", "webhooks", "0", "clientConfig", "service", "path")
	rig.Must(t, k.patchWebhookConfiguration(t.Context(), "hook", steps.json()))
	if err := k.patchWebhookConfiguration(t.Context(), "hook", steps.json()); !errors.Is(err, errChanged) {
		t.Errorf("a second patch of the same version: got %v", err)
	}
	c, err = k.getWebhookConfiguration(t.Context(), "hook")
	rig.Must(t, err)
	if w := c.Webhooks[0].ClientConfig; string(w.CABundle) != "bundle" || w.Service.Path != "/mutate/x" || w.Service.Name != "webhook" {
		t.Errorf("got %+v", w)
	}
}
