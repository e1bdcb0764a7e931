// Package upgrade runs the program of the last release beside this one while pods come
// and go. Webhooks and sidecars of both programs are processes. They share one Redis for
// the tokens, with the users of deploy/, and three lock servers.
package upgrade

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// installation is an installation whose program changes while pods come and go.
type installation struct {
	t     *testing.T
	queue *rig.Redis
	locks rig.LockServers
	flags []string
	paths map[string]string // of programs, by their images
	most  map[rig.ID]int    // the greatest length that pods have asked for

	losesScripts bool // all servers lose the scripts while only the present webhook runs

	pods   sync.WaitGroup
	stop   chan struct{} // closed when no more pods start
	failed chan struct{} // closed at the first problem: then everything ends

	mu       sync.Mutex
	serving  []*webhook
	asked    int
	holding  map[rig.ID]map[string]bool // the tokens of pods that rely on them
	uids     map[string]string          // of pods whose token was taken at admission, by that token
	order    []string                   // pod names of one line, in the order in which their apps started
	done     map[string]int             // pods that have ended in order, by when-full, webhook and sidecar
	problems []string
}

// webhook runs one build of the program and injects sidecars of one build.
type webhook struct {
	*rig.Webhook
	of, sidecars programBuild
	asked        sync.WaitGroup // unanswered requests
}

const (
	heartbeatInterval = time.Second
	patience          = 2 * time.Minute // for every wait: the machine may be busy
)

// startInstallation starts the Redis servers with the users that the setup of a build makes,
// without the rules in withoutRules.
func startInstallation(t *testing.T, users programBuild, withoutRules ...string) *installation {
	t.Helper()
	queueUsers, lockUsers := usersOf(t, users, rig.FreshID().Namespace)
	queueUsers = slices.DeleteFunc(queueUsers, func(rule string) bool { return slices.Contains(withoutRules, rule) })
	u := &installation{
		t: t, queue: startRedis(t, queueUsers),
		paths: map[string]string{}, most: map[rig.ID]int{},
		stop: make(chan struct{}), failed: make(chan struct{}),
		holding: map[rig.ID]map[string]bool{}, uids: map[string]string{}, done: map[string]int{},
	}
	for range 3 {
		u.locks = append(u.locks, startRedis(t, lockUsers))
	}
	t.Setenv("REDIS_USERNAME", "webhook")
	t.Setenv("REDIS_PASSWORD", rig.Password)
	u.flags = []string{
		"--redis-addresses=" + strings.Join(u.locks.Addresses(), ","),
		"--sidecar-redis-secret=redis",
		fmt.Sprintf("--heartbeat-interval-seconds=%d", heartbeatInterval/time.Second),
	}
	return u
}

// problem records a problem, and ends the run.
func (u *installation) problem(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.problemLocked(format, args...)
}

func (u *installation) problemLocked(format string, args ...any) {
	if u.problems = append(u.problems, fmt.Sprintf(format, args...)); len(u.problems) == 1 {
		close(u.failed)
	}
}

// startWebhook starts a webhook of one build that injects sidecars of another.
func (u *installation) startWebhook(of, sidecars programBuild) *webhook {
	u.t.Helper()
	flags := append(slices.Clone(u.flags), "--sidecar-image="+sidecars.image)
	return &webhook{Webhook: rig.StartWebhookOf(u.t, of.path, u.queue.Address, flags...), of: of, sidecars: sidecars}
}

// serve starts a webhook and sends pods to it.
func (u *installation) serve(of, sidecars programBuild) {
	u.t.Helper()
	w := u.startWebhook(of, sidecars)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.paths[sidecars.image] = sidecars.path
	u.serving = append(u.serving, w)
}

// retire ends the webhooks that run or inject a build, like a rollout: they get no new
// requests, answer the open ones, and then get the signal to stop.
func (u *installation) retire(b programBuild) {
	u.mu.Lock()
	var leaving []*webhook
	u.serving = slices.DeleteFunc(u.serving, func(w *webhook) bool {
		gone := w.of == b || w.sidecars == b
		if gone {
			leaving = append(leaving, w)
		}
		return gone
	})
	u.mu.Unlock()
	for _, w := range leaving {
		w.asked.Wait()
		u.end(w.Process, "the webhook of "+w.of.image)
	}
}

// end ends a process as the kubelet does, and reads its log.
func (u *installation) end(p *rig.Process, name string) {
	_ = p.Cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.Done():
	case <-time.After(patience):
		u.problem("%s does not end:\n%s", name, p.Log.String())
		p.Kill()
	}
	u.wantEnded(p, name)
}

