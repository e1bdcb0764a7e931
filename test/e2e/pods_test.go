//go:build e2e

package e2e

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

const (
	annotationPrefix = "at-least-semaphore-pod-hook.kaidotio.github.io/"
	sidecarName      = "at-least-semaphore-pod-sidecar"
	awaitName        = "at-least-semaphore-pod-await"

	// The API server begins the webhook's refusals with this.
	denied = `admission webhook "at-least-semaphore-pod-hook.kaidotio.github.io" denied the request: `
)

// object is a Kubernetes object, or a part of one.
type object = map[string]any

// namespace is the namespace of one test.
type namespace struct {
	*testing.T
	name string
}

// newNamespace makes a namespace whose sidecars may log in to Redis.
func newNamespace(t *testing.T, labels ...string) *namespace {
	t.Helper()
	n := forgottenNamespace(t, labels...)
	n.enable()
	return n
}

const labelSidecars = annotationPrefix + "sidecars"

// enable labels the namespace, and waits until its sidecars have a user in Redis.
func (n *namespace) enable() {
	n.Helper()
	must(n.T, errOf(api.do(http.MethodPatch, "/api/v1/namespaces/"+n.name, "application/merge-patch+json",
		object{"metadata": object{"labels": object{labelSidecars: "true"}}})))
	eventually(n.T, patience, func() error {
		return errOf(api.do(http.MethodGet, "/api/v1/namespaces/"+n.name+"/secrets/at-least-semaphore-pod-redis", "", nil))
	})
}

// forgottenNamespace makes a namespace whose sidecars have no user in Redis.
func forgottenNamespace(t *testing.T, labels ...string) *namespace {
	t.Helper()
	n := &namespace{t, fmt.Sprintf("e2e-%08x", rand.Uint32())}
	all := object{"e2e": "at-least-semaphore-pod-hook"}
	for _, l := range labels {
		name, value, _ := strings.Cut(l, "=")
		all[name] = value
	}
	must(t, api.create("", object{
		"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": n.name, "labels": all},
	}))
	t.Cleanup(func() {
		if t.Failed() {
			pods, _ := n.try("get", "pods", "-o", "wide")
			events, _ := n.try("get", "events")
			t.Logf("%s:\n%s\n%s", n.name, pods, events)
		}
		_, _ = api.do(http.MethodDelete, "/api/v1/namespaces/"+n.name, "", nil)
	})
	eventually(t, patience, func() error {
		return errOf(api.do(http.MethodGet, "/api/v1/namespaces/"+n.name+"/serviceaccounts/default", "", nil))
	})
	return n
}

func errOf[T any](_ T, err error) error { return err }

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

func (n *namespace) tryCreate(o object) error { return api.create(n.name, o) }

// createWarned creates an object with kubectl, and returns the warnings that users see.
func (n *namespace) createWarned(o object, flags ...string) (warnings string, err error) {
	_, warnings, err = kubectlWarned(encode(o), append([]string{"-n", n.name, "create", "-f", "-"}, flags...)...)
	return warnings, err
}

// create creates an object. Like a controller it tries again while Redis does not know its
// holders yet, or a busy node does not let the webhook reach Redis in time.
func (n *namespace) create(o object) {
	n.Helper()
	eventually(n.T, patience, func() error {
		err := n.tryCreate(o)
		if err != nil && !strings.Contains(err.Error(), "Redis has just started") &&
			!strings.Contains(err.Error(), "out of reach: context deadline exceeded") {
			n.Fatal(err)
		}
		return err
	})
}

func encode(o object) string {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// annotations returns those of a pod of a semaphore.
func annotations(key string, length int) object {
	return object{
		annotationPrefix + "at-least-semaphore-pod": "true",
		annotationPrefix + "key":                    key,
		annotationPrefix + "length":                 strconv.Itoa(length),
		annotationPrefix + "expiration":             "5",
	}
}

// container returns a container that runs a shell script.
func container(name, script string, more ...object) object {
	c := object{"name": name, "image": "busybox", "command": []string{"sh", "-c", script}}
	for _, m := range more {
		maps.Copy(c, m)
	}
	return c
}

// idle is work without an end, and forever a script that ends at SIGTERM.
const (
	idle    = "while :; do sleep 1 & wait $!; done"
	forever = "trap 'exit 0' TERM; " + idle
)

// pod returns an annotated pod that runs until it is deleted. spec replaces parts of its
// spec.
func pod(name, key string, length int, spec ...object) object {
	s := object{"terminationGracePeriodSeconds": 20, "containers": []object{container("app", forever)}}
	for _, m := range spec {
		maps.Copy(s, m)
	}
	return object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": name, "annotations": annotations(key, length)}, "spec": s,
	}
}

// waiting makes a pod, or the pods of a workload, wait in line for a token.
func waiting(o object) object { return whenFull(o, "wait") }

// gated makes them wait unscheduled.
func gated(o object) object { return whenFull(o, "gate") }

func whenFull(o object, value string) object {
	template := o
	if spec := o["spec"].(object); spec["template"] != nil {
		template = spec["template"].(object)
	}
	template["metadata"].(object)["annotations"].(object)[annotationPrefix+"when-full"] = value
	return o
}

// unschedulable is the spec of a pod that finds no node.
var unschedulable = object{"nodeSelector": object{"there-is": "no-such-node"}}

// held is the spec of a pod that is admitted and then costs nothing: the scheduler
// ignores it.
var held = object{"schedulingGates": []object{{"name": "e2e/held"}}}

