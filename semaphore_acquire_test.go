package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// servedWithin is the time in which a published wake-up serves a waiter. It is shorter
// than the time to the waiter's next poll.
const servedWithin = 2 * time.Second

// Admissions and waiters take free tokens without a lock, before any repair.
func TestFreeTokensAreTakenBeforeARepair(t *testing.T) {
	t.Parallel()
	r, healthy, id := newSemaphore(t)
	r.MakeStale(t, id, acquire(t, healthy, id, 3))
	r.WantCounts(t, id, 2, 1)

	c := testConfig(r.Address)
	c.redisAddresses = []string{rig.FreeAddress(t)}
	w := startWebhook(t, c)
	counted := &countingLocker{locker: w.semaphores.locks}
	w.semaphores.locks = counted
	start := time.Now()
	w.wantAdmitted(t, id, 3)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	rig.Must(t, newWaiter(w.semaphores, id, 3).waitOnly(ctx))
	rig.WantWithin(t, time.Since(start), servedWithin, "an admission and a waiter with free tokens")
	if n := counted.tried.Load(); n > 0 {
		t.Errorf("%d attempts to take the lock, want none", n)
	}
	r.WantCounts(t, id, 0, 3)
	if a, err := w.tryAdmit(rig.Review(t, id, 3)); err == nil { // only this one needs the stale token
		t.Errorf("got %+v, want an error about the unreachable lock server", a)
	}
}

// podRun has the times of one pod's run.
type podRun struct {
	length                    int
	asked, admitted, released time.Time // asked: when the pod sent the acquire that got the token
}

// runPod waits for a token, holds it for the time work, and gives it back. Its
// connections are its own, like those of a sidecar.
func runPod(ctx context.Context, s *semaphores, id semaphoreID, length int, work time.Duration) (podRun, error) {
	w := newWaiter(s, id, length)
	asked, _, err := w.wait(ctx)
	if err != nil {
		return podRun{}, err
	}
	done := podRun{length: length, asked: asked, admitted: time.Now()}
	if err := sleep(ctx, work); err != nil {
		return podRun{}, err
	}
	done.released = time.Now()
	_, err = s.release(ctx, id, w.token, "")
	return done, err
}

// wantLengthsKept fails if a pod was admitted while as many pods as the greatest length
// were working.
func wantLengthsKept(t *testing.T, runs []podRun, greatest int) {
	t.Helper()
	for i, pod := range runs {
		working := 0
		for j, other := range runs {
			if i != j && other.admitted.Before(pod.asked) && other.released.After(pod.admitted) {
				working++
			}
		}
		if working >= greatest {
			t.Errorf("a pod of length %d was admitted while %d others were working", pod.length, working)
		}
	}
}

