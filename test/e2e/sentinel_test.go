//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Each of these tests replaces the primary of Redis, or stops a Sentinel.
func TestSentinels(t *testing.T) {
	t.Run("HandOverIsToldToAll", testHandOverIsToldToAll)
	t.Run("HandOverWaitsForReplicas", testHandOverWaitsForReplicas)
	t.Run("NoZombies", testRedisHasNoZombies)
	t.Run("BusyForNothing", testSentinelBusyForNothing)
}

// A Sentinel with a connection that was refused at first, and opened all the same, is
// busy for nothing. It restarts only when the other Sentinels are there: two must be, to
// replace a primary.
func testSentinelBusyForNothing(t *testing.T) {
	wantAtRest(t) // also after the faults that tests before have caused
	address, err := hook("get", "pod", "redis-0", "-o", "jsonpath={.status.podIP}")
	must(t, err)
	// The rule refuses the first SYN of a connection, and not the second. The quota is
	// for two SYNs of 60 bytes, one to each other Sentinel.
	rule := fmt.Sprintf("FORWARD -s %s -p tcp --dport 26379 --syn -m quota --quota 120 -j REJECT", address)
	for tries := 1; ; tries++ {
		must(t, onNode("iptables -I "+rule))
		remove := sync.OnceFunc(func() { must(t, onNode("iptables -D "+rule)) })
		t.Cleanup(remove)
		_, err = hook("exec", "redis-0", "-c", "sentinel", "--", "sh", "-c", "kill 1")
		must(t, err)
		var used int
		eventually(t, patience, func() error {
			used, err = usedBySentinel(0)
			return err
		})
		remove()
		t.Logf("it uses %d hundredths of a second in two seconds", used)
		if used >= 50 {
			break
		}
		if tries == 5 {
			t.Fatal("it was never busy for nothing")
		}
	}
	// Another Sentinel stands still.
	signal := func(name string) {
		_, err := hook("exec", "redis-1", "-c", "sentinel", "--", "sh", "-c", "kill -"+name+" "+sentinelProcess)
		must(t, err)
	}
	signal("STOP")
	resume := sync.OnceFunc(func() { signal("CONT") })
	t.Cleanup(resume)
	eventually(t, 2*patience, func() error {
		log, err := hook("logs", "redis-0", "-c", "sentinel")
		if err == nil && !strings.Contains(log, "busy for nothing, but needed: ") {
			err = errors.New(log)
		}
		return err
	})
	resume()
	wantAtRest(t)
	log, err := hook("logs", "redis-0", "-c", "sentinel", "--previous")
	if err != nil || !strings.Contains(log, "busy for nothing: ") {
		t.Errorf("it did not end itself: %v, %s", err, log)
	}
}

// cutOff drops or rejects the packets that one pod of Redis sends to the server of
// another, until the function that it returns is called, or the test ends.
func cutOff(t *testing.T, from, to, how string) (end func()) {
	t.Helper()
	var addresses []any
	for _, name := range []string{from, to} {
		address, err := hook("get", "pod", name, "-o", "jsonpath={.status.podIP}")
		must(t, err)
		addresses = append(addresses, address)
	}
	rule := fmt.Sprintf("FORWARD -s %s -d %s -p tcp --dport 6379 -j ", addresses...) + how
	must(t, onNode("iptables -I "+rule))
	end = sync.OnceFunc(func() { must(t, onNode("iptables -D "+rule)) })
	t.Cleanup(end)
	return end
}

// A primary that hands over names the next primary to all its replicas. Here, the
// Sentinels cannot reach the other replica, because packets get lost.
func testHandOverIsToldToAll(t *testing.T) {
	wantSettled(t)
	t.Cleanup(func() { wantSettled(t) })
	primary := primaryPod(t)
	others := otherPods(primary)
	cutOff(t, others[0], others[1], "DROP")
	cutOff(t, others[1], others[0], "DROP")
	for _, name := range others {
		eventually(t, patience, func() error {
			out, err := withFunctions(name, `sentinel "$me" SENTINEL REPLICAS tokens`)
			if err == nil && strings.Count(out, "last-ping-sent\n0\n") > 1 {
				err = fmt.Errorf("the Sentinel of %s reaches all replicas: %s", name, out)
			}
			return err
		})
	}
	start := time.Now()
	must(t, resign(primary))
	t.Logf("handed over after %s", inSeconds(time.Since(start)))
	wantHandedOver(t, primary)
}

