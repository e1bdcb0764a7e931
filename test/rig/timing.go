package rig

import (
	"os"
	"testing"
	"time"
)

// Timed reports whether time limits fail a test. Only "make test-timing" sets it, on an
// idle machine. Otherwise only order, counts and state fail a test.
var Timed = os.Getenv("TIMING") == "1"

// patience limits the wait of a test that is not timed. No slow machine exceeds it.
const patience = 90 * time.Second

// WantWithin logs how long something took. If Timed is set, it fails the test above the
// bound.
func WantWithin(t testing.TB, took, bound time.Duration, what string) {
	t.Helper()
	t.Logf("%s took %s; the bound of make test-timing is %s", what, took.Round(time.Millisecond), bound)
	if Timed && took > bound {
		t.Errorf("%s took %s, want at most %s", what, took, bound)
	}
}