// During a rollout, pods of one key disagree about the length. They use the free tokens,
// and never more than the greatest length.
func TestPodsOfTwoLengths(t *testing.T) {
	t.Parallel()
	const pods, work = 40, time.Second
	r, _, id := newSemaphore(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var mu sync.Mutex
	var runs []podRun
	var wg sync.WaitGroup
	start := time.Now()
	for i := range pods {
		s := testSemaphores(t, r.Address)
		length := 5 - 2*(i%2)
		wg.Go(func() {
			done, err := runPod(ctx, s, id, length, work)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			runs = append(runs, done)
		})
	}
	wg.Wait()
	took := time.Since(start)
	slices.SortFunc(runs, func(a, b podRun) int { return a.admitted.Compare(b.admitted) })
	wantLengthsKept(t, runs, 5)
	last, gap := start, time.Duration(0)
	for _, pod := range runs {
		gap, last = max(gap, pod.admitted.Sub(last)), pod.admitted
	}
	rig.WantWithin(t, took, 16*work, fmt.Sprintf("%d pods", len(runs)))
	rig.WantWithin(t, gap, 3*work, "the longest gap between two admissions")
	if _, inflight, err := r.Counts(id); err != nil || inflight > 0 {
		t.Errorf("%d in flight, %v", inflight, err)
	}
}

// linePod is a pod that waits in this process, or holds a token.
type linePod struct {
	token  string
	length int
	done   <-chan error
}

// lineUp is a semaphore of which the test knows all waiters, in order, and all holders.
type lineUp struct {
	r                *rig.Redis
	s                *semaphores
	id               semaphoreID
	waiting, holding []linePod
}

// hold takes a free token for a new pod.
func (l *lineUp) hold(t *testing.T, length int) {
	t.Helper()
	l.holding = append(l.holding, linePod{token: acquire(t, l.s, l.id, length), length: length})
}

// join queues a pod for each length, one after the other.
func (l *lineUp) join(t *testing.T, lengths ...int) {
	t.Helper()
	for _, length := range lengths {
		token, done := queueUp(t, t.Context(), l.s, l.id, length, l.r)
		l.waiting = append(l.waiting, linePod{token, length, done})
	}
}

// next removes and returns the first waiting pod, if a token is free for it: fewer are in
// use than its own length, or that of a pod behind it.
func (l *lineUp) next() (next linePod, ok bool) {
	for _, p := range l.waiting {
		if len(l.holding) < p.length {
			next, l.waiting = l.waiting[0], l.waiting[1:]
			return next, true
		}
	}
	return linePod{}, false
}

// wantServed waits until each pod in line with a free token has got it. Each must get it
// quickly, and no other pod may get one.
func (l *lineUp) wantServed(t *testing.T) {
	t.Helper()
	for {
		p, ok := l.next()
		if !ok {
			break
		}
		start := time.Now()
		select {
		case err := <-p.done:
			rig.Must(t, err)
			rig.WantWithin(t, time.Since(start), servedWithin, "a free token for a pod in line")
		case <-time.After(time.Minute):
			queue, inflight, err := l.r.Counts(l.id)
			t.Fatalf("a pod of length %d was not served, with %d holders; queue %d, in flight %d, %v",
				p.length, len(l.holding), queue, inflight, err)
		}
		l.holding = append(l.holding, p)
	}
	for _, p := range l.waiting {
		select {
		case err := <-p.done:
			t.Fatalf("a pod of length %d was served with %d holders, %v", p.length, len(l.holding), err)
		default:
		}
	}
	l.wantState(t)
}

// wantState waits until exactly the holders are in flight, and the waiters are in line in
// order.
func (l *lineUp) wantState(t *testing.T) {
	t.Helper()
	tokens := func(pods []linePod) (names []string) {
		for _, p := range pods {
			names = append(names, p.token)
		}
		return names
	}
	l.r.WantLine(t, l.id, tokens(l.waiting)...)
	got, want := l.r.Inflight(t, l.id), tokens(l.holding)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Fatalf("in flight: %v, want %v", got, want)
	}
}

// giveBack gives back the token of the first holder.
func (l *lineUp) giveBack(t *testing.T) {
	t.Helper()
	giveBack(t, l.s, l.id, l.holding[0].token)
	l.holding = l.holding[1:]
}

// wantDrained gives back one token after the other, until all waiters were served.
func (l *lineUp) wantDrained(t *testing.T) {
	t.Helper()
	for l.wantServed(t); len(l.holding) > 0; l.wantServed(t) {
		l.giveBack(t)
	}
	if len(l.waiting) > 0 {
		t.Errorf("%d pods still wait", len(l.waiting))
	}
}

// A changed length is not a loss of data: pods in line get free tokens at once.
func TestChangedLengthWithALine(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name            string
		holders, length int
		line            []int
	}{
		{"lowered, those in line are all new", 2, 2, []int{1, 1, 1, 1}},
		{"lowered while four wait", 2, 2, []int{2, 2, 2, 2, 1, 1}},
		{"lowered and raised again", 2, 2, []int{2, 1, 2, 1, 2, 1}},
		{"raised while some wait", 2, 2, []int{1, 2, 1, 2, 2}},
		{"different", 5, 5, []int{3, 5, 3, 5, 1, 5, 3, 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphore(t)
			l := &lineUp{r: r, s: s, id: id}
			for range c.holders {
				l.hold(t, c.length)
			}
			l.join(t, c.line...)
			l.wantDrained(t)
		})
	}
}

