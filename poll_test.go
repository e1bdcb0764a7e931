package main

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// seedLine makes a semaphore with so many free tokens and so many in line, of whom nothing was heard for a while. It returns those
// in line.
func seedLine(t *testing.T, r *rig.Redis, s *semaphores, id semaphoreID, free, waiting int, silent time.Duration) []string {
	t.Helper()
	giveBack(t, s, id, acquire(t, s, id, maxLength))
	r.Do(t, "DEL", id.queueKey())
	now, err := redis.Ints(r.Do(t, "TIME"), nil)
	rig.Must(t, err)
	items := make([]any, 0, free+1)
	for range free {
		items = append(items, "free")
	}
	r.Do(t, "RPUSH", append([]any{id.queueKey()}, items...)...)
	var tokens []string
	waiters, seen, names := []any{id.waitersKey()}, []any{id.seenKey()}, []any{id.namesKey()}
	for i := range waiting {
		token := uuid.NewString()
		tokens = append(tokens, token)
		waiters = append(waiters, now[0]*1_000_000-waiting+i, token)
		seen = append(seen, now[0]-seconds(silent), token)
		names = append(names, token, maxLength)
	}
	r.Do(t, "ZADD", waiters...)
	r.Do(t, "ZADD", seen...)
	r.Do(t, "HSET", names...)
	return tokens
}

// asker does to a semaphore with a line what is measured.
type asker struct {
	r  *rig.Redis
	s  *semaphores
	id semaphoreID
}

// at is the token of the one at a place in line: 0 for the first, -1 for the last.
func (a asker) at(t *testing.T, place int) string {
	t.Helper()
	tokens, err := redis.Strings(a.r.Do(t, "ZRANGE", a.id.waitersKey(), place, place), nil)
	rig.Must(t, err)
	return tokens[0]
}

// poll asks for the one at a place in line.
func (a asker) poll(t *testing.T, place int) {
	t.Helper()
	token := a.at(t, place)
	arrival, err := redis.String(a.r.Do(t, "ZSCORE", a.id.waitersKey(), token), nil)
	rig.Must(t, err)
	a.ask(t, token, arrival)
}

func (a asker) ask(t *testing.T, token, arrival string) {
	t.Helper()
	_, err := a.s.runAcquire(t.Context(), a.id, acquireRequest{token, maxLength, arrival, ""})
	rig.Must(t, err)
}

// Whatever is asked costs the same in a line of ten and in one of ten thousand: nobody calls all for whom a token is free, nor drops
// all that are gone.
func TestCostOfALongLine(t *testing.T) {
	t.Parallel()
	const free, short, long, rounds = 5_000, 10, 10_000, 7
	r, s, _ := newSemaphoreOn(t, rig.StartRedis(t))
	for _, line := range []struct {
		name          string
		silent        time.Duration
		called, ratio int
	}{
		{"alive", 0, 16 + 1, 20}, // the one that asks hears, too, whether it can be called
		{"gone", 15 * time.Second, 16 + 1, 60},
	} {
		many := asker{r, s, freshID()}
		seedLine(t, r, s, many.id, free, long, line.silent)
		for _, c := range []struct {
			name string
			do   func(t *testing.T, a asker)
		}{
			{"the last polls", func(t *testing.T, a asker) { a.poll(t, -1) }},
			{"the fifth polls", func(t *testing.T, a asker) { a.poll(t, 4) }},
			{"the first takes its token", func(t *testing.T, a asker) { a.poll(t, 0) }},
			{"another joins", func(t *testing.T, a asker) { a.ask(t, uuid.NewString(), joinLine) }},
			{"an admission", func(t *testing.T, a asker) { a.ask(t, uuid.NewString(), "") }},
			{"the last leaves", func(t *testing.T, a asker) { giveBack(t, s, a.id, a.at(t, -1)) }},
			{"a repair", func(t *testing.T, a asker) { maintain(t, s, a.id, maxLength) }},
			{"a holder comes back late", func(t *testing.T, a asker) {
				_, err := s.heartbeat(context.Background(), a.id, uuid.NewString(), "", 0)
				rig.Must(t, err)
			}},
		} {
			t.Run(c.name+", those in line are "+line.name, func(t *testing.T) {
				var few, lots, published []int
				for range rounds { // in turn, so that what disturbs one disturbs the other
					a := asker{r, s, freshID()}
					seedLine(t, r, s, a.id, short/2, short, line.silent)
					few = append(few, costDuring(t, r, func() { c.do(t, a) }).micros)

					r.AllUnseen(t, many.id, line.silent)
					cost := costDuring(t, r, func() { c.do(t, many) })
					lots = append(lots, cost.micros)
					published = append(published, cost.published)
				}
				if n := median(published); n > line.called { // Sentinels publish now and then, too
					t.Errorf("published %d times", n)
				}
				t.Logf("%d µs with %d in line, %d µs with %d", median(few), short, median(lots), long)
				if median(lots) > line.ratio*median(few) {
					t.Errorf("%d µs with %d in line, %d µs with %d", median(few), short, median(lots), long)
				}
			})
		}
	}
}

// All for whom a token is free get it all the same, in their order: each that takes its token calls the next.
func TestLongLineIsServedInAChain(t *testing.T) {
	t.Parallel()
	const free, waiting = 300, 600
	r, s, id := newSemaphore(t)
	tokens := seedLine(t, r, s, id, free, waiting, 0)
	conn, err := dialRedis(t.Context(), r.Address, redisSettings{}, time.Minute)
	rig.Must(t, err)
	defer conn.Close()
	calls := redis.PubSubConn{Conn: conn}
	rig.Must(t, calls.PSubscribe(strings.NewReplacer("{", `\{`, "}", `\}`).Replace(id.channel("*")))) // as all those in line
	if _, ok := calls.Receive().(redis.Subscription); !ok {
		t.Fatal("not subscribed")
	}

	a, err := s.runAcquire(t.Context(), id, acquireRequest{uuid.NewString(), maxLength, joinLine, ""}) // calls the first
	rig.Must(t, err)
	if a.status != acquireFull || a.place.position != waiting+1 {
		t.Fatalf("got %+v, want to be the last", a)
	}
	var served []string
	holds := map[string]bool{}
	for len(served) < free {
		m, ok := calls.ReceiveWithTimeout(10 * time.Second).(redis.Message)
		if !ok {
			t.Fatalf("%d were called", len(served))
		}
		token := strings.TrimPrefix(m.Channel, id.channel(""))
		if string(m.Data) != yourTurn || holds[token] { // called by several that took theirs
			continue
		}
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token, maxLength, joinLine, ""})
		rig.Must(t, err)
		if a.status != acquireTaken {
			t.Fatalf("number %d was called, and got %+v", len(served)+1, a)
		}
		holds[token] = true
		served = append(served, token)
		if len(served)%20 == 0 { // they ask in time
			r.AllUnseen(t, id, 0)
		}
	}
	if !slices.Equal(served, tokens[:free]) {
		t.Error("not served in order")
	}
	r.WantCounts(t, id, 0, free)
	if got := r.MustLine(t, id); len(got) != waiting-free+1 || !slices.Equal(got[:len(got)-1], tokens[free:]) {
		t.Error("those behind have lost their places")
	}
}
