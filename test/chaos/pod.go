package chaos

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// giveBackWithin limits the time that a sidecar takes to give its token back: ten
// seconds, and more on a busy machine.
const giveBackWithin = 25 * time.Second

// pod simulates a pod: its sidecar and init container are real processes, its app does
// nothing. Its podLife is its part of the history.
type pod struct {
	w    *world
	uid  string
	node *node

	mu      sync.Mutex // guards the fields below
	life    podLife
	sidecar *rig.Process
	await   *rig.Process
	lost    bool // it had a token and is in line again
	holds   bool // its sidecar has said that it holds the token, and since then not that it waits
	over    bool // it ends or has ended: no process starts again
	log     bytes.Buffer
}

// newPod makes a pod of a semaphore, on a node.
func (w *world) newPod(name, semaphore string, length int, waits bool, on *node) *pod {
	return &pod{w: w, uid: uuid.NewString(), node: on,
		life: podLife{name: name, semaphore: semaphore, length: length, waits: waits}}
}

// launch starts a process of the pod. onLine receives the lines of its log.
func (p *pod) launch(args []string, onLine func(line string)) *rig.Process {
	process := rig.NewProcess(p.w.binary, args...)
	process.Cmd.Env = append(loginAs(sidecarUser(p.namespace())), "POD_UID="+p.uid, "POD_NAME="+p.life.name,
		"NODE_NAME="+p.node.name)
	process.OnLine = onLine
	if err := process.Launch(); err != nil {
		panic(err)
	}
	return process
}

// signal sends a signal to a process, which may be nil or have ended.
func signal(p *rig.Process, s syscall.Signal) {
	if p != nil {
		_ = p.Cmd.Process.Signal(s)
	}
}

// readLog records a log line of the sidecar about its token.
func (p *pod) readLog(line string) {
	p.w.readWarning(p.life.semaphore, line)
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.w.now()
	fmt.Fprintf(&p.log, "%9.3f %s", now.Seconds(), line)
	held := strings.Contains(line, `"msg":"`+rig.HeldText+`"`)
	switch l := &p.life; {
	case l.started != notYet && l.took.to != 0: // the line of its token may come after its start
	case strings.Contains(line, `"msg":"waiting for `):
		p.lost, p.holds = true, false
		if l.inLine == notYet {
			l.inLine = now
		}
	case held && l.gaveUp != notYet:
		p.w.complain("%s gave up, and holds a token", l.name)
	case held && l.gated && !p.lost:
		l.took = span{l.lifted.from, now}
	case held && p.holds: // the sidecar is another; it may have found the token, or taken a new one
		l.took.to = now
	case held && (l.waits || p.lost):
		l.took = span{max(l.asked, now-noticeDelay), now}
		p.holds = true
	}
}

