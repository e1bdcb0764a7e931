package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// nemesis disturbs processes, networks and clocks. Its seed decides the order.
type nemesis struct {
	*world
	rng    *rand.Rand
	counts map[string]int // of blows, by name
}

func newNemesis(w *world, seed uint64) *nemesis {
	return &nemesis{w, rand.New(rand.NewPCG(seed, 1<<32)), map[string]int{}}
}

// blow is one disturbance. strike returns after everything works again.
type blow struct {
	name   string
	harms  bool // it may excuse more pods at work than the length allows
	strike func(n *nemesis, f *fault)
}

// between returns a random duration.
func (n *nemesis) between(least, most time.Duration) time.Duration {
	return least + within(n.rng, most-least)
}

func (n *nemesis) wait(least, most time.Duration) { time.Sleep(n.between(least, most)) }

// pick returns a random element of a list.
func pick[T any](n *nemesis, list []T) T { return list[n.rng.IntN(len(list))] }

// primaryOf picks a server that holds semaphores, and records which.
func (n *nemesis) primaryOf(f *fault) *rig.Redis {
	s := n.queue.Holder(n.t, rig.ParseID(pick(n, n.semaphores())))
	f.semaphores = nil
	for _, name := range n.semaphores() {
		if n.queue.Holder(n.t, rig.ParseID(name)) == s {
			f.semaphores = append(f.semaphores, name)
		}
	}
	return s
}

// ready waits until the queue works.
func (n *nemesis) ready() {
	for _, s := range n.queue.data() {
		if _, err := s.Control.Do("PING"); err != nil {
			s.Redial(n.t)
		}
	}
	n.queue.WantReady(n.t, map[bool]int{true: 2, false: 3}[len(n.queue.sentinels()) > 0])
}

// Blows that tests name.
const (
	longOutage = "all of the queue is paused for longer than the threshold"
	dataLoss   = "all data is lost"
	emptyStart = "an empty server takes the place of a primary"
	briefPause = "sidecars are paused for less than the threshold"
	death      = "all that work die"
)

// stabs are blows to single pods. Their histories record them: they are no faults of the
// world.
var stabs = map[string]func(n *nemesis){
	briefPause: func(n *nemesis) {
		for range 3 {
			n.stabOne(func(p *pod) bool { return p.pause(longestHarmless) })
		}
	},
	death: func(n *nemesis) {
		for _, p := range n.alive() {
			if p.startedYet() {
				p.vanish()
			}
		}
	},
}

// longestHarmless is the longest pause of a sidecar that does not make its token stale.
const longestHarmless = staleThreshold - heartbeatInterval - slack/2 - 500*time.Millisecond

var blows = slices.Concat(serverBlows, gateBlows)