// If a later pod asks for a greater length, the tokens that it allows go to the line in
// its order, whether the later pod waits or not.
func TestRaisedLengthHelpsTheLine(t *testing.T) {
	t.Parallel()
	for _, waits := range []bool{true, false} {
		t.Run(fmt.Sprintf("it waits %t", waits), func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphore(t)
			l := &lineUp{r: r, s: s, id: id}
			l.hold(t, 1)
			l.join(t, 1, 1, 1)
			if waits {
				w, done := newWaiter(s, id, 3), make(chan error, 1)
				go func() { done <- w.waitOnly(t.Context()) }()
				l.waiting = append(l.waiting, linePod{w.token, 3, done})
				l.wantServed(t)
				l.wantDrained(t)
				return
			}
			wantFullError(t, s, id, 3, 1)
			for range 2 {
				wantDone(t, l.waiting[0].done)
				l.holding, l.waiting = append(l.holding, l.waiting[0]), l.waiting[1:]
			}
			l.wantState(t)
		})
	}
}

// Newer pods keep coming with a greater length. None overtakes a pod in line.
func TestRaisedLengthStarvesNobody(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	old, done := queueUp(t, t.Context(), s, id, 1, r)
	admitted := 0
	for range 10 {
		_, _, err := s.acquire(t.Context(), id, "", 5, limit{}, 10*time.Second)
		var full *fullError
		if err == nil {
			admitted++
		} else if !errors.As(err, &full) {
			t.Fatal(err)
		}
	}
	if admitted != 3 {
		t.Errorf("%d later pods got tokens, want 3: one is for the pod in line", admitted)
	}
	wantDone(t, done)
	if !slices.Contains(r.Inflight(t, id), old) {
		t.Error("the pod in line has no token")
	}
}

// A holder comes back late, after its token was reclaimed and another pod was served.
// Redis then counts one token too many; tokens given back later still reach the line.
func TestHolderComesBackLate(t *testing.T) {
	t.Parallel()
	for _, line := range [][]int{
		{2, 2, 2, 2, 2, 2, 2, 2, 2},
		{2, 3, 2, 3, 2, 3, 2, 3, 2},
		{3, 2, 1, 1, 2, 3, 3, 2, 1},
	} {
		t.Run(fmt.Sprint(line), func(t *testing.T) {
			t.Parallel()
			r, s, id := newSemaphore(t)
			l := &lineUp{r: r, s: s, id: id}
			length := slices.Max(line)
			for range length {
				l.hold(t, length)
			}
			l.join(t, line...)
			late := slices.Clone(l.holding[:2])
			l.holding = l.holding[2:]
			// in one command: the order of reclaiming decides which pod is next
			r.Do(t, "ZADD", id.inflightKey(), "XX", 1, late[0].token, 1, late[1].token)
			for range late {
				p, _ := l.next()
				wantDone(t, p.done)
				l.holding = append(l.holding, p)
			}
			for _, p := range late {
				rejoined, err := s.heartbeat(context.Background(), id, p.token, "", "", 0, 1)
				rig.Must(t, err)
				if !rejoined {
					t.Fatal("the late holder's token was not reclaimed")
				}
			}
			l.holding = append(l.holding, late...)
			l.wantDrained(t)
		})
	}
}