func (n *namespace) get(name string) (corev1.Pod, error) {
	var p corev1.Pod
	err := api.get(n.path()+"/"+name, &p)
	return p, err
}

// path returns that of the namespace's pods.
func (n *namespace) path() string { return "/api/v1/namespaces/" + n.name + "/pods" }

// end deletes pods and does not wait until they are gone.
func (n *namespace) end(names ...string) {
	n.Helper()
	for _, name := range names {
		_, err := api.do(http.MethodDelete, n.path()+"/"+name, "", nil)
		must(n.T, err)
	}
}

// delete deletes pods and waits until they are gone.
func (n *namespace) delete(names ...string) {
	n.Helper()
	n.end(names...)
	for _, name := range names {
		n.wantGone(name)
	}
}

// wantRunning waits until a pod is ready and returns it.
func (n *namespace) wantRunning(name string) corev1.Pod {
	n.Helper()
	var p corev1.Pod
	eventually(n.T, patience, func() (err error) {
		if p, err = n.get(name); err != nil {
			return err
		}
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("%s is %s: %s", name, p.Status.Phase, encode(object{
			"init": p.Status.InitContainerStatuses, "containers": p.Status.ContainerStatuses,
		}))
	})
	return p
}

// wantWaiting waits until a pod's sidecar runs and its second init container waits for
// the token. It returns the pod.
func (n *namespace) wantWaiting(name string) corev1.Pod {
	n.Helper()
	var p corev1.Pod
	eventually(n.T, patience, func() (err error) {
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

// wantStartedAgain waits until a killed init container of a pod runs again.
func (n *namespace) wantStartedAgain(name, container string) {
	n.Helper()
	eventually(n.T, patience, func() error {
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
	eventually(n.T, patience, func() error {
		_, err := n.get(name)
		if refused := new(refusal); errors.As(err, &refused) && refused.code == http.StatusNotFound {
			return nil
		}
		return cmp.Or(err, fmt.Errorf("%s is still there", name))
	})
}

// wantRefused creates a pod that must be refused. It returns the message.
func (n *namespace) wantRefused(o object) string {
	n.Helper()
	err := n.tryCreate(o)
	if err == nil {
		n.Fatal("the pod was not refused")
	}
	return err.Error()
}

// wantFull creates a pod that must be refused because all tokens are in use.
func (n *namespace) wantFull(name, key string, length, inUse int) {
	n.Helper()
	want := fmt.Sprintf("%sno semaphore available: %s/%s has %d of %d tokens in use", denied, n.name, key, inUse, length)
	if got := n.wantRefused(pod(name, key, length)); !strings.Contains(got, want) {
		n.Fatalf("refused with %q, want %q", got, want)
	}
}

// wantAdmitted creates a pod that is refused until a token is free.
func (n *namespace) wantAdmitted(o object) {
	n.Helper()
	eventually(n.T, patience, func() error { return n.tryCreate(o) })
}

// redis runs Redis commands, in which KEY stands for a semaphore. It returns the words of
// their replies.
func (n *namespace) redis(key string, commands ...string) ([]string, error) {
	script := redisCLI + " <<'COMMANDS'\n"
	for _, c := range commands {
		script += strings.ReplaceAll(c, "KEY", n.name+"/"+key) + "\n"
	}
	out, err := inRedis.run(script + "COMMANDS")
	return strings.Fields(out), err
}

// counts returns the numbers of free and of used tokens.
func (n *namespace) counts(key string) (queue, inflight int, err error) {
	out, err := n.redis(key, "LLEN 'queue/{KEY}'", "ZCARD 'inflight/{KEY}'")
	if err == nil {
		_, err = fmt.Sscan(strings.Join(out, " "), &queue, &inflight)
	}
	return queue, inflight, err
}

// wantWaiters waits until these pods in wait mode, and no others, are in line in this
// order.
func (n *namespace) wantWaiters(key string, pods ...corev1.Pod) {
	n.Helper()
	var want []string
	for _, p := range pods {
		want = append(want, string(p.UID))
	}
	eventually(n.T, patience, func() error {
		got, err := n.redis(key, "ZRANGE 'waiters/{KEY}' 0 -1")
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("in line: %v; want %v", got, want)
		}
		return err
	})
}

// wantHolders waits until these pods in wait mode, and no others, hold tokens.
func (n *namespace) wantHolders(key string, pods ...corev1.Pod) {
	n.Helper()
	want := map[string]bool{}
	for _, p := range pods {
		want[string(p.UID)] = true
	}
	eventually(n.T, patience, func() error {
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
	eventually(n.T, patience, func() error {
		q, i, err := n.counts(key)
		if err == nil && (q != queue || i != inflight) {
			err = fmt.Errorf("queue %d, inflight %d; want %d, %d", q, i, queue, inflight)
		}
		return err
	})
}

// wantOneSidecar checks that the pod's first init container is its only sidecar, and the
// second awaits the token.
func (n *namespace) wantOneSidecar(p corev1.Pod) {
	n.Helper()
	count := 0
	for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
		if c.Name == sidecarName {
			count++
		}
	}
	if count != 1 || p.Spec.InitContainers[0].Name != sidecarName || p.Spec.InitContainers[1].Name != awaitName {
		inits := encode(object{"init": p.Spec.InitContainers})
		n.Errorf("%s has %d sidecars; its init containers are %s", p.Name, count, inits)
	}
}
