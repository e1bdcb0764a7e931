package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"
)

// A waiter asks again when it is called, and after a while in any case: that is how it keeps its place, how a call that went
// lost costs no more than seconds, and how stale tokens are reclaimed where nobody else asks.
const (
	pollLeast = 2 * time.Second
	pollMost  = 4 * time.Second

	// pollFirst is the longest wait of the first in line. Should its connections have fallen silent, it hears no call, and its next
	// question costs it an attemptTimeout; all in all it is not more than four seconds late.
	pollFirst = 1800 * time.Millisecond

	// pollAhead is the wait where a token is free, and those ahead have yet to come for it.
	pollAhead = time.Second

	// askTimeout bounds a question of a waiter, with what it repairs. It does not wait for a repair longer than pollMost after it has
	// asked: it has to go on asking, as Redis would take a silence of all that wait for one of its own.
	askTimeout = 6 * time.Second

	// subscribePatience is for how long a waiter tries to be reachable before it joins the line.
	subscribePatience = 2 * time.Second

	// Everybody asks at once when a token goes stale, within this time.
	staleJitter = 500 * time.Millisecond

	// logMoved is how often a waiter logs that it waits, if it has moved up meanwhile; see logEvery.
	logMoved = 5 * time.Second
)

// logEvery is how often a waiter logs that it waits.
const logEvery = time.Minute

// errKeptRepairing says that a repair was done and has not helped.
var errKeptRepairing = errors.New("other processes kept repairing it, or their pods took what was there")

// waiter gets a token for a pod, however long it takes.
type waiter struct {
	semaphores *semaphores
	id         semaphoreID
	token      string
	pod        podName
	length     int
	expiration time.Duration
	say        func(string) // is told what is waited for
	log        *slog.Logger

	logged         time.Time // that it waits
	loggedPosition int
	failed         time.Time // logged why there is no token yet
}

// wait returns when the token is in flight: when Redis was asked that said so, and whether the waiter stood in line before; or the
// error of ctx. In the latter case the caller has to release the token, which may be in line, or in flight.
func (w *waiter) wait(ctx context.Context) (asked time.Time, inLine bool, err error) {
	asked, a, err := w.try(ctx, "")
	if err == nil && a.status == acquireTaken {
		return asked, false, nil
	}
	if err != nil {
		w.fail(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	calls := w.listen(ctx) // first, so as to hear of what happens once it is in line
	if err := calls.waitFor(ctx, subscribePatience); err != nil {
		return asked, false, err
	}
	asked, err = w.stand(ctx, calls)
	return asked, true, err
}

// stand joins the line and stands in it until the token is in flight, or ctx is done.
func (w *waiter) stand(ctx context.Context, calls *calls) (asked time.Time, err error) {
	arrival := joinLine
	for retry := w.newBackoff(); ; {
		asked, a, err := w.try(ctx, arrival)
		pause := w.untilPoll(a)
		switch {
		case ctx.Err() != nil:
			return asked, ctx.Err()
		case err != nil:
			w.fail(err)
			pause = retry.next()
			if a.status == acquireRepair { // Redis has answered
				pause = min(pause, max(0, time.Until(asked.Add(pollMost))))
			}
		case a.status == acquireTaken:
			return asked, nil
		default:
			arrival, retry = a.place.arrival, w.newBackoff()
			if !a.place.reachable {
				calls.redial()
			}
			w.tell(a)
		}
		if err := calls.waitFor(ctx, pause); err != nil {
			return asked, err
		}
	}
}

func (w *waiter) newBackoff() *backoff { return newBackoff(250*time.Millisecond, pollMost) }

// try asks for the token, and if something is to be repaired first, repairs it and asks again. asked is when it asked last.
func (w *waiter) try(ctx context.Context, arrival string) (asked time.Time, a answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	q := question{w.token, w.length, arrival, w.pod}
	for repaired := false; ; repaired = true {
		asked = time.Now()
		a, err = w.semaphores.ask(ctx, w.id, q)
		if err != nil || a.status != acquireRepair {
			return asked, a, err
		}
		if repaired {
			return asked, a, fmt.Errorf("acquire %s: %w", w.id, errKeptRepairing)
		}
		if err := w.repair(ctx, asked, q); err != nil {
			return asked, a, err
		}
	}
}

// repair repairs the semaphore for a question that was asked, and does not keep the next one from being asked in time; what it has
// begun goes on.
func (w *waiter) repair(ctx context.Context, asked time.Time, q question) error {
	ctx, cancel := context.WithDeadline(ctx, asked.Add(pollMost))
	defer cancel()
	return w.semaphores.repair(ctx, w.id, w.length, w.expiration, q.newcomer())
}

// fail says why there is no token yet.
func (w *waiter) fail(err error) {
	w.say(err.Error())
	if time.Since(w.failed) > logEvery {
		w.log.Warn("no token yet, to be retried", "error", err.Error())
		w.failed = time.Now()
	}
}

// untilPoll is how long a waiter waits for a call. Those at the front do not sleep past the moment at which a token goes
// stale.
func (w *waiter) untilPoll(a answer) time.Duration {
	poll := pollLeast + rand.N(pollMost-pollLeast)
	if a.place.position > w.length {
		return poll
	}
	if a.place.position == 1 {
		poll = pollFirst/2 + rand.N(pollFirst/2)
	}
	if a.inUse < w.length { // kept for those ahead, unless they are gone
		poll = min(poll, pollAhead)
	}
	return max(min(poll, a.place.staleIn+rand.N(staleJitter)), 50*time.Millisecond)
}

// tell says where the waiter stands, and logs it if it is news.
func (w *waiter) tell(a answer) {
	text := waitingText(w.id, w.length, a)
	w.say(text)
	since := time.Since(w.logged)
	if since > logEvery || a.place.position != w.loggedPosition && since > logMoved {
		w.log.Info(text)
		w.logged, w.loggedPosition = time.Now(), a.place.position
	}
}

// waitingText says what a waiter waits for.
func waitingText(id semaphoreID, length int, a answer) string {
	text := fmt.Sprintf("waiting for a token of %s: %d of %d in use, %s in line, %s", id, a.inUse, length, ordinal(a.place.position), roughly(a.place.waited))
	if by := byHolders(a.holders, a.inUse); by != "" {
		text += "; in use " + by
	}
	return text + inDoubt(a.doubt)
}

// inDoubt says why nobody gets what seems to be free.
func inDoubt(doubt time.Duration) string {
	if doubt <= 0 {
		return ""
	}
	return fmt.Sprintf("; Redis was away or has lost data, in %s it is known who is gone", roughly(doubt))
}

func ordinal(n int) string {
	suffix := "th"
	if n/10%10 != 1 {
		switch n % 10 {
		case 1:
			suffix = "st"
		case 2:
			suffix = "nd"
		case 3:
			suffix = "rd"
		}
	}
	return fmt.Sprintf("%d%s", n, suffix)
}

// roughly is a duration for people.
func roughly(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d h", d/time.Hour)
}
