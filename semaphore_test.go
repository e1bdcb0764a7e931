package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestAcquireUntilFull(t *testing.T) {
	r, s, id := newSemaphore(t)
	var tokens []string
	for range 3 {
		tokens = append(tokens, acquire(t, s, id, 3))
	}
	r.WantCounts(t, id, 0, 3)
	got := r.Inflight(t, id)
	slices.Sort(got)
	slices.Sort(tokens)
	if !slices.Equal(got, tokens) {
		t.Errorf("in flight: %v, handed out: %v", got, tokens)
	}
	wantFullError(t, s, id, 3, 3)
}

func TestReleaseReturnsATokenOnce(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 2)
	for attempt, want := range []int{releaseDone, 0, 0} {
		status, err := s.release(context.Background(), id, token, "")
		rig.Must(t, err)
		if status != want {
			t.Errorf("release %d returned status %d, want %d", attempt+1, status, want)
		}
	}
	r.WantCounts(t, id, 2, 0)
}

func TestHeartbeatScoresByServerClock(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	r.MakeStale(t, id, token)
	rejoined, err := s.heartbeat(context.Background(), id, token, "", "", 0, 1)
	rig.Must(t, err)
	if rejoined {
		t.Error("the heartbeat of a token in flight reported a rejoin")
	}
	now, err := redis.Ints(r.Do(t, "TIME"), nil)
	rig.Must(t, err)
	score, err := redis.Int(r.Do(t, "ZSCORE", id.inflightKey(), token), nil)
	rig.Must(t, err)
	if now[0]-score > 5 || score > now[0] {
		t.Errorf("the score is %d, the server's time is %d", score, now[0])
	}
}

// The token of a paused pod is reclaimed, and a second pod gets a new one. The late
// heartbeat and release of the first pod do not touch the token of the second.
func TestLateHeartbeatAndRelease(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	first := acquire(t, s, id, 1)
	r.MakeStale(t, id, first)
	second := acquire(t, s, id, 1)
	if first == second {
		t.Fatalf("token %s was handed out twice", first)
	}
	rejoined, err := s.heartbeat(ctx, id, first, "", "", 0, 1)
	rig.Must(t, err)
	if !rejoined {
		t.Error("the late heartbeat did not rejoin")
	}
	r.WantCounts(t, id, 0, 2)
	wantFullError(t, s, id, 1, 2)

	_, err = s.release(ctx, id, first, "")
	rig.Must(t, err)
	wantFullError(t, s, id, 1, 1)
	r.WantCounts(t, id, 0, 1)
	r.WantInflight(t, id, second)
	status, err := s.release(ctx, id, first, "")
	rig.Must(t, err)
	if status != 0 {
		t.Errorf("the late release returned status %d", status)
	}
	if _, err = s.release(ctx, id, second, ""); err != nil {
		t.Fatal(err)
	}
	acquire(t, s, id, 1)
	wantFullError(t, s, id, 1, 1)
}

// A rejoining token removes a free one from the queue, so that every running pod is
// counted.
func TestHeartbeatTakesFreeToken(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 3)
	r.Do(t, "DEL", id.queueKey(), id.inflightKey())
	maintain(t, s, id, 3)
	r.WantCounts(t, id, 3, 0)
	if _, err := s.heartbeat(context.Background(), id, token, "", "", 0, 1); err != nil {
		t.Fatal(err)
	}
	r.WantCounts(t, id, 2, 1)
}

// When pods lower or raise the length, an admission never exceeds its own length.
func TestLengthChanges(t *testing.T) {
	r, s, id := newSemaphore(t)
	tokens := []string{acquire(t, s, id, 5), acquire(t, s, id, 5), acquire(t, s, id, 5)}
	r.WantCounts(t, id, 2, 3)

	wantFullError(t, s, id, 2, 3)
	r.WantCounts(t, id, 2, 3) // pods of length 5 may still come

	acquire(t, s, id, 4)
	wantFullError(t, s, id, 4, 4)
	wantFullError(t, s, id, 2, 4)

	for _, token := range tokens { // one token stays in flight
		_, err := s.release(context.Background(), id, token, "")
		rig.Must(t, err)
	}
	acquire(t, s, id, 2)
	wantFullError(t, s, id, 2, 2)
	r.WantCounts(t, id, 3, 2)

	r.ForgetLength(t, id) // as if no pod had asked for 5 for some minutes
	wantFullError(t, s, id, 2, 2)
	maintain(t, s, id, 2)
	r.WantCounts(t, id, 0, 2)
}

