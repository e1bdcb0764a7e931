package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
)

// The gate lifts scheduling gates in the order of creation, and only of pods with a
// token. It leaves the tokens of running pods to their sidecars.
func TestGate(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 2)
	gate, _, _ := g.start()
	tokens := g.createAll("a", "b", "c", "d")
	g.wantLifted([]string{"a", "b"})
	g.redis.WantLine(t, g.id, tokens[2:]...)
	g.wantHolders(tokens[:2]...)
	g.wantLifted(nil, "c", "d")
	at, err := strconv.ParseInt(g.pod("a").Labels[labelGated], 10, 64)
	if err != nil || time.Since(time.Unix(at, 0)) > time.Minute {
		t.Errorf("the label has the time %d, %v", at, err)
	}
	if p := g.pod("a"); p.Labels["app"] != "test" {
		t.Errorf("the labels of pod a are %v, want app=test among them", p.Labels)
	}

	g.run("a")
	giveBack(t, g.owner, g.id, tokens[0]) // as the sidecar does
	start := time.Now()
	g.wantLifted([]string{"c"}, "d")
	rig.WantWithin(t, time.Since(start), 2*time.Second, "lifting the next gate")
	g.wantHolders(tokens[1], tokens[2])

	// A pod with a token is deleted, then a waiting one.
	e := g.create("e")
	g.redis.WantLine(t, g.id, tokens[3], e)
	g.api.DeletePod(t, g.id.namespace, "b")
	g.wantLifted([]string{"d"}, "e")
	g.api.DeletePod(t, g.id.namespace, "e")
	g.redis.WantLine(t, g.id)
	g.wantHolders(tokens[2], tokens[3])

	// A pod fails before it starts, for example by eviction.
	_, status := g.api.Store.Change(g.id.namespace, "c", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })
	if status != nil {
		t.Fatal(status.Message)
	}
	g.wantHolders(tokens[3])
	g.api.DeletePod(t, g.id.namespace, "d")
	g.redis.WantCounts(t, g.id, 2, 0)
	rig.Eventually(t, 10*time.Second, func() error {
		gate.mu.Lock()
		defer gate.mu.Unlock()
		if len(gate.lines) > 0 {
			return fmt.Errorf("%d lines are left", len(gate.lines))
		}
		return nil
	})
	var reasons []string
	rig.Eventually(t, 10*time.Second, func() error {
		reasons = nil
		for _, e := range g.api.Store.EventsOf(g.id.namespace) {
			reasons = append(reasons, e.Reason+" "+e.Regarding.Name)
		}
		slices.Sort(reasons)
		taken := slices.DeleteFunc(slices.Clone(reasons), func(r string) bool {
			return strings.HasPrefix(r, reasonWaiting)
		})
		want := []string{"TokenTaken a", "TokenTaken b", "TokenTaken c", "TokenTaken d"}
		if !slices.Equal(taken, want) {
			return fmt.Errorf("events %q", reasons)
		}
		return nil
	})
	families, err := gate.semaphores.metrics.registry.Gather()
	rig.Must(t, err)
	for _, f := range families {
		if n := f.GetMetric()[0].GetHistogram().GetSampleCount(); strings.Contains(f.GetName(), "gate_lift_") && n != 4 {
			t.Errorf("%s has %d lifts, want 4", f.GetName(), n)
		}
	}
	if !slices.Contains(reasons, "WaitingForToken d") {
		t.Errorf("events %q, want WaitingForToken d among them", reasons)
	}
}

// Two gates together do the work of one, and one alone does it all. Places and tokens
// outlive each gate, and both.
func TestTwoGates(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	_, _, stopFirst := g.start()
	_, _, stopSecond := g.start()
	tokens := g.createAll("a", "b", "c", "d")
	g.wantLifted([]string{"a"}, "b")
	stopFirst()
	g.run("a")
	giveBack(t, g.owner, g.id, tokens[0])
	g.wantLifted([]string{"b"}, "c")
	g.wantHolders(tokens[1])
	stopSecond()

	// Without a gate, the token of pod b stays, and b starts. Redis loses the line.
	g.wantHolders(tokens[1])
	g.redis.Do(t, "DEL", g.id.waitersKey(), g.id.seenKey())
	g.start()
	g.redis.WantLine(t, g.id, tokens[2], tokens[3])
	g.run("b")
	giveBack(t, g.owner, g.id, tokens[1])
	g.wantLifted([]string{"c"}, "d")
}

