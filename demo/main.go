// demo shows the main job of at-least-semaphore-pod-hook from start to end. It needs
// nothing installed. It runs the real program as processes, with a throw-away
// certificate, and sends AdmissionReviews of a real API server over TLS and HTTP/2. Only
// Redis is an embedded look-alike, unless -sentinels is given.
//
//	demo [flags] story   tells a story in 40 lines, and fails unless every step succeeds
//	demo [flags] run     starts the same set-up and keeps it up until it is interrupted
//
// On a terminal, the story has colours, unless NO_COLOR is set, and time to read. With -v,
// it also shows flags, patches and outputs.
//
// With -etcd FILE, a real etcd holds the lock. With -sentinels FILE, a real Redis with
// replicas and Sentinels holds the tokens. The demo starts them from that file. "make
// demo" and "make run" run it from the project's folder. It leaves no process behind.
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
	ctx, stop := signal.NotifyContext(context.Background(),
		os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer stop()
	// The embedded Redis may write to a connection that a client has closed. And without a
	// reader, the demo still ends in order.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	program := flag.String("program", "bin/at-least-semaphore-pod-hook", "the program's file")
	etcd := flag.String("etcd", "", "etcd's file; none for the redlock")
	sentinels := flag.String("sentinels", "", "redis-server's file, for Sentinels; none for the embedded Redis")
	details := flag.Bool("v", false, "show also flags, patches and outputs of the story")
	flag.Parse()
	options := setupOptions{program: *program, sentinels: *sentinels, etcd: *etcd}
	var err error
	switch {
	case flag.NArg() == 1 && flag.Arg(0) == "story":
		options.heartbeatSeconds, options.staleSeconds = 1, 2
		options.details, options.terminal, options.colours = *details, isTerminal(), hasColours()
		err = withSetup(ctx, options, runStory)
	case flag.NArg() == 1 && flag.Arg(0) == "run":
		options.heartbeatSeconds, options.staleSeconds, options.verbose = 30, 120, true
		err = withSetup(ctx, options, stay)
	default:
		err = errors.New("usage: demo [-v] [-program FILE] [-sentinels FILE] [-etcd FILE] story|run")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
