package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// sleep waits for d. If ctx is done first, it returns the cause.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// backoff doubles its waits from first to most. Jitter shortens each wait by up to half,
// so that clients that failed together do not retry together.
type backoff struct{ wait, most time.Duration }

func newBackoff(first, most time.Duration) *backoff { return &backoff{first, most} }

func (b *backoff) next() time.Duration {
	wait := b.wait
	b.wait = min(2*b.wait, b.most)
	return wait - rand.N(wait/2+1)
}

// slots cap how many operations run at once.
type slots chan struct{}

// errTooMany means that no slot became free in time, so the operation did not begin.
var errTooMany = errors.New("too many at once: try again")

// take waits for a slot, first come, first served. The caller calls free at the end of
// its operation. The error wraps errTooMany.
func (s slots) take(ctx context.Context) (free func(), err error) {
	free = sync.OnceFunc(func() { <-s })
	select {
	case s <- struct{}{}: // even if ctx is done
		return free, nil
	default:
	}
	select {
	case s <- struct{}{}:
		return free, nil
	case <-ctx.Done():
		return func() {}, fmt.Errorf("%w (%w)", errTooMany, context.Cause(ctx))
	}
}

// full reports whether all slots are taken.
func (s slots) full() bool { return len(s) == cap(s) }

// flights runs one call a key at a time. Callers that arrive meanwhile share its result.
type flights[K comparable, S any] struct {
	keep  time.Duration   // for this long, callers share the result of a finished call
	group *sync.WaitGroup // of the calls; nil if no caller waits for their end

	mu      sync.Mutex
	running map[K]*flight[S]
}

// flight is one call. The call writes state and err; others read them after done is
// closed.
type flight[S any] struct {
	state S
	done  chan struct{}
	ended time.Time
	err   error
}

// join returns the running flight of a key, or starts a new one with this state.
func (f *flights[K, S]) join(key K, state S, run func(S) error) *flight[S] {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r, ok := f.running[key]; ok && (r.ended.IsZero() || time.Since(r.ended) < f.keep) {
		return r
	}
	r := &flight[S]{state: state, done: make(chan struct{})}
	if f.running == nil {
		f.running = map[K]*flight[S]{}
	}
	f.running[key] = r
	group := f.group
	if group == nil {
		group = new(sync.WaitGroup)
	}
	group.Go(func() {
		err := run(state)
		f.mu.Lock()
		defer f.mu.Unlock()
		r.err, r.ended = err, time.Now()
		if f.keep == 0 {
			delete(f.running, key)
		}
		close(r.done)
	})
	return r
}

// pacer limits the rate of calls: in order, one each gap, with a burst after a rest.
type pacer struct {
	gap  time.Duration
	rest time.Duration // longest rest that counts towards a burst
	head chan struct{} // full while a call is first in line

	mu   sync.Mutex
	next time.Time // when the next call may pass
}

func newPacer(perSecond, burst int) *pacer {
	gap := time.Second / time.Duration(perSecond)
	return &pacer{gap: gap, rest: gap * time.Duration(burst), head: make(chan struct{}, 1)}
}

// wait waits for the caller's turn. It returns the cause if ctx is done first.
func (p *pacer) wait(ctx context.Context) error {
	select {
	case p.head <- struct{}{}:
		defer func() { <-p.head }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for {
		due := p.pass()
		if due <= 0 {
			return nil
		}
		if err := sleep(ctx, due); err != nil {
			return err
		}
	}
}

// pass admits a call and returns zero, or returns the time until the next call is due.
func (p *pacer) pass() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if rested := now.Add(-p.rest); p.next.Before(rested) {
		p.next = rested
	}
	if p.next.After(now) {
		return p.next.Sub(now)
	}
	p.next = p.next.Add(p.gap)
	return 0
}

// delay stops all calls for d.
func (p *pacer) delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if until := time.Now().Add(d); p.next.Before(until) {
		p.next = until
	}
}

// logEvery is the interval at which a lasting condition is logged again.
const logEvery = time.Minute

// logLimiter caps how often one kind of line is logged: most lines in each logEvery, or
// one line if most is zero.
type logLimiter struct {
	most int

	mu      sync.Mutex
	since   time.Time
	lines   int
	dropped int
}

// allow reports whether a line may be logged now, and how many lines were dropped before
// it.
func (l *logLimiter) allow() (dropped int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.since) > logEvery {
		l.since, l.lines = time.Now(), 0
	}
	if l.lines++; l.lines > max(1, l.most) {
		l.dropped++
		return 0, false
	}
	dropped, l.dropped = l.dropped, 0
	return dropped, true
}

// reset allows the next line, because it is about another condition.
func (l *logLimiter) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.since = time.Time{}
}
