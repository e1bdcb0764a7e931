package main

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// A pod that has other scheduling gates takes no token and stands in no line. When ours is
// its last one, it takes its place by its creation time.
func TestGateOtherGates(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	create := func(name string, ago time.Duration, do func(*corev1.Pod) string) (token string) {
		p := g.admitted(name)
		p.CreationTimestamp.Time = time.Now().Add(-ago).Truncate(time.Second)
		return do(p)
	}
	unblock := func(name string) {
		g.change(name, func(p *corev1.Pod) { p.Spec.SchedulingGates = p.Spec.SchedulingGates[1:] })
	}
	tokens := map[string]string{}
	for i, name := range []string{"b1", "b2", "b3"} {
		tokens[name] = create(name, time.Minute-time.Duration(i)*time.Second, g.createBlocked)
	}
	gate, _, stop := g.start()
	tokens["a"] = create("a", 50*time.Second, g.createAs)
	g.wantLifted([]string{"a"})
	tokens["c"] = create("c", 40*time.Second, g.createAs)
	g.redis.WantLine(t, g.id, tokens["c"])
	g.wantEvent("b1", "WaitingForGates", "example.org/other")
	if n := gate.count(podBlocked); n != 3 {
		t.Errorf("%d pods are blocked, want 3", n)
	}
	unblock("b2")
	g.redis.WantLine(t, g.id, tokens["b2"], tokens["c"])
	stop()
	g.start()
	unblock("b1")
	g.redis.WantLine(t, g.id, tokens["b1"], tokens["b2"], tokens["c"])
	g.wantHolders(tokens["a"])
	g.api.DeletePod(t, g.id.namespace, "a")
	g.wantLifted([]string{"b1"})
	g.api.DeletePod(t, g.id.namespace, "b3")
	g.wantHolders(tokens["b1"])

	// Another program removes our gate first. The pod cannot run, and takes no token.
	d := create("d", 70*time.Second, g.createBlocked)
	g.wantEvent("d", "WaitingForGates", "example.org/other")
	g.change("d", func(p *corev1.Pod) { p.Spec.SchedulingGates = p.Spec.SchedulingGates[:1] })
	g.api.DeletePod(t, g.id.namespace, "b1")
	g.wantLifted([]string{"b2"})
	g.redis.WantLine(t, g.id, tokens["c"])
	unblock("d")
	g.redis.WantLine(t, g.id, d, tokens["c"])
}

// created returns a pod that was created some time ago, and that stops waiting.
func (g *gateTest) created(name string, ago time.Duration, wait int, then string) *corev1.Pod {
	p := rig.StopWaiting(g.admitted(name), wait, then)
	p.CreationTimestamp.Time = time.Now().Add(-ago).Truncate(time.Second)
	return p
}

// wantFailed waits until the gate has made a pod fail.
func (g *gateTest) wantFailed(name string) {
	g.Helper()
	rig.Eventually(g.T, 20*time.Second, func() error {
		p := g.pod(name)
		i := slices.IndexFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == conditionGaveUp })
		if p.Status.Phase != corev1.PodFailed || p.Status.Reason != reasonGaveUp || i < 0 ||
			!strings.HasPrefix(p.Status.Message, gaveUpPrefix) || p.Status.Conditions[i].Status != corev1.ConditionTrue ||
			p.Status.Conditions[0].Reason != reasonGaveUp { // of PodScheduled: kubectl shows it
			return fmt.Errorf("the status of %s is %+v", name, p.Status)
		}
		return nil
	})
}

