package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// statusOf runs the mode status in this process.
func statusOf(t *testing.T, s *rig.Redis, stdin string, args ...string) (stdout string, err error) {
	t.Helper()
	var out bytes.Buffer
	args = append([]string{
		"status", "--queue-redis-address=" + rig.QueueAddress(s.Address), "--heartbeat-interval-seconds=30",
	}, args...)
	err = run(t.Context(), args,
		func(string) string { return "" }, strings.NewReader(stdin), &out, t.Output())
	return out.String(), err
}

// wantStatus runs the mode status, which must succeed, and print lines that match the
// patterns in order.
func wantStatus(t *testing.T, s *rig.Redis, args []string, patterns ...string) string {
	t.Helper()
	out, err := statusOf(t, s, "", args...)
	rig.Must(t, err)
	at := 0
	for _, line := range slices.Collect(strings.Lines(out)) {
		if at < len(patterns) && regexp.MustCompile("^"+patterns[at]+"\n$").MatchString(line) {
			at++
		}
	}
	if at < len(patterns) {
		t.Errorf("status %v: no line matches %q in\n%s", args, patterns[at], out)
	}
	return out
}

// shownSemaphore returns a semaphore with two holders, the second stale, and two waiters.
func shownSemaphore(t *testing.T, namespace string) (r *rig.Redis, s *semaphores, id semaphoreID, tokens []string) {
	t.Helper()
	r, s, id = newSemaphore(t)
	id.namespace = namespace
	for i, pod := range []podName{"web-a node-1", "web-b "} {
		token, _, err := s.acquire(t.Context(), id, pod, 2, limit{}, time.Second)
		rig.Must(t, err)
		r.Do(t, "HSET", id.namesKey(), token+"/pod", fmt.Sprintf("%d %s", r.Now(t)-14400/(i+1), pod))
		tokens = append(tokens, token)
	}
	for _, pod := range []podName{"web-c node-2", ""} {
		token := uuid.NewString()
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token: token, length: 2, arrival: joinLine, pod: pod})
		if err != nil || a.status != acquireFull {
			t.Fatalf("got %+v, %v, want a place in line", a, err)
		}
		tokens = append(tokens, token)
	}
	r.Do(t, "ZADD", id.inflightKey(), "XX", r.Now(t)-7200, tokens[1])
	return r, s, id, tokens
}

func TestStatusTable(t *testing.T) {
	namespace := "status-" + uuid.NewString()[:8]
	r, s, id, _ := shownSemaphore(t, namespace)
	free := semaphoreID{namespace, "free"}
	giveBack(t, s, free, acquire(t, s, free, 3))
	acquire(t, s, semaphoreID{namespace + "-other", "web"}, 1)
	want := []string{
		`NAMESPACE +KEY +LENGTH +FREE +IN USE +STALE +WAITING +LONGEST WAIT +OLDEST HEARTBEAT`,
		namespace + ` +free +3 +3 +0 +0 +0 *`,
		namespace + ` +` + id.key + ` +2 +0 +2 +1 +2 +\d s +2 h ago`,
	}
	wantStatus(t, r, nil, want...)
	out := wantStatus(t, r, []string{namespace}, want...)
	if strings.Contains(out, "-other") || strings.Count(out, "\n") != 3 {
		t.Errorf("namespace %s: got\n%s", namespace, out)
	}
	wantStatus(t, r, []string{"nowhere"}, "no semaphore was used in namespace nowhere in the last minutes")
	if out := wantStatus(t, r, nil); strings.Contains(out, "check-") {
		t.Errorf("the table shows an impossible semaphore:\n%s", out)
	}
}

func TestStatusDetail(t *testing.T) {
	r, _, id, tokens := shownSemaphore(t, "shop")
	wantStatus(t, r, []string{id.String()},
		id.String()+`: 2 of 2 tokens in use \(1 stale\), 0 free, 2 waiting in line`,
		`HOLDER +NODE +HELD +HEARTBEAT +TOKEN`,
		`web-a +node-1 +4 h +\d s ago +`+tokens[0],
		`web-b +\? +2 h +not started yet +stale +`+tokens[1],
		`LINE +WAITER +NODE +WAITS +ASKED +LENGTH +TOKEN`,
		`1st +web-c +node-2 +\d s +\d s ago +2 +`+tokens[2],
		`2nd +\? +\? +\d s +\d s ago +2 +`+tokens[3])
	for then, want := range map[string]string{"": `in 9 min`, whenWaitedRun: `in 9 min, runs`} {
		_, err := r.Run("acquire", id, rig.DefaultTiming, 2, "token-"+then, joinLine, "web-e node-2", "", "", "", "", 600, then)
		rig.Must(t, err)
		wantStatus(t, r, []string{id.String()}, `LINE +WAITER +NODE +WAITS +LEAVES +ASKED +LENGTH +TOKEN`,
			`1st +web-c +node-2 +\d s +- +\d s ago +2 +`+tokens[2],
			`... +web-e +node-2 +\d s +`+want+` +\d s ago +2 +token-`+then)
	}
	wantStatus(t, r, []string{"shop/nothing"},
		`shop/nothing: 0 of \? tokens in use \(0 stale\), 0 free, 0 waiting in line`)
}

// A pod with several tokens is one line. One that needs more than the length says so.
func TestStatusOfSeveralTokens(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	rig.Must(t, s.setLimit(t.Context(), id, limit{known: true, length: 5}, time.Hour, false))
	holder, ask := heavyWaiter(t, s, id, 5, 4)
	holder.pod = "web-a node-1"
	if a := ask(); a.status != acquireTaken {
		t.Fatalf("got %+v", a)
	}
	acquire(t, s, id, 5)
	for tokens, pod := range map[int]podName{8: "web-c node-2", 2: "web-b node-2"} {
		w, ask := heavyWaiter(t, s, id, 8, tokens)
		w.pod = pod
		ask()
	}
	wantStatus(t, r, []string{id.String()},
		id.String()+`: 5 of 5 tokens in use by 2 pods \(0 stale\), 0 free, 2 waiting in line`,
		`HOLDER +NODE +HELD +TOKENS +HEARTBEAT +TOKEN`,
		`web-a +node-1 +\d s +4 +\d s ago +`+holder.token,
		`\? +\? +\? +1 +\d s ago +.*`,
		`LINE +WAITER +NODE +WAITS +ASKED +TOKENS +LENGTH +TOKEN`)
	wantStatus(t, r, []string{id.String()}, `... +web-b +node-2 +\d s +\d s ago +2 +8 +.*`)
	wantStatus(t, r, []string{id.String()}, `... +web-c +node-2 +\d s +\d s ago +needs 8 of 5 +8 +.*`)
	d, err := s.inspect(t.Context(), id, detailMost)
	rig.Must(t, err)
	report := d.report()
	if report.Holders[0].Tokens != 4 || report.Line[0].Tokens+report.Line[1].Tokens != 10 {
		t.Errorf("the report has the holders %+v and the line %+v", report.Holders, report.Line)
	}
	if out, err := statusOf(t, r, "", "release", id.String(), "web-a", "--yes"); err != nil || !strings.Contains(out, "token released") {
		t.Errorf("got %v, %s", err, out)
	}
	r.WantCounts(t, id, 4, 1)
}

