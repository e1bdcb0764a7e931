package failover

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The primary's pod of deploy/sentinel ends or is lost. No token is lost, and the webhook
// goes on with the next primary. DEPLOYED_ROUNDS=10 does that ten times one after the
// other, for the figures in docs/topologies.md.
func TestDeployedPrimaryGone(t *testing.T) {
	rounds := 1
	if text := os.Getenv("DEPLOYED_ROUNDS"); text != "" {
		var err error
		rounds, err = strconv.Atoi(text)
		rig.Must(t, err)
	}
	for name, c := range map[string]struct {
		signal               syscall.Signal
		emptied, back, stays bool
	}{
		"terminated": {signal: syscall.SIGTERM}, // a drain: the pod comes back elsewhere, later
		"killed":     {signal: syscall.SIGKILL},
		// A rolling update: the pod comes back before the Sentinels miss it.
		"restarted": {signal: syscall.SIGTERM, back: true, stays: true},
		// It comes back without its data, and must not empty the replicas.
		"emptied": {signal: syscall.SIGKILL, emptied: true, back: true},
	} {
		t.Run(name, func(t *testing.T) {
			if rounds == 1 {
				t.Parallel()
			}
			var pauses []time.Duration
			for range rounds {
				g := rig.StartDeployedGroup(t)
				old := g.Primary(t)
				pod := slices.Index(g.Servers, old)
				l := startWebhook(t, g)
				token := l.webhook.WantAdmitted(t, l.id, rig.MaxLength)
				old.WantReplicasInSync(t)
				l.startAdmissions(t)
				strike := time.Now()
				g.SignalPod(t, pod, c.signal)
				if c.emptied {
					g.EmptyPod(t, pod)
				}
				if c.back {
					g.StartPods(t, pod)
				}
				rig.Eventually(t, patience, func() error {
					if g.Serves(t, old, l.id) != c.stays {
						return fmt.Errorf("%s is still the primary", old.Address)
					}
					return nil
				})
				pauses = append(pauses, l.longestPause(t, strike))
				if longest := pauses[len(pauses)-1]; longest > 20*time.Second {
					for _, s := range g.Sentinels {
						t.Logf("after %s, the Sentinel %s says:\n%s", longest, s.Address, s.Stdout.String())
					}
				}
				if !c.back {
					g.StartPods(t, pod)
				}
				g.WantReady(t, 2)
				if got := g.Primary(t) == old; got != c.stays {
					t.Errorf("the old primary is the primary: %t", got)
				}
				if !slices.Contains(g.Primary(t).Inflight(t, l.id), token) {
					t.Error("the token is lost")
				}
				if waited := strings.Contains(old.Stdout.String(), "nothing in "); waited != c.emptied {
					t.Errorf("it waited for another primary: %t\n%s", waited, old.Stdout.String())
				}
				wantPodsReady(t, g)
				for pod := range 3 {
					g.SignalPod(t, pod, syscall.SIGKILL)
				}
			}
			slices.Sort(pauses)
			t.Logf("the longest times without a successful admission: %v", pauses)
		})
	}
}

// wantPodsReady waits until all pods are ready, and name the same primary.
func wantPodsReady(t *testing.T, g *rig.DeployedGroup) {
	t.Helper()
	want := fmt.Sprintf("redis-%d\n", slices.Index(g.Servers, g.Primary(t)))
	for pod := range 3 {
		rig.Eventually(t, patience, func() error {
			if out, err := g.RunIn(pod, "ready.sh"); err != nil {
				return fmt.Errorf("redis-%d is not ready: %w: %s", pod, err, out)
			}
			if out, err := g.RunIn(pod, "primary.sh"); err != nil || out != want {
				return fmt.Errorf("redis-%d names %s, %v; want %s", pod, out, err, want)
			}
			return nil
		})
	}
}

// steady is a webhook that gets admissions all the time.
type steady struct {
	webhook *rig.Webhook
	id      rig.ID
	mu      sync.Mutex
	answers []time.Time // that admitted a pod
	stop    func()
}

// startWebhook starts the webhook.
func startWebhook(t *testing.T, g *rig.DeployedGroup) *steady {
	t.Helper()
	locks := strings.Join(rig.LockServers(g.Locks).Addresses(), ",")
	s := &steady{id: rig.FreshID(), webhook: rig.NewWebhook(t, rig.Program(t), locks,
		"--queue-redis-address="+g.Address(), "--sidecar-redis-secret=redis")}
	setEnv(s.webhook.Process, "REDIS_USERNAME=webhook", "REDIS_PASSWORD="+rig.Password)
	s.webhook.Begin(t)
	return s
}

// startAdmissions starts four clients that each send an admission after the other.
func (s *steady) startAdmissions(t *testing.T) {
	t.Helper()
	body := rig.Review(t, s.id, rig.MaxLength)
	end := make(chan struct{})
	var clients sync.WaitGroup
	s.stop = sync.OnceFunc(func() {
		close(end)
		clients.Wait()
	})
	t.Cleanup(s.stop)
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-end:
					return
				case <-time.After(50 * time.Millisecond):
				}
				status, text, err := ask(s.webhook, body, 10*time.Second)
				if err != nil || status != http.StatusOK {
					continue
				}
				if a, err := rig.ReadAdmission(status, text); err == nil && a.Token != "" {
					s.mu.Lock()
					s.answers = append(s.answers, time.Now())
					s.mu.Unlock()
				}
			}
		})
	}
}

// longestPause waits for some admissions and ends the others. It returns the longest time
// since start in which none succeeded.
func (s *steady) longestPause(t *testing.T, start time.Time) (longest time.Duration) {
	t.Helper()
	now := time.Now()
	rig.Eventually(t, patience, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		after := 0
		for _, at := range s.answers {
			if at.After(now) {
				after++
			}
		}
		if after < 20 {
			return fmt.Errorf("%d admissions succeeded", after)
		}
		return nil
	})
	s.stop()
	last := start
	for _, at := range s.answers {
		if at.After(start) {
			longest, last = max(longest, at.Sub(last)), at
		}
	}
	return longest.Round(10 * time.Millisecond)
}

// All pods of deploy/sentinel are gone at once. redis-0, a replica by then, comes back
// without its volume. By default it starts as the first primary. It learns from the others
// that another server was.
func TestDeployedColdStart(t *testing.T) {
	t.Parallel()
	g := rig.StartDeployedGroup(t)
	first := g.Servers[0]
	rig.Eventually(t, patience, func() error {
		if g.Named(t) != first.Address {
			return nil
		}
		_, err := g.Sentinels[1].Control.Do("SENTINEL", "FAILOVER", "tokens")
		return errors.Join(err, errors.New("redis-0 is still the primary"))
	})
	g.WantReady(t, 2)
	primary := g.Primary(t)
	id := rig.FreshID()
	rig.Must(t, primary.LoadScripts())
	token := primary.Acquire(t, id, 2)
	primary.WantReplicasInSync(t)
	for pod := range 3 {
		g.SignalPod(t, pod, syscall.SIGTERM)
	}
	g.EmptyPod(t, 0)
	g.StartPods(t, 0, 1, 2)
	g.WantReady(t, 2)
	host, _, _ := strings.Cut(primary.Address, ":")
	if log := first.Stdout.String(); !strings.Contains(log, "the primary is "+host+"\n") {
		t.Errorf("redis-0 started with another primary than %s:\n%s", host, log)
	}
	g.Primary(t).WantInflight(t, id, token)
}
