//go:build chaos

package main

import (
	"context"
	"crypto/tls"
	enc "encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	chaosInterval  = 2 * time.Second
	chaosThreshold = 8 * time.Second
)

// chaosWorld is a queue, lock servers, webhooks, and pods on some nodes.
type chaosWorld struct {
	t        *testing.T
	binary   string
	began    time.Time
	ctx      context.Context // of the pods
	stop     func()
	queue    chaosQueue
	locks    redlockServers
	webhooks []*chaosWebhook
	api      *rig.APIServer
	gates    []*chaosServer
	nodes    []*chaosNode
	rush     bool          // who is refused asks again at once
	gating   bool          // of those that wait, some are gated
	patience time.Duration // of pods that wait, at least
	clocks   string        // folder of the servers' clocks

	slots sync.WaitGroup
	last  chan struct{} // closed when no more pods are to come, and those that are there are to end once they have had their turn

	mu        sync.Mutex
	lengths   map[string]int // of new pods, by semaphore
	lives     []*podLife     // that are no pods
	pods      []*chaosPod
	faults    []fault
	complaint []string
}

func (w *chaosWorld) now() time.Duration { return time.Since(w.began) }

// complain notes what must not happen.
func (w *chaosWorld) complain(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.complaint = append(w.complaint, fmt.Sprintf(format, args...))
}

// note adds what is no pod of its own to the history.
func (w *chaosWorld) note(l *podLife) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lives = append(w.lives, l)
}

// chaosServer is a process that is started again and again.
type chaosServer struct {
	*rig.Process
	binary string
	args   []string
	all    []*rig.Process // so far
}

func (s *chaosServer) launch(t *testing.T) {
	s.Process = rig.NewProcess(s.binary, s.args...)
	s.all = append(s.all, s.Process)
	s.Process.Start(t)
}

// chaosWebhook is a webhook.
type chaosWebhook struct {
	chaosServer
	address string
	client  *http.Client
}

// chaosNode is where pods run: what is between them and all servers is its own.
type chaosNode struct {
	name    string
	proxies []*rig.Proxy
	far     *strings.Replacer // from addresses of servers, and those of other nodes' proxies, to its own
}

// servers are all that pods and webhooks connect to.
func (w *chaosWorld) servers() []*rig.Redis {
	return slices.Concat(w.queue.data(), w.queue.sentries(), w.locks)
}

// newNode makes a node.
func (w *chaosWorld) newNode(name string) *chaosNode {
	n := &chaosNode{name: name}
	var answers []string
	for _, s := range w.servers() {
		p := rig.StartProxy(w.t, s.Address)
		n.proxies = append(n.proxies, p)
		from, to := rig.Port(s.Address), rig.Port(p.Address)
		if len(from) != len(to) {
			w.t.Fatalf("ports %s and %s are not of one length", from, to)
		}
		answers = append(answers, ":"+from+"\r\n", ":"+to+"\r\n", "$5\r\n"+from+"\r\n", "$5\r\n"+to+"\r\n")
	}
	near := strings.NewReplacer(answers...)
	for _, p := range n.proxies {
		p.Rewrite = func(b []byte) []byte { return []byte(near.Replace(string(b))) }
	}
	return n
}

// args are the arguments of a sidecar on the node.
func (n *chaosNode) args(args []string, uid string) (all []string) {
	for _, a := range args {
		all = append(all, strings.ReplaceAll(n.far.Replace(a), "$(POD_UID)", uid))
	}
	return all
}

