// demo shows the main job of at-least-semaphore-pod-hook, start to end, with nothing installed: the real program
// as processes, a throw-away certificate, AdmissionReviews as a real API server sent them, over TLS and
// HTTP/2; only Redis is an embedded look-alike.
//
//	demo -program FILE story   tells a story and checks each step; exits 0 only if every step went as told
//	demo -program FILE run     starts the same set-up and stays up until it is interrupted
//
// It is run from the project's folder, by "make demo" and "make run", and leaves no process behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer stop()
	program := flag.String("program", "bin/at-least-semaphore-pod-hook", "the program's file")
	flag.Parse()
	var err error
	switch {
	case flag.NArg() == 1 && flag.Arg(0) == "story":
		err = withSetup(ctx, setupOptions{program: *program, heartbeatSeconds: 1, staleSeconds: 2}, tell)
	case flag.NArg() == 1 && flag.Arg(0) == "run":
		err = withSetup(ctx, setupOptions{program: *program, heartbeatSeconds: 30, staleSeconds: 120, verbose: true}, stay)
	default:
		err = errors.New("usage: demo [-program FILE] story|run")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