func TestStatusJSON(t *testing.T) {
	namespace := "status-" + uuid.NewString()[:8]
	r, s, id, tokens := shownSemaphore(t, namespace)
	rig.Must(t, errOf(s.heartbeat(t.Context(), id, uuid.NewString(), "", "web-d node-3", time.Minute, 1)))
	decode := func(v any, args ...string) {
		t.Helper()
		out, err := statusOf(t, r, "", append(args, "-o", "json")...)
		rig.Must(t, err)
		d := json.NewDecoder(strings.NewReader(out))
		d.DisallowUnknownFields()
		rig.Must(t, d.Decode(v))
	}
	var all struct{ Semaphores []map[string]any }
	decode(&all, namespace)
	if len(all.Semaphores) != 1 {
		t.Fatalf("got %v, want one semaphore", all)
	}
	got := all.Semaphores[0]
	for field, want := range map[string]any{
		"namespace": namespace, "key": id.key,
		"length": 2.0, "free": 0.0, "inUse": 3.0, "late": 1.0, "stale": 1.0,
		"waiting": 2.0, "reclaimed": 0.0, "rejoined": 1.0} {
		if got[field] != want {
			t.Errorf("%s is %v, want %v", field, got[field], want)
		}
	}
	if beat := got["oldestHeartbeatSeconds"].(float64); beat < 7200 || beat > 7260 {
		t.Errorf("the oldest heartbeat was %v s ago, want about 7200", beat)
	}
	var one semaphoreReport
	decode(&one, id.String())
	if len(one.Holders) != 3 || len(one.Line) != 2 {
		t.Fatalf("got %+v, want three holders and two waiters", one)
	}
	if h := one.Holders[0]; h.Pod != "web-a" || h.Node != "node-1" || h.Token != tokens[0] ||
		*h.Held < 14400 || h.Heartbeat > 60 || h.Stale {
		t.Errorf("the first holder is %+v", h)
	}
	if h := one.Holders[1]; h.Pod != "web-b" || h.Started || !one.Holders[0].Started {
		t.Errorf("the second holder is %+v", h)
	}
	if h := one.Holders[2]; h.Pod != "web-d" || *h.Held < 60 || *h.Held > 120 {
		t.Errorf("the rejoined holder is %+v", h)
	}
	if l := one.Line[1]; l.Place != 2 || l.Token != tokens[3] || l.Pod != "" || l.Length != 2 || l.Leaves != nil {
		t.Errorf("the second in line is %+v", l)
	}
	_, err := r.Run("acquire", id, rig.DefaultTiming, 2, "token", joinLine, "web-e node-2", "", "", "", "", 600, "")
	rig.Must(t, err)
	decode(&one, id.String())
	if l := one.Line[2]; l.WhenWaited != whenWaitedFail || *l.Leaves < 500 || *l.Leaves > 600 {
		t.Errorf("the third in line is %+v", l)
	}
}

// setStatus runs status set or pause. It returns what that prints, and its log.
func setStatus(t *testing.T, r *rig.Redis, stdin string, args ...string) (stdout, log string, err error) {
	t.Helper()
	var out, logged bytes.Buffer
	args = append([]string{"status", "--queue-redis-address=" + rig.QueueAddress(r.Address)}, args...)
	env := map[string]string{"USER": "alice", "HOSTNAME": "laptop"}
	err = run(t.Context(), args, func(name string) string { return env[name] }, strings.NewReader(stdin), &out, &logged)
	return out.String(), logged.String(), err
}

// overrideOf returns the override in force, by its raw fields in Redis.
func overrideOf(t *testing.T, r *rig.Redis, id semaphoreID) string {
	t.Helper()
	fields, err := redis.Strings(r.Do(t, "HMGET", id.stateKey(), "override", "note", "by"), nil)
	rig.Must(t, err)
	return strings.Join(fields, "|")
}

// An operator sets the length of a semaphore for a time. status shows it, pods obey it,
// and running pods stay.
func TestStatusSet(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := t.Context()
	first := acquire(t, s, id, 3)
	acquire(t, s, id, 3)
	set := func(stdin string, args ...string) (string, string, error) {
		t.Helper()
		return setStatus(t, r, stdin, args...)
	}
	name := id.String()

	for _, stdin := range []string{"", "n\n", "what?\n"} {
		out, log, err := set(stdin, "set", name, "length=1", "--for", "2h")
		if err == nil || !strings.Contains(err.Error(), "nothing was set: answer y, or use --yes") || log != "" ||
			!strings.HasSuffix(out, "Set it? [y/N] ") {
			t.Errorf("answer %q: got %v, %s%s", stdin, err, out, log)
		}
	}
	if got := overrideOf(t, r, id); got != "||" {
		t.Errorf("the override is %s, want none", got)
	}

	out, log, err := set("y\n", "set", name, "length=1", "--for", "2h", "--note", "db upgrade")
	rig.Must(t, err)
	const until = `1 until (\d+ \w+ )?\d\d:\d\d UTC`
	want := "^" + name + `: 2 tokens in use, 0 waiting in line; length in force: 3, as pods ask for
It will be ` + until + `\. Nobody is stopped; the next pod gets a token once fewer than 1 are in use\.
Set it\? \[y/N\] ` + name + `: 2 tokens in use, 0 waiting in line; length in force: ` + until +
		`, by alice@laptop: db upgrade
$`
	if !regexp.MustCompile(want).MatchString(out) {
		t.Errorf("got\n%s, want\n%s", out, want)
	}
	ends, err := redis.Int64(r.Do(t, "HGET", id.stateKey(), "ends"), nil)
	rig.Must(t, err)
	if left := ends - int64(r.Now(t)); left < 7100 || left > 7200 {
		t.Errorf("the override ends in %d s, want 7200", left)
	}
	var line map[string]any
	rig.Must(t, json.Unmarshal([]byte(log), &line))
	delete(line, "time")
	if got, want := fmt.Sprint(line), fmt.Sprint(map[string]any{"level": "INFO", "msg": "override set",
		"namespace": id.namespace, "key": id.key, "length": 1.0, "note": "db upgrade", "by": "alice@laptop",
		"until": time.Unix(ends, 0).UTC().Format(time.RFC3339)}); got != want {
		t.Errorf("the log is %s, want %s", got, want)
	}
	wantFullError(t, s, id, 3, 2)
	r.WantInflightCount(t, id, 2)
	wantStatus(t, r, []string{name}, name+`: 2 of 1 tokens in use \(0 stale\), 0 free, 0 waiting in line`,
		`length: `+until+`, by alice@laptop: db upgrade`, `HOLDER .*`)

	rig.Must(t, s.setLimit(ctx, id, limit{known: true, length: 3}, time.Hour, false))
	wantStatus(t, r, []string{name}, `length: `+until+` \(3 set\), by alice@laptop: db upgrade`)

	// A pause replaces it.
	out, _, err = set("", "pause", name, "--for", "2d", "--yes")
	if err != nil || !strings.Contains(out, "It will be paused until ") ||
		!strings.Contains(out, "Nobody is stopped; no pod gets a token meanwhile.\n") || strings.Contains(out, "[y/N]") {
		t.Errorf("got %v, %s", err, out)
	}
	if got := overrideOf(t, r, id); got != "0||alice@laptop" {
		t.Errorf("the override is %s, want a pause", got)
	}
	giveBack(t, s, id, first)
	wantFullError(t, s, id, 3, 1)

	out, log, err = set("yes\n", "set", name, "--clear")
	if err != nil || !strings.Contains(log, `"msg":"override cleared"`) || !strings.Contains(log, `"length":0,`) ||
		!strings.HasSuffix(out, name+": 1 tokens in use, 0 waiting in line; length in force: 3 set\n") ||
		!strings.Contains(out, "It will be 3 set. Nobody is stopped; pods that may get a token now: 2.\n") {
		t.Errorf("got %v, %s%s", err, out, log)
	}
	acquire(t, s, id, 3)
	out, log, err = set("", "set", name, "--clear")
	if err != nil || log != "" || !strings.HasSuffix(out, "Nothing is set for a time.\n") {
		t.Errorf("got %v, %s%s", err, out, log)
	}
}

