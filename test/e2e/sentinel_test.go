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

// A Sentinel that is busy for nothing, as one of its connections was refused at first, and came about all the same, starts anew: when the
// others are there, as two of them must be where the primary fails.
func TestSentinelBusyForNothing(t *testing.T) {
	wantAtRest(t)
	address, err := hook("get", "pod", "redis-0", "-o", "jsonpath={.status.podIP}")
	must(t, err)
	// The first SYN of a connection is refused, and not the second; two of 60 bytes are for the other two Sentinels.
	rule := fmt.Sprintf("FORWARD -s %s -p tcp --dport 26379 --syn -m quota --quota 120 -j REJECT", address)
	for tries := 1; ; tries++ {
		must(t, onNode("iptables -I "+rule))
		remove := sync.OnceFunc(func() { must(t, onNode("iptables -D "+rule)) })
		t.Cleanup(remove)
		_, err = hook("exec", "redis-0", "-c", "sentinel", "--", "sh", "-c", "kill 1")
		must(t, err)
		var used int
		eventually(t, time.Minute, func() error {
			used, err = usedBySentinel(0)
			return err
		})
		remove()
		t.Logf("it uses %d hundredths of a second within two seconds", used)
		if used >= 50 {
			break
		}
		if tries == 5 {
			t.Fatal("it was never busy for nothing")
		}
	}
	// Another one stands still.
	signal := func(name string) {
		_, err := hook("exec", "redis-1", "-c", "sentinel", "--", "sh", "-c", "kill -"+name+" "+sentinelProcess)
		must(t, err)
	}
	signal("STOP")
	resume := sync.OnceFunc(func() { signal("CONT") })
	t.Cleanup(resume)
	eventually(t, 90*time.Second, func() error {
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

// A primary that hands over tells all its replicas of the next one, also one that the Sentinels do not reach: here, as the packets of
// their connections get lost, so that they find out only by and by.
func TestHandOverIsToldToAll(t *testing.T) {
	wantSettled(t)
	t.Cleanup(func() { wantSettled(t) })
	primary := primaryPod(t)
	others := otherPods(primary)
	var addresses []string
	for _, name := range others {
		address, err := hook("get", "pod", name, "-o", "jsonpath={.status.podIP}")
		must(t, err)
		addresses = append(addresses, address)
	}
	for i := range others {
		rule := fmt.Sprintf("FORWARD -s %s -d %s -p tcp --dport 6379 -j DROP", addresses[i], addresses[1-i])
		must(t, onNode("iptables -I "+rule))
		t.Cleanup(func() { must(t, onNode("iptables -D "+rule)) })
	}
	for _, name := range others {
		eventually(t, 10*time.Second, func() error {
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

// A primary hands over when all replicas that may be promoted have got its data, and takes writes until then.
func TestHandOverWaitsForReplicas(t *testing.T) {
	wantSettled(t)
	t.Cleanup(func() { wantSettled(t) })
	primary := primaryPod(t)
	away := otherPods(primary)[1]
	follow := func(address string) {
		t.Helper()
		out, err := withFunctions(away, "redis 127.0.0.1 REPLICAOF "+address+" 6379")
		must(t, err)
		if strings.TrimSpace(out) != "OK" {
			t.Fatal(out)
		}
	}
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
	address, err := withFunctions(primary, `echo "$me"`)
	must(t, err)
	follow("192.0.2.1") // nobody has this one (RFC 5737)
	eventually(t, 10*time.Second, func() error {
		if online, _ := stats(); online != 1 {
			return fmt.Errorf("%d replicas are online", online)
		}
		return nil
	})
	_, before := stats()
	done := make(chan error, 1)
	go func() { done <- resign(primary) }()
	const looks = 10
	for range looks {
		select {
		case err := <-done:
			t.Fatalf("it has handed over: %v", err)
		default:
		}
		if _, pauses := stats(); pauses != before {
			t.Fatalf("it took no writes for a while: CLIENT PAUSE was called %d times more", pauses-before)
		}
	}
	follow(strings.TrimSpace(address))
	must(t, <-done)
	wantHandedOver(t, primary)
}

// otherPods are those of Redis that are not the primary.
func otherPods(primary string) (names []string) {
	for i := range 3 {
		if name := fmt.Sprintf("redis-%d", i); name != primary {
			names = append(names, name)
		}
	}
	return names
}

// withFunctions runs a script in a pod of Redis, with what the scripts there share.
func withFunctions(pod, script string) (string, error) {
	return hook("exec", pod, "--", "sh", "-c", ". /etc/redis/functions; "+script)
}

// resign lets the primary hand over.
func resign(primary string) error {
	return errOf(hook("exec", primary, "--", "sh", "/etc/redis/resign"))
}

// wantHandedOver checks that there is another primary, and that all follow it.
func wantHandedOver(t *testing.T, before string) {
	t.Helper()
	primary := primaryPod(t)
	if primary == before {
		t.Errorf("%s is the primary still", before)
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

// Processes whose parents have ended, as each probe may leave one, do not stay behind in the containers of Redis: a server that is the
// first process there would read their ends one by one before it notices that a replica has got all data.
func TestRedisHasNoZombies(t *testing.T) {
	for i := range 3 {
		name := fmt.Sprintf("redis-%d", i)
		for _, container := range []string{"redis", "sentinel", "lock"} {
			_, err := hook("exec", name, "-c", container, "--", "sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.1 & exit); done")
			must(t, err)
			eventually(t, 10*time.Second, func() error {
				out, err := hook("exec", name, "-c", container, "--", "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null; true")
				if err == nil && (strings.Contains(out, ") Z ") || !strings.Contains(out, "(redis-server)")) {
					err = fmt.Errorf("%s of %s has:\n%s", container, name, out)
				}
				return err
			})
		}
	}
}

// wantAtRest waits until each Sentinel takes less than a tenth of a processor: one that is busy for nothing ends itself within a minute.
func wantAtRest(t *testing.T) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		for i := range 3 {
			if used, err := usedBySentinel(i); err != nil || used >= 20 {
				return fmt.Errorf("the Sentinel of redis-%d has used %d hundredths of a second within two seconds, %v", i, used, err)
			}
		}
		return nil
	})
}

// sentinelProcess is the process of Sentinel, in a shell of its container.
const sentinelProcess = "$(grep -lsx redis-server /proc/[0-9]*/comm | cut -d/ -f3)"

// usedBySentinel is how much of a processor one uses within two seconds, in hundredths of a second.
func usedBySentinel(ordinal int) (int, error) {
	out, err := hook("exec", fmt.Sprintf("redis-%d", ordinal), "-c", "sentinel", "--", "sh", "-c",
		`pid=`+sentinelProcess+`; used() { read -r stat </proc/$pid/stat; set -- ${stat##*) }; echo $((${12} + ${13})); }; before=$(used); sleep 2; echo $(($(used) - before))`)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(out))
}
