package failover

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// A gate is paused during a hand-over, while tokens and pods change. After it resumes
// with an old view, it does no harm.
func TestGatePaused(t *testing.T) {
	t.Parallel()
	r := newRelay(t, 2)
	gates := r.beginWithTwoGates(8)
	r.rest()
	var paused, beside []time.Duration
	for i := range 8 {
		g := gates[i%2]
		paused = append(paused, r.handOver(func() {
			time.Sleep(time.Duration(i) * 2 * time.Millisecond) // a different moment each time
			g.Signal(t, syscall.SIGSTOP)
		}))
		// In every second round, all pods that the gate has seen end.
		beside = append(beside, r.handOvers(3+len(r.standing)*(i%2))...)
		gone := r.standing[1]
		r.api.DeletePod(t, gone.Namespace, gone.Name)
		r.standing = slices.Delete(r.standing, 1, 2)
		r.add(1)
		g.Signal(t, syscall.SIGCONT)
		beside = append(beside, r.handOvers(3)...)
		r.wantWhole()
	}
	r.wantQuick("in which a gate was stopped", 2*time.Second, paused)
	r.wantQuick("beside a gate that is or was stopped", 2*time.Second, beside)
}

// A gate with an old view puts a pod in line that has ended. It leaves the line when it
// sees the end. If it never sees the end, the API server refuses to lift the pod's gate:
// then it gives back the token.
func TestGateOldView(t *testing.T) {
	t.Parallel()
	for view, see := range map[string]func(*rig.APIServer){
		"late":     func(s *rig.APIServer) { s.Late.Unlock() },
		"anew":     func(s *rig.APIServer) { s.DropWatches() },
		"for ever": nil,
	} {
		for end, ends := range map[string]func(*relay, *corev1.Pod){"deleted": deletePod, "succeeded": completePod} {
			t.Run(view+", "+end, func(t *testing.T) {
				t.Parallel()
				r := newRelay(t, 1)
				r.ends = ends
				good := r.startGate(t, r.api)
				r.begin(4)
				r.rest()
				api, proxy := rig.StartAPIServerFor(t, r.api.Store), rig.StartProxy(t, r.redis.Address)
				r.startGate(t, api, "--queue-redis-address="+rig.QueueAddress(proxy.Address),
					"--redis-addresses="+proxy.Address)
				api.WantWatches(t, 1)
				proxy.Cut()
				if view == "late" {
					api.Late.Lock()
				} else {
					api.SilenceWatches()
				}
				took := r.handOvers(2)
				r.wantForgotten(good)
				proxy.Mend()
				unseen := r.ended[len(r.ended)-1]
				r.redis.WantLine(t, r.id, append([]string{string(unseen.UID)}, uidsOf(r.standing)...)...)
				if see != nil {
					see(api)
					start := time.Now()
					r.redis.WantLine(t, r.id, uidsOf(r.standing)...)
					t.Logf("the gate stood in line for %s after it saw the end of the pod", time.Since(start))
				}
				took = append(took, r.handOvers(4)...)
				r.wantWhole()
				r.wantQuick("beside a gate with an old view", 2*time.Second, took)
			})
		}
	}
}

// wantRefreshed waits until a gate refreshes the place of a pod.
func wantRefreshed(r *relay, p *corev1.Pod) {
	r.Helper()
	seen := func() string { return fmt.Sprintf("%s", r.redis.Do(r.T, "ZSCORE", r.id.SeenKey(), string(p.UID))) }
	before := seen()
	rig.Eventually(r.T, patience, func() error {
		if now := seen(); now == before {
			return fmt.Errorf("the place of %s was last refreshed at %s", p.Name, now)
		}
		return nil
	})
}

// A gate that reaches Redis but not the API server keeps no token of a pod that is gone, and
// does not take one. It says that it is not ready, and works again when it hears again.
func TestGateCutOff(t *testing.T) {
	t.Parallel()
	const patient = 3 * time.Minute // the gate acts on its view for half a minute
	for name, scenario := range map[string]func(r *relay, behind *rig.Gate){
		"node lost": func(r *relay, _ *rig.Gate) { // of a running pod: its sidecar beats no more
			_, status := r.api.Store.Change(r.id.Namespace, r.holding[0].Name, rig.MarkRunning)
			if status != nil {
				r.Fatal(status.Message)
			}
		},
		"deleted in line": func(r *relay, behind *rig.Gate) {
			gone := r.standing[0]
			behind.Signal(r.T, syscall.SIGSTOP)
			deletePod(r, gone)
			r.redis.WantLine(r.T, r.id, uidsOf(r.standing[1:])...)
			behind.Signal(r.T, syscall.SIGCONT)
			r.redis.WantLine(r.T, r.id, uidsOf(r.standing)...) // it has put the pod back
			wantRefreshed(r, gone)                             // the other gate no longer removes it
			r.redis.WantLine(r.T, r.id, uidsOf(r.standing)...)
			r.standing = r.standing[1:]
			running := r.holding[0]
			if _, status := r.api.Store.Change(r.id.Namespace, running.Name, rig.MarkRunning); status != nil {
				r.Fatal(status.Message)
			}
			_, err := r.redis.Run("release", r.id, r.timing, string(running.UID))
			rig.Must(r.T, err)
			rig.Eventually(r.T, patience, func() error {
				if holders := r.redis.Inflight(r.T, r.id); !slices.Equal(holders, []string{string(gone.UID)}) {
					return fmt.Errorf("in flight are %v, want the deleted pod", holders)
				}
				return nil
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			queue := rig.StartRedis(t)
			i := newInstallation(t, rig.QueueAddress(queue.Address),
				rig.Timing{Interval: 2 * time.Second, Threshold: 8 * time.Second})
			r := newRelayOn(t, i, 1, func(rig.ID) *rig.Redis { return queue })
			r.startGate(t, r.api)
			proxy := rig.StartProxy(t, r.api.Address)
			behind := r.startGate(t, r.api, "--kubernetes-address="+proxy.Address)
			r.api.WantWatches(t, 2)
			r.begin(4)
			r.wantWhole()
			behind.WantReady(t)
			proxy.Cut()
			scenario(r, behind)
			start := time.Now()
			next := r.standing[0]
			rig.Eventually(t, patient, func() error {
				if !r.isLifted(next.Name) {
					return fmt.Errorf("%s is still gated", next.Name)
				}
				return nil
			})
			t.Logf("lifted %s after the cut", time.Since(start))
			r.holding, r.standing = []*corev1.Pod{next}, r.standing[1:]
			rig.Eventually(t, patient, func() error {
				if behind.IsReady(t) {
					return errors.New("the gate that is cut off is ready")
				}
				return nil
			})
			proxy.Mend()
			behind.WantReady(t)
			r.wantWhole()
			r.handOvers(3)
			r.wantWhole()
		})
	}
}

// A gate is killed during a hand-over. The other gate completes it.
func TestGateKilled(t *testing.T) {
	t.Parallel()
	r := newRelay(t, 2)
	gates := r.beginWithTwoGates(8)
	r.rest()
	var killed, beside []time.Duration
	for i := range 6 {
		killed = append(killed, r.handOver(func() {
			time.Sleep(time.Duration(i) * 2 * time.Millisecond) // a different moment each time
			gates[i%2].Kill()
		}))
		beside = append(beside, r.handOvers(2)...)
		gates[i%2] = r.startGate(t, r.api)
		beside = append(beside, r.handOvers(2)...)
		r.wantWhole()
	}
	r.wantQuick("in which a gate was killed", 2*time.Second, killed)
	r.wantQuick("after the end and the start of a gate", 2*time.Second, beside)
}
