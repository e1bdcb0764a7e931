package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

const (
	queueKey    = "queue/{shop/web}"
	inflightKey = "inflight/{shop/web}"
)

// pod is an admitted pod, of which only the sidecar runs.
type pod struct {
	name, token string
	sidecar     *process
}

// tell tells the story; its error is the step that did not go as told.
func tell(ctx context.Context, s *setup) error {
	lock := "Redlock"
	if s.options.etcd != "" {
		lock = "etcd"
	}
	fmt.Printf("The semaphore shop/web has length 3. A heartbeat every %d s; stale after %d s; the lock is %s.\n",
		s.options.heartbeatSeconds, s.options.staleSeconds, lock)

	say("Three pods are created: each is admitted with a token, and gets a sidecar by a JSON patch.")
	var pods []*pod
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		p, err := s.wantAdmitted(ctx, name)
		if err != nil {
			return err
		}
		pods = append(pods, p)
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	say("A fourth pod is created: it is refused.")
	if err := s.wantRefused("web-4"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	say("web-1 ends: its sidecar gets SIGTERM and gives the token back.")
	if code, err := pods[0].sidecar.end(syscall.SIGTERM); err != nil || code != 0 {
		return fmt.Errorf("the sidecar of web-1 ended with %d, %v:\n%s", code, err, pods[0].sidecar.log.String())
	}
	fmt.Println("   web-1  sidecar exited with 0")
	if err := s.wantTokens(ctx, 1, 2); err != nil {
		return err
	}

	say("The fourth pod is tried again: it is admitted.")
	if _, err := s.wantAdmitted(ctx, "web-4"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	say("The node of web-2 dies: its sidecar gets SIGKILL. Its token counts as used until it is stale.")
	if _, err := pods[1].sidecar.end(syscall.SIGKILL); err != nil {
		return err
	}
	killed := time.Now()
	if err := s.wantRefused("web-5"); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	say("The fifth pod is tried again and again: once the token is stale it is reclaimed, and web-5 admitted.")
	err := poll(ctx, "web-5 is not admitted", func() error {
		_, err := s.wantAdmitted(ctx, "web-5")
		return err
	})
	if err != nil {
		return err
	}
	fmt.Printf("   that was %.1f s after the kill\n", time.Since(killed).Seconds())
	if inflight, err := s.redis.SortedSet(inflightKey); err != nil || inflight[pods[1].token] != 0 {
		return fmt.Errorf("the token of web-2 is still in flight: %v, %v", inflight, err)
	}
	if err := s.wantTokens(ctx, 0, 3); err != nil {
		return err
	}

	say("All pods end, and the webhook.")
	for _, p := range s.sidecars {
		select {
		case <-p.done:
			continue
		default:
		}
		if code, err := p.end(syscall.SIGTERM); err != nil || code != 0 {
			return fmt.Errorf("a sidecar ended with %d, %v:\n%s", code, err, p.log.String())
		}
	}
	if code, err := s.webhook.end(syscall.SIGTERM); err != nil || code != 0 {
		return fmt.Errorf("the webhook ended with %d, %v:\n%s", code, err, s.webhook.log.String())
	}
	if err := s.wantTokens(ctx, 3, 0); err != nil {
		return err
	}
	fmt.Println("\nEverything went as told.")
	return nil
}

var step int

func say(text string) {
	step++
	fmt.Printf("\n%d. %s\n", step, text)
}

// wantTokens waits for the numbers of free and of used tokens and prints them.
func (s *setup) wantTokens(ctx context.Context, queue, inflight int) error {
	err := poll(ctx, "the tokens are not as told", func() error {
		free, used := 0, 0
		if list, err := s.redis.List(queueKey); err == nil {
			free = len(list)
		}
		if set, err := s.redis.SortedSet(inflightKey); err == nil {
			used = len(set)
		}
		if free != queue || used != inflight {
			return fmt.Errorf("queue %d, inflight %d; to be %d, %d", free, used, queue, inflight)
		}
		return nil
	})
	if err == nil {
		fmt.Printf("   => queue %d, inflight %d\n", queue, inflight)
	}
	return err
}

// wantAdmitted creates a pod that must be admitted, prints the patch, and starts the sidecar that the patch injects.
func (s *setup) wantAdmitted(ctx context.Context, name string) (*pod, error) {
	a, err := s.create(name)
	if err != nil {
		return nil, err
	}
	if !a.Allowed {
		return nil, fmt.Errorf("%s was not admitted: %d %s", name, a.Status.Code, a.Status.Message)
	}
	var patch []patchOperation
	if err := json.Unmarshal(a.Patch, &patch); err != nil {
		return nil, err
	}
	args, err := sidecarArgs(patch)
	if err != nil {
		return nil, err
	}
	p := &pod{name: name, token: args[len(args)-1]}
	fmt.Printf("   %s  admitted with token %s, patched:\n", name, p.token)
	for _, o := range patch {
		value := string(o.Value)
		if strings.HasPrefix(value, "[") {
			value = "sidecar, args " + strings.Join(args[1:], " ")
		}
		fmt.Printf("          %s %s: %s\n", o.Op, o.Path, value)
	}
	if p.sidecar, err = s.start(s.options.program, args...); err != nil {
		return nil, fmt.Errorf("start the sidecar of %s: %w", name, err)
	}
	s.sidecars = append(s.sidecars, p.sidecar)
	return p, poll(ctx, "the sidecar of "+name+" does not hold its token", func() error {
		if log := p.sidecar.log.String(); !strings.Contains(log, "holding the token") {
			return errors.New("it says: " + log)
		}
		return nil
	})
}

// wantRefused creates a pod that must be refused, and prints what its user sees.
func (s *setup) wantRefused(name string) error {
	a, err := s.create(name)
	if err != nil {
		return err
	}
	const want = "no semaphore available: shop/web has 3 of 3 tokens in use"
	if a.Allowed || a.Status.Code != 429 || a.Status.Message != want {
		return fmt.Errorf("%s was not refused with 429 %q: %+v", name, want, *a)
	}
	fmt.Printf("   %s  refused: admission webhook \"at-least-semaphore-pod-hook.kaidotio.github.io\" denied the request: %s\n", name, want)
	return nil
}

// stay prints how to use the set-up and the tokens whenever they change, until it is interrupted.
func stay(ctx context.Context, s *setup) error {
	body, err := newReview("web-1")
	if err != nil {
		return err
	}
	reviewFile := s.dir + "/review.json"
	if err := os.WriteFile(reviewFile, body, 0o644); err != nil {
		return err
	}
	fmt.Printf(`The webhook is up, with an embedded Redis at %s. Ask for a token of shop/web (length 3):

  curl --cacert %s -H 'Content-Type: application/json' --data @%s '%s'

Hold the token of the answer's patch, and give it back with Ctrl-C:

  %s sidecar --queue-redis-address=%s shop/web TOKEN

Ctrl-C here ends it all.

`, s.redis.Addr(), s.caFile, reviewFile, s.webhookURL, s.options.program, s.redis.Addr())
	last := ""
	for {
		queue, _ := s.redis.List(queueKey)
		inflight, _ := s.redis.SortedSet(inflightKey)
		if now := fmt.Sprintf("=> queue %d, inflight %d", len(queue), len(inflight)); now != last {
			fmt.Println(now)
			last = now
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
