package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

const allInUse = "has 3 of 3 tokens in use"

// runStory runs the story. It returns an error for the first step that fails.
func runStory(ctx context.Context, s *setup) error {
	lock := "Redlock"
	if s.options.etcd != "" {
		lock = "etcd"
	}
	fmt.Printf("The semaphore shop/web has 3 tokens. Sidecars beat every %d s; a token is stale after %d s. "+
		"The lock is %s.\n", s.options.heartbeatSeconds, s.options.staleSeconds, lock)

	s.tell("Four pods are created. The webhook takes a token for three, adds sidecars, and refuses the fourth.")
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		if err := s.wantAdmitted(ctx, name); err != nil {
			return err
		}
	}
	if err := s.wantTokens(ctx, "web-1, web-2, web-3 admitted", tokens{0, 3, 0}); err != nil {
		return err
	}
	if err := s.wantRefused(ctx, "web-4", tokens{0, 3, 0}, allInUse); err != nil {
		return err
	}

	s.tell("web-1 ends. Its sidecar gives the token back, and web-4, tried again, gets it.")
	if err := s.end("web-1"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, "", tokens{1, 2, 0}); err != nil {
		return err
	}
	if err := s.wantAdmitted(ctx, "web-4"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, "web-1 ended, 1 free, 2 in use; web-4 admitted", tokens{0, 3, 0}); err != nil {
		return err
	}

	s.tell("The node of web-2 dies. Its token counts as used until it is stale. Then web-5 gets one.")
	if _, err := s.pods["web-2"].sidecar.end(syscall.SIGKILL); err != nil {
		return err
	}
	killed := time.Now()
	if _, err := s.refuse("web-5", allInUse); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, "", tokens{0, 3, 0}); err != nil {
		return err
	}
	err := poll(ctx, "web-5 is not admitted", func() error { return s.wantAdmitted(ctx, "web-5") })
	if err != nil {
		return err
	}
	text := fmt.Sprintf("web-5 refused, and admitted %.1f s after the kill", time.Since(killed).Seconds())
	if c, err := s.queue.contents(); err != nil || c.isUsed(s.pods["web-2"].uid) {
		return fmt.Errorf("the token of web-2 is still in flight: %v, %v", c.inflight, err)
	}
	if err := s.wantTokens(ctx, text, tokens{0, 3, 0}); err != nil {
		return err
	}

	if err := s.storyOfWaiting(ctx); err != nil {
		return err
	}
	if q, ok := s.queue.(*sentinelQueue); ok {
		if err := s.storyOfFailover(ctx, q); err != nil {
			return err
		}
	}
	if err := s.storyOfOperator(ctx); err != nil {
		return err
	}

	for name, p := range s.pods {
		if p.sidecar.ended() {
			continue
		}
		if err := s.end(name); err != nil {
			return err
		}
	}
	s.client.CloseIdleConnections() // or the webhook waits for them
	if code, err := s.webhook.end(syscall.SIGTERM); err != nil || code != 0 {
		return fmt.Errorf("the webhook ended with %d, %v:\n%s", code, err, s.webhook.log.String())
	}
	all := tokens{4, 0, 0}
	if err := s.wantTokens(ctx, "", all); err != nil {
		return err
	}
	fmt.Println(s.paint(green, "Every step succeeded.") + " All pods have ended, then the webhook" +
		s.paint(cyan, " => "+all.String()))
	fmt.Println("Next: make run, to try it by hand; make demo V=-v, for flags and patches; docs/install.md, for a cluster")
	return nil
}

// tokens counts the free tokens, the tokens in use, and the pods that wait in line.
type tokens struct{ queue, inflight, line int }

func (s *setup) tokens() (tokens, error) {
	c, err := s.queue.contents()
	return tokens{c.free, len(c.inflight), len(c.line)}, err
}

func (t tokens) String() string {
	text := fmt.Sprintf("%d free, %d in use", t.queue, t.inflight)
	if t.line > 0 {
		text += fmt.Sprintf(", %d in line", t.line)
	}
	return text
}

// wantTokens waits for these counts, and shows them behind a piece of evidence, if there is
// one.
func (s *setup) wantTokens(ctx context.Context, evidence string, want tokens) error {
	err := poll(ctx, "the tokens are not as expected", func() error {
		if t, err := s.tokens(); err != nil || t != want {
			return fmt.Errorf("%s, %v; want %s", t, err, want)
		}
		return nil
	})
	if err == nil && evidence != "" {
		s.show(evidence + s.paint(cyan, " => "+want.String()))
	}
	return err
}

