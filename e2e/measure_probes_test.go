//go:build e2e && measure

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What it costs the node that a hundred pods wait, by the kind of their startup probe. All run the same container, the sidecar
// that the webhook injects, and wait in line for one token; only the probe differs.
func TestMeasureProbes(t *testing.T) {
	const pods, period = 100, time.Minute
	out, err := hook("get", "pods", "-l", "app.kubernetes.io/component=webhook", "-o", "jsonpath={.items[0].status.podIP}")
	must(t, err)
	var rows strings.Builder
	row := func(name string, cost usage) {
		line := fmt.Sprintf("%-44s %9.1f %14.1f %9.1f %9.1f", name, 100*cost.cpu, 100*cost.kubernetes, cost.forks, cost.memory)
		t.Log(line)
		rows.WriteString("\n" + line)
	}
	row("nothing waits", measureNode(t, period))
	for _, v := range []struct {
		name  string
		probe func(injected object) object
	}{
		{"no probe", func(object) object { return nil }},
		{"ours", func(injected object) object { return injected }},
		{"exec of a program that fails, each second", func(object) object {
			return object{"exec": object{"command": []string{"/at-least-semaphore-pod-hook", "no-such-mode"}}}
		}},
		{"tcpSocket that is refused, each second", func(object) object { return object{"tcpSocket": object{"port": 9}} }},
		{"httpGet that is answered 404, each second", func(object) object {
			return object{"httpGet": object{"host": out, "port": 8080, "path": "/no-such-page"}}
		}},
	} {
		row(v.name, measureWaiters(t, pods, period, v.probe))
	}
	t.Logf("%d waiting pods; CPU in %% of a core, of the whole node and of %s\n%-44s %9s %14s %9s %9s%s",
		pods, strings.Join(ofKubernetes, ", "), "startup probe", "CPU", "of Kubernetes", "forks/s", "MiB/pod", rows.String())
}

// usage is what a node spends: parts of a core, processes and threads started in a second, and memory of a pod.
type usage struct{ cpu, kubernetes, forks, memory float64 }

// ofKubernetes are processes that work for probes. What a probe runs counts for the shim, which waits for it.
var ofKubernetes = []string{"kubelet", "containerd", "containerd-shim", "kube-apiserver"}

// measureNode watches the node for some time.
func measureNode(t *testing.T, period time.Duration) usage {
	t.Helper()
	before, start := nodeTotals(t), uptime(t)
	time.Sleep(period)
	after, seconds := nodeTotals(t), (uptime(t) - start).Seconds()
	return usage{
		cpu:        (after.cpu - before.cpu) / seconds,
		kubernetes: (after.kubernetes - before.kubernetes) / seconds,
		forks:      (after.forks - before.forks) / seconds,
	}
}

// nodeTotals are sums since the node was booted.
func nodeTotals(t *testing.T) (sum usage) {
	t.Helper()
	out, err := nodeOutput("cat /proc/stat; cat /proc/[0-9]*/stat 2>/dev/null; true")
	must(t, err)
	for line := range strings.Lines(out) {
		name, rest, _ := strings.Cut(line, " ")
		if _, after, ok := strings.Cut(rest, ") "); ok { // a process
			name, rest = strings.TrimPrefix(strings.TrimSuffix(rest, ") "+after), "("), after
		}
		var v []float64 // in hundredths of a second
		for _, word := range strings.Fields(rest) {
			number, _ := strconv.ParseFloat(word, 64)
			v = append(v, number)
		}
		switch {
		case name == "cpu":
			sum.cpu = (v[0] + v[1] + v[2] + v[5] + v[6] + v[7]) / 100 // not idle, not waiting for a disk
		case name == "processes":
			sum.forks = v[0]
		case slices.Contains(ofKubernetes, name):
			sum.kubernetes += (v[11] + v[12] + v[13] + v[14]) / 100 // its own, and what it has waited for
		}
	}
	return sum
}

// memoryAvailable is that of the node, in MiB.
func memoryAvailable(t *testing.T) (mib float64) {
	t.Helper()
	out, err := nodeOutput("awk '/MemAvailable/ {print $2 / 1024}' /proc/meminfo")
	must(t, err)
	_, err = fmt.Sscan(out, &mib)
	must(t, err)
	return mib
}

// measureWaiters measures the node while so many sidecars wait, each with the probe that is made from the injected one.
func measureWaiters(t *testing.T, pods int, period time.Duration, probe func(injected object) object) usage {
	t.Helper()
	n := newNamespace(t)
	n.create(waiting(pod("holder", "probes", 1)))
	n.wantRunning("holder")
	available := memoryAvailable(t)
	n.create(object{"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": object{"name": "waiters"}, "spec": object{
		"replicas": pods, "selector": object{"matchLabels": object{"app": "waiter"}},
		"template": object{"metadata": object{"labels": object{"app": "waiter"}}, "spec": object{
			"terminationGracePeriodSeconds": 1, "containers": []object{injectedContainer(n, probe)},
		}},
	}})
	eventually(t, 5*time.Minute, func() error {
		got, err := n.redis("probes", "ZCARD 'waiters/{KEY}'")
		if err == nil && strings.Join(got, "") != fmt.Sprint(pods) {
			err = fmt.Errorf("%v are in line", got)
		}
		return err
	})
	measureNode(t, period) // let the starts settle
	cost := measureNode(t, period)
	cost.memory = (available - memoryAvailable(t)) / float64(pods)
	n.kubectl("delete", "replicaset", "waiters", "--cascade=foreground", "--timeout=5m")
	return cost
}

// injectedContainer is the sidecar of a waiting pod as a container for pods that are not annotated.
func injectedContainer(n *namespace, probe func(injected object) object) object {
	n.Helper()
	out, err := kubectl(encode(waiting(pod("waiter", "probes", 1))), "-n", n.name, "create", "--dry-run=server", "-f", "-", "-o", "json")
	must(n.T, err)
	var p struct {
		Spec struct{ InitContainers []object }
	}
	must(n.T, json.Unmarshal([]byte(out), &p))
	c := p.Spec.InitContainers[0]
	delete(c, "restartPolicy")
	delete(c, "volumeMounts")
	injected, _ := c["startupProbe"].(object)
	delete(c, "startupProbe")
	if other := probe(injected); other != nil {
		c["startupProbe"] = maps.Clone(other)
		if _, ok := other["timeoutSeconds"]; !ok {
			maps.Copy(c["startupProbe"].(object), object{"periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": math.MaxInt32})
		}
	}
	return c
}