// wantEnded checks the exit code and log of a process that has ended.
func (u *installation) wantEnded(p *rig.Process, name string) {
	if code := p.ExitCode(); code != 0 {
		u.problem("%s ended with %d", name, code)
	}
	u.readLog(p, name)
}

// loseScripts makes all servers lose their scripts. Webhooks load them again.
func (u *installation) loseScripts() {
	for _, r := range append(u.locks, u.queue) {
		if _, err := r.Control.Do("SCRIPT", "FLUSH"); err != nil {
			u.problem("the scripts of %s are not lost: %v", r.Address, err)
		}
	}
}

// readLog records each warning and error in a log as a problem. No server fails here. The
// only allowed warnings are that another process repairs the semaphore, and that the
// scripts were lost a moment ago.
func (u *installation) readLog(p *rig.Process, name string) {
	for line := range strings.Lines(p.Log.String()) {
		if !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, "lock taken") &&
			!strings.Contains(line, "NOSCRIPT") {
			u.problem("%s logged %s", name, line)
		}
	}
}

// nextWebhook returns the webhook for the next request. It does not end before the caller
// has called asked.Done.
func (u *installation) nextWebhook() *webhook {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked++
	w := u.serving[u.asked%len(u.serving)]
	w.asked.Add(1)
	return w
}

// pod is a pod of a Deployment. It is admitted, runs for a while, and ends.
type pod struct {
	name     string
	id       rig.ID
	length   int
	whenFull string
	inLine   bool                   // the test checks its place in line
	until    func() <-chan struct{} // its app ends when this is closed
	mayFail  bool                   // the webhook may refuse it forever: other pods wait in line
}

// start runs a pod in the background.
func (u *installation) start(p pod) { u.pods.Go(func() { u.run(p) }) }

