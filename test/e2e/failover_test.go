//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// admissions are attempts to create pods, one after the other started at a fixed rate, whether or not those before have ended, until end is called
// or the test ends.
type admissions struct {
	*namespace
	end     func() // and waits for those that are under way
	running sync.WaitGroup

	mu  sync.Mutex
	all []admission
}

type admission struct {
	start, end time.Time
	err        error
}

// Pods are created so often, unless so many are being created: each is a process, and a node that is too slow for them would come to a standstill.
const (
	admissionsEvery  = 250 * time.Millisecond
	admissionsAtOnce = 8
)

func startAdmissions(n *namespace) *admissions {
	stopping := make(chan struct{})
	a := &admissions{namespace: n}
	a.end = sync.OnceFunc(func() {
		close(stopping)
		a.running.Wait()
	})
	n.Cleanup(a.end)
	a.running.Go(func() {
		tick := time.NewTicker(admissionsEvery)
		defer tick.Stop()
		under := make(chan struct{}, admissionsAtOnce)
		for i := 0; ; i++ {
			select {
			case <-stopping:
				return
			case <-tick.C:
			}
			select {
			case under <- struct{}{}:
			default:
				continue
			}
			a.running.Go(func() {
				defer func() { <-under }()
				start := time.Now()
				err := n.tryCreate(pod(fmt.Sprintf("stream-%d", i), "stream", 5000, unschedulable))
				a.mu.Lock()
				defer a.mu.Unlock()
				a.all = append(a.all, admission{start, time.Now(), err})
			})
		}
	})
	return a
}

// wantAdmittedSince waits until one that started after that time is admitted.
func (a *admissions) wantAdmittedSince(after time.Time) {
	a.Helper()
	eventually(a.T, time.Minute, func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		last := errors.New("none has ended")
		for _, x := range a.all {
			if x.start.Before(after) {
				continue
			}
			if last = x.err; last == nil {
				return nil
			}
		}
		return last
	})
}

// stop ends them, and checks that whatever was created later than that time after the fault was admitted.
func (a *admissions) stop(fault time.Time, within time.Duration) {
	a.Helper()
	a.end()
	var failed int
	var until, slowest time.Duration
	var last error
	for _, x := range a.all {
		slowest = max(slowest, x.end.Sub(x.start))
		if x.err != nil {
			failed++
			if since := x.start.Sub(fault); since >= until {
				until, last = since, x.err
			}
		}
	}
	a.Logf("%d of %d admissions failed, the last of them created %s after the fault; the slowest took %s", failed, len(a.all), inSeconds(until), inSeconds(slowest))
	if until > within || len(a.all) < 8 {
		a.Errorf("want at most %s: %v", within, last)
	}
}

// line is a semaphore of length 2 with two holders, and three in line.
type line struct {
	*diary
	holders, waiters []corev1.Pod
}

func newLine(n *namespace) *line {
	n.Helper()
	l := &line{diary: newDiary(n)}
	for i := range 5 {
		name := fmt.Sprintf("p-%d", i)
		n.create(waiting(pod(name, "line", 2, l.app(untilTold))))
		if i < 2 {
			l.holders = append(l.holders, n.wantRunning(name))
			continue
		}
		l.waiters = append(l.waiters, n.wantWaiting(name))
		n.wantWaiters("line", l.waiters...)
	}
	return l
}

// wantWhole checks that the queue has it as it was, and then that it goes on.
func (l *line) wantWhole() {
	l.Helper()
	l.wantHolders("line", l.holders...)
	l.wantWaiters("line", l.waiters...)
	l.wantCounts("line", 0, 2)
	l.wantNeverMoreThan(2)
	l.kubectl("delete", "pod", l.holders[0].Name, "--wait=false")
	l.wantStarted(time.Minute, l.waiters[0].Name)
	l.holders, l.waiters = append(l.holders[1:], l.waiters[0]), l.waiters[1:]
	l.wantHolders("line", l.holders...)
	l.wantWaiters("line", l.waiters...)
	l.wantNeverMoreThan(2)
	for _, p := range slices.Concat(l.holders, l.waiters) {
		p, err := l.get(p.Name)
		must(l.T, err)
		for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			if c.RestartCount > 0 {
				l.Errorf("%s: %s was restarted", p.Name, c.Name)
			}
		}
	}
}

