//go:build e2e

package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const pods = 100 // that wait

// Costs of a hundred pods that wait in line for one token, compared with pods whose two
// init containers only sleep.
func TestMeasureWaitingPods(t *testing.T) {
	needMeasure(t)
	const period = time.Minute
	var rows strings.Builder
	row := func(name string, cost usage) {
		line := fmt.Sprintf("%-32s %9.1f %14.1f %9.1f %9.1f",
			name, 100*cost.cpu, 100*cost.kubernetes, cost.forks, cost.memory)
		t.Log(line)
		rows.WriteString("\n" + line)
	}
	row("no pods", measureNode(t, period))
	row("a sidecar and a container sleep", measurePods(t, period, func(p object) object {
		delete(p["metadata"].(object)["annotations"].(object), annotationPrefix+"at-least-semaphore-pod")
		maps.Copy(p["spec"].(object), object{"initContainers": []object{
			container("sidecar", "exec sleep 36000", object{"restartPolicy": "Always"}),
			container("await", "exec sleep 36000"),
		}})
		return p
	}, func(n *namespace) error {
		out, err := n.try("get", "pods", "-l", "app=waiter",
			"-o", "jsonpath={.items[*].status.initContainerStatuses[1].state.running.startedAt}")
		if got := len(strings.Fields(out)); err == nil && got != pods {
			err = fmt.Errorf("%d have begun", got)
		}
		return err
	}))
	row("they wait", measurePods(t, period, waiting, func(n *namespace) error {
		got, err := n.redis("node", "ZCARD 'waiters/{KEY}'")
		if err == nil && strings.Join(got, "") != fmt.Sprint(pods) {
			err = fmt.Errorf("%v are in line", got)
		}
		return err
	}))
	t.Logf("%d pods; CPU in %% of a core, of the whole node and of %s\n%-32s %9s %14s %9s %9s%s",
		pods, strings.Join(ofKubernetes, ", "), "", "CPU", "of Kubernetes", "forks/s", "MiB/pod", rows.String())
}

// usage is what a node spends: parts of a core, started processes and threads a second,
// and memory of a pod.
type usage struct{ cpu, kubernetes, forks, memory float64 }

// ofKubernetes are the processes of Kubernetes that work for pods.
var ofKubernetes = []string{"kubelet", "containerd", "containerd-shim", "kube-apiserver"}

// measureNode measures the node for some time.
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

// nodeTotals returns sums since the boot of the node.
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
			sum.cpu = (v[0] + v[1] + v[2] + v[5] + v[6] + v[7]) / 100 // neither idle nor waiting for a disk
		case name == "processes":
			sum.forks = v[0]
		case slices.Contains(ofKubernetes, name):
			sum.kubernetes += (v[11] + v[12] + v[13] + v[14]) / 100 // its own, and of children that it waited for
		}
	}
	return sum
}

// memoryAvailable returns that of the node, in MiB.
func memoryAvailable(t *testing.T) (mib float64) {
	t.Helper()
	out, err := nodeOutput("awk '/MemAvailable/ {print $2 / 1024}' /proc/meminfo")
	must(t, err)
	_, err = fmt.Sscan(out, &mib)
	must(t, err)
	return mib
}

// measurePods measures the node while there are pods that change makes of waiting ones,
// once they are ready.
func measurePods(t *testing.T, period time.Duration, change func(object) object, ready func(*namespace) error) usage {
	t.Helper()
	n := newNamespace(t)
	n.create(waiting(pod("holder", "node", 1)))
	n.wantRunning("holder")
	available := memoryAvailable(t)
	labels := object{"app": "waiter"}
	p := change(pod("waiter", "node", 1, object{"terminationGracePeriodSeconds": 1}))
	p["metadata"].(object)["labels"] = labels
	n.create(object{"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": object{"name": "waiters"}, "spec": object{
		"replicas": pods, "selector": object{"matchLabels": labels},
		"template": object{"metadata": p["metadata"], "spec": p["spec"]},
	}})
	eventually(t, 5*time.Minute, func() error { return ready(n) })
	measureNode(t, period) // let the starts settle
	cost := measureNode(t, period)
	cost.memory = (available - memoryAvailable(t)) / float64(pods)
	n.kubectl("delete", "replicaset", "waiters", "--cascade=foreground", "--timeout=5m")
	return cost
}
