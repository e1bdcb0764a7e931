package rig

import (
	"testing"
	"time"

	"github.com/google/uuid"
)

// Suites can run the scripts and parse their replies.
func TestScripts(t *testing.T) {
	t.Parallel()
	r, id := StartRedis(t), FreshID()
	first, second := r.Acquire(t, id, 2), r.Acquire(t, id, 2)
	r.WantCounts(t, id, 0, 2)
	if r.Heartbeat(t, id, first, "web-0 node-1", time.Minute) {
		t.Error("the token was in use and rejoined")
	}
	waiter := uuid.NewString()
	a, err := r.TryAcquire(id, DefaultTiming, 2, waiter, "0", "web-2 ")
	Must(t, err)
	if a.Status != AcquireFull || a.InUse != 2 || a.Waiters != 1 || a.Position != 1 || a.Arrival == "" ||
		len(a.Holders) != 8 {
		t.Errorf("a waiter was answered %+v", a)
	}
	r.WantLine(t, id, waiter)
	if status := r.Release(t, id, second); status != ReleaseDone {
		t.Errorf("release: status %d", status)
	}
	if a, err := r.TryAcquire(id, DefaultTiming, 2, uuid.NewString(), "", ""); err != nil || a.Status != AcquireFull {
		t.Errorf("a client that does not wait was answered %+v, %v", a, err)
	}
	a, err = r.TryAcquire(id, DefaultTiming, 2, waiter, a.Arrival, "web-2 ")
	if err != nil || a.Status != AcquireTaken || a.Agreed != 2 {
		t.Errorf("the waiter was answered %+v, %v", a, err)
	}
	r.WantInflight(t, id, first, waiter)
	r.MakeStale(t, id, first)
	Must(t, r.Maintain(id, DefaultTiming, 2, false))
	r.WantCounts(t, id, 1, 1)
	if !r.Heartbeat(t, id, first, "", time.Minute) {
		t.Error("the reclaimed token did not rejoin")
	}
	r.WantCounts(t, id, 0, 2)
	reply, err := RunScript(r.Control, Script("release"), id, 1, DefaultTiming, first)
	if err != nil || reply.Status != StatusLate {
		t.Errorf("a late release was answered %+v, %v", reply, err)
	}
}