// A pod whose length differs from the recent length of others gets a warning. It fits the
// 120 characters that Kubernetes keeps.
func TestLengthsThatDisagree(t *testing.T) {
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	for _, c := range []struct{ length, agreed int }{{9998, 0}, {9999, 9998}, {9999, 0}, {9998, 9999}} {
		want := []string(nil)
		if c.agreed != 0 {
			want = []string{fmt.Sprintf("this pod sets the length of its semaphore to %d, others set %d lately: "+
				"a greater one also helps pods ahead in line", c.length, c.agreed)}
		}
		a := w.admit(t, rig.Review(t, id, c.length))
		if !a.Allowed || !slices.Equal(a.Warnings, want) {
			t.Errorf("length %d: got %+v, want warnings %q", c.length, a, want)
		}
		for _, warning := range a.Warnings {
			if len(warning) > 120 {
				t.Errorf("Kubernetes would cut the warning %q", warning)
			}
		}
	}
	r.ForgetLength(t, id)
	if a := w.admit(t, rig.Review(t, id, 9998)); !a.Allowed || a.Warnings != nil {
		t.Errorf("after Redis forgot the other length: got %+v, want no warning", a)
	}
}

// Five hundred pods come at once. Each gets its verdict, and all share a hundred
// connections to Redis.
func TestHerd(t *testing.T) {
	t.Parallel()
	const pods, length = 500, 200
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	body := rig.Review(t, id, length)
	var asked, admitted, refused atomic.Int32
	ask := func() { // without connections: they would take longer than the rest
		asked.Add(1)
		request := httptest.NewRequest(http.MethodPost, "/mutate?timeout=30s", bytes.NewReader(body))
		request.Header.Set("Content-Type", "application/json")
		response := httptest.NewRecorder()
		w.routes().ServeHTTP(response, request)
		a, err := rig.ReadAdmission(response.Code, response.Body.String())
		switch {
		case err != nil:
			t.Error(err)
		case a.Allowed:
			admitted.Add(1)
		case a.Code == http.StatusTooManyRequests:
			refused.Add(1)
		default:
			t.Errorf("got %+v, want allowed or 429", a)
		}
	}
	ask() // makes the tokens
	before := r.Info(t, "stats", "total_connections_received:")
	free := fullOf(t, serverOf(t, w.semaphores, id).acquires)
	var all sync.WaitGroup
	for range pods {
		all.Go(ask)
	}
	rig.Eventually(t, 25*time.Second, func() error {
		if n := asked.Load(); n != pods+1 {
			return fmt.Errorf("%d pods have come, want %d", n-1, pods)
		}
		return nil
	})
	free()
	all.Wait()
	if admitted.Load() != length || refused.Load() != pods+1-length {
		t.Errorf("%d admitted and %d refused, of length %d", admitted.Load(), refused.Load(), length)
	}
	r.WantCounts(t, id, 0, length)
	made := r.Info(t, "stats", "total_connections_received:") - before
	if made > 3*maxAcquires { // on a slow machine, some attempts are retried over new connections
		t.Errorf("%d connections to Redis were opened for %d pods", made, pods)
	}
}

// fullOf takes all slots until free is called.
func fullOf(t *testing.T, s slots) (free func()) {
	t.Helper()
	var taken []func()
	for range cap(s) {
		free, err := s.take(t.Context())
		rig.Must(t, err)
		taken = append(taken, free)
	}
	return func() {
		for _, free := range taken {
			free()
		}
	}
}

// take returns a free slot even if its context has ended.
func TestSlotsWithEndedContext(t *testing.T) {
	s := make(slots, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 30 {
		free, err := s.take(ctx)
		rig.Must(t, err)
		if _, err := s.take(ctx); !errors.Is(err, errTooMany) {
			t.Errorf("got %v, want errTooMany", err)
		}
		free()
		free()
	}
}

// An acquire that gets no slot in time fails with that reason, and counts as no error of
// Redis. Health checks and releases need no slot.
func TestTooManyAcquires(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	token := w.wantAdmitted(t, id, 2)
	s := w.semaphores
	redisErrors := func() (n float64) {
		for name, value := range w.scrape(t) {
			if strings.HasPrefix(name, metricsPrefix+"redis_errors_total") {
				n += value
			}
		}
		return n
	}
	before := redisErrors()
	fullOf(t, serverOf(t, s, id).acquires)
	status, text, err := w.post(context.Background(), rig.Review(t, id, 2), "300ms")
	want := "requests to queue Redis " + r.Address + ": too many at once: try again"
	if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, want) {
		t.Errorf("got %d %q, %v", status, text, err)
	}
	rig.Must(t, s.check(t.Context()))
	_, err = s.release(t.Context(), id, token, "")
	rig.Must(t, err)
	r.WantCounts(t, id, 2, 0)
	if n := redisErrors(); n != before {
		t.Errorf("%v errors of Redis are counted, want %v as before", n, before)
	}
}

