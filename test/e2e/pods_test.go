//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

const (
	annotationPrefix = "at-least-semaphore-pod-hook.kaidotio.github.io/"
	sidecarName      = "at-least-semaphore-pod-sidecar"
	awaitName        = "at-least-semaphore-pod-await"
)

// object is a Kubernetes object, or a part of one.
type object = map[string]any

// namespace is a namespace of a test's own.
type namespace struct {
	*testing.T
	name string
}

// newNamespace makes a namespace whose sidecars can log in to Redis.
func newNamespace(t *testing.T, labels ...string) *namespace {
	t.Helper()
	n := forgottenNamespace(t, labels...)
	n.enable()
	return n
}

// enable lets sidecars of the namespace log in to Redis.
func (n *namespace) enable(flags ...string) {
	n.Helper()
	must(n.T, shell("deploy/namespace.sh "+strings.Join(append(flags, n.name), " ")))
}

// forgottenNamespace makes one whose sidecars cannot.
func forgottenNamespace(t *testing.T, labels ...string) *namespace {
	t.Helper()
	n := &namespace{t, fmt.Sprintf("e2e-%08x", rand.Uint32())}
	_, err := kubectl("", "create", "namespace", n.name)
	must(t, err)
	n.kubectl(append([]string{"label", "namespace", n.name, "e2e=at-least-semaphore-pod-hook"}, labels...)...)
	t.Cleanup(func() {
		if t.Failed() {
			pods, _ := n.try("get", "pods", "-o", "wide")
			events, _ := n.try("get", "events")
			t.Logf("%s:\n%s\n%s", n.name, pods, events)
		}
		_, _ = kubectl("", "delete", "namespace", n.name, "--wait=false")
	})
	eventually(t, 30*time.Second, func() error { return errOf(n.try("get", "serviceaccount", "default")) })
	return n
}

func errOf(_ string, err error) error { return err }

// try is kubectl in the namespace.
func (n *namespace) try(args ...string) (string, error) {
	return kubectl("", append([]string{"-n", n.name}, args...)...)
}

// kubectl is try that must succeed.
func (n *namespace) kubectl(args ...string) string {
	n.Helper()
	out, err := n.try(args...)
	must(n.T, err)
	return out
}

func (n *namespace) tryCreate(o object, flags ...string) error {
	return errOf(kubectl(encode(o), append([]string{"-n", n.name, "create", "-f", "-"}, flags...)...))
}

func (n *namespace) create(o object) {
	n.Helper()
	must(n.T, n.tryCreate(o))
}

func encode(o object) string {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// annotations are those of a pod that shares a key.
func annotations(key string, length int) object {
	return object{
		annotationPrefix + "at-least-semaphore-pod": "true",
		annotationPrefix + "key":                    key,
		annotationPrefix + "length":                 strconv.Itoa(length),
		annotationPrefix + "expiration":             "5",
	}
}

// container is one that runs a shell script.
func container(name, script string, more ...object) object {
	c := object{"name": name, "image": "busybox", "command": []string{"sh", "-c", script}}
	for _, m := range more {
		maps.Copy(c, m)
	}
	return c
}

// forever is a script that ends at once when it is told to.
const forever = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done"

// pod is an annotated pod that runs until it is deleted; spec replaces parts of its spec.
func pod(name, key string, length int, spec ...object) object {
	s := object{"terminationGracePeriodSeconds": 20, "containers": []object{container("app", forever)}}
	for _, m := range spec {
		maps.Copy(s, m)
	}
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": name, "annotations": annotations(key, length)}, "spec": s}
}

// waiting makes a pod, or those of a workload, wait in line for their token.
func waiting(o object) object { return whenFull(o, "wait") }

// gated makes them wait for it unscheduled.
func gated(o object) object { return whenFull(o, "gate") }

func whenFull(o object, value string) object {
	template := o
	if spec := o["spec"].(object); spec["template"] != nil {
		template = spec["template"].(object)
	}
	template["metadata"].(object)["annotations"].(object)[annotationPrefix+"when-full"] = value
	return o
}

// unschedulable keeps a pod Pending: it is admitted and then costs nothing.
var unschedulable = object{"nodeSelector": object{"there-is": "no-such-node"}}

func (n *namespace) get(name string) (corev1.Pod, error) {
	var p corev1.Pod
	out, err := n.try("get", "pod", name, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &p)
	}
	return p, err
}

// wantRunning waits until all containers of a pod are ready, and returns the pod.
func (n *namespace) wantRunning(name string) corev1.Pod {
	n.Helper()
	var p corev1.Pod
	eventually(n.T, time.Minute, func() (err error) {
		if p, err = n.get(name); err != nil {
			return err
		}
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("%s is %s: %s", name, p.Status.Phase, encode(object{"init": p.Status.InitContainerStatuses, "containers": p.Status.ContainerStatuses}))
	})
	return p
}

// wantWaiting waits until a pod's sidecar runs and its second init container waits for the token, and returns the pod.
func (n *namespace) wantWaiting(name string) corev1.Pod {
	n.Helper()
	var p corev1.Pod
	eventually(n.T, time.Minute, func() (err error) {
		if p, err = n.get(name); err != nil {
			return err
		}
		for _, c := range p.Status.InitContainerStatuses {
			if c.Name == awaitName && c.State.Running != nil && p.Status.InitContainerStatuses[0].State.Running != nil {
				return nil
			}
		}
		return fmt.Errorf("%s is %s: %s", name, p.Status.Phase, encode(object{"init": p.Status.InitContainerStatuses}))
	})
	return p
}

