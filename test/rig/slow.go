package rig

import (
	"os"
	"testing"
)

// SkipSlow skips a slow test of a suite whose other tests always run. The make target
// sets SUITE=1 in the environment, which enables the test.
func SkipSlow(t testing.TB, target string) {
	t.Helper()
	if os.Getenv("SUITE") != "1" {
		t.Skipf("%q runs this test", target)
	}
}