// An acquire that gets no slot does not reset the start of an outage.
func TestTooManyAcquiresInAnOutage(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	part := s.queue.part(id)
	s.outages.failed(part)
	began := s.outages.parts[part].began
	fullOf(t, serverOf(t, s, id).acquires)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, _, err := s.acquire(ctx, id, "", 1, limit{}, 10*time.Second); !errors.Is(err, errTooMany) {
		t.Errorf("got %v, want errTooMany", err)
	}
	if s.outages.failed(part); s.outages.parts[part].began != began {
		t.Error("the outage started again")
	}
	s.outages.parts[part] = outage{time.Now().Add(-failoverPatience - time.Second), time.Now()}
	_, _, err := s.acquire(t.Context(), id, "", 1, limit{}, 10*time.Second)
	if !errors.Is(err, errUnreached) || !strings.Contains(err.Error(), "has not answered for 11s") {
		t.Errorf("after a long outage: %v", err)
	}
}

// movedQueue is a queue whose server can be replaced.
type movedQueue struct {
	tokenServers
	now   atomic.Pointer[queueServer]
	found atomic.Int32 // calls of find
}

func (q *movedQueue) find(context.Context, semaphoreID) (*queueServer, error) {
	defer q.found.Add(1)
	return q.now.Load(), nil
}

// An acquire that waits for a slot moves to the new server when the old one is replaced.
func TestAcquireMovesToNewServer(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	old := serverOf(t, s, id)
	q := &movedQueue{tokenServers: s.queue}
	q.now.Store(old)
	s.queue = q
	acquire(t, s, id, 2)
	free, before := fullOf(t, old.acquires), q.found.Load()
	taken := make(chan error)
	go func() {
		_, _, err := s.acquire(t.Context(), id, "", 2, limit{}, 10*time.Second)
		taken <- err
	}()
	rig.Eventually(t, 5*time.Second, func() error {
		if q.found.Load() == before {
			return errors.New("the acquire has not looked up its server")
		}
		return nil
	})
	next := newQueueServer(old.address, testConfig(r.Address).redis, 1)
	defer next.close()
	q.now.Store(next)
	old.pool.Close() // an acquire at the old server fails
	free()
	rig.Must(t, <-taken)
	if len(next.acquires)+len(old.acquires) != 0 {
		t.Error("a slot was not freed")
	}
}

// blockedLocker blocks all attempts until open is closed, and counts them.
type blockedLocker struct {
	locker
	open      chan struct{}
	now, most atomic.Int32
}

func (l *blockedLocker) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	if n := l.now.Add(1); n > l.most.Load() {
		l.most.Store(n)
	}
	defer l.now.Add(-1)
	<-l.open
	return l.locker.tryLock(ctx, name, expiration)
}

// Repairs are capped per process; the others wait for their turn.
func TestRepairsAreCapped(t *testing.T) {
	t.Parallel()
	_, s, _ := newSemaphore(t)
	l := &blockedLocker{locker: s.locks, open: make(chan struct{})}
	s.locks = l
	fresh := make([]semaphoreID, 3*maxRepairing)
	var all sync.WaitGroup
	for i := range fresh {
		fresh[i] = freshID()
		all.Go(func() {
			if _, _, err := s.acquire(context.Background(), fresh[i], "", 1, limit{}, 10*time.Second); err != nil {
				t.Error(err)
			}
		})
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if n := s.runningRepairs(); n != len(fresh) {
			return fmt.Errorf("%d repairs are running, want %d", n, len(fresh))
		}
		if n := l.now.Load(); n != maxRepairing {
			return fmt.Errorf("%d repairs take locks, want %d", n, maxRepairing)
		}
		return nil
	})
	late, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, _, err := s.acquire(late, freshID(), "", 1, limit{}, 10*time.Second); !errors.Is(err, errTooMany) {
		t.Errorf("got %v, want errTooMany", err)
	}
	close(l.open)
	all.Wait()
	if n := l.most.Load(); n != maxRepairing {
		t.Errorf("up to %d locks were taken at once, want %d", n, maxRepairing)
	}
}