// A mistyped name is seen before anything is set. A set semaphore without pods is shown.
func TestStatusSetOfAnUnusedSemaphore(t *testing.T) {
	r, s, id := newSemaphore(t)
	id.namespace = "status-" + uuid.NewString()[:8]
	out, _, err := setStatus(t, r, "n\n", "pause", id.String(), "--for=30m")
	if err == nil || !strings.Contains(out, "No pod has used it in the last minutes: check its name.\n") ||
		!strings.Contains(out, "length in force: what pods ask for\n") {
		t.Errorf("got %v, %s", err, out)
	}
	if r.Do(t, "EXISTS", id.stateKey()) != int64(0) {
		t.Error("it is in Redis, though nothing was set")
	}
	_, _, err = setStatus(t, r, "y\n", "pause", id.String(), "--for=30m")
	rig.Must(t, err)
	wantStatus(t, r, []string{id.namespace}, id.namespace+` +`+id.key+` +paused until .* UTC +0 +0 +0 +0 *`)
	out, _, err = setStatus(t, r, "y\n", "set", id.String(), "--clear")
	const text = "It will be what pods ask for. Nobody is stopped; pods get tokens as they ask for.\n"
	if err != nil || !strings.Contains(out, text) {
		t.Errorf("got %v, %s", err, out)
	}
	acquire(t, s, id, 1)
}

// status reads what Redis has of a limit and an override as the scripts do.
func TestStatusLength(t *testing.T) {
	r, s, id := newSemaphore(t)
	id.namespace = "status-" + uuid.NewString()[:8]
	acquire(t, s, id, 3)
	now := r.Now(t)
	const at = `(\d+ \w+ )?\d\d:\d\d UTC`
	three, none := 3, 0
	for _, c := range []struct {
		fields   []any
		length   string // a pattern
		detail   string // the line of the detail
		limit    *int
		override *overrideReport
	}{
		{nil, "3", "", nil, nil},
		{[]any{"limit", ""}, "3", "", nil, nil},
		{[]any{"limit", "3"}, "3 set", "length: 3 set", &three, nil},
		{[]any{"limit", "0"}, "paused", "length: paused", &none, nil},
		{[]any{"override", "1", "ends", now + 3600, "note", "n\x1b", "by", "b"}, "1 until " + at,
			"length: 1 until " + at + `, by b: n\?`, nil,
			&overrideReport{1, rfc3339(time.Unix(int64(now)+3600, 0)), "n\x1b", "b"}},
		{[]any{"override", "1", "ends", now + 3600, "limit", "3"}, `1 until ` + at + ` \(3 set\)`,
			`length: 1 until ` + at + ` \(3 set\)`, &three,
			&overrideReport{1, rfc3339(time.Unix(int64(now)+3600, 0)), "", ""}},
		{[]any{"override", "0", "ends", now + 90000}, `paused until \d+ \w+ \d\d:\d\d UTC`,
			"length: paused until .*", nil, &overrideReport{0, rfc3339(time.Unix(int64(now)+90000, 0)), "", ""}},
		{[]any{"override", "1", "ends", now + 3600, "limit", "0"}, `1 until ` + at + ` \(paused\)`,
			`length: .*`, &none, &overrideReport{1, rfc3339(time.Unix(int64(now)+3600, 0)), "", ""}},
		{[]any{"override", "1", "ends", now, "note", "over"}, "3", "", nil, nil}, // it has ended
		{[]any{"override", "x", "ends", now + 3600, "limit", "y"}, "3", "", nil, nil},
		{[]any{"override", "1", "ends", "soon"}, "3", "", nil, nil},
	} {
		r.Do(t, "HDEL", id.stateKey(), "limit", "override", "ends", "note", "by")
		if c.fields != nil {
			r.Do(t, "HSET", append([]any{id.stateKey()}, c.fields...)...)
		}
		wantStatus(t, r, []string{id.namespace}, id.namespace+` +`+id.key+` +`+c.length+` +\d +1 +0 +0 +\d+ s ago`)
		out := wantStatus(t, r, []string{id.String()}, id.String()+`: 1 of .*`, cmp.Or(c.detail, "HOLDER .*"))
		if c.detail == "" && strings.Contains(out, "length:") {
			t.Errorf("%v: got\n%s", c.fields, out)
		}
		out, err := statusOf(t, r, "", id.String(), "-o", "json")
		rig.Must(t, err)
		var got semaphoreReport
		rig.Must(t, json.Unmarshal([]byte(out), &got))
		if got.Length != 3 || !reflect.DeepEqual(got.Limit, c.limit) || !reflect.DeepEqual(got.Override, c.override) {
			t.Errorf("%v: got %s", c.fields, out)
		}
		// The scripts judge the same.
		token, _, err := s.acquire(t.Context(), id, "", 3, limit{}, 10*time.Second)
		if free := c.length == "3" || c.length == "3 set"; free != (err == nil) {
			t.Errorf("%v: acquire: got %v", c.fields, err)
		}
		if err == nil {
			giveBack(t, s, id, token)
		}
	}
}

func TestStatusRelease(t *testing.T) {
	r, _, id, tokens := shownSemaphore(t, "shop")
	release := func(stdin string, args ...string) (string, error) {
		t.Helper()
		return statusOf(t, r, stdin, append([]string{"release", id.String()}, args...)...)
	}
	for stdin, args := range map[string][]string{"n\n": {tokens[0]}, "": {"web-b"}, "what?\n": {tokens[2]}} {
		if out, err := release(stdin, args...); err == nil || !strings.Contains(out, "Release it? [y/N]") {
			t.Errorf("answer %q: got %v, %s", stdin, err, out)
		}
	}
	r.WantInflight(t, id, tokens[:2]...)
	r.WantLine(t, id, tokens[2:]...)
	out, err := release("", "nobody", "--yes")
	want := `used or waited for by "nobody": see status ` + id.String()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("release of an unknown pod: got %v, %s", err, out)
	}
	for _, c := range []struct{ stdin, what, flag, want string }{
		{"y\n", "web-b", "", "token released"},
		{"", "web-c", "--yes", "taken out of the line"},
		{"YES\n", tokens[0], "", "token released"},
	} {
		args := []string{c.what}
		if c.flag != "" {
			args = append(args, c.flag)
		}
		out, err := release(c.stdin, args...)
		if err != nil || !strings.HasSuffix(out, c.want+"\n") {
			t.Errorf("release of %s: got %v, %s", c.what, err, out)
		}
		if alive := strings.Contains(out, "Its sidecar is alive"); alive != (c.what != "web-b") {
			t.Errorf("release of %s: wrong warning about a live sidecar in\n%s", c.what, out)
		}
	}
	r.WantCounts(t, id, 2, 0)
	r.WantLine(t, id, tokens[3])
}

