//go:build upgrade

package main

import (
	"cmp"
	"encoding/json"
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
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
)

// upgrade is an installation whose program changes while pods come and go.
type upgrade struct {
	t     *testing.T
	queue *redisServer
	locks []string
	flags []string
	paths map[string]string // of programs, by their images
	most  map[semaphoreID]int

	pods   sync.WaitGroup
	stop   chan struct{} // closed when no more pods are to come
	failed chan struct{} // closed at the first problem: all ends then

	mu       sync.Mutex
	serving  []*upgradeWebhook
	asked    int
	holding  map[semaphoreID]map[string]bool // the tokens of pods that rely on them
	order    []string                        // of the pods that stand in one line, by name, as their apps start
	done     map[string]int                  // pods that went all the way, by what they met
	problems []string
}

// upgradeWebhook is a webhook of one build that injects sidecars of one.
type upgradeWebhook struct {
	*webhookProcess
	of, sidecars programBuild
	asked        sync.WaitGroup // those it has to answer
}

const (
	upgradeInterval = time.Second
	upgradePatience = 2 * time.Minute // for anything: the machine may have much else to do
)

// startUpgrade starts the Redis servers, with the users of a folder's deploy/.
func startUpgrade(t *testing.T, folder string, without ...string) *upgrade {
	t.Helper()
	queueUsers, lockUsers := deployedUsers(t, folder, freshID().namespace)
	queueUsers = slices.DeleteFunc(queueUsers, func(rule string) bool { return slices.Contains(without, rule) })
	u := &upgrade{t: t, queue: startRedisWith(t, queueUsers), paths: map[string]string{}, most: map[semaphoreID]int{},
		stop: make(chan struct{}), failed: make(chan struct{}), holding: map[semaphoreID]map[string]bool{}, done: map[string]int{}}
	for range 3 {
		u.locks = append(u.locks, startRedisWith(t, lockUsers).address)
	}
	t.Setenv("REDIS_USERNAME", "webhook")
	t.Setenv("REDIS_PASSWORD", testPassword)
	u.flags = []string{"--redis-addresses=" + strings.Join(u.locks, ","), "--sidecar-redis-secret=redis",
		fmt.Sprintf("--heartbeat-interval-seconds=%d", seconds(upgradeInterval))}
	return u
}

// problem notes what must not be.
func (u *upgrade) problem(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.problemLocked(format, args...)
}

func (u *upgrade) problemLocked(format string, args ...any) {
	if u.problems = append(u.problems, fmt.Sprintf(format, args...)); len(u.problems) == 1 {
		close(u.failed)
	}
}

// serve starts a webhook.
func (u *upgrade) serve(of, sidecars programBuild) {
	u.t.Helper()
	w := &upgradeWebhook{webhookProcess: startWebhookProcessOf(u.t, of.path, u.queue.address, append(u.flags, "--sidecar-image="+sidecars.image)...),
		of: of, sidecars: sidecars}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.paths[sidecars.image] = sidecars.path
	u.serving = append(u.serving, w)
}

// retire ends the webhooks of one build, or that inject one's sidecars, as a rollout does: nobody new is sent to them, and they are told to
// stop some time after that.
func (u *upgrade) retire(b programBuild) {
	u.mu.Lock()
	var leaving []*upgradeWebhook
	u.serving = slices.DeleteFunc(u.serving, func(w *upgradeWebhook) bool {
		gone := w.of == b || w.sidecars == b
		if gone {
			leaving = append(leaving, w)
		}
		return gone
	})
	u.mu.Unlock()
	for _, w := range leaving {
		w.asked.Wait()
		u.end(w.process, "the webhook of "+w.of.image)
	}
}

// end ends a process as the kubelet does, and reads its log.
func (u *upgrade) end(p *process, name string) {
	_ = p.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(upgradePatience):
		u.problem("%s does not end:\n%s", name, p.log.String())
		p.kill()
	}
	u.wantEnded(p, name)
}

// wantEnded notes what is wrong with a process that has ended.
func (u *upgrade) wantEnded(p *process, name string) {
	if code := p.ProcessState.ExitCode(); code != 0 {
		u.problem("%s ended with %d", name, code)
	}
	u.readLog(p, name)
}

// readLog notes what is wrong by the log of a process. Nothing fails here: all that it may warn of is that another process repairs a
// semaphore.
func (u *upgrade) readLog(p *process, name string) {
	for line := range strings.Lines(p.log.String()) {
		if !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, errLockTaken.Error()) {
			u.problem("%s logged %s", name, line)
		}
	}
}

// webhook is the next that serves. It is not told to stop before the caller says that it has been asked.
func (u *upgrade) webhook() *upgradeWebhook {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked++
	w := u.serving[u.asked%len(u.serving)]
	w.asked.Add(1)
	return w
}

// upgradePod is a pod of a Deployment that is admitted, runs for a while, and ends.
type upgradePod struct {
	name     string
	id       semaphoreID
	length   int
	whenFull string
	inLine   bool                   // its place is looked at
	until    func() <-chan struct{} // its app ends
	mayFail  bool                   // it may be refused for ever: others wait in line
}

// start starts a pod, which goes on by itself.
func (u *upgrade) start(p upgradePod) { u.pods.Go(func() { u.run(p) }) }

