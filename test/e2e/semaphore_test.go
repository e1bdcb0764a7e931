//go:build e2e

package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Two Deployments of two replicas share three tokens.
func TestTwoDeployments(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.kubectl("apply", "-f", filepath.Join(root, "deploy/examples/two-deployments.yaml"))
	running := func() (names []string, err error) {
		out, err := n.try("get", "pods", "--field-selector=status.phase=Running", "-o", "name")
		return strings.Fields(out), err
	}
	eventually(t, patience, func() error {
		pods, err := running()
		if err == nil && len(pods) != 3 {
			err = fmt.Errorf("running: %v", pods)
		}
		return err
	})
	eventually(t, patience, func() error {
		events, err := n.try("get", "events", "--field-selector=reason=FailedCreate",
			"-o", "jsonpath={.items[*].message}")
		want := fmt.Sprintf("%sno semaphore available: %s/smtp has 3 of 3 tokens in use, by ", denied, n.name)
		if err == nil && !strings.Contains(events, want) {
			err = fmt.Errorf("events: %s; want %s", events, want)
		}
		return err
	})
	n.wantCounts("smtp", 0, 3)

	// No pod waits any more, so that a returned token stays in the queue.
	out := n.kubectl("get", "deployments",
		"-o", "jsonpath={range .items[*]}{.metadata.name} {.status.readyReplicas}{'\\n'}{end}")
	full, partial := "mail", "web"
	if strings.Contains(out, "web 2") {
		full, partial = "web", "mail"
	}
	n.kubectl("scale", "deployment/"+partial, "--replicas=1")
	n.kubectl("scale", "deployment/"+full, "--replicas=1")
	eventually(t, patience, func() error {
		out, err := n.try("get", "pods", "-o", "name")
		if err == nil && len(strings.Fields(out)) != 2 {
			err = fmt.Errorf("pods: %s", out)
		}
		return err
	})
	if queue, inflight, err := n.counts("smtp"); err != nil || queue != 1 || inflight != 2 {
		t.Errorf("when the pod is gone: queue %d, inflight %d, %v", queue, inflight, err)
	}
}

// follow collects the log of a container, with times, until the container ends. It
// returns once a line with the text first has come, so that the log of a pod that is
// deleted then is not lost.
func (n *namespace) follow(pod, container, first string) <-chan []string {
	n.Helper()
	cmd := exec.Command("kubectl", "-n", n.name, "logs", "-f", "--timestamps", pod, "-c", container)
	out, err := cmd.StdoutPipe()
	must(n.T, err)
	must(n.T, cmd.Start())
	n.Cleanup(func() { _ = cmd.Process.Kill() })
	done, begun := make(chan []string, 1), make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	go func() {
		var lines []string
		for s := bufio.NewScanner(out); s.Scan(); {
			lines = append(lines, s.Text())
			if strings.Contains(s.Text(), first) {
				begin()
			}
		}
		_ = cmd.Wait()
		done <- lines
	}()
	select {
	case <-begun:
	case <-time.After(patience):
		n.Fatalf("no %q in the log of %s of %s", first, container, pod)
	}
	return done
}

// timeOf returns the time of the log line that contains the text.
func timeOf(t *testing.T, lines []string, text string) time.Time {
	t.Helper()
	for _, l := range lines {
		if strings.Contains(l, text) {
			stamp, _, _ := strings.Cut(l, " ")
			at, err := time.Parse(time.RFC3339Nano, stamp)
			must(t, err)
			return at
		}
	}
	t.Fatalf("no %q in %q", text, lines)
	return time.Time{}
}

