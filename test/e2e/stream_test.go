//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// stream creates pods at a fixed rate, whether or not earlier creations have ended.
type stream struct {
	*namespace
	end     func() // and waits for the creations under way
	running sync.WaitGroup

	mu  sync.Mutex
	all []admission
}

// admission is one creation of a pod.
type admission struct {
	start, end time.Time
	err        error
}

const (
	admissionsEvery  = 250 * time.Millisecond
	admissionsAtOnce = 8 // a slow node gets no more
)

func startStream(n *namespace) *stream {
	stopping := make(chan struct{})
	s := &stream{namespace: n}
	s.end = sync.OnceFunc(func() {
		close(stopping)
		s.running.Wait()
	})
	n.Cleanup(s.end)
	s.running.Go(func() {
		tick := time.NewTicker(admissionsEvery)
		defer tick.Stop()
		under := make(chan struct{}, admissionsAtOnce)
		p := pod("", "stream", 5000, held)
		metadata := p["metadata"].(object)
		delete(metadata, "name")
		metadata["generateName"] = "stream-"
		for {
			select {
			case <-stopping:
				return
			case <-tick.C:
			}
			select {
			case under <- struct{}{}:
			default:
				continue
			}
			s.running.Go(func() {
				defer func() { <-under }()
				start := time.Now()
				err := n.tryCreate(p)
				s.mu.Lock()
				defer s.mu.Unlock()
				s.all = append(s.all, admission{start, time.Now(), err})
			})
		}
	})
	return s
}

// wantRefusedSince waits until a creation fails that started after that time.
func (s *stream) wantRefusedSince(after time.Time) {
	s.Helper()
	eventually(s.T, patience, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !slices.ContainsFunc(s.all, func(a admission) bool { return a.start.After(after) && a.err != nil }) {
			return errors.New("no creation has failed")
		}
		return nil
	})
}

// wantAdmittedSince waits until a pod is admitted whose creation started after that time.
func (s *stream) wantAdmittedSince(after time.Time) {
	s.Helper()
	eventually(s.T, patience, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		last := errors.New("no creation has ended")
		for _, a := range s.all {
			if a.start.Before(after) {
				continue
			}
			if last = a.err; last == nil {
				return nil
			}
		}
		return last
	})
}

// wantAdmitted ends the stream and checks that no creation failed before the fault, and
// none that started when all was whole again. It returns the longest time without a pod
// that was admitted.
func (s *stream) wantAdmitted(fault, whole time.Time) (outage time.Duration) {
	s.Helper()
	s.end()
	var failed, wrong int
	var until, slowest time.Duration
	var last error
	var admitted time.Time
	for _, a := range s.all { // in the order of their ends
		slowest = max(slowest, a.end.Sub(a.start))
		if a.err == nil {
			if !admitted.IsZero() {
				outage = max(outage, a.end.Sub(admitted))
			}
			admitted = a.end
			continue
		}
		failed++
		until = max(until, a.start.Sub(fault))
		if a.end.Before(fault) || !a.start.Before(whole) {
			wrong, last = wrong+1, a.err
		}
	}
	s.Logf("%d of %d admissions failed, the last of them started %s after the fault; the slowest took %s; "+
		"none succeeded for %s", failed, len(s.all), inSeconds(until), inSeconds(slowest), inSeconds(outage))
	if wrong > 0 || len(s.all) < 10 {
		s.Errorf("%d of %d failed at a time when none may: %v", wrong, len(s.all), last)
	}
	return outage
}

// wantAllAdmitted ends the stream and checks that all pods were admitted.
func (s *stream) wantAllAdmitted() {
	s.Helper()
	never := time.Time{}
	s.wantAdmitted(never, never)
}

// wantMore waits until that many more pods are admitted.
func (s *stream) wantMore(pods int) {
	s.Helper()
	admitted := func() (n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, a := range s.all {
			if a.err == nil {
				n++
			}
		}
		return n
	}
	want := admitted() + pods
	eventually(s.T, patience, func() error {
		if got := admitted(); got < want {
			return fmt.Errorf("%d pods are admitted, want %d", got, want)
		}
		return nil
	})
}
