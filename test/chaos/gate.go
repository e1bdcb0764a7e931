package chaos

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// gate is a gate, and the proxy through which it reaches the API server.
type gate struct {
	restarted
	api *rig.Proxy
}

// startGates starts the API server, and two gates on separate nodes.
func (w *world) startGates() {
	w.api = rig.StartAPIServer(w.t)
	for i := range 2 {
		api := rig.StartProxy(w.t, w.api.Address)
		args := []string{"gate", "--kubernetes-address=" + api.Address, "--kubernetes-ca-file=" + w.api.CAFile,
			"--kubernetes-token-file=" + w.api.TokenFile}
		g := &gate{restarted{binary: w.binary, user: "gate", args: append(args, w.flags(w.nodes[i])...),
			onLine: w.readNamedWarning}, api}
		g.launch(w.t)
		w.gates = append(w.gates, g)
	}
	go w.watchEvents()
}

// watchEvents records which gated pods are in line, from the gates' events.
func (w *world) watchEvents() {
	for seen := 0; rig.Sleep(w.ctx, 50*time.Millisecond) == nil; {
		events := w.api.Store.EventsOf("shop")
		waiting := map[string]bool{}
		for _, e := range events[seen:] {
			if e.Reason == rig.ReasonWaiting {
				waiting[e.Regarding.Name] = true
			}
		}
		seen = len(events)
		w.mu.Lock()
		for _, p := range w.pods {
			p.mu.Lock()
			if waiting[p.life.name] && p.life.inLine == notYet { // later events tell that it has moved up
				p.life.inLine = w.now()
			}
			p.mu.Unlock()
		}
		w.mu.Unlock()
	}
}

// otherGate is the scheduling gate of another controller.
const otherGate = "example.org/other"

func removeOtherGate(p *corev1.Pod) {
	p.Spec.SchedulingGates = slices.DeleteFunc(p.Spec.SchedulingGates,
		func(g corev1.PodSchedulingGate) bool { return g.Name == otherGate })
}

func (p *pod) namespace() string { return rig.ParseID(p.life.semaphore).Namespace }

// passGate creates the pod, and waits until a gate lifts its scheduling gate. It returns
// false if a user deletes the pod first.
func (p *pod) passGate(rng *rand.Rand) bool {
	made := rig.AdmittedPod(p.life.name, rig.ParseID(p.life.semaphore), p.life.length, 2)
	made.Namespace = p.namespace()
	args := &made.Spec.InitContainers[0].Args
	*args = slices.Insert(*args, 1, fmt.Sprintf("--head-start-seconds=%.0f", p.life.headStart.Seconds()))
	if p.life.tokens > 1 {
		*args = slices.Insert(*args, 1, fmt.Sprintf("--tokens=%d", p.life.tokens))
	}
	if p.life.wait > 0 {
		rig.StopWaiting(made, int(p.life.wait.Seconds()), p.life.whenWaited())
	}
	if blocked := rng.IntN(4) == 0; blocked {
		made.Spec.SchedulingGates = append(made.Spec.SchedulingGates, corev1.PodSchedulingGate{Name: otherGate})
		time.AfterFunc(within(rng, p.w.patience), func() { p.show(removeOtherGate) })
	}
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
		now, _ := p.w.api.Store.Get(p.namespace(), p.life.name)
		switch gates := now.Spec.SchedulingGates; {
		case len(gates) == 1 && gates[0].Name == otherGate:
			p.w.complain("the gate of %s was lifted, and the pod has another one", p.life.name)
			return false
		case now.Status.Phase == corev1.PodFailed:
			p.mu.Lock()
			p.over = true
			p.life.gaveUp = p.w.now()
			p.life.ended = p.life.gaveUp
			p.mu.Unlock()
			_ = rig.Sleep(p.w.ctx, time.Second)
			if now, status := p.w.api.Store.Get(p.namespace(), p.life.name); status == nil && len(now.Spec.SchedulingGates) == 0 {
				p.w.complain("the gate of %s was lifted, and it had given up", p.life.name)
			}
			return false
		case len(gates) == 0:
			p.mu.Lock()
			defer p.mu.Unlock()
			at := p.w.now()
			p.life.lifted = span{max(p.life.asked, at-noticeDelay), at}
			return true
		}
		_ = rig.Sleep(p.w.ctx, 50*time.Millisecond)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	p.life.ended = p.w.now()
	return false
}

// show changes the pod in the API server, if it exists, as a kubelet does.
func (p *pod) show(change func(*corev1.Pod)) {
	if p.life.gated {
		_, _ = p.w.api.Store.Change(p.namespace(), p.life.name, change)
	}
}

// delete deletes the pod, as its user does.
func (p *pod) delete() {
	if p.life.gated {
		_, _ = p.w.api.Store.Delete(p.namespace(), p.life.name, false)
	}
}

// remove deletes the pod from the API server. The kubelet does that, or a user if the
// node is lost. The user waits until the pod's token is stale: an earlier deletion would
// be at the user's risk.
func (p *pod) remove() {
	p.mu.Lock()
	died, started := p.life.died != notYet, p.life.started != notYet
	p.mu.Unlock()
	switch {
	case died && started:
		_ = rig.Sleep(p.w.ctx, staleThreshold)
	case died:
		_ = rig.Sleep(p.w.ctx, time.Second)
	}
	_, _ = p.w.api.Store.Delete(p.namespace(), p.life.name, true)
}

// gateBlows hit gates and the API server.
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
		n.wait(time.Second, staleThreshold+2*time.Second)
		g.Signal(n.t, syscall.SIGCONT)
	}},
	{"a gate is cut off from the API server", false, func(n *nemesis, f *fault) {
		f.unlifted, f.outdated = true, true
		g := pick(n, n.gates)
		g.api.Cut()
		n.wait(time.Second, 2*time.Second+min(viewTime+10*time.Second, n.now()/3)) // longer in longer runs
		g.api.Mend()
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
				rig.Respond(w, 0, nil, rig.Failure(http.StatusTooManyRequests, "TooManyRequests",
					"the server has received too many requests"))
			default:
				rig.Respond(w, 0, nil, rig.Failure(http.StatusInternalServerError, "InternalError",
					"etcdserver: request timed out"))
			}
			return true
		})
		n.api.DropWatches()
		n.wait(time.Second, 4*time.Second)
		n.api.Fail(nil)
	}},
}