// A primary takes writes until all replicas that may be promoted have its data. Only then
// it hands over.
func testHandOverWaitsForReplicas(t *testing.T) {
	wantSettled(t)
	t.Cleanup(func() { wantSettled(t) })
	primary := primaryPod(t)
	stats := func() (online, pauses int) {
		t.Helper()
		out, err := withFunctions(primary, "redis 127.0.0.1 INFO replication commandstats")
		must(t, err)
		if _, calls, found := strings.Cut(out, "cmdstat_client|pause:calls="); found {
			_, err = fmt.Sscan(calls[:strings.IndexByte(calls, ',')], &pauses)
			must(t, err)
		}
		return strings.Count(out, "state=online"), pauses
	}
	restore := cutOff(t, otherPods(primary)[1], primary, "REJECT")
	must(t, errOf(withFunctions(primary, "redis 127.0.0.1 CLIENT KILL TYPE replica")))
	eventually(t, patience, func() error {
		if online, _ := stats(); online != 1 {
			return fmt.Errorf("%d replicas are online", online)
		}
		return nil
	})
	_, before := stats()
	done := make(chan error, 1)
	go func() { done <- resign(primary) }()
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); { // it waits for 15 seconds
		select {
		case err := <-done:
			t.Fatalf("it has handed over: %v", err)
		default:
		}
		if _, pauses := stats(); pauses != before {
			t.Fatalf("it paused writes %d times", pauses-before)
		}
	}
	restore()
	must(t, <-done)
	wantHandedOver(t, primary)
}

// otherPods returns the pods of Redis apart from the primary.
func otherPods(primary string) (names []string) {
	for i := range 3 {
		if name := fmt.Sprintf("redis-%d", i); name != primary {
			names = append(names, name)
		}
	}
	return names
}

// withFunctions runs a script in a pod of Redis, with the functions of the scripts there.
func withFunctions(pod, script string) (string, error) {
	return hook("exec", pod, "--", "sh", "-c", ". /etc/redis/functions; "+script)
}

// resign makes the primary hand over.
func resign(primary string) error {
	return errOf(hook("exec", primary, "--", "sh", "/etc/redis/resign"))
}

// wantHandedOver checks that there is another primary, and that all other servers follow
// it.
func wantHandedOver(t *testing.T, before string) {
	t.Helper()
	primary := primaryPod(t)
	if primary == before {
		t.Errorf("%s is still the primary", before)
	}
	for i := range 3 {
		name := fmt.Sprintf("redis-%d", i)
		want := "slave " + primary
		if name == primary {
			want = "master"
		}
		got, err := withFunctions(name, `redis 127.0.0.1 ROLE | {
			read -r role && read -r primary
			for pod in $pods; do
				[ "$role $(address_of "$pod")" != "slave $primary" ] || role="slave $pod"
			done
			echo "$role"
		}`)
		if err != nil || strings.TrimSpace(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}

// Processes whose parents have ended do not stay in the containers of Redis. A server
// that is the first process there would read their ends one by one, and learn late that a
// replica has all data.
func testRedisHasNoZombies(t *testing.T) {
	for i := range 3 {
		name := fmt.Sprintf("redis-%d", i)
		for _, container := range []string{"redis", "sentinel", "lock"} {
			run := func(script string) (string, error) {
				return hook("exec", name, "-c", container, "--", "sh", "-c", script)
			}
			must(t, errOf(run("for i in 1 2 3 4 5; do (sleep 0.1 & exit); done")))
			eventually(t, patience, func() error {
				out, err := run("cat /proc/[0-9]*/stat 2>/dev/null; true")
				if err == nil && (strings.Contains(out, ") Z ") || !strings.Contains(out, "(redis-server)")) {
					err = fmt.Errorf("%s of %s has:\n%s", container, name, out)
				}
				return err
			})
		}
	}
}

// wantAtRest waits until each Sentinel takes less than a tenth of a processor. A busy
// Sentinel restarts within a minute.
func wantAtRest(t *testing.T) {
	t.Helper()
	eventually(t, patience, func() error {
		for i := range 3 {
			if used, err := usedBySentinel(i); err != nil || used >= 20 {
				return fmt.Errorf("the Sentinel of redis-%d used %d hundredths of a second in two seconds, %v", i, used, err)
			}
		}
		return nil
	})
}

// sentinelProcess is the process of Sentinel, for a shell in its container.
const sentinelProcess = "$(grep -lsx redis-server /proc/[0-9]*/comm | cut -d/ -f3)"

// usedBySentinel returns the processor time that a Sentinel takes in two seconds, in
// hundredths of a second.
func usedBySentinel(ordinal int) (int, error) {
	out, err := hook("exec", fmt.Sprintf("redis-%d", ordinal), "-c", "sentinel", "--", "sh", "-c", `pid=`+sentinelProcess+`
		used() { read -r stat </proc/$pid/stat; set -- ${stat##*) }; echo $((${12} + ${13})); }
		before=$(used); sleep 2; echo $(($(used) - before))`)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(out))
}
