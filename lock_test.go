package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestLock(t *testing.T) {
	forEachLock(t, 3, func(t *testing.T, s lockServers) {
		ctx := context.Background()
		l, another := s.newLocker(), s.newLocker()
		t.Cleanup(func() {
			rig.Must(t, l.close())
			rig.Must(t, another.close())
		})

		t.Run("one holder at a time", func(t *testing.T) {
			var holders, locked atomic.Int32
			var wg sync.WaitGroup
			for i := range 16 {
				l := []locker{l, another}[i%2]
				wg.Go(func() {
					for locked.Load() < 50 {
						unlock, err := l.tryLock(ctx, "lock/{one}", time.Minute)
						if errors.Is(err, errLockTaken) {
							continue
						}
						if err != nil {
							t.Error(err)
							return
						}
						if n := holders.Add(1); n != 1 {
							t.Errorf("%d holders", n)
						}
						runtime.Gosched()
						locked.Add(1)
						holders.Add(-1)
						if err := unlock(ctx); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
		})

		t.Run("unlock frees at once", func(t *testing.T) {
			for range 20 {
				for _, l := range []locker{l, another} {
					unlock, err := l.tryLock(ctx, "lock/{free}", time.Minute)
					rig.Must(t, err)
					wantTaken(t, l, "lock/{free}")
					rig.Must(t, unlock(ctx))
				}
			}
		})

		t.Run("expires by itself", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{expires}", time.Second)
			rig.Must(t, err)
			wantTaken(t, another, "lock/{expires}")
			second := lockWithin(t, another, "lock/{expires}", time.Minute)
			rig.Must(t, unlock(ctx)) // leaves the other's alone
			wantTaken(t, l, "lock/{expires}")
			rig.Must(t, second(ctx))
		})

		t.Run("late unlock", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{late}", time.Minute)
			rig.Must(t, err)
			s.expire(t, "lock/{late}")
			rig.Must(t, unlock(ctx)) // as good as unlocked
			second, err := another.tryLock(ctx, "lock/{late}", time.Minute)
			rig.Must(t, err)
			rig.Must(t, unlock(ctx))
			wantTaken(t, l, "lock/{late}")
			rig.Must(t, second(ctx))
		})

		t.Run("cancelled before", func(t *testing.T) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			// The attempt may be over before it is seen that nobody waits for it.
			if unlock, err := l.tryLock(ctx, "lock/{cancelled}", time.Minute); err == nil {
				rig.Must(t, unlock(context.Background()))
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			rig.Must(t, lockWithin(t, another, "lock/{cancelled}", time.Minute)(context.Background()))
		})

		t.Run("cancelled while a server hangs", func(t *testing.T) {
			for i := range s.addresses() {
				s.pause(t, i)
			}
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(50*time.Millisecond, cancel)
			start := time.Now()
			if _, err := l.tryLock(ctx, "lock/{hangs}", time.Minute); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if took := time.Since(start); took > time.Second {
				t.Errorf("the cancelled attempt took %s", took)
			}
			for i := range s.addresses() {
				s.resume(t, i)
			}
			rig.Must(t, lockWithin(t, another, "lock/{hangs}", time.Minute)(context.Background()))
		})

		t.Run("unreachable", func(t *testing.T) {
			unlock, err := l.tryLock(ctx, "lock/{unreachable}", time.Minute)
			rig.Must(t, err)
			for i := range s.addresses() {
				s.kill(i)
			}
			for _, l := range []locker{l, another} {
				_, err = l.tryLock(ctx, "lock/{unreachable}", time.Minute)
				if err == nil || errors.Is(err, errLockTaken) {
					t.Fatalf("got %v, want that the servers are out of reach", err)
				}
				wantNamed(t, err.Error(), s.addresses()...)
			}
			wantNamed(t, unlock(ctx).Error(), s.addresses()...)
		})
	})
}

// Whatever becomes of attempts, nothing is left of them, neither while the locker is in use nor after it.
func TestLockLeavesNothing(t *testing.T) {
	for name, start := range startLockServers { // one after the other: it counts goroutines
		t.Run(name, func(t *testing.T) { wantNothingLeft(t, start(t, 1)) })
	}
}

func wantNothingLeft(t *testing.T, s lockServers) {
	before := runtime.NumGoroutine()
	l := s.newLocker()
	rig.Must(t, lockWithin(t, l, "lock/{first}", time.Minute)(context.Background()))
	inUse := runtime.NumGoroutine()
	var wg sync.WaitGroup
	var locked, cancelled atomic.Int32
	for worker := range 10 {
		wg.Go(func() {
			for i := range 100 {
				ctx, cancel := context.WithCancel(context.Background())
				if i%2 == 1 { // somewhere in the middle of it
					time.AfterFunc(rand.N(2*time.Millisecond), cancel)
				}
				unlock, err := l.tryLock(ctx, fmt.Sprintf("lock/{%d}", worker), time.Minute)
				switch {
				case err == nil:
					locked.Add(1)
					if err := unlock(context.Background()); err != nil {
						t.Error(err)
					}
				case errors.Is(err, context.Canceled):
					cancelled.Add(1)
				case !errors.Is(err, errLockTaken): // by the attempt before, which was cancelled
					t.Error(err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	t.Logf("%d locked, %d cancelled", locked.Load(), cancelled.Load())
	if locked.Load() < 20 || cancelled.Load() < 20 { // on a slow machine, most find the lock of one that was cancelled
		t.Errorf("%d locked, %d cancelled", locked.Load(), cancelled.Load())
	}
	wantNoMore := func(goroutines int) {
		t.Helper()
		rig.Eventually(t, 10*time.Second, func() error {
			if n := runtime.NumGoroutine(); n > goroutines {
				return fmt.Errorf("%d goroutines, %d before\n%s", n, goroutines, stacks())
			}
			return s.locksLeft()
		})
	}
	wantNoMore(inUse)
	rig.Must(t, l.close())
	wantNoMore(before)
	rig.Eventually(t, 10*time.Second, s.connectionsLeft)
}