// serverName is the name by which a pod of Redis is found.
func serverName(i int) string { return fmt.Sprintf("redis-%d.redis.%s.svc", i, hookNamespace) }

// primaryPod is the pod of Redis's primary.
func primaryPod(t *testing.T) string {
	t.Helper()
	out, err := hook("exec", "redis-0", "--", "sh", "/etc/redis/primary")
	must(t, err)
	name := strings.TrimSpace(out)
	if name == "" {
		t.Fatal("no Sentinel names a primary")
	}
	return name
}

// wantSettled waits until there is one primary, which all Sentinels name, and two replicas that are in sync with it. Two Sentinels may
// have promoted a replica each: then that takes some ten seconds more than the first admission, and what the one that loses has
// acknowledged is unknown to the other.
func wantSettled(t *testing.T) {
	t.Helper()
	eventually(t, 90*time.Second, func() error {
		var primaries, online int
		named := map[string]bool{}
		var said []string
		for i := range 3 {
			out, err := hook("exec", fmt.Sprintf("redis-%d", i), "--", "sh", "-c", `. /etc/redis/functions; named_by "$me"; redis 127.0.0.1 INFO replication`)
			if err != nil {
				return err
			}
			primary, info, _ := strings.Cut(out, "\n")
			named[primary] = true
			if strings.Contains(info, "role:master") {
				primaries++
				online = strings.Count(info, "state=online")
			}
			said = append(said, out)
		}
		if primaries != 1 || online != 2 || len(named) != 1 {
			return fmt.Errorf("%d primaries, %d replicas online, %d are named: %s", primaries, online, len(named), strings.Join(said, "\n"))
		}
		return nil
	})
	must(t, rolledOut("statefulset/redis"))
}

// testFailover lets something happen to the primary's pod, while pods are created and others hold tokens and wait for them.
// Those that are created later than that time after it must be admitted, also while it is mended.
func testFailover(t *testing.T, within time.Duration, fault func(primary string), mend ...func()) {
	t.Helper()
	wantSettled(t)
	n := newNamespace(t)
	t.Cleanup(func() { logRedis(n) })
	l := newLine(n)
	n.create(pod("idle", "idle", 2, unschedulable)) // nobody but Redis knows of its tokens
	n.wantCounts("idle", 1, 1)
	a := startAdmissions(n)
	a.wantAdmittedSince(time.Now())
	before, at := primaryPod(t), time.Now()
	fault(before)
	t.Logf("done with %s after %s", before, inSeconds(time.Since(at)))
	a.wantAdmittedSince(time.Now())
	for _, m := range mend {
		m()
	}
	wantSettled(t)
	a.wantAdmittedSince(time.Now())
	a.stop(at, within)
	t.Logf("the primary was %s, and is %s", before, primaryPod(t))
	n.wantCounts("idle", 1, 1)
	l.wantWhole()
}

