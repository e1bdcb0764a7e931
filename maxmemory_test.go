package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// fill sets a limit below what Redis has in use; it refuses all that needs memory then. The function that is returned ends that.
func (s *redisServer) fill(t *testing.T) (empty func()) {
	t.Helper()
	s.do(t, "CONFIG", "SET", "maxmemory-policy", "noeviction")
	s.do(t, "CONFIG", "SET", "maxmemory", "1")
	if _, err := s.control.Do("SET", "x", "x"); err == nil || !strings.HasPrefix(err.Error(), "OOM") {
		t.Fatalf("got %v, want OOM", err)
	}
	return func() { s.do(t, "CONFIG", "SET", "maxmemory", "0") }
}

// lastBeat is the score of a token; zero if it is not in flight.
func (s *redisServer) lastBeat(t *testing.T, id semaphoreID, token string) int {
	t.Helper()
	score, err := redis.Int(s.control.Do("ZSCORE", id.inflightKey(), token))
	if err != nil && !errors.Is(err, redis.ErrNil) {
		t.Fatal(err)
	}
	return score
}

// While Redis is full, holders are counted, those too that have to be put back, and tokens are given back. Admissions fail, and say
// why.
func TestFullRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, startRedis(t))
	w := startWebhook(t, testConfig(r.address))
	var tokens []string
	var holders []*process
	for range 3 {
		token := acquire(t, s, id, 4)
		p := startSidecar(t, r.address, id, token)
		p.wantLog(t, heldText)
		tokens, holders = append(tokens, token), append(holders, p)
	}
	waiting := uuid.NewString() // holds its token already, but its app has not started
	inPod(t, waiting)
	waiter := startWaitingSidecar(t, r.address, id, waiting, 4)
	waiter.wantLog(t, heldText)
	tokens = append(tokens, waiting)

	empty := r.fill(t)
	r.do(t, "ZREM", id.inflightKey(), tokens[0])
	at := r.now(t)
	wantBeats := func(tokens ...string) {
		t.Helper()
		eventually(t, 10*time.Second, func() error {
			for _, token := range tokens {
				if last := r.lastBeat(t, id, token); last <= at+1 {
					return fmt.Errorf("the last heartbeat of %s was at %d, Redis was full at %d", token, last, at)
				}
			}
			return nil
		})
	}
	wantBeats(tokens...)
	holders[0].wantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	for _, id := range []semaphoreID{id, freshID()} {
		status, text, err := w.post(context.Background(), review(t, id, 5), "2s")
		if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, "OOM") {
			t.Errorf("%s: answered %d %s, %v", id, status, text, err)
		}
	}
	for _, p := range holders[:2] {
		p.signal(t, syscall.SIGTERM)
		p.wantExit(t, 0)
		p.wantLog(t, "token given back")
	}
	r.wantInflight(t, id, tokens[2:]...)
	at = r.now(t)
	wantBeats(tokens[2:]...)
	for _, p := range holders {
		if failed := p.log.lines(t, "heartbeat failed, to be retried"); len(failed) != 0 {
			t.Errorf("logged %v", failed)
		}
	}

	empty()
	w.wantAdmitted(t, id, 4)
	w.wantAdmitted(t, id, 4)
	w.wantFull(t, id, 4, 4)
	w.wantAdmitted(t, freshID(), 1)
}

// Waiters cannot ask while Redis is full, though heartbeats come: they keep their places, and what was given back meanwhile is theirs.
func TestLineOfAFullRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, startRedis(t))
	w := startWebhook(t, testConfig(r.address))
	token := acquire(t, s, id, 2)
	startSidecar(t, r.address, id, token).wantLog(t, heldText)
	gone := acquire(t, s, id, 2)
	first, firstDone := queueUp(t, context.Background(), s, id, 2, r)
	second, _ := queueUp(t, t.Context(), s, id, 2, r)
	third, _ := queueUp(t, t.Context(), s, id, 2, r)
	empty := r.fill(t)
	giveBack(t, s, id, gone)
	eventually(t, 30*time.Second, func() error { // waiters that do not ask for so long are gone
		asked, err := redis.Strings(r.do(t, "ZRANGE", id.seenKey(), -1, -1, "WITHSCORES"), nil)
		must(t, err)
		if now := fmt.Sprint(r.now(t) - 11); asked[1] > now {
			return fmt.Errorf("%v asked last, now it is %d", asked, r.now(t))
		}
		return nil
	})
	r.wantLine(t, id, first, second, third)
	empty()
	if a := w.admit(t, review(t, id, 2)); a.allowed {
		t.Error("a pod that does not wait took the token that was given back")
	}
	joined := queueLast(t, s, id, 2)
	wantDone(t, firstDone)
	r.wantInflight(t, id, token, first)
	eventually(t, 10*time.Second, func() error {
		if got := r.mustLine(t, id); !slices.Equal(got, []string{second, third, joined}) {
			return fmt.Errorf("in line are %v, want %v", got, []string{second, third, joined})
		}
		return nil
	})
}

// queueLast asks once for a place in line.
func queueLast(t *testing.T, s *semaphores, id semaphoreID, length int) (token string) {
	t.Helper()
	token = uuid.NewString()
	a, err := s.ask(context.Background(), id, question{token, length, joinLine, ""})
	must(t, err)
	if a.status != acquireFull {
		t.Fatalf("got %+v, want to stand in line", a)
	}
	return token
}
