//go:build chaos

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
)

// chaosPod is a pod of the chaos: real processes for its sidecar and its init container, and an app that does nothing. What becomes of
// it is in its podLife.
type chaosPod struct {
	w     *chaosWorld
	uid   string
	node  *chaosNode
	token string // that the webhook has taken for it

	mu      sync.Mutex // guards all below, and life
	life    podLife
	sidecar *chaosProcess
	await   *chaosProcess
	lost    bool // it stands in line since its token was taken
	over    bool // it is to end, or has: nothing is started again
	log     bytes.Buffer
}

// chaosProcess is a process of a pod.
type chaosProcess struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func (p *chaosProcess) signal(s syscall.Signal) {
	if p != nil {
		_ = p.cmd.Process.Signal(s)
	}
}

// launch starts a process of the pod, and hears what it logs.
func (p *chaosPod) launch(args []string, hear func(line string)) *chaosProcess {
	cmd := exec.Command(p.w.binary, args...)
	cmd.Env = append(os.Environ(), "POD_UID="+p.uid, "POD_NAME="+p.life.name, "NODE_NAME="+p.node.name)
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		panic(err)
	}
	c := &chaosProcess{cmd, make(chan struct{})}
	go func() {
		defer close(c.done)
		for lines := bufio.NewReader(stderr); ; {
			line, err := lines.ReadString('\n')
			if err != nil {
				break
			}
			hear(line)
		}
		_, _ = io.Copy(io.Discard, stderr)
		_ = cmd.Wait()
	}()
	return c
}

// heard notes what the sidecar says of its token.
func (p *chaosPod) heard(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.w.now()
	fmt.Fprintf(&p.log, "%9.3f %s", now.Seconds(), line)
	switch l := &p.life; {
	case l.started != notYet:
	case strings.Contains(line, `"msg":"waiting for a token of `):
		p.lost = true
		if l.inLine == notYet {
			l.inLine = now
		}
	case strings.Contains(line, `"msg":"`+heldText+`"`) && l.gated && !p.lost:
		l.took = span{l.lifted.from, now}
	case strings.Contains(line, `"msg":"`+heldText+`"`) && (l.waits || p.lost):
		l.took = span{max(l.asked, now-heardLate), now}
	}
}

