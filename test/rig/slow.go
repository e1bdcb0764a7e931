package rig

import (
	"os"
	"testing"
)

// SkipSlow skips a slow test of a suite whose other tests are quick and always run. The make target runs the
// test with SUITE=1 in the environment.
func SkipSlow(t testing.TB, target string) {
	t.Helper()
	if os.Getenv("SUITE") != "1" {
		t.Skipf("%q runs this test", target)
	}
}
