//go:build e2e

package e2e

import (
	"cmp"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// soon bounds the time from a change of a length to its effect on pods. The change takes
// about a second; a busy node of two cores takes much longer to start containers.
const soon = time.Minute

// owners is the ConfigMap of the owners' settings. There is one in the cluster: only
// TestLimits writes it.
type owners struct {
	mu    sync.Mutex
	lines []string // PATTERN WORD...
}

const ownersPath = "/api/v1/namespaces/" + hookNamespace + "/configmaps/semaphores"

// newOwners makes the ConfigMap. It goes with the test.
func newOwners(t *testing.T, lines ...string) *owners {
	t.Helper()
	o := &owners{lines: lines}
	must(t, api.create(hookNamespace, object{"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": object{"name": "semaphores"}, "data": o.data()}))
	t.Cleanup(func() { _, _ = hook("delete", "configmap", "semaphores", "--ignore-not-found") })
	return o
}

func (o *owners) data() object { return object{"semaphores": strings.Join(o.lines, "\n") + "\n"} }

// set replaces the lines of these patterns, or adds them, in one change.
func (o *owners) set(t *testing.T, lines ...string) {
	t.Helper()
	o.change(t, func() {
		for _, line := range lines {
			if i := o.find(line); i >= 0 {
				o.lines[i] = line
			} else {
				o.lines = append(o.lines, line)
			}
		}
	})
}

// remove removes the line of a pattern.
func (o *owners) remove(t *testing.T, pattern string) {
	t.Helper()
	o.change(t, func() {
		i := o.find(pattern)
		o.lines = slices.Delete(o.lines, i, i+1)
	})
}

func (o *owners) change(t *testing.T, edit func()) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	edit()
	_, err := api.do(http.MethodPatch, ownersPath, "application/merge-patch+json", object{"data": o.data()})
	must(t, err)
}

// find returns the index of the line with the pattern of another line, or -1.
func (o *owners) find(line string) int {
	pattern, _, _ := strings.Cut(line, " ")
	return slices.IndexFunc(o.lines, func(l string) bool { return l == pattern || strings.HasPrefix(l, pattern+" ") })
}

// in is the namespace for a subtest.
func (n *namespace) in(t *testing.T) *namespace { return &namespace{t, n.name} }

// limit returns the limit that Redis knows of a semaphore; empty: none.
func (n *namespace) limit(key string) (string, error) {
	words, err := n.redis(key, "HMGET 'state/{KEY}' limit")
	return strings.Join(words, " "), err
}

// wantLimit waits until Redis knows that limit.
func (n *namespace) wantLimit(key, want string) {
	n.Helper()
	eventually(n.T, patience, func() error {
		got, err := n.limit(key)
		if err == nil && got != want {
			err = fmt.Errorf("the limit of %s/%s is %q, want %q", n.name, key, got, want)
		}
		return err
	})
}

// heard returns Redis's time, and the time at which it heard of a pod; 0: the pod is not in
// the Sorted Set, which is inflight of holders, seen of waiters.
func (n *namespace) heard(set, key string, p corev1.Pod) (now, heard float64) {
	n.Helper()
	eventually(n.T, patience, func() error {
		words, err := n.redis(key, "TIME", "ZSCORE '"+set+"/{KEY}' "+string(p.UID))
		if err != nil {
			return err
		}
		var micros float64
		_, err = fmt.Sscan(strings.Join(append(words, "0"), " "), &now, &micros, &heard)
		now += micros / 1e6
		return err
	})
	return now, heard
}

// wantHeard waits until Redis hears of a pod at a time that is that much later than now.
// The pod must stay in the Sorted Set.
func (n *namespace) wantHeard(set, key string, p corev1.Pod, later time.Duration) {
	n.Helper()
	since, _ := n.heard(set, key, p)
	eventually(n.T, patience, func() error {
		_, heard := n.heard(set, key, p)
		if heard == 0 {
			n.Fatalf("%s is not in %s of %s/%s", p.Name, set, n.name, key)
		}
		if heard < since+later.Seconds() {
			return fmt.Errorf("%s was heard %.1f s after %.1f, want %s", p.Name, heard-since, since, later)
		}
		return nil
	})
}

// wantAskedInVain waits until the first pod in line has asked again, and has got no
// token.
func (n *namespace) wantAskedInVain(key string, p corev1.Pod) {
	n.Helper()
	n.wantHeard("seen", key, p, 0)
}