// An admission that joins a repair without a slot retries until its deadline.
func TestRepairWithoutASlot(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	s.failRepairs(id, fmt.Errorf("repairs: %w", errTooMany))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, _, err := s.acquire(ctx, id, "", 1, limit{}, 10*time.Second)
	if !errors.Is(err, errTooMany) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want errTooMany and the deadline exceeded", err)
	}
	s.failRepairs(id, nil)
	acquire(t, s, id, 1)
}

// failingLocker fails for some attempts.
type failingLocker struct {
	locker
	err  error
	left atomic.Int32
}

func (l *failingLocker) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	if l.left.Add(-1) >= 0 {
		return nil, l.err
	}
	return l.locker.tryLock(ctx, name, expiration)
}

// repairAfterDoubt retries a repair that has failed. A taken lock does not mean that
// another process repairs: it may be one that was left to expire.
func TestRepairAfterDoubtIsRetried(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	for _, cause := range []error{errLockTaken, errors.New("no answer")} {
		s, id := semaphoresOf(t, configWithInterval(r.Address, 200*time.Millisecond)), freshID()
		l := &failingLocker{locker: s.locks, err: cause}
		l.left.Store(10)
		s.locks = l
		s.repairAfterDoubt(id, 1, 10*time.Second, 0)
		rig.Eventually(t, 10*time.Second, func() error {
			if left := l.left.Load(); left >= 0 {
				return fmt.Errorf("%v: the repair would fail %d times more", cause, left)
			}
			return nil
		})
	}
}

func (s *semaphores) runningRepairs() int {
	s.repairs.mu.Lock()
	defer s.repairs.mu.Unlock()
	return len(s.repairs.running)
}

// failRepairs makes all repairs of a semaphore fail with err. With nil, repairs work
// again.
func (s *semaphores) failRepairs(id semaphoreID, err error) {
	s.repairs.mu.Lock()
	defer s.repairs.mu.Unlock()
	s.repairs.running = map[semaphoreID]*flight[*repairStage]{}
	if err != nil {
		failed := &flight[*repairStage]{state: new(repairStage), done: make(chan struct{}), err: err}
		close(failed.done)
		s.repairs.running[id] = failed
	}
}

// If Redis was never away and lost no data, missing tokens are replaced at once.
func TestMissingTokensAreReplaced(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	_, done := queueUp(t, t.Context(), s, id, 1, r)
	r.Do(t, "DEL", id.inflightKey())
	wantDone(t, done)
}

// If several tokens become free, as many waiters are woken.
func TestRefillServesSeveral(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	lost := []string{acquire(t, s, id, 3), acquire(t, s, id, 3)}
	acquire(t, s, id, 3)
	_, first := queueUp(t, context.Background(), s, id, 3, r)
	_, second := queueUp(t, context.Background(), s, id, 3, r)
	third, _ := queueUp(t, t.Context(), s, id, 3, r)
	r.Do(t, "ZREM", id.inflightKey(), lost[0], lost[1])
	wantDone(t, first)
	wantDone(t, second)
	r.WantLine(t, id, third)
	r.WantCounts(t, id, 0, 3)
}