// Pods of one key that disagree about the length still make progress.
func TestDisagreementOnLength(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	errs := make(chan error, 20)
	for i := range 20 {
		wg.Go(func() {
			for range 10 {
				token, _, err := s.acquire(ctx, id, "", 20+i, limit{}, 10*time.Second)
				if err == nil {
					_, err = s.release(ctx, id, token, "")
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	if _, inflight, err := r.Counts(id); err != nil || inflight != 0 {
		t.Errorf("%d in flight, %v", inflight, err)
	}
}

func TestMaintainIsIdempotent(t *testing.T) {
	r, s, id := newSemaphore(t)
	for _, token := range []string{acquire(t, s, id, 5), acquire(t, s, id, 5)} {
		r.MakeStale(t, id, token)
	}
	acquire(t, s, id, 5) // takes a free token
	r.WantCounts(t, id, 2, 3)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if err := s.maintain(context.Background(), id, 5, true); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r.WantCounts(t, id, 4, 1)
}

func TestLargestLength(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, maxLength)
	r.WantCounts(t, id, 255, 1) // tokens are made in small portions, when needed
	for range 300 {
		acquire(t, s, id, maxLength)
	}
	if _, inflight, err := r.Counts(id); err != nil || inflight != 301 {
		t.Errorf("%d in flight, %v", inflight, err)
	}
}

// Each use renews the expiry of all keys. Without holders and waiters, keys expire within
// minutes.
func TestKeysExpire(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	var token string
	wantRenewed := func(use string, most int) {
		t.Helper()
		for _, key := range id.keys()[:scriptKeys-1] { // the history lives longer
			ttl, err := redis.Int(r.Do(t, "TTL", key), nil)
			rig.Must(t, err)
			if ttl != -2 && (ttl < most-60 || ttl > most) {
				t.Errorf("%s: %s has a time to live of %d", use, key, ttl)
			}
			r.Do(t, "EXPIRE", key, 100)
		}
	}
	acquire(t, s, id, 4)
	token = acquire(t, s, id, 4)
	wantRenewed("acquire", 86400)
	_, err := s.heartbeat(ctx, id, token, "", "", 0, 1)
	rig.Must(t, err)
	wantRenewed("heartbeat", 86400)
	_, err = s.release(ctx, id, token, "")
	rig.Must(t, err)
	wantRenewed("release", 86400)
	maintain(t, s, id, 4)
	wantRenewed("maintain", 86400)
	_, err = s.release(ctx, id, r.Inflight(t, id)[0], "")
	rig.Must(t, err)
	wantRenewed("the last release", 300)

	s.staleThreshold = 4 * 24 * time.Hour
	if got := s.timeToLive(); got != 40*86400 {
		t.Errorf("time to live with a stale threshold of four days is %d s", got)
	}
}

// Admissions take the lock only if there is something to repair.
func TestLockOnlyForRepair(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 3)
	s.locks.(*redlock).pools[0].Close() // from here on, locking fails
	acquire(t, s, id, 3)
	token := acquire(t, s, id, 3)
	wantFullError(t, s, id, 3, 3)

	r.MakeStale(t, id, token)
	_, _, err := s.acquire(context.Background(), id, "", 3, limit{}, 10*time.Second)
	if err == nil || !strings.Contains(err.Error(), "lock Redis "+r.Address) {
		t.Errorf("got %v, want an error about the unreachable lock server", err)
	}
}

// While another process has the lock, an admission waits; it is not refused.
func TestAdmissionWaitsForTheLock(t *testing.T) {
	r, s, id := newSemaphore(t)
	var unlock unlockFunc
	rig.Eventually(t, 10*time.Second, func() (err error) { // a slow Redis does not lend it at once
		unlock, err = s.locks.tryLock(context.Background(), id.lockKey(), 10*time.Second)
		return err
	})

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, _, err := s.acquire(ctx, id, "", 1, limit{}, 10*time.Second)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want the deadline exceeded", err)
	}
	done := make(chan error)
	go func() {
		_, _, err := s.acquire(context.Background(), id, "", 1, limit{}, 10*time.Second)
		done <- err
	}()
	rig.Must(t, unlock(context.Background()))
	rig.Must(t, <-done)
	r.WantCounts(t, id, 0, 1)
}

func TestWrongAnswersOfScripts(t *testing.T) {
	one := int64(1)
	for _, c := range []struct {
		status int
		rest   []any
	}{
		{7, nil},
		{acquireFull, nil},
		{acquireFull, []any{one, one}},
		{acquireFull, []any{one, one, one, one}},
		{acquireFull, []any{"x", one, one}},
		{acquireRepair, nil},
	} {
		if a, err := parseReply(c.status, c.rest); err == nil {
			t.Errorf("the malformed reply %d %v was parsed as %+v", c.status, c.rest, a)
		}
	}
}

// Concurrent admissions of one process share a repair, and so take the lock once.
func TestOneRepairPerProcess(t *testing.T) {
	r, s, id := newSemaphore(t)
	counted := &countingLocker{locker: s.locks}
	s.locks = counted
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if _, _, err := s.acquire(context.Background(), id, "", 100, limit{}, 10*time.Second); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r.WantCounts(t, id, 0, 100)
	if n := counted.tried.Load(); n > 5 {
		t.Errorf("%d attempts to take the lock, want at most 5", n)
	}
}

// places returns n requests for places that arrive a microsecond apart, the first at
// arrival.
func places(n int, arrival int64, length int) (all []placeRequest) {
	for i := range n {
		name := newPodName(fmt.Sprintf("pod-%d", i), "")
		all = append(all, placeRequest{uuid.NewString(), arrival + int64(i), 0, length, 1, name, waitEnd{}})
	}
	return all
}

func tokensOf(places []placeRequest) (tokens []string) {
	for _, p := range places {
		tokens = append(tokens, p.token)
	}
	return tokens
}

// Redis orders places by arrival, however often and in what order they are refreshed. The
// reply names all pods that are served, those of other gates too.
func TestRefreshPlaces(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	holder := acquire(t, s, id, 2)
	now := int64(r.Now(t)) * 1e6
	all := places(3*refreshMost/2, now-1e9, 2)   // in two commands
	waiter, _ := standInLine(t, r, s, id, false) // its arrival is later than all of these
	kept, err := s.refreshPlaces(t.Context(), id, 0, nil, all[1:])
	rig.Must(t, err)
	sixth := kept.joined[all[5].token]
	if kept.inUse != 1 || kept.waiters != len(all) || len(kept.joined) != len(all)-1 || sixth != 5 ||
		len(kept.held) > 0 {
		t.Errorf("%d in use, %d waiters, %d joined, the sixth at %d, held: %v",
			kept.inUse, kept.waiters, len(kept.joined), sixth, kept.held)
	}
	kept, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all)
	rig.Must(t, err)
	want := append(tokensOf(all), waiter)
	r.WantLine(t, id, want...)
	if len(kept.joined) != 1 || kept.joined[all[0].token] != 1 {
		t.Errorf("joined %v, want the first only", kept.joined)
	}
	if n := r.State(t, id, "lost"); n != 0 {
		t.Errorf("Redis took a new place for a loss of data at %d", n)
	}
	if names := r.Do(t, "HGET", id.namesKey(), all[3].token+"/pod"); fmt.Sprintf("%s", names) != "0 pod-3 " {
		t.Errorf("its pod is %q", names)
	}

	// Tokens of pods that are gone leave the line; others stay. A gone token that is in
	// flight is not given back.
	gone := append(tokensOf(all[1:refreshMost+10]), holder, uuid.NewString())
	_, err = s.refreshPlaces(t.Context(), id, kept.created, gone, all[:1])
	rig.Must(t, err)
	r.WantLine(t, id, append(append(tokensOf(all[:1]), tokensOf(all[refreshMost+10:])...), waiter)...)
	r.WantInflight(t, id, holder)
	_, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all)
	rig.Must(t, err)

	// The first in line is served with one free token, and the second when the holder
	// returns its token.
	maintain(t, s, id, 2)
	kept, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all[:1])
	rig.Must(t, err)
	if !slices.Equal(kept.served, []string{all[0].token}) {
		t.Errorf("served %v", kept.served)
	}
	giveBack(t, s, id, holder)
	kept, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all[:1])
	rig.Must(t, err)
	if !slices.Equal(kept.served, tokensOf(all[:2])) {
		t.Errorf("served %v", kept.served)
	}
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: all[0].token, length: 2, arrival: joinLine})
	if err != nil || a.status != acquireTaken {
		t.Fatalf("got %+v, %v, want the token", a, err)
	}
	kept, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all[:2])
	rig.Must(t, err)
	if !slices.Equal(kept.held, tokensOf(all[:1])) || len(kept.joined) > 0 {
		t.Errorf("held: %v, joined: %v", kept.held, kept.joined)
	}
}

