package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// promptly is well below the time after which a waiter asks again without a call.
const promptly = time.Second

// storyOfWaiting is the part about pods that wait for a token. web-3, web-4 and web-5
// have one before it.
func (s *setup) storyOfWaiting(ctx context.Context) error {
	printStep("Two pods with when-full: wait are created. The webhook admits both without a token.\n" +
		"   Their sidecars wait in line. Until a sidecar has a token, the init container \"await\" holds back the app.")
	if err := s.wantWaiting(ctx, "web-6", "1st"); err != nil {
		return err
	}
	if err := s.wantWaiting(ctx, "web-7", "2nd"); err != nil {
		return err
	}
	six, seven := s.pods["web-6"], s.pods["web-7"]
	if err := s.wantTokensAndLine(ctx, 0, 3, 2); err != nil {
		return err
	}

	printStep("web-3 ends. Its token goes to web-6, whose await ends: the app would start. web-7 moves up.")
	for _, p := range []*pod{six, seven} {
		if err := p.wantHeldBack(); err != nil {
			return err
		}
	}
	start := time.Now()
	if err := s.wantEnd("web-3"); err != nil {
		return err
	}
	took, err := s.wantHolding(ctx, six, start)
	if err != nil {
		return err
	}
	if took > promptly {
		return fmt.Errorf("web-6 was not called: it took %s", took)
	}
	fmt.Printf("   web-6  await exited with 0, %d ms after the SIGTERM of web-3\n", took.Milliseconds())
	if c, err := s.queue.contents(); err != nil || !slices.Equal(c.line, []string{seven.token}) {
		return fmt.Errorf("web-7 is not alone in line: %q, %v", c.line, err)
	}
	if err := seven.wantHeldBack(); err != nil {
		return err
	}
	fmt.Println("   web-7  still waits, 1st in line")
	if err := s.wantTokensAndLine(ctx, 0, 3, 1); err != nil {
		return err
	}

	printStep("web-4 ends while the sidecar of web-7 is paused. The free token stays reserved: no pod overtakes web-7.")
	if err := seven.sidecar.pause(ctx); err != nil {
		return err
	}
	if err := s.wantEnd("web-4"); err != nil {
		return err
	}
	if err := s.wantRefused("web-8", "2 of 3 tokens in use", "; 1 waiting in line"); err != nil {
		return err
	}
	if err := s.wantTokensAndLine(ctx, 1, 2, 1); err != nil {
		return err
	}
	start = time.Now()
	if err := seven.sidecar.resume(); err != nil {
		return err
	}
	if took, err = s.wantHolding(ctx, seven, start); err != nil {
		return err
	}
	fmt.Printf("   web-7  await exited with 0, %d ms after its sidecar resumed\n", took.Milliseconds())
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	printStep("web-8 is created with when-full: wait, and deleted while it waits. Its sidecar leaves the line.")
	if err := s.wantWaiting(ctx, "web-8", "1st"); err != nil {
		return err
	}
	if err := s.wantTokensAndLine(ctx, 0, 3, 1); err != nil {
		return err
	}
	if err := s.wantEnd("web-8"); err != nil {
		return err
	}
	text, err := s.pods["web-8"].wantLog(ctx, "left the line")
	if err != nil {
		return err
	}
	fmt.Printf("          its sidecar logged: %s\n", text)
	return s.wantTokens(ctx, 0, 3)
}

// wantWaiting creates a pod, which must be admitted without a token. It starts the pod's
// sidecar, which must take that place in line, and its await.
func (s *setup) wantWaiting(ctx context.Context, name, place string) error {
	a, err := s.create(name, "wait")
	if err != nil {
		return err
	}
	p, err := newPod(name, a)
	if err != nil {
		return fmt.Errorf("%s was not admitted: %+v: %w", name, *a, err)
	}
	if !a.Allowed || len(a.Warnings) != 1 || p.token != p.uid || len(p.patch) != 1 {
		return fmt.Errorf("%s was not admitted with a warning, to wait for a token: %+v, patch %s", name, *a, a.Patch)
	}
	fmt.Printf("   %s  admitted without a token, patched (POD_UID is %s):\n", name, p.token)
	p.printPatch()
	fmt.Printf("          warning: %s\n", a.Warnings[0])
	if err := s.startSidecar(p); err != nil {
		return err
	}
	text, err := p.wantLog(ctx, "waiting for a token of shop/web: 3 of 3 in use, "+place+" in line, ")
	if err != nil {
		return err
	}
	fmt.Printf("          its sidecar logs: %s\n", text)
	return s.startAwait(p)
}

// wantHeldBack fails if the pod's await has ended.
func (p *pod) wantHeldBack() error {
	if p.await.ended() {
		return fmt.Errorf("the await of %s ended without a token: %s", p.name, p.await.log.String())
	}
	return nil
}

// wantHolding waits until a pod's await has exited with 0, and returns the time from
// start to then.
func (s *setup) wantHolding(ctx context.Context, p *pod, start time.Time) (time.Duration, error) {
	err := poll(ctx, "the await of "+p.name+" does not end", func() error {
		if !p.await.ended() {
			return errors.New("its log: " + p.await.log.String())
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if code := p.await.cmd.ProcessState.ExitCode(); code != 0 {
		return 0, fmt.Errorf("the await of %s ended with %d: %s", p.name, code, p.await.log.String())
	}
	if c, err := s.queue.contents(); err != nil || !c.isUsed(p.token) {
		return 0, fmt.Errorf("the token of %s is not in flight: %v, %v", p.name, c.inflight, err)
	}
	return p.await.endedAt.Sub(start), nil
}