// ask asks for the admission as an API server does: at another webhook if one does not answer. It returns the pod's sidecar, nil if it is
// not admitted.
func (p *chaosPod) ask(rng *rand.Rand) *corev1.Container {
	whenFull := whenFullDeny
	switch {
	case p.life.gated:
		whenFull = whenFullGate
	case p.life.waits:
		whenFull = whenFullWait
	}
	body := p.w.review(p.life, p.uid, whenFull)
	for _, i := range rng.Perm(len(p.w.webhooks)) {
		asked := p.w.now()
		p.mu.Lock()
		p.life.asked = asked
		p.mu.Unlock()
		response, err := p.w.webhooks[i].ask(body)
		answered := p.w.now()
		p.mu.Lock()
		p.life.answered = answered
		l := &p.life
		switch {
		case err != nil:
			l.failed = true
			fmt.Fprintf(&p.log, "%9.3f not answered: %v\n", answered.Seconds(), err)
		case response.Allowed:
			l.admitted, l.failed = true, false
		case response.Result.Code == http.StatusTooManyRequests:
			l.refused, l.failed = true, false
		default:
			p.w.complain("%s was answered %+v", l.name, response.Result)
		}
		failed := *l
		p.mu.Unlock()
		switch {
		case failed.refused:
			return nil
		case !failed.failed:
			sidecar, token, err := injected(response.Patch)
			if err != nil {
				p.w.complain("%s: %v", failed.name, err)
				return nil
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.token = token; token != "" {
				p.life.took = span{asked, answered}
			}
			return sidecar
		case !failed.waits: // a token may have been taken
			failed.name += fmt.Sprintf(" at webhook %d", i)
			p.w.note(&failed)
		}
	}
	return nil
}

// injected returns the sidecar of a patch, and the token that was taken.
func injected(patch []byte) (sidecar *corev1.Container, token string, err error) {
	var operations []struct {
		Path  string          `json:"path"`
		Value json.RawMessage `json:"value"`
	}
	if err := json.Unmarshal(patch, &operations); err != nil {
		return nil, "", err
	}
	for _, o := range operations {
		var one corev1.Container
		var list []corev1.Container
		switch {
		case o.Path == jsonPointer("metadata", "annotations", annotationToken):
			err = json.Unmarshal(o.Value, &token)
		case json.Unmarshal(o.Value, &one) == nil && one.Name == sidecarName:
			sidecar = &one
		case json.Unmarshal(o.Value, &list) == nil:
			for _, c := range list {
				if c.Name == sidecarName {
					sidecar = &c
				}
			}
		}
	}
	if sidecar == nil {
		err = fmt.Errorf("no sidecar in the patch %s", patch)
	}
	return sidecar, token, err
}

// live is a pod's whole life.
func (p *chaosPod) live(rng *rand.Rand) {
	sidecar := p.ask(rng)
	if sidecar == nil {
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
	_ = sleep(p.w.ctx, within(rng, 500*time.Millisecond)) // it is scheduled
	args := p.node.args(sidecar.Args, p.uid)
	start := func() *chaosProcess { return p.launch(args, p.heard) }
	p.mu.Lock()
	p.sidecar = start()
	p.await = p.launch([]string{"await"}, func(string) {})
	sc := p.sidecar
	p.mu.Unlock()
	p.show(isScheduled)
	defer os.Remove(newStartMark(p.uid, p.tokenOf()).path)

	patience := time.NewTimer(p.w.patience + within(rng, p.w.patience)) // a pod that waits is deleted some day
	defer patience.Stop()
	work := time.NewTimer(time.Hour)
	defer work.Stop()
	last := p.w.last
	for {
		select {
		case <-p.awaitDone():
			p.mu.Lock()
			now := p.w.now()
			switch {
			case p.life.started != notYet || p.over:
				p.await = nil
			case p.await.cmd.ProcessState.ExitCode() == 0:
				p.life.started = now
				p.await = nil
				p.show(rig.MarkRunning)
				work.Reset(p.w.work(rng))
			default: // it was killed
				p.await = p.launch([]string{"await"}, func(string) {})
			}
			p.mu.Unlock()
			continue
		case <-sc.done: // it was killed, and the kubelet starts it again, unless all of the pod is gone
			p.mu.Lock()
			if p.life.died != notYet || p.over {
				p.over = true
				p.await.signal(syscall.SIGKILL)
				p.mu.Unlock()
				return
			}
			p.mu.Unlock()
			_ = sleep(p.w.ctx, within(rng, time.Second))
			p.mu.Lock()
			p.sidecar = start()
			sc = p.sidecar
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

// end ends the pod as Kubernetes does: first the app, or the init container, then the sidecar.
func (p *chaosPod) end() {
	p.mu.Lock()
	p.over = true
	p.life.ended = p.w.now()
	await, sidecar := p.await, p.sidecar
	await.signal(syscall.SIGCONT)
	await.signal(syscall.SIGKILL)
	sidecar.signal(syscall.SIGTERM)
	died := p.life.died != notYet
	p.mu.Unlock()
	p.delete()
	select {
	case <-sidecar.done:
	case <-time.After((giveBackSeconds + 15) * time.Second):
		sidecar.signal(syscall.SIGCONT)
		sidecar.signal(syscall.SIGKILL)
		<-sidecar.done
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case died || p.life.died != notYet:
	case sidecar.cmd.ProcessState.ExitCode() == 0:
		p.life.released = p.w.now()
	default: // killed, or it could not give the token back
		p.life.died = p.life.ended
	}
}

func (p *chaosPod) tokenOf() string {
	if p.token == "" {
		return p.uid
	}
	return p.token
}

func (p *chaosPod) startedYet() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.life.started != notYet
}

func (p *chaosPod) awaitDone() chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.await == nil {
		return nil
	}
	return p.await.done
}

// silenceBegins and silenceEnds note when the sidecar cannot beat. mu is held.
func (p *chaosPod) silenceBegins() {
	p.life.silences = append(p.life.silences, span{p.w.now(), unending})
}

func (p *chaosPod) silenceEnds() {
	for i := range p.life.silences {
		p.life.silences[i].to = min(p.life.silences[i].to, p.w.now()+time.Second) // a process has to start
	}
}

// strike does something to the pod's sidecar, if it has one that lives.
func (p *chaosPod) strike(do func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sidecar == nil || p.over || p.life.died != notYet {
		return false
	}
	do()
	return true
}

// vanish is for a pod that is lost with its node.
func (p *chaosPod) vanish() bool {
	return p.strike(func() {
		p.life.died = p.w.now()
		if p.await != nil {
			p.await.signal(syscall.SIGCONT)
			p.await.signal(syscall.SIGKILL)
		}
		p.sidecar.signal(syscall.SIGKILL)
	})
}

// killSidecar kills the sidecar, which is started again; killAwait does that to the init container.
func (p *chaosPod) killSidecar() bool {
	return p.strike(func() {
		p.silenceBegins()
		p.sidecar.signal(syscall.SIGKILL)
	})
}

func (p *chaosPod) killAwait() bool {
	return p.strike(func() { p.await.signal(syscall.SIGKILL) })
}

// pause stops the sidecar for a while.
func (p *chaosPod) pause(long time.Duration) bool {
	return p.strike(func() {
		p.silenceBegins()
		sidecar := p.sidecar
		sidecar.signal(syscall.SIGSTOP)
		time.AfterFunc(long, func() {
			sidecar.signal(syscall.SIGCONT)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.silenceEnds()
		})
	})
}

// review is the AdmissionReview of a pod.
func (w *chaosWorld) review(l podLife, uid, whenFull string) []byte {
	namespace, key, _ := strings.Cut(l.semaphore, "/")
	return rig.Review(w.t, semaphoreID{namespace, key}, l.length, func(request map[string]any) {
		request["uid"] = uid
		maps.Copy(rig.AnnotationsOf(request), map[string]any{annotationWhenFull: whenFull, annotationExpiration: "2"})
	})
}

// ask sends a review to a webhook.
func (h *chaosWebhook) ask(body []byte) (*admissionv1.AdmissionResponse, error) {
	response, err := h.client.Post("https://"+h.address+"/mutate?timeout=3s", "application/json", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", response.Status, text)
	}
	var answer admissionv1.AdmissionReview
	if err := json.Unmarshal(text, &answer); err != nil {
		return nil, err
	}
	return answer.Response, nil
}

// within is a time by chance, of less than so much.
func within(rng *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(most)))
}

// newPod makes a pod of a semaphore on a node.
func (w *chaosWorld) newPod(name, semaphore string, length int, waits bool, node *chaosNode) *chaosPod {
	return &chaosPod{w: w, uid: uuid.NewString(), node: node, life: podLife{name: name, semaphore: semaphore, length: length, waits: waits}}
}
