package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// What happened is no longer known: the list tells it, deletions too.
func TestKubernetesExpired(t *testing.T) {
	t.Parallel()
	for name, expire := range map[string]func(*rig.APIServer){
		"event":  func(s *rig.APIServer) { s.ExpireWatches() },
		"status": func(s *rig.APIServer) { s.FailWatches(1, http.StatusGone) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.NewNamespace(t)
			s.CreatePod(t, n, rig.GatedPod("old"))
			s.CreatePod(t, n, rig.GatedPod("gone"))
			s.CreatePod(t, n, rig.GatedPod("early"))
			k := startWatching(t, clientSettings(s), n)
			k.want(t, 1, "early", "gone", "old")
			s.WantWatches(t, 1)
			s.DeletePod(t, n, "early") // which no list tells again
			k.want(t, 1, "gone", "old")
			s.FailWatches(1000, http.StatusInternalServerError)
			s.DropWatches()
			s.WantWatches(t, 0)
			s.DeletePod(t, n, "gone")
			s.CreatePod(t, n, rig.GatedPod("new"))
			again := s.CreatePod(t, n, rig.GatedPod("gone")) // another one
			expire(s)
			k.want(t, 2, "gone", "new", "old")
			if got := k.get("gone").uid; got != string(again.UID) {
				t.Errorf("the UID of the pod is %s, not that of the new one", got)
			}
			if !slices.Equal(k.drops, []string{"early", "gone"}) {
				t.Errorf("told of the end of %q", k.drops)
			}
			s.DeletePod(t, n, "gone")
			k.want(t, 2, "new", "old")
		})
	}
}

// A list that takes too long begins anew, and forgets nothing that it has told.
func TestKubernetesExpiredList(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	for i := range 5 {
		s.CreatePod(t, n, rig.GatedPod(fmt.Sprintf("p%d", i)))
	}
	expired := sync.OnceFunc(func() { s.DeletePod(t, n, "p0") })
	var refused bool
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("continue") == "" || refused {
			return false
		}
		refused = true
		expired()
		if s.Store != nil {
			s.Store.Compact()
			return false
		}
		rig.Respond(w, 0, nil, rig.Failure(http.StatusGone, "Expired", "The provided continue parameter is too old to display a consistent list result."))
		return true
	})
	k := startWatching(t, clientSettings(s), n, func(k *kubernetes) { k.bounds.page = 2 })
	k.want(t, 1, "p1", "p2", "p3", "p4")
	if !slices.Equal(k.drops, []string{"p0"}) {
		t.Errorf("told of the end of %q", k.drops)
	}
}

// A bookmark is as good as an event: what others do does not make a watch too old.
func TestKubernetesBookmarks(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	if s.Store == nil {
		t.Skip("they take a minute there")
	}
	n := s.NewNamespace(t)
	s.CreatePod(t, n, rig.GatedPod("p"))
	other := rig.GatedPod("other")
	delete(other.Labels, rig.LabelGated)
	s.CreatePod(t, n, other)
	k := startWatching(t, clientSettings(s), n, func(k *kubernetes) { k.bounds.silence = time.Second })
	k.want(t, 1, "p")
	s.SetLabel(t, n, "other", "example.org/changed", "yes")
	before, _ := s.Store.Get(n, "other")
	s.Store.WantBookmark(t, before.ResourceVersion)
	s.Store.Compact()
	s.DropWatches()
	s.CreatePod(t, n, rig.GatedPod("q"))
	k.want(t, 1, "p", "q")
	if got := s.Count(isWatched); got != 2 {
		t.Errorf("%d watches: it was given up although there were bookmarks", got)
	}
}

// Whatever fails at once is tried again, less and less often.
func TestKubernetesBacksOff(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]rig.APIFault{
		"refused": func(w http.ResponseWriter, _ *http.Request) bool {
			rig.Respond(w, 0, nil, rig.Failure(http.StatusInternalServerError, "InternalError", "etcdserver: no leader"))
			return true
		},
		"forbidden": func(w http.ResponseWriter, _ *http.Request) bool {
			rig.Respond(w, 0, nil, rig.Failure(http.StatusForbidden, "Forbidden", "pods is forbidden"))
			return true
		},
		"nonsense":  func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, `{"items": 3}`); return true },
		"hangs up":  func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
		"no events": func(_ http.ResponseWriter, r *http.Request) bool { return rig.IsWatch(r) },
		"too old": func(w http.ResponseWriter, r *http.Request) bool {
			if rig.IsWatch(r) {
				rig.Respond(w, 0, nil, rig.Failure(http.StatusGone, "Expired", "too old resource version"))
			}
			return rig.IsWatch(r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.NewNamespace(t)
			var mu sync.Mutex
			var first, fifth time.Time
			attempts := 0
			s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
				mu.Lock()
				if rig.IsWatch(r) || name != "no events" && name != "too old" {
					if attempts++; attempts == 1 {
						first = time.Now()
					} else if attempts == 5 {
						fifth = time.Now()
					}
				}
				mu.Unlock()
				return fault(w, r)
			})
			k := startWatching(t, clientSettings(s), n)
			rig.Eventually(t, 30*time.Second, func() error {
				mu.Lock()
				defer mu.Unlock()
				if fifth.IsZero() {
					return fmt.Errorf("%d attempts", attempts)
				}
				return nil
			})
			// The waits are of 0.2, 0.4, 0.8 and 1.6 s, and half of it at least.
			if took := fifth.Sub(first); took < 1500*time.Millisecond {
				t.Errorf("five attempts in %s", took)
			}
			if got := len(k.log.Lines(t, "watch of pods ended, tries again")); got != 1 && name != "no events" {
				t.Errorf("%d lines of log, want one a minute", got)
			}
			s.Fail(nil)
			s.CreatePod(t, n, rig.GatedPod("p"))
			rig.Eventually(t, 30*time.Second, func() error {
				if k.get("p") == nil {
					return errors.New("not told of the pod")
				}
				return nil
			})
		})
	}
}

// The API server says when to come back.
func TestKubernetesRetryAfter(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	s.CreatePod(t, n, rig.GatedPod("p"))
	refused := make(chan time.Time, 1)
	var again time.Time
	s.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case refused <- time.Now():
			w.Header().Set("Retry-After", "2")
			rig.Respond(w, 0, nil, rig.Failure(http.StatusTooManyRequests, "TooManyRequests", "the server has received too many requests"))
			return true
		default:
			if again.IsZero() {
				again = time.Now()
			}
			return false
		}
	})
	k := startWatching(t, clientSettings(s), n)
	k.want(t, 1, "p")
	if took := again.Sub(<-refused); took < 2*time.Second {
		t.Errorf("came back after %s", took)
	}
}
