package main

import (
	"slices"
	"strconv"
	"time"
)

// lineState is where a pod is on its way from its gate to its sidecar.
type lineState int

const (
	podStands lineState = iota // in line for a token
	podHolds                   // the token is in flight: its gate is lifted, or about to be, and its sidecar has not taken over
	podEnded                   // it has failed, completed or been deleted: what it has is given back
	podLeaves                  // it needs the gate no longer: its sidecar has taken over, or it has used up its time
)

// gatedPod is a pod of a gateLine.
type gatedPod struct {
	*watchedPod
	spec    semaphoreSpec // as it was when the pod was seen first
	arrival int64         // its place in line: Unix microseconds; 0 while it has none
	state   lineState
	gone    bool      // the watch has lost it: it was deleted, or has lost the label
	placed  bool      // its place was kept, and has not become a token
	told    bool      // it was told where it stands
	taken   time.Time // when its token was
	busy    bool      // a change of it is under way
	refused bool      // its gate was not to be lifted as it is seen: the watch may be behind
	wake    time.Time // not before, as the last change failed
}

// seenGatedPod is a pod of a line as it was at the beginning of a look.
type seenGatedPod struct {
	gatedPod
	of *gatedPod
}

// isGated reports whether the pod has our gate yet.
func (p *gatedPod) isGated() bool { return slices.Contains(p.gates, gateName) }

// lifted is when the gate was lifted, by its label; zero if it was not.
func (p *gatedPod) lifted() time.Time {
	n, err := strconv.ParseInt(p.labels[labelGated], 10, 64)
	if err != nil || p.isGated() {
		return time.Time{}
	}
	return time.Unix(n, 0)
}

// hasEnded reports whether the pod has run, or failed: its sidecar does nothing any more.
func (p *gatedPod) hasEnded() bool { return p.phase == "Succeeded" || p.phase == "Failed" }

// hasStarted reports whether the pod's sidecar has confirmed the token, and keeps it from now on.
func (p *gatedPod) hasStarted() bool {
	return slices.ContainsFunc(p.initContainers, func(c initContainer) bool { return c.name == awaitName && c.state == "terminated" })
}

// sidecarRan reports whether the sidecar runs, or has run: it may have given the token back.
func (p *gatedPod) sidecarRan() bool {
	return slices.ContainsFunc(p.initContainers, func(c initContainer) bool {
		return c.name == sidecarName && (c.state == "running" || c.state == "terminated")
	})
}
