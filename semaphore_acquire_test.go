package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// atOnce is within what time a waiter has the token that is free for it: it is called, and does not find it by its next poll.
const atOnce = 2 * time.Second

// What is free is taken without a lock, and before anything is repaired.
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
	rig.WantWithin(t, time.Since(start), atOnce, "an admission and a waiter with free tokens")
	if n := counted.tried.Load(); n > 0 {
		t.Errorf("the lock was tried %d times", n)
	}
	r.WantCounts(t, id, 0, 3)
	if a, err := w.tryAdmit(rig.Review(t, id, 3)); err == nil { // only now the stale one is needed
		t.Errorf("answered %+v, want the lock server out of reach", a)
	}
}

// podRun is what a pod has done.
type podRun struct {
	length                    int
	asked, admitted, released time.Time // asked: when it sent the question that was answered with the token
}

// runPod waits for a token, holds it for a time, and gives it back. It has connections of its own, as a sidecar has.
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
	_, err = s.release(ctx, id, w.token)
	return done, err
}

// wantLengthsKept fails if a pod was admitted while as many as its own length were at work.
func wantLengthsKept(t *testing.T, runs []podRun) {
	t.Helper()
	for i, pod := range runs {
		working := 0
		for j, other := range runs {
			if i != j && other.admitted.Before(pod.asked) && other.released.After(pod.admitted) {
				working++
			}
		}
		if working >= pod.length {
			t.Errorf("a pod of length %d was admitted while %d others were at work", pod.length, working)
		}
	}
}

// Pods that disagree about the length, as while a Deployment is rolled out, use what is there, and nobody more than its length.
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
	wantLengthsKept(t, runs)
	last, gap := start, time.Duration(0)
	for _, pod := range runs {
		gap, last = max(gap, pod.admitted.Sub(last)), pod.admitted
	}
	rig.WantWithin(t, took, 16*work, fmt.Sprintf("%d pods", len(runs)))
	rig.WantWithin(t, gap, 3*work, "the longest gap between two of them")
	if _, inflight, err := r.Counts(id); err != nil || inflight > 0 {
		t.Errorf("%d in flight, %v", inflight, err)
	}
}

// linePod is one that waits in this process, or holds a token.
type linePod struct {
	token  string
	length int
	done   <-chan error
}

// lineUp is a line whose pods the test knows in their order, and those that hold tokens.
type lineUp struct {
	r                *rig.Redis
	s                *semaphores
	id               semaphoreID
	waiting, holding []linePod
}

// hold lets a pod take a token that is free.
func (l *lineUp) hold(t *testing.T, length int) {
	t.Helper()
	l.holding = append(l.holding, linePod{token: acquire(t, l.s, l.id, length), length: length})
}

// join lets pods of these lengths join the line, one after the other.
func (l *lineUp) join(t *testing.T, lengths ...int) {
	t.Helper()
	for _, length := range lengths {
		token, done := queueUp(t, t.Context(), l.s, l.id, length, l.r)
		l.waiting = append(l.waiting, linePod{token, length, done})
	}
}

// next takes out of those that wait the first whose length is not used up.
func (l *lineUp) next() (next linePod, ok bool) {
	for i, p := range l.waiting {
		if len(l.holding) < p.length {
			l.waiting = slices.Delete(l.waiting, i, i+1)
			return p, true
		}
	}
	return linePod{}, false
}

// wantServed waits until all have a token for whom one is free: each at once, and nobody else.
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
			rig.WantWithin(t, time.Since(start), atOnce, "a free token for a pod in line")
		case <-time.After(time.Minute):
			queue, inflight, err := l.r.Counts(l.id)
			t.Fatalf("a pod of length %d waits for what is free, with %d holders; queue %d, in flight %d, %v", p.length, len(l.holding), queue, inflight, err)
		}
		l.holding = append(l.holding, p)
	}
	for _, p := range l.waiting {
		select {
		case err := <-p.done:
			t.Fatalf("one too many: a pod of length %d was served with %d holders, %v", p.length, len(l.holding), err)
		default:
		}
	}
	l.wantState(t)
}

// wantState waits until Redis has exactly those in flight that hold a token, and those in line that wait, in their order.
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
		t.Fatalf("in flight are %v, want %v", got, want)
	}
}