// The token of an admitted pod whose sidecar does not start is free again after the
// webhook's time for that. A sidecar that starts before keeps it.
func TestUnstartedTokens(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	c := testConfig(r.Address)
	c.unstarted = 20 * time.Second
	w := startWebhook(t, c)
	id := freshID()
	age := func(token string, seconds int) {
		t.Helper()
		r.Do(t, "ZINCRBY", id.inflightKey(), -seconds, token)
	}
	first := w.wantAdmitted(t, id, 1)
	age(first, 15)
	a := w.admit(t, rig.Review(t, id, 1))
	if want := " s, not started yet)"; a.Allowed || !strings.HasSuffix(a.Message, want) {
		t.Errorf("got %+v, want %q", a, want)
	}
	age(first, 6)
	second := w.wantAdmitted(t, id, 1)
	r.WantInflight(t, id, second)

	uid := uuid.NewString()
	rig.Must(t, errOf(w.semaphores.heartbeat(t.Context(), id, uid, second, "web-0 node-1", 0, 1)))
	age(uid, 100)
	a = w.admit(t, rig.Review(t, id, 1))
	if want := " has 1 of 1 tokens in use, by web-0 ("; a.Allowed || !strings.Contains(a.Message, want) ||
		strings.Contains(a.Message, "not started") {
		t.Errorf("got %+v, want %q", a, want)
	}
	age(uid, 21)
	w.wantAdmitted(t, id, 1)
}

// heavyWaiter is a waiter of a pod that needs several tokens, in line.
func heavyWaiter(t *testing.T, s *semaphores, id semaphoreID, length, tokens int) (w *waiter, ask func() acquireReply) {
	t.Helper()
	w = newWaiter(s, id, length)
	w.tokens = tokens
	arrival := joinLine
	return w, func() acquireReply {
		t.Helper()
		_, a, err := w.acquireOnce(t.Context(), arrival)
		rig.Must(t, err)
		if a.status == acquireFull {
			arrival = a.place.arrival
		}
		return a
	}
}

// A pod that needs several tokens gets all or none. While the first in line does not fit,
// lighter pods behind it get none. Its heartbeat restores all, and its release gives all
// back.
func TestSeveralTokens(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	one, two := acquire(t, s, id, 4), acquire(t, s, id, 4)
	heavy, ask := heavyWaiter(t, s, id, 4, 3)
	heavy.pod = newPodName("web-1", "")
	if a := ask(); a.status != acquireFull || a.inUse != 2 {
		t.Fatalf("3 of 4 tokens with 2 in use: got %+v", a)
	}
	light, askLight := heavyWaiter(t, s, id, 4, 1)
	if a := askLight(); a.status != acquireFull || a.place.position != 2 || a.place.freeIn >= stall {
		t.Fatalf("behind one that does not fit: got %+v; the next must notice soon if that pod dies", a)
	}
	var last acquireReply
	for range 2 {
		w, ask := heavyWaiter(t, s, id, 4, 1)
		last = ask()
		defer giveBack(t, s, id, w.token)
	}
	if last.status != acquireFull || last.place.position != 4 || last.place.freeIn < pollMost {
		t.Fatalf("far behind it: got %+v; this pod need not ask so often", last)
	}
	wantFullError(t, s, id, 4, 2)
	giveBack(t, s, id, one)
	a := ask()
	if a.status != acquireTaken {
		t.Fatalf("3 of 4 tokens with 1 in use: got %+v", a)
	}
	names := []string{heavy.token, heavy.token + "/2", heavy.token + "/3"}
	if got := r.Inflight(t, id); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(append(names, two)))) {
		t.Errorf("in flight are %q", got)
	}
	if a := ask(); a.status != acquireTaken {
		t.Errorf("asked again: got %+v", a)
	}
	r.WantCounts(t, id, 0, 4)
	a = askLight()
	if text := waitingText(id, 4, 1, waitEnd{}, a); !strings.Contains(text, "4 of 4 tokens in use by 2 pods, 1st in line") ||
		!regexp.MustCompile(`web-1 \(\d+ s, 3 tokens, not started yet\)`).MatchString(text) {
		t.Errorf("the lighter pod reads %q", text)
	}

	r.Do(t, "ZREM", append([]any{id.inflightKey()}, anySlice(names)...)...)
	if rejoined, err := s.heartbeat(t.Context(), id, heavy.token, "", "web-1 node", time.Minute, 3); err != nil || !rejoined {
		t.Errorf("rejoined: %t, %v", rejoined, err)
	}
	r.WantCounts(t, id, 0, 4)
	if lost, err := s.refreshTokens(t.Context(), id, []heldTokens{{heavy.token, 3}, {light.token, 1}}); err != nil ||
		!slices.Equal(lost, []string{light.token}) {
		t.Errorf("lost: %q, %v", lost, err)
	}
	giveBack(t, s, id, heavy.token)
	r.WantCounts(t, id, 3, 1)
	if a := askLight(); a.status != acquireTaken {
		t.Errorf("after the heavy pod: got %+v", a)
	}
}

