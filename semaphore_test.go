package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
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
		t.Errorf("in flight are %v, handed out were %v", got, tokens)
	}
	wantFullError(t, s, id, 3, 3)
}

func TestReleaseReturnsATokenOnce(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 2)
	for attempt, want := range []int{releaseDone, 0, 0} {
		status, err := s.release(context.Background(), id, token)
		rig.Must(t, err)
		if status != want {
			t.Errorf("attempt %d: answered %d", attempt, status)
		}
	}
	r.WantCounts(t, id, 2, 0)
}

func TestHeartbeatScoresByServerClock(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	r.MakeStale(t, id, token)
	rejoined, err := s.heartbeat(context.Background(), id, token, "", 0)
	rig.Must(t, err)
	if rejoined {
		t.Error("a token in flight is said to have rejoined")
	}
	now, err := redis.Ints(r.Do(t, "TIME"), nil)
	rig.Must(t, err)
	score, err := redis.Int(r.Do(t, "ZSCORE", id.inflightKey(), token), nil)
	rig.Must(t, err)
	if now[0]-score > 5 || score > now[0] {
		t.Errorf("score is %d, the server's time %d", score, now[0])
	}
}

// A token that was reclaimed while its pod was paused has become a fresh one: neither the late heartbeat nor the
// late release of the first pod touches the second pod's.
func TestLateHeartbeatAndRelease(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	first := acquire(t, s, id, 1)
	r.MakeStale(t, id, first)
	second := acquire(t, s, id, 1)
	if first == second {
		t.Fatalf("token %s was handed out twice", first)
	}
	rejoined, err := s.heartbeat(ctx, id, first, "", 0)
	rig.Must(t, err)
	if !rejoined {
		t.Error("the late heartbeat did not rejoin")
	}
	r.WantCounts(t, id, 0, 2)
	wantFullError(t, s, id, 1, 2)

	_, err = s.release(ctx, id, first)
	rig.Must(t, err)
	wantFullError(t, s, id, 1, 1)
	r.WantCounts(t, id, 0, 1)
	r.WantInflight(t, id, second)
	status, err := s.release(ctx, id, first)
	rig.Must(t, err)
	if status != 0 {
		t.Errorf("the late release answered %d", status)
	}
	if _, err = s.release(ctx, id, second); err != nil {
		t.Fatal(err)
	}
	acquire(t, s, id, 1)
	wantFullError(t, s, id, 1, 1)
}

// A rejoining token takes a free one out of the queue: what runs is counted.
func TestHeartbeatTakesFreeToken(t *testing.T) {
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 3)
	r.Do(t, "DEL", id.queueKey(), id.inflightKey())
	maintain(t, s, id, 3)
	r.WantCounts(t, id, 3, 0)
	if _, err := s.heartbeat(context.Background(), id, token, "", 0); err != nil {
		t.Fatal(err)
	}
	r.WantCounts(t, id, 2, 1)
}

// Length lowered and raised: never more in use than the length of the admission at hand.
func TestLengthChanges(t *testing.T) {
	r, s, id := newSemaphore(t)
	tokens := []string{acquire(t, s, id, 5), acquire(t, s, id, 5), acquire(t, s, id, 5)}
	r.WantCounts(t, id, 2, 3)

	wantFullError(t, s, id, 2, 3)
	r.WantCounts(t, id, 2, 3) // those of length 5 may still come

	acquire(t, s, id, 4)
	wantFullError(t, s, id, 4, 4)
	wantFullError(t, s, id, 2, 4)

	for _, token := range tokens { // one is left
		_, err := s.release(context.Background(), id, token)
		rig.Must(t, err)
	}
	acquire(t, s, id, 2)
	wantFullError(t, s, id, 2, 2)
	r.WantCounts(t, id, 3, 2)

	r.ForgetLength(t, id) // nobody has asked for 5 for some minutes
	wantFullError(t, s, id, 2, 2)
	maintain(t, s, id, 2)
	r.WantCounts(t, id, 0, 2)
}

