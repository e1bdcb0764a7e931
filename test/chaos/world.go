package chaos

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
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	heartbeatInterval = 2 * time.Second
	staleThreshold    = 8 * time.Second
)

// timing is the timing of all processes.
var timing = rig.Timing{Interval: heartbeatInterval, Threshold: staleThreshold}

// world has a queue, lock servers, webhooks, gates, and pods on some nodes.
type world struct {
	t        *testing.T
	binary   string
	began    time.Time
	ctx      context.Context // of the pods
	stop     func()
	queue    queue
	locks    rig.LockServers
	webhooks []*webhook
	api      *rig.APIServer
	gates    []*gate
	nodes    []*node
	rush     bool          // a refused pod is retried at once
	gating   bool          // some of the waiting pods are gated
	patience time.Duration // the shortest time before a user deletes a waiting pod
	clocks   string        // folder of the servers' clocks

	slots sync.WaitGroup // each runs one pod after another
	last  chan struct{}  // closed when no more pods start; the present ones end after their turn

	mu         sync.Mutex
	lengths    map[string]int // of new pods, by semaphore
	extra      []*podLife     // unanswered admissions, which may have taken a token
	pods       []*pod
	faults     []fault
	settings   []*setting
	lines      []sighting
	warnings   []warning
	complaints []string
	refused    int // commands of the tenant with scripts of its own
}

func (w *world) now() time.Duration { return time.Since(w.began) }

// complain records a problem.
func (w *world) complain(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.complaints = append(w.complaints, fmt.Sprintf(format, args...))
}

// note adds an admission without a pod to the history.
func (w *world) note(l *podLife) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.extra = append(w.extra, l)
}

// restarted is a process that is killed and restarted repeatedly. Process is the last
// one.
type restarted struct {
	*rig.Process
	binary string
	user   string // of Redis
	args   []string
	onLine func(line string)
	all    []*rig.Process // so far
}

func (s *restarted) launch(t *testing.T) {
	s.Process = rig.NewProcess(s.binary, s.args...)
	s.Process.Cmd.Env = loginAs(s.user)
	s.Process.OnLine = s.onLine
	s.all = append(s.all, s.Process)
	s.Process.Start(t)
}

// webhook is a webhook with its client.
type webhook struct {
	restarted
	address string
	client  *http.Client
}

// node is the machine of some pods. It has its own proxies in front of all servers.
type node struct {
	name    string
	proxies []*rig.Proxy
	far     *strings.Replacer // maps addresses of servers, and of other nodes' proxies, to its own proxies
}

// servers returns all servers that pods and webhooks connect to.
func (w *world) servers() []*rig.Redis {
	return slices.Concat(w.queue.data(), w.queue.sentinels(), w.locks)
}