// The longest wait is that of the first in line since its arrival. It is 0 if another pod
// has become first while the survey read the semaphore: then its head start is not known.
func TestLongestWait(t *testing.T) {
	for name, c := range map[string]struct {
		first string
		line  []any
		ahead any
		want  time.Duration
	}{
		"no head start": {"a", []any{[]byte("a"), []byte("940000000")}, nil, time.Minute},
		"a head start":  {"a", []any{[]byte("a"), []byte("340000000")}, []byte("600000000"), time.Minute},
		"a forged one":  {"a", []any{[]byte("a"), []byte("940000000")}, []byte("-1e300"), time.Minute},
		"just joined":   {"", []any{[]byte("a"), []byte("340000000")}, nil, 0},
		"another":       {"b", []any{[]byte("a"), []byte("340000000")}, []byte("600000000"), 0},
		"just left":     {"a", []any{}, nil, 0},
	} {
		st := semaphoreState{first: c.first}
		none := int64(0)
		err := st.count(1000, []any{none, none, none, none, []any{}, int64(1), c.line, []any{c.ahead}, int64(1)})
		if err != nil || st.longestWait != c.want {
			t.Errorf("%s: got %s, %v, want %s", name, st.longestWait, err, c.want)
		}
	}
}

// An operator moves a waiter to the front of the line. status shows by how much it stands
// ahead.
func TestStatusFirst(t *testing.T) {
	r, s, id, tokens := shownSemaphore(t, "shop")
	name := id.String()
	urgent := acquireRequest{token: uuid.NewString(), length: 2, arrival: joinLine, ahead: 600e6, pod: "web-e node-2"}
	rig.Must(t, errOf(s.runAcquire(t.Context(), id, urgent)))
	wantStatus(t, r, []string{name}, `1st +web-e +node-2 +\d s \(\+600\) +.*`, `2nd +web-c +node-2 +\d s +\d s ago .*`)
	wantStatus(t, r, []string{"shop"}, `shop +`+id.key+` +2 +0 +2 +1 +3 +\d s +2 h ago`)

	for _, stdin := range []string{"", "n\n"} {
		out, log, err := setStatus(t, r, stdin, "first", name, "web-c")
		if err == nil || !strings.Contains(err.Error(), "nothing was moved: answer y, or use --yes") || log != "" ||
			out != "Pod web-c is 2nd of 3 in line of "+name+". It will be first.\nMove it? [y/N] " {
			t.Errorf("answer %q: got %v, %s%s", stdin, err, out, log)
		}
	}
	r.WantLine(t, id, urgent.token, tokens[2], tokens[3])
	out, log, err := setStatus(t, r, "y\n", "first", name, "web-c")
	if err != nil || !strings.HasSuffix(out, "Move it? [y/N] moved to the front\n") {
		t.Errorf("got %v, %s", err, out)
	}
	for _, want := range []string{`"msg":"moved to the front"`, `"pod":"web-c"`, `"by":"alice@laptop"`, tokens[2]} {
		if !strings.Contains(log, want) {
			t.Errorf("the log is %s, want %s in it", log, want)
		}
	}
	r.WantLine(t, id, tokens[2], urgent.token, tokens[3])
	_, _, err = setStatus(t, r, "", "first", name, tokens[3], "--yes")
	rig.Must(t, err)
	r.WantLine(t, id, tokens[3], tokens[2], urgent.token)
	var d semaphoreReport
	out, err = statusOf(t, r, "", name, "-o", "json")
	rig.Must(t, err)
	rig.Must(t, json.Unmarshal([]byte(out), &d))
	first, last := d.Line[0], d.Line[2]
	if last.Ahead != 600 || last.Waited > 60 || d.LongestWait > 60 || first.Ahead < 500 || first.Waited > 60 {
		t.Errorf("the line is %+v, the longest wait %v s", d.Line, d.LongestWait)
	}
	for pod, want := range map[string]string{
		"web-a":  "web-a has a token of " + name + ": it stands in no line",
		"nobody": `used or waited for by "nobody"`,
	} {
		if _, _, err := setStatus(t, r, "", "first", name, pod, "--yes"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", pod, err, want)
		}
	}
}

// Two pods can have one name, for example after a forced deletion in a StatefulSet. Their
// tokens tell them apart.
func TestStatusReleaseOfSameName(t *testing.T) {
	r, s, id := newSemaphore(t)
	for range 2 {
		_, _, err := s.acquire(t.Context(), id, "web-0 node-1", 2, limit{}, time.Second)
		rig.Must(t, err)
	}
	_, err := statusOf(t, r, "", "release", id.String(), "web-0", "--yes")
	if err == nil || !strings.Contains(err.Error(), "2 tokens of "+id.String()) {
		t.Errorf("got %v, want an error about two tokens", err)
	}
	r.WantCounts(t, id, 0, 2)
}