// The gate restores the line by time of creation, then by name, after any loss.
func TestGateOrder(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	holder := acquire(t, g.owner, g.id, 1)
	g.redis.Do(t, "HSET", g.id.stateKey(), "created", int(g.redis.Now(t))-1000)
	names := []string{"n7", "n3", "n9", "n1", "n5"}
	var want []string
	tokens := map[string]string{}
	for _, name := range names {
		tokens[name] = g.create(name)
	}
	sameSecond := map[int64][]string{}
	var order []int64
	for _, name := range names {
		at := g.pod(name).CreationTimestamp.Unix()
		if sameSecond[at] == nil {
			order = append(order, at)
		}
		sameSecond[at] = append(sameSecond[at], name)
	}
	for _, at := range order {
		slices.Sort(sameSecond[at])
		for _, name := range sameSecond[at] {
			want = append(want, tokens[name])
		}
	}
	_, _, stop := g.start()
	g.redis.WantLine(t, g.id, want...)

	// A pod whose sidecar waits joins later.
	waiter, _ := standInLine(t, g.redis, g.owner, g.id, false)
	g.redis.WantLine(t, g.id, append(slices.Clone(want), waiter)...)

	// Redis loses all data. The holder comes back, and no pod is admitted meanwhile.
	g.redis.Do(t, "FLUSHALL")
	g.redis.WantLine(t, g.id, want...)
	if n, err := redis.Int(g.redis.Control.Do("HGET", g.id.stateKey(), "lost")); err != nil || n == 0 {
		t.Errorf("Redis has no note of the loss: %d, %v", n, err)
	}
	for _, name := range names {
		if g.lifted(name) {
			t.Errorf("the gate of %s was lifted", name)
		}
	}
	if _, err := g.owner.heartbeat(t.Context(), g.id, holder, "", "", 0, 1); err != nil {
		t.Error(err)
	}
	stop()
	g.redis.Do(t, "DEL", g.id.waitersKey(), g.id.seenKey())
	g.start()
	g.redis.WantLine(t, g.id, want...)
}

// Free tokens go to the pods in line, in their order, while the lock servers are down.
func TestGateServesWithoutLocks(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 3)
	maintain(t, g.owner, g.id, 3)
	dead := acquire(t, g.owner, g.id, 3)
	g.redis.MakeStale(t, g.id, dead)
	g.start(func(c *gateConfig) { c.redisAddresses = []string{rig.FreeAddress(t)} })
	tokens := g.createAll("a", "b")
	g.wantLifted([]string{"a", "b"})
	g.wantHolders(append(tokens, dead)...)
	g.redis.WantLine(t, g.id, g.create("c"))
}

// While the API server is away for a while, the token is kept. While Redis is down,
// gates stay.
func TestGateThroughOutages(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	g.start()
	g.api.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch {
			return false
		}
		rig.Respond(w, 0, nil, rig.Failure(http.StatusServiceUnavailable, "ServiceUnavailable", "on purpose"))
		return true
	})
	token := g.create("a")
	g.wantHolders(token)
	g.api.Fail(nil)
	g.wantLifted([]string{"a"})
	g.api.Stop()
	g.api.Start(t)
	g.redis.Stop()
	b := g.create("b")
	rig.Must(t, g.redis.Start())
	g.redis.WantLine(t, g.id, b)
	g.api.DeletePod(t, g.id.namespace, "a")
	g.wantLifted([]string{"b"})
	g.wantHolders(b)
}

// hangUntil makes requests wait until their client gives up, or until the API server is
// well again. It breaks their connection then.
func hangUntil(well <-chan struct{}) rig.APIFault {
	return func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-r.Context().Done():
		case <-well:
		}
		panic(http.ErrAbortHandler)
	}
}

// readyz returns the answer of a gate to its readiness probe.
func readyz(g *gate) (code int, text string) {
	w := httptest.NewRecorder()
	g.healthRoutes().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
	return w.Code, w.Body.String()
}

