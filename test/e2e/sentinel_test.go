//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// primaryPod returns the pod of the primary.
func primaryPod(t *testing.T) string {
	t.Helper()
	out, err := hook("exec", "redis-0", "--", "sh", "/etc/redis/primary.sh")
	must(t, err)
	name := strings.TrimSpace(out)
	if name == "" {
		t.Fatal("no Sentinel names a primary")
	}
	return name
}

// opinion is what one pod of Redis says.
type opinion struct {
	text    string // all of it
	named   string // the primary that its Sentinel names
	primary bool
	online  int // replicas, of a primary
	err     error
}

// opinions asks all pods of Redis at the same time.
func opinions() []opinion {
	all := make([]opinion, 3)
	var asked sync.WaitGroup
	for i := range all {
		asked.Go(func() {
			out, err := withFunctions(fmt.Sprintf("redis-%d", i), `opinion_of "$me"; redis 127.0.0.1 INFO replication`)
			said, info, _ := strings.Cut(out, "\n")
			_, named, _ := strings.Cut(said, " ") // after the epoch
			primary, online := strings.Contains(info, "role:master"), strings.Count(info, "state=online")
			all[i] = opinion{out, named, primary, online, err}
		})
	}
	asked.Wait()
	return all
}

// agreed returns nil if there is one primary with that number of replicas, and the
// Sentinels of at least that number of pods name it, and none another.
func agreed(pods, replicas int) error {
	var said strings.Builder
	answers, primaries, online := 0, 0, 0
	named := map[string]bool{}
	for _, o := range opinions() {
		if o.err != nil {
			fmt.Fprintln(&said, o.err)
			continue
		}
		answers++
		said.WriteString(o.text)
		named[o.named] = true
		if o.primary {
			primaries++
			online = o.online
		}
	}
	if answers < pods || primaries != 1 || online < replicas || len(named) != 1 {
		return fmt.Errorf("%d pods answer, %d primaries, %d replicas online, %d primaries are named: %s",
			answers, primaries, online, len(named), &said)
	}
	return nil
}

// wantSettled waits until all pods of Redis are ready, agree on one primary, and two
// replicas are in sync with it. Two Sentinels may have promoted a replica each. Then that
// takes ten seconds more than the first admission.
func wantSettled(t *testing.T) {
	t.Helper()
	eventually(t, patience, func() error { return agreed(3, 2) })
	must(t, rolledOut("statefulset/redis"))
}

// fault is something that happens to Redis.
type fault struct {
	cause  func(primary string)
	mend   func()      // ends the fault, unless nil
	outage bool        // admissions may fail, until the Sentinels agree on a primary
	lost   func() bool // whether the data may be lost; if nil, it may not
}

// maxOutage is the longest time without an admission after a fault. A Sentinel in TILT mode
// waits for half a minute; a replica must not wait for a minute (repl-timeout).
const maxOutage = 50 * time.Second

// failover causes a fault while pods are created, hold tokens and wait for them. It
// returns whether Redis still has all data.
func (l *line) failover(f fault) (whole bool) {
	l.Helper()
	wantSettled(l.T)
	l.Cleanup(func() { logRedis(l) })
	alone := fmt.Sprintf("alone-%d", l.made)
	l.create(pod(alone, alone, 2, held)) // only Redis knows of its token
	l.wantCounts(alone, 1, 1)
	s := startStream(l.namespace)
	s.wantAdmittedSince(time.Now())
	before, at := primaryPod(l.T), time.Now()
	f.cause(before)
	l.Logf("done with %s after %s", before, inSeconds(time.Since(at)))
	s.wantAdmittedSince(time.Now())
	if f.mend != nil {
		f.mend()
	}
	agreedAt := at
	if f.outage {
		eventually(l.T, patience, func() error { return agreed(2, 1) })
		s.wantAdmittedSince(time.Now())
		agreedAt = time.Now()
	}
	wantSettled(l.T)
	s.wantAdmittedSince(time.Now())
	if outage := s.wantAdmitted(at, agreedAt); outage > maxOutage {
		l.Errorf("no pod was admitted for %s, want at most %s", inSeconds(outage), maxOutage)
	}
	l.Logf("the primary was %s, and is %s", before, primaryPod(l.T))
	if f.lost != nil && f.lost() {
		return false
	}
	l.wantCounts(alone, 1, 1)
	l.wantWhole()
	return true
}