// Pods of one key that disagree about the length make progress all the same.
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
				token, _, err := s.acquire(ctx, id, "", 20+i, 10*time.Second)
				if err == nil {
					_, err = s.release(ctx, id, token)
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
	acquire(t, s, id, 5) // a free one
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
	r, s, id := newSemaphore(t)
	acquire(t, s, id, maxLength)
	r.WantCounts(t, id, 255, 1) // made in small portions, as they are needed
	for range 300 {
		acquire(t, s, id, maxLength)
	}
	if _, inflight, err := r.Counts(id); err != nil || inflight != 301 {
		t.Errorf("%d in flight, %v", inflight, err)
	}
}

// Any use renews the expiry of all keys, so that nothing stays for ever; without holders and waiters they stay for minutes.
func TestKeysExpire(t *testing.T) {
	r, s, id := newSemaphore(t)
	ctx := context.Background()
	var token string
	wantRenewed := func(use string, most int) {
		t.Helper()
		for _, key := range id.keys() {
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
	_, err := s.heartbeat(ctx, id, token, "", 0)
	rig.Must(t, err)
	wantRenewed("heartbeat", 86400)
	_, err = s.release(ctx, id, token)
	rig.Must(t, err)
	wantRenewed("release", 86400)
	maintain(t, s, id, 4)
	wantRenewed("maintain", 86400)
	_, err = s.release(ctx, id, r.Inflight(t, id)[0])
	rig.Must(t, err)
	wantRenewed("the last release", 300)

	s.staleThreshold = 4 * 24 * time.Hour
	if got := s.timeToLive(); got != 40*86400 {
		t.Errorf("time to live with a stale threshold of four days is %d s", got)
	}
}

// Once the lock is free and nothing is wrong, no lock is taken.
func TestLockOnlyForRepair(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 3)
	s.locks.(*redlock).pools[0].Close() // from here on, locking fails
	acquire(t, s, id, 3)
	token := acquire(t, s, id, 3)
	wantFullError(t, s, id, 3, 3)

	r.MakeStale(t, id, token)
	_, _, err := s.acquire(context.Background(), id, "", 3, 10*time.Second)
	if err == nil || !strings.Contains(err.Error(), "lock Redis "+r.Address) {
		t.Errorf("got %v, want the lock server out of reach", err)
	}
}

// While another maintains, an admission waits; it is never refused for it.
func TestWaitsForAnothersMaintenance(t *testing.T) {
	r, s, id := newSemaphore(t)
	unlock, err := s.locks.tryLock(context.Background(), id.lockKey(), 10*time.Second)
	rig.Must(t, err)

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, _, err = s.acquire(ctx, id, "", 1, 10*time.Second)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want the deadline exceeded", err)
	}
	done := make(chan error)
	go func() {
		_, _, err := s.acquire(context.Background(), id, "", 1, 10*time.Second)
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
	}{{7, nil}, {acquireFull, nil}, {acquireFull, []any{one, one}}, {acquireFull, []any{one, one, one, one}}, {acquireFull, []any{"x", one, one}}, {acquireRepair, nil}} {
		if a, err := parseReply(c.status, c.rest); err == nil {
			t.Errorf("%d %v was taken for %+v", c.status, c.rest, a)
		}
	}
}

// Many admissions of one process that find the same to be repaired take the lock once.
func TestOneRepairPerProcess(t *testing.T) {
	r, s, id := newSemaphore(t)
	counted := &countingLocker{locker: s.locks}
	s.locks = counted
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if _, _, err := s.acquire(context.Background(), id, "", 100, 10*time.Second); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r.WantCounts(t, id, 0, 100)
	if n := counted.tried.Load(); n > 5 {
		t.Errorf("the lock was tried %d times", n)
	}
}

// places are so many, a microsecond after the other, from an arrival on.
func places(n int, arrival int64, length int) (all []placeRequest) {
	for i := range n {
		all = append(all, placeRequest{uuid.NewString(), arrival + int64(i), length, newPodName(fmt.Sprintf("pod-%d", i), "")})
	}
	return all
}

func tokensOf(places []placeRequest) (tokens []string) {
	for _, p := range places {
		tokens = append(tokens, p.token)
	}
	return tokens
}