// When the time of a gated pod in line is over, the gate makes it fail, or lifts its gate.
// The pod need not be the first.
func TestGateEndsWaits(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	_, _, stop := g.start()
	g.start()
	a := g.createAs(g.created("a", 100*time.Second, 1, whenWaitedFail)) // a token is free
	g.wantLifted([]string{"a"})
	g.run("a")
	first := g.createAs(g.created("first", 90*time.Second, 600, whenWaitedFail))
	fails := g.createAs(g.created("fails", 80*time.Second, 60, whenWaitedFail))
	runs := g.createAs(g.created("runs", 70*time.Second, 60, whenWaitedRun))
	g.wantFailed("fails")
	g.wantEvent("fails", reasonGaveUp, " of 1 in use by ")
	g.wantLifted([]string{"runs"}, "first")
	g.wantHolders(a, runs)
	g.redis.WantLine(t, g.id, first)
	wantStatus(t, g.redis, []string{g.id.String()}, `.*: 2 of 1 tokens in use .*`, `1st +first +\? +\d+ s +in 8 min .*`)
	rig.Eventually(t, 10*time.Second, func() error { return gaveUpNote(g.redis, g.id, fails, false) })
	stop()

	// The time behind other scheduling gates does not count.
	blocked := g.createBlocked(g.created("blocked", 2*time.Minute, 60, whenWaitedFail))
	g.wantEvent("blocked", reasonBlocked, "example.org/other")
	g.change("blocked", func(p *corev1.Pod) { p.Spec.SchedulingGates = p.Spec.SchedulingGates[1:] })
	g.redis.WantLine(t, g.id, blocked, first)
	g.api.DeletePod(t, g.id.namespace, "runs")
	giveBack(t, g.owner, g.id, a)
	g.wantLifted([]string{"blocked"}, "first")
}

// A pod whose time is over does not run beyond a length that the owner set.
func TestGateOwnersLengthEndsNoWaits(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	file := filepath.Join(t.TempDir(), "semaphores")
	rig.Must(t, os.WriteFile(file, []byte(g.id.String()+" length=1"), 0o600))
	g.start(func(c *gateConfig) { c.semaphoresFile = file })
	a := g.create("a")
	g.wantLifted([]string{"a"})
	runs := g.createAs(g.created("runs", 3*time.Minute, 60, whenWaitedRun))
	g.createAs(g.created("fails", 2*time.Minute, 60, whenWaitedFail))
	g.wantFailed("fails")
	g.redis.WantLine(t, g.id, runs)
	g.wantHolders(a)
}

// If the API server refuses to make a pod fail, the pod stays gated and out of the line, and
// an event says why. The gate tries again.
func TestGateMayNotFailAPod(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	g.api.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch || !strings.HasSuffix(r.URL.Path, "/status") {
			return false
		}
		rig.Respond(w, 0, nil, rig.Failure(http.StatusForbidden, "Forbidden", "on purpose"))
		return true
	})
	_, log, _ := g.start()
	holder := g.create("a")
	g.wantLifted([]string{"a"})
	g.createAs(g.created("b", 2*time.Minute, 60, whenWaitedFail))
	g.wantEvent("b", reasonGaveUp, "on purpose")
	if len(log.Lines(t, "a pod that gave up not made to fail, to be retried")) == 0 {
		t.Error("the gate has not logged the refusal")
	}
	g.redis.WantLine(t, g.id)
	g.wantHolders(holder)
	g.api.Fail(nil)
	g.wantFailed("b")
	g.wantLifted(nil, "b")
}

// A whole line of pods whose time is over ends soon.
func TestGateEndsManyWaits(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	acquire(t, g.owner, g.id, 1)
	const pods = 150
	for i := range pods {
		g.createAs(g.created(fmt.Sprintf("p-%d", i), 2*time.Minute, 60, whenWaitedFail))
	}
	g.start()
	g.wantFailed(fmt.Sprintf("p-%d", pods-1))
	g.redis.WantLine(t, g.id)
	for i := range pods {
		g.wantFailed(fmt.Sprintf("p-%d", i))
	}
}