// wantSoon logs how long an effect took, and checks that it came soon.
func (n *namespace) wantSoon(what string, took time.Duration) {
	n.Helper()
	n.Logf("%s: %s", what, inSeconds(took))
	if took > soon {
		n.Errorf("%s: that took %s", what, inSeconds(took))
	}
}

// withoutLength returns a pod that says nothing of the length.
func withoutLength(name, key string) object {
	p := pod(name, key, 1)
	delete(p["metadata"].(object)["annotations"].(object), annotationPrefix+"length")
	return p
}

// Owners of resources set lengths in the ConfigMap semaphores, and by the mode status.
func TestLimits(t *testing.T) {
	t.Parallel()
	raised, paused, plain := newNamespace(t), newNamespace(t), newNamespace(t)
	s := sharing{first: newNamespace(t), second: newNamespace(t), third: newNamespace(t)}
	s.key = "shared-" + s.first.name
	s.pattern = s.second.name[:len(s.second.name)-1] + "*"
	webhooks := newSecretChange(t, `"settings of semaphores taken"`)
	o := newOwners(t,
		raised.name+"/jobs length=1",
		"@"+s.key+" length=1 namespaces="+s.first.name+","+s.pattern,
		plain.name+"/set length=2")
	raised.wantLimit("jobs", "1")
	webhooks.reach(func() {})
	t.Run("at once", func(t *testing.T) {
		t.Run("raise and lower", func(t *testing.T) {
			t.Parallel()
			testRaise(raised.in(t), o)
		})
		t.Run("pause", func(t *testing.T) {
			t.Parallel()
			testPause(paused.in(t))
		})
		t.Run("shared", func(t *testing.T) {
			t.Parallel()
			s := s
			s.first, s.second, s.third = s.first.in(t), s.second.in(t), s.third.in(t)
			s.test(o)
		})
		t.Run("no length annotation", func(t *testing.T) {
			t.Parallel()
			testNoLength(plain.in(t))
		})
	})
	if !t.Failed() {
		t.Run("bad line", func(t *testing.T) { testBadLine(plain.in(t), o) })
	}
}

// The ConfigMap is edited, and no pod is touched: after a raise, pods in line start.
// After the length is lowered, no pod is stopped, and none starts while too many run. The
// pods ask for a length of 5, which does not count.
func testRaise(n *namespace, o *owners) {
	d := newDiary(n)
	var pods []corev1.Pod
	for i := range 5 {
		name := fmt.Sprintf("p-%d", i)
		n.create(waiting(pod(name, "jobs", 5, d.app(untilTold))))
		if i == 0 {
			pods = append(pods, n.wantRunning(name))
			continue
		}
		pods = append(pods, n.wantWaiting(name))
		n.wantWaiters("jobs", pods[1:]...)
	}
	n.wantHolders("jobs", pods[0])
	n.wantSidecarLog("p-1", "waiting for a token of "+n.name+"/jobs: 1 of 1 in use, 1st in line")

	changed, before := time.Now(), uptime(n.T)
	o.set(n.T, n.name+"/jobs length=3")
	n.wantLimit("jobs", "3")
	n.wantSoon("ConfigMap changed to limit in Redis", time.Since(changed))
	d.wantStarted("p-1")
	d.wantStarted("p-2")
	for _, name := range []string{"p-1", "p-2"} {
		n.wantSoon("ConfigMap changed to start of "+name, d.shiftOf(name).start-before)
	}
	n.wantHolders("jobs", pods[:3]...)
	n.wantWaiters("jobs", pods[3:]...)
	n.wantAskedInVain("jobs", pods[3])

	o.set(n.T, n.name+"/jobs length=1")
	n.wantLimit("jobs", "1")
	n.wantAskedInVain("jobs", pods[3])
	for _, p := range pods[:3] {
		n.wantRunning(p.Name)
	}
	n.wantHolders("jobs", pods[:3]...)
	for i := range 2 {
		n.end(pods[i].Name)
		n.wantHolders("jobs", pods[i+1:3]...)
		n.wantAskedInVain("jobs", pods[3])
	}
	n.wantNoRestarts(pods[2:]...)
	n.end("p-2")
	d.wantStarted("p-3")
	n.wantHolders("jobs", pods[3])
	n.wantWaiters("jobs", pods[4])
	d.wantNeverMoreThan(3)
	if last, next := d.shiftOf("p-2"), d.shiftOf("p-3"); next.start < last.end {
		n.Errorf("p-3 started %s before the end of p-2", inSeconds(last.end-next.start))
	}
}

