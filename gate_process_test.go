package main

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// process starts a gate as a process.
func (g *gateTest) process(flags ...string) *rig.Process {
	g.Helper()
	api, c := clientSettings(g.api), g.config
	return rig.StartProgram(g.T, append([]string{"gate", "--queue-redis-address=" + c.queueRedisAddress.text, "--redis-addresses=" + strings.Join(c.redisAddresses, ","),
		fmt.Sprintf("--heartbeat-interval-seconds=%d", seconds(c.heartbeatInterval)), fmt.Sprintf("--stale-threshold-seconds=%d", seconds(c.staleThreshold)),
		"--metrics-bind-address=" + rig.FreeAddress(g.T), "--kubernetes-address=" + api.address, "--kubernetes-ca-file=" + api.caFile,
		"--kubernetes-token-file=" + api.tokenFile}, flags...)...)
}

// relay is a semaphore whose tokens go from one gated pod to the next, which is checked after each hand-over.
type relay struct {
	*gateTest
	made     int
	standing []*corev1.Pod // in their order
	holding  []*corev1.Pod
	ended    []*corev1.Pod
	end      func(r *relay, p *corev1.Pod) // what becomes of a pod that has given its token back; nil: one of two by turns
}

// startRelay creates pods that two gates stand in line for, and lets the first have their tokens.
func startRelay(g *gateTest, pods int) (r *relay, gates []*rig.Process) {
	g.Helper()
	r = &relay{gateTest: g}
	for range 2 {
		gates = append(gates, r.process())
	}
	r.begin(pods)
	return r, gates
}

// begin creates pods, and waits until the first have their tokens.
func (r *relay) begin(pods int) {
	r.Helper()
	r.add(pods)
	r.wantNext(r.length)
}

// add creates pods, each a second older than the next, so that there is one order.
func (r *relay) add(pods int) {
	r.Helper()
	for range pods {
		r.made++
		name := fmt.Sprintf("pod-%03d", r.made)
		p := rig.GatedPod(name)
		p.CreationTimestamp = metav1.NewTime(time.Now().Add(time.Duration(r.made-1000) * time.Second).Truncate(time.Second))
		r.createAs(p)
		r.standing = append(r.standing, r.pod(name))
	}
}

// wantNext waits until the next in line are lifted, and wants no other to be.
func (r *relay) wantNext(many int) {
	r.Helper()
	r.holding, r.standing = append(r.holding, r.standing[:many]...), r.standing[many:]
	for _, p := range r.holding {
		r.wantLifted([]string{p.Name})
	}
	for _, p := range r.standing {
		if r.lifted(p.Name) {
			r.Fatalf("%s is lifted, and %d of %d before it hold tokens", p.Name, len(r.holding), r.length)
		}
	}
}

// handOver lets the pod that holds a token the longest end, and the next have it. do happens in the middle of that.
func (r *relay) handOver(do func()) (took time.Duration) {
	r.Helper()
	p := r.holding[0]
	r.holding, r.ended = r.holding[1:], append(r.ended, p)
	_, status := r.api.Store.Change(p.Namespace, p.Name, rig.MarkRunning)
	if status != nil {
		r.Fatal(status.Message)
	}
	start := time.Now()
	giveBack(r.T, r.owner, r.id, string(p.UID))
	do()
	ends := r.end
	if ends == nil {
		ends = []func(*relay, *corev1.Pod){isDeleted, succeeds}[r.made%2]
	}
	ends(r, p)
	r.wantNext(1)
	r.add(1)
	return time.Since(start)
}

// The ways in which pods end.
func isDeleted(r *relay, p *corev1.Pod) { r.api.DeletePod(r.T, p.Namespace, p.Name) }

func succeeds(r *relay, p *corev1.Pod) {
	r.Helper()
	if _, status := r.api.Store.Change(p.Namespace, p.Name, func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }); status != nil {
		r.Fatal(status.Message)
	}
}

// handOvers are so many, none of which takes two seconds longer than the slowest of usual ones.
func (r *relay) handOvers(many int, usual time.Duration) {
	r.Helper()
	for range many {
		if took := r.handOver(func() {}); took > usual+2*time.Second {
			r.Errorf("a hand-over took %s", took)
		}
	}
}

// wantWhole waits until exactly those that stand are in line, in their order, and exactly those that hold tokens are in flight.
func (r *relay) wantWhole() {
	r.Helper()
	r.redis.WantLine(r.T, r.id, uidsOf(r.standing)...)
	r.wantHolders(uidsOf(r.holding)...)
}

