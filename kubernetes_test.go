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
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
)

// liftGate is the patch that removes our gate of a testGatedPod.
func liftGate(uid string) (steps patch) {
	steps.test(jsonText(uid), "metadata", "uid")
	steps.test(jsonText(rig.GateName), "spec", "schedulingGates", "1", "name")
	steps.remove("spec", "schedulingGates", "1")
	return steps
}

// A patch is done once, and only to the pod that was meant.
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
	if err := k.patchPod(t.Context(), n, "p", liftGate("00000000-0000-0000-0000-000000000000").json()); !errors.Is(err, errPodChanged) {
		t.Errorf("another pod's UID: %v", err)
	}
	wantGates("example.org/other", rig.GateName)
	rig.Must(t, k.patchPod(t.Context(), n, "p", liftGate(uid).json()))
	wantGates("example.org/other")
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errPodChanged) {
		t.Errorf("a second time: %v", err)
	}
	wantGates("example.org/other")
	var old patch
	old.test(jsonText("1"), "metadata", "resourceVersion")
	old.add(jsonText("false"), "metadata", "labels", rig.LabelGated)
	if err := k.patchPod(t.Context(), n, "p", old.json()); !errors.Is(err, errPodChanged) {
		t.Errorf("another version: %v", err)
	}
	s.DeletePod(t, n, "p")
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errNoPod) {
		t.Errorf("no pod: %v", err)
	}
	if err := k.patchPod(t.Context(), n+"-none", "p", liftGate(uid).json()); !errors.Is(err, errNoPod) {
		t.Errorf("no namespace: %v", err)
	}
}

// What the API server cannot do now is worth another try; what stands in front of it says nothing of pods.
func TestKubernetesRefusals(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	uid := string(s.CreatePod(t, n, rig.GatedPod("p")).UID)
	k, _ := newClient(t, clientSettings(s))
	sentinels := []error{errNoPod, errPodChanged, errTryAgain, errExpired}
	for _, c := range []struct {
		code  int32
		want  error // nil for none of them
		fault rig.APIFault
	}{
		{code: http.StatusUnauthorized, want: errTryAgain},
		{code: http.StatusTooManyRequests, want: errTryAgain},
		{code: http.StatusInternalServerError, want: errTryAgain},
		{code: http.StatusServiceUnavailable, want: errTryAgain},
		{code: http.StatusGatewayTimeout, want: errTryAgain},
		{code: http.StatusConflict, want: errPodChanged},
		{code: http.StatusForbidden},
		{code: http.StatusBadRequest},
		{code: http.StatusNotFound, fault: func(w http.ResponseWriter, r *http.Request) bool { http.NotFound(w, r); return true }},
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
				t.Errorf("%d: %v is %q: %v", c.code, err, sentinel, errors.Is(err, sentinel))
			}
		}
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("API server %s: %d", s.Address, c.code)) {
			t.Errorf("%d: %v", c.code, err)
		}
	}
	if s.Count(func(r string) bool { return strings.Contains(r, "elsewhere") }) > 0 {
		t.Error("the token was sent to where the answer redirects to")
	}

	s.Fail(nil)
	s.Stop()
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errTryAgain) {
		t.Errorf("no server: %v", err)
	}
	s.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.patchPod(ctx, n, "p", liftGate(uid).json()); !errors.Is(err, context.Canceled) || errors.Is(err, errTryAgain) {
		t.Errorf("a context that is done: %v", err)
	}
	rig.Must(t, k.patchPod(t.Context(), n, "p", liftGate(uid).json()))
}

// A patch whose answer is lost may be sent again.
func TestKubernetesLostAnswer(t *testing.T) {
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
		t.Errorf("the first time: %v", err)
	}
	s.Fail(nil)
	if err := k.patchPod(t.Context(), n, "p", liftGate(uid).json()); !errors.Is(err, errPodChanged) {
		t.Errorf("the second time: %v", err)
	}
	p, err := k.getPod(t.Context(), n, "p", uid)
	rig.Must(t, err)
	if slices.Contains(p.gates, rig.GateName) {
		t.Errorf("gates %q", p.gates)
	}
}

