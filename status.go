package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

const (
	// statusTimeout bounds a read of Redis.
	statusTimeout = 10 * time.Second

	// statusEvery is how often --watch reads.
	statusEvery = 2 * time.Second
)

// runStatus prints the semaphores, or one of them, or releases a token.
func runStatus(ctx context.Context, c statusConfig, stdin io.Reader, stdout io.Writer, log *slog.Logger) error {
	s := newSemaphores(c.settings, nil, 1, log)
	defer s.queue.close()
	if c.release != "" {
		return releaseByHand(ctx, s, c, stdin, stdout)
	}
	for {
		var page strings.Builder
		err := printStatus(ctx, s, c, &page)
		if c.watch && c.output == outputTable {
			fmt.Fprint(stdout, "\x1b[H\x1b[2J") // home, and clear the screen
		}
		fmt.Fprint(stdout, page.String())
		if !c.watch {
			return err
		}
		if err != nil {
			log.Warn("not all can be shown", "error", err.Error())
		}
		if sleep(ctx, statusEvery) != nil {
			return nil
		}
	}
}

// printStatus reads Redis once and prints what it finds. With an error, it has printed
// what it could read.
func printStatus(ctx context.Context, s *semaphores, c statusConfig, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if c.semaphore != (semaphoreID{}) {
		d, err := s.inspect(ctx, c.semaphore)
		if err != nil {
			return err
		}
		if c.output == outputJSON {
			return printJSON(w, d.report())
		}
		printDetail(w, d)
		return nil
	}
	states, err := s.survey(ctx, c.namespace)
	if err != nil && len(states) == 0 {
		return err
	}
	if err != nil {
		err = fmt.Errorf("not all could be seen: %w", err)
	}
	if c.output == outputJSON {
		return errors.Join(printJSON(w, reportOf(states, err)), err)
	}
	printTable(w, states, c.namespace)
	return err
}

func printTable(w io.Writer, states []semaphoreState, namespace string) {
	if len(states) == 0 {
		where := ""
		if namespace != "" {
			where = " in namespace " + printable(namespace)
		}
		fmt.Fprintf(w, "no semaphore was used%s in the last minutes\n", where)
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "NAMESPACE\tKEY\tLENGTH\tFREE\tIN USE\tSTALE\tWAITING\tLONGEST WAIT\tOLDEST HEARTBEAT")
	for _, st := range states {
		wait, heartbeat := "", ""
		if st.waiting > 0 {
			wait = roughly(st.longestWait)
		}
		if st.inUse > 0 {
			heartbeat = roughly(st.oldestHeartbeat) + " ago"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%d\t%d\t%s\t%s\n",
			printable(st.id.namespace), printable(st.id.key), lengthText(st.length),
			st.free, st.inUse, st.stale, st.waiting, wait, heartbeat)
	}
	t.Flush()
}

// lengthText formats a length; zero is unknown.
func lengthText(length int) string {
	if length == 0 {
		return "?"
	}
	return fmt.Sprint(length)
}

func printDetail(w io.Writer, d semaphoreDetail) {
	fmt.Fprintf(w, "%s: %d of %s tokens in use (%d stale), %d free, %d waiting in line\n",
		d.id, d.inUse, lengthText(d.length), d.stale, d.free, d.waiting)
	if len(d.holders) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(t, "\nHOLDER\tNODE\tHELD\tHEARTBEAT\t\tTOKEN")
		for _, h := range d.holders {
			held, heartbeat, stale := "?", roughly(h.idle)+" ago", ""
			if h.held != heldUnknown {
				held = roughly(h.held)
			}
			if !h.started() {
				heartbeat = notStarted
			}
			if h.stale {
				stale = "stale"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n",
				podText(h.pod), cmp.Or(h.node, "?"), held, heartbeat, stale, printable(h.token))
		}
		t.Flush()
		printMore(w, d.inUse-len(d.holders))
	}
	if len(d.line) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(t, "\nLINE\tWAITER\tNODE\tWAITS\tASKED\tLENGTH\tTOKEN")
		for i, l := range d.line {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s ago\t%s\t%s\n",
				ordinal(i+1), podText(l.pod), cmp.Or(l.node, "?"), roughly(l.held), roughly(l.idle),
				lengthText(l.length), printable(l.token))
		}
		t.Flush()
		printMore(w, d.waiting-len(d.line))
	}
}

func printMore(w io.Writer, n int) {
	if n > 0 {
		fmt.Fprintf(w, "and %d more\n", n)
	}
}

// podText formats a pod's name, as far as it is known.
func podText(pod string) string {
	switch {
	case pod == "":
		return "?"
	case strings.HasSuffix(pod, "-"): // the API server makes the name
		return pod + "..."
	}
	return pod
}

