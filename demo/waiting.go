package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// storyOfWaiting is the part about pods that wait for a token. web-3, web-4 and web-5
// have one before it.
func (s *setup) storyOfWaiting(ctx context.Context) error {
	s.tell("Two pods come that may wait. They are admitted without a token, and their sidecars stand in line.")
	if _, err := s.wantWaiting(ctx, "web-6", "3 of 3 in use, 1st in line, "); err != nil {
		return err
	}
	text, err := s.wantWaiting(ctx, "web-7", "3 of 3 in use, 2nd in line, ")
	if err != nil {
		return err
	}
	six, seven := s.pods["web-6"], s.pods["web-7"]
	text, _, _ = strings.Cut(text, "; in use by ")
	if err := s.wantTokens(ctx, "web-6, web-7 admitted; web-7 logs: "+text, tokens{0, 3, 2}); err != nil {
		return err
	}

	s.tell("web-3 ends. The first in line gets its token, and starts its app. The second moves up.")
	for _, p := range []*pod{six, seven} {
		if err := p.wantHeldBack(); err != nil {
			return err
		}
	}
	start := time.Now()
	if err := s.end("web-3"); err != nil {
		return err
	}
	took, err := s.wantHolding(ctx, six, start)
	if err != nil {
		return err
	}
	if c, err := s.queue.contents(); err != nil || !slices.Equal(c.line, []string{seven.token}) {
		return fmt.Errorf("web-7 is not alone in line: %q, %v", c.line, err)
	}
	if err := seven.wantHeldBack(); err != nil {
		return err
	}
	text = fmt.Sprintf("web-6 starts %d ms after the SIGTERM of web-3; web-7 is 1st in line", took.Milliseconds())
	if err := s.wantTokens(ctx, text, tokens{0, 3, 1}); err != nil {
		return err
	}

	s.tell("web-4 ends while the sidecar of web-7 is paused. The token is kept for web-7: no pod overtakes it.")
	if err := seven.sidecar.pause(ctx); err != nil {
		return err
	}
	if err := s.end("web-4"); err != nil {
		return err
	}
	err = s.wantRefused(ctx, "web-8", tokens{1, 2, 1}, "has 2 of 3 tokens in use", "; 1 waiting in line")
	if err != nil {
		return err
	}
	start = time.Now()
	if err := seven.sidecar.resume(); err != nil {
		return err
	}
	if took, err = s.wantHolding(ctx, seven, start); err != nil {
		return err
	}
	text = fmt.Sprintf("web-7 starts %d ms after its sidecar resumed", took.Milliseconds())
	if err := s.wantTokens(ctx, text, tokens{0, 3, 0}); err != nil {
		return err
	}

	s.tell("web-8 comes again, may wait now, and is deleted while it waits. Its sidecar leaves the line.")
	if _, err := s.wantWaiting(ctx, "web-8", "3 of 3 in use, 1st in line, "); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, "", tokens{0, 3, 1}); err != nil {
		return err
	}
	if err := s.end("web-8"); err != nil {
		return err
	}
	if text, err = s.pods["web-8"].wantLog(ctx, "left the line"); err != nil {
		return err
	}
	return s.wantTokens(ctx, "web-8 admitted, and logs: "+text, tokens{0, 3, 0})
}

// wantWaiting creates a pod, which must be admitted without a token. It starts the pod's
// sidecar, whose log must say why it waits, with all texts in more, and its await. It
// returns what the sidecar logs.
func (s *setup) wantWaiting(ctx context.Context, name, why string, more ...string) (text string, err error) {
	a, err := s.create(name, "wait")
	if err != nil {
		return "", err
	}
	p, err := newPod(name, a)
	if err != nil {
		return "", fmt.Errorf("%s was not admitted: %+v: %w", name, *a, err)
	}
	if !a.Allowed || len(a.Warnings) != 1 || p.token != p.uid || len(p.patch) != 1 {
		return "", fmt.Errorf("%s was not admitted with a warning, to wait for a token: %+v, patch %s", name, *a, a.Patch)
	}
	s.detail("%s got no token; its POD_UID is %s", name, p.token)
	s.detailPatch(p)
	s.detail("warning: %s", a.Warnings[0])
	if err := s.startSidecar(p); err != nil {
		return "", err
	}
	if text, err = p.wantLog(ctx, "waiting for a token of shop/web: "+why); err != nil {
		return "", err
	}
	for _, want := range more {
		if !strings.Contains(text, want) {
			return "", fmt.Errorf("the sidecar of %s logs no %q: %q", name, want, text)
		}
	}
	return text, s.startAwait(p)
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