// age returns the seconds since the time that Redis notes for a token in a key.
func (g *gateTest) age(key, token string) (int, error) {
	at, err := redis.Float64(g.redis.Control.Do("ZSCORE", key, token))
	return int(float64(g.redis.Now(g.T)) - at), err
}

// A gate that hears nothing from the API server keeps no place and no token, is not ready,
// and does not say that it is at work. It goes on when it has listed the pods again.
func TestGateCutOff(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(*rig.APIServer, <-chan struct{}){
		"refused": func(s *rig.APIServer, _ <-chan struct{}) {
			s.Fail(func(w http.ResponseWriter, _ *http.Request) bool {
				http.Error(w, "a proxy without a server", http.StatusBadGateway)
				return true
			})
			s.DropWatches()
		},
		"silent": func(s *rig.APIServer, well <-chan struct{}) { s.Fail(hangUntil(well)); s.SilenceWatches() },
		"only watches": func(s *rig.APIServer, well <-chan struct{}) {
			s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
				return !strings.Contains(r.URL.Path, "/pods/") && hangUntil(well)(w, r)
			})
			s.SilenceWatches()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGateTest(t, 1)
			g.silence = 3 * time.Second
			gate, log, _ := g.start(func(c *gateConfig) { c.heartbeatInterval, c.staleThreshold = time.Second, time.Minute })
			a := g.create("a")
			g.wantLifted([]string{"a"})
			b := g.create("b")
			g.redis.WantLine(t, g.id, b)
			if code, text := readyz(gate); code != http.StatusOK {
				t.Fatalf("the gate is not ready: %d %s", code, text)
			}
			well := make(chan struct{})
			cut(g.api, well)
			rig.Eventually(t, 30*time.Second, func() error {
				if code, text := readyz(gate); code == http.StatusOK {
					return fmt.Errorf("the gate is ready: %s", text)
				}
				return nil
			})
			said := time.Now()
			rig.Eventually(t, time.Minute, func() error {
				pulses, err := redis.Int(g.redis.Control.Do("DEL", pulseKey))
				if pulses > 0 {
					said = time.Now()
				}
				token, failed := g.age(g.id.inflightKey(), a)
				place, wrong := g.age(g.id.seenKey(), b)
				if err := errors.Join(err, failed, wrong); err != nil {
					return err
				}
				if ago := time.Since(said); token < 9 || place < 9 || ago < pulseEvery+2*time.Second {
					return fmt.Errorf("the gate has kept the token %d s and the place %d s ago, and said %s ago that it is at work",
						token, place, ago)
				}
				return nil
			})
			g.api.DeletePod(t, g.id.namespace, "b")
			c := g.create("c")
			g.api.Fail(nil)
			close(well)
			g.redis.WantLine(t, g.id, c)
			g.wantHolders(a)
			rig.Eventually(t, 30*time.Second, func() error {
				code, text := readyz(gate)
				if age, err := g.age(g.id.inflightKey(), a); err != nil || age > 4 || code != http.StatusOK {
					return fmt.Errorf("the token is %d s old, %v; readiness: %d %s", age, err, code, text)
				}
				return nil
			})
			if n := len(log.Lines(t, "pods listed")); n < 2 {
				t.Errorf("the gate has listed the pods %d times, want 2 at least", n)
			}
		})
	}
}

