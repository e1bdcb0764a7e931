package rig

import (
	"os"
	"testing"
	"time"
)

// timed reports whether bounds of time fail a test: in "make test-timing", which wants a machine
// that does nothing else. Everywhere else a test fails by order, counts and state only.
var timed = os.Getenv("TIMING") == "1"

// patience is how long a test that is not timed waits for something that must happen: so long
// that no slow machine fails it.
const patience = 90 * time.Second

// WantWithin logs how long something took. Where the suite is timed, it fails the test if that was longer
// than a bound.
func WantWithin(t testing.TB, took, bound time.Duration, what string) {
	t.Helper()
	t.Logf("%s took %s; the bound of make test-timing is %s", what, took.Round(time.Millisecond), bound)
	if timed && took > bound {
		t.Errorf("%s took %s, want at most %s", what, took, bound)
	}
}