// Places are where the arrivals say, however often and in what order they are told; who is served is told, also of others.
func TestKeepPlaces(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	holder := acquire(t, s, id, 2)
	now := int64(r.Now(t)) * 1e6
	all := places(3*refreshMost/2, now-1e9, 2) // in two commands
	waiter, _ := stand(t, r, s, id, false)     // came later, as it counts
	kept, err := s.refreshPlaces(t.Context(), id, 0, nil, all[1:])
	rig.Must(t, err)
	if kept.inUse != 1 || kept.waiters != len(all) || len(kept.joined) != len(all)-1 || kept.joined[all[5].token] != 5 || len(kept.held) > 0 {
		t.Errorf("%d in use, %d waiters, %d joined, the sixth at %d, held %v", kept.inUse, kept.waiters, len(kept.joined), kept.joined[all[5].token], kept.held)
	}
	kept, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all)
	rig.Must(t, err)
	want := append(tokensOf(all), waiter)
	r.WantLine(t, id, want...)
	if len(kept.joined) != 1 || kept.joined[all[0].token] != 1 {
		t.Errorf("joined %v, want the first only", kept.joined)
	}
	if n := r.State(t, id, "lost"); n != 0 {
		t.Errorf("taken for a loss: %d", n)
	}
	if names := r.Do(t, "HGET", id.namesKey(), all[3].token+"/pod"); fmt.Sprintf("%s", names) != "0 pod-3 " {
		t.Errorf("its pod is %q", names)
	}

	// Those who are gone leave, and nobody else; a token that one of them has is not given back.
	_, err = s.refreshPlaces(t.Context(), id, kept.created, append(tokensOf(all[1:refreshMost+10]), holder, uuid.NewString()), all[:1])
	rig.Must(t, err)
	r.WantLine(t, id, append(append(tokensOf(all[:1]), tokensOf(all[refreshMost+10:])...), waiter)...)
	r.WantInflight(t, id, holder)
	_, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all)
	rig.Must(t, err)

	// One free token is for the first, the holder's too when it comes back.
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
	a, err := s.runAcquire(t.Context(), id, acquireRequest{all[0].token, 2, joinLine, ""})
	if err != nil || a.status != acquireTaken {
		t.Fatalf("got %+v, %v", a, err)
	}
	kept, err = s.refreshPlaces(t.Context(), id, kept.created, nil, all[:2])
	rig.Must(t, err)
	if !slices.Equal(kept.held, tokensOf(all[:1])) || len(kept.joined) > 0 {
		t.Errorf("held %v, joined %v", kept.held, kept.joined)
	}
}

// Who knows the semaphore for longer than Redis does tells of the loss: nothing is refilled before the holders are back.
func TestKeepTellsOfALoss(t *testing.T) {
	t.Parallel()
	r, s, _ := newSemaphoreOn(t, rig.StartRedis(t))
	for _, ago := range []int64{1000, -1} { // the latter as if in this very second
		id, all := freshID(), places(1, 1, 1)
		kept, err := s.refreshPlaces(t.Context(), id, int64(r.Now(t))-ago, nil, all)
		rig.Must(t, err)
		if n := r.State(t, id, "lost"); n == 0 || kept.created < int64(n)-1 {
			t.Errorf("lost is %d, created %d", n, kept.created)
		}
		if a, err := s.runAcquire(t.Context(), id, acquireRequest{all[0].token, 1, joinLine, ""}); err != nil || a.status != acquireFull || a.doubt == 0 {
			t.Errorf("got %+v, %v", a, err)
		}
	}
}

// What is held stays, and what is not there is not put back.
func TestHold(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	token, gone := acquire(t, s, id, 2), uuid.NewString()
	r.MakeStale(t, id, token)
	lost, err := s.refreshTokens(t.Context(), id, []string{token, gone})
	if err != nil || !slices.Equal(lost, []string{gone}) {
		t.Errorf("lost %v, %v", lost, err)
	}
	r.WantInflight(t, id, token)
	maintain(t, s, id, 2)
	r.WantInflight(t, id, token)
}

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
