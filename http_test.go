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

// largeReview is a review of more than smallBody.
func largeReview(t *testing.T, id semaphoreID) []byte {
	t.Helper()
	return rig.Review(t, id, maxLength, func(r map[string]any) {
		r["object"].(map[string]any)["metadata"].(map[string]any)["annotations"].(map[string]any)["large"] = strings.Repeat("x", 2*smallBody)
	})
}

// While Redis hangs, as many large requests as may wait for it do; others are told to come again. Small ones are not in their way, and
// all of them come over one connection.
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
			t.Errorf("%d %s, %v", status, text, err)
		}
		count[status]++
	}
	for range maxLarge {
		wg.Go(func() { post(largeReview(t, id), "6s", answers) })
	}
	rig.Eventually(t, 5*time.Second, func() error {
		if n := len(w.bounds.large); n != maxLarge {
			return fmt.Errorf("%d large requests wait", n)
		}
		return nil
	})
	for range 6 {
		wg.Go(func() { post(largeReview(t, id), "3s", answers) })
	}
	small := map[int]int{}
	for range 20 {
		wg.Go(func() { post(rig.Review(t, freshID(), 0), "6s", small) }) // wrong annotations: needs no Redis
	}
	rig.Eventually(t, 3*time.Second, func() error {
		mu.Lock()
		defer mu.Unlock()
		if small[http.StatusOK] != 20 {
			return fmt.Errorf("small requests were answered %v", small)
		}
		return nil
	})
	wg.Wait()
	if answers[http.StatusInternalServerError] != maxLarge || answers[http.StatusServiceUnavailable] != 6 {
		t.Errorf("large requests were answered %v", answers)
	}
	r.Resume(t)
	if failed := w.scrape(t)[metricsPrefix+`admission_duration_seconds_count{verdict="failed"}`]; failed != maxLarge+6 {
		t.Errorf("%v admissions failed, by the metrics", failed)
	}
	rig.Eventually(t, 20*time.Second, func() error {
		status, text, err := w.post(context.Background(), largeReview(t, id), "3s")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%d %s", status, text)
		}
		return err
	})
}

// The oldest goes, and only that; whoever has left is not asked to.
func TestCrowd(t *testing.T) {
	c := evictingSet{most: 2}
	gone := make(chan int, 10)
	join := func(i int) func() { return c.add(0, func() { gone <- i }) }
	join(1)
	leave := join(2)
	leave()
	leave()
	join(3)
	join(4)
	if i := <-gone; i != 1 {
		t.Errorf("%d had to go", i)
	}
	join(5)
	if i := <-gone; i != 3 {
		t.Errorf("%d had to go", i)
	}
	if len(gone) != 0 || c.all.Len() != 2 {
		t.Errorf("%d are left, and %d more had to go", c.all.Len(), len(gone))
	}
}

// As many of the oldest go as it takes for the bytes of a new one; what has left or gone has none any more.
func TestCrowdOfBytes(t *testing.T) {
	c := evictingSet{most: 10, mostBytes: 100}
	gone := make(chan int, 10)
	join := func(i, bytes int) func() { return c.add(bytes, func() { gone <- i }) }
	leave := join(1, 60)
	join(2, 40)
	leave()
	leave()
	join(3, 60)
	if len(gone) != 0 || c.bytes != 100 {
		t.Errorf("%d had to go, and %d bytes are there", len(gone), c.bytes)
	}
	join(4, 70)
	if a, b := <-gone, <-gone; a+b != 5 || c.bytes != 70 || c.all.Len() != 1 {
		t.Errorf("%d and %d had to go, and %d bytes of %d are there", a, b, c.bytes, c.all.Len())
	}
}

// Who comes to a crowd that is full waits until the oldest has rested, is gone, or has been waited for long enough.
func TestCrowdWaits(t *testing.T) {
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
					t.Errorf("waited for %s, not %s", took, test.want)
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
			t.Errorf("waited for %s in a crowd with room, and for 10ms", took)
		}
	})
}

// An admission that has waited for its connection's turn is answered in time all the same.
func TestAnswerInTimeAfterWaiting(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // no Redis: it tries for as long as it has time
	w.bounds.authenticated.most = 1
	defer w.bounds.authenticated.add(0, func() {})()
	start := time.Now()
	status, text, err := w.post(context.Background(), rig.Review(t, freshID(), 1), "3s")
	took := time.Since(start)
	if err != nil || status != http.StatusInternalServerError || took < restTime/2 {
		t.Errorf("answered %d %q, %v, after %s", status, text, err, took)
	}
	rig.WantWithin(t, took, 3*time.Second, "the answer to an API server that waits for 3 s")
}