// If a pod does not start in time, the gate stops its heartbeats, and the next pod gets
// the stale token. The pod gets an event.
func TestGateUnschedulable(t *testing.T) {
	t.Parallel()
	for name, late := range map[string]func(*gateTest){
		"no node": func(g *gateTest) {
			g.create("late")
			g.wantLifted([]string{"late"})
		},
		"the sidecar runs and does not reach Redis": func(g *gateTest) {
			g.create("late")
			g.wantLifted([]string{"late"})
			g.change("late", rig.MarkScheduled)
		},
		"the label has a time in the future": func(g *gateTest) {
			p := g.admitted("late")
			p.Spec.SchedulingGates = nil
			p.Labels[labelGated] = strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10)
			g.createAs(p)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGateTest(t, 1)
			_, log, _ := g.start(func(c *gateConfig) { c.unschedulable = 8 * time.Second })
			late(g)
			token := string(g.pod("late").UID)
			g.wantHolders(token)
			next := g.create("next")
			rig.Eventually(t, 20*time.Second, func() error {
				if label, ok := g.pod("late").Labels[labelGated]; ok {
					return fmt.Errorf("the pod still has the label %q", label)
				}
				return nil
			})
			g.wantHolders(token) // until it is stale
			g.redis.MakeStale(t, g.id, token)
			g.wantLifted([]string{"next"})
			g.wantHolders(next)
			g.wantEvent("late", reasonLate, "its token of "+g.id.String()+" goes to another pod")
			if len(log.Lines(t, "the pod has not started in time: its token goes stale")) != 1 {
				t.Error("the late start was not logged exactly once")
			}
		})
	}
}

// If the API server refuses to lift the gate of a pod, the next pod gets its token after a
// time. The pod stands in line again, behind those that waited meanwhile.
func TestGateRefused(t *testing.T) {
	t.Parallel()
	for name, refuse := range map[string]func(*gateTest){
		"422": func(g *gateTest) {
			g.api.Store.SetPolicy(func(before, _ *corev1.Pod) string {
				if before.Name == "refused" {
					return "on purpose"
				}
				return ""
			})
		},
		"403": func(g *gateTest) {
			g.api.Fail(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodPatch || !strings.HasSuffix(r.URL.Path, "/refused") {
					return false
				}
				rig.Respond(w, 0, nil, rig.Failure(http.StatusForbidden, "Forbidden", "on purpose"))
				return true
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGateTest(t, 1)
			create := func(name string, ago time.Duration) (token string) {
				p := g.admitted(name)
				p.CreationTimestamp.Time = time.Now().Add(-ago).Truncate(time.Second)
				return g.createAs(p)
			}
			refuse(g)
			bound := func(c *gateConfig) { c.unschedulable = 8 * time.Second }
			_, log, _ := g.start(bound)
			_, another, _ := g.start(bound) // both agree on the place
			refused := create("refused", time.Minute)
			g.wantHolders(refused)
			b, c := create("b", 50*time.Second), create("c", 40*time.Second)
			g.wantLifted([]string{"b"}, "refused")
			g.redis.WantLine(t, g.id, c, refused)
			g.wantEvent("refused", reasonLate, "on purpose")
			text := "a gate could not be lifted: its token goes to the next pod"
			if len(log.Lines(t, text))+len(another.Lines(t, text)) == 0 {
				t.Error("neither gate has logged the refusal")
			}
			g.run("b")
			g.owner.giveBack(g.id, b) // as its sidecar does
			g.wantLifted([]string{"c"}, "refused")
			g.run("c")
			g.api.Store.SetPolicy(nil)
			g.api.Fail(nil)
			g.owner.giveBack(g.id, c)
			g.wantLifted([]string{"refused"})
			g.wantHolders(refused)
		})
	}
}

// If the API server refuses to remove the label, the gate logs that.
func TestGateLabelRefused(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	_, log, _ := g.start()
	g.create("a")
	g.wantLifted([]string{"a"})
	g.api.Store.SetPolicy(func(_, _ *corev1.Pod) string { return "on purpose" })
	g.change("a", rig.MarkRunning)
	rig.Eventually(t, 20*time.Second, func() error {
		if len(log.Lines(t, "label not removed, to be retried")) == 0 {
			return errors.New("the refusal is not logged")
		}
		return nil
	})
}

