package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// briefSemaphore is a semaphore whose holders are known to be gone or back within seconds.
func briefSemaphore(t *testing.T) *lineUp {
	t.Helper()
	r, s, id := newSemaphore(t)
	s.heartbeatInterval = time.Second
	return &lineUp{r: r, s: s, id: id}
}

// beat is the heartbeat of a holder that Redis has reclaimed or lost. It does not stand in line from then on.
func (l *lineUp) beat(t *testing.T, token string) {
	t.Helper()
	rejoined, err := l.s.heartbeat(context.Background(), l.id, token, "", 0)
	rig.Must(t, err)
	if !rejoined {
		t.Fatalf("%s was in flight", token)
	}
	if slices.Contains(l.r.MustLine(t, l.id), token) {
		t.Errorf("%s is in flight and in line", token)
	}
}

// wantNoOvertaking fails if a later pod gets a token, one that waits or one that does not; the one that waits joins the line.
func (l *lineUp) wantNoOvertaking(t *testing.T, length int) {
	t.Helper()
	token, _, err := l.s.acquire(context.Background(), l.id, "", length, 10*time.Second)
	var full *fullError
	if !errors.As(err, &full) {
		t.Fatalf("a pod that does not wait got token %q, %v; %d hold one, %d are in line", token, err, len(l.holding), len(l.waiting))
	}
	l.join(t, length)
}

// wantDrainedWithoutOvertaking lets one holder after the other end, and later pods come.
func (l *lineUp) wantDrainedWithoutOvertaking(t *testing.T, length, later int) {
	t.Helper()
	for l.wantServed(t); len(l.holding) > 0; l.wantServed(t) {
		if later > 0 {
			later--
			l.wantNoOvertaking(t, length)
		}
		l.giveBack(t)
	}
	if len(l.waiting) > 0 {
		t.Errorf("%d still wait", len(l.waiting))
	}
}

// backup are the keys of a semaphore as they were.
type backup map[string][]byte

func (l *lineUp) backup(t *testing.T) backup {
	t.Helper()
	b := backup{}
	for _, key := range l.id.keys() {
		dump, err := redis.Bytes(l.r.Control.Do("DUMP", key))
		if !errors.Is(err, redis.ErrNil) {
			rig.Must(t, err)
			b[key.(string)] = dump
		}
	}
	return b
}

// restore makes Redis lose its last writes.
func (l *lineUp) restore(t *testing.T, b backup) {
	t.Helper()
	rig.Must(t, l.r.Control.Send("MULTI"))
	rig.Must(t, l.r.Control.Send("DEL", l.id.keys()...))
	for key, dump := range b {
		rig.Must(t, l.r.Control.Send("RESTORE", key, 0, dump))
	}
	l.r.Do(t, "EXEC")
}

// One token too many in flight, whatever the reason: those in line stay there, in their order, and are called.
func TestOneTooManyInFlightKeepsTheOrder(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		length int // of those in line
		happen func(t *testing.T, l *lineUp)
	}{
		"a holder comes back late": {2, func(t *testing.T, l *lineUp) {
			late := l.holding[0]
			l.r.MakeStale(t, l.id, late.token)
			p := l.waiting[0]
			wantDone(t, p.done)
			l.waiting, l.holding = l.waiting[1:], append(l.holding[1:], p, late)
			l.beat(t, late.token)
		}},
		"Redis has lost all": {2, func(t *testing.T, l *lineUp) {
			l.r.Do(t, "DEL", l.id.keys()...)
			l.hold(t, 2) // the first that asks cannot know it
			for _, p := range l.holding[:2] {
				l.beat(t, p.token)
			}
		}},
		"the length was lowered": {1, func(*testing.T, *lineUp) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := briefSemaphore(t)
			l.hold(t, 2)
			l.hold(t, 2)
			l.join(t, c.length, c.length, c.length, c.length)
			c.happen(t, l)
			l.wantState(t)
			l.wantDrainedWithoutOvertaking(t, c.length, 3)
		})
	}
}

// rollBack lets the first in line take the free token, and Redis lose that. It returns the one who holds it.
func (l *lineUp) rollBack(t *testing.T, waiting ...int) (holder linePod) {
	t.Helper()
	former := acquire(t, l.s, l.id, 1)
	token, unsubscribe := stand(t, l.r, l.s, l.id, true)
	l.join(t, waiting...)
	giveBack(t, l.s, l.id, former)
	b := l.backup(t)
	a, err := l.s.runAcquire(t.Context(), l.id, acquireRequest{token, 1, joinLine, ""})
	rig.Must(t, err)
	if a.status != acquireTaken {
		t.Fatalf("the first in line got %+v", a)
	}
	unsubscribe()
	l.restore(t, b)
	wantFullError(t, l.s, l.id, 1, 0) // it is kept for those in line
	return linePod{token: token, length: 1}
}

