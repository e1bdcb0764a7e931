package rig

import "time"

// Times of the scripts and the program that suites rely on. Suites are black boxes, so
// this is a copy. TestScriptsAndProgramAgree compares it with both.
const (
	BeatTimeout  = 3 * time.Second         // live holders come back within this time or an interval
	PollMost     = 3 * time.Second         // the longest time between two requests of a live waiter
	LineQuiet    = 5 * time.Second         // with live waiters in line, commands come more often
	LinePatience = 12 * time.Second        // a waiter that does not ask for this time is gone
	Stall        = 1500 * time.Millisecond // an outage that Redis cannot notice
	LinePass     = PollMost + Stall        // others pass a waiter that does not ask for this time
)

// YourTurn is the message to a waiter that may take a free token.
const YourTurn = "your turn"