// A client that remembers an older semaphore than Redis has reports a loss of data. Redis
// then refills nothing before the holders are back.
func TestRefreshPlacesReportsLoss(t *testing.T) {
	t.Parallel()
	r, s, _ := newSemaphoreOn(t, rig.StartRedis(t))
	for _, ago := range []int64{1000, -1} { // -1: as if created in this second
		id, all := freshID(), places(1, 1, 1)
		kept, err := s.refreshPlaces(t.Context(), id, int64(r.Now(t))-ago, nil, all)
		rig.Must(t, err)
		if n := r.State(t, id, "lost"); n == 0 || kept.created < int64(n)-1 {
			t.Errorf("lost at %d, created at %d", n, kept.created)
		}
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token: all[0].token, length: 1, arrival: joinLine})
		if err != nil || a.status != acquireFull || a.doubt == 0 {
			t.Errorf("got %+v, %v, want a place in line and a doubt", a, err)
		}
	}
}

// Refreshing tokens keeps those in flight, and adds none that are not.
func TestRefreshTokens(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	token, gone := acquire(t, s, id, 2), uuid.NewString()
	r.MakeStale(t, id, token)
	lost, err := s.refreshTokens(t.Context(), id, []heldTokens{{token, 1}, {gone, 1}})
	if err != nil || !slices.Equal(lost, []string{gone}) {
		t.Errorf("lost: %v, %v", lost, err)
	}
	r.WantInflight(t, id, token)
	maintain(t, s, id, 2)
	r.WantInflight(t, id, token)
}