var serverBlows = []blow{
	{"a webhook is killed", false, func(n *nemesis, f *fault) {
		h := pick(n, n.webhooks)
		h.Signal(n.t, syscall.SIGKILL)
		<-h.Done()
		n.wait(200*time.Millisecond, 2*time.Second)
		h.launch(n.t)
	}},
	{"a webhook is paused", false, func(n *nemesis, f *fault) {
		h := pick(n, n.webhooks)
		h.Signal(n.t, syscall.SIGSTOP)
		n.wait(time.Second, 5*time.Second)
		h.Signal(n.t, syscall.SIGCONT)
	}},
	{"the scripts are lost", false, func(n *nemesis, f *fault) {
		f.away = true
		for _, s := range append(n.queue.data(), n.locks...) {
			s.Do(n.t, "SCRIPT", "FLUSH")
		}
		n.wait(scriptsWithin, scriptsWithin+time.Second)
	}},
	{"a lock server is killed", false, func(n *nemesis, f *fault) {
		s := pick(n, n.locks)
		s.Crash(n.t)
		n.wait(time.Second, 3*time.Second)
		rig.Must(n.t, s.Start())
	}},
	{"most lock servers are paused", false, func(n *nemesis, f *fault) {
		f.unrepaired = true
		for _, s := range n.locks[:2] {
			s.Pause(n.t)
		}
		n.wait(2*time.Second, 4*time.Second)
		for _, s := range n.locks[:2] {
			s.Resume(n.t)
		}
	}},
	{"a replica is killed", false, func(n *nemesis, f *fault) {
		primary := n.primaryOf(f)
		s := n.queue.replica(n.t, primary)
		s.Crash(n.t)
		n.wait(300*time.Millisecond, 2*time.Second)
		n.queue.restart(n.t, s)
		n.ready()
	}},
	{"a Sentinel is killed", false, func(n *nemesis, f *fault) {
		if sentinels := n.queue.sentinels(); len(sentinels) > 0 {
			s := pick(n, sentinels)
			s.Crash(n.t)
			n.wait(500*time.Millisecond, 2*time.Second)
			rig.Must(n.t, s.Start())
			n.ready()
		}
	}},
	{"a replica with all data takes over", false, func(n *nemesis, f *fault) {
		f.away = true
		n.queue.handOver(n.t, n.primaryOf(f))
		n.ready()
	}},
	{"a primary is started again at once", false, func(n *nemesis, f *fault) {
		f.away = true
		s := n.primaryOf(f)
		s.Crash(n.t)
		n.queue.restart(n.t, s)
		n.ready()
	}},
	{longOutage, false, func(n *nemesis, f *fault) {
		f.away = true
		all := slices.Concat(n.queue.sentinels(), n.queue.data())
		for _, s := range all {
			s.Pause(n.t)
		}
		n.wait(staleThreshold+time.Second, staleThreshold+4*time.Second)
		for _, s := range all {
			s.Resume(n.t)
		}
		n.ready()
	}},
	{"a clock is set", false, func(n *nemesis, f *fault) {
		f.recovering = true
		n.setClock(n.primaryOf(f), time.Duration(n.rng.IntN(51)-25)*time.Second)
	}},
	{"answers take longer", false, func(n *nemesis, f *fault) {
		slow := pick(n, n.nodes)
		for _, p := range slow.proxies {
			p.Delay.Store(int64(n.between(20*time.Millisecond, 150*time.Millisecond)))
		}
		n.wait(2*time.Second, 5*time.Second)
		for _, p := range slow.proxies {
			p.Delay.Store(0)
		}
	}},
	{"connections fall silent", false, func(n *nemesis, f *fault) {
		f.silent = true
		for _, p := range pick(n, n.nodes).proxies {
			p.Silence()
		}
		n.wait(3*time.Second, 4*time.Second)
	}},
	{"a node is cut off for a while", false, func(n *nemesis, f *fault) { n.cut(f, time.Second, 3*time.Second) }},
	{"a node is cut off", true, func(n *nemesis, f *fault) { n.cut(f, staleThreshold, staleThreshold+4*time.Second) }},
	{"a node is lost", true, func(n *nemesis, f *fault) {
		lost := pick(n, n.nodes)
		for _, p := range n.alive() {
			if p.node == lost {
				p.vanish()
			}
		}
	}},
	{dataLoss, true, func(n *nemesis, f *fault) {
		f.loses = losesAll
		n.primaryOf(f).Do(n.t, "FLUSHALL")
	}},
	{emptyStart, true, func(n *nemesis, f *fault) {
		f.away, f.loses = true, losesByStart
		s := n.primaryOf(f)
		s.Crash(n.t)
		s.LoseData(n.t)
		n.queue.restart(n.t, s)
		began, id := time.Now(), rig.ParseID(f.semaphores[0])
		rig.Eventually(n.t, 20*time.Second, func() error {
			_, err := s.Control.Do("SET", id.LockKey(), 1, "EX", 1)
			if err != nil && !n.queue.Serves(n.t, s, id) {
				return nil
			}
			return err
		})
		if !n.queue.Serves(n.t, s, id) {
			f.loses, f.emptied = losesRecent, true // a replica was quicker
			n.queue.rejoin(n.t, s)
		} else if time.Since(began) > heartbeatInterval/2 {
			f.loses = losesAll // it was young for too long before it took a heartbeat
		}
		n.ready()
	}},
	{"a primary is killed", true, func(n *nemesis, f *fault) {
		f.away, f.loses = true, losesRecent
		s := n.primaryOf(f)
		s.Crash(n.t)
		rig.Eventually(n.t, 20*time.Second, func() error {
			if n.queue.Serves(n.t, s, rig.ParseID(f.semaphores[0])) {
				return fmt.Errorf("no other primary than %s", s.Address)
			}
			return nil
		})
		n.queue.restart(n.t, s)
		n.ready()
	}},
	{"a primary is paused", true, func(n *nemesis, f *fault) {
		f.away, f.loses = true, losesRecent
		s := n.primaryOf(f)
		s.Pause(n.t)
		n.wait(500*time.Millisecond, 5*time.Second)
		s.Resume(n.t)
		n.wait(time.Millisecond, 2*time.Second) // it may still act as the primary
		n.queue.rejoin(n.t, s)
		n.ready()
	}},
}