// One namespace that the gate cannot list or hear stops no other.
func TestGateOneBadNamespace(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	g.silence = 3 * time.Second
	bad := *g
	bad.id.namespace = g.api.NewNamespace(t)
	refuse := func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, bad.id.namespace) {
			return false
		}
		rig.Respond(w, 0, nil, rig.Failure(http.StatusForbidden, "Forbidden", "pods is forbidden on purpose"))
		return true
	}
	g.api.Fail(refuse)
	bad.create("x")
	g.create("a")
	gate, log, _ := g.start(func(c *gateConfig) {
		c.kubernetes.namespaces = []string{g.id.namespace, bad.id.namespace}
	})
	wantState := func(heard bool) {
		t.Helper()
		rig.Eventually(t, 30*time.Second, func() error {
			code, text := readyz(gate)
			w := httptest.NewRecorder()
			gate.healthRoutes().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
			fresh := regexp.MustCompile(`gate_heard_seconds_ago\{namespace="` + bad.id.namespace + `"\} (\S+)`)
			age := -1.0
			if m := fresh.FindStringSubmatch(w.Body.String()); m != nil {
				age, _ = strconv.ParseFloat(m[1], 64)
			}
			if code != http.StatusOK || strings.Contains(text, bad.id.namespace+": ") == heard ||
				!heard && !strings.Contains(text, "forbidden on purpose") || age < 0 || heard != (age < 4.5) {
				return fmt.Errorf("readiness: %d %s; heard %v s ago", code, text, age)
			}
			return nil
		})
	}
	g.wantLifted([]string{"a"})
	bad.wantLifted(nil, "x")
	wantState(false)
	lines := slices.DeleteFunc(log.Lines(t, "watch of pods ended, tries again"), func(line map[string]any) bool {
		return !strings.Contains(fmt.Sprint(line["error"]), "forbidden on purpose")
	})
	if len(lines) != 1 || lines[0]["namespace"] != bad.id.namespace {
		t.Errorf("got the warnings %v, want one, of %s", lines, bad.id.namespace)
	}
	g.api.Fail(nil)
	bad.wantLifted([]string{"x"})
	wantState(true)

	// The namespace is lost while the gate works.
	g.api.Fail(refuse)
	g.api.DropWatches()
	wantState(false)
	bad.create("y")
	g.run("a")
	giveBack(t, g.owner, g.id, string(g.pod("a").UID))
	g.create("b")
	g.wantLifted([]string{"b"})
	bad.wantLifted(nil, "y")
}

// The key is that of the pod's sidecar, which is immutable, whatever the annotations
// say now.
func TestGateReadsSidecar(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	acquire(t, g.owner, g.id, 1)
	other := *g
	other.id.key = "other"
	g.start()
	token := g.create("a")
	g.redis.WantLine(t, g.id, token)
	g.change("a", func(p *corev1.Pod) {
		delete(p.Labels, labelGated)
		p.Annotations[annotationKey], p.Annotations[annotationLength] = "other", "7"
	})
	g.redis.WantLine(t, g.id)
	g.change("a", func(p *corev1.Pod) { p.Labels[labelGated] = "true" })
	g.redis.WantLine(t, g.id, token)
	g.wantLifted(nil, "a")
	other.wantHolders()
}

// A gated pod with a sidecar that waits for another token, or for none, stays gated, and
// gets an event. Later changes of the pod are not worth a line in the log.
func TestGateWrongSidecar(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	gate, log, _ := g.start()
	changes := map[string]func(*corev1.Pod){
		"none":      func(p *corev1.Pod) { p.Spec.InitContainers = p.Spec.InitContainers[1:] },
		"arguments": func(p *corev1.Pod) { p.Spec.InitContainers[0].Args = nil },
		"mode":      func(p *corev1.Pod) { p.Spec.InitContainers[0].Args[0] = "webhook" },
		"length":    func(p *corev1.Pod) { p.Spec.InitContainers[0].Args[2] = "--length=0" },
		"no-length": func(p *corev1.Pod) { p.Spec.InitContainers[0].Args[2] = "--lock-mode=redlock" },
		"namespace": func(p *corev1.Pod) { p.Spec.InitContainers[0].Args[4] = "elsewhere/web" },
		"key":       func(p *corev1.Pod) { p.Spec.InitContainers[0].Args[4] = g.id.namespace + "/-" },
		"token":     func(p *corev1.Pod) { p.Spec.InitContainers[0].Args[5] = "1d3e5f70-0000-4000-8000-000000000000" },
	}
	for name, change := range changes {
		p := rig.AdmittedPod(name, rig.ID{Namespace: g.id.namespace, Key: "web"}, 1, 10)
		change(p)
		g.createAs(p)
		rig.Eventually(t, 20*time.Second, func() error {
			for _, e := range g.api.Store.EventsOf(g.id.namespace) {
				if e.Reason == reasonInvalid && e.Regarding.Name == name {
					t.Log(e.Note)
					return nil
				}
			}
			return fmt.Errorf("pod %s has no event %s", name, reasonInvalid)
		})
		g.wantLifted(nil, name)
		g.change(name, func(p *corev1.Pod) { p.Labels["changed"] = "yes" })
	}
	gate.mu.Lock()
	if len(gate.lines) > 0 {
		t.Errorf("the gate has %d lines", len(gate.lines))
	}
	gate.mu.Unlock()
	g.create("last")
	g.wantLifted([]string{"last"}) // so the gate has heard of the changes before it
	log.WantLines(t, "a gated pod has no sidecar that waits for a token of its own, and stays gated", len(changes))
	for name := range changes {
		g.api.DeletePod(t, g.id.namespace, name)
	}
	rig.Eventually(t, 10*time.Second, func() error {
		gate.mu.Lock()
		defer gate.mu.Unlock()
		if len(gate.strangers) > 0 {
			return fmt.Errorf("the gate remembers %d pods that are gone", len(gate.strangers))
		}
		return nil
	})
}

