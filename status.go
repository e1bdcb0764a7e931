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

	"github.com/google/uuid"
)

const (
	// statusTimeout bounds a read of Redis.
	statusTimeout = 10 * time.Second

	// statusEvery is how often --watch reads.
	statusEvery = 2 * time.Second
)

// runStatus prints the semaphores, or one of them. Or it releases a token, moves a waiter
// to the front, or sets a length for a time.
func runStatus(ctx context.Context, c statusConfig, stdin io.Reader, stdout io.Writer, log *slog.Logger) error {
	s := newSemaphores(c.settings, nil, 1, log)
	defer s.queue.close()
	s.byHand = true
	if c.serve {
		return serveStatus(ctx, s, c, log)
	}
	switch c.change {
	case statusRelease:
		return releaseByHand(ctx, s, c, stdin, stdout)
	case statusSet, statusPause:
		return setByHand(ctx, s, c, stdin, stdout, log)
	case statusFirst:
		return firstByHand(ctx, s, c, stdin, stdout, log)
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
	if c.history {
		all, err := s.history(ctx, c.semaphore)
		if err != nil {
			return err
		}
		if c.output == outputJSON {
			return printJSON(w, historyReportOf(c.semaphore, all))
		}
		printHistory(w, c.semaphore, all)
		return nil
	}
	if c.semaphore != (semaphoreID{}) {
		d, err := s.inspect(ctx, c.semaphore, detailMost)
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
		fmt.Fprintln(w, noneUsed(namespace))
		return
	}
	tableOf(states).print(w)
}

// noneUsed says that there are no semaphores in a namespace, or in any.
func noneUsed(namespace string) string {
	if namespace == "" {
		return "no semaphore was used in the last minutes"
	}
	return "no semaphore was used in namespace " + printable(namespace) + " in the last minutes"
}

// table is what the terminal and the page show.
type table struct {
	Columns []string   `json:"columns"`
	Rows    [][]string `json:"rows"`
	More    int        `json:"more"` // rows that are left out
}

func (t table) print(w io.Writer) {
	all := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{t.Columns}, t.Rows...) {
		fmt.Fprintln(all, strings.Join(row, "\t"))
	}
	all.Flush()
	if t.More > 0 {
		fmt.Fprintf(w, "and %d more\n", t.More)
	}
}

// dropUnless removes a column in which no row says something of note.
func (t *table) dropUnless(isOfNote bool, column string) {
	if isOfNote {
		return
	}
	i := slices.Index(t.Columns, column)
	t.Columns = slices.Delete(t.Columns, i, i+1)
	for n, row := range t.Rows {
		t.Rows[n] = slices.Delete(row, i, i+1)
	}
}

// tableOf has a row for each semaphore.
func tableOf(states []semaphoreState) table {
	t := table{Columns: []string{"NAMESPACE", "KEY", "LENGTH", "FREE", "IN USE", "STALE", "WAITING", "LONGEST WAIT",
		"OLDEST HEARTBEAT"}}
	for _, st := range states {
		wait, heartbeat := "", ""
		if st.waiting > 0 {
			wait = roughly(st.longestWait)
		}
		if st.inUse > 0 {
			heartbeat = roughly(st.oldestHeartbeat) + " ago"
		}
		t.Rows = append(t.Rows, []string{printable(st.id.namespace), printable(st.id.key), st.lengthText(),
			fmt.Sprint(st.free), fmt.Sprint(st.inUse), fmt.Sprint(st.stale), fmt.Sprint(st.waiting), wait, heartbeat})
	}
	return t
}

// lengthText formats a length; zero is unknown.
func lengthText(length int) string {
	if length == 0 {
		return "?"
	}
	return fmt.Sprint(length)
}

// lengthText formats the length in force: what pods ask for, or what the owner has set.
func (st semaphoreState) lengthText() string {
	o, limit := st.setting.override, ""
	if l := st.setting.limit; l.isSet() {
		if limit = "paused"; l.length > 0 {
			limit = fmt.Sprintf("%d set", l.length)
		}
	}
	if o.until.IsZero() {
		return cmp.Or(limit, lengthText(st.length))
	}
	text := "paused"
	if o.length > 0 {
		text = fmt.Sprint(o.length)
	}
	text += " until " + clockTime(o.until)
	if limit != "" {
		text += " (" + limit + ")"
	}
	return text
}