// However many gated pods are deleted, or lose the label, at once, a lift does not wait for
// what the gate asks about them. It asks nothing about those that were deleted, unless it
// has missed the deletion and learns of it from a list.
func TestGateManyLeave(t *testing.T) {
	t.Parallel()
	const many = 100
	for name, leave := range map[string]func(*gateTest, string){
		"deleted":  func(g *gateTest, pod string) { g.api.DeletePod(g.T, g.id.namespace, pod) },
		"no label": func(g *gateTest, pod string) { g.change(pod, func(p *corev1.Pod) { delete(p.Labels, labelGated) }) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGateTest(t, 1)
			other := *g
			other.id.key = "other"
			acquire(t, g.owner, g.id, 1)
			holder := acquire(t, g.owner, other.id, 1)
			gate, _, _ := g.start()
			for i := range many {
				g.create(fmt.Sprintf("many-%d", i))
			}
			next := other.create("next")
			other.redis.WantLine(t, other.id, next)
			rig.Eventually(t, 30*time.Second, func() error {
				if line, err := g.redis.Line(g.id); err != nil || len(line) != many {
					return fmt.Errorf("%d in line, %v", len(line), err)
				}
				return nil
			})
			var asked atomic.Int32
			answer := make(chan struct{})
			release := sync.OnceFunc(func() { close(answer) })
			t.Cleanup(release)
			g.api.Fail(func(_ http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/pods/many-") {
					asked.Add(1)
					<-answer
				}
				return false
			})
			for i := range many {
				leave(g, fmt.Sprintf("many-%d", i))
			}
			g.redis.WantLine(t, g.id)
			giveBack(t, g.owner, other.id, holder)
			start := time.Now()
			other.wantLifted([]string{"next"})
			rig.WantWithin(t, time.Since(start), time.Second/2, "lifting a gate while many pods leave")
			release()
			rig.Eventually(t, 30*time.Second, func() error {
				gate.mu.Lock()
				defer gate.mu.Unlock()
				if gate.lines[g.id] != nil {
					return errors.New("the line is still there")
				}
				return nil
			})
			if n := asked.Load(); name == "deleted" && n > many/4 || name != "deleted" && n != many {
				t.Errorf("the gate has asked %d times about %d pods", n, many)
			}
		})
	}
}

// placesSaid returns the positions that the events of each gated pod say, in their order.
func (g *gateTest) placesSaid(t *testing.T) map[string][]int {
	t.Helper()
	said := map[string][]int{}
	place := regexp.MustCompile(`in use, (?:at most )?(\d+)[a-z]{2} in line$`)
	for _, e := range g.api.Store.EventsOf(g.id.namespace) {
		if e.Reason == reasonWaiting {
			m := place.FindStringSubmatch(e.Note)
			if m == nil {
				t.Fatalf("an event says no place: %s", e.Note)
			}
			n, _ := strconv.Atoi(m[1])
			said[e.Regarding.Name] = append(said[e.Regarding.Name], n)
		}
	}
	return said
}

// wantPlacesSaid waits until the last event of each pod in line says a position that is
// less than twice its own. It returns what all events say.
func (g *gateTest) wantPlacesSaid(t *testing.T, names ...string) (said map[string][]int) {
	t.Helper()
	rig.Eventually(t, 30*time.Second, func() error {
		said = g.placesSaid(t)
		for i, name := range names {
			if last := said[name]; len(last) == 0 || last[len(last)-1] >= 2*(i+1) {
				return fmt.Errorf("the events of %s, number %d in line, say %v", name, i+1, last)
			}
		}
		return nil
	})
	return said
}

// numbered returns names that are in order.
func numbered(n int) (names []string) {
	for i := range n {
		names = append(names, fmt.Sprintf("p%02d", i+1))
	}
	return names
}

// The events of a gated pod say its position again each time that it has halved.
func TestGateSaysNewPlaces(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	acquire(t, g.owner, g.id, 1)
	names := numbered(9)
	g.createAll(names...)
	_, _, stop := g.start()
	g.wantPlacesSaid(t, names...)
	for _, leaving := range []int{1, 3, 3} {
		for _, name := range names[:leaving] {
			g.api.DeletePod(t, g.id.namespace, name)
		}
		names = names[leaving:]
		g.wantPlacesSaid(t, names...)
	}
	said := g.placesSaid(t)
	for name, places := range said {
		for i := 1; i < len(places); i++ {
			if 2*places[i] > places[i-1] {
				t.Errorf("the events of %s say %v: %d is more than half of the one before", name, places, places[i])
			}
		}
	}
	if got := said["p02"]; !slices.Equal(got, []int{2, 1}) {
		t.Errorf("the events of p02 say %v", got)
	}

	// Another gate does not repeat what was said. It goes on from there.
	stop()
	g.start()
	g.create("last")
	rig.Eventually(t, 20*time.Second, func() error {
		now := g.placesSaid(t)
		if len(now["last"]) == 0 {
			return errors.New("no event of the last pod")
		}
		if delete(now, "last"); !maps.EqualFunc(now, said, slices.Equal[[]int]) {
			t.Errorf("the events say %v, want %v as before", now, said)
		}
		return nil
	})
	for _, name := range names {
		g.api.DeletePod(t, g.id.namespace, name)
	}
	g.wantPlacesSaid(t, "last")
}