// A gate lifts the gates of pods that share a semaphore with other namespaces, in one
// line. It does nothing for a pod whose namespace is not listed until it is.
func TestGateOfSharedSemaphore(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	there, key := *g, freshID().key
	there.id.namespace = g.api.NewNamespace(t)
	file := filepath.Join(t.TempDir(), "semaphores")
	list := func(namespaces string) {
		t.Helper()
		rig.Must(t, os.WriteFile(file+".new", []byte("@"+key+" length=1 namespaces="+namespaces), 0o600))
		rig.Must(t, os.Rename(file+".new", file))
	}
	list(g.id.namespace)
	gate, _, _ := g.start(func(c *gateConfig) { c.semaphoresFile = file })
	create := func(g *gateTest, name string) (token string) {
		p := g.admitted(name)
		p.Spec.InitContainers[0].Args[4] = "@" + key
		return g.createAs(p)
	}
	first := create(g, "a")
	g.wantLifted([]string{"a"})
	second := create(g, "b")
	create(&there, "c")
	there.wantEvent("c", reasonInvalid, "is not for the namespace "+there.id.namespace)
	shares := semaphoreID{shared, key}
	wantInLine := func(n int) {
		t.Helper()
		rig.Eventually(t, 20*time.Second, func() error {
			d, err := gate.semaphores.inspect(t.Context(), shares, detailMost)
			if err != nil || len(d.holders) != 1 || d.holders[0].pod != g.id.namespace+"/a" || len(d.line) != n {
				return fmt.Errorf("holders %+v, line %+v, %v", d.holders, d.line, err)
			}
			return nil
		})
	}
	wantInLine(1)
	list(g.id.namespace + "," + there.id.namespace)
	wantInLine(2)
	list(g.id.namespace) // a pod in line keeps its place
	g.api.DeletePod(t, g.id.namespace, "a")
	giveBack(t, g.owner, shares, first)
	g.wantLifted([]string{"b"})
	there.wantLifted(nil, "c")
	g.api.DeletePod(t, g.id.namespace, "b")
	giveBack(t, g.owner, shares, second)
	there.wantLifted([]string{"c"})
}

// A gate of some namespaces starts when it has listed the pods of them all. It lifts no
// gates elsewhere.
func TestGateOfSomeNamespaces(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	elsewhere := *g
	elsewhere.id.namespace = g.api.NewNamespace(t)
	elsewhere.create("a")
	g.create("a")
	_, log, _ := g.start(func(c *gateConfig) {
		c.kubernetes.namespaces = []string{g.id.namespace}
		for range 20 {
			c.kubernetes.namespaces = append(c.kubernetes.namespaces, g.api.NewNamespace(t))
		}
	})
	g.wantLifted([]string{"a"})
	elsewhere.wantLifted(nil, "a")
	if n := len(log.Lines(t, "pods listed")); n != 21 {
		t.Errorf("listed %d namespaces, want 21", n)
	}
}