// wantAdmitted creates a pod, which must be admitted with a token, and starts its
// sidecar.
func (s *setup) wantAdmitted(ctx context.Context, name string) error {
	a, err := s.create(name, "")
	if err != nil {
		return err
	}
	if !a.Allowed {
		return fmt.Errorf("%s was not admitted: %d %s", name, a.Status.Code, a.Status.Message)
	}
	p, err := newPod(name, a)
	if err != nil {
		return err
	}
	s.detail("%s got the token %s", name, p.token)
	s.detailPatch(p)
	if err := s.startSidecar(p); err != nil {
		return err
	}
	if _, err := p.wantLog(ctx, "holding the token"); err != nil {
		return err
	}
	return s.startAwait(p)
}

// noneAvailable precedes the reason of each refusal.
const noneAvailable = "no semaphore available: "

// refuse creates a pod, which must be refused with the text why, and returns that to its
// end. The message to the user must contain all texts in more.
func (s *setup) refuse(name, why string, more ...string) (reason string, err error) {
	a, err := s.create(name, "")
	if err != nil {
		return "", err
	}
	want := noneAvailable + "shop/web " + why
	message := a.Status.Message
	if a.Allowed || a.Status.Code != 429 || !strings.HasPrefix(message, want) {
		return "", fmt.Errorf("%s was not refused with 429 %q: %+v", name, want, *a)
	}
	for _, text := range append(more, ", by web-") {
		if !strings.Contains(message, text) {
			return "", fmt.Errorf("%s was refused without %q: %q", name, text, message)
		}
	}
	s.detail("%s: admission webhook %q denied the request: %s", name, strings.TrimSuffix(annotationPrefix, "/"), message)
	return strings.TrimPrefix(message, noneAvailable), nil
}

// wantRefused is refuse, which must leave these counts, and shows the reason.
func (s *setup) wantRefused(ctx context.Context, name string, left tokens, why string, more ...string) error {
	reason, err := s.refuse(name, why, more...)
	if err != nil {
		return err
	}
	return s.wantTokens(ctx, name+" refused: "+reason, left)
}

// stay prints what to try with the set-up, and prints the tokens when they change, until
// it is interrupted.
func stay(ctx context.Context, s *setup) error {
	body, err := newReview("web-1", "")
	if err != nil {
		return err
	}
	reviewFile := s.dir + "/review.json"
	if err := os.WriteFile(reviewFile, body, 0o644); err != nil {
		return err
	}
	queue := "--queue-redis-address=" + s.queue.address()
	page, err := freeAddress()
	if err != nil {
		return err
	}
	server, err := s.start(nil, s.options.program, "status", queue, "--port="+page[strings.LastIndex(page, ":")+1:], "serve")
	if err != nil {
		return err
	}
	if err := waitFor(ctx, server, "http://"+page); err != nil {
		return fmt.Errorf("start the page: %w", err)
	}
	fmt.Printf(`The webhook is up, with Redis at %s. Try these in other terminals. Here, the tokens show when they change.

Create a pod of shop/web (length 3): ask for a token, as the API server does.

  curl --cacert %s -H 'Content-Type: application/json' --data @%s '%s'

Hold the token of the answer's patch, and give it back with Ctrl-C:

  %[5]s sidecar %[6]s shop/web TOKEN

Or wait in line for a token, like the sidecar of a pod with when-full: wait. Run it four times: the fourth waits.

  %[5]s sidecar %[6]s %[7]s --length=3 shop/web $(cat /proc/sys/kernel/random/uuid)

See who holds the tokens, and who waits; or in a browser, at http://%[8]s/#shop/web

  %[5]s status %[6]s shop/web

Let no more pods in for five minutes:

  %[5]s status %[6]s pause shop/web --for=5m --yes

Ctrl-C here stops everything.

`, s.queue.address(), s.caFile, reviewFile, s.webhookURL, s.options.program, queue, strings.Join(s.lock, " "), page)
	last := ""
	for {
		if t, err := s.tokens(); err == nil && "=> "+t.String() != last {
			last = "=> " + t.String()
			fmt.Println(last)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-s.webhook.done:
			return errors.New("the webhook has ended")
		case <-ctx.Done():
			return nil
		}
	}
}
