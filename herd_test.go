package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

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
	if made > 2*128 { // some may be given up where the machine is slow
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
	if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, "questions to queue Redis "+r.Address+": too many at once: try again") {
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
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
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
	late, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
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
