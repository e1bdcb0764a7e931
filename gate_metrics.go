package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// gateMetrics are what gate tells Prometheus beside what webhooks do.
type gateMetrics struct {
	waits prometheus.Histogram
	lifts prometheus.Histogram
}

func newGateMetrics(g *gate) *gateMetrics {
	m := &gateMetrics{
		waits: prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricsPrefix + "gate_wait_seconds",
			Help: "Time from a pod's creation to the lifting of its gate.", Buckets: []float64{.1, .5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 14400, 86400}}),
		lifts: prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricsPrefix + "gate_lift_seconds",
			Help: "Time from a token that was taken for a pod to the lifting of its gate.", Buckets: durationBuckets}),
	}
	r := g.semaphores.metrics.registry
	r.MustRegister(m.waits, m.lifts)
	for state, name := range map[lineState]string{podStands: "waiting", podHolds: "starting"} {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "gated_pods",
			Help:        "Pods in the care of this process: waiting in line, or starting with a token.",
			ConstLabels: prometheus.Labels{"state": name}}, func() float64 { return float64(g.count(state)) }))
	}
	return m
}

func (m *gateMetrics) lifted(waited time.Duration, taken time.Time) {
	m.waits.Observe(waited.Seconds())
	if !taken.IsZero() {
		m.lifts.Observe(time.Since(taken).Seconds())
	}
}

// count is how many pods are in a state.
func (g *gate) count(state lineState) (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, l := range g.lines {
		l.mu.Lock()
		for _, p := range l.pods {
			if p.state == state {
				n++
			}
		}
		l.mu.Unlock()
	}
	return n
}