// wantStartedAgain waits until an init container of a pod, which was killed, runs again.
func (n *namespace) wantStartedAgain(name, container string) {
	n.Helper()
	eventually(n.T, time.Minute, func() error {
		p, err := n.get(name)
		if err != nil {
			return err
		}
		for _, c := range p.Status.InitContainerStatuses {
			if c.Name == container && c.RestartCount == 1 && c.State.Running != nil {
				return nil
			}
		}
		return fmt.Errorf("%s is %s: %s", name, p.Status.Phase, encode(object{"init": p.Status.InitContainerStatuses}))
	})
}

// wantGone waits until a pod is gone.
func (n *namespace) wantGone(name string) {
	n.Helper()
	eventually(n.T, time.Minute, func() error {
		out, err := n.try("get", "pod", name, "--ignore-not-found", "-o", "name")
		if err == nil && out != "" {
			err = fmt.Errorf("%s is still there", name)
		}
		return err
	})
}

// wantRefused creates a pod that must be refused, and returns the message.
func (n *namespace) wantRefused(o object) string {
	n.Helper()
	err := n.tryCreate(o)
	if err == nil {
		n.Fatal("the pod was not refused")
	}
	return err.Error()
}

// wantFull creates a pod that must be refused for want of a token.
func (n *namespace) wantFull(name, key string, length, inUse int) {
	n.Helper()
	want := fmt.Sprintf("denied the request: no semaphore available: %s/%s has %d of %d tokens in use", n.name, key, inUse, length)
	if got := n.wantRefused(pod(name, key, length)); !strings.Contains(got, want) {
		n.Fatalf("refused with %q, want %q", got, want)
	}
}

// wantAdmittedWithin creates a pod that is refused until a token is free.
func (n *namespace) wantAdmittedWithin(within time.Duration, o object) {
	n.Helper()
	eventually(n.T, within, func() error { return n.tryCreate(o) })
}

// redis runs commands of Redis, in which KEY stands for a semaphore, and returns the words of their answers.
func (n *namespace) redis(key string, commands ...string) ([]string, error) {
	script := ":"
	for _, c := range commands {
		script += "; sh /etc/redis/cli " + strings.ReplaceAll(c, "KEY", n.name+"/"+key)
	}
	out, err := hook("exec", "redis-0", "--", "sh", "-c", script)
	return strings.Fields(out), err
}

// counts are the numbers of free and of used tokens.
func (n *namespace) counts(key string) (queue, inflight int, err error) {
	out, err := n.redis(key, "LLEN 'queue/{KEY}'", "ZCARD 'inflight/{KEY}'")
	if err == nil {
		_, err = fmt.Sscan(strings.Join(out, " "), &queue, &inflight)
	}
	return queue, inflight, err
}

// wantWaiters waits until these pods, which are in wait mode, are in line, in this order.
func (n *namespace) wantWaiters(key string, pods ...corev1.Pod) {
	n.Helper()
	n.wantWaitersWithin(30*time.Second, key, pods...)
}

func (n *namespace) wantWaitersWithin(within time.Duration, key string, pods ...corev1.Pod) {
	n.Helper()
	var want []string
	for _, p := range pods {
		want = append(want, string(p.UID))
	}
	eventually(n.T, within, func() error {
		got, err := n.redis(key, "ZRANGE 'waiters/{KEY}' 0 -1")
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("in line: %v; want %v", got, want)
		}
		return err
	})
}

// wantHolders waits until the tokens of these pods in wait mode, and no others, are in flight.
func (n *namespace) wantHolders(key string, pods ...corev1.Pod) {
	n.Helper()
	want := map[string]bool{}
	for _, p := range pods {
		want[string(p.UID)] = true
	}
	eventually(n.T, 30*time.Second, func() error {
		tokens, err := n.redis(key, "ZRANGE 'inflight/{KEY}' 0 -1")
		got := map[string]bool{}
		for _, token := range tokens {
			got[token] = true
		}
		if err == nil && !maps.Equal(got, want) {
			err = fmt.Errorf("in flight: %v; want %v", tokens, want)
		}
		return err
	})
}

// wantCounts waits until so many tokens are free and in use.
func (n *namespace) wantCounts(key string, queue, inflight int) {
	n.Helper()
	eventually(n.T, 30*time.Second, func() error {
		q, i, err := n.counts(key)
		if err == nil && (q != queue || i != inflight) {
			err = fmt.Errorf("queue %d, inflight %d; want %d, %d", q, i, queue, inflight)
		}
		return err
	})
}

// wantOneSidecar checks that a pod has exactly one sidecar, the native one, first, and second what awaits its token.
func (n *namespace) wantOneSidecar(p corev1.Pod) {
	n.Helper()
	count := 0
	for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
		if c.Name == sidecarName {
			count++
		}
	}
	if count != 1 || p.Spec.InitContainers[0].Name != sidecarName || p.Spec.InitContainers[1].Name != awaitName {
		n.Errorf("%s has %d sidecars; its init containers are %s", p.Name, count, encode(object{"init": p.Spec.InitContainers}))
	}
}