// Beside waiters of others, the gate knows the position of its first pod, and of the next
// ones that it is at most so much.
func TestGateSaysPlacesBesideOthers(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	acquire(t, g.owner, g.id, 1)
	names := numbered(6)
	g.createAll(names...)
	g.start()
	g.wantPlacesSaid(t, names...)
	queueUp(t, t.Context(), g.owner, g.id, 1, g.redis)
	for _, name := range names[:4] {
		g.api.DeletePod(t, g.id.namespace, name)
	}
	rig.Eventually(t, 20*time.Second, func() error {
		notes := map[string]string{}
		for _, e := range g.api.Store.EventsOf(g.id.namespace) {
			notes[e.Regarding.Name] = e.Note
		}
		for name, want := range map[string]string{"p05": ", 1st in line", "p06": ", at most 3rd in line"} {
			if !strings.HasSuffix(notes[name], want) {
				return fmt.Errorf("the last event of %s is %q, want %q", name, notes[name], want)
			}
		}
		return nil
	})
}

// While events wait to be sent, the gate creates none about new positions: they would be
// old, and leave no room for others. It lifts gates meanwhile.
func TestGateSaysNoOldPlaces(t *testing.T) {
	t.Parallel()
	const leaving = 30
	g := newGateTest(t, 1)
	holder := acquire(t, g.owner, g.id, 1)
	names := numbered(leaving + 11)
	g.createAll(names...)
	answer := make(chan struct{})
	release := sync.OnceFunc(func() { close(answer) })
	t.Cleanup(release)
	g.api.Fail(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPost {
			<-answer
		}
		return false
	})
	gate, _, _ := g.start()
	waiting := func() int { return len(gate.kubernetes.events.waiting) }
	rig.Eventually(t, 20*time.Second, func() error {
		if n := waiting(); n < len(names)-1 {
			return fmt.Errorf("%d events wait to be sent", n)
		}
		return nil
	})
	for _, name := range names[:leaving] {
		g.api.DeletePod(t, g.id.namespace, name)
	}
	names = names[leaving:]
	giveBack(t, g.owner, g.id, holder)
	g.wantLifted(names[:1], names[1:]...)
	names = names[1:]
	lifted := g.redis.Now(t)
	rig.Eventually(t, 20*time.Second, func() error { // until the gate has refreshed all places twice
		early, err := redis.Int(g.redis.Control.Do("ZCOUNT", g.id.seenKey(), "-inf", fmt.Sprintf("(%d", lifted+5)))
		if err == nil && early > 0 {
			err = fmt.Errorf("%d of the places are older", early)
		}
		return err
	})
	if n := waiting(); n > leaving+12 {
		t.Errorf("%d events wait to be sent", n)
	}
	release()
	said := g.wantPlacesSaid(t, names...)
	for i, name := range names {
		if got := said[name]; got[len(got)-1] != i+1 {
			t.Errorf("the events of %s, number %d in line, say %v", name, i+1, got)
		}
	}
}

// While the API server does not let the gate remove the label of a pod that runs, the gate
// leaves the pod's token alone, and serves the others.
func TestGateLabelStays(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	_, log, _ := g.start()
	a := g.create("a")
	g.wantLifted([]string{"a"})
	g.api.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch || !strings.HasSuffix(r.URL.Path, "/a") {
			return false
		}
		rig.Respond(w, 0, nil, rig.Failure(http.StatusServiceUnavailable, "ServiceUnavailable", "on purpose"))
		return true
	})
	g.change("a", rig.MarkRunning)
	rig.Eventually(t, 20*time.Second, func() error {
		if n := len(log.Lines(t, "label not removed, to be retried")); n < 2 {
			return fmt.Errorf("%d attempts to remove the label, want 2", n)
		}
		return nil
	})
	g.wantHolders(a)
	giveBack(t, g.owner, g.id, a)
	b := g.create("b")
	g.wantLifted([]string{"b"})
	g.wantHolders(b)
	if g.pod("a").Labels[labelGated] == "" {
		t.Error("the label is gone")
	}
	g.api.Fail(nil)
	rig.Eventually(t, 20*time.Second, func() error {
		if label, ok := g.pod("a").Labels[labelGated]; ok {
			return fmt.Errorf("the label is still %q", label)
		}
		return nil
	})
	g.wantHolders(b)
}