// Many changes at once come a few at a time, over one connection; and wait if the API server says so.
func TestKubernetesIsGentle(t *testing.T) {
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
	rig.Must(t, k.patchPod(t.Context(), n, "p0", patch{}.json())) // those that dial at once close what they do not need
	var inFlight, most, done atomic.Int32
	var mu sync.Mutex
	var last time.Time
	var rest time.Duration // the longest without a request
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
		time.Sleep(150 * time.Millisecond) // so that they are in flight at once, and fewer than may be sent
		if done.Add(1) != 100 {
			return false
		}
		w.Header().Set("Retry-After", "3")
		rig.Respond(w, 0, nil, rig.Failure(http.StatusTooManyRequests, "TooManyRequests", "the server has received too many requests"))
		return true
	})
	var wg sync.WaitGroup
	var refused atomic.Int32
	for i := range patches {
		wg.Go(func() {
			var steps patch
			steps.add(jsonText("yes"), "metadata", "labels", annotationPrefix+"changed")
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
		t.Errorf("they rested for %s at most, though the API server asked for 3 s", rest)
	}
}

// Calls pass in a burst after a rest, and then one each gap.
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
	p.hold(300 * time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that is done: %v", err)
	}
	if at := pass(); at.Sub(held) < 300*time.Millisecond {
		t.Errorf("passed after %s", at.Sub(held))
	}
	if at := pass(); at.Sub(held) < 300*time.Millisecond+gap {
		t.Errorf("a burst after %s: to be held is no rest", at.Sub(held))
	}
}

// Events come once, from whichever process, and leave room for what matters.
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
	line := podEvent{pod: &p, reason: "WaitingForToken", action: "Waiting", note: "waiting for a token of shop/web: 3 of 3 in use, 2nd in line", id: "1"}
	k.createEvent(line)
	other.createEvent(line)
	again := line
	again.id, again.warning, again.note = "2", true, strings.Repeat("x", 3000)
	k.createEvent(again)
	rig.Eventually(t, 20*time.Second, func() error {
		if got := s.Count(func(r string) bool { return strings.HasPrefix(r, "POST ") }); got != 4 {
			return fmt.Errorf("%d events sent, want four: one was refused at first", got)
		}
		if got := len(events()); got != 2 {
			return fmt.Errorf("%d events, want 2", got)
		}
		return nil
	})
	if inBoth := append(log.Lines(t, "events of pods left out"), otherLog.Lines(t, "events of pods left out")...); len(inBoth) > 0 {
		t.Errorf("that another process was first is no failure: %v", inBoth)
	}
	list := events()
	slices.SortFunc(list, func(a, b eventsv1.Event) int { return strings.Compare(b.Note, a.Note) })
	if e := list[1]; e.Reason != "WaitingForToken" || e.Note != line.note || e.Type != "Normal" || e.Regarding.Kind != "Pod" || e.Regarding.Name != "p" ||
		string(e.Regarding.UID) != p.uid || e.ReportingController != eventReporter || time.Since(e.EventTime.Time) > time.Minute {
		t.Errorf("got %+v", e)
	}
	if e := list[0]; e.Type != "Warning" || len(e.Note) != eventNoteMost {
		t.Errorf("got %+v", e)
	}

	// A thousand at once are sent over time, and keep nothing else back; those that are too many are left out.
	sent := s.Count(func(r string) bool { return strings.HasPrefix(r, "POST ") })
	start := time.Now()
	for i := range eventsWaiting + 2*eventsPerSecond {
		e := line
		e.id = fmt.Sprint("more ", i)
		k.createEvent(e)
	}
	rig.WantWithin(t, time.Since(start), time.Second, "queueing events")
	if len(log.Lines(t, "events of pods left out")) == 0 {
		t.Error("nothing was left out")
	}
	const more = 2 * eventsPerSecond
	rig.Eventually(t, 20*time.Second, func() error {
		if got := s.Count(func(r string) bool { return strings.HasPrefix(r, "POST ") }) - sent; got < more {
			return fmt.Errorf("%d events sent, want %d", got, more)
		}
		return nil
	})
	if took := time.Since(start); took < time.Second/2 {
		t.Errorf("%d events in %s", more, took)
	}
}
