package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// What happened is no longer known: the list tells it, deletions too.
func TestKubernetesExpired(t *testing.T) {
	t.Parallel()
	for name, expire := range map[string]func(*apiServer){
		"event":  func(s *apiServer) { s.expireWatches() },
		"status": func(s *apiServer) { s.failWatches(1, http.StatusGone) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.namespace(t)
			s.createPod(t, n, testGatedPod("old"))
			s.createPod(t, n, testGatedPod("gone"))
			s.createPod(t, n, testGatedPod("early"))
			k := startWatching(t, s.settings, n)
			k.want(t, 1, "early", "gone", "old")
			s.wantWatches(t, 1)
			s.deletePod(t, n, "early") // which no list tells again
			k.want(t, 1, "gone", "old")
			s.failWatches(1000, http.StatusInternalServerError)
			s.dropWatches()
			s.wantWatches(t, 0)
			s.deletePod(t, n, "gone")
			s.createPod(t, n, testGatedPod("new"))
			again := s.createPod(t, n, testGatedPod("gone")) // another one
			expire(s)
			k.want(t, 2, "gone", "new", "old")
			if got := k.get("gone").uid; got != string(again.UID) {
				t.Errorf("the UID of the pod is %s, not that of the new one", got)
			}
			if !slices.Equal(k.drops, []string{"early", "gone"}) {
				t.Errorf("told of the end of %q", k.drops)
			}
			s.deletePod(t, n, "gone")
			k.want(t, 2, "new", "old")
		})
	}
}

// A list that takes too long begins anew, and forgets nothing that it has told.
func TestKubernetesExpiredList(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	n := s.namespace(t)
	for i := range 5 {
		s.createPod(t, n, testGatedPod(fmt.Sprintf("p%d", i)))
	}
	expired := sync.OnceFunc(func() { s.deletePod(t, n, "p0") })
	var refused bool
	s.fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("continue") == "" || refused {
			return false
		}
		refused = true
		expired()
		if s.store != nil {
			s.store.compact()
			return false
		}
		respond(w, 0, nil, failure(http.StatusGone, "Expired", "The provided continue parameter is too old to display a consistent list result."))
		return true
	})
	k := startWatching(t, s.settings, n, func(k *kubernetes) { k.bounds.page = 2 })
	k.want(t, 1, "p1", "p2", "p3", "p4")
	if !slices.Equal(k.drops, []string{"p0"}) {
		t.Errorf("told of the end of %q", k.drops)
	}
}

// A bookmark is as good as an event: what others do does not make a watch too old.
func TestKubernetesBookmarks(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	if s.store == nil {
		t.Skip("they take a minute there")
	}
	n := s.namespace(t)
	s.createPod(t, n, testGatedPod("p"))
	other := testGatedPod("other")
	delete(other.Labels, testLabel)
	s.createPod(t, n, other)
	k := startWatching(t, s.settings, n, func(k *kubernetes) { k.bounds.silence = time.Second })
	k.want(t, 1, "p")
	s.label(t, n, "other", "example.org/changed", "yes")
	before, _ := s.store.get(n, "other")
	s.store.wantBookmark(t, before.ResourceVersion)
	s.store.compact()
	s.dropWatches()
	s.createPod(t, n, testGatedPod("q"))
	k.want(t, 1, "p", "q")
	if got := s.count(isWatched); got != 2 {
		t.Errorf("%d watches: it was given up although there were bookmarks", got)
	}
}

// Whatever fails at once is tried again, less and less often.
func TestKubernetesBacksOff(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]apiFault{
		"refused": func(w http.ResponseWriter, _ *http.Request) bool {
			respond(w, 0, nil, failure(http.StatusInternalServerError, "InternalError", "etcdserver: no leader"))
			return true
		},
		"forbidden": func(w http.ResponseWriter, _ *http.Request) bool {
			respond(w, 0, nil, failure(http.StatusForbidden, "Forbidden", "pods is forbidden"))
			return true
		},
		"nonsense":  func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, `{"items": 3}`); return true },
		"hangs up":  func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
		"no events": func(_ http.ResponseWriter, r *http.Request) bool { return isWatch(r) },
		"too old": func(w http.ResponseWriter, r *http.Request) bool {
			if isWatch(r) {
				respond(w, 0, nil, failure(http.StatusGone, "Expired", "too old resource version"))
			}
			return isWatch(r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t)
			n := s.namespace(t)
			var mu sync.Mutex
			var first, fifth time.Time
			attempts := 0
			s.fail(func(w http.ResponseWriter, r *http.Request) bool {
				mu.Lock()
				if isWatch(r) || name != "no events" && name != "too old" {
					if attempts++; attempts == 1 {
						first = time.Now()
					} else if attempts == 5 {
						fifth = time.Now()
					}
				}
				mu.Unlock()
				return fault(w, r)
			})
			k := startWatching(t, s.settings, n)
			eventually(t, 30*time.Second, func() error {
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
			if got := len(k.log.lines(t, "watch of pods ended, tries again")); got != 1 && name != "no events" {
				t.Errorf("%d lines of log, want one a minute", got)
			}
			s.fail(nil)
			s.createPod(t, n, testGatedPod("p"))
			eventually(t, 30*time.Second, func() error {
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
	n := s.namespace(t)
	s.createPod(t, n, testGatedPod("p"))
	refused := make(chan time.Time, 1)
	var again time.Time
	s.fail(func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case refused <- time.Now():
			w.Header().Set("Retry-After", "2")
			respond(w, 0, nil, failure(http.StatusTooManyRequests, "TooManyRequests", "the server has received too many requests"))
			return true
		default:
			if again.IsZero() {
				again = time.Now()
			}
			return false
		}
	})
	k := startWatching(t, s.settings, n)
	k.want(t, 1, "p")
	if took := again.Sub(<-refused); took < 2*time.Second {
		t.Errorf("came back after %s", took)
	}
}