// The JSON of "status". New fields may be added; none is renamed or removed. All times
// are in seconds.
type (
	statusReport struct {
		Semaphores []semaphoreReport `json:"semaphores"`
		Incomplete string            `json:"incomplete,omitempty"` // why not all could be seen
	}
	semaphoreReport struct {
		Namespace       string  `json:"namespace"`
		Key             string  `json:"key"`
		Length          int     `json:"length"` // the greatest that pods asked for lately; 0: not known
		Free            int     `json:"free"`
		InUse           int     `json:"inUse"`
		Late            int     `json:"late"`  // of those in use: no heartbeat for more than an interval and 3 s
		Stale           int     `json:"stale"` // of those in use: the next acquire may reclaim them
		Waiting         int     `json:"waiting"`
		LongestWait     float64 `json:"longestWaitSeconds"`
		OldestHeartbeat float64 `json:"oldestHeartbeatSeconds"`
		Reclaimed       int     `json:"reclaimed"`
		Rejoined        int     `json:"rejoined"`

		// Only of "status NAMESPACE/KEY", and at most a thousand of each.
		Holders []holderReport `json:"holders,omitempty"`
		Line    []waiterReport `json:"line,omitempty"`
	}
	holderReport struct {
		Token     string   `json:"token"`
		Pod       string   `json:"pod"`
		Node      string   `json:"node"`
		Held      *float64 `json:"heldSeconds"` // null: not known
		Heartbeat float64  `json:"heartbeatSeconds"`
		Stale     bool     `json:"stale"`
		Started   bool     `json:"started"` // its sidecar has confirmed the token; true if the pod is not known
	}
	waiterReport struct {
		Place  int     `json:"place"`
		Token  string  `json:"token"`
		Pod    string  `json:"pod"`
		Node   string  `json:"node"`
		Waited float64 `json:"waitedSeconds"`
		Asked  float64 `json:"askedSeconds"`
		Length int     `json:"length"`
	}
)

func reportOf(states []semaphoreState, err error) statusReport {
	r := statusReport{Semaphores: []semaphoreReport{}}
	for _, st := range states {
		r.Semaphores = append(r.Semaphores, st.report())
	}
	if err != nil {
		r.Incomplete = err.Error()
	}
	return r
}

func (st semaphoreState) report() semaphoreReport {
	return semaphoreReport{
		Namespace:       st.id.namespace,
		Key:             st.id.key,
		Length:          st.length,
		Free:            st.free,
		InUse:           st.inUse,
		Late:            st.late,
		Stale:           st.stale,
		Waiting:         st.waiting,
		LongestWait:     inMillis(st.longestWait),
		OldestHeartbeat: inMillis(st.oldestHeartbeat),
		Reclaimed:       st.reclaimed,
		Rejoined:        st.rejoined,
	}
}

func (d semaphoreDetail) report() semaphoreReport {
	r := d.semaphoreState.report()
	for _, h := range d.holders {
		one := holderReport{Token: h.token, Pod: h.pod, Node: h.node, Heartbeat: inMillis(h.idle), Stale: h.stale,
			Started: h.started()}
		if h.held != heldUnknown {
			one.Held = new(inMillis(h.held))
		}
		r.Holders = append(r.Holders, one)
	}
	for i, l := range d.line {
		r.Line = append(r.Line, waiterReport{Place: i + 1, Token: l.token, Pod: l.pod, Node: l.node,
			Waited: inMillis(l.held), Asked: inMillis(l.idle), Length: l.length})
	}
	return r
}

// inMillis returns a duration in seconds, to the millisecond.
func inMillis(d time.Duration) float64 { return float64(d.Milliseconds()) / 1000 }

func printJSON(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }

// releaseByHand releases a token, or takes a waiter out of its line, after a
// confirmation.
func releaseByHand(ctx context.Context, s *semaphores, c statusConfig, stdin io.Reader, stdout io.Writer) error {
	look, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	d, err := s.inspect(look, c.semaphore)
	if err != nil {
		return err
	}
	t, isHeld, err := d.find(c.release)
	if err != nil {
		return err
	}
	token := printable(t.token)
	if isHeld && !t.started() {
		fmt.Fprintf(stdout, "Token %s of %s, of pod %s: %s.\n", token, d.id, podText(t.pod), notStarted)
	} else if isHeld {
		fmt.Fprintf(stdout, "Token %s of %s, of pod %s on node %s: last heartbeat %s ago.\n",
			token, d.id, podText(t.pod), cmp.Or(t.node, "?"), roughly(t.idle))
	} else {
		fmt.Fprintf(stdout, "Token %s of %s, of pod %s on node %s: it waits in line, and has asked %s ago.\n",
			token, d.id, podText(t.pod), cmp.Or(t.node, "?"), roughly(t.idle))
	}
	if isHeld && t.started() && t.idle <= d.lateAfter() || !isHeld && t.idle <= pollMost {
		fmt.Fprintln(stdout, "Its sidecar is alive: it will be counted again within a heartbeat interval. "+
			"To free the token for good, delete the pod.")
	}
	if !c.yes {
		fmt.Fprint(stdout, "Release it? [y/N] ")
		text, _ := bufio.NewReader(stdin).ReadString('\n')
		if text = strings.ToLower(strings.TrimSpace(text)); text != "y" && text != "yes" {
			return errors.New("nothing was released: answer y, or use --yes")
		}
	}
	ctx, cancel = context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	status, err := s.releaseWithin(ctx, d.id, t.token, "")
	switch {
	case err != nil:
		return err
	case status == releaseDone:
		fmt.Fprintln(stdout, "token released")
	case status == releaseLeft:
		fmt.Fprintln(stdout, "taken out of the line")
	default:
		fmt.Fprintln(stdout, "there was nothing to release any more")
	}
	return nil
}

// find returns the holder or waiter of that token or pod.
func (d semaphoreDetail) find(tokenOrPod string) (t tokenState, isHeld bool, err error) {
	is := func(t tokenState) bool { return t.token == tokenOrPod || t.pod == tokenOrPod }
	var found []tokenState
	for _, t := range slices.Concat(d.holders, d.line) {
		if is(t) {
			found = append(found, t)
		}
	}
	switch len(found) {
	case 1:
		return found[0], slices.ContainsFunc(d.holders, is), nil
	case 0:
		return t, false, fmt.Errorf("no token of %s is used or waited for by %q: see status %s", d.id, tokenOrPod, d.id)
	}
	return t, false, fmt.Errorf("%d tokens of %s are used or waited for by %q: name one by its token, from status %s",
		len(found), d.id, tokenOrPod, d.id)
}