// startChaos starts a world.
func startChaos(t *testing.T, program, kind string) *chaosWorld {
	w := &chaosWorld{t: t, binary: program, last: make(chan struct{}), patience: 20 * time.Second, gating: true,
		clocks: t.TempDir(), lengths: map[string]int{"shop/one": 1, "shop/two": 2, "shop/few": 3, "shop/some": 4}}
	w.ctx, w.stop = context.WithCancel(t.Context())
	shim := filepath.Join(w.clocks, "clock.so")
	if out, err := exec.Command("gcc", "-shared", "-fPIC", "-O2", "-o", shim, "testdata/chaos/clock.c").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	env := func(address string) []string {
		if _, err := os.Stat(w.clockFile(address)); err != nil {
			rig.Must(t, os.WriteFile(w.clockFile(address), make([]byte, 8), 0o600))
		}
		return []string{"LD_PRELOAD=" + shim, "CHAOS_CLOCK=" + w.clockFile(address)}
	}
	w.queue = startChaosQueue(t, kind, env)
	w.locks = redlockServers(rig.StartLockServers(t, 3, rig.RedisOptions{Env: env, Kind: rig.SingleQueue}))
	for i := range 3 {
		w.nodes = append(w.nodes, w.newNode(fmt.Sprintf("node-%d", i)))
	}
	for _, n := range w.nodes {
		var addresses []string
		for i, s := range w.servers() {
			addresses = append(addresses, s.Address, n.proxies[i].Address)
			for _, other := range w.nodes {
				addresses = append(addresses, other.proxies[i].Address, n.proxies[i].Address)
			}
		}
		n.far = strings.NewReplacer(addresses...)
	}
	w.began = time.Now()
	for i := range 3 {
		w.webhooks = append(w.webhooks, w.newWebhook(w.nodes[i]))
	}
	for _, h := range w.webhooks {
		rig.Eventually(t, 20*time.Second, func() error {
			c, err := net.Dial("tcp", h.address)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	w.startGates()
	return w
}

func (w *chaosWorld) newWebhook(node *chaosNode) *chaosWebhook {
	dir := w.t.TempDir()
	rig.WriteCertificate(w.t, dir, 1)
	address := rig.FreeAddress(w.t)
	h := &chaosWebhook{chaosServer: chaosServer{binary: w.binary, args: node.args([]string{"webhook", "--host=127.0.0.1", "--port=" + rig.Port(address),
		"--metrics-bind-address=" + rig.FreeAddress(w.t), "--certDir=" + dir, "--queue-redis-address=" + w.queue.Address(),
		"--redis-addresses=" + strings.Join(w.locks.addresses(), ","),
		fmt.Sprintf("--heartbeat-interval-seconds=%d", seconds(chaosInterval)),
		fmt.Sprintf("--stale-threshold-seconds=%d", seconds(chaosThreshold))}, "")}, address: address,
		client: &http.Client{Timeout: 4 * time.Second, Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}}
	h.launch(w.t)
	return h
}

func (w *chaosWorld) clockFile(address string) string {
	return filepath.Join(w.clocks, "clock-"+rig.Port(address))
}

// setClock sets the clock of a server to so far from the real one.
func (w *chaosWorld) setClock(s *rig.Redis, by time.Duration) {
	f, err := os.OpenFile(w.clockFile(s.Address), os.O_WRONLY, 0)
	rig.Must(w.t, err)
	defer f.Close()
	_, err = f.WriteAt(enc.LittleEndian.AppendUint64(nil, uint64(seconds(by))), 0)
	rig.Must(w.t, err)
}

// semaphores are the names of all.
func (w *chaosWorld) semaphores() []string {
	return []string{"shop/one", "shop/two", "shop/few", "shop/some"}
}

func (w *chaosWorld) length(semaphore string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lengths[semaphore]
}

func (w *chaosWorld) work(rng *rand.Rand) time.Duration {
	if w.ending() {
		return 200 * time.Millisecond
	}
	if rng.IntN(4) == 0 {
		return 8*time.Second + within(rng, 12*time.Second)
	}
	return 500*time.Millisecond + within(rng, 4*time.Second)
}

// populate lets so many pods live at a time, until the world is stopped.
func (w *chaosWorld) populate(seed uint64, many int) {
	for slot := range many {
		w.slots.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(slot)))
			_ = sleep(w.ctx, within(rng, 3*time.Second))
			for n := 0; w.ctx.Err() == nil && !w.ending(); n++ {
				semaphore := w.semaphores()[slot%len(w.semaphores())]
				waits := slot%7 < 6 && rng.IntN(8) > 0 // the others would seldom come to ask
				p := w.newPod(fmt.Sprintf("pod-%d-%d", slot, n), semaphore, w.length(semaphore), waits, w.nodes[rng.IntN(len(w.nodes))])
				p.life.gated = waits && w.gating && rng.IntN(3) == 0
				w.mu.Lock()
				w.pods = append(w.pods, p)
				w.mu.Unlock()
				p.live(rng)
				pause := time.Second
				if w.rush && p.life.refused {
					pause = 20 * time.Millisecond
				}
				_ = sleep(w.ctx, within(rng, pause))
			}
		})
	}
}

// ending reports whether all are to come to an end.
func (w *chaosWorld) ending() bool {
	select {
	case <-w.last:
		return true
	default:
		return false
	}
}

