//go:build chaos

package main

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The tests of this tag ("make chaos") let dozens of pods, as real processes, live beside a nemesis, and check the history of who worked
// when.

var (
	chaosTime      = flag.Duration("chaos.time", time.Minute, "for how long the nemesis rages, with each queue")
	chaosSeed      = flag.Uint64("chaos.seed", 1, "of all that is by chance")
	chaosQueueFlag = flag.String("chaos.queue", "sentinel,cluster", "queues")
	chaosPods      = flag.Int("chaos.pods", 28, "how many pods live at a time")
)

func TestChaos(t *testing.T) {
	for queue := range strings.SplitSeq(*chaosQueueFlag, ",") {
		t.Run(queue, func(t *testing.T) {
			w := startChaos(t, rig.Program(t), queue)
			n := &nemesis{w, rand.New(rand.NewPCG(*chaosSeed, 1<<32)), map[string]int{}}
			w.populate(*chaosSeed, *chaosPods)
			// A third of the time, what happens may explain that more work than the length; before and after, nothing does.
			n.rage(*chaosTime/3, false)
			n.rage(*chaosTime*2/3, true)
			n.rage(*chaosTime, false)
			w.mu.Lock()
			for name := range w.lengths {
				w.lengths[name] = 5 // what was asked for before keeps tokens for a while
			}
			w.mu.Unlock()
			time.Sleep(chaosThreshold + 5*time.Second) // what is to end by itself, ends
			c := w.verdict(*chaosSeed)
			if !t.Failed() {
				w.wantAddUp()
				w.wantTurns()
			}
			w.finish()
			if !t.Failed() {
				w.wantNothingLeft()
			}
			worked, gated := 0, 0
			for _, p := range c.pods {
				if p.started != notYet {
					worked++
					if p.gated {
						gated++
					}
				}
			}
			t.Logf("%d pods, %d worked, %d of them had been gated; more than the length for %.1f %% of the time that anybody did, explained by %d losses and silences", len(c.pods), worked, gated,
				100*c.over.Seconds()/c.total.Seconds(), len(c.named))
			for _, name := range slices.Sorted(maps.Keys(n.counts)) {
				t.Logf("%3d times: %s", n.counts[name], name)
			}
		})
	}
}

// verdict checks what happened so far.
func (w *chaosWorld) verdict(seed uint64) *checker {
	h := w.history()
	c := check(h)
	for _, text := range w.complaint {
		w.t.Error(text)
	}
	if len(c.found) > 0 || w.t.Failed() {
		file := w.keep(h, seed)
		for i, v := range c.found {
			if i < 3 {
				w.t.Errorf("%s\nwith -chaos.seed=%d; around it:\n%s", v, seed, h.around(v.semaphore, span{v.at - 15*time.Second, v.at + 5*time.Second}))
			}
		}
		w.t.Errorf("%d rules broken; all of it is in %s", len(c.found), file)
	}
	return c
}

// keep writes down all that is known.
func (w *chaosWorld) keep(h *history, seed uint64) string {
	rig.Must(w.t, os.MkdirAll("bin", 0o700))
	file := filepath.Join("bin", fmt.Sprintf("chaos-%s-%d.txt", strings.ReplaceAll(w.t.Name(), "/", "-"), seed))
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