func TestStatusUsage(t *testing.T) {
	longNote := strings.Repeat("n", mostNote+1)
	for args, want := range map[string]string{
		"release":               "release: 0 arguments; they are NAMESPACE/KEY TOKEN|POD",
		"release shop/web":      "release: 1 arguments",
		"release shop web-1":    `"shop" is not a namespace, a slash and a key`,
		"shop/":                 `"shop/" is not a namespace, a slash and a key`,
		"shop web":              "2 arguments: there may be one, NAMESPACE or NAMESPACE/KEY",
		"-o yaml":               `-o: "yaml"`,
		"release a/b c --watch": "--watch and release do not go together",
		"serve --watch":         "--watch and serve do not go together",
		"serve --port=x":        `--port: "x" is not a whole number from 0 to 65535`,

		"set":                                      "set: 0 arguments; they are NAMESPACE/KEY length=NUMBER",
		"set shop/web --for 1h":                    "set: 1 arguments; they are NAMESPACE/KEY length=NUMBER",
		"pause shop/web 3 --for 1h":                "pause: 2 arguments; they are NAMESPACE/KEY",
		"set shop/web 3 --for 1h":                  `set: "3" is not length=NUMBER, such as length=1`,
		"set shop/web length=x --for 1h":           `length: "x" is not a whole number from 0 to 10000`,
		"set shop/web length=10001 --for 1h":       `length: "10001" is not a whole number from 0 to 10000`,
		"set shop length=1 --for 1h":               `"shop" is not a namespace, a slash and a key`,
		"set Shop/web length=1 --for 1h":           `set: "Shop" is not the name of a namespace`,
		"pause @/web --for 1h":                     `"@/web" is not a namespace, a slash and a key, nor @ and a key`,
		"set shop/web length=1":                    "--for: is needed, such as --for 2h: the length counts for a time",
		"pause shop/web":                           "--for: is needed",
		"first shop/web":                           "first: 1 arguments; they are NAMESPACE/KEY TOKEN|POD",
		"first shop web-1":                         `"shop" is not a namespace, a slash and a key`,
		"first shop/web web-1 --for 1h":            "--for: is not used: it is for set and pause",
		"first shop/web web-1 --clear":             "--clear: is not used: it is for set",
		"pause shop/web --for=59s":                 `--for: "59s" is not a duration from 1m to 7d, such as 30m, 2h or 2d`,
		"pause shop/web --for=7d1s":                `--for: "7d1s" is not a duration`,
		"pause shop/web --for=-1d":                 `--for: "-1d" is not a duration`,
		"pause shop/web --for=90":                  `--for: "90" is not a duration`,
		"pause shop/web --for=d":                   `--for: "d" is not a duration`,
		"pause shop/web --for=99999999999999999d":  `--for: "99999999999999999d" is not a duration`,
		"set shop/web --clear --for 1h":            "--for: is not used with --clear, which ends at once what was set",
		"set shop/web --clear --note x":            "--note: is not used with --clear",
		"set shop/web length=1 --clear":            `set: "length=1" and --clear do not go together`,
		"history":                                  "history: of which semaphore? The argument is NAMESPACE/KEY",
		"history shop":                             "history: of which semaphore? The argument is NAMESPACE/KEY",
		"history shop/web shop/db":                 "2 arguments: there may be one",
		"pause shop/web --clear":                   "--clear: to end a pause, run status set NAMESPACE/KEY --clear",
		"shop/web --clear":                         "--clear: is not used: it is for set",
		"shop/web --for 1h":                        "--for: is not used: it is for set and pause",
		"release a/b c --note x":                   "--note: is not used: it is for set and pause",
		"pause shop/web --for 1h --watch":          "--watch and pause do not go together",
		"pause shop/web --for 1h --note=\x1b[2J":   `--note: "\x1b[2J" is not printable text on one line`,
		"pause shop/web --for 1h --note=\xff":      "is not printable text on one line",
		"pause a/b --for 1h --note=" + longNote:    "has 201 bytes: at most 200 are allowed",
		"set Shop/web length=-1 --for x --note=\a": "4 wrong settings",
		"--length=3":                               "flag provided but not defined: -length",
		"--redis-addresses=a:6379":                 "flag provided but not defined",
	} {
		code, _, stderr := runArgs(nil, append([]string{"status"}, strings.Fields(args)...)...)
		if code != 2 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %s", args, code, stderr)
		}
	}
	code, stdout, _ := runArgs(map[string]string{"QUEUE_REDIS_ADDRESS": "queue:6379"}, "status", "--help")
	for _, want := range []string{"release NAMESPACE/KEY TOKEN|POD",
		"set NAMESPACE/KEY length=NUMBER --for DURATION", "pause NAMESPACE/KEY --for DURATION",
		"(default queue:6379)", "STATUS_REDIS_PASSWORD"} {
		if code != 0 || !strings.Contains(stdout, want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
}

// What the command line of set and pause means.
func TestStatusSetFlags(t *testing.T) {
	env := map[string]string{"USER": "alice", "HOSTNAME": "laptop"}
	none := override{by: "alice@laptop"}
	for args, want := range map[string]statusConfig{
		"set shop/web length=2 --for 1h":   {change: statusSet, override: override{length: 2, by: none.by}, lasts: time.Hour},
		"set shop/web length=0 --for 1m":   {change: statusSet, override: none, lasts: leastOverride},
		"--for 7d pause shop/web":          {change: statusPause, override: none, lasts: mostOverride},
		"pause shop/web --for 1d12h --yes": {change: statusPause, override: none, lasts: 36 * time.Hour, yes: true},
		"set --clear shop/web":             {change: statusSet, override: none, clear: true},
		"set shop/web length=10000 --for 2h --note=größer": {change: statusSet,
			override: override{length: maxLength, note: "größer", by: none.by}, lasts: 2 * time.Hour},
	} {
		got, err := parseStatusConfig(strings.Fields(args), func(name string) string { return env[name] })
		rig.Must(t, err)
		want.settings, want.output, want.port = got.settings, outputTable, 8082
		want.namespace, want.semaphore = "shop", semaphoreID{"shop", "web"}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, want %+v", args, got, want)
		}
	}
	for want, c := range map[string][2]string{"a@b": {"a", "b"}, "a": {"a", ""}, "b": {"", "b"}, "": {}} {
		if got := changedBy(c[0], c[1]); got != want {
			t.Errorf("%q: got %s, want %s", c, got, want)
		}
	}
}

// The history has each pod whose time ended, with tokens or in line, and how it ended.
func TestHistory(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	wantStatus(t, r, []string{"history", id.String()}, id.String()+": no history: no pod has ended in three days, or Redis has lost it")
	backdate := func(token string, seconds int) { // when the pod took its tokens
		text := r.Pods(t, id)[token]
		since, rest, _ := strings.Cut(text, " ")
		_, waited, _ := strings.Cut(since, "+")
		r.Do(t, "HSET", id.namesKey(), token+"/pod", fmt.Sprintf("%d+%s %s", r.Now(t)-seconds, cmp.Or(waited, "0"), rest))
	}
	ask := func(token string, wait waitEnd) acquireRequest {
		return acquireRequest{token: token, length: 1, arrival: joinLine, pod: newPodName(token, "node-1"), wait: wait}
	}
	wantAsked := func(w acquireRequest, status int) {
		t.Helper()
		if a, err := s.runAcquire(t.Context(), id, w); err != nil || a.status != status {
			t.Fatalf("%s: got %+v, %v, want status %d", w.token, a, err, status)
		}
	}
	arrived := func(token string, seconds int) { // so long ago
		r.Do(t, "ZADD", id.waitersKey(), "XX", (r.Now(t)-seconds)*1e6, token)
	}

	maintain(t, s, id, 1)
	wantAsked(ask("first", waitEnd{}), acquireTaken)
	wantAsked(ask("second", waitEnd{}), acquireFull)
	wantAsked(ask("impatient", waitEnd{time.Minute, whenWaitedFail}), acquireFull)
	wantAsked(ask("deleted", waitEnd{}), acquireFull)
	wantAsked(ask("silent", waitEnd{}), acquireFull)
	for i, token := range []string{"second", "impatient", "deleted", "silent"} {
		arrived(token, 4000-i)
	}
	wantAsked(ask("impatient", waitEnd{time.Minute, whenWaitedFail}), acquireGaveUp)
	wantAsked(ask("impatient", waitEnd{time.Minute, whenWaitedFail}), acquireGaveUp) // noted once
	giveBack(t, s, id, "impatient")
	giveBack(t, s, id, "deleted")
	r.Do(t, "ZADD", id.seenKey(), "XX", r.Now(t)-100, "silent")
	rig.Must(t, errOf(s.heartbeat(t.Context(), id, "first", "", newPodName("first", "node-1"), 0, 1)))
	maintain(t, s, id, 1)
	backdate("first", 9000)
	giveBack(t, s, id, "first")
	giveBack(t, s, id, "first") // a repeated release
	wantAsked(ask("second", waitEnd{}), acquireTaken)
	backdate("second", 30)
	_, err := statusOf(t, r, "", "release", "--yes", id.String(), "second")
	rig.Must(t, err)
	maintain(t, s, id, 4)
	several := acquireRequest{token: "several", length: 4, tokens: 3, pod: newPodName("several", "node-2")}
	wantAsked(several, acquireTaken)
	for i, name := range r.Inflight(t, id) {
		r.Do(t, "ZADD", id.inflightKey(), "XX", r.Now(t)-7200-i, name)
	}
	backdate("several", 9000)
	maintain(t, s, id, 4)

	args := []string{"history", id.String()}
	wantStatus(t, r, args, `ENDED +POD +NODE +WAITED +HELD +TOKENS +HOW`,
		`\d s ago +several +node-2 +0 s +2 h +3 +reclaimed`,
		`\d s ago +second +node-1 +66 min +3\d s +1 +by hand`,
		`\d s ago +first +node-1 +0 s +2 h +1 +released`,
		`\d s ago +silent +node-1 +66 min +- +1 +lost`,
		`\d s ago +deleted +node-1 +66 min +- +1 +left the line`,
		`\d s ago +impatient +node-1 +66 min +- +1 +gave up`)
	out, err := statusOf(t, r, "", append(args, "-o", "json")...)
	rig.Must(t, err)
	var report historyReport
	rig.Must(t, json.Unmarshal([]byte(out), &report))
	if h := report.History; report.Namespace != id.namespace || report.Key != id.key || len(h) != 6 ||
		h[1].How != "byHand" || h[1].Waited < 3990 || h[1].Waited > 4100 || *h[1].Held < 30 || h[5].Held != nil || h[0].Tokens != 3 {
		t.Errorf("got %s", out)
	}
	// Redis drops the semaphore within minutes, and its history within days.
	for key, most := range map[string]int64{id.stateKey(): 300, id.historyKey(): 3 * 86400} {
		if left := r.Do(t, "TTL", key).(int64); left < most-60 || left > most {
			t.Errorf("%s lives for %d s, want %d", key, left, most)
		}
	}
}

