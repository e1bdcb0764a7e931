package rig

import (
	"net"
	"os/exec"
	"sync"
	"testing"
)

// An address is free at once, also while other tests start processes: a process that is
// being made has the open files of this one for a moment.
func TestFreeAddress(t *testing.T) {
	var all sync.WaitGroup
	defer all.Wait()
	for range 4 {
		all.Go(func() {
			for range 100 {
				Must(t, exec.Command("true").Run())
			}
		})
	}
	for range 1000 {
		l, err := net.Listen("tcp", FreeAddress(t))
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
}