// ask requests the admission as an API server does: if a webhook does not answer, it asks
// another. It returns the pod's sidecar, or nil if the pod is not admitted.
func (p *pod) ask(rng *rand.Rand) *corev1.Container {
	whenFull := rig.WhenFullDeny
	switch {
	case p.life.gated:
		whenFull = rig.WhenFullGate
	case p.life.waits:
		whenFull = rig.WhenFullWait
	}
	review := p.review(whenFull)
	for _, i := range rng.Perm(len(p.w.webhooks)) {
		asked := p.w.now()
		p.mu.Lock()
		p.life.asked = asked
		p.mu.Unlock()
		admission, err := p.w.webhooks[i].ask(review)
		answered := p.w.now()
		p.mu.Lock()
		p.life.answered = answered
		l := &p.life
		switch {
		case err != nil:
			l.failed = true
			fmt.Fprintf(&p.log, "%9.3f not answered: %v\n", answered.Seconds(), err)
		case admission.Allowed:
			l.admitted, l.failed = true, false
		case admission.Code == http.StatusTooManyRequests:
			l.refused, l.failed = true, false
		default:
			p.w.complain("%s was answered %+v", l.name, admission)
		}
		after := *l
		p.mu.Unlock()
		switch {
		case after.refused:
			return nil
		case !after.failed:
			sidecar, err := injected(review, admission.Patch)
			if err != nil {
				p.w.complain("%s: %v", after.name, err)
				return nil
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			if admission.Token != "" {
				p.life.took = span{asked, answered}
			}
			return sidecar
		case !after.waits: // the webhook may have taken a token
			after.name += fmt.Sprintf(" at webhook %d", i)
			p.w.note(&after)
		}
	}
	return nil
}

// injected returns the sidecar in a patch.
func injected(review, patch []byte) (*corev1.Container, error) {
	patched, err := rig.PatchedPod(review, patch)
	if err != nil {
		return nil, err
	}
	for _, c := range patched.Spec.InitContainers {
		if c.Name == rig.SidecarName {
			return &c, nil
		}
	}
	return nil, fmt.Errorf("no sidecar in the patch %s", patch)
}

// live runs the pod's whole life.
func (p *pod) live(rng *rand.Rand) {
	injected := p.ask(rng)
	if injected == nil {
		p.mu.Lock()
		p.over = true
		p.life.ended = p.life.answered
		p.mu.Unlock()
		return
	}
	if p.life.gated {
		defer p.remove()
		if !p.passGate(rng) {
			return
		}
	}
	_ = rig.Sleep(p.w.ctx, within(rng, 500*time.Millisecond)) // the scheduler finds a node
	args := p.node.args(injected.Args, p.uid)
	start := func() *rig.Process { return p.launch(args, p.readLog) }
	p.mu.Lock()
	p.sidecar = start()
	p.await = p.launch([]string{"await"}, nil)
	sidecar := p.sidecar
	p.mu.Unlock()
	p.show(rig.MarkScheduled)
	defer os.Remove(rig.StartMark(p.uid))

	patience := time.NewTimer(p.w.patience + within(rng, p.w.patience)) // a user deletes a pod that waits too long
	defer patience.Stop()
	work := time.NewTimer(time.Hour)
	defer work.Stop()
	last := p.w.last
	for {
		select {
		case <-p.awaitDone():
			p.mu.Lock()
			now := p.w.now()
			code := p.await.ExitCode()
			if code == rig.ExitGaveUp { // the pod fails
				p.life.gaveUp = now
				p.mu.Unlock()
				break
			}
			switch {
			case p.life.started != notYet || p.over:
				p.await = nil
			case code == 0:
				p.life.started = now
				p.await = nil
				p.show(rig.MarkRunning)
				work.Reset(p.w.work(rng))
			default: // the nemesis killed it
				p.await = p.launch([]string{"await"}, nil)
			}
			p.mu.Unlock()
			continue
		case <-sidecar.Done(): // the nemesis killed it; the kubelet restarts it, unless the pod is lost with its node
			p.mu.Lock()
			if p.life.died != notYet || p.over {
				p.over = true
				signal(p.await, syscall.SIGKILL)
				p.mu.Unlock()
				return
			}
			p.mu.Unlock()
			_ = rig.Sleep(p.w.ctx, within(rng, time.Second))
			p.mu.Lock()
			p.sidecar = start()
			sidecar = p.sidecar
			p.silenceEnds()
			p.mu.Unlock()
			continue
		case <-last:
			last = nil
			patience.Stop()
			if p.startedYet() {
				work.Reset(0)
			}
			continue
		case <-work.C:
		case <-patience.C:
			if p.startedYet() {
				continue
			}
		case <-p.w.ctx.Done():
		}
		break
	}
	p.end()
}

// end ends the pod as Kubernetes does: the app or the init container first, then the
// sidecar.
func (p *pod) end() {
	p.mu.Lock()
	p.over = true
	p.life.ended = p.w.now()
	await, sidecar := p.await, p.sidecar
	signal(await, syscall.SIGCONT)
	signal(await, syscall.SIGKILL)
	signal(sidecar, syscall.SIGTERM)
	died := p.life.died != notYet
	p.mu.Unlock()
	p.delete()
	select {
	case <-sidecar.Done():
	case <-time.After(giveBackWithin):
		sidecar.Kill()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case died || p.life.died != notYet:
	case sidecar.ExitCode() == 0 && !strings.Contains(sidecar.Log.String(), "left to go stale"):
		p.life.released = p.w.now()
	default: // killed, or it could not give the token back
		p.life.died = p.life.ended
	}
}

func (p *pod) startedYet() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.life.started != notYet
}

