// Package chaos runs dozens of pods beside a nemesis. The pods are real processes, and so
// are the webhooks, gates and servers. The nemesis kills, pauses and cuts off any of
// them. A checker then reads the history of the pods at work and reports the broken
// rules.
//
// "make chaos" runs it. pod.go has the life of a pod, nemesis.go the faults, tenant.go what
// a tenant tries all the time, owner.go what the owners of semaphores set, rules.go and
// liveness.go the rules.
package chaos

import (
	"flag"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestMain(m *testing.M) { rig.Main(m, "make chaos", "TestChaosChecker.*") }

var (
	runTime    = flag.Duration("chaos.time", time.Minute, "how long the nemesis rages, with each queue")
	seedFlag   = flag.Uint64("chaos.seed", 1, "seed of all chances")
	queuesFlag = flag.String("chaos.queue", "sentinel,cluster", "queues")
	podCount   = flag.Int("chaos.pods", 28, "the number of pods that live at a time")
)

// calmTime is longer than the time after faults in which some rules do not hold.
const calmTime = 40 * time.Second

func TestChaos(t *testing.T) {
	for queue := range strings.SplitSeq(*queuesFlag, ",") {
		t.Run(queue, func(t *testing.T) {
			w := startWorld(t, rig.Program(t), queue)
			n := newNemesis(w, *seedFlag)
			w.populate(*seedFlag, *podCount)
			stopOwners := w.startOwners(*seedFlag)
			// In the second third, blows may excuse more pods at work than the length
			// allows. In the first and last third, they never do.
			n.strikeUntil(*runTime/3, false)
			n.strikeUntil(*runTime*2/3, true)
			n.strikeUntil(*runTime, false)
			calm := w.now()
			w.mu.Lock()
			for name := range w.lengths {
				w.lengths[name] = 5 // earlier pods with a greater length keep their tokens for a while
			}
			w.mu.Unlock()
			time.Sleep(calmTime) // what the owners set is judged without faults, too
			stopOwners()
			time.Sleep(staleThreshold + 5*time.Second) // pods that end by themselves end now
			c := w.verdict(*seedFlag)
			last := w.now()
			if !t.Failed() {
				w.wantAddUp()
				w.wantTurns()
			}
			w.finish()
			if !t.Failed() {
				w.wantNothingLeft()
			}
			w.wantTenantRefused()
			w.wantForecasts(calm, last)
			worked, gated, gaveUp := 0, 0, 0
			for _, p := range c.pods {
				if p.gaveUp != notYet {
					gaveUp++
				}
				if p.started != notYet {
					worked++
					if p.gated {
						gated++
					}
				}
			}
			t.Logf("%d pods, %d worked, %d of them had been gated, %d gave up; more than the length worked for %.1f %% "+
				"of the time, explained by %d losses and silences", len(c.pods), worked, gated, gaveUp,
				100*c.over.Seconds()/c.total.Seconds(), len(c.named))
			for _, name := range slices.Sorted(maps.Keys(n.counts)) {
				t.Logf("%3d times: %s", n.counts[name], name)
			}
		})
	}
}

// verdict checks the history up to now.
func (w *world) verdict(seed uint64) *checker {
	h := w.history()
	c := check(h)
	for _, text := range w.complaints {
		w.t.Error(text)
	}
	if len(c.found) > 0 || w.t.Failed() {
		file := w.keep(h, seed)
		for i, v := range c.found {
			if i < 3 {
				around := h.around(v.semaphore, span{v.at - 15*time.Second, v.at + 5*time.Second})
				w.t.Errorf("%s\nwith -chaos.seed=%d; around it:\n%s", v, seed, around)
			}
		}
		w.t.Errorf("%d rules broken; the whole history is in %s", len(c.found), file)
	}
	return c
}

// toGo finds in a pod's log when it was told first when it starts, and when it held its tokens.
var toGo = regexp.MustCompile(`(?ms)^ *([0-9.]+) [^\n]*"msg":"waiting for [^\n]* about (\d+) s to go.*?^ *([0-9.]+) [^\n]*"msg":"` +
	regexp.QuoteMeta(rig.HeldText) + `"`)

// wantForecasts checks the first forecast of each pod. Half of them are right within a factor of
// about two, but for the second to which the pod tells them; no run may be worse than three.
// At a turn, the test itself changes how long all pods wait: it leaves out the pods that waited
// then. It also leaves out forecasts beyond the patience of users, who delete most of these pods.
func (w *world) wantForecasts(turns ...time.Duration) {
	var factors []float64
	for _, p := range w.pods {
		p.mu.Lock()
		said := toGo.FindStringSubmatch(p.log.String())
		p.mu.Unlock()
		if said == nil {
			continue
		}
		var times [3]float64 // told at, told to go, held at
		for i := range times {
			var err error
			times[i], err = strconv.ParseFloat(said[1+i], 64)
			rig.Must(w.t, err)
		}
		at, told, held := times[0], times[1], times[2]
		if told <= w.patience.Seconds() && !slices.ContainsFunc(turns, func(turn time.Duration) bool {
			return at < turn.Seconds() && turn.Seconds() < held
		}) {
			factors = append(factors, math.Abs(math.Log((told+1)/(held-at+1))))
		}
	}
	if len(factors) < 20 {
		w.t.Errorf("only %d pods were told when they start", len(factors))
		return
	}
	slices.Sort(factors)
	half, most := math.Exp(factors[len(factors)/2]), math.Exp(factors[len(factors)*9/10])
	w.t.Logf("%d pods were told when they start: half were right within a factor of %.2f, nine of ten of %.2f",
		len(factors), half, most)
	if half > 3 {
		w.t.Errorf("half of the forecasts must be right within a factor of 3")
	}
}

// keep writes the history and all logs to a file in the project's bin/.
func (w *world) keep(h *history, seed uint64) string {
	rig.Must(w.t, os.MkdirAll(rig.Path("bin"), 0o700))
	name := fmt.Sprintf("chaos-%s-%d.txt", strings.ReplaceAll(w.t.Name(), "/", "-"), seed)
	file := filepath.Join(rig.Path("bin"), name)
	text := h.String()
	for _, p := range w.pods {
		p.mu.Lock()
		text += fmt.Sprintf("\nlog of %s:\n%s", p.life.name, p.log.String())
		p.mu.Unlock()
	}
	for i, h := range w.webhooks {
		text += fmt.Sprintf("\nlog of webhook %d:\n%s", i, h.Log.String())
	}
	for i, g := range w.gates {
		for n, p := range g.all {
			text += fmt.Sprintf("\nlog of gate %d, process %d:\n%s", i, n, p.Log.String())
		}
	}
	rig.Must(w.t, os.WriteFile(file, []byte(text), 0o600))
	return file
}
