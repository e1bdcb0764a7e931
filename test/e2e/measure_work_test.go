//go:build e2e

package e2e

import (
	"slices"
	"testing"
	"time"
)

// A hundred pods of a Job share five tokens and work five seconds each.
func TestMeasureJobs(t *testing.T) {
	needMeasure(t)
	const length = 5
	n := newNamespace(t)
	shifts := n.wantJobsDone(100, length, 5, 10*time.Minute)
	gaps := turnovers(shifts, length)
	t.Logf("end of an app to start of the one that it made room for: %s", figuresOf(gaps))
	for i, quarter := range slices.Collect(slices.Chunk(gaps, (len(gaps)+3)/4)) {
		from := shifts[length+i*len(quarter)].start - shifts[0].start
		t.Logf("quarter %d, from %s: %s", i+1, inSeconds(from), figuresOf(quarter))
	}
	used := busy(shifts, length)
	whole := shifts[len(shifts)-1].end - shifts[0].start
	t.Logf("%d apps in %s; the slots were busy for %.0f %% of the time", len(shifts), inSeconds(whole), 100*used)
	if used < 0.6 { // of seven seconds, the kubelet takes up to two
		t.Errorf("want 60 %%")
	}
}

// All processes of the holder's pod are killed while its kubelet is stopped.
func TestMeasureHolderLost(t *testing.T) {
	needMeasure(t)
	for range 3 {
		token, app := loseHolder(t, newPause(1), object{})
		t.Logf("with a stale threshold of %d s, the first in line had the token %s after the kill, and its app started after %s",
			staleSeconds, inSeconds(token), inSeconds(app))
		if most := (staleSeconds + 5) * time.Second; token > most || app > most {
			t.Errorf("want %s at most", most)
		}
	}
}

// Updates of Deployments with as many replicas as tokens, with different strategies.
func TestMeasureRollingUpdate(t *testing.T) {
	needMeasure(t)
	for _, s := range []struct{ maxSurge, maxUnavailable int }{{1, 1}, {0, 1}} {
		took := wantRolledOut(t, s.maxSurge, s.maxUnavailable)
		t.Logf("maxSurge %d, maxUnavailable %d: three replicas on three tokens updated in %s",
			s.maxSurge, s.maxUnavailable, inSeconds(took))
	}
	stuck, freed := wantStuckRollOut(t, time.Minute)
	t.Logf("maxSurge 1, maxUnavailable 0: the new pod waited and the old ones ran on for %s; "+
		"with maxSurge 0 and maxUnavailable 1 then, the update took %s", inSeconds(stuck), inSeconds(freed))
}