// The native sidecar starts before the pod's other init containers and ends after the
// app. It holds the token until the app has ended.
func TestNativeSidecar(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(pod("slow", "native", 2, object{
		"initContainers": []object{container("init", "sleep 1")},
		"containers": []object{container("app", "trap 'sleep 5; echo app has ended; exit 0' TERM; echo app is up; "+idle,
			object{"lifecycle": object{"preStop": object{"sleep": object{"seconds": 2}}}})},
	}))
	p := n.wantRunning("slow")
	n.wantOneSidecar(p)
	statuses := p.Status.InitContainerStatuses
	sidecar, await, initial := statuses[0], statuses[1], statuses[2]
	if sidecar.State.Running == nil || sidecar.State.Running.StartedAt.After(await.State.Terminated.StartedAt.Time) ||
		await.State.Terminated.FinishedAt.After(initial.State.Terminated.StartedAt.Time) {
		t.Errorf("started out of order: %+v, %+v, %+v", sidecar, await, initial)
	}
	if p.Annotations[annotationPrefix+"token"] == "" {
		t.Errorf("no token in the annotations %v", p.Annotations)
	}
	n.wantCounts("native", 1, 1)

	app, side := n.follow("slow", "app", "app is up"), n.follow("slow", sidecarName, "holding the token")
	deleted := time.Now()
	n.end("slow")
	eventually(t, patience, func() error {
		queue, inflight, err := n.counts("native")
		if err == nil && inflight != 0 {
			err = fmt.Errorf("queue %d, inflight %d", queue, inflight)
		}
		return err
	})
	if held := time.Since(deleted); held < 7*time.Second { // 2 s of preStop, 5 s of the app
		t.Errorf("the token was given back %s after the deletion", held)
	}
	n.wantGone("slow")
	appEnded, givenBack := timeOf(t, <-app, "app has ended"), timeOf(t, <-side, "token given back")
	if givenBack.Before(appEnded) {
		t.Errorf("the token was given back %s before the app had ended", appEnded.Sub(givenBack))
	}
	n.wantCounts("native", 2, 0)
}

// A Job with the native sidecar completes, and the sidecar gives back the token.
func TestJob(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(job("work", "jobs", 2, "sleep 1; echo done"))
	n.kubectl("wait", "--for=condition=Complete", "job/work", "--timeout="+patience.String())
	n.wantCounts("jobs", 2, 0)
	eventually(t, patience, func() error {
		phase, err := n.try("get", "pods", "-o", "jsonpath={.items[*].status.phase}")
		if err == nil && phase != string(corev1.PodSucceeded) {
			err = errors.New(phase)
		}
		return err
	})
}

// job returns a Job of one annotated pod. spec replaces parts of the pod's spec.
func job(name, key string, length int, script string, spec ...object) object {
	s := object{"restartPolicy": "Never", "containers": []object{container("app", script)}}
	for _, m := range spec {
		maps.Copy(s, m)
	}
	return object{"apiVersion": "batch/v1", "kind": "Job", "metadata": object{"name": name}, "spec": object{
		"backoffLimit": 0,
		"template":     object{"metadata": object{"annotations": annotations(key, length)}, "spec": s},
	}}
}

// A dry run takes no token.
func TestDryRun(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	dry := encode(pod("dry", "dry", 1))
	out, err := kubectl(dry, "-n", n.name, "apply", "--dry-run=server", "-f", "-", "-o", "json")
	must(t, err)
	var p corev1.Pod
	must(t, json.Unmarshal([]byte(out), &p))
	n.wantOneSidecar(p)
	if token := p.Annotations[annotationPrefix+"token"]; token != "00000000-0000-0000-0000-000000000000" {
		t.Errorf("token %q", token)
	}
	n.wantCounts("dry", 0, 0)
}

// A quota refuses a pod that has got a token, or the pod finds no node. Its token becomes
// stale, and the next pod that asks reclaims it.
func TestTokensOfPodsThatDoNotRun(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(object{
		"apiVersion": "v1", "kind": "ResourceQuota", "metadata": object{"name": "q"},
		"spec": object{"hard": object{"count/configmaps": "50", "pods": "1"}},
	})
	eventually(t, patience, func() error {
		hard, err := n.try("get", "resourcequota", "q", "-o", "jsonpath={.status.hard.pods}")
		if err == nil && hard != "1" {
			err = fmt.Errorf("the quota is not in force: %q", hard)
		}
		return err
	})
	n.create(pod("first", "quota", 2))
	n.wantRunning("first")
	if got := n.wantRefused(pod("second", "quota", 2)); !strings.Contains(got, "exceeded quota") {
		t.Errorf("refused with %s", got)
	}
	n.wantFull("third", "quota", 2, 2) // before the token is stale
	n.wantCounts("quota", 0, 2)        // the webhook took a token, and then the quota refused the pod
	n.kubectl("delete", "resourcequota", "q")
	n.wantAdmitted(pod("fourth", "quota", 2))
	n.wantRunning("fourth")
	n.wantCounts("quota", 0, 2)

	n.create(pod("pending", "pending", 1, unschedulable))
	n.wantFull("next", "pending", 1, 1)
	n.wantCounts("pending", 0, 1)
	n.wantAdmitted(pod("next", "pending", 1))
	n.wantRunning("next")
}
