package main

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The scripts, the program and test/rig have the same constants, under the same names.
// The scripts and the program compute the same times from them.
func TestScriptsAndProgramAgree(t *testing.T) {
	r, s, id := newSemaphore(t)
	// value evaluates a local of semaphore.lua.
	value := func(name string) string {
		t.Helper()
		for i, source := range []string{
			commonSource, acquireSource, maintainSource, heartbeatSource, releaseSource, keepSource, holdSource,
		} {
			want := 0
			if i == 0 {
				want = 1
			}
			if n := strings.Count(source, "local "+name+" ="); n != want {
				t.Errorf("script source %d declares %s %d times, want %d", i, name, n, want)
			}
		}
		args := append([]any{commonSource + "return tostring(" + name + ")", scriptKeys}, id.keys()...)
		args = append(args, math.MaxInt64, seconds(s.heartbeatInterval), seconds(s.staleThreshold), s.timeToLive())
		text, err := redis.String(r.Do(t, "EVAL", args...), nil)
		rig.Must(t, err)
		return text
	}
	wantSeconds := func(name string, want time.Duration) {
		t.Helper()
		if got := value(name); got != fmt.Sprint(want.Seconds()) {
			t.Errorf("interval %s, threshold %s: %s is %s s in the scripts, and %s in the program",
				s.heartbeatInterval, s.staleThreshold, name, got, want)
		}
	}
	for name, c := range map[string]struct{ program, suites time.Duration }{
		"beatTimeout":  {beatTimeout, rig.BeatTimeout},
		"pollMost":     {pollMost, rig.PollMost},
		"lineQuiet":    {lineQuiet, rig.LineQuiet},
		"linePatience": {linePatience, rig.LinePatience},
	} {
		wantSeconds(name, c.program)
		if c.suites != c.program {
			t.Errorf("%s is %s in test/rig, and %s in the program", name, c.suites, c.program)
		}
	}
	if got := value("yourTurn"); got != yourTurn || rig.YourTurn != yourTurn {
		t.Errorf("the scripts call waiters by %q, waiters wait for %q, and suites for %q", got, yourTurn, rig.YourTurn)
	}
	for _, interval := range []time.Duration{1, 2, 3, 4, 30} {
		for _, threshold := range []time.Duration{1, 10, 120} {
			s.heartbeatInterval, s.staleThreshold = interval*time.Second, threshold*time.Second
			wantSeconds("quiet", s.lateAfter())
			wantSeconds("threshold", s.staleAfter())
		}
	}

	// The program is as quick as the scripts rely on it, with the longest attempts.
	if d := s.attemptTimeout() + holderRetry; d > beatTimeout {
		t.Errorf("live holders may beat %s after an outage, and the scripts wait for %s", d, beatTimeout)
	}
	if placesEvery > pollMost {
		t.Errorf("the gate refreshes places every %s, and waiters ask within %s", placesEvery, pollMost)
	}
	if doubtEvery >= lineQuiet {
		t.Errorf("repairs come every %s, and Redis takes %s for a silence", doubtEvery, lineQuiet)
	}
}