// shiftOf returns the shift of a pod whose app has started once.
func (d *diary) shiftOf(pod string) shift {
	d.Helper()
	shifts := d.shifts()
	i := slices.IndexFunc(shifts, func(s shift) bool { return s.pod == pod })
	if i < 0 {
		d.Fatalf("%s has not started: %v", pod, podsOf(shifts))
	}
	return shifts[i]
}

// While a semaphore is paused, no pod gets a token, and pods in line keep their places.
// All of them learn why. When the pause is cleared, the first in line starts.
func testPause(n *namespace) {
	const note = "the database moves"
	name := n.name + "/db"
	n.create(waiting(pod("holder", "db", 1)))
	n.wantHolders("db", n.wantRunning("holder"))
	n.create(waiting(pod("first", "db", 1)))
	first := n.wantWaiting("first")
	n.wantWaiters("db", first)

	out, err := status("pause", name, "--for=30m", "--note="+note, "--yes")
	must(n.T, err)
	if !regexp.MustCompile(`length in force: paused until .*: ` + note).MatchString(out) {
		n.Errorf("status pause:\n%s", out)
	}
	want := regexp.MustCompile(`no semaphore available: ` + name + ` is paused until \d\d:\d\d UTC: ` + note +
		`; 1 in use, by holder \(.*; 1 waiting in line`)
	if got := n.wantRefused(pod("hasty", "db", 1)); !want.MatchString(got) {
		n.Errorf("refused with %q, want %s", got, want)
	}
	n.end("holder")
	n.wantCounts("db", 0, 0)
	n.wantAskedInVain("db", first)
	n.create(waiting(pod("second", "db", 1)))
	second := n.wantWaiting("second")
	n.wantWaiters("db", first, second)
	n.wantSidecarLog("second", ": "+note+"; 0 in use, 2nd in line")
	n.wantSidecarLog("first", ": "+note+"; 0 in use, 1st in line") // a sidecar logs the same place once a minute
	wantStatus(n.T, name, name+`: 0 of 0 tokens in use \(0 stale\), 0 free, 2 waiting in line`,
		`length: paused until .*: `+note, `1st +first +.*`, `2nd +second +.*`)

	cleared := time.Now()
	out, err = status("set", name, "--clear", "--yes")
	must(n.T, err)
	if !strings.Contains(out, "length in force: 1, as pods ask for") {
		n.Errorf("status set --clear:\n%s", out)
	}
	n.wantRunning("first")
	n.wantSoon("status set --clear to start of the first in line", time.Since(cleared))
	n.wantHolders("db", first)
	n.wantWaiters("db", second)
}

// sharing is a semaphore that the first two namespaces share. The third may not use it.
type sharing struct {
	first, second, third *namespace
	key                  string
	pattern              string // of the second namespace, in the line
}

// The pods of two namespaces share a token, and no other namespace gets it. When a
// namespace is taken off the list, its pod keeps the token until its end.
func (s sharing) test(o *owners) {
	t, name := s.first.T, "@"+s.key
	all := s.first.in(t)
	all.name = "@" // as in the keys of Redis
	s.first.create(waiting(pod("holder", name, 1)))
	holder := s.first.wantRunning("holder")
	all.wantHolders(s.key, holder)
	s.second.create(waiting(pod("waiter", name, 1)))
	waiter := s.second.wantWaiting("waiter")
	all.wantWaiters(s.key, waiter)
	s.second.wantSidecarLog("waiter",
		fmt.Sprintf("waiting for a token of %s: 1 of 1 in use, 1st in line, ", name))
	wantStatus(t, name, name+`: 1 of 1 tokens in use \(0 stale\), 0 free, 1 waiting in line`,
		s.first.name+`/holder +`+holder.Spec.NodeName+` +.*`,
		`1st +`+s.second.name+`/waiter +`+waiter.Spec.NodeName+` +.*`)
	want := fmt.Sprintf("key is %q: %s is not for the namespace %s: by the ConfigMap semaphores, it is for %s, %s",
		name, name, s.third.name, s.first.name, s.pattern)
	s.third.wantInvalid(pod("other", name, 1), want)

	s.first.end("holder")
	s.second.wantRunning("waiter")
	all.wantHolders(s.key, waiter)

	o.set(t, name+" length=2 namespaces="+s.first.name)
	all.wantLimit(s.key, "2") // setup has read the line; it looks at the users then, and every ten seconds
	all.wantHeard("inflight", s.key, waiter, 12*time.Second)
	if may, err := s.second.mayShare(s.key); err != nil || !may {
		t.Errorf("the user of %s lost its right to %s while its pod runs: %v", s.second.name, name, err)
	}
	s.second.wantNoRestarts(waiter)
	s.second.end("waiter")
	all.wantHolders(s.key)
	eventually(t, patience, func() error {
		may, err := s.second.mayShare(s.key)
		if err == nil && may {
			err = fmt.Errorf("the user of %s still has a right to %s", s.second.name, name)
		}
		return err
	})
}