// The history has the last hundred pods, and at most 20 KB, whatever their names are. What
// another client wrote there is left out.
func TestHistoryIsBounded(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	r.Do(t, "RPUSH", id.historyKey(), "", "\x1b[2J", "1 released 1 1 1", "x released 1 1 1 pod node", "1 stolen 1 1 1 pod node",
		"1 released 1 1 1 \x1b[2J \x1b[2J")
	wantStatus(t, r, []string{"history", id.String()}, `\d+ h ago +\? +\? +1 s +1 s +released`)
	maintain(t, s, id, 1)
	long := strings.Repeat("n", 253)
	for i := range 250 {
		token, pod := fmt.Sprint("pod-", i), newPodName(long, long)
		if i == 249 {
			pod = ""
		}
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token: token, length: 1, pod: pod})
		if err != nil || a.status != acquireTaken {
			t.Fatalf("got %+v, %v", a, err)
		}
		giveBack(t, s, id, token)
		if size := r.Do(t, "MEMORY", "USAGE", id.historyKey(), "SAMPLES", 0).(int64); size > 20<<10 {
			t.Fatalf("after %d pods, the history takes %d bytes", i+1, size)
		}
	}
	all, err := s.history(t.Context(), id)
	name, isCut := strings.CutSuffix(all[1].pod, "-")
	if err != nil || len(all) != historyMost || all[0].pod != "" || !isCut || !strings.HasPrefix(long, name) || all[1].node != "" {
		t.Errorf("%d entries, the last are %+v, %v", len(all), all[:2], err)
	}
	r.Do(t, "DEL", id.historyKey())
	r.Do(t, "RPUSH", id.historyKey(), "of another client")
	r.Do(t, "EXPIRE", id.stateKey(), 8*86400) // as in a long pause
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: "late", length: 1})
	if err != nil || a.status != acquireTaken {
		t.Fatalf("got %+v, %v", a, err)
	}
	giveBack(t, s, id, "late")
	if left := r.Do(t, "TTL", id.historyKey()).(int64); left < 3*86400-60 || left > 3*86400 {
		t.Errorf("the history lives for %d s", left)
	}
}

// A full Redis first loses the histories: an admission works, and says so.
func TestFullRedisDropsHistories(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	s, id := w.semaphores, freshID()
	holder, acquired := acquire(t, s, id, 5), acquire(t, s, id, 5)
	for i := range 2000 {
		r.Do(t, "RPUSH", semaphoreID{"shop", fmt.Sprint(i)}.historyKey(), strings.Repeat("x", 5000))
	}
	r.Do(t, "CONFIG", "SET", "maxmemory", 1)
	if _, _, err := s.acquire(t.Context(), id, "", 5, limit{}, 10*time.Second); !isFull(err) {
		t.Errorf("got %v, want OOM: no memory is free without the histories either", err)
	}
	giveBack(t, s, id, acquired)
	if n := r.Do(t, "EXISTS", id.historyKey()); n != int64(0) {
		t.Error("a release made a history in a full Redis")
	}
	r.Do(t, "CONFIG", "SET", "maxmemory", 0)
	for i := range 2000 {
		r.Do(t, "RPUSH", semaphoreID{"shop", fmt.Sprint(i)}.historyKey(), strings.Repeat("x", 5000))
	}
	info := string(r.Do(t, "INFO", "memory").([]byte))
	used, ok := parseDigits(infoField(info, "used_memory"))
	if !ok {
		t.Fatal(info)
	}
	r.Do(t, "CONFIG", "SET", "maxmemory", used-1<<20)
	r.Do(t, "CONFIG", "RESETSTAT")
	r.Do(t, "ACL", "SETUSER", "default", "-del")
	if _, _, err := s.acquire(t.Context(), id, "", 5, limit{}, 10*time.Second); !isFull(err) {
		t.Errorf("a user that may not delete them: got %v, want OOM", err)
	}
	if calls := r.CommandCalls(t); calls["evalsha"] > 2 || calls["scan"] > 10 {
		t.Errorf("a user that may not delete them sent %v", calls)
	}
	r.Do(t, "ACL", "SETUSER", "default", "+del")
	rig.Eventually(t, 10*time.Second, func() error { // the webhook scans a full Redis once a second at most
		_, _, err := s.acquire(t.Context(), id, "", 5, limit{}, 10*time.Second)
		return err
	})
	if tokens := r.Inflight(t, id); len(tokens) != 2 || !slices.Contains(tokens, holder) {
		t.Errorf("in flight are %v", tokens)
	}
	if keys := r.Do(t, "KEYS", "history/*").([]any); len(keys) > 0 {
		t.Errorf("%d histories are left, such as %s", len(keys), keys[0])
	}
	if log := w.log.String(); !strings.Contains(log, "Redis is full: the histories of semaphores were deleted") {
		t.Error(log)
	}
}

// In the container of a sidecar, status needs no flags.
func TestStatusInASidecar(t *testing.T) {
	r, _, id, tokens := shownSemaphore(t, "shop")
	sidecar, _ := sidecarContainer(testConfig(r.Address), corev1.ResourceRequirements{}, id, testSpec, tokens[0])
	env := map[string]string{}
	for _, e := range sidecar.Env {
		env[e.Name] = e.Value
	}
	code, stdout, stderr := runArgs(env, "status", id.String())
	if want := id.String() + ": 2 of 2 tokens in use (1 stale)"; code != 0 || !strings.HasPrefix(stdout, want) {
		t.Errorf("exit code %d, %s%s", code, stdout, stderr)
	}
}