// giveBack ends the pod that holds a token for the longest time.
func (l *lineUp) giveBack(t *testing.T) {
	t.Helper()
	giveBack(t, l.s, l.id, l.holding[0].token)
	l.holding = l.holding[1:]
}

// wantDrained lets one holder after the other end, until all that wait were served.
func (l *lineUp) wantDrained(t *testing.T) {
	t.Helper()
	for l.wantServed(t); len(l.holding) > 0; l.wantServed(t) {
		l.giveBack(t)
	}
	if len(l.waiting) > 0 {
		t.Errorf("%d still wait", len(l.waiting))
	}
}

// A length that is changed is no loss of data: nobody waits for what is free to him.
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

// One that asks for more than is in use gets it at once, though the line is long: those in it wait for less.
func TestRaisedLengthIsServedAtOnce(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	l := &lineUp{r: r, s: s, id: id}
	l.hold(t, 1)
	l.join(t, 1, 1, 1)
	for range 2 {
		w := newWaiter(s, id, 3)
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		defer cancel()
		start := time.Now()
		rig.Must(t, w.waitOnly(ctx))
		rig.WantWithin(t, time.Since(start), atOnce, "a free token for a greater length")
		l.holding = append(l.holding, linePod{token: w.token, length: 3})
		l.wantState(t)
	}
	l.join(t, 3, 1)
	l.wantDrained(t)
}

// A holder that comes back late, when its token has been reclaimed and is another's, is one too many. What is given back then is
// not kept from those who wait.
func TestHolderComesBackLate(t *testing.T) {
	t.Parallel()
	for _, line := range [][]int{{2, 2, 2, 2, 2, 2, 2, 2, 2}, {2, 3, 2, 3, 2, 3, 2, 3, 2}, {3, 2, 1, 1, 2, 3, 3, 2, 1}} {
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
			r.Do(t, "ZADD", id.inflightKey(), "XX", 1, late[0].token, 1, late[1].token) // both at once, as that tells who is next
			for range late {
				p, _ := l.next()
				wantDone(t, p.done)
				l.holding = append(l.holding, p)
			}
			for _, p := range late {
				rejoined, err := s.heartbeat(context.Background(), id, p.token, "", 0)
				rig.Must(t, err)
				if !rejoined {
					t.Fatal("it was not reclaimed")
				}
			}
			l.holding = append(l.holding, late...)
			l.wantDrained(t)
		})
	}
}

// Whoever says another length than others did lately is warned, within what Kubernetes shows.
func TestLengthsThatDisagree(t *testing.T) {
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	for _, c := range []struct{ length, agreed int }{{9998, 0}, {9999, 9998}, {9999, 0}, {9998, 9999}} {
		want := []string(nil)
		if c.agreed != 0 {
			want = []string{fmt.Sprintf("this pod sets the length of its semaphore to %d, others set %d lately: each gets tokens by its own", c.length, c.agreed)}
		}
		a := w.admit(t, rig.Review(t, id, c.length))
		if !a.Allowed || !slices.Equal(a.Warnings, want) {
			t.Errorf("%d: %+v", c.length, a)
		}
		for _, warning := range a.Warnings {
			if len(warning) > 120 {
				t.Errorf("cut by Kubernetes: %q", warning)
			}
		}
	}
	r.ForgetLength(t, id)
	if a := w.admit(t, rig.Review(t, id, 9998)); !a.Allowed || a.Warnings != nil {
		t.Errorf("long ago: %+v", a)
	}
}