// mayShare reports whether the namespace's user in Redis has a right to a shared
// semaphore.
func (n *namespace) mayShare(key string) (bool, error) {
	users, err := hook("get", "secret", "redis-users", "-o", `go-template={{index .data "users.acl" | base64decode}}`)
	for line := range strings.Lines(users) {
		if strings.HasPrefix(line, "user sidecar/"+n.name+" ") {
			return strings.Contains(line, "{@/"+key+"}"), err
		}
	}
	return false, cmp.Or(err, fmt.Errorf("%s has no user", n.name))
}

// A pod needs no length annotation if the ConfigMap has a line for its semaphore. If the
// pod has one, its creator is warned.
func testNoLength(n *namespace) {
	n.wantInvalid(withoutLength("unset", "unset"), "length is missing: it must be a whole number from 1 to 10000, "+
		"unless the ConfigMap semaphores sets a length for this key")
	for _, name := range []string{"one", "two"} {
		n.create(withoutLength(name, "set"))
		n.wantRunning(name)
	}
	n.wantSetFull()
	n.wantCounts("set", 0, 2)
	warnings, err := n.createWarned(pod("three", "set", 5), "--dry-run=server")
	must(n.T, err)
	want := fmt.Sprintf("the annotation length is 5, but the ConfigMap semaphores sets 2 for %s/set: this counts", n.name)
	if !strings.Contains(warnings, want) {
		n.Errorf("warned of %q, want %q", warnings, want)
	}
}

// wantInvalid creates a pod that must be refused for this problem of an annotation.
func (n *namespace) wantInvalid(o object, problem string) {
	n.Helper()
	want := "422: " + denied + "invalid annotations: " + annotationPrefix + problem
	if got := n.wantRefused(o); !strings.HasSuffix(got, want) {
		n.Errorf("refused with %q, want %q", got, want)
	}
}

// wantSetFull creates a pod that must be refused, as the limit of 2 is reached.
func (n *namespace) wantSetFull() {
	n.Helper()
	want := denied + "no semaphore available: " + n.name + "/set has 2 of 2 tokens in use"
	if got := n.wantRefused(withoutLength("three", "set")); !strings.Contains(got, want) {
		n.Fatalf("refused with %q, want %q", got, want)
	}
}

// An event tells of a bad line. The limits of before stay in force until the ConfigMap is
// good again. Without the ConfigMap there are none.
func testBadLine(n *namespace, o *owners) {
	o.set(n.T, n.name+"/set length=3", n.name+" length=1")
	problem := fmt.Sprintf("line %d: %q is no semaphore: it must be NAMESPACE/KEY", len(o.lines), n.name)
	const before = "what it held before stays in force"
	eventually(n.T, patience, func() error {
		events, err := hook("get", "events", "--field-selector=reason=SettingsNotTaken,involvedObject.name=semaphores",
			"-o", "jsonpath={.items[*].message}")
		if err == nil && !(strings.Contains(events, problem) && strings.Contains(events, before)) {
			err = fmt.Errorf("events: %s; want %s", events, problem)
		}
		return err
	})
	if got, err := n.limit("set"); err != nil || got != "2" {
		n.Errorf("the limit is %q, %v; want that of before", got, err)
	}
	n.wantSetFull()

	o.remove(n.T, n.name)
	n.wantLimit("set", "3")
	n.create(withoutLength("three", "set"))
	n.wantRunning("three")
	n.wantCounts("set", 0, 3)

	must(n.T, errOf(hook("delete", "configmap", "semaphores")))
	n.wantLimit("set", "")
}
