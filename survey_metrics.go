package main

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// surveyTimeout bounds a look at Redis for a scrape: all other metrics are told at once.
	surveyTimeout = 2 * time.Second

	// surveyFresh is for how long scrapes share a look.
	surveyFresh = time.Second

	// surveyLogEvery is how often it is logged that Redis cannot be looked at.
	surveyLogEvery = time.Minute

	// mostMeasured is of how many semaphores there are metrics. Those that are left out have the fewest tokens in use, and no line.
	mostMeasured = 1000
)

// semaphoreGauge is a metric of each semaphore.
type semaphoreGauge struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(semaphoreState) float64
}

func gauge(name, help string, value func(semaphoreState) float64) semaphoreGauge {
	return semaphoreGauge{prometheus.NewDesc(metricsPrefix+name, help, []string{"namespace", "key"}, nil), prometheus.GaugeValue, value}
}

func counter(name, help string, value func(semaphoreState) float64) semaphoreGauge {
	return semaphoreGauge{prometheus.NewDesc(metricsPrefix+name, help, []string{"namespace", "key"}, nil), prometheus.CounterValue, value}
}

var semaphoreGauges = []semaphoreGauge{
	gauge("length", "Greatest length that pods of the semaphore asked for lately.", func(s semaphoreState) float64 { return float64(s.length) }),
	gauge("queue", "Free tokens of the semaphore.", func(s semaphoreState) float64 { return float64(s.free) }),
	gauge("inflight", "Tokens of the semaphore in use.", func(s semaphoreState) float64 { return float64(s.inUse) }),
	gauge("late", "Tokens in use that have missed a heartbeat, with the stale ones.", func(s semaphoreState) float64 { return float64(s.late) }),
	gauge("stale", "Tokens in use without a heartbeat for the stale threshold.", func(s semaphoreState) float64 { return float64(s.stale) }),
	gauge("waiters", "Pods that wait in the semaphore's line.", func(s semaphoreState) float64 { return float64(s.waiting) }),
	gauge("longest_wait_seconds", "For how long the first in line waits; 0 if there is none.", func(s semaphoreState) float64 { return s.longestWait.Seconds() }),
	gauge("oldest_heartbeat_seconds", "Time since the oldest heartbeat of a token in use; 0 if there is none.",
		func(s semaphoreState) float64 { return s.oldestHeartbeat.Seconds() }),
	counter("reclaimed_tokens_total", "Stale tokens of the semaphore that were reclaimed, by webhooks and sidecars.",
		func(s semaphoreState) float64 { return float64(s.reclaimed) }),
	counter("rejoined_tokens_total", "Tokens of the semaphore that their holders put back: they had been reclaimed, or lost with Redis.",
		func(s semaphoreState) float64 { return float64(s.rejoined) }),
}

// Metrics of the look itself.
var (
	surveySuccess  = prometheus.NewDesc(metricsPrefix+"survey_success", "1 if all semaphores could be read for this scrape.", nil, nil)
	surveyDuration = prometheus.NewDesc(metricsPrefix+"survey_duration_seconds", "Time that it took to read the semaphores.", nil, nil)
	semaphoresSeen = prometheus.NewDesc(metricsPrefix+"semaphores", "Semaphores that were used in the last minutes, or are in use.", nil, nil)
	semaphoresLeft = prometheus.NewDesc(metricsPrefix+"semaphores_left_out", "Semaphores without metrics of their own, as there are too many.", nil, nil)
)

// surveyor reads the semaphores at each scrape. Each webhook tells of all of them: what two of them tell must not be added.
type surveyor struct {
	semaphores *semaphores

	mu     sync.Mutex // is held while one looks, so that others have the same
	looked time.Time
	took   time.Duration
	shown  []semaphoreState // those with metrics of their own
	seen   int              // all semaphores
	err    error
	logged time.Time
}

// watchSemaphores adds what is in the queue.
func (m *metrics) watchSemaphores(s *semaphores) { m.registry.MustRegister(&surveyor{semaphores: s}) }

// Describe implements prometheus.Collector.
func (v *surveyor) Describe(descs chan<- *prometheus.Desc) {
	for _, g := range semaphoreGauges {
		descs <- g.desc
	}
	for _, d := range []*prometheus.Desc{surveySuccess, surveyDuration, semaphoresSeen, semaphoresLeft} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (v *surveyor) Collect(metrics chan<- prometheus.Metric) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if time.Since(v.looked) > surveyFresh {
		v.look()
	}
	for _, st := range v.shown {
		for _, g := range semaphoreGauges {
			metrics <- prometheus.MustNewConstMetric(g.desc, g.kind, g.value(st), st.id.namespace, st.id.key)
		}
	}
	success := 1.0
	if v.err != nil {
		success = 0
	}
	for desc, value := range map[*prometheus.Desc]float64{surveySuccess: success, surveyDuration: v.took.Seconds(),
		semaphoresSeen: float64(v.seen), semaphoresLeft: float64(v.seen - len(v.shown))} {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
}

// look reads the semaphores, the busiest first.
func (v *surveyor) look() {
	ctx, cancel := context.WithTimeout(context.Background(), surveyTimeout)
	defer cancel()
	start := time.Now()
	states, err := v.semaphores.survey(ctx, "")
	v.err = err
	v.looked, v.took = time.Now(), time.Since(start)
	states = slices.DeleteFunc(states, func(st semaphoreState) bool { // a stranger's, which may not even be text
		return !isObjectName(st.id.namespace) || checkKey(st.id.key) != ""
	})
	slices.SortStableFunc(states, func(a, b semaphoreState) int {
		return cmp.Or(cmp.Compare(b.waiting, a.waiting), cmp.Compare(b.inUse, a.inUse))
	})
	v.seen, v.shown = len(states), slices.Clone(states[:min(len(states), mostMeasured)]) // the others are not kept until the next look
	if v.err != nil && time.Since(v.logged) > surveyLogEvery {
		v.semaphores.log.Warn("the semaphores cannot be read for the metrics", "error", v.err.Error())
		v.logged = time.Now()
	}
}
