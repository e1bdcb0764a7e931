package main

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

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