// The webhook gates a pod that asks for it, and removes a gate of ours from a pod that
// does not.
func TestGatedPatch(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // without Redis
	apply := func(when string, change func(pod map[string]any)) (rig.Admission, *corev1.Pod) {
		t.Helper()
		var before []byte
		a := w.admit(t, rig.Review(t, semaphoreID{"shop", "web"}, 3, whenFull(when), func(r map[string]any) {
			if change != nil {
				change(r["object"].(map[string]any))
			}
			before = mustJSON(t, r["object"])
		}))
		if !a.Allowed {
			t.Fatalf("refused: %s", a.Message)
		}
		steps, err := jsonpatch.DecodePatch(a.Patch)
		rig.Must(t, err)
		after, err := steps.Apply(before)
		rig.Must(t, err)
		p := new(corev1.Pod)
		rig.Must(t, json.Unmarshal(after, p))
		return a, p
	}
	gates := func(p *corev1.Pod) (names []string) {
		for _, g := range p.Spec.SchedulingGates {
			names = append(names, g.Name)
		}
		return names
	}
	spec := func(pod map[string]any) map[string]any { return pod["spec"].(map[string]any) }
	metadata := func(pod map[string]any) map[string]any { return pod["metadata"].(map[string]any) }
	copied := func(pod map[string]any) {
		spec(pod)["schedulingGates"] = []map[string]string{{"name": "example.org/other"}, {"name": gateName}}
		metadata(pod)["labels"] = map[string]string{"app": "web", labelGated: "1764150000"}
	}

	a, p := apply(whenFullGate, nil)
	_, waiting := apply(whenFullWait, nil)
	if !slices.Equal(gates(p), []string{gateName}) || p.Labels[labelGated] != "true" ||
		!slices.Equal(a.Warnings, []string{warningGated}) || a.Audit["verdict"] != verdictGate {
		t.Errorf("gates %q, labels %v, warnings %q, %v", gates(p), p.Labels, a.Warnings, a.Audit)
	}
	got, want := string(mustJSON(t, p.Spec.InitContainers)), string(mustJSON(t, waiting.Spec.InitContainers))
	if got != want {
		t.Errorf("the gated pod has the init containers %s, want those of a waiting pod, %s", got, want)
	}
	const uid = "1d3e5f70-0000-4000-8000-000000000000"
	wantToken := tokenConfig{semaphore: semaphoreID{"shop", "web"}, token: uid, length: 3, tokens: 1, expiration: 10 * time.Second}
	if got, err := gatedToken(p.Spec.InitContainers[0].Args, "shop", uid); err != nil || got != wantToken {
		t.Errorf("the gate reads %+v from the sidecar, %v; want %+v", got, err, wantToken)
	}
	if len(gates(waiting)) > 0 || waiting.Labels[labelGated] != "" {
		t.Errorf("a waiting pod has the gates %q and labels %v", gates(waiting), waiting.Labels)
	}
	noLabels := func(pod map[string]any) { delete(metadata(pod), "labels") }
	if _, p := apply(whenFullGate, noLabels); p.Labels[labelGated] != "true" {
		t.Errorf("a pod without labels got the labels %v", p.Labels)
	}
	if _, p := apply(whenFullGate, copied); !slices.Equal(gates(p), []string{"example.org/other", gateName}) ||
		p.Labels[labelGated] != "true" || p.Labels["app"] != "web" {
		t.Errorf("copied from a gated pod: gates %q, labels %v", gates(p), p.Labels)
	}
	if _, p := apply(whenFullWait, copied); !slices.Equal(gates(p), []string{"example.org/other"}) ||
		p.Labels[labelGated] != "" || p.Labels["app"] != "web" {
		t.Errorf("copied from a gated pod, to wait: gates %q, labels %v", gates(p), p.Labels)
	}
	a, p = apply(whenFullGate, func(pod map[string]any) { spec(pod)["nodeName"] = "node-1" })
	if len(gates(p)) > 0 || p.Labels[labelGated] != "" ||
		!slices.Equal(a.Warnings, []string{warningNotGated}) || a.Audit["verdict"] != verdictWait {
		t.Errorf("with a node name: gates %q, labels %v, warnings %q, %v", gates(p), p.Labels, a.Warnings, a.Audit)
	}
}