func uidsOf(pods []*corev1.Pod) (all []string) {
	for _, p := range pods {
		all = append(all, string(p.UID))
	}
	return all
}

// usual is how long a hand-over takes at most while nothing is wrong.
func (r *relay) usual() (most time.Duration) {
	r.Helper()
	for range 5 {
		most = max(most, r.handOver(func() {}))
	}
	return most
}

// A gate that is stopped in the middle of a hand-over, while tokens and pods go on, and then acts on what it knew, does no harm.
func TestGatePaused(t *testing.T) {
	t.Parallel()
	r, gates := startRelay(newGateTest(t, 2), 8)
	usual := r.usual()
	for i := range 8 {
		g := gates[i%2]
		took := r.handOver(func() {
			time.Sleep(time.Duration(i) * 2 * time.Millisecond) // another moment of it each time
			g.Signal(t, syscall.SIGSTOP)
		})
		if took > usual+2*time.Second {
			t.Errorf("the hand-over in which a gate was stopped took %s", took)
		}
		r.handOvers(3+len(r.standing)*(i%2), usual) // at times, until all that it knows are gone
		gone := r.standing[1]
		r.api.DeletePod(t, gone.Namespace, gone.Name)
		r.standing = slices.Delete(r.standing, 1, 2)
		r.add(1)
		g.Signal(t, syscall.SIGCONT)
		r.handOvers(3, usual)
		r.wantWhole()
	}
}

// A gate that has an old view stands in line for pods that have ended. It leaves the line as soon as it sees that; should it never see it,
// it gives the token of such a pod back as soon as the API server does not let it lift the gate.
func TestGateOldView(t *testing.T) {
	t.Parallel()
	for view, see := range map[string]func(*rig.APIServer){
		"late":     func(s *rig.APIServer) { s.Late.Unlock() },
		"anew":     func(s *rig.APIServer) { s.DropWatches() },
		"for ever": nil,
	} {
		for end, ends := range map[string]func(*relay, *corev1.Pod){"deleted": isDeleted, "succeeded": succeeds} {
			t.Run(view+", "+end, func(t *testing.T) {
				t.Parallel()
				r := &relay{gateTest: newGateTest(t, 1), end: ends}
				one, _, _ := r.start()
				r.begin(4)
				api, proxy := rig.StartAPIServerFor(t, r.api.Store), rig.StartProxy(t, r.redis.Address)
				r.start(func(c *gateConfig) {
					c.settings, c.kubernetes = testConfig(proxy.Address).settings, clientSettings(api)
				})
				api.WantWatches(t, 1)
				proxy.Cut()
				if view == "late" {
					api.Late.Lock()
				} else {
					api.SilenceWatches()
				}
				r.handOvers(2, 0)
				r.wantOnly(one)
				proxy.Mend()
				unseen := string(r.ended[1].UID)
				r.redis.WantLine(t, r.id, append([]string{unseen}, uidsOf(r.standing)...)...)
				if see != nil {
					see(api)
					start := time.Now()
					r.redis.WantLine(t, r.id, uidsOf(r.standing)...)
					if took := time.Since(start); took > 4*time.Second {
						t.Errorf("it stood in line for a pod that has ended for %s", took)
					}
				}
				r.handOvers(4, 0)
				r.wantWhole()
			})
		}
	}
}

// wantOnly waits until a gate has nothing to do any more with pods that have ended.
func (r *relay) wantOnly(gate *gate) {
	r.Helper()
	rig.Eventually(r.T, 10*time.Second, func() error {
		gate.mu.Lock()
		defer gate.mu.Unlock()
		l := gate.lines[r.id]
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, p := range r.ended {
			if l.pods[string(p.UID)] != nil {
				return fmt.Errorf("it cares for %s yet", p.Name)
			}
		}
		return nil
	})
}

// A gate that is killed in the middle of a hand-over leaves it to the other, within two seconds.
func TestGateKilled(t *testing.T) {
	t.Parallel()
	r, gates := startRelay(newGateTest(t, 2), 8)
	usual := r.usual()
	for i := range 6 {
		took := r.handOver(func() {
			time.Sleep(time.Duration(i) * 2 * time.Millisecond)
			gates[i%2].Kill()
		})
		if took > usual+2*time.Second {
			t.Errorf("the hand-over in which a gate was killed took %s", took)
		}
		r.handOvers(2, usual)
		gates[i%2] = r.process()
		r.handOvers(2, usual)
		r.wantWhole()
	}
}