// A pod that gets its label back while the gate asks why it lost it stays in line.
func TestGateLabelComesBack(t *testing.T) {
	t.Parallel()
	for name, late := range map[string]bool{"before the answer": false, "after the answer": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGateTest(t, 1)
			holder := acquire(t, g.owner, g.id, 1)
			gate, _, _ := g.start()
			a := g.create("a")
			g.redis.WantLine(t, g.id, a)
			var once sync.Once
			g.api.Fail(func(w http.ResponseWriter, r *http.Request) (answered bool) {
				if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/a") {
					return false
				}
				once.Do(func() {
					unlabelled := g.pod("a")
					if !late {
						w = httptest.NewRecorder() // g.api answers with what is there then
					}
					g.change("a", func(p *corev1.Pod) { p.Labels[labelGated] = "true" })
					rig.Eventually(t, 10*time.Second, func() error {
						gate.mu.Lock()
						defer gate.mu.Unlock()
						l := gate.lines[g.id]
						l.mu.Lock()
						defer l.mu.Unlock()
						if late && l.pods[a].gone {
							return errors.New("the gate has not seen the label")
						}
						return nil
					})
					answered = late
					rig.Respond(w, http.StatusOK, unlabelled, nil)
				})
				return answered
			})
			g.change("a", func(p *corev1.Pod) { delete(p.Labels, labelGated) })
			rig.Eventually(t, 20*time.Second, func() error {
				if g.pod("a").Labels[labelGated] == "" {
					return errors.New("the label is not back")
				}
				return nil
			})
			g.redis.WantLine(t, g.id, a)
			giveBack(t, g.owner, g.id, holder)
			g.wantLifted([]string{"a"})
			g.wantHolders(a)
		})
	}
}

// If a token is lost while its pod is being scheduled, the gate waits for it again. A
// token given back is not taken again.
func TestGateTokenLost(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	_, log, _ := g.start(func(c *gateConfig) { c.heartbeatInterval, c.staleThreshold = time.Second, 8*time.Second })
	a := g.createAs(g.created("a", 2*time.Minute, 60, whenWaitedFail)) // the time with a token is no wait
	g.wantLifted([]string{"a"})
	g.redis.Do(t, "ZADD", g.id.inflightKey(), g.redis.Now(t), "other")
	g.redis.Do(t, "ZREM", g.id.inflightKey(), a)
	rig.Eventually(t, 20*time.Second, func() error {
		text := "the token was not in flight (reclaimed as stale, or lost with Redis): the pod stands in line again"
		if len(log.Lines(t, text)) == 0 {
			return errors.New("the gate has not logged the loss")
		}
		return nil
	})
	g.redis.WantLine(t, g.id, a)
	giveBack(t, g.owner, g.id, "other")
	g.wantHolders(a)
	g.run("a")
	giveBack(t, g.owner, g.id, a)
	g.redis.WantCounts(t, g.id, 1, 0)
}

// A gated pod gets the token that the greater length of a pod behind it allows. Then the
// pod behind it gets its own.
func TestGatedPodsOfTwoLengths(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	holder := acquire(t, g.owner, g.id, 1)
	b := g.create("b")
	g.start()
	g.redis.WantLine(t, g.id, b)
	g.length = 3
	c := g.create("c")
	g.wantLifted([]string{"b", "c"})
	g.wantHolders(holder, b, c)
}