// A text names the fifth pod with all its tokens, too.
func TestHoldersOfSeveralTokens(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	rig.Must(t, s.setLimit(t.Context(), id, limit{known: true, length: 7}, time.Hour, false))
	for range 4 {
		acquire(t, s, id, 7)
	}
	heavy, ask := heavyWaiter(t, s, id, 7, 3)
	heavy.token = "ffffffff-ffff-4fff-8fff-ffffffffffff" // the last of one second
	if a := ask(); a.status != acquireTaken {
		t.Fatalf("got %+v", a)
	}
	_, ask = heavyWaiter(t, s, id, 7, 1)
	if text := waitingText(id, 7, 1, waitEnd{}, ask()); !strings.Contains(text, "7 of 7 tokens in use by 5 pods") {
		t.Errorf("got %s", text)
	}
}

// A pod that needs more than the length in force lets others pass, and its text says so.
func TestMoreTokensThanTheLength(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	rig.Must(t, s.setLimit(t.Context(), id, limit{known: true, length: 2}, time.Hour, false))
	holder := acquire(t, s, id, 2)
	_, ask := heavyWaiter(t, s, id, 5, 3)
	a := ask()
	if text := waitingText(id, 5, 3, waitEnd{}, a); a.status != acquireFull ||
		!strings.HasPrefix(text, "waiting for 3 tokens of "+id.String()+", more than the length 2, so that others pass: 1 of 2 in use, 1st in line") {
		t.Fatalf("got %s, %+v", text, a)
	}
	_, askLight := heavyWaiter(t, s, id, 5, 1)
	if a := askLight(); a.status != acquireTaken {
		t.Errorf("the pod behind it: got %+v", a)
	}
	giveBack(t, s, id, holder)
	rig.Must(t, s.setLimit(t.Context(), id, limit{known: true, length: 4}, time.Hour, false))
	if a := ask(); a.status != acquireTaken {
		t.Errorf("with a length of 4: got %+v", a)
	}
}

// With an overtake, lighter pods pass the first that does not fit, for that time.
func TestOvertake(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	rig.Must(t, s.setLimit(t.Context(), id, limit{known: true, length: 3, overtake: 300}, time.Hour, false))
	acquire(t, s, id, 3)
	heavy, ask := heavyWaiter(t, s, id, 3, 3)
	if a := ask(); a.status != acquireFull {
		t.Fatalf("got %+v", a)
	}
	if _, askLight := heavyWaiter(t, s, id, 3, 1); askLight().status != acquireTaken {
		t.Error("no lighter pod passes")
	}
	now, err := redis.Int64s(r.Control.Do("TIME"))
	rig.Must(t, err)
	r.Do(t, "HSET", id.namesKey(), heavy.token+"/first", now[0]-301)
	if _, askLight := heavyWaiter(t, s, id, 3, 1); askLight().status != acquireFull {
		t.Error("a lighter pod passes one that has been first for the overtake")
	}
	giveBack(t, s, id, heavy.token)
	if first, err := redis.Strings(r.Control.Do("HKEYS", id.namesKey())); err != nil || slices.Contains(first, heavy.token+"/first") {
		t.Errorf("after it left the line, Redis knows %q, %v", first, err)
	}
}
