package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// storyOfOperator is the part about the mode "status": the operator pauses the semaphore,
// raises its length, and looks. web-6, web-7 and another pod have a token before it.
func (s *setup) storyOfOperator(ctx context.Context) error {
	s.tell("The operator pauses the semaphore. All pods run on; web-6 ends, and no pod gets its token.")
	const note = ": the mail server moves; "
	paused := []string{"length in force: paused until "}
	err := s.wantStatus(ctx, paused, "pause", "shop/web", "--for=30m", "--note=the mail server moves", "--yes")
	if err != nil {
		return err
	}
	if err := s.end("web-6"); err != nil {
		return err
	}
	if err := s.wantRefused(ctx, "web-10", tokens{0, 2, 0}, "is paused until ", note+"2 in use"); err != nil {
		return err
	}
	if _, err := s.wantWaiting(ctx, "web-11", "paused until ", note+"2 in use, 1st in line, "); err != nil {
		return err
	}
	if _, err := s.wantWaiting(ctx, "web-12", "paused until ", note+"2 in use, 2nd in line, "); err != nil {
		return err
	}
	if err := s.wantTokens(ctx, "web-11, web-12 admitted", tokens{0, 2, 2}); err != nil {
		return err
	}

	s.tell("The operator ends the pause. The first in line, web-11, gets the token at once.")
	err = s.wantHoldingAfter(ctx, "web-11", tokens{0, 3, 1}, []string{"length in force: 3, as pods ask for"},
		"set", "shop/web", "--clear", "--yes")
	if err != nil {
		return err
	}

	s.tell("The operator raises the length to 4 for two hours. web-12, which asks for 3, gets a token at once.")
	err = s.wantHoldingAfter(ctx, "web-12", tokens{0, 4, 0}, []string{"length in force: 4 until "},
		"set", "shop/web", "length=4", "--for=2h", "--yes")
	if err != nil {
		return err
	}

	s.tell("The operator asks who holds the tokens.")
	if _, err := s.runStatus(ctx, []string{"web "}, "shop"); err != nil {
		return err
	}
	var holders []string
	for name, p := range s.pods {
		if !p.sidecar.ended() {
			holders = append(holders, "\n"+name+" ")
		}
	}
	out, err := s.runStatus(ctx, holders, "shop/web")
	if err != nil {
		return err
	}
	s.show("$ " + shownStatus("shop/web"))
	for line := range strings.Lines(out) {
		if line = strings.TrimSpace(line); line != "" {
			s.show(line)
		}
	}
	return nil
}

// wantHoldingAfter runs "status", whose output must contain all texts. Then a pod in line
// gets its token, and these counts are left.
func (s *setup) wantHoldingAfter(ctx context.Context, name string, left tokens, all []string, args ...string) error {
	p := s.pods[name]
	if err := p.wantHeldBack(); err != nil {
		return err
	}
	start := time.Now()
	if err := s.wantStatus(ctx, all, args...); err != nil {
		return err
	}
	took, err := s.wantHolding(ctx, p, start)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("%s starts %d ms after the start of this command", name, took.Milliseconds())
	return s.wantTokens(ctx, text, left)
}

// wantStatus runs "status", and shows the command. Its output must contain all texts.
func (s *setup) wantStatus(ctx context.Context, all []string, args ...string) error {
	s.show("$ " + shownStatus(args...))
	out, err := s.runStatus(ctx, all, args...)
	for line := range strings.Lines(out) {
		s.detail("%s", strings.TrimRight(line, "\n"))
	}
	return err
}

// shownStatus returns a command as a person types it.
func shownStatus(args ...string) string {
	shown := "at-least-semaphore-pod-hook status"
	for _, a := range args {
		if flag, value, _ := strings.Cut(a, "="); strings.Contains(value, " ") {
			a = fmt.Sprintf("%s=%q", flag, value)
		}
		shown += " " + a
	}
	return shown
}

// runStatus runs "status", and returns its output, which must contain all texts.
func (s *setup) runStatus(ctx context.Context, all []string, args ...string) (string, error) {
	settings := []string{"status", "--queue-redis-address=" + s.queue.address(),
		"--heartbeat-interval-seconds=" + strconv.Itoa(s.options.heartbeatSeconds),
		"--stale-threshold-seconds=" + strconv.Itoa(s.options.staleSeconds)}
	out, err := exec.CommandContext(ctx, s.options.program, append(settings, args...)...).Output()
	if err != nil {
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			out = append(out, exit.Stderr...)
		}
		return "", fmt.Errorf("%s: %w: %s", shownStatus(args...), err, out)
	}
	for _, text := range all {
		if !strings.Contains(string(out), text) {
			return "", fmt.Errorf("%s does not show %q:\n%s", shownStatus(args...), text, out)
		}
	}
	return string(out), nil
}