// With the token, Redis stores the pod name that the webhook knows. The first heartbeat
// adds the name and node that the sidecar knows. It keeps the time since which the pod
// holds the token. Refusals name the holders.
func TestHoldersAreNamed(t *testing.T) {
	r, s, id := newSemaphore(t)
	w := startWebhook(t, testConfig(r.Address))
	token := w.wantAdmitted(t, id, 1)
	if r.WantPod(t, id, token, "web-67d4947b99- ") == "0" {
		t.Error("the admitted pod counts as a waiter")
	}
	since := fmt.Sprint(r.Now(t) - 14400)
	r.Do(t, "HSET", id.namesKey(), token+"/pod", since+" web-67d4947b99- ")
	if got, want := w.admit(t, rig.Review(t, id, 1)).Message,
		"1 of 1 tokens in use, by web-67d4947b99-... (4 h, not started yet)"; !strings.HasSuffix(got, want) {
		t.Errorf("refused with %q, want %q", got, want)
	}
	t.Setenv("POD_NAME", "web-67d4947b99-x2x9z")
	t.Setenv("NODE_NAME", "node-1")
	p := rig.StartSidecar(t, r.Address, id, token)
	if got := r.WantPod(t, id, token, "web-67d4947b99-x2x9z node-1"); got != since {
		t.Errorf("the pod holds the token since %s, want %s", got, since)
	}
	if got, want := w.admit(t, rig.Review(t, id, 1)).Message,
		"1 of 1 tokens in use, by web-67d4947b99-x2x9z (4 h)"; !strings.HasSuffix(got, want) {
		t.Errorf("refused with %q, want %q", got, want)
	}

	// Refusals name a holder without a pod name by its token.
	old := acquire(t, s, id, 2)
	if got := w.admit(t, rig.Review(t, id, 2)).Message; !strings.Contains(got, ", "+old) {
		t.Errorf("refused with %q, want %s in it", got, old)
	}
	giveBack(t, s, id, old)

	// After Redis has lost all data, the next heartbeat stores the name again.
	r.Do(t, "DEL", id.keys()...)
	p.WantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	if got := r.WantPod(t, id, token, "web-67d4947b99-x2x9z node-1"); got <= since {
		t.Errorf("the pod holds the token since %s, want later than %s", got, since)
	}

	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	if names := r.Pods(t, id); len(names) != 0 {
		t.Errorf("names of pods after the release: %v", names)
	}
}

