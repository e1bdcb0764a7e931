package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const allInUse = "3 of 3 tokens in use"

// runStory runs the story. It returns an error for the first step that fails.
func runStory(ctx context.Context, s *setup) error {
	lock := "Redlock"
	if s.options.etcd != "" {
		lock = "etcd"
	}
	fmt.Printf("The semaphore shop/web has length 3. A heartbeat every %d s; stale after %d s; the lock is %s.\n",
		s.options.heartbeatSeconds, s.options.staleSeconds, lock)

	printStep("Three pods are created. The webhook admits each with a token and adds a sidecar by a JSON patch.")
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		if err := s.wantAdmitted(ctx, name); err != nil {
			return err
		}
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	printStep("A fourth pod is created. The webhook refuses it.")
	if err := s.wantRefused("web-4", allInUse); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	printStep("web-1 ends. Its sidecar gets SIGTERM and gives the token back.")
	if err := s.wantEnd("web-1"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 1, 2); err != nil {
		return err
	}

	printStep("The fourth pod is tried again. The webhook admits it.")
	if err := s.wantAdmitted(ctx, "web-4"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	printStep("The node of web-2 dies: its sidecar gets SIGKILL. Its token counts as used until it is stale.")
	if _, err := s.pods["web-2"].sidecar.end(syscall.SIGKILL); err != nil {
		return err
	}
	killed := time.Now()
	if err := s.wantRefused("web-5", allInUse); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	printStep("The fifth pod is retried. Once the token is stale, the webhook reclaims it and admits web-5.")
	err := poll(ctx, "web-5 is not admitted", func() error { return s.wantAdmitted(ctx, "web-5") })
	if err != nil {
		return err
	}
	fmt.Printf("   %.1f s after the kill\n", time.Since(killed).Seconds())
	if c, err := s.queue.contents(); err != nil || c.isUsed(s.pods["web-2"].uid) {
		return fmt.Errorf("the token of web-2 is still in flight: %v, %v", c.inflight, err)
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
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

	printStep("The operator asks who holds the tokens.")
	if err := s.wantStatus(ctx, "shop", "web "); err != nil {
		return err
	}
	var holders []string
	for name, p := range s.pods {
		if !p.sidecar.ended() {
			holders = append(holders, "\n"+name+" ")
		}
	}
	if err := s.wantStatus(ctx, "shop/web", holders...); err != nil {
		return err
	}

	printStep("All pods end, then the webhook.")
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
	if err := s.wantTokens(ctx, 3, 0); err != nil {
		return err
	}
	fmt.Println("\nEvery step succeeded.")
	return nil
}

var step int

func printStep(text string) {
	step++
	fmt.Printf("\n%d. %s\n", step, text)
}

// tokens counts the free tokens, the tokens in use, and the pods that wait in line.
type tokens struct{ queue, inflight, line int }

func (s *setup) tokens() (tokens, error) {
	c, err := s.queue.contents()
	return tokens{c.free, len(c.inflight), len(c.line)}, err
}

func (t tokens) String() string {
	text := fmt.Sprintf("queue %d, inflight %d", t.queue, t.inflight)
	if t.line > 0 {
		text += fmt.Sprintf(", in line %d", t.line)
	}
	return text
}

// wantTokens waits for these counts of free and used tokens, and for an empty line.
func (s *setup) wantTokens(ctx context.Context, queue, inflight int) error {
	return s.wantTokensAndLine(ctx, queue, inflight, 0)
}

// wantTokensAndLine waits for these counts and prints them.
func (s *setup) wantTokensAndLine(ctx context.Context, queue, inflight, line int) error {
	want := tokens{queue, inflight, line}
	err := poll(ctx, "the tokens are not as expected", func() error {
		if t, err := s.tokens(); err != nil || t != want {
			return fmt.Errorf("%s, %v; want %s", t, err, want)
		}
		return nil
	})
	if err == nil {
		fmt.Println("   =>", want)
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
	fmt.Printf("   %s  admitted with token %s, patched:\n", name, p.token)
	p.printPatch()
	if err := s.startSidecar(p); err != nil {
		return err
	}
	if _, err := p.wantLog(ctx, "holding the token"); err != nil {
		return err
	}
	return s.startAwait(p)
}

// wantRefused creates a pod, which must be refused with the text inUse. It prints the
// message to the user, which must contain all texts in more.
func (s *setup) wantRefused(name, inUse string, more ...string) error {
	a, err := s.create(name, "")
	if err != nil {
		return err
	}
	want := "no semaphore available: shop/web has " + inUse
	message := a.Status.Message
	if a.Allowed || a.Status.Code != 429 || !strings.HasPrefix(message, want) {
		return fmt.Errorf("%s was not refused with 429 %q: %+v", name, want, *a)
	}
	for _, text := range append(more, ", by web-") {
		if !strings.Contains(message, text) {
			return fmt.Errorf("%s was refused without %q: %q", name, text, message)
		}
	}
	fmt.Printf("   %s  refused: admission webhook \"at-least-semaphore-pod-hook.kaidotio.github.io\" "+
		"denied the request: %s\n", name, message)
	return nil
}

// wantStatus prints the output of "status", which must contain all texts.
func (s *setup) wantStatus(ctx context.Context, what string, all ...string) error {
	args := []string{"status", "--queue-redis-address=" + s.queue.address(),
		"--heartbeat-interval-seconds=" + strconv.Itoa(s.options.heartbeatSeconds),
		"--stale-threshold-seconds=" + strconv.Itoa(s.options.staleSeconds), what}
	out, err := exec.CommandContext(ctx, s.options.program, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("status %s: %w: %s", what, err, out)
	}
	for _, text := range all {
		if !strings.Contains(string(out), text) {
			return fmt.Errorf("status %s does not show %q:\n%s", what, text, out)
		}
	}
	indented := strings.TrimRight(strings.ReplaceAll(string(out), "\n", "\n   "), " ")
	fmt.Printf("   $ at-least-semaphore-pod-hook status %s\n   %s\n", what, indented)
	return nil
}

// stay prints how to use the set-up, and prints the tokens when they change, until it is
// interrupted.
func stay(ctx context.Context, s *setup) error {
	body, err := newReview("web-1", "")
	if err != nil {
		return err
	}
	reviewFile := s.dir + "/review.json"
	if err := os.WriteFile(reviewFile, body, 0o644); err != nil {
		return err
	}
	fmt.Printf(`The webhook is up, with Redis at %s. Ask for a token of shop/web (length 3):

  curl --cacert %s -H 'Content-Type: application/json' --data @%s '%s'

Hold the token of the answer's patch, and give it back with Ctrl-C:

  %s sidecar --queue-redis-address=%s shop/web TOKEN

Or wait in line for a token, like the sidecar of a pod with when-full: wait. Run it four times: the fourth waits.

  %s sidecar --queue-redis-address=%s %s --length=3 shop/web $(cat /proc/sys/kernel/random/uuid)

Ctrl-C here stops everything.

`, s.queue.address(), s.caFile, reviewFile, s.webhookURL, s.options.program, s.queue.address(),
		s.options.program, s.queue.address(), strings.Join(s.lock, " "))
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
