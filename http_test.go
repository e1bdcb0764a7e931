package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// largeReview is a review of more than smallBody bytes.
func largeReview(t *testing.T, id semaphoreID) []byte {
	t.Helper()
	return rig.Review(t, id, maxLength, func(r map[string]any) {
		rig.AnnotationsOf(r)["large"] = strings.Repeat("x", 2*smallBody)
	})
}

// A pod that etcd accepts fits into a review, even if JSON escapes all of its text.
func TestReviewOfTheLargestPod(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	a := w.admit(t, rig.Review(t, freshID(), 1, whenFull(whenFullWait), func(request map[string]any) {
		request["dryRun"] = true
		spec := request["object"].(map[string]any)["spec"].(map[string]any)
		container := spec["containers"].([]any)[0].(map[string]any)
		container["env"] = []any{map[string]any{"name": "A", "value": strings.Repeat("<&>", (1536<<10)/3)}}
	}))
	if !a.Allowed || a.Patch == nil {
		t.Errorf("got %d %s", a.Code, a.Message)
	}
}

// While Redis hangs, large requests wait up to a cap; further ones get 503 and "try
// again". Small requests are served meanwhile.
func TestLargeRequestsWait(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	w.wantAdmitted(t, id, maxLength)
	r.Pause(t)
	want := func(body []byte, timeout string, status int, text string) {
		got, answer, err := w.post(context.Background(), body, timeout)
		if err != nil || got != status || !strings.Contains(answer, text) {
			t.Errorf("got %d %s, %v, want %d %s", got, answer, err, status, text)
		}
	}
	var wg sync.WaitGroup
	for range maxLarge {
		wg.Go(func() { want(largeReview(t, id), "30s", http.StatusOK, "") })
	}
	rig.Eventually(t, 5*time.Second, func() error {
		if n := len(w.bounds.large); n != maxLarge {
			return fmt.Errorf("%d large requests wait, want %d", n, maxLarge)
		}
		return nil
	})
	var late sync.WaitGroup
	for range 6 {
		late.Go(func() { want(largeReview(t, id), "1s", http.StatusServiceUnavailable, "try again") })
		late.Go(func() { want(rig.Review(t, freshID(), 0), "10s", http.StatusOK, "422") }) // needs no Redis
	}
	late.Wait()
	r.Resume(t)
	wg.Wait()
	if failed := w.scrape(t)[metricsPrefix+`admission_duration_seconds_count{verdict="failed"}`]; failed != 6 {
		t.Errorf("the metrics count %v failed admissions, want 6", failed)
	}
	want(largeReview(t, id), "30s", http.StatusOK, "")
}

// fakeConn is a connection that tells of its end.
type fakeConn struct {
	net.Conn
	closed chan struct{}
}

func (c *fakeConn) Close() error { close(c.closed); return nil }

// opened opens connections of clients without a request.
func (b *bounds) opened(n int) (all []*fakeConn) {
	for range n {
		c := &fakeConn{closed: make(chan struct{})}
		b.note(c, http.StateNew)
		all = append(all, c)
	}
	return all
}

// call begins an authenticated request.
func (b *bounds) call(c *fakeConn) error {
	b.note(c, http.StateActive)
	r := new(http.Request)
	return b.authenticated(r.WithContext(context.WithValue(context.Background(), connectionKey{}, net.Conn(c))))
}

// wantEnded checks which connection was closed for a newer one: the only one of all.
func wantEnded(t *testing.T, all []*fakeConn, want int) {
	t.Helper()
	<-all[want].closed
	for i, c := range all {
		select {
		case <-c.closed:
			if i != want {
				t.Errorf("connection %d was closed, want only %d", i, want)
			}
		default:
		}
	}
}

// Beyond the cap, the oldest stranger is closed, and no caller.
func TestTooManyStrangers(t *testing.T) {
	b := newBounds()
	caller := b.opened(1)
	rig.Must(t, b.call(caller[0]))
	b.note(caller[0], http.StateIdle)
	strangers := b.opened(maxStrangers)
	b.note(strangers[0], http.StateClosed)
	all := append(append(caller, strangers[1:]...), b.opened(2)...)
	wantEnded(t, all, 1)
	b.note(all[1], http.StateClosed)
	if n := b.open(); n != maxStrangers+1 {
		t.Errorf("%d connections are open, want %d", n, maxStrangers+1)
	}
}

// Beyond the cap, the caller that was idle longest is closed. If all are busy, the new
// one is refused.
func TestTooManyCallers(t *testing.T) {
	b := newBounds()
	var all []*fakeConn
	for range maxCallers {
		c := b.opened(1)[0]
		rig.Must(t, b.call(c))
		all = append(all, c)
	}
	late := b.opened(1)[0]
	var wrong *badRequest
	if err := b.call(late); !errors.As(err, &wrong) || wrong.status != http.StatusServiceUnavailable {
		t.Errorf("all are busy: got %v, want 503", err)
	}
	for _, i := range []int{5, 3, 4} {
		b.note(all[i], http.StateIdle)
	}
	rig.Must(t, b.call(all[5])) // used again
	rig.Must(t, b.call(late))
	wantEnded(t, append(all, late), 3)
}
