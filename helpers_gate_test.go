package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// gateTest is an API server with pods, and a Redis, for gates.
type gateTest struct {
	*testing.T
	redis  *rig.Redis
	api    *rig.APIServer
	config webhookConfig // of gates and owner, what they share
	owner  *semaphores   // does what sidecars do
	id     semaphoreID
	length int
}

func newGateTest(t *testing.T, length int) *gateTest {
	t.Helper()
	r := rig.StartRedis(t)
	return newGateTestOn(t, r, testConfig(r.Address), length)
}

// newGateTestOn is newGateTest with a Redis that is there.
func newGateTestOn(t *testing.T, r *rig.Redis, c webhookConfig, length int) *gateTest {
	t.Helper()
	s := rig.StartAPIServer(t)
	return &gateTest{t, r, s, c, semaphoresOf(t, c), semaphoreID{s.NewNamespace(t), "web"}, length}
}

// start starts a gate, which ends with the test or by stop.
func (g *gateTest) start(change ...func(*gateConfig)) (started *gate, log *rig.Log, stop func()) {
	g.Helper()
	c := gateConfig{settings: g.config.settings, kubernetes: clientSettings(g.api), unschedulable: 5 * time.Minute}
	for _, ch := range change {
		ch(&c)
	}
	log = new(rig.Log)
	started, err := newGate(c, slog.New(slog.NewJSONHandler(log, nil)))
	rig.Must(g.T, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		started.run(ctx)
		rig.Must(g.T, started.semaphores.close(context.Background()))
	}()
	stop = func() {
		cancel()
		<-done
	}
	g.Cleanup(stop)
	g.Cleanup(func() {
		if g.Failed() {
			g.Logf("log of gate:\n%s", log)
		}
	})
	return started, log, stop
}

// create creates a pod as the webhook lets it pass, and returns its token.
func (g *gateTest) create(name string) (token string) {
	g.Helper()
	return g.createAs(rig.GatedPod(name))
}

// createAs is create for a pod that is made already.
func (g *gateTest) createAs(p *corev1.Pod) (token string) {
	g.Helper()
	p.Spec.SchedulingGates = p.Spec.SchedulingGates[1:]
	p.Annotations = map[string]string{annotationEnabled: "true", annotationKey: g.id.key, annotationLength: strconv.Itoa(g.length), annotationExpiration: "10"}
	return string(g.api.CreatePod(g.T, g.id.namespace, p).UID)
}

func (g *gateTest) createAll(names ...string) (tokens []string) {
	g.Helper()
	for _, name := range names {
		tokens = append(tokens, g.create(name))
	}
	return tokens
}

func (g *gateTest) pod(name string) *corev1.Pod {
	g.Helper()
	p, status := g.api.Store.Get(g.id.namespace, name)
	if status != nil {
		g.Fatalf("pod %s: %s", name, status.Message)
	}
	return p
}

// lifted reports whether the pod's gate was lifted.
func (g *gateTest) lifted(name string) bool { return len(g.pod(name).Spec.SchedulingGates) == 0 }

// wantLifted waits until exactly those are lifted, of all that are given.
func (g *gateTest) wantLifted(lifted []string, gated ...string) {
	g.Helper()
	rig.Eventually(g.T, 20*time.Second, func() error {
		for _, name := range lifted {
			if !g.lifted(name) {
				return fmt.Errorf("%s is gated yet", name)
			}
		}
		return nil
	})
	for _, name := range gated {
		if g.lifted(name) {
			g.Fatalf("the gate of %s was lifted", name)
		}
	}
}

// wantHolders waits until exactly these tokens are in flight.
func (g *gateTest) wantHolders(want ...string) {
	g.Helper()
	want = slices.Sorted(slices.Values(want))
	rig.Eventually(g.T, 20*time.Second, func() error {
		got, err := redis.Strings(g.redis.Control.Do("ZRANGE", g.id.inflightKey(), 0, -1))
		slices.Sort(got)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("in flight are %v, want %v", got, want)
		}
		return err
	})
}

// run lets a pod start, as a kubelet shows it.
func (g *gateTest) run(name string) {
	g.Helper()
	_, status := g.api.Store.Change(g.id.namespace, name, rig.MarkRunning)
	if status != nil {
		g.Fatal(status.Message)
	}
	rig.Eventually(g.T, 10*time.Second, func() error {
		if label, ok := g.pod(name).Labels[labelGated]; ok {
			return fmt.Errorf("%s has the label %q yet", name, label)
		}
		return nil
	})
}
