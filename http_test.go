package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
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
// again". Small requests are served meanwhile. All use one connection.
func TestLargeRequestsWait(t *testing.T) {
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	w.wantAdmitted(t, id, maxLength)
	r.Pause(t)
	var mu sync.Mutex
	answers := map[int]int{}
	var wg sync.WaitGroup
	post := func(body []byte, timeout string, count map[int]int) {
		status, text, err := w.post(context.Background(), body, timeout)
		mu.Lock()
		defer mu.Unlock()
		if err != nil || status == http.StatusServiceUnavailable && !strings.Contains(text, "try again") {
			t.Errorf("got %d %s, %v", status, text, err)
		}
		count[status]++
	}
	for range maxLarge {
		wg.Go(func() { post(largeReview(t, id), "6s", answers) })
	}
	rig.Eventually(t, 5*time.Second, func() error {
		if n := len(w.bounds.large); n != maxLarge {
			return fmt.Errorf("%d large requests wait, want %d", n, maxLarge)
		}
		return nil
	})
	for range 6 {
		wg.Go(func() { post(largeReview(t, id), "3s", answers) })
	}
	small := map[int]int{}
	for range 20 {
		wg.Go(func() { post(rig.Review(t, freshID(), 0), "6s", small) }) // invalid annotations: needs no Redis
	}
	rig.Eventually(t, 3*time.Second, func() error {
		mu.Lock()
		defer mu.Unlock()
		if small[http.StatusOK] != 20 {
			return fmt.Errorf("small requests by status: %v, want 20 of 200", small)
		}
		return nil
	})
	wg.Wait()
	if answers[http.StatusInternalServerError] != maxLarge || answers[http.StatusServiceUnavailable] != 6 {
		t.Errorf("large requests by status: %v", answers)
	}
	r.Resume(t)
	if failed := w.scrape(t)[metricsPrefix+`admission_duration_seconds_count{verdict="failed"}`]; failed != maxLarge+6 {
		t.Errorf("the metrics count %v failed admissions, want %d", failed, maxLarge+6)
	}
	rig.Eventually(t, 20*time.Second, func() error {
		status, text, err := w.post(context.Background(), largeReview(t, id), "3s")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("got %d %s", status, text)
		}
		return err
	})
}

// A full set evicts only its oldest entry. An entry that has left is not evicted.
func TestEvictingSet(t *testing.T) {
	c := evictingSet{most: 2}
	evicted := make(chan int, 10)
	join := func(i int) func() { return c.add(0, func() { evicted <- i }) }
	join(1)
	leave := join(2)
	leave()
	leave()
	join(3)
	join(4)
	if i := <-evicted; i != 1 {
		t.Errorf("entry %d was evicted, want 1", i)
	}
	join(5)
	if i := <-evicted; i != 3 {
		t.Errorf("entry %d was evicted, want 3", i)
	}
	if len(evicted) != 0 || c.all.Len() != 2 {
		t.Errorf("%d entries are left, and %d more were evicted", c.all.Len(), len(evicted))
	}
}

// A set evicts its oldest entries until the bytes of a new one fit. Entries that left or
// were evicted count no bytes.
func TestEvictingSetOfBytes(t *testing.T) {
	c := evictingSet{most: 10, mostBytes: 100}
	evicted := make(chan int, 10)
	join := func(i, bytes int) func() { return c.add(bytes, func() { evicted <- i }) }
	leave := join(1, 60)
	join(2, 40)
	leave()
	leave()
	join(3, 60)
	if len(evicted) != 0 || c.bytes != 100 {
		t.Errorf("%d entries were evicted, and the set has %d bytes", len(evicted), c.bytes)
	}
	join(4, 70)
	if a, b := <-evicted, <-evicted; a+b != 5 || c.bytes != 70 || c.all.Len() != 1 {
		t.Errorf("entries %d and %d were evicted, and the set has %d bytes of %d entries", a, b, c.bytes, c.all.Len())
	}
}

// A new entry waits for a full set until the oldest entry has rested or left, or the time
// is up.
func TestEvictingSetWaitsForRoom(t *testing.T) {
	for name, test := range map[string]struct {
		meanwhile func(rejoin func())
		want      time.Duration
	}{
		"rests":        {func(func()) {}, restTime - 300*time.Millisecond},
		"used again":   {func(rejoin func()) { time.Sleep(200 * time.Millisecond); rejoin() }, restTime},
		"already idle": {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := evictingSet{most: 1}
				leave := c.add(0, func() {})
				if test.meanwhile == nil {
					time.Sleep(restTime)
				} else {
					time.Sleep(300 * time.Millisecond)
					go test.meanwhile(func() { leave(); leave = c.add(0, func() {}) })
				}
				start := time.Now()
				c.waitForRoom(t.Context())
				if took := time.Since(start); took != test.want {
					t.Errorf("waited for %s, want %s", took, test.want)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		c := evictingSet{most: 1}
		leave := c.add(0, func() {})
		leave()
		start := time.Now()
		c.waitForRoom(t.Context())
		c.add(0, func() {})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		c.waitForRoom(ctx)
		if took := time.Since(start); took != 10*time.Millisecond {
			t.Errorf("waited for %s in total, want 0 with room and 10ms without", took)
		}
	})
}

// An admission that waited for its connection is still answered in time.
func TestAnswerInTimeAfterWaiting(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // no Redis: the webhook retries until the deadline
	w.bounds.authenticated.most = 1
	defer w.bounds.authenticated.add(0, func() {})()
	start := time.Now()
	status, text, err := w.post(context.Background(), rig.Review(t, freshID(), 1), "3s")
	took := time.Since(start)
	if err != nil || status != http.StatusInternalServerError || took < restTime/2 {
		t.Errorf("got %d %q, %v, after %s", status, text, err, took)
	}
	rig.WantWithin(t, took, 3*time.Second, "the answer to an API server that waits for 3 s")
}
