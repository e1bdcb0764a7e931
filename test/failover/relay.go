package failover

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// relay is a semaphore whose tokens pass from one gated pod to the next. It checks the
// order at each hand-over.
type relay struct {
	*testing.T
	*installation
	redis    *rig.Redis // holds the semaphore now
	api      *rig.APIServer
	id       rig.ID
	length   int
	ends     func(r *relay, p *corev1.Pod) // ends a pod that has given back its token; nil: alternates two ways
	made     int
	standing []*corev1.Pod // in the order of the line
	holding  []*corev1.Pod
	ended    []*corev1.Pod
	usual    time.Duration // the duration of the slowest hand-over at rest; see rest
}

// newRelay makes a relay on a new Redis.
func newRelay(t *testing.T, length int) *relay {
	t.Helper()
	r := rig.StartRedis(t)
	i := newInstallation(t, rig.QueueAddress(r.Address), slowTiming)
	return newRelayOn(t, i, length, func(rig.ID) *rig.Redis { return r })
}

// newRelayOn makes a relay on any queue. holder returns the server that holds a
// semaphore.
func newRelayOn(t *testing.T, i *installation, length int, holder func(rig.ID) *rig.Redis) *relay {
	t.Helper()
	api := rig.StartAPIServer(t)
	id := rig.ID{Namespace: api.NewNamespace(t), Key: "web"}
	return &relay{T: t, installation: i, redis: holder(id), api: api, id: id, length: length}
}

// begin creates pods, and waits until the first pods have their tokens.
func (r *relay) begin(pods int) {
	r.Helper()
	r.add(pods)
	r.wantNext(r.length)
}

// beginWithTwoGates is begin, with two gates.
func (r *relay) beginWithTwoGates(pods int) (gates []*rig.Gate) {
	r.Helper()
	for range 2 {
		gates = append(gates, r.startGate(r.T, r.api))
	}
	r.begin(pods)
	return gates
}

// add creates pods as the webhook admits them. They are at least a second apart, so that
// their order does not depend on their names.
func (r *relay) add(pods int) {
	r.Helper()
	for range pods {
		r.made++
		p := rig.AdmittedPod(fmt.Sprintf("pod-%03d", r.made), r.id, r.length, 10)
		created := time.Now().Add(time.Duration(r.made-1000) * time.Second)
		p.CreationTimestamp = metav1.NewTime(created.Truncate(time.Second))
		r.standing = append(r.standing, r.api.CreatePod(r.T, r.id.Namespace, p))
	}
}

// isLifted reports whether the pod's gate is gone.
func (r *relay) isLifted(name string) bool {
	r.Helper()
	p, status := r.api.Store.Get(r.id.Namespace, name)
	if status != nil {
		r.Fatalf("pod %s: %s", name, status.Message)
	}
	return len(p.Spec.SchedulingGates) == 0
}

// wantNext waits until the gates of the next pods in line are lifted, and no others.
func (r *relay) wantNext(pods int) {
	r.Helper()
	r.holding, r.standing = append(r.holding, r.standing[:pods]...), r.standing[pods:]
	rig.Eventually(r.T, patience, func() error {
		for _, p := range r.holding {
			if !r.isLifted(p.Name) {
				return fmt.Errorf("%s is still gated", p.Name)
			}
		}
		return nil
	})
	for _, p := range r.standing {
		if r.isLifted(p.Name) {
			r.Fatalf("%s is lifted, and %d of %d pods before it hold tokens", p.Name, len(r.holding), r.length)
		}
	}
}

// handOver ends the pod that has held a token longest, calls do, and waits until the next
// pod has the token.
func (r *relay) handOver(do func()) (took time.Duration) {
	r.Helper()
	p := r.holding[0]
	r.holding, r.ended = r.holding[1:], append(r.ended, p)
	if _, status := r.api.Store.Change(p.Namespace, p.Name, rig.MarkRunning); status != nil {
		r.Fatal(status.Message)
	}
	start := time.Now()
	_, err := r.redis.Run("release", r.id, r.timing, string(p.UID)) // as the pod's sidecar does
	rig.Must(r.T, err)
	do()
	ends := r.ends
	if ends == nil {
		ends = []func(*relay, *corev1.Pod){deletePod, completePod}[r.made%2]
	}
	ends(r, p)
	r.wantNext(1)
	r.add(1)
	return time.Since(start)
}

func deletePod(r *relay, p *corev1.Pod) {
	r.Helper()
	r.api.DeletePod(r.T, p.Namespace, p.Name)
}

func completePod(r *relay, p *corev1.Pod) {
	r.Helper()
	complete := func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }
	if _, status := r.api.Store.Change(p.Namespace, p.Name, complete); status != nil {
		r.Fatal(status.Message)
	}
}

// handOvers makes n hand-overs and returns their durations.
func (r *relay) handOvers(n int) (took []time.Duration) {
	r.Helper()
	for range n {
		took = append(took, r.handOver(func() {}))
	}
	return took
}

// rest measures hand-overs without a failure.
func (r *relay) rest() {
	r.Helper()
	r.usual = slices.Max(r.handOvers(5))
	r.Logf("at rest, the slowest hand-over took %s", r.usual)
}

// wantQuick fails the test if most of the hand-overs are too slow. The limit is delay,
// plus the time at rest on a machine that is twenty times as busy.
func (r *relay) wantQuick(what string, delay time.Duration, took []time.Duration) {
	r.Helper()
	slices.Sort(took)
	median, slowest := took[len(took)/2], took[len(took)-1]
	r.Logf("%d hand-overs %s: the median took %s, the slowest %s", len(took), what, median, slowest)
	if median > 20*r.usual+delay {
		r.Errorf("most hand-overs %s took at least %s, and at rest at most %s", what, median, r.usual)
	}
}

// wantWhole waits until exactly the standing pods are in line, in their order, and
// exactly the holding pods are in flight.
func (r *relay) wantWhole() {
	r.Helper()
	r.redis.WantLine(r.T, r.id, uidsOf(r.standing)...)
	want := slices.Sorted(slices.Values(uidsOf(r.holding)))
	rig.Eventually(r.T, patience, func() error {
		got := slices.Sorted(slices.Values(r.redis.Inflight(r.T, r.id)))
		if !slices.Equal(got, want) {
			return fmt.Errorf("in flight are %v, want %v", got, want)
		}
		return nil
	})
}

// wantForgotten waits until a gate has handled all pods that have ended. It removes the
// label last.
func (r *relay) wantForgotten(g *rig.Gate) {
	r.Helper()
	rig.Eventually(r.T, patience, func() error {
		for state, want := range map[string]int{"waiting": len(r.standing), "starting": len(r.holding)} {
			got, ok := g.Metric(r.T, fmt.Sprintf("at_least_semaphore_gated_pods{state=%q}", state))
			if !ok || int(got) != want {
				return fmt.Errorf("%v pods are %s, want %d", got, state, want)
			}
		}
		for _, p := range r.ended {
			if now, status := r.api.Store.Get(p.Namespace, p.Name); status == nil && now.Labels[rig.LabelGated] != "" {
				return fmt.Errorf("%s has the label", p.Name)
			}
		}
		return nil
	})
}

func uidsOf(pods []*corev1.Pod) (all []string) {
	for _, p := range pods {
		all = append(all, string(p.UID))
	}
	return all
}