// A gated pod with a head start stands before those that were created up to so long before
// it, also after the gate has restarted.
func TestGateHeadStart(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	holder := acquire(t, g.owner, g.id, 1)
	a := g.create("a")
	urgent := g.admitted("b")
	args := &urgent.Spec.InitContainers[0].Args
	*args = slices.Insert(*args, 1, "--head-start-seconds=600")
	b := g.createAs(urgent)
	_, _, stop := g.start()
	g.redis.WantLine(t, g.id, b, a)
	c := g.create("c")
	g.redis.WantLine(t, g.id, b, a, c)
	d, err := g.owner.inspect(t.Context(), g.id, detailMost)
	if err != nil || d.line[0].ahead != 600*time.Second || d.line[0].held > time.Minute {
		t.Errorf("the first in line is %+v, %v", d.line[0], err)
	}
	stop()
	g.redis.Do(t, "DEL", g.id.keys()[2:5]...)
	g.start()
	g.redis.WantLine(t, g.id, b, a, c)
	giveBack(t, g.owner, g.id, holder)
	g.wantLifted([]string{"b"})
}

// A gated pod that needs several tokens gets all at one time. Until then, none goes to the
// pod behind it. The gate keeps all of them until the sidecar does.
func TestGateSeveralTokens(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 3)
	one, two := acquire(t, g.owner, g.id, 3), acquire(t, g.owner, g.id, 3)
	seedHolds(t, g.redis, g.id, one)
	g.start(func(c *gateConfig) { c.heartbeatInterval = time.Second })
	heavy := g.admitted("a")
	args := &heavy.Spec.InitContainers[0].Args
	*args = slices.Insert(*args, 1, "--tokens=2")
	a := g.createAs(heavy)
	g.wantEvent("a", reasonWaiting, "waiting for 2 tokens of "+g.id.String()+": 2 of 3 in use, 1st in line, about 6 min to go")
	b := g.create("b")
	g.redis.WantLine(t, g.id, a, b)
	g.wantLifted(nil, "a", "b")
	giveBack(t, g.owner, g.id, one)
	g.wantLifted([]string{"a"}, "b")
	g.wantHolders(two, a, a+"/2")
	taken := g.redis.LastHeartbeat(t, g.id, a+"/2")
	rig.Eventually(t, 30*time.Second, func() error {
		if g.redis.LastHeartbeat(t, g.id, a+"/2") <= taken {
			return errors.New("the gate does not keep the second token")
		}
		return nil
	})
	g.api.DeletePod(t, g.id.namespace, "a")
	g.wantLifted([]string{"b"})
	g.wantHolders(two, b)
}

// A node of a Cluster cannot tell whether the gate receives its messages at another node. The
// gate opens no other connection for that: in between, it could miss a call, and others
// would pass its pods.
func TestGateKeepsItsSubscription(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	g := newGateTestOn(t, nil, groupConfig(t, c.Address()), 1)
	for n := 0; c.Holder(t, g.id) == c.Holder(t, auxiliaryID); n++ {
		g.id.key = fmt.Sprintf("web-%d", n)
	}
	g.redis = c.Holder(t, g.id)
	acquire(t, g.owner, g.id, 1)
	_, log, _ := g.start()
	token := g.create("a")
	asked := map[string]bool{}
	rig.Eventually(t, time.Minute, func() error {
		at, err := redis.String(g.redis.Control.Do("ZSCORE", g.id.seenKey(), token))
		if asked[at] = true; err != nil || len(asked) < 8 {
			return fmt.Errorf("%d requests, %v", len(asked), err)
		}
		return nil
	})
	for _, line := range log.Lines(t, "not notified of free tokens, asks every few seconds instead") {
		if strings.Contains(fmt.Sprint(line["error"]), net.ErrClosed.Error()) { // and no slow server
			t.Errorf("the gate has closed its subscription: %v", line)
		}
	}
}

// A gate that was paused may have taken a token for a pod that ran and ended meanwhile.
// When the pod is gone, the gate gives the token back.
func TestGateGivesBackAfterThePodRan(t *testing.T) {
	t.Parallel()
	g := newGateTest(t, 1)
	g.start()
	a := g.create("a")
	g.wantLifted([]string{"a"})
	g.api.Store.SetPolicy(func(_, _ *corev1.Pod) string { return "the label stays" })
	g.change("a", rig.MarkRunning)
	g.wantHolders(a)
	g.api.DeletePod(t, g.id.namespace, "a")
	g.wantHolders()
}