// In a container of the webhook, status finds Redis by the webhook's environment. It uses
// a Redis user of its own if there is one.
func TestStatusEnvironment(t *testing.T) {
	env := map[string]string{
		"QUEUE_REDIS_ADDRESS": "queue:6379", "HEARTBEAT_INTERVAL_SECONDS": "5", "STALE_THRESHOLD_SECONDS": "15",
		"REDIS_USERNAME": "webhook", "REDIS_PASSWORD": "a",
	}
	getenv := func(name string) string { return env[name] }
	c, err := parseStatusConfig(nil, getenv)
	rig.Must(t, err)
	if c.queueRedisAddress.text != "queue:6379" || c.heartbeatInterval != 5*time.Second ||
		c.staleThreshold != 15*time.Second || c.redis.username != "webhook" {
		t.Errorf("got %+v", c)
	}
	env["STATUS_REDIS_USERNAME"] = "status" // without a password, as if the Secret had none
	if c, err = parseStatusConfig(nil, getenv); err != nil || c.redis.username != "webhook" {
		t.Errorf("got %+v, %v", c.redis, err)
	}
	env["STATUS_REDIS_PASSWORD"] = "b"
	c, err = parseStatusConfig([]string{"--queue-redis-address=other:6379"}, getenv)
	if err != nil || c.redis.username != "status" || c.redis.password != "b" ||
		c.queueRedisAddress.text != "other:6379" {
		t.Errorf("got %+v, %v", c, err)
	}
	env["STATUS_REDIS_PASSWORD_FILE"] = rig.WriteFile(t, "password", "c\n")
	const want = "--redis-password-file: a password is in the environment, too: set one of them"
	if _, err = parseStatusConfig(nil, getenv); err == nil || err.Error() != want {
		t.Errorf("with two passwords: got %v, want %s", err, want)
	}
	env["STATUS_REDIS_PASSWORD"], env["SEMAPHORE"] = "", "shop/web"
	for want, args := range map[semaphoreID][]string{{"shop", "web"}: nil, {"shop", "cart"}: {"shop/cart"}, {}: {"shop"}} {
		if c, err = parseStatusConfig(args, getenv); err != nil || c.semaphore != want {
			t.Errorf("status %q in a sidecar shows %s, %v; want %s", args, c.semaphore, err, want)
		}
	}
	c, err = parseStatusConfig(nil, getenv)
	if want := (redisSettings{username: "status", passwordFile: env["STATUS_REDIS_PASSWORD_FILE"]}); err != nil ||
		c.redis != want {
		t.Errorf("got %+v, %v", c.redis, err)
	}
}

// Text that another client wrote into Redis cannot control the terminal of status.
func TestStatusEscapesStoredText(t *testing.T) {
	r, s, id := newSemaphore(t)
	namespace := "status-" + uuid.NewString()[:8]
	strange := semaphoreID{namespace, "\x1b[2Jkey"}
	acquire(t, s, strange, 1)
	wantStatus(t, r, []string{namespace}, namespace+` +"\\x1b\[2Jkey" +1 .*`)
	token := acquire(t, s, id, 2)
	r.Do(t, "HSET", id.namesKey(), token+"/pod", "1 \x1b[2J node")
	r.Do(t, "ZADD", id.inflightKey(), r.Now(t), "\x1b[2J")
	r.Do(t, "HSET", id.namesKey(), "\x1b[2J/pod", "what\nis this")
	if out := wantStatus(t, r, []string{id.String()}, `\? +\? +\? +.* ago +`+token); strings.Contains(out, "\x1b") {
		t.Errorf("status prints an escape sequence: %q", out)
	}
}

// With --watch, status repeats until it is terminated.
func TestStatusWatch(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 2)
	p := rig.StartProgram(t, "status", "--queue-redis-address="+rig.QueueAddress(r.Address),
		"--watch", "-o", "json", id.String())
	wantInUse := func(n int) {
		t.Helper()
		rig.Eventually(t, 10*time.Second, func() error {
			if !strings.Contains(p.Stdout.String(), fmt.Sprintf(`"inUse":%d,`, n)) {
				return fmt.Errorf("no report of %d tokens in use: %s", n, p.Stdout.String())
			}
			return nil
		})
	}
	wantInUse(1)
	acquire(t, s, id, 2)
	wantInUse(2)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
}