// newNode makes a node. Its proxies also replace the ports in the replies of Sentinels
// and Clusters.
func (w *world) newNode(name string) *node {
	n := &node{name: name}
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

// args returns the arguments of a process on the node.
func (n *node) args(args []string, uid string) (all []string) {
	for _, a := range args {
		all = append(all, strings.ReplaceAll(n.far.Replace(a), "$(POD_UID)", uid))
	}
	return all
}

// startWorld starts everything but the pods.
func startWorld(t *testing.T, program, kind string) *world {
	w := &world{t: t, binary: program, last: make(chan struct{}), patience: 20 * time.Second, gating: true,
		clocks: t.TempDir(), lengths: map[string]int{"shop/one": 1, "shop/two": 2, "shop/few": 3, "shop/some": 4}}
	w.ctx, w.stop = context.WithCancel(t.Context())
	shim := filepath.Join(w.clocks, "clock.so")
	out, err := exec.Command("gcc", "-shared", "-fPIC", "-O2", "-o", shim, "testdata/clock.c").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	env := func(address string) []string {
		if _, err := os.Stat(w.clockFile(address)); err != nil {
			rig.Must(t, os.WriteFile(w.clockFile(address), make([]byte, 8), 0o600))
		}
		return []string{"LD_PRELOAD=" + shim, "CHAOS_CLOCK=" + w.clockFile(address)}
	}
	w.queue = startQueue(t, kind, env)
	for _, s := range w.queue.data() {
		s.WantAge(t, heartbeatInterval+rig.BeatTimeout) // it admits no pod before
	}
	w.locks = rig.StartLockServers(t, 3, rig.RedisOptions{Env: env, Kind: rig.SingleQueue, Bare: true,
		Args: func(port string) []string { return append(rig.PlainPort(port), serverArgs(lockUsers)...) }})
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
	w.startTenants()
	t.Cleanup(w.finish)
	return w
}

// flags returns the flags of webhooks and gates on a node.
func (w *world) flags(on *node) []string {
	return on.args(append(timing.Flags(), "--queue-redis-address="+w.queue.Address(),
		"--redis-addresses="+strings.Join(w.locks.Addresses(), ","),
		"--metrics-bind-address="+rig.FreeAddress(w.t)), "")
}

func (w *world) newWebhook(on *node) *webhook {
	dir := w.t.TempDir()
	rig.WriteCertificate(w.t, dir, 1)
	address := rig.FreeAddress(w.t)
	args := []string{"webhook", "--host=127.0.0.1", "--port=" + rig.Port(address), "--certDir=" + dir,
		"--sidecar-redis-secret=redis"}
	transport := &http.Transport{MaxIdleConnsPerHost: 25, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	h := &webhook{restarted: restarted{binary: w.binary, user: "webhook", args: append(args, w.flags(on)...),
		onLine: w.readNamedWarning}, address: address,
		client: &http.Client{Timeout: 4 * time.Second, Transport: transport}}
	h.launch(w.t)
	return h
}

func (w *world) clockFile(address string) string {
	return filepath.Join(w.clocks, "clock-"+rig.Port(address))
}

// setClock sets a server's clock; by is the difference from the real time.
func (w *world) setClock(s *rig.Redis, by time.Duration) {
	f, err := os.OpenFile(w.clockFile(s.Address), os.O_WRONLY, 0)
	rig.Must(w.t, err)
	defer f.Close()
	_, err = f.WriteAt(enc.LittleEndian.AppendUint64(nil, uint64(int(by/time.Second))), 0)
	rig.Must(w.t, err)
}

// semaphores returns the names of all semaphores.
func (w *world) semaphores() []string {
	return []string{"shop/one", "shop/two", "shop/few", "shop/some"}
}

func (w *world) length(semaphore string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lengths[semaphore]
}

// work returns how long an app works.
func (w *world) work(rng *rand.Rand) time.Duration {
	if w.ending() {
		return 200 * time.Millisecond
	}
	if rng.IntN(4) == 0 {
		return 8*time.Second + within(rng, 12*time.Second)
	}
	return 500*time.Millisecond + within(rng, 4*time.Second)
}

// populate keeps many pods alive until the world stops.
func (w *world) populate(seed uint64, many int) {
	for slot := range many {
		w.slots.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(slot)))
			_ = rig.Sleep(w.ctx, within(rng, 3*time.Second))
			for n := 0; w.ctx.Err() == nil && !w.ending(); n++ {
				semaphore := w.semaphores()[slot%len(w.semaphores())]
				waits := slot%7 < 6 && rng.IntN(8) > 0 // the others would seldom come to ask
				name := fmt.Sprintf("pod-%d-%d", slot, n)
				p := w.newPod(name, semaphore, w.length(semaphore), waits, w.nodes[rng.IntN(len(w.nodes))])
				p.life.gated = waits && w.gating && rng.IntN(3) == 0
				if waits && rng.IntN(4) == 0 {
					p.life.headStart = time.Duration(1+rng.IntN(4)) * time.Second
				}
				if waits && rng.IntN(3) == 0 {
					p.life.wait, p.life.runs = time.Duration(2+rng.IntN(8))*time.Second, rng.IntN(2) == 0
				}
				if longest := p.life.length; waits && longest > 1 && rng.IntN(4) == 0 {
					p.life.tokens = 2 + rng.IntN(longest-1)
				}
				w.mu.Lock()
				w.pods = append(w.pods, p)
				w.mu.Unlock()
				p.live(rng)
				pause := time.Second
				if w.rush && p.life.refused {
					pause = 20 * time.Millisecond
				}
				_ = rig.Sleep(w.ctx, within(rng, pause))
			}
		})
	}
}