// A thousand pods come at once: each gets its verdict, and they share a hundred connections to Redis.
func TestHerd(t *testing.T) {
	const pods, length, connections = 1000, 400, 20
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	body := rig.Review(t, id, length)
	var admitted, refused atomic.Int32
	ask := func(client *http.Client) {
		response, err := client.Post(w.server.URL+"/mutate?timeout=30s", "application/json", bytes.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		defer response.Body.Close()
		var text bytes.Buffer
		_, err = text.ReadFrom(response.Body)
		a, wrong := rig.ReadAdmission(response.StatusCode, text.String())
		switch {
		case errors.Join(err, wrong) != nil:
			t.Error(errors.Join(err, wrong))
		case a.Allowed:
			admitted.Add(1)
		case a.Code == http.StatusTooManyRequests:
			refused.Add(1)
		default:
			t.Errorf("got %+v", a)
		}
	}
	var clients []*http.Client
	for range connections {
		transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		defer transport.CloseIdleConnections()
		clients = append(clients, &http.Client{Transport: transport})
		ask(clients[len(clients)-1]) // so that the connection is there
	}
	before := r.Info(t, "stats", "total_connections_received:")
	free := fullOf(t, serverOf(t, w.semaphores, id).asking)
	var all sync.WaitGroup
	for i := range pods {
		all.Go(func() { ask(clients[i%connections]) })
	}
	rig.Eventually(t, 25*time.Second, func() error {
		w.bounds.requests.mu.Lock()
		defer w.bounds.requests.mu.Unlock()
		if n := w.bounds.requests.all.Len(); n != pods {
			return fmt.Errorf("%d requests are in hand", n)
		}
		return nil
	})
	free()
	all.Wait()
	if admitted.Load() != length || refused.Load() != pods+connections-length {
		t.Errorf("%d were admitted, and %d refused, of %d", admitted.Load(), refused.Load(), length)
	}
	r.WantCounts(t, id, 0, length)
	made := r.Info(t, "stats", "total_connections_received:") - before
	if made > 4*maxAsking { // a slow machine makes some attempts again, over new connections
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

// Who finds a slot has it, though there is no time to wait for one.
func TestSlotsWithoutTime(t *testing.T) {
	s := make(slots, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 30 {
		free, err := s.take(ctx)
		rig.Must(t, err)
		if _, err := s.take(ctx); !errors.Is(err, errTooMany) {
			t.Errorf("got %v", err)
		}
		free()
		free()
	}
}

// Whose turn does not come in time is told why. That says nothing about Redis; and who is ready, or gives back, needs no turn.
func TestTooManyQuestions(t *testing.T) {
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
	fullOf(t, serverOf(t, s, id).asking)
	status, text, err := w.post(context.Background(), rig.Review(t, id, 2), "300ms")
	if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, "requests to queue Redis "+r.Address+": too many at once: try again") {
		t.Errorf("answered %d %q, %v", status, text, err)
	}
	rig.Must(t, s.check(t.Context()))
	_, err = s.release(t.Context(), id, token)
	rig.Must(t, err)
	r.WantCounts(t, id, 2, 0)
	if n := redisErrors(); n != before {
		t.Errorf("%v errors of Redis were counted, %v before", n, before)
	}
}

// A queue that fails does so for as long as before, whoever waits for a turn meanwhile.
func TestTooManyQuestionsInAnOutage(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	part := s.queue.part(id)
	s.outages.failed(part)
	began := s.outages.parts[part].began
	fullOf(t, serverOf(t, s, id).asking)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, _, err := s.acquire(ctx, id, "", 1, 10*time.Second); !errors.Is(err, errTooMany) {
		t.Errorf("got %v", err)
	}
	if s.outages.failed(part); s.outages.parts[part].began != began {
		t.Error("the outage begins anew")
	}
	s.outages.parts[part] = outage{time.Now().Add(-failoverPatience - time.Second), time.Now()}
	if _, _, err := s.acquire(t.Context(), id, "", 1, 10*time.Second); !errors.Is(err, errUnreached) || !strings.Contains(err.Error(), "has not answered for 11s") {
		t.Errorf("after a long outage: %v", err)
	}
}

// movedQueue is a queue whose server may get a successor.
type movedQueue struct {
	tokenServers
	now   atomic.Pointer[queueServer]
	found atomic.Int32 // so often
}

func (q *movedQueue) find(context.Context, semaphoreID) (*queueServer, error) {
	defer q.found.Add(1)
	return q.now.Load(), nil
}

// Who waits for a turn at a server that has a successor by then asks that one.
func TestTurnAtASuccessor(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	old := serverOf(t, s, id)
	q := &movedQueue{tokenServers: s.queue}
	q.now.Store(old)
	s.queue = q
	acquire(t, s, id, 2)
	free, before := fullOf(t, old.asking), q.found.Load()
	taken := make(chan error)
	go func() {
		_, _, err := s.acquire(t.Context(), id, "", 2, 10*time.Second)
		taken <- err
	}()
	rig.Eventually(t, 5*time.Second, func() error {
		if q.found.Load() == before {
			return errors.New("the server is not looked for")
		}
		return nil
	})
	next := newQueueServer(old.address, testConfig(r.Address).redis, 1)
	defer next.close()
	q.now.Store(next)
	old.pool.Close() // whoever asks it fails
	free()
	rig.Must(t, <-taken)
	if len(next.asking)+len(old.asking) != 0 {
		t.Error("a slot is not free again")
	}
}

// crowdedLocker lets nobody have a lock before open is closed, and counts those who try.
type crowdedLocker struct {
	locker
	open      chan struct{}
	now, most atomic.Int32
}

func (l *crowdedLocker) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	if n := l.now.Add(1); n > l.most.Load() {
		l.most.Store(n)
	}
	defer l.now.Add(-1)
	<-l.open
	return l.locker.tryLock(ctx, name, expiration)
}

// Of many semaphores that are to be repaired at once, so many are, and then the others.
func TestRepairsTakeTurns(t *testing.T) {
	t.Parallel()
	_, s, _ := newSemaphore(t)
	l := &crowdedLocker{locker: s.locks, open: make(chan struct{})}
	s.locks = l
	fresh := make([]semaphoreID, 3*maxRepairing)
	var all sync.WaitGroup
	for i := range fresh {
		fresh[i] = freshID()
		all.Go(func() {
			if _, _, err := s.acquire(context.Background(), fresh[i], "", 1, 10*time.Second); err != nil {
				t.Error(err)
			}
		})
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if n := s.runningRepairs(); n != len(fresh) {
			return fmt.Errorf("%d repairs have begun", n)
		}
		if n := l.now.Load(); n != maxRepairing {
			return fmt.Errorf("%d of them take locks", n)
		}
		return nil
	})
	late, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, _, err := s.acquire(late, freshID(), "", 1, 10*time.Second); !errors.Is(err, errTooMany) {
		t.Errorf("got %v", err)
	}
	close(l.open)
	all.Wait()
	if n := l.most.Load(); n != maxRepairing {
		t.Errorf("at most %d locks were taken at once", n)
	}
}

// Who joins a repair that does not get its turn goes on for as long as he has time.
func TestRepairWithoutATurn(t *testing.T) {
	t.Parallel()
	_, s, id := newSemaphore(t)
	s.failRepairs(id, fmt.Errorf("repairs: %w", errTooMany))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := s.acquire(ctx, id, "", 1, 10*time.Second); !errors.Is(err, errTooMany) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	s.failRepairs(id, nil)
	acquire(t, s, id, 1)
}

// countedError is errTooMany, and counts how often it is asked about.
type countedError struct{ asked atomic.Int32 }

func (e *countedError) Error() string { return errTooMany.Error() }
func (e *countedError) Is(target error) bool {
	e.asked.Add(1)
	return target == errTooMany
}

// What is watched is repaired though it was nobody's turn when its doubt was over.
func TestWatchWithoutATurn(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	s, id := semaphoresOf(t, beating(r.Address, 200*time.Millisecond)), freshID()
	counted := &countingLocker{locker: s.locks}
	s.locks = counted
	none := new(countedError)
	s.failRepairs(id, none)
	s.repairAfterDoubt(id, 1, 10*time.Second, 0)
	rig.Eventually(t, 10*time.Second, func() error {
		if n := none.asked.Load(); n < 10 {
			return fmt.Errorf("its error was asked about %d times", n)
		}
		return nil
	})
	s.failRepairs(id, nil)
	rig.Eventually(t, 10*time.Second, func() error {
		if counted.locked.Load() == 0 {
			return errors.New("not repaired")
		}
		return nil
	})
}

func (s *semaphores) runningRepairs() int {
	s.repairs.mu.Lock()
	defer s.repairs.mu.Unlock()
	return len(s.repairs.running)
}

// failRepairs makes all repairs of a semaphore end with an error from now on; with nil, it repairs again.
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
