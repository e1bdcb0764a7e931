package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsPrefix begins the names of all our metrics.
const metricsPrefix = "at_least_semaphore_"

// durationBuckets, in seconds, go from the time of a script to the longest time that the
// API server waits.
var durationBuckets = []float64{.0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30}

// metrics are the Prometheus metrics of a webhook or a gate. A sidecar has none: a nil
// *metrics counts nothing.
type metrics struct {
	registry   *prometheus.Registry
	admissions *prometheus.HistogramVec // by verdict; see countVerdicts
	scripts    *prometheus.HistogramVec // by script: attempts that Redis answered
	failures   *prometheus.CounterVec   // by kind: attempts that failed
	locks      *prometheus.CounterVec   // by outcome
	lockHeld   prometheus.Histogram
	repaired   *prometheus.CounterVec // by action
}

// newMetrics makes metrics that show the connections in counts.
func newMetrics(counts *redisCounts) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		scripts: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricsPrefix + "script_duration_seconds",
			Help: "Time from sending a script to the queue to its answer.", Buckets: durationBuckets}, []string{"script"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricsPrefix + "redis_errors_total",
			Help: "Attempts to run a script in the queue that failed. Most are tried again."}, []string{"kind"}),
		locks: prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricsPrefix + "lock_attempts_total",
			Help: "Attempts to take the lock for a repair: taken, held (by another), or failed."}, []string{"outcome"}),
		lockHeld: prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricsPrefix + "lock_held_seconds",
			Help: "Time for which the lock was held for a repair.", Buckets: durationBuckets}),
		repaired: prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricsPrefix + "repaired_tokens_total",
			Help: "Tokens that repairs have reclaimed (stale ones), refilled (missing ones) or trimmed (surplus ones)."},
			[]string{"action"}),
	}
	for _, script := range scriptNames {
		m.scripts.WithLabelValues(script)
	}
	for _, kind := range errorKinds {
		m.failures.WithLabelValues(kind)
	}
	for _, outcome := range []string{"taken", "held", "failed"} {
		m.locks.WithLabelValues(outcome)
	}
	for _, action := range []string{"reclaimed", "refilled", "trimmed"} {
		m.repaired.WithLabelValues(action)
	}
	m.registry.MustRegister(m.scripts, m.failures, m.locks, m.lockHeld, m.repaired,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "redis_connections",
			Help: "Open connections to Redis: to the queue, Sentinels and lock servers."},
			func() float64 { return float64(counts.open.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: metricsPrefix + "failovers_total",
			Help: "Times that the queue had another primary, or its Cluster had changed."},
			func() float64 { return float64(counts.failovers.Load()) }))
	registerProcess(m.registry)
	return m
}

// registerProcess adds the metrics of each process.
func registerProcess(r *prometheus.Registry) {
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()}}, func() float64 { return 1 }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

// watchCertificate adds the time at which the serving certificate expires.
func (m *metrics) watchCertificate(c *certificate) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: metricsPrefix + "certificate_expiry_timestamp_seconds",
		Help: "Unix time at which the webhook's serving certificate expires."},
		func() float64 { return float64(c.current.Load().Leaf.NotAfter.Unix()) }))
}

// watchSettings adds whether the file of the owners' settings is bad.
func (m *metrics) watchSettings(f ownerFile) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "settings_refused",
		Help: "1 while the file of the lengths that owners set is bad, and its last good content counts; else 0."},
		func() float64 {
			if f.refused.Load() != nil {
				return 1
			}
			return 0
		}))
}

// handler serves the metrics, and logs errors.
func (m *metrics) handler(log *slog.Logger) http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		MaxRequestsInFlight: 4,
	})
}

// script counts an attempt to run a script.
func (m *metrics) script(name string, took time.Duration, err error) {
	switch {
	case m == nil:
	case err == nil:
		m.scripts.WithLabelValues(name).Observe(took.Seconds())
	default:
		m.failures.WithLabelValues(kindOfError(err)).Inc()
	}
}

// lock counts an attempt to take the lock.
func (m *metrics) lock(err error) {
	switch {
	case m == nil:
	case err == nil:
		m.locks.WithLabelValues("taken").Inc()
	case errors.Is(err, errLockTaken):
		m.locks.WithLabelValues("held").Inc()
	default:
		m.locks.WithLabelValues("failed").Inc()
	}
}

func (m *metrics) unlocked(held time.Duration) {
	if m != nil {
		m.lockHeld.Observe(held.Seconds())
	}
}

func (m *metrics) repair(reclaimed, refilled, trimmed int) {
	if m != nil {
		m.repaired.WithLabelValues("reclaimed").Add(float64(reclaimed))
		m.repaired.WithLabelValues("refilled").Add(float64(refilled))
		m.repaired.WithLabelValues("trimmed").Add(float64(trimmed))
	}
}

// scriptNames are the scripts that a webhook runs.
var scriptNames = []string{"acquire", "maintain", "release"}

// errorKinds are the kinds of errors of the queue: first words of error replies of Redis,
// and kinds of our own.
var errorKinds = []string{"READONLY", "LOADING", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "MOVED", "ASK", "TRYAGAIN",
	"OOM", "BUSY", "NOSCRIPT", "MISCONF", "NOAUTH", "WRONGPASS", "NOPERM", kindUnreached, kindMaxClients,
	kindUnanswered, kindCanceled, kindOther}

const (
	kindUnreached  = "unreached"  // no connection, or no known server
	kindMaxClients = "maxclients" // Redis has as many connections as it accepts
	kindUnanswered = "unanswered" // no answer in time, or the connection broke
	kindCanceled   = "canceled"   // the caller gave up
	kindOther      = "other"
)

func kindOfError(err error) string {
	var answered redis.Error
	switch {
	case errors.As(err, &answered):
		text := answered.Error()
		for _, kind := range errorKinds {
			if strings.HasPrefix(text, kind+" ") {
				return kind
			}
		}
		if isMaxClients(answered) {
			return kindMaxClients
		}
		if strings.Contains(text, "unauthenticated") {
			return "NOAUTH"
		}
		if isPermissionError(text) {
			return "NOPERM"
		}
	case errors.Is(err, errUnanswered):
		return kindUnanswered
	case errors.Is(err, context.Canceled):
		return kindCanceled
	case errors.Is(err, errUnreached), isUnreachable(err), errors.Is(err, context.DeadlineExceeded):
		return kindUnreached
	}
	return kindOther
}

// isPermissionError reports whether Redis refused a command of a script, or a key, to the
// user. Redis 7.0 answers one text, later versions another.
func isPermissionError(text string) bool {
	return strings.Contains(text, "can't run this command") ||
		strings.Contains(text, "can't access at least one of the keys") ||
		strings.Contains(text, "ACL failure in script")
}