// ending reports whether all pods are about to end.
func (w *world) ending() bool {
	select {
	case <-w.last:
		return true
	default:
		return false
	}
}

// wantTurns stops new pods, and requires that all present pods get their turn.
func (w *world) wantTurns() {
	w.t.Helper()
	close(w.last)
	begun := w.now() + time.Second // by then, pods without patience are gone
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
		l := p.life
		p.mu.Unlock()
		gone := l.died != notYet || l.gaveUp != notYet
		if l.waits && l.admitted && l.started == notYet && !gone && (l.ended == notYet || l.ended > begun) {
			w.t.Errorf("%s of %s never had its turn", l.name, l.semaphore)
		}
	}
}

// alive returns the running pods.
func (w *world) alive() (all []*pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.pods {
		if p.strike(func() {}) {
			all = append(all, p)
		}
	}
	return all
}

// history returns the history up to now.
func (w *world) history() *history {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := &history{interval: heartbeatInterval, threshold: staleThreshold, end: w.now(), faults: slices.Clone(w.faults),
		lines: slices.Clone(w.lines), warnings: slices.Clone(w.warnings)}
	for _, s := range w.settings {
		h.settings = append(h.settings, *s)
	}
	for _, p := range w.pods {
		p.mu.Lock()
		l := p.life
		l.silences = slices.Clone(l.silences)
		p.mu.Unlock()
		h.pods = append(h.pods, &l)
	}
	h.pods = append(h.pods, w.extra...)
	return h
}

// wantNothingLeft checks that the pods have left only free tokens, which expire, and that
// their number is the length.
func (w *world) wantNothingLeft() {
	t := w.t
	t.Helper()
	for _, name := range w.semaphores() {
		id := rig.ParseID(name)
		rig.Eventually(t, staleThreshold+30*time.Second, func() error {
			server := w.queue.Holder(t, id)
			if err := server.Maintain(id, timing, w.length(name), false); err != nil {
				return err
			}
			free, inflight, err := server.Counts(id)
			if err != nil {
				return err
			}
			if free != w.length(name) || inflight != 0 {
				return fmt.Errorf("%s has %d tokens free and %d in flight, of %d, and no pod is left",
					name, free, inflight, w.length(name))
			}
			for _, key := range []string{id.WaitersKey(), id.SeenKey()} {
				if there, err := redis.Bool(server.Control.Do("EXISTS", key)); err != nil || there {
					return fmt.Errorf("%s is there, %v", key, err)
				}
			}
			names, err := redis.Strings(server.Control.Do("HKEYS", id.NamesKey()))
			names = slices.DeleteFunc(names, func(name string) bool { return strings.Contains(name, "gaveUp") }) // of a pod that died
			if err != nil || len(names) > 0 {
				return fmt.Errorf("%s has %v, %v", id.NamesKey(), names, err)
			}
			for _, key := range []string{id.QueueKey(), id.StateKey(), id.NamesKey()} {
				left, err := redis.Int(server.Control.Do("TTL", key))
				if err != nil || left < 0 && key != id.NamesKey() || left == -1 || left > 300 {
					return fmt.Errorf("%s expires in %d s, %v", key, left, err)
				}
			}
			return nil
		})
	}
	rig.Eventually(t, 10*time.Second, w.locks.LocksLeft)
}

// wantAddUp checks, while pods live, that the free and used tokens add up to the length.
func (w *world) wantAddUp() {
	t := w.t
	t.Helper()
	for _, name := range w.semaphores() {
		id := rig.ParseID(name)
		rig.Eventually(t, staleThreshold+30*time.Second, func() error {
			server := w.queue.Holder(t, id)
			if err := server.Maintain(id, timing, w.length(name), false); err != nil {
				return err
			}
			if free, inflight, err := server.Counts(id); err != nil || free+inflight != w.length(name) {
				return fmt.Errorf("%s has %d tokens free and %d in flight, of %d, %v",
					name, free, inflight, w.length(name), err)
			}
			return nil
		})
	}
}

// finish ends all pods, and waits until they have ended.
func (w *world) finish() {
	w.stop()
	w.slots.Wait()
	for _, p := range w.pods { // a sidecar that died may still be paused
		if p.sidecar != nil {
			p.sidecar.Kill()
		}
	}
}
