//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"
)

// needMeasure skips a measurement unless MEASURE is set.
func needMeasure(t *testing.T) {
	t.Helper()
	if os.Getenv("MEASURE") == "" {
		t.Skip("MEASURE is not set; run \"make measure\"")
	}
}

// Time from the end of an app to the start of the app of the first pod in line. Beside
// it, the same for refused pods, which a controller has been creating again for four
// minutes.
func TestMeasureHandOver(t *testing.T) {
	needMeasure(t)
	const handOverCount, inLine = 60, 5
	refused := startRefusals(t, 3)

	n := newNamespace(t)
	d := newDiary(n)
	wholes := d.handOver(handOverCount, inLine, waiting, func(int) {})
	d.wantNeverMoreThan(1)
	shifts := d.shifts()
	f := figuresOf(turnovers(shifts, 1))
	t.Logf("wait, %d in line, end of an app to start of the next: %s", inLine, f)
	t.Logf("wait, kubectl delete to start of the next:           %s", figuresOf(wholes))
	t.Logf("deny, after 4 min, end of an app to start of the next: %s", figuresOf(refused.wait()))
	if f.n < 50 || f.median > 1200*time.Millisecond || f.most > 2500*time.Millisecond {
		t.Errorf("want 50 or more, a median of at most 1.2 s and none over 2.5 s: %v", turnovers(shifts, 1))
	}
}

// refusals are semaphores of length 1. Each has a holder and a Deployment whose pod is
// refused.
type refusals struct {
	t       *testing.T
	since   time.Time
	diaries []*diary
}

// startRefusals starts their controllers one after the other, so that their backoffs
// differ.
func startRefusals(t *testing.T, count int) *refusals {
	t.Helper()
	r := &refusals{t: t, since: time.Now()}
	for range count {
		n := newNamespace(t)
		d := newDiary(n)
		r.diaries = append(r.diaries, d)
		n.create(pod("holder", "refused", 1, d.app(untilTold)))
		d.wantStarted("holder")
		n.create(deployment("next", "refused", 1, 1, rollingUpdate(0, 1), d.app(untilTold)))
	}
	return r
}

// wait ends each holder after four minutes or more, and returns the times for which the
// slots were unused.
func (r *refusals) wait() (gaps []time.Duration) {
	r.t.Helper()
	for i, d := range r.diaries {
		end := r.since.Add(4*time.Minute + time.Duration(i)*20*time.Second)
		eventually(r.t, 6*time.Minute, func() error {
			if time.Now().Before(end) {
				return errors.New("the four minutes are not over")
			}
			return nil
		})
		d.end("holder")
	}
	for _, d := range r.diaries {
		eventually(r.t, 20*time.Minute, func() error {
			shifts, err := d.read()
			if err == nil && len(shifts) != 2 {
				err = fmt.Errorf("started: %v", podsOf(shifts))
			}
			return err
		})
		d.wantNeverMoreThan(1)
		gaps = append(gaps, turnovers(d.shifts(), 1)...)
	}
	return gaps
}

// figures are the least, median, 90th percentile and greatest of some times.
type figures struct {
	n                        int
	least, median, p90, most time.Duration
}

func figuresOf(times []time.Duration) figures {
	if len(times) == 0 {
		return figures{}
	}
	sorted := slices.Sorted(slices.Values(times))
	at := func(percent int) time.Duration { return sorted[(len(sorted)-1)*percent/100] }
	return figures{len(sorted), at(0), at(50), at(90), at(100)}
}

func (f figures) String() string {
	return fmt.Sprintf("n=%d min %s, median %s, p90 %s, worst %s",
		f.n, inSeconds(f.least), inSeconds(f.median), inSeconds(f.p90), inSeconds(f.most))
}

// busy returns which part of the time of all slots was used, from the first start to the
// last end.
func busy(shifts []shift, length int) float64 {
	var used, last time.Duration
	for _, s := range shifts {
		used += s.end - s.start
		last = max(last, s.end)
	}
	return float64(used) / float64(last-shifts[0].start) / float64(length)
}
