package main

import (
	"context"
	"math/rand/v2"
	"time"
)

func seconds(d time.Duration) int { return int(d / time.Second) }

// sleep waits for d, or until ctx is done, whose error it returns.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// backoff doubles from first to most; each wait is jittered by up to half, so that what failed together does
// not return together.
type backoff struct{ wait, most time.Duration }

func newBackoff(first, most time.Duration) *backoff { return &backoff{first, most} }

func (b *backoff) next() time.Duration {
	wait := b.wait
	b.wait = min(2*b.wait, b.most)
	return wait - rand.N(wait/2+1)
}