// The metric says whether a gate is at work. The admission of a gated pod does not ask.
func TestNoGateRuns(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	w := startWebhook(t, testConfig(g.redis.Address))
	want := func(value float64) {
		t.Helper()
		rig.Eventually(t, 10*time.Second, func() error { // not a number while Redis is slow
			if got := w.samples(t)[metricsPrefix+"gate_at_work"]; got != value {
				return fmt.Errorf("the metric is %v, want %v", got, value)
			}
			return nil
		})
	}
	want(0)
	g.start()
	want(1)
	rig.Eventually(t, 10*time.Second, func() error { // the gate sets the expiry just after the key
		ttl, err := redis.Int(g.redis.Control.Do("TTL", pulseKey))
		if err == nil && (ttl < 20 || ttl > seconds(pulseTime)) {
			err = fmt.Errorf("the pulse expires in %d s", ttl)
		}
		return err
	})
	before := g.redis.CommandCalls(t)["exists"]
	if got := w.admit(t, rig.Review(t, freshID(), 1, whenFull(whenFullGate))).Warnings; !slices.Equal(got,
		[]string{warningGated}) || g.redis.CommandCalls(t)["exists"] != before {
		t.Errorf("warnings %q, or the admission asked Redis", got)
	}
}

// While the lock servers are down and no repair is possible, the gate still keeps tokens.
func TestGateHoldsWithoutLocks(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 2)
	maintain(t, g.owner, g.id, 2)
	g.start(func(c *gateConfig) {
		c.heartbeatInterval, c.staleThreshold = time.Second, 8*time.Second
		c.redisAddresses = []string{rig.FreeAddress(t)}
	})
	token := g.create("a")
	g.wantLifted([]string{"a"})
	// this token is missing from now on
	g.redis.Do(t, "ZREM", g.id.inflightKey(), acquire(t, g.owner, g.id, 2))
	g.redis.WantLine(t, g.id, g.create("b"))
	score := func() int {
		t.Helper()
		n, err := redis.Int(g.redis.Control.Do("ZSCORE", g.id.inflightKey(), token))
		rig.Must(t, err)
		return n
	}
	before := score()
	rig.Eventually(t, 20*time.Second, func() error {
		if now := score(); now < before+4 {
			return fmt.Errorf("the last heartbeat was at %d, the first at %d", now, before)
		}
		return nil
	})
	g.wantLifted(nil, "b")
}

// Under the ACL rules of its user, the gate changes its subscriptions as pods come and
// go.
func TestGateUser(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	rules := strings.Fields(sidecarACL + " " + gateACL + " " + sentinelACL + " " + clusterACL)
	g.redis.Do(t, "ACL", append([]any{"SETUSER", "gate", "on", ">" + rig.Password}, rig.Anys(rules)...)...)
	_, log, _ := g.start(func(c *gateConfig) {
		c.redis = redisSettings{username: "gate", password: rig.Password}
		c.heartbeatInterval = time.Second // this user may ask for the age of Redis: the birth guard is short
	})
	a := g.create("a")
	g.wantLifted([]string{"a"}) // the gate ends the subscription for a
	b := g.create("b")
	g.wantLifted(nil, "b")
	g.run("a")
	rig.Eventually(t, 10*time.Second, func() error {
		channels, err := redis.Strings(g.redis.Control.Do("PUBSUB", "CHANNELS", "waiters/*"))
		if want := []string{g.id.channel(b)}; err == nil && !slices.Equal(channels, want) {
			err = fmt.Errorf("subscribed to %q, want %q", channels, want)
		}
		return err
	})
	g.owner.giveBack(g.id, a)
	g.wantLifted([]string{"b"})
	rig.Eventually(t, 10*time.Second, func() error {
		channels, err := redis.Strings(g.redis.Control.Do("PUBSUB", "CHANNELS", "waiters/*"))
		if err == nil && len(channels) > 0 {
			err = fmt.Errorf("subscribed to %q, want none", channels)
		}
		return err
	})
	if text := log.String(); strings.Contains(text, "NOPERM") || strings.Contains(text, "cannot be called") {
		t.Errorf("the user lacks a permission:\n%s", text)
	}
}