// TestSentinelFaults causes one fault of Redis after the other. The same pods hold tokens
// and wait all the time.
func TestSentinelFaults(t *testing.T) {
	if installed != sentinelFolder {
		t.Skip("the installation has no Sentinels; run \"make e2e-sentinel\"")
	}
	var l *line
	for _, f := range []struct {
		name string
		test func(l *line)
	}{
		{"PrimaryEvicted", testPrimaryEvicted},
		{"PrimaryDeletedByForce", testPrimaryDeletedByForce},
		{"PrimaryLosesItsVolume", testPrimaryLosesItsVolume},
		{"PrimaryNodeLost", testPrimaryNodeLost},
		{"AllDeleted", testAllRedisDeleted},
		{"AllDeletedByForce", testAllRedisDeletedByForce},
		{"RollingRestart", testRedisRollingRestart},
	} {
		if l == nil {
			l = newLine(newNamespace(t), 3)
		}
		if !t.Run(f.name, func(t *testing.T) {
			l.T = t
			f.test(l)
		}) || l.temporary {
			l = nil // its pods may have lost their places
			continue
		}
		l.T = t
	}
}

// The primary is evicted, as when its node is drained. It ends when its replicas have all
// data.
func testPrimaryEvicted(l *line) {
	l.failover(fault{outage: true, cause: func(primary string) {
		eviction := object{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": object{"name": primary}}
		path := "/api/v1/namespaces/" + hookNamespace + "/pods/" + primary + "/eviction"
		must(l.T, errOf(api.do(http.MethodPost, path, "application/json", eviction)))
		_, err := hook("wait", "--for=delete", "pod/"+primary, "--timeout="+patience.String())
		must(l.T, err)
	}})
}

// All pods are restarted one after the other, as when a setting changes.
func testRedisRollingRestart(l *line) {
	l.failover(fault{outage: true, cause: func(string) {
		_, err := hook("rollout", "restart", "statefulset/redis")
		must(l.T, err)
		must(l.T, rolledOut("statefulset/redis"))
	}})
}

// The primary's pod is deleted by force: it comes back with another address.
func testPrimaryDeletedByForce(l *line) {
	l.failover(fault{outage: true, cause: func(primary string) {
		_, err := hook("delete", "pod", primary, "--grace-period=0", "--force")
		must(l.T, err)
	}})
}

// The primary comes back at once, without the contents of its volume. It does not empty
// the replicas: it waits until it is replaced.
func testPrimaryLosesItsVolume(l *line) {
	l.failover(fault{outage: true, cause: func(primary string) {
		emptyVolume(l.T, primary)
		killRedis(l.T, primary)
		eventually(l.T, patience, func() error {
			log, err := hook("logs", primary)
			if err == nil && !strings.Contains(log, "nothing in /data") {
				err = errors.New(log)
			}
			return err
		})
	}})
}

// The primary's node is lost: its kubelet is silent, and all processes of the pod are
// gone.
func testPrimaryNodeLost(l *line) {
	resume := sync.OnceFunc(func() { must(l.T, onNode("pkill -CONT -x kubelet")) })
	defer resume()
	l.failover(fault{outage: true, mend: resume, cause: func(primary string) {
		must(l.T, onNode("pkill -STOP -x kubelet"))
		killRedis(l.T, primary)
	}})
}

// deleteRedis deletes all pods of Redis at the same time.
func deleteRedis(t *testing.T, flags ...string) {
	t.Helper()
	_, err := hook(append([]string{"delete", "pod", "-l", "app.kubernetes.io/component=redis"}, flags...)...)
	must(t, err)
}

// All pods end at the same time, in good order. Afterwards Redis still accepts the
// passwords of all sidecars.
func testAllRedisDeleted(l *line) {
	n := newNamespace(l.T)
	n.create(pod("old", "passwords", 2))
	n.wantRunning("old")
	n.newPassword()
	n.create(pod("new", "passwords", 2))
	n.wantRunning("new")
	l.failover(fault{outage: true, cause: func(string) { deleteRedis(l.T) }})
	n.wantCounts("passwords", 0, 2)
	n.delete("old", "new")
	n.wantCounts("passwords", 2, 0)
}

// All pods are gone at once, and redis-0, a replica, comes back without its volume. By
// default it starts as the first primary, and it knows of no other. It must learn of the
// other from the other Sentinels.
//
// On a slow node, the other primary comes back so late that the Sentinels replace it.
// They may take redis-0, which has no data yet. Then the test tries again.
func testAllRedisDeletedByForce(l *line) {
	const tries = 3
	for range tries {
		if primaryPod(l.T) == "redis-0" {
			must(l.T, errOf(withFunctions("redis-1", `sentinel "$me" SENTINEL FAILOVER tokens`)))
		}
		eventually(l.T, patience, func() error {
			if primaryPod(l.T) == "redis-0" {
				return errors.New("redis-0 is the primary")
			}
			return errOf(hook("exec", "redis-0", "--", "sh", "/etc/redis/ready.sh"))
		})
		address, err := withFunctions("redis-0", `echo "$me"`)
		must(l.T, err)
		if l.failover(fault{
			outage: true,
			cause: func(string) {
				emptyVolume(l.T, "redis-0")
				deleteRedis(l.T, "--grace-period=0", "--force")
			},
			lost: func() bool {
				log, err := hook("logs", "redis-0")
				must(l.T, err)
				if strings.Contains(log, "the primary is "+address) || !strings.Contains(log, "the primary is ") {
					l.Errorf("redis-0 started as the primary:\n%s", log)
				}
				return strings.Contains(log, "MASTER MODE enabled")
			},
		}) {
			return
		}
		l.Log("the Sentinels have promoted redis-0")
		*l = *newLine(newNamespace(l.T), 3)
		l.temporary = true
	}
	l.Errorf("the Sentinels have promoted redis-0 %d times", tries)
}

// withFunctions runs a script in a pod of Redis, with the functions of the scripts there.
func withFunctions(pod, script string) (string, error) {
	return hook("exec", pod, "--", "sh", "-c", ". /etc/redis/functions.sh; "+script)
}

// emptyVolume deletes all files of a pod of Redis. Just after a failover its Redis may be
// rewriting its data: it adds files to a folder while that is deleted, but not once the
// folder has another name.
func emptyVolume(t *testing.T, pod string) {
	t.Helper()
	must(t, errOf(hook("exec", pod, "--", "sh", "-c", "mv /data/appendonlydir /data/gone && rm -rf /data/*")))
}

// killRedis kills all servers of a pod of Redis, and the children that save data.
func killRedis(t *testing.T, pod string) {
	t.Helper()
	uid, err := hook("get", "pod", pod, "-o", "jsonpath={.metadata.uid}")
	must(t, err)
	must(t, onNode(fmt.Sprintf(`for p in $(grep -lsE "%s|%s" /proc/[0-9]*/cgroup | cut -d/ -f3); do
		tr '\0' ' ' </proc/$p/cmdline | grep -q redis-server && kill -KILL $p && killed="$killed $p"
	done
	set -- $killed; test $# -ge 3 || { echo "killed: $*"; exit 1; }`, uid, strings.ReplaceAll(uid, "-", "_"))))
}

// logRedis logs the words of the servers, Sentinels and sidecars if the test has failed.
func logRedis(l *line) {
	if !l.Failed() {
		return
	}
	for i := range 3 {
		name := fmt.Sprintf("redis-%d", i)
		role, _ := withFunctions(name, "redis 127.0.0.1 INFO replication; known")
		server, _ := hook("logs", name, "--tail=30")
		sentinel, _ := hook("logs", name, "-c", "sentinel", "--tail=40")
		l.Logf("%s:\n%s\n%s\n%s", name, role, server, sentinel)
	}
	for _, p := range slices.Concat(l.holders, l.waiters) {
		log, _ := l.try("logs", p.Name, "-c", sidecarName)
		l.Logf("%s:\n%s", p.Name, log)
	}
}