// run acts as control plane and kubelet for a pod, until the pod has ended.
func (u *installation) run(p pod) {
	u.mu.Lock()
	u.most[p.id] = max(u.most[p.id], p.length)
	u.mu.Unlock()
	object, met := u.create(p)
	if object == nil {
		return
	}
	podUID := uuid.NewString()
	sidecar, token := u.container(object.Spec.InitContainers[0], p, podUID)
	await, _ := u.container(object.Spec.InitContainers[1], p, podUID)
	name := fmt.Sprintf("of the pod %s (%s of %d, %s)", p.name, p.id, p.length, met)
	defer os.Remove(rig.StartMark(token)) // of an earlier sidecar
	defer os.Remove(rig.StartMark(podUID))
	if p.whenFull == rig.WhenFullDeny {
		u.mu.Lock()
		u.uids[token] = podUID // the sidecar renames it; an earlier one does not
		u.mu.Unlock()
		u.hold(p, token) // the webhook has taken it
	}
	if err := errors.Join(sidecar.Launch(), await.Launch()); err != nil {
		u.problem("start the containers %s: %v", name, err)
		return
	}
	defer sidecar.Kill()
	defer await.Kill()
	for deadline := time.Now().Add(patience); !await.Ended(); time.Sleep(20 * time.Millisecond) {
		if isClosed(u.failed) {
			return
		}
		u.readLog(sidecar, "the sidecar "+name)
		if time.Now().After(deadline) && !p.inLine { // a pod in line waits until the test ends another pod
			u.problem("no token for the app %s:\n%s", name, sidecar.Log.String())
			return
		}
	}
	u.wantEnded(await, "the await "+name)
	if p.whenFull == rig.WhenFullWait {
		u.hold(p, token)
	}
	select {
	case <-p.until():
	case <-sidecar.Done():
	case <-u.failed:
		return
	}
	u.stopRelying(p, token)
	if sidecar.Ended() {
		u.problem("the sidecar %s ended before its app", name)
	}
	u.end(sidecar, "the sidecar "+name)
	if n := len(sidecar.Log.Lines(u.t, "token given back")); n != 1 {
		u.problem("the sidecar %s gave its token back %d times:\n%s", name, n, sidecar.Log.String())
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.done[p.whenFull+", "+met]++
}

// create creates a pod, and retries until it is admitted. It returns the patched pod, and
// names the webhook and its sidecars. If the pod is never admitted, it returns nil.
func (u *installation) create(p pod) (object *corev1.Pod, met string) {
	body := rig.Review(u.t, p.id, p.length, func(request map[string]any) {
		request["object"].(map[string]any)["metadata"].(map[string]any)["name"] = p.name
		rig.AnnotationsOf(request)[rig.AnnotationWhenFull] = p.whenFull
	})
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		w := u.nextWebhook()
		met := fmt.Sprintf("webhook of %s, sidecar of %s", w.of.image, w.sidecars.image)
		a, err := w.TryAdmit(body)
		w.asked.Done()
		switch {
		case err != nil:
			u.problem("the pod %s (%s): %v", p.name, met, err)
			return nil, met
		case a.Allowed:
			object, err := rig.PatchedPod(body, a.Patch)
			if err == nil && len(object.Spec.InitContainers) < 2 {
				err = fmt.Errorf("patched with %s", a.Patch)
			}
			if err != nil {
				u.problem("the pod %s (%s): %v", p.name, met, err)
				return nil, met
			}
			return object, met
		case !strings.HasPrefix(a.Message, "no semaphore available"):
			u.problem("the pod %s (%s) is refused: %s", p.name, met, a.Message)
			return nil, met
		case time.Now().After(deadline) && !p.mayFail:
			u.problem("the pod %s (%s) is still refused: %s", p.name, met, a.Message)
			return nil, met
		case isClosed(u.failed), p.mayFail && isClosed(u.stop):
			return nil, met
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// container returns the process of a container. last is its last argument: for a sidecar,
// the token.
func (u *installation) container(c corev1.Container, p pod, podUID string) (process *rig.Process, last string) {
	var args []string
	for _, arg := range c.Args {
		args = append(args, strings.ReplaceAll(arg, "$(POD_UID)", podUID))
	}
	u.mu.Lock()
	path := u.paths[c.Image]
	u.mu.Unlock()
	process = rig.NewProcess(path, args...)
	process.Cmd.Env = os.Environ()
	known := map[string]string{
		"POD_UID": podUID, "POD_NAME": p.name, "NODE_NAME": "node-1",
		"REDIS_USERNAME": "sidecar/" + p.id.Namespace, "REDIS_PASSWORD": rig.Password,
	}
	for _, e := range c.Env {
		value := cmp.Or(e.Value, known[e.Name])
		if value == "" {
			u.problem("the container %s of the pod %s wants %s, which this test does not know", c.Name, p.name, e.Name)
		}
		process.Cmd.Env = append(process.Cmd.Env, e.Name+"="+value)
	}
	return process, args[len(args)-1]
}

// hold records that a pod relies on a token. It reports a problem if too many pods do.
func (u *installation) hold(p pod, token string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.holding[p.id] == nil {
		u.holding[p.id] = map[string]bool{}
	}
	u.holding[p.id][token] = true
	if n, most := len(u.holding[p.id]), u.most[p.id]; n > most {
		u.problemLocked("%d pods of %s hold a token, and %d may", n, p.id, most)
	}
	if p.inLine {
		u.order = append(u.order, p.name)
	}
}

// stopRelying records that a pod no longer relies on its token.
func (u *installation) stopRelying(p pod, token string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.holding[p.id], token)
}

// held returns the tokens that pods rely on now.
func (u *installation) held() map[rig.ID][]string {
	u.mu.Lock()
	defer u.mu.Unlock()
	held := map[rig.ID][]string{}
	for id := range u.most {
		for token := range u.holding[id] {
			held[id] = append(held[id], token)
		}
	}
	return held
}

// watch compares the tokens in Redis with those that pods rely on, until stop is called.
func (u *installation) watch() (stop func()) {
	conn := u.queue.Dial(u.t)
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		defer conn.Close()
		for {
			select {
			case <-end:
				return
			case <-time.After(5 * time.Millisecond):
			}
			for id, tokens := range u.held() {
				inflight, err := redis.Strings(conn.Do("ZRANGE", id.InflightKey(), 0, -1))
				if err != nil {
					u.problem("read the tokens in use of %s: %v", id, err)
					return
				}
				u.mu.Lock()
				most := u.most[id]
				u.mu.Unlock()
				if len(inflight) > most {
					u.problem("%d tokens of %s are in flight, and %d may be", len(inflight), id, most)
				}
				still := u.held()[id]
				for _, token := range tokens {
					u.mu.Lock()
					podUID := u.uids[token]
					u.mu.Unlock()
					if slices.Contains(still, token) && !slices.Contains(inflight, token) && !slices.Contains(inflight, podUID) {
						u.problem("a pod relies on the token %s of %s, which is not in flight", token, id)
					}
				}
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(end)
		<-ended
	})
}

// forAWhile returns a channel that is closed when a short app ends.
func forAWhile() <-chan struct{} {
	c := make(chan struct{})
	time.AfterFunc(300*time.Millisecond+rand.N(time.Second), func() { close(c) })
	return c
}