// Redis stores the names of waiters. A waiter logs the holders; when it is served, Redis
// stores since when it holds its token.
func TestWaitersAreNamed(t *testing.T) {
	r, s, id := newSemaphore(t)
	holder, _, err := s.acquire(t.Context(), id, "web-a node-1", 1, limit{}, time.Second)
	rig.Must(t, err)
	t.Setenv("POD_NAME", "web-b")
	t.Setenv("NODE_NAME", "node-2")
	token := uuid.NewString()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	if since := r.WantPod(t, id, token, "web-b node-2"); since != "0" {
		t.Errorf("the waiter holds a token since %s", since)
	}
	prefix := "waiting for a token of " + id.String() + ": 1 of 1 in use, 1st in line, "
	if got := p.WantLogPrefix(t, prefix); !strings.Contains(got, "; in use by web-a (") {
		t.Errorf("the waiter logged %q, want the holder web-a in it", got)
	}
	giveBack(t, s, id, holder)
	p.WantLog(t, heldText)
	if since := r.WantPod(t, id, token, "web-b node-2"); since == "0" {
		t.Error("the holder counts as a waiter")
	}
	if names := r.Pods(t, id); len(names) != 1 {
		t.Errorf("names of pods: %v, want one", names)
	}
}

// A repair also deletes the names of all tokens that it reclaims, however many.
func TestReclaimDeletesNames(t *testing.T) {
	r, s, id := newSemaphore(t)
	const stale = 2500
	live, _, err := s.acquire(t.Context(), id, "live node-1", maxLength, limit{}, time.Second)
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
		t.Errorf("%d names are left; that of the live pod is %q", len(names), names[live])
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
	long := holder{name: strings.Repeat("a", 250), held: time.Second}
	for _, c := range []struct {
		holders []holder
		inUse   int
		want    string
	}{
		{nil, 0, ""},
		{nil, 3, ""},
		{[]holder{{"a", 4 * time.Hour, false, 1}}, 1, "by a (4 h)"},
		{[]holder{{"a", 4 * time.Hour, false, 1}, {"b-", 2 * time.Minute, true, 1}, {"c", heldUnknown, false, 1}}, 10,
			"by a (4 h), b-... (2 min, not started yet), c, and 7 more"},
		{[]holder{long, {"b", time.Second, false, 1}, long, {"c", time.Second, false, 1}}, 4,
			"by " + long.String() + ", b (1 s), and 2 more"},
	} {
		if got := byHolders(c.holders, c.inUse); got != c.want {
			t.Errorf("%v: got %q, want %q", c.holders, got, c.want)
		}
	}
}

func TestParseHolders(t *testing.T) {
	got, err := parseHolders([]any{int64(-1), []byte("token"), int64(0), int64(1), int64(5), []byte("a"), int64(1),
		int64(4), int64(9), []byte("b"), int64(0), int64(1)})
	if want := "[b (9 s) a (5 s, 4 tokens, not started yet) token]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("got %v, %v; want %s", got, err, want)
	}
	escape := []byte("\x1b[2J" + strings.Repeat("x", 1000))
	got, err = parseHolders([]any{int64(5), escape, int64(0), int64(1)})
	if err != nil || strings.Contains(got[0].name, "\x1b") || len(got[0].name) > 60 {
		t.Errorf("an unprintable or long name is not cleaned: %q, %v", got, err)
	}
	if _, err := parseHolders([]any{int64(5)}); err == nil {
		t.Error("a holder without a name is accepted")
	}
}

// A refusal names no holder while the free token is kept for the line.
func TestRefusedForTheLine(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	standInLine(t, r, s, id, false)
	giveBack(t, s, id, token)
	_, _, err := s.acquire(context.Background(), id, "", 1, limit{}, time.Second)
	var full *fullError
	want := fmt.Sprintf("no semaphore available: %s has 0 of 1 tokens in use; 1 waiting in line", id)
	if !errors.As(err, &full) || refusal(full) != want {
		t.Errorf("got %v, want the refusal %q", err, want)
	}
}

// releasesSoFar counts the releases that Redis has run for the webhook.
func (w *testWebhook) releasesSoFar(t *testing.T) int {
	t.Helper()
	return int(w.samples(t)[metricsPrefix+`script_duration_seconds_count{script="release"}`])
}

// An acquire whose own commands were all answered has nothing to give back, whatever
// happened to another. So its refusal delays no token that is really given back.
func TestRefusalsGiveNothingBack(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	p := rig.StartProxy(t, r.Address)
	w := startWebhook(t, testConfig(p.Address))
	s, full, id := w.semaphores, freshID(), freshID()
	w.wantAdmitted(t, full, 1)
	h := p.HoldFirst(t, acquireScript.made().Hash(), true)
	token := w.wantAdmitted(t, id, 1)
	<-h.Held
	for range 100 {
		wantFullError(t, s, full, 1, 1)
	}
	before := w.releasesSoFar(t)
	s.giveBack(id, token)
	if n := w.releasesSoFar(t) - before; n < 1 || n > 2 {
		t.Errorf("%d releases, want one or two of the token that was given back", n)
	}
	r.WantCounts(t, full, 0, 1)
}

