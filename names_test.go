package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// What the webhook knows of a pod is told with its token, and what its sidecar knows with the first heartbeat; that changes nothing of
// since when it has it. Who is refused hears it.
func TestHoldersAreNamed(t *testing.T) {
	r, s, id := newSemaphore(t)
	w := startWebhook(t, testConfig(r.Address))
	token := w.wantAdmitted(t, id, 1)
	if r.WantPod(t, id, token, "web-67d4947b99- ") == "0" {
		t.Error("it counts as a waiter")
	}
	since := fmt.Sprint(r.Now(t) - 14400)
	r.Do(t, "HSET", id.namesKey(), token+"/pod", since+" web-67d4947b99- ")
	if got, want := w.admit(t, rig.Review(t, id, 1)).Message, "1 of 1 tokens in use, by web-67d4947b99-... (4 h)"; !strings.HasSuffix(got, want) {
		t.Errorf("refused with %q, want %q", got, want)
	}
	t.Setenv("POD_NAME", "web-67d4947b99-x2x9z")
	t.Setenv("NODE_NAME", "node-1")
	p := rig.StartSidecar(t, r.Address, id, token)
	if got := r.WantPod(t, id, token, "web-67d4947b99-x2x9z node-1"); got != since {
		t.Errorf("it has the token since %s, want %s", got, since)
	}
	if got, want := w.admit(t, rig.Review(t, id, 1)).Message, "1 of 1 tokens in use, by web-67d4947b99-x2x9z (4 h)"; !strings.HasSuffix(got, want) {
		t.Errorf("refused with %q, want %q", got, want)
	}

	// A holder without a name is known by its token.
	old := acquire(t, s, id, 2)
	if got := w.admit(t, rig.Review(t, id, 2)).Message; !strings.Contains(got, ", "+old) {
		t.Errorf("refused with %q, want %s in it", got, old)
	}
	giveBack(t, s, id, old)

	// It is known again when Redis has lost it, with all else.
	r.Do(t, "DEL", id.keys()...)
	p.WantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	if got := r.WantPod(t, id, token, "web-67d4947b99-x2x9z node-1"); got <= since {
		t.Errorf("it has the token since %s", got)
	}

	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	if names := r.Pods(t, id); len(names) != 0 {
		t.Errorf("given back, and yet known: %v", names)
	}
}

// Who waits is known, and says who is before it; then since when it has its token.
func TestWaitersAreNamed(t *testing.T) {
	r, s, id := newSemaphore(t)
	holder, _, err := s.acquire(t.Context(), id, "web-a node-1", 1, time.Second)
	rig.Must(t, err)
	t.Setenv("POD_NAME", "web-b")
	t.Setenv("NODE_NAME", "node-2")
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	if since := r.WantPod(t, id, token, "web-b node-2"); since != "0" {
		t.Errorf("it waits, and has the token since %s", since)
	}
	if got := p.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, "); !strings.Contains(got, "; in use by web-a (") {
		t.Errorf("it waits for %q", got)
	}
	giveBack(t, s, id, holder)
	p.WantLog(t, heldText)
	if since := r.WantPod(t, id, token, "web-b node-2"); since == "0" {
		t.Error("it has the token, and counts as a waiter")
	}
	if names := r.Pods(t, id); len(names) != 1 {
		t.Errorf("known are %v", names)
	}
}

// What is reclaimed is not known any more, however much it is.
func TestReclaimedAreForgotten(t *testing.T) {
	r, s, id := newSemaphore(t)
	const stale = 2500
	live, _, err := s.acquire(t.Context(), id, "live node-1", maxLength, time.Second)
	rig.Must(t, err)
	var tokens, names []any
	for range stale {
		token := uuid.NewString()
		tokens, names = append(tokens, 1, token), append(names, token+"/pod", "1 dead node-1")
	}
	r.Do(t, "ZADD", append([]any{id.inflightKey()}, tokens...)...)
	r.Do(t, "HSET", append([]any{id.namesKey()}, names...)...)
	maintain(t, s, id, maxLength)
	r.WantInflight(t, id, live)
	if names := r.Pods(t, id); len(names) != 1 || !strings.HasSuffix(names[live], " live node-1") {
		t.Errorf("%d names are left, and %q", len(names), names[live])
	}
}

func TestNewPodName(t *testing.T) {
	for _, c := range []struct {
		name, node string
		want       podName
	}{
		{"web-1", "node-1", "web-1 node-1"},
		{"web-", "", "web- "},
		{"web-1", "no node", "web-1 "},
		{"", "node-1", ""},
		{"web 1", "node-1", ""},
		{"web-1\n", "node-1", ""},
		{"\x1b[2J", "node-1", ""},
		{strings.Repeat("a", 253), "", podName(strings.Repeat("a", 253) + " ")},
		{strings.Repeat("a", 254), "", ""},
	} {
		if got := newPodName(c.name, c.node); got != c.want {
			t.Errorf("%q on %q is %q, want %q", c.name, c.node, got, c.want)
		}
	}
}

func TestByHolders(t *testing.T) {
	long := holder{strings.Repeat("a", 250), time.Second}
	for _, c := range []struct {
		holders []holder
		inUse   int
		want    string
	}{
		{nil, 0, ""},
		{nil, 3, ""},
		{[]holder{{"a", 4 * time.Hour}}, 1, "by a (4 h)"},
		{[]holder{{"a", 4 * time.Hour}, {"b-", 2 * time.Minute}, {"c", heldUnknown}}, 10, "by a (4 h), b-... (2 min), c, and 7 more"},
		{[]holder{long, {"b", time.Second}, long, {"c", time.Second}}, 4, "by " + long.String() + ", b (1 s), and 2 more"},
	} {
		if got := byHolders(c.holders, c.inUse); got != c.want {
			t.Errorf("%v are %q, want %q", c.holders, got, c.want)
		}
	}
}

func TestParseHolders(t *testing.T) {
	got, err := parseHolders([]any{int64(-1), []byte("token"), int64(5), []byte("a"), int64(9), []byte("b")})
	if want := "[b (9 s) a (5 s) token]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("got %v, %v; want %s", got, err, want)
	}
	if got, err := parseHolders([]any{int64(5), []byte("\x1b[2J" + strings.Repeat("x", 1000))}); err != nil || strings.Contains(got[0].name, "\x1b") || len(got[0].name) > 60 {
		t.Errorf("what a stranger has written is shown: %q, %v", got, err)
	}
	if _, err := parseHolders([]any{int64(5)}); err == nil {
		t.Error("half a holder is accepted")
	}
}

// Nobody is named while no token is in use: it is kept for the line.
func TestRefusedForTheLine(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	stand(t, r, s, id, false)
	giveBack(t, s, id, token)
	_, _, err := s.acquire(context.Background(), id, "", 1, time.Second)
	var full *fullError
	if !errors.As(err, &full) || refusal(full) != fmt.Sprintf("no semaphore available: %s has 0 of 1 tokens in use; 1 waiting in line", id) {
		t.Errorf("got %v", err)
	}
}