// setText says who has set the length in force for a time, and why; empty if nobody has.
func (st semaphoreState) setText() (text string) {
	o := st.setting.override
	if o.until.IsZero() {
		return ""
	}
	if o.by != "" {
		text += ", by " + displayNote(o.by)
	}
	if o.note != "" {
		text += ": " + displayNote(o.note)
	}
	return text
}

func printDetail(w io.Writer, d semaphoreDetail) {
	for _, line := range d.summary() {
		fmt.Fprintln(w, line)
	}
	for _, t := range []table{d.holderTable(), d.lineTable()} {
		if len(t.Rows) > 0 {
			fmt.Fprintln(w)
			t.print(w)
		}
	}
}

// summary says how a semaphore is used.
func (d semaphoreDetail) summary() (lines []string) {
	of := lengthText(d.length)
	if d.setting.isSet() {
		of = fmt.Sprint(d.setting.lengthFor(d.length))
	}
	lines = append(lines, fmt.Sprintf("%s: %d of %s tokens in use%s (%d stale), %d free, %d waiting in line",
		d.id, d.inUse, of, d.byPods(), d.stale, d.free, d.waiting))
	if d.setting.isSet() {
		lines = append(lines, fmt.Sprintf("length: %s%s", d.lengthText(), d.setText()))
	}
	if len(d.holds) >= holdsLeast && d.waiting > 0 { // what STARTS is estimated from
		lines = append(lines, fmt.Sprintf("a pod holds its tokens for %s on average; nine of ten for at most %s",
			roughly(d.holds.mean()), roughly(d.holds.ninth())))
	}
	return lines
}

// holderTable has a row for each pod with tokens.
func (d semaphoreDetail) holderTable() table {
	t := table{Columns: []string{"HOLDER", "NODE", "HELD", "TOKENS", "HEARTBEAT", "", "TOKEN"}, More: d.inUse}
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
		t.More -= h.tokens
		t.Rows = append(t.Rows, []string{podText(h.pod), cmp.Or(h.node, "?"), held, fmt.Sprint(h.tokens), heartbeat, stale,
			printable(h.token)})
	}
	t.dropUnless(slices.ContainsFunc(d.holders, tokenState.hasSeveral), "TOKENS")
	return t
}

// lineTable has a row for each pod in line.
func (d semaphoreDetail) lineTable() table {
	t := table{Columns: []string{"LINE", "WAITER", "NODE", "WAITS", "STARTS", "LEAVES", "ASKED", "TOKENS", "LENGTH", "TOKEN"},
		More: d.waiting - len(d.line)}
	starts, leaves := false, false
	for i, l := range d.line {
		starts, leaves = starts || l.startsIn != startUnknown, leaves || l.ends.after > 0
		t.Rows = append(t.Rows, []string{ordinal(i + 1), podText(l.pod), cmp.Or(l.node, "?"), l.waits(), l.startsText(),
			l.leavesText(), roughly(l.idle) + " ago", d.tokensText(l), lengthText(l.length), printable(l.token)})
	}
	t.dropUnless(starts, "STARTS")
	t.dropUnless(leaves, "LEAVES")
	t.dropUnless(slices.ContainsFunc(d.line, tokenState.hasSeveral), "TOKENS")
	return t
}

func printHistory(w io.Writer, id semaphoreID, all []ending) {
	if len(all) == 0 {
		fmt.Fprintf(w, "%s: no history: no pod has ended in three days, or Redis has lost it\n", id)
		return
	}
	historyTable(all).print(w)
}

// historyTable has a row for each pod whose time ended, with tokens or in line.
func historyTable(all []ending) table {
	t := table{Columns: []string{"ENDED", "POD", "NODE", "WAITED", "HELD", "TOKENS", "HOW"}}
	several := false
	for _, e := range all {
		held := "-"
		if e.held != heldUnknown {
			held = roughly(e.held)
		}
		several = several || e.tokens > 1
		t.Rows = append(t.Rows, []string{roughly(e.ago) + " ago", podText(e.pod), cmp.Or(e.node, "?"), roughly(e.waited), held,
			fmt.Sprint(e.tokens), endings[e.how]})
	}
	t.dropUnless(several, "TOKENS")
	return t
}

