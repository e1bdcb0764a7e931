package main

import (
	"context"
	"math"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/prometheus/client_golang/prometheus"
)

// pulseKey tells webhooks that a gate is at work.
var pulseKey = sideID.stateKey()

const (
	pulseEvery = 5 * time.Second
	pulseTime  = 30 * time.Second // without one for so long, none is at work
)

// pulse tells that it is at work.
func (g *gate) pulse(ctx context.Context) {
	for ctx.Err() == nil {
		if g.isReady() {
			_, err := askQueue(ctx, g.semaphores.queue, "HSET", pulseKey, "version", version)
			if err == nil {
				_, err = askQueue(ctx, g.semaphores.queue, "EXPIRE", pulseKey, seconds(pulseTime))
			}
			if err != nil && ctx.Err() == nil {
				g.log.Debug("no pulse", "error", err.Error())
			}
		}
		_ = sleep(ctx, pulseEvery)
	}
}

// gatePulse knows whether a gate is at work, by what it tells the queue.
type gatePulse struct {
	queue queue

	asking sync.Mutex
	asked  time.Time
	lost   bool
}

// missing reports whether no gate is at work. While that is not known, it is false.
func (g *gatePulse) missing(ctx context.Context) bool {
	if !g.asking.TryLock() {
		return false
	}
	defer g.asking.Unlock()
	if time.Since(g.asked) > pulseEvery {
		there, err := g.look(ctx)
		g.asked, g.lost = time.Now(), err == nil && !there
	}
	return g.lost
}

func (g *gatePulse) look(ctx context.Context) (there bool, err error) {
	return redis.Bool(askQueue(ctx, g.queue, "EXISTS", pulseKey))
}

// watchGate adds whether a gate is at work; NaN while the queue does not answer.
func (m *metrics) watchGate(g *gatePulse) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + "gate_at_work",
		Help: "1 if a gate is at work, which lifts the gates of pods, and 0 if none is."}, func() float64 {
		there, err := g.look(context.Background())
		switch {
		case err != nil:
			return math.NaN()
		case there:
			return 1
		}
		return 0
	}))
}