func (p *pod) awaitDone() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.await == nil {
		return nil
	}
	return p.await.Done()
}

// silenceBegins records that the sidecar cannot send heartbeats. The caller holds mu.
func (p *pod) silenceBegins() {
	p.life.silences = append(p.life.silences, span{p.w.now(), unending})
}

// silenceEnds records that the sidecar can send heartbeats again. The caller holds mu.
func (p *pod) silenceEnds() {
	for i := range p.life.silences {
		p.life.silences[i].to = min(p.life.silences[i].to, p.w.now()+time.Second) // a process needs time to start
	}
}

// strike calls do if the pod has a live sidecar, and reports whether it has.
func (p *pod) strike(do func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sidecar == nil || p.over || p.life.died != notYet {
		return false
	}
	do()
	return true
}

// vanish kills the pod for good, like the loss of its node.
func (p *pod) vanish() bool {
	return p.strike(func() {
		p.life.died = p.w.now()
		signal(p.await, syscall.SIGCONT)
		signal(p.await, syscall.SIGKILL)
		signal(p.sidecar, syscall.SIGKILL)
	})
}

// killSidecar kills the sidecar; the kubelet restarts it.
func (p *pod) killSidecar() bool {
	return p.strike(func() {
		p.silenceBegins()
		signal(p.sidecar, syscall.SIGKILL)
	})
}

// killAwait kills the init container; the kubelet restarts it.
func (p *pod) killAwait() bool {
	return p.strike(func() { signal(p.await, syscall.SIGKILL) })
}

// pause stops the sidecar for a while.
func (p *pod) pause(long time.Duration) bool {
	return p.strike(func() {
		p.silenceBegins()
		sidecar := p.sidecar
		signal(sidecar, syscall.SIGSTOP)
		time.AfterFunc(long, func() {
			signal(sidecar, syscall.SIGCONT)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.silenceEnds()
		})
	})
}

// review returns the AdmissionReview of the pod.
func (p *pod) review(whenFull string) []byte {
	return rig.Review(p.w.t, rig.ParseID(p.life.semaphore), p.life.length, func(request map[string]any) {
		request["uid"] = p.uid
		maps.Copy(rig.AnnotationsOf(request), map[string]any{
			rig.AnnotationWhenFull: whenFull, rig.AnnotationExpiration: "2"})
		if p.life.headStart > 0 {
			rig.AnnotationsOf(request)[rig.AnnotationHeadStart] = fmt.Sprintf("%.0f", p.life.headStart.Seconds())
		}
		if p.life.tokens > 1 {
			rig.AnnotationsOf(request)[rig.AnnotationTokens] = fmt.Sprint(p.life.tokens)
		}
		if p.life.wait > 0 {
			maps.Copy(rig.AnnotationsOf(request), map[string]any{
				rig.AnnotationWait: fmt.Sprint(p.life.wait.Seconds()), rig.AnnotationWhenWaited: p.life.whenWaited()})
			request["object"].(map[string]any)["spec"].(map[string]any)["restartPolicy"] = "Never"
		}
	})
}

// ask sends a review to the webhook.
func (h *webhook) ask(review []byte) (rig.Admission, error) {
	url := "https://" + h.address + "/mutate?timeout=3s"
	response, err := h.client.Post(url, "application/json", bytes.NewReader(review))
	if err != nil {
		return rig.Admission{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return rig.Admission{}, err
	}
	return rig.ReadAdmission(response.StatusCode, string(text))
}

// within returns a random duration below most.
func within(rng *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(most)))
}