// Releases that wait for the deadlines of stray commands delay no other.
func TestStrayCommandsDelayNoOtherRelease(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	const strays = maxReleases + 4
	var last string
	for range strays {
		last = uuid.NewString()
		s.noteStray(last, time.Now().Add(15*time.Second))
		s.giveBackLater(id, last)
	}
	s.giveBack(id, token)
	if deadline, _ := s.stray(last); !time.Now().Before(deadline) {
		t.Error("the release has waited for the deadline of another token's command")
	}
}

// unlucky is a locker that fails once, after something has happened.
type unlucky struct {
	locker
	event func()
	once  atomic.Bool
}

func (l *unlucky) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	if l.once.Swap(true) {
		return l.locker.tryLock(ctx, name, expiration)
	}
	l.event()
	return nil, errors.New("no answer")
}

// The connection of an acquire breaks while its command is on its way. The retry finds
// that a repair is needed. While this process repairs, another one does, and the first
// command takes the new token. The caller gives up: the token is given back.
func TestStrayAcquireDuringARepair(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	p := rig.StartProxy(t, r.Address)
	s, other, id := testSemaphores(t, p.Address), testSemaphores(t, r.Address), freshID()
	rig.Must(t, s.check(t.Context())) // it knows Redis's clock
	ctx, giveUp := context.WithCancel(t.Context())
	h := p.HoldFirst(t, acquireScript.made().Hash(), true)
	rig.Must(t, s.locks.close())
	s.locks = &unlucky{locker: other.locks, event: func() {
		maintain(t, other, id, 1)
		deliverHeld(t, r, h)
		r.WantCounts(t, id, 0, 1)
		giveUp()
		<-ctx.Done()
	}}
	if _, _, err := s.acquire(ctx, id, "", 1, limit{}, time.Second); err == nil {
		t.Fatal("the acquire has not given up")
	}
	r.WantCounts(t, id, 1, 0)
}

// Redis evicts the tokens in use of a semaphore, and nothing else. The first heartbeat
// proves the loss, and later ones do not report it again. A pod whose token was reclaimed
// or released proves nothing.
func TestLossOfInflight(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	ctx := t.Context()
	const length = 3
	var tokens []string
	for i := range length {
		token, _, err := s.acquire(ctx, id, newPodName(fmt.Sprintf("web-%d", i), "node"), length, limit{}, time.Second)
		rig.Must(t, err)
		tokens = append(tokens, token)
	}
	beat := func(i int) {
		t.Helper()
		rejoined, err := s.heartbeat(ctx, id, tokens[i], "", newPodName(fmt.Sprintf("web-%d", i), "node"), 0, 1)
		if err != nil || !rejoined {
			t.Fatalf("got %t, %v, want the token to be counted again", rejoined, err)
		}
	}
	r.MakeStale(t, id, tokens[0])
	maintain(t, s, id, length)
	beat(0)
	giveBack(t, s, id, tokens[1])
	beat(1)
	if lost := r.State(t, id, "lost"); lost != 0 {
		t.Fatalf("a loss was noticed at %d, and there was none", lost)
	}

	r.Do(t, "DEL", id.inflightKey())
	giveBack(t, s, id, acquire(t, s, id, length)) // Redis cannot know yet, and has free tokens now
	beat(0)
	lost := r.State(t, id, "lost")
	if lost == 0 {
		t.Error("the loss was not noticed")
	}
	for range length {
		wantFullError(t, s, id, length, 1)
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if r.Now(t) <= lost+1 {
			return errors.New("a second report would not show yet")
		}
		return nil
	})
	beat(1)
	beat(2)
	if again := r.State(t, id, "lost"); again != lost {
		t.Errorf("the loss at %d was noticed again at %d", lost, again)
	}
	r.WantInflight(t, id, tokens...)
	wantFullError(t, s, id, length, length)
}