// Redis loses its last writes, and with them that a token was taken. The holder that puts itself back does not also stand in line
// and keep a token from the others.
func TestRolledBackTake(t *testing.T) {
	t.Parallel()
	for name, happen := range map[string]func(t *testing.T, l *lineUp){
		"and that it was given back before": func(t *testing.T, l *lineUp) {
			l.hold(t, 1)
			l.join(t, 1, 1, 1)
			former, b := l.holding[0], l.backup(t)
			l.giveBack(t)
			l.wantServed(t)
			l.restore(t, b)
			l.beat(t, l.holding[0].token)
			l.holding = append(l.holding, former)
		},
		"nothing else": func(t *testing.T, l *lineUp) {
			holder := l.rollBack(t, 1, 1, 1)
			l.beat(t, holder.token)
			l.holding = append(l.holding, holder)
		},
		"and another was served before the holder was back": func(t *testing.T, l *lineUp) {
			holder, next := l.rollBack(t, 1, 1, 1), l.waiting[0]
			l.r.Unseen(t, l.id, holder.token, 15*time.Second)
			wantDone(t, next.done)
			l.beat(t, holder.token)
			l.holding, l.waiting = []linePod{next, holder}, l.waiting[1:]
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := briefSemaphore(t)
			happen(t, l)
			l.wantState(t)
			l.wantDrainedWithoutOvertaking(t, 1, 2)
		})
	}
}

// Where Redis has lost all, pods that come before all who waited are back do not take what live holders have.
func TestNewcomersAfterALossOfData(t *testing.T) {
	t.Parallel()
	l := briefSemaphore(t)
	l.s.heartbeatInterval = 30 * time.Second
	l.hold(t, 1)
	l.join(t, 1, 1, 1)
	l.r.Do(t, "DEL", l.id.keys()...)
	rig.Eventually(t, 20*time.Second, func() error {
		if len(l.r.MustLine(t, l.id)) == 0 {
			return errors.New("nobody in line is back")
		}
		return nil
	})
	wantFullError(t, l.s, l.id, 1, 0)
	a, err := l.s.runAcquire(t.Context(), l.id, acquireRequest{uuid.NewString(), 1, joinLine, ""})
	rig.Must(t, err)
	if a.status != acquireFull {
		t.Errorf("a later waiter got %+v", a)
	}
}

// standing is a pod that stood in line, and got its token.
type standing struct{ came, inLine, asked, admitted time.Time }

// Pods come and go, some of which are paused for so long that they are reclaimed, and come back late: those who came after another
// stood in line do not have their tokens before that one.
func TestNobodyOvertakesWhilePodsArePaused(t *testing.T) {
	t.Parallel()
	const length, pods, over = 3, 14, 15 * time.Second
	r, _, id := newSemaphore(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	var all []standing
	rounds, late := 0, 0
	pod := func(s *semaphores) error {
		var inLine time.Time
		w := newWaiter(s, id, length)
		w.say = func(string) {
			if inLine.IsZero() {
				inLine = time.Now()
			}
		}
		came := time.Now()
		asked, _, err := w.wait(ctx)
		if err != nil {
			return err
		}
		mu.Lock()
		all = append(all, standing{came, inLine, asked, time.Now()})
		rounds++
		pause := rounds%10 == 0
		mu.Unlock()
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
		if pause {
			if err := r.TryMakeStale(id, w.token); err != nil {
				return err
			}
			if err := sleep(ctx, pollMost+time.Second); err != nil {
				return err
			}
			rejoined, err := s.heartbeat(ctx, id, w.token, "", 0)
			if err != nil {
				return err
			}
			mu.Lock()
			if rejoined {
				late++
			}
			mu.Unlock()
			if err := sleep(ctx, 200*time.Millisecond); err != nil {
				return err
			}
		}
		_, err = s.release(ctx, id, w.token)
		return err
	}
	var wg sync.WaitGroup
	end := time.Now().Add(over)
	for range pods {
		s := testSemaphores(t, r.Address)
		wg.Go(func() {
			for time.Now().Before(end) {
				if err := pod(s); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	overtaken := 0
	var longest time.Duration
	for _, first := range all {
		longest = max(longest, first.admitted.Sub(first.came))
		earlier := 0
		for _, second := range all {
			if !first.inLine.IsZero() && second.came.After(first.inLine) && second.admitted.Before(first.asked) {
				earlier++
			}
		}
		if earlier >= length { // fewer may have found tokens that were free beside that of the first, which it had yet to take
			overtaken++
		}
	}
	t.Logf("%d pods, %d back late, the longest wait was %s", len(all), late, longest)
	if overtaken > 0 || late == 0 {
		t.Errorf("overtaken %d times, with %d pods back late", overtaken, late)
	}
}