// The primary is evicted, as when its node is drained: it hands over first.
func TestPrimaryEvicted(t *testing.T) {
	testFailover(t, 0, func(primary string) {
		eviction := object{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": object{"name": primary}}
		_, err := kubectl(encode(eviction), "create", "--raw", "/api/v1/namespaces/"+hookNamespace+"/pods/"+primary+"/eviction", "-f", "-")
		must(t, err)
		_, err = hook("wait", "--for=delete", "pod/"+primary, "--timeout=1m")
		must(t, err)
	})
}

// All are restarted one after the other, as when a setting of them is changed.
func TestRedisRollingRestart(t *testing.T) {
	testFailover(t, 0, func(string) {
		_, err := hook("rollout", "restart", "statefulset/redis")
		must(t, err)
		must(t, rolledOut("statefulset/redis"))
	})
	wantAtRest(t)
}

// The primary's pod is deleted by force: it comes back with another address.
func TestPrimaryDeletedByForce(t *testing.T) {
	testFailover(t, 15*time.Second, func(primary string) {
		_, err := hook("delete", "pod", primary, "--grace-period=0", "--force")
		must(t, err)
	})
}

// logRedis logs, if the test has failed, what the servers, the Sentinels and the sidecars say.
func logRedis(n *namespace) {
	if !n.Failed() {
		return
	}
	for i := range 3 {
		name := fmt.Sprintf("redis-%d", i)
		role, _ := hook("exec", name, "--", "sh", "-c", ". /etc/redis/functions; redis 127.0.0.1 INFO replication; known")
		server, _ := hook("logs", name, "--tail=30")
		sentinel, _ := hook("logs", name, "-c", "sentinel", "--tail=40")
		n.Logf("%s:\n%s\n%s\n%s", name, role, server, sentinel)
	}
	for i := range 5 {
		name := fmt.Sprintf("p-%d", i)
		log, _ := n.try("logs", name, "-c", sidecarName)
		n.Logf("%s:\n%s", name, log)
	}
}

// killRedis kills all servers of a pod of Redis.
func killRedis(t *testing.T, pod string) {
	t.Helper()
	uid, err := hook("get", "pod", pod, "-o", "jsonpath={.metadata.uid}")
	must(t, err)
	must(t, onNode(fmt.Sprintf(`for p in $(grep -lsE "%s|%s" /proc/[0-9]*/cgroup | cut -d/ -f3); do
		tr '\0' ' ' </proc/$p/cmdline | grep -q redis-server && kill -KILL $p && killed="$killed $p"
	done
	set -- $killed; test $# = 3 || { echo "killed: $*"; exit 1; }`, uid, strings.ReplaceAll(uid, "-", "_"))))
}

// The primary comes back at once, without its volume's contents: it does not empty the replicas, but waits until it is replaced.
func TestPrimaryLosesItsVolume(t *testing.T) {
	testFailover(t, 15*time.Second, func(primary string) {
		_, err := hook("exec", primary, "--", "sh", "-c", "rm -rf /data/*")
		must(t, err)
		killRedis(t, primary)
		eventually(t, time.Minute, func() error {
			log, err := hook("logs", primary)
			if err == nil && !strings.Contains(log, "nothing in /data") {
				err = errors.New(log)
			}
			return err
		})
	})
}

// The primary's node is lost: its kubelet says nothing, and all processes of the pod are gone.
func TestPrimaryNodeLost(t *testing.T) {
	resume := sync.OnceFunc(func() { must(t, onNode("pkill -CONT -x kubelet")) })
	defer resume()
	testFailover(t, 15*time.Second, func(primary string) {
		must(t, onNode("pkill -STOP -x kubelet"))
		killRedis(t, primary)
	}, resume)
}

// All three are gone at once. Where one that is not the primary comes back without its volume, it is the one that starts first by
// default, and knows of no other primary.
func TestAllRedisDeleted(t *testing.T) {
	remove := func(t *testing.T, flags ...string) {
		t.Helper()
		_, err := hook(append([]string{"delete", "pod", "-l", "app.kubernetes.io/component=redis"}, flags...)...)
		must(t, err)
	}
	t.Run("in good order", func(t *testing.T) {
		testFailover(t, time.Minute, func(string) { remove(t) })
	})
	t.Run("by force, without the first volume", func(t *testing.T) {
		if primaryPod(t) == "redis-0" {
			must(t, resign("redis-0"))
		}
		eventually(t, time.Minute, func() error {
			if primaryPod(t) == "redis-0" {
				return errors.New("redis-0 is the primary")
			}
			return errOf(hook("exec", "redis-0", "--", "sh", "/etc/redis/ready"))
		})
		testFailover(t, time.Minute, func(string) {
			_, err := hook("exec", "redis-0", "--", "sh", "-c", "rm -rf /data/*")
			must(t, err)
			remove(t, "--grace-period=0", "--force")
		})
	})
}