// Redis learns for how long pods have their tokens, from releases and reclaims: of the last
// 64 pods whose sidecars had started.
func TestHolds(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	end := func(held int, pod podName, how func(token string)) holds {
		t.Helper()
		token, _, err := s.acquire(t.Context(), id, pod, 70, limit{}, time.Second)
		rig.Must(t, err)
		r.Do(t, "HSET", id.namesKey(), token+"/pod", fmt.Sprintf("%d %s", r.Now(t)-held, pod))
		how(token)
		d, err := s.inspect(t.Context(), id, detailMost)
		rig.Must(t, err)
		return d.holds
	}
	release := func(token string) { giveBack(t, s, id, token) }
	twice := func(token string) { release(token); release(token) }
	reclaim := func(token string) {
		r.MakeStale(t, id, token)
		rig.Must(t, s.maintain(t.Context(), id, 70, false))
	}
	end(40, "web-0 ", release) // its sidecar has not started
	end(60, "web-1 node", twice)
	end(0, "web-2 node", release)
	end(3600, "web-3 node", reclaim)
	got := end(1e9, "web-4 node", release)
	for i, want := range []int{1, 60, 3600, 32 * 86400} {
		if len(got) != 4 || math.Abs(math.Log(got[i].Seconds()/float64(want))) > 0.09 {
			t.Fatalf("got %v, want about 1 s, 60 s, 1 h and 32 days", got)
		}
	}
	var all []string
	for range 70 {
		all = append(all, acquire(t, s, id, 70))
	}
	for _, token := range all {
		r.Do(t, "HSET", id.namesKey(), token+"/pod", fmt.Sprintf("%d web node", r.Now(t)-10000))
		r.MakeStale(t, id, token)
	}
	if got := end(10000, "web-5 node", reclaim); len(got) != 64 || got[0] < 9000*time.Second || got[63] > 11000*time.Second {
		t.Errorf("after 71 pods that held for 10,000 s: got %d: %v", len(got), got)
	}
	r.Do(t, "HSET", id.stateKey(), "holds", strings.Repeat("\x01 ", 100))
	if got := end(10, "web-6 node", release); len(got) != 1 {
		t.Errorf("another client has written something else: got %v", got)
	}
}

// seedHolds makes Redis know holds of ten minutes, and a holder that has had its token for
// more than three. So another pod starts in 6 min, for 50 s to come.
func seedHolds(t *testing.T, r *rig.Redis, id semaphoreID, token string) {
	t.Helper()
	r.Do(t, "HSET", id.stateKey(), "holds", "IIIII")
	r.Do(t, "HSET", id.namesKey(), token+"/pod", fmt.Sprintf("%d web-1 node", r.Now(t)-190))
}

// Those that have to wait are told when they start, as far as that is known.
func TestForecastIsTold(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	seedHolds(t, r, id, holder)
	refused := func() string {
		t.Helper()
		_, _, err := s.acquire(t.Context(), id, "", 1, limit{}, time.Second)
		var full *fullError
		if !errors.As(err, &full) {
			t.Fatal(err)
		}
		return refusal(full)
	}
	if got := refused(); !strings.HasSuffix(got, "web-1 (3 min); the next free one is expected in about 6 min") {
		t.Errorf("a refusal: %q", got)
	}
	for i, want := range []string{", about 6 min to go; in use by web-1 (3 min)", ", about 16 min to go; "} {
		w := newWaiter(s, id, 1)
		_, a, err := w.acquireOnce(t.Context(), joinLine)
		rig.Must(t, err)
		if got := waitingText(id, 1, 1, waitEnd{}, a); !strings.Contains(got, want) {
			t.Errorf("waiter %d: %q, want %q in it", i, got, want)
		}
	}
	if got := refused(); !strings.HasSuffix(got, "; 2 waiting in line; the next free one is expected in about 26 min") {
		t.Errorf("a refusal behind a line: %q", got)
	}
	wantStatus(t, r, []string{id.String()}, "a pod holds its tokens for 10 min on average; nine of ten for at most 10 min",
		`LINE +WAITER +NODE +WAITS +STARTS +ASKED +LENGTH +TOKEN`, `1st .* in about 6 min .*`, `2nd .* in about 16 min .*`)
	d, err := s.inspect(t.Context(), id, detailMost)
	rig.Must(t, err)
	if report := d.report(); len(report.Line) != 2 || *report.Line[1].Starts < 900 || *report.Line[1].Starts > 1020 ||
		*report.HeldMean != 601.845 || *report.HeldNinth != 601.845 {
		t.Errorf("the report is %+v, and its line %+v", report, report.Line)
	}
	r.Do(t, "HSET", id.stateKey(), "holds", "IIII")
	if got := refused(); strings.Contains(got, "about") {
		t.Errorf("with four holds: %q", got)
	}
	if report, err := s.inspect(t.Context(), id, detailMost); err != nil || report.report().Line[0].Starts != nil {
		t.Errorf("with four holds: %+v, %v", report.line, err)
	}
}