// byPods says how many pods have the tokens in use, if some have several.
func (d semaphoreDetail) byPods() string {
	if !slices.ContainsFunc(d.holders, tokenState.hasSeveral) || d.inUse > detailMost {
		return ""
	}
	return byPods(len(d.holders))
}

// hasSeveral reports whether a pod has several tokens, or needs them.
func (t tokenState) hasSeveral() bool { return t.tokens > 1 }

// tokensText says how many tokens a waiter needs.
func (d semaphoreDetail) tokensText(l tokenState) string {
	if of := d.setting.lengthFor(max(d.length, l.length)); l.tokens > of && of > 0 {
		return fmt.Sprintf("needs %d of %d", l.tokens, of)
	}
	return fmt.Sprint(l.tokens)
}

// waits says how long a waiter waits, and by how many seconds it stands ahead.
func (t tokenState) waits() string {
	if t.ahead < time.Second {
		return roughly(t.held)
	}
	return fmt.Sprintf("%s (+%.0f)", roughly(t.held), t.ahead.Seconds())
}

// startsText says when a pod in line starts, if that is known.
func (t tokenState) startsText() string {
	if t.startsIn == startUnknown {
		return "?"
	}
	return "in about " + roughly(t.startsIn)
}

// leavesText says when a pod in line stops waiting, and if it runs then.
func (t tokenState) leavesText() string {
	left, ok := t.left()
	switch {
	case !ok:
		return "-"
	case t.ends.runs():
		return "in " + roughly(left) + ", runs"
	}
	return "in " + roughly(left)
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

		Limit    *int            `json:"limit"`    // the length that the owner has set; 0: paused; null: none
		Override *overrideReport `json:"override"` // precedes the limit; null: none

		// How long the last pods had their tokens; null: too few to tell.
		HeldMean  *float64 `json:"heldMeanSeconds"`
		HeldNinth *float64 `json:"heldNinthSeconds"` // nine of ten had them for at most this long

		// Only of "status NAMESPACE/KEY", and at most a thousand of each.
		Holders []holderReport `json:"holders,omitempty"`
		Line    []waiterReport `json:"line,omitempty"`
	}
	overrideReport struct {
		Length int    `json:"length"` // 0: paused
		Until  string `json:"until"`  // RFC 3339, in UTC
		Note   string `json:"note"`   // why; empty: not known
		By     string `json:"by"`     // who has set it; empty: not known
	}
	holderReport struct {
		Token     string   `json:"token"`
		Pod       string   `json:"pod"`
		Node      string   `json:"node"`
		Tokens    int      `json:"tokens"`      // that the pod has
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
		Ahead  float64 `json:"aheadSeconds"` // its place is so much before its arrival: a head start, or moved by hand
		Asked  float64 `json:"askedSeconds"`
		Length int     `json:"length"`
		Tokens int     `json:"tokens"` // that the pod needs

		Starts     *float64 `json:"startsSeconds"` // until it starts, an estimate; null: not known
		Leaves     *float64 `json:"leavesSeconds"` // until it stops waiting; null: when it has a token
		WhenWaited string   `json:"whenWaited"`    // what it does then: fail or run; empty if it does not stop
	}

	// Of "status history".
	historyReport struct {
		Namespace string         `json:"namespace"`
		Key       string         `json:"key"`
		History   []endingReport `json:"history"` // the last one first
	}
	endingReport struct {
		Ended  string   `json:"ended"` // RFC 3339, in UTC
		Pod    string   `json:"pod"`
		Node   string   `json:"node"`
		Waited float64  `json:"waitedSeconds"`
		Held   *float64 `json:"heldSeconds"` // null: it had no token, or not known
		Tokens int      `json:"tokens"`      // that it had, or needed
		How    string   `json:"how"`         // released, reclaimed, byHand; of a waiter left, lost or gaveUp
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
	r := semaphoreReport{
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
	if len(st.holds) >= holdsLeast {
		r.HeldMean, r.HeldNinth = new(inMillis(st.holds.mean())), new(inMillis(st.holds.ninth()))
	}
	if l := st.setting.limit; l.isSet() {
		r.Limit = new(l.length)
	}
	if o := st.setting.override; !o.until.IsZero() {
		r.Override = &overrideReport{o.length, rfc3339(o.until), o.note, o.by}
	}
	return r
}

func rfc3339(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func (d semaphoreDetail) report() semaphoreReport {
	r := d.semaphoreState.report()
	for _, h := range d.holders {
		one := holderReport{Token: h.token, Pod: h.pod, Node: h.node, Tokens: h.tokens, Heartbeat: inMillis(h.idle), Stale: h.stale,
			Started: h.started()}
		if h.held != heldUnknown {
			one.Held = new(inMillis(h.held))
		}
		r.Holders = append(r.Holders, one)
	}
	for i, l := range d.line {
		one := waiterReport{Place: i + 1, Token: l.token, Pod: l.pod, Node: l.node,
			Waited: inMillis(l.held), Ahead: inMillis(l.ahead), Asked: inMillis(l.idle), Length: l.length,
			Tokens: l.tokens}
		if l.startsIn != startUnknown {
			one.Starts = new(inMillis(l.startsIn))
		}
		if left, ok := l.left(); ok {
			one.Leaves, one.WhenWaited = new(inMillis(left)), whenWaitedFail
		}
		if l.ends.runs() {
			one.WhenWaited = whenWaitedRun
		}
		r.Line = append(r.Line, one)
	}
	return r
}

func historyReportOf(id semaphoreID, all []ending) historyReport {
	r := historyReport{id.namespace, id.key, []endingReport{}}
	for _, e := range all {
		one := endingReport{Ended: rfc3339(e.at), Pod: e.pod, Node: e.node, Waited: inMillis(e.waited),
			Tokens: e.tokens, How: e.how}
		if e.held != heldUnknown {
			one.Held = new(inMillis(e.held))
		}
		r.History = append(r.History, one)
	}
	return r
}

// inMillis returns a duration in seconds, to the millisecond.
func inMillis(d time.Duration) float64 { return float64(d.Milliseconds()) / 1000 }

func printJSON(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }

// look reads the semaphore that a change is about. A person may take long to confirm it.
func (c statusConfig) look(ctx context.Context, s *semaphores) (semaphoreDetail, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return s.inspect(ctx, c.semaphore, detailMost)
}

// releaseByHand releases a token, or takes a waiter out of its line, after a
// confirmation.
func releaseByHand(ctx context.Context, s *semaphores, c statusConfig, stdin io.Reader, stdout io.Writer) error {
	d, err := c.look(ctx, s)
	if err != nil {
		return err
	}
	t, isHeld, err := d.find(c.pod)
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
	if !c.confirms(stdin, stdout, "Release it?") {
		return errors.New("nothing was released: answer y, or use --yes")
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
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

// firstByHand moves a waiter to the front of its line, after a confirmation.
func firstByHand(ctx context.Context, s *semaphores, c statusConfig, stdin io.Reader, stdout io.Writer,
	log *slog.Logger) error {
	d, err := c.look(ctx, s)
	if err != nil {
		return err
	}
	t, isHeld, err := d.find(c.pod)
	place := slices.IndexFunc(d.line, func(l tokenState) bool { return l.token == t.token }) + 1
	if unseen := d.waiting > len(d.line); err != nil && unseen && uuid.Validate(c.pod) == nil {
		t, place, err = tokenState{token: c.pod}, 0, nil
	} else if unseen && (err != nil || t.token != c.pod) {
		return fmt.Errorf("%d wait in line of %s, and only %d of them are shown: name the pod by its UID",
			d.waiting, d.id, len(d.line))
	}
	switch {
	case err != nil:
		return err
	case isHeld:
		return fmt.Errorf("%s has a token of %s: it stands in no line", podText(t.pod), d.id)
	}
	where := fmt.Sprintf("Pod %s is %s", podText(t.pod), ordinal(place))
	if place == 0 {
		where = fmt.Sprintf("Pod %s is not among the first %d", t.token, len(d.line))
	}
	fmt.Fprintf(stdout, "%s of %d in line of %s. It will be first.\n", where, d.waiting, d.id)
	if !c.confirms(stdin, stdout, "Move it?") {
		return errors.New("nothing was moved: answer y, or use --yes")
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	ok, err := s.moveFirst(ctx, d.id, t.token)
	switch {
	case err != nil:
		return mayNotSet(err, "move a waiter")
	case !ok:
		return fmt.Errorf("%s stands in no line: see status %s", cmp.Or(t.pod, t.token), d.id)
	}
	log.Info("moved to the front", "namespace", d.id.namespace, "key", d.id.key, "pod", t.pod, "token", t.token,
		"by", c.override.by)
	fmt.Fprintln(stdout, "moved to the front")
	return nil
}

// mayNotSet adds to an error who may change what, if this user may not.
func mayNotSet(err error, what string) error {
	if isPermissionError(err.Error()) || strings.Contains(err.Error(), "NOPERM") {
		return fmt.Errorf("%w: only the users status and webhook of Redis may %s; "+
			"run status in a container of the webhook", err, what)
	}
	return err
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

// confirms asks a question, unless --yes answers it.
func (c statusConfig) confirms(stdin io.Reader, stdout io.Writer, question string) bool {
	if c.yes {
		return true
	}
	fmt.Fprint(stdout, question+" [y/N] ")
	text, _ := bufio.NewReader(stdin).ReadString('\n')
	text = strings.ToLower(strings.TrimSpace(text))
	return text == "y" || text == "yes"
}

// setByHand sets the override of a semaphore, or clears it, after a confirmation.
func setByHand(ctx context.Context, s *semaphores, c statusConfig, stdin io.Reader, stdout io.Writer,
	log *slog.Logger) error {
	d, err := c.look(ctx, s)
	if err != nil {
		return err
	}
	before := d.setting.override
	printSetting(stdout, d.semaphoreState)
	if c.clear && before.until.IsZero() {
		fmt.Fprintln(stdout, "Nothing is set for a time.")
		return nil
	}
	if !c.clear && d.inUse+d.waiting == 0 && d.length == 0 {
		fmt.Fprintln(stdout, "No pod has used it in the last minutes: check its name.")
	}
	after, question := d.semaphoreState, "Set it?"
	if c.clear {
		after.setting.override, question = override{}, "Clear it?"
	} else {
		after.setting.override = c.override
		after.setting.override.until = time.Now().Add(c.lasts)
	}
	fmt.Fprintf(stdout, "It will be %s. Nobody is stopped; %s.\n", after.lengthInWords(), after.effect())
	if !c.confirms(stdin, stdout, question) {
		return errors.New("nothing was set: answer y, or use --yes")
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if c.clear {
		after.inUse, after.waiting, err = s.clearOverride(ctx, d.id)
	} else {
		after.inUse, after.waiting, err = s.setOverride(ctx, d.id, c.override, c.lasts)
	}
	if err != nil {
		return mayNotSet(err, "set a length")
	}
	// Redis ends the override by its own clock.
	if now, err := s.inspect(ctx, d.id, detailMost); err == nil {
		after = now.semaphoreState
	}
	what, o := "override set", c.override
	o.until = after.setting.override.until
	if c.clear {
		what, o = "override cleared", before
	}
	log.Info(what, "namespace", d.id.namespace, "key", d.id.key, "length", o.length, "until", rfc3339(o.until),
		"note", o.note, "by", c.override.by)
	printSetting(stdout, after)
	return nil
}

// printSetting says how a semaphore is used, and which length is in force.
func printSetting(w io.Writer, st semaphoreState) {
	fmt.Fprintf(w, "%s: %d tokens in use, %d waiting in line; length in force: %s%s\n",
		st.id, st.inUse, st.waiting, st.lengthInWords(), st.setText())
}

// lengthInWords is lengthText in a sentence.
func (st semaphoreState) lengthInWords() string {
	switch {
	case st.setting.isSet():
		return st.lengthText()
	case st.length == 0:
		return "what pods ask for"
	}
	return lengthText(st.length) + ", as pods ask for"
}

// effect says which pods get a token while a length is in force.
func (st semaphoreState) effect() string {
	switch length := st.setting.lengthFor(st.length); {
	case !st.setting.isSet() && length == 0:
		return "pods get tokens as they ask for"
	case length == 0:
		return "no pod gets a token meanwhile"
	case st.inUse >= length:
		return fmt.Sprintf("the next pod gets a token once fewer than %d are in use", length)
	default:
		return fmt.Sprintf("pods that may get a token now: %d", length-st.inUse)
	}
}