// wantTurns lets no more pods come, and wants all that are there to have their turn.
func (w *chaosWorld) wantTurns() {
	w.t.Helper()
	close(w.last)
	begun := w.now() + time.Second // those that have lost their patience are gone by then
	done := make(chan struct{})
	go func() {
		w.slots.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		w.t.Error("a minute after the last one came, not all pods have ended")
	}
	for _, p := range w.pods {
		p.mu.Lock()
		if l := p.life; l.waits && l.admitted && l.started == notYet && l.died == notYet && (l.ended == notYet || l.ended > begun) {
			w.t.Errorf("%s of %s never had its turn", l.name, l.semaphore)
		}
		p.mu.Unlock()
	}
}

// alive are the pods that run.
func (w *chaosWorld) alive() (all []*chaosPod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.pods {
		if p.strike(func() {}) {
			all = append(all, p)
		}
	}
	return all
}

// history is what happened so far.
func (w *chaosWorld) history() *history {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := &history{interval: chaosInterval, threshold: chaosThreshold, end: w.now(), faults: slices.Clone(w.faults)}
	for _, p := range w.pods {
		p.mu.Lock()
		l := p.life
		l.silences = slices.Clone(l.silences)
		p.mu.Unlock()
		h.pods = append(h.pods, &l)
	}
	h.pods = append(h.pods, w.lives...)
	return h
}

// wantNothingLeft checks that no pod has left anything but free tokens, which expire, and that exactly as many as the length can be had.
func (w *chaosWorld) wantNothingLeft() {
	t := w.t
	t.Helper()
	s := semaphoresOf(t, w.config())
	for _, name := range w.semaphores() {
		id := idOf(name)
		rig.Eventually(t, chaosThreshold+30*time.Second, func() error {
			if err := s.maintain(t.Context(), id, w.length(name), false); err != nil {
				return err
			}
			conn := w.queue.Holder(t, id)
			queue, inflight, err := conn.Counts(id)
			if err != nil {
				return err
			}
			if queue != w.length(name) || inflight != 0 {
				return fmt.Errorf("%s has %d tokens free and %d in flight, of %d, and no pod is left", name, queue, inflight, w.length(name))
			}
			for _, key := range []string{id.waitersKey(), id.seenKey(), id.namesKey()} {
				if there, err := redis.Bool(conn.Control.Do("EXISTS", key)); err != nil || there {
					return fmt.Errorf("%s is there, %v", key, err)
				}
			}
			for _, key := range []string{id.queueKey(), id.stateKey()} {
				if left, err := redis.Int(conn.Control.Do("TTL", key)); err != nil || left < 0 || left > 300 {
					return fmt.Errorf("%s expires in %d s, %v", key, left, err)
				}
			}
			return nil
		})
	}
	rig.Eventually(t, 10*time.Second, w.locks.locksLeft)
}

// wantAddUp checks, while pods live, that free and used tokens are as many as the length.
func (w *chaosWorld) wantAddUp() {
	t := w.t
	t.Helper()
	s := semaphoresOf(t, w.config())
	for _, name := range w.semaphores() {
		id := idOf(name)
		rig.Eventually(t, chaosThreshold+30*time.Second, func() error {
			if err := s.maintain(t.Context(), id, w.length(name), false); err != nil {
				return err
			}
			if queue, inflight, err := w.queue.Holder(t, id).Counts(id); err != nil || queue+inflight != w.length(name) {
				return fmt.Errorf("%s has %d tokens free and %d in flight, of %d, %v", name, queue, inflight, w.length(name), err)
			}
			return nil
		})
	}
}

func (w *chaosWorld) config() webhookConfig {
	c := beating(w.queue.Address(), chaosInterval)
	c.staleThreshold = chaosThreshold
	c.redisAddresses = w.locks.addresses()
	return c
}

func idOf(name string) semaphoreID {
	namespace, key, _ := strings.Cut(name, "/")
	return semaphoreID{namespace, key}
}

// finish ends all pods, and waits for their ends.
func (w *chaosWorld) finish() {
	w.stop()
	w.slots.Wait()
	for _, p := range w.pods { // what was killed for good may still be stopped
		if p.sidecar != nil {
			p.sidecar.signal(syscall.SIGCONT)
			p.sidecar.signal(syscall.SIGKILL)
		}
	}
}