// A forecast is right where all pods hold for the same time, and good where they do not: also
// where most of them are short.
func TestForecast(t *testing.T) {
	t.Parallel()
	minutes := func(all ...float64) (d []time.Duration) {
		for _, m := range all {
			d = append(d, time.Duration(m*float64(time.Minute)))
		}
		return d
	}
	same := holds(minutes(10, 10, 10, 10, 10))
	for name, c := range map[string]struct {
		holds                holds
		ages                 []time.Duration
		used, length, tokens int
		want                 float64 // minutes; -1: not known
	}{
		"next":                       {same, minutes(4), 1, 1, 1, 6},
		"third":                      {same, minutes(4), 1, 1, 3, 26},
		"of two":                     {same, minutes(4, 9), 2, 2, 1, 1},
		"of two, second":             {same, minutes(4, 9), 2, 2, 2, 6},
		"of two, fifth":              {same, minutes(4, 9), 2, 2, 5, 21},
		"two of four are known":      {same, minutes(4, 9), 4, 4, 3, 6},
		"more in use than may be":    {same, minutes(4, 9), 2, 1, 1, 6},
		"then one after the other":   {same, minutes(4, 9), 2, 1, 2, 14},
		"one is free":                {same, minutes(4), 1, 2, 1, -1},
		"one is free, two are asked": {same, minutes(4), 1, 2, 2, 6},
		"holds longer than all":      {same, minutes(30), 1, 1, 1, 15},
		"some are longer":            {minutes(1, 1, 1, 20, 40), minutes(10), 1, 1, 1, 10},
		"paused":                     {same, minutes(4), 1, 0, 1, -1},
		"few holds":                  {same[:4], minutes(4), 1, 1, 1, -1},
		"no age":                     {same, nil, 1, 1, 1, -1},
	} {
		got, ok := c.holds.forecast(usedTokens{ages: c.ages}, c.used).freeIn(c.length, c.tokens)
		if ok != (c.want >= 0) || ok && math.Abs(got.Minutes()-c.want) > c.want/20 {
			t.Errorf("%s: got %s, %t, want %.0f min", name, got, ok, c.want)
		}
	}
	heavy := []holder{{held: 4 * time.Minute, tokens: 2}, {held: 9 * time.Minute, tokens: 2}}
	o := occupancy{inUse: 4, length: 4, holders: heavy, holds: same}
	for position, want := range map[int]time.Duration{1: time.Minute, 2: 6 * time.Minute} {
		if got, ok := o.startsIn(position, 1); !ok || (got-want).Abs() > want/20 {
			t.Errorf("%d in line, where each pod has two of four tokens: got %s, %t, want %s", position, got, ok, want)
		}
	}
	if got := holds(minutes(1, 2, 3, 4, 5, 6, 7, 8, 9, 60)).ninth(); got != 9*time.Minute {
		t.Errorf("nine of ten hold for %s at most, want 9 min", got)
	}

	// Semaphores that have been busy for long, with holds of all kinds, by a fixed seed: half of
	// the forecasts are within 3/2.
	random := rand.New(rand.NewPCG(1, 2))
	var errs []float64
	for range 200 {
		length, waiting, spread := 1+random.IntN(8), 1+random.IntN(20), 2*random.Float64()
		var past holds
		var starts time.Duration
		begun, ends := make([]time.Duration, length), make([]time.Duration, length)
		startNext := func() { // a pod takes the token that comes free first
			i := slices.Index(ends, slices.Min(ends))
			past, starts, begun[i] = append(past, ends[i]-begun[i]), ends[i], ends[i]
			ends[i] += time.Duration(math.Exp(spread*random.NormFloat64()) * float64(time.Minute))
		}
		const now = 4000 * time.Minute
		for slices.Min(ends) < now {
			startNext()
		}
		var ages []time.Duration
		for _, at := range begun {
			ages = append(ages, now-at)
		}
		last := slices.Sorted(slices.Values(past[len(past)-holdsMost:]))
		for range waiting {
			startNext()
		}
		got, ok := holds(last).forecast(usedTokens{ages: ages}, length).freeIn(length, waiting)
		if !ok {
			t.Fatalf("no forecast from %d ages and %d holds", len(ages), len(last))
		}
		errs = append(errs, math.Abs(math.Log(got.Seconds()/(starts-now).Seconds())))
	}
	slices.Sort(errs)
	t.Logf("median error: a factor of %.2f; nine of ten: %.2f", math.Exp(errs[100]), math.Exp(errs[180]))
	if math.Exp(errs[100]) > 1.5 {
		t.Error("the median is too great")
	}
}