// cut cuts a node off. Its pods, including those that start there meanwhile, fall silent.
func (n *nemesis) cut(f *fault, least, most time.Duration) {
	lonely := pick(n, n.nodes)
	f.silent = true
	from := n.now()
	for _, p := range lonely.proxies {
		p.Cut()
	}
	n.wait(least, most)
	for _, p := range lonely.proxies {
		p.Mend()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.pods {
		if p.node == lonely {
			p.mu.Lock()
			p.life.silences = append(p.life.silences, span{from, n.now() + time.Second})
			slices.SortFunc(p.life.silences, func(a, b span) int { return int(a.from - b.from) })
			p.mu.Unlock()
		}
	}
}

// strike executes a blow, and records it as a fault.
func (n *nemesis) strike(b blow) {
	f := fault{name: b.name}
	f.from = n.now()
	n.counts[b.name]++
	n.t.Logf("%7.2f s: %s", f.from.Seconds(), b.name)
	b.strike(n, &f)
	f.to = n.now()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.faults = append(n.faults, f)
}

// strikeNamed executes the blow or the stab with a name.
func (n *nemesis) strikeNamed(name string) {
	if stab := stabs[name]; stab != nil {
		stab(n)
		return
	}
	n.strike(blows[slices.IndexFunc(blows, func(b blow) bool { return b.name == name })])
}

// stabOne applies do to a random pod.
func (n *nemesis) stabOne(do func(p *pod) bool) {
	if pods := n.alive(); len(pods) > 0 {
		do(pick(n, pods))
	}
}

// stab applies a random stab to a random pod. Without harms, it uses only stabs that
// excuse nothing.
func (n *nemesis) stab(harms bool) {
	switch k := n.rng.IntN(8); {
	case k == 0:
		n.stabOne((*pod).killSidecar)
	case k == 1:
		n.stabOne((*pod).killAwait)
	case k == 2 && harms:
		n.stabOne((*pod).vanish)
	case k == 3 && harms:
		n.stabOne(func(p *pod) bool { return p.pause(n.between(staleThreshold, staleThreshold+4*time.Second)) })
	case k >= 4:
		n.stabOne(func(p *pod) bool { return p.pause(n.between(time.Second, longestHarmless)) })
	}
}

// relength changes the length that new pods of a random semaphore ask for.
func (n *nemesis) relength() {
	name := pick(n, n.semaphores()[1:])
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lengths[name] = 1 + n.rng.IntN(5)
}

// strikeUntil executes blows until a time of the world. Without harms, it uses only blows that
// excuse nothing.
func (n *nemesis) strikeUntil(until time.Duration, harms bool) {
	for n.now() < until && !n.t.Failed() {
		if n.rng.IntN(6) == 0 {
			n.relength()
		}
		for range n.rng.IntN(4) {
			n.stab(harms)
		}
		if b := pick(n, blows); harms || !b.harms {
			n.strike(b)
		}
		n.wait(300*time.Millisecond, 1500*time.Millisecond)
	}
}