// A survey is quick in a Redis with many other keys, and times out if Redis hangs.
func TestSurveyIsBounded(t *testing.T) {
	t.Parallel()
	r, s, _ := newSemaphoreOn(t, rig.StartRedis(t))
	const semaphores = 2000
	concurrently(semaphores, func(i int) {
		id := semaphoreID{fmt.Sprintf("ns-%d", i%10), fmt.Sprintf("key-%d", i)}
		maintain(t, s, id, 3) // without a lock
		acquire(t, s, id, 3)
	})
	for i := range 200 {
		var args []any
		for j := range 100 {
			args = append(args, fmt.Sprintf("other-%d-%d", i, j), "x")
		}
		if rig.TestQueue != rig.ClusterQueue { // a Cluster refuses keys of several slots
			r.Do(t, "MSET", args...)
		}
	}
	before := r.CommandCalls(t)
	start := time.Now()
	states, err := s.survey(t.Context(), "")
	took := time.Since(start)
	if err != nil || len(states) != semaphores {
		t.Fatalf("found %d semaphores, %v", len(states), err)
	}
	t.Logf("%d semaphores in %s", len(states), took)
	calls := r.CommandCalls(t)
	if n := calls["scan"] - before["scan"]; n < 5 || n > 60 {
		t.Errorf("%d calls of SCAN", n)
	}
	if states, err = s.survey(t.Context(), "ns-3"); err != nil || len(states) != semaphores/10 {
		t.Errorf("found %d semaphores of a namespace, %v", len(states), err)
	}
	r.Pause(t)
	defer r.Resume(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start = time.Now()
	if _, err := s.survey(ctx, ""); err == nil {
		t.Error("a survey of a Redis that hangs succeeded")
	}
	rig.WantWithin(t, time.Since(start), 2*time.Second, "a survey of a Redis that hangs")
}

// The user of status can inspect, release and set a length, but not acquire. It needs
// each of its ACL rules.
func TestStatusUser(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	admin := testSemaphores(t, r.Address)
	config := testConfig(r.Address)
	config.redis = redisSettings{username: "status", password: rig.Password}
	s := semaphoresOf(t, config)
	look := func() error {
		id := freshID()
		acquire(t, admin, id, 1)
		standInLine(t, r, admin, id, false)
		return errors.Join(errOf(s.survey(t.Context(), "")), errOf(s.inspect(t.Context(), id, detailMost)))
	}
	release := func() error {
		id := freshID()
		token := acquire(t, admin, id, 2)
		standInLine(t, r, admin, id, false)
		r.Do(t, "ZADD", id.waitersKey(), 1, "gone")
		r.Do(t, "ZADD", id.seenKey(), 1, "gone")
		// The queue has more free tokens than the length allows: first some are trimmed,
		// then all.
		for _, length := range []int{2, 1} {
			r.Do(t, "RPUSH", id.queueKey(), "free", "free", "free")
			r.Do(t, "HSET", id.stateKey(), "length", length)
			r.Do(t, "PERSIST", id.stateKey())
			if _, err := s.release(t.Context(), id, token, ""); err != nil {
				return err
			}
			token = uuid.NewString()
			r.Do(t, "ZADD", id.inflightKey(), r.Now(t), token, r.Now(t), "another")
		}
		return nil
	}
	set := func() error {
		id := freshID() // Redis does not know it, and asks for its own age
		r.Do(t, "ZADD", id.inflightKey(), r.Now(t)+1000, "from before the clock was set back")
		for _, length := range []int{0, 2} {
			_, _, err := s.setOverride(t.Context(), id, override{length: length}, time.Hour)
			if err != nil {
				return err
			}
		}
		_, _, err := s.clearOverride(t.Context(), id)
		return err
	}
	rules := rig.Anys(strings.Fields(statusACL))
	r.Do(t, "ACL", append([]any{"SETUSER", "status", "on", ">" + rig.Password}, rules...)...)
	if rig.TestQueue != "" {
		r.Do(t, "ACL", "SETUSER", "status", "+role", "+cluster|slots")
	}
	rig.Must(t, look())
	if err := release(); err == nil || !isDenied(err) {
		t.Errorf("release without the rules for it: got %v, want NOPERM", err)
	}
	wantNeeded := func(rules string, do func() error) {
		t.Helper()
		for rule := range strings.FieldsSeq(rules) {
			command, isCommand := strings.CutPrefix(rule, "+")
			if !isCommand {
				continue
			}
			command, _, _ = strings.Cut(command, "|")
			r.Do(t, "ACL", "SETUSER", "status", "-"+command)
			r.Do(t, "ACL", "LOG", "RESET")
			err := do()
			if denied, _ := redis.Values(r.Do(t, "ACL", "LOG"), nil); err == nil && len(denied) > 0 {
				err = errors.New("NOPERM in the ACL log, though the command succeeded by other means")
			}
			if err == nil || !isDenied(err) {
				t.Errorf("without %s: got %v, want NOPERM", rule, err)
			}
			r.Do(t, "ACL", "SETUSER", "status", rule)
		}
		rig.Must(t, do())
	}
	wantNeeded(statusACL, look)
	r.Do(t, "ACL", append([]any{"SETUSER", "status"}, rig.Anys(strings.Fields(releaseACL))...)...)
	wantNeeded(releaseACL, release)
	r.Do(t, "ACL", append([]any{"SETUSER", "status"}, rig.Anys(strings.Fields(rig.SetACL))...)...)
	wantNeeded(rig.SetACL, set)
	id := freshID()
	maintain(t, admin, id, 1)
	if _, _, err := s.acquire(t.Context(), id, "", 1, limit{}, time.Second); err == nil || !isDenied(err) {
		t.Errorf("acquire: got %v, want NOPERM", err)
	}
	r.WantCounts(t, id, 1, 0)
}

// startPage serves the page of a queue. read returns what it shows, for a path and headers.
func startPage(t *testing.T, address string) (v *statusServer, read func(method, path, host, site string) (int, string)) {
	t.Helper()
	v = newStatusServer(testSemaphores(t, address))
	handler := v.handler()
	return v, func(method, path, host, site string) (int, string) {
		r := httptest.NewRequestWithContext(t.Context(), method, path, nil)
		r.Host = host
		if site != "" {
			r.Header.Set("Sec-Fetch-Site", site)
		}
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, r)
		return rec.Code, rec.Body.String()
	}
}

// The page shows what the terminal does, to a browser on this machine only.
func TestPage(t *testing.T) {
	t.Parallel()
	r, _, id, _ := shownSemaphore(t, "page-"+uuid.NewString()[:8])
	_, read := startPage(t, r.Address)
	for want, requests := range map[int][][4]string{
		http.StatusOK: {{"GET", "/", "localhost:8082", ""}, {"GET", "/data", "127.0.0.1", "same-origin"}, {"GET", "/", "[::1]:8082", "none"},
			{"GET", "/data?semaphore=" + url.QueryEscape(id.String()), "localhost", ""}},
		http.StatusMisdirectedRequest: {{"GET", "/data", "example.org", ""}, {"GET", "/", "localhost.example.org:8082", ""}, {"GET", "/", "", ""}},
		http.StatusForbidden:          {{"GET", "/data", "localhost", "cross-site"}, {"GET", "/data", "localhost", "same-site"}},
		http.StatusMethodNotAllowed:   {{"POST", "/data", "localhost", ""}},
		http.StatusNotFound:           {{"GET", "/page.html", "localhost", ""}},
		http.StatusBadRequest:         {{"GET", "/data?semaphore=shop", "localhost", ""}},
	} {
		for _, q := range requests {
			if got, text := read(q[0], q[1], q[2], q[3]); got != want {
				t.Errorf("%q: got %d %s, want %d", q, got, text, want)
			}
		}
	}
	_, text := read("GET", "/data?semaphore="+url.QueryEscape(id.String()), "localhost", "")
	var d pageData
	rig.Must(t, json.Unmarshal([]byte(text), &d))
	terminal, err := statusOf(t, r, "", id.String())
	rig.Must(t, err)
	for _, cell := range slices.Concat(d.Summary, d.Tables[0].Columns, d.Tables[0].Rows[0][:3], d.Tables[1].Columns, d.Tables[1].Rows[1][:3]) {
		if !strings.Contains(terminal, cell) {
			t.Errorf("the page shows %q, and the terminal does not:\n%s", cell, terminal)
		}
	}
	_, read = startPage(t, rig.FreeAddress(t))
	if got, text := read("GET", "/data", "localhost", ""); got != http.StatusOK || !strings.Contains(text, `"error":"queue Redis `) {
		t.Errorf("without Redis: got %d %s", got, text)
	}
}

// A chart has the samples of an hour. Those that are not known are none of no use.
func TestCharts(t *testing.T) {
	t.Parallel()
	v := newStatusServer(nil)
	used := func(inUse, waiting int) []semaphoreState {
		return []semaphoreState{{id: testID, inUse: inUse, waiting: waiting}}
	}
	v.take(nil, true)
	v.take(used(3, 1), true)
	v.take(nil, false)
	v.take(nil, true)
	v.take(used(2, 0), true)
	unknown := sample{InUse: -1}
	if got, want := v.chart(testID)[samplesKept-5:], []sample{unknown, {3, 1}, unknown, {}, {2, 0}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := v.chart(semaphoreID{"shop", "other"}); len(got) != 0 {
		t.Errorf("a semaphore that was never used has the chart %v", got)
	}
	for range samplesKept {
		v.take(used(0, 0), true)
	}
	if len(v.charts) != 0 {
		t.Error("a semaphore without a use for an hour has a chart")
	}
	var many []semaphoreState
	for i := range chartsMost + 10 {
		many = append(many, semaphoreState{id: semaphoreID{"shop", fmt.Sprint(i)}, inUse: 1})
	}
	if v.take(many, true); len(v.charts) != chartsMost {
		t.Errorf("%d charts, want at most %d", len(v.charts), chartsMost)
	}
}
