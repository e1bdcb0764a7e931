//go:build chaos

package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// startGates starts the API server, and two gates on nodes of their own.
func (w *chaosWorld) startGates() {
	w.api = rig.StartAPIServer(w.t)
	for i := range 2 {
		g := &chaosServer{binary: w.binary, args: w.nodes[i].args([]string{"gate", "--queue-redis-address=" + w.queue.Address(),
			"--redis-addresses=" + strings.Join(w.locks.addresses(), ","), "--metrics-bind-address=" + rig.FreeAddress(w.t),
			fmt.Sprintf("--heartbeat-interval-seconds=%d", seconds(chaosInterval)), fmt.Sprintf("--stale-threshold-seconds=%d", seconds(chaosThreshold)),
			"--kubernetes-address=" + w.api.Address, "--kubernetes-ca-file=" + w.api.CAFile,
			"--kubernetes-token-file=" + w.api.TokenFile}, "")}
		g.launch(w.t)
		w.gates = append(w.gates, g)
	}
	go w.hearEvents()
}

// hearEvents notes which gated pods stand in line, by the events that tell their users.
func (w *chaosWorld) hearEvents() {
	for heard := 0; sleep(w.ctx, 50*time.Millisecond) == nil; {
		events := w.api.Store.EventsOf("shop")
		waiting := map[string]bool{}
		for _, e := range events[heard:] {
			if e.Reason == reasonWaiting {
				waiting[e.Regarding.Name] = true
			}
		}
		heard = len(events)
		w.mu.Lock()
		for _, p := range w.pods {
			if waiting[p.life.name] {
				p.mu.Lock()
				p.life.inLine = w.now()
				p.mu.Unlock()
			}
		}
		w.mu.Unlock()
	}
}

// passGate creates the pod, and waits until its gate is lifted. It returns false if it is deleted before that.
func (p *chaosPod) passGate(rng *rand.Rand) bool {
	id := idOf(p.life.semaphore)
	made := rig.GatedPod(p.life.name)
	made.Namespace = id.namespace
	made.Spec.SchedulingGates = made.Spec.SchedulingGates[1:]
	made.Annotations = map[string]string{annotationEnabled: "true", annotationKey: id.key, annotationLength: strconv.Itoa(p.life.length), annotationExpiration: "2"}
	created, status := p.w.api.Store.Create(made)
	if status != nil {
		p.w.complain("%s: %s", p.life.name, status.Message)
		return false
	}
	p.mu.Lock()
	p.uid = string(created.UID)
	p.mu.Unlock()
	patience := p.w.now() + p.w.patience + within(rng, p.w.patience)
	for (p.w.now() < patience || p.w.ending()) && p.w.ctx.Err() == nil {
		now, _ := p.w.api.Store.Get(id.namespace, p.life.name)
		if len(now.Spec.SchedulingGates) == 0 {
			p.mu.Lock()
			defer p.mu.Unlock()
			at := p.w.now()
			p.life.lifted = span{max(p.life.asked, at-heardLate), at}
			return true
		}
		time.Sleep(50 * time.Millisecond)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	p.life.ended = p.w.now()
	return false
}

// show changes the pod as a kubelet does, if it is one of the API server's.
func (p *chaosPod) show(change func(*corev1.Pod)) {
	if p.life.gated {
		_, _ = p.w.api.Store.Change(idOf(p.life.semaphore).namespace, p.life.name, change)
	}
}

// isScheduled makes a pod one whose sidecar and await run.
func isScheduled(p *corev1.Pod) {
	now := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	p.Spec.NodeName = "node-1"
	p.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: sidecarName, Started: new(true), State: now}, {Name: awaitName, State: now}}
}

// delete asks for the pod's end, as its user does.
func (p *chaosPod) delete() {
	if p.life.gated {
		_, _ = p.w.api.Store.Delete(idOf(p.life.semaphore).namespace, p.life.name, false)
	}
}

// remove ends the pod as the kubelet does, or, if that is lost, somebody who sees it. One that worked is left until its token is stale: who
// deletes it before takes that upon himself.
func (p *chaosPod) remove() {
	p.mu.Lock()
	died, started := p.life.died != notYet, p.life.started != notYet
	p.mu.Unlock()
	switch {
	case died && started:
		_ = sleep(p.w.ctx, chaosThreshold)
	case died:
		_ = sleep(p.w.ctx, time.Second)
	}
	_, _ = p.w.api.Store.Delete(idOf(p.life.semaphore).namespace, p.life.name, true)
}

// gateBlows are what happens to gates, and to the API server.
var gateBlows = []blow{
	{"a gate is killed", false, func(n *nemesis, f *fault) {
		f.unlifted = true
		g := pick(n, n.gates)
		g.Kill()
		n.wait(200*time.Millisecond, 2*time.Second)
		g.launch(n.t)
	}},
	{"both gates are killed", false, func(n *nemesis, f *fault) {
		f.blind = true
		for _, g := range n.gates {
			g.Kill()
		}
		n.wait(100*time.Millisecond, time.Second)
		for _, g := range n.gates {
			g.launch(n.t)
		}
	}},
	{"a gate is stopped", false, func(n *nemesis, f *fault) {
		f.unlifted = true
		g := pick(n, n.gates)
		g.Signal(n.t, syscall.SIGSTOP)
		n.wait(time.Second, chaosThreshold+2*time.Second)
		g.Signal(n.t, syscall.SIGCONT)
	}},
	{"all watches end", false, func(n *nemesis, f *fault) {
		f.blind = true
		n.api.DropWatches()
	}},
	{"watches are late", false, func(n *nemesis, f *fault) {
		f.blind = true
		n.api.Late.Lock()
		n.wait(time.Second, 4*time.Second)
		n.api.Late.Unlock()
	}},
	{"the API server forgets what has happened", false, func(n *nemesis, f *fault) {
		f.blind = true
		n.api.Store.Compact()
		n.api.DropWatches()
	}},
	{"the API server refuses most requests", false, func(n *nemesis, f *fault) {
		f.blind = true
		var asked atomic.Int32
		n.api.Fail(func(w http.ResponseWriter, _ *http.Request) bool {
			switch asked.Add(1) % 4 {
			case 0:
				return false
			case 1:
				w.Header().Set("Retry-After", "1")
				rig.Respond(w, 0, nil, rig.Failure(http.StatusTooManyRequests, "TooManyRequests", "the server has received too many requests"))
			default:
				rig.Respond(w, 0, nil, rig.Failure(http.StatusInternalServerError, "InternalError", "etcdserver: request timed out"))
			}
			return true
		})
		n.api.DropWatches()
		n.wait(time.Second, 4*time.Second)
		n.api.Fail(nil)
	}},
}