// run does what the control plane and a kubelet do for a pod, until it has ended.
func (u *upgrade) run(p upgradePod) {
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
	defer os.Remove(newStartMark(podUID, token).path)
	if p.whenFull == whenFullDeny {
		u.hold(p, token) // the webhook took it
	}
	if err := errors.Join(sidecar.launch(), await.launch()); err != nil {
		u.problem("start the containers %s: %v", name, err)
		return
	}
	defer sidecar.kill()
	defer await.kill()
	for deadline := time.Now().Add(upgradePatience); !isClosed(await.done); time.Sleep(20 * time.Millisecond) {
		if isClosed(u.failed) {
			return
		}
		if u.readLog(sidecar, "the sidecar "+name); time.Now().After(deadline) && !p.inLine { // those in line wait for what the test does
			u.problem("no token for the app %s:\n%s", name, sidecar.log.String())
			return
		}
	}
	u.wantEnded(await, "the await "+name)
	if p.whenFull == whenFullWait {
		u.hold(p, token)
	}
	select {
	case <-p.until():
	case <-sidecar.done:
	case <-u.failed:
		return
	}
	u.letGo(p, token)
	select {
	case <-sidecar.done:
		u.problem("the sidecar %s ended before its app", name)
	default:
	}
	u.end(sidecar, "the sidecar "+name)
	if n := len(sidecar.log.lines(u.t, "token given back")); n != 1 {
		u.problem("the sidecar %s gave its token back %d times:\n%s", name, n, sidecar.log.String())
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.done[p.whenFull+", "+met]++
}

// create asks for a pod until it is admitted; it returns the pod as it was patched, and who did that. It returns nil if it never is.
func (u *upgrade) create(p upgradePod) (*corev1.Pod, string) {
	body := review(u.t, p.id, p.length, func(request map[string]any) {
		metadata := request["object"].(map[string]any)["metadata"].(map[string]any)
		metadata["name"] = p.name
		metadata["annotations"].(map[string]any)[annotationWhenFull] = p.whenFull
	})
	for deadline := time.Now().Add(upgradePatience); ; time.Sleep(100 * time.Millisecond) {
		w := u.webhook()
		met := fmt.Sprintf("webhook of %s, sidecar of %s", w.of.image, w.sidecars.image)
		status, text, _, err := w.post(body)
		w.asked.Done()
		var a admission
		if err == nil {
			a, err = readAdmission(status, text)
		}
		switch {
		case err != nil:
			u.problem("the pod %s (%s): %v", p.name, met, err)
			return nil, met
		case a.allowed:
			object, err := reviewedPod(body, a.patch)
			if err == nil && len(object.Spec.InitContainers) < 2 {
				err = fmt.Errorf("patched with %s", a.patch)
			}
			if err != nil {
				u.problem("the pod %s (%s): %v", p.name, met, err)
				return nil, met
			}
			return object, met
		case !strings.HasPrefix(a.message, "no semaphore available"):
			u.problem("the pod %s (%s) is refused: %s", p.name, met, a.message)
			return nil, met
		case time.Now().After(deadline) && !p.mayFail:
			u.problem("the pod %s (%s) is still refused: %s", p.name, met, a.message)
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

// reviewedPod is the pod of a review, with a patch.
func reviewedPod(body, patch []byte) (*corev1.Pod, error) {
	var r admissionReview
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, err
	}
	steps, err := jsonpatch.DecodePatch(patch)
	if err != nil {
		return nil, err
	}
	text, err := steps.Apply(r.Request.Object)
	if err != nil {
		return nil, err
	}
	object := new(corev1.Pod)
	return object, json.Unmarshal(text, object)
}

// container is a container's process, and the last of its arguments, which is the token of a sidecar.
func (u *upgrade) container(c corev1.Container, p upgradePod, podUID string) (started *process, last string) {
	var args []string
	for _, arg := range c.Args {
		args = append(args, strings.ReplaceAll(arg, "$(POD_UID)", podUID))
	}
	u.mu.Lock()
	path := u.paths[c.Image]
	u.mu.Unlock()
	started = newProcess(path, args...)
	started.Env = os.Environ()
	known := map[string]string{"POD_UID": podUID, "POD_NAME": p.name, "NODE_NAME": "node-1", "REDIS_USERNAME": namespaceUser(p.id.namespace), "REDIS_PASSWORD": testPassword}
	for _, e := range c.Env {
		value := cmp.Or(e.Value, known[e.Name])
		if value == "" {
			u.problem("the container %s of the pod %s wants %s, which this test does not know", c.Name, p.name, e.Name)
		}
		started.Env = append(started.Env, e.Name+"="+value)
	}
	return started, args[len(args)-1]
}

// hold notes that a pod relies on a token, and that there are not too many that do.
func (u *upgrade) hold(p upgradePod, token string) {
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

func (u *upgrade) letGo(p upgradePod, token string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.holding[p.id], token)
}

// held are the tokens on which pods rely now.
func (u *upgrade) held() map[semaphoreID][]string {
	u.mu.Lock()
	defer u.mu.Unlock()
	held := map[semaphoreID][]string{}
	for id := range u.most {
		for token := range u.holding[id] {
			held[id] = append(held[id], token)
		}
	}
	return held
}

// look compares, until stop is called, what Redis counts with what pods rely on.
func (u *upgrade) look() (stop func()) {
	conn, err := redis.Dial("tcp", u.queue.address, u.queue.options...)
	must(u.t, err)
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
			before := u.held()
			for id, tokens := range before {
				inflight, err := redis.Strings(conn.Do("ZRANGE", id.inflightKey(), 0, -1))
				if err != nil {
					u.problem("look at %s: %v", id, err)
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
					if slices.Contains(still, token) && !slices.Contains(inflight, token) {
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

// forAWhile is how long an app runs that has not much to do.
func forAWhile() <-chan struct{} {
	c := make(chan struct{})
	time.AfterFunc(300*time.Millisecond+rand.N(time.Second), func() { close(c) })
	return c
}
