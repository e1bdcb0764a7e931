// demo shows the main job of at-least-semaphore-pod-hook, start to end, with nothing installed: the real program
// as processes, a throw-away certificate, AdmissionReviews as a real API server sent them, over TLS and
// HTTP/2; only Redis is an embedded look-alike, unless there are to be Sentinels.
//
//	demo [flags] story   tells a story and checks each step; exits 0 only if every step went as told
//	demo [flags] run     starts the same set-up and stays up until it is interrupted
//
// With -etcd FILE, the lock is in a real etcd, and with -sentinels FILE, the tokens are in a real Redis with replicas and Sentinels;
// they are started from that file.
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	defer stop()
	program := flag.String("program", "bin/at-least-semaphore-pod-hook", "the program's file")
	etcd := flag.String("etcd", "", "etcd's file; none for the redlock")
	sentinels := flag.String("sentinels", "", "redis-server's file, for a Redis with Sentinels; none for the embedded one")
	flag.Parse()
	options := setupOptions{program: *program, sentinels: *sentinels, etcd: *etcd}
	var err error
	switch {
	case flag.NArg() == 1 && flag.Arg(0) == "story":
		options.heartbeatSeconds, options.staleSeconds = 1, 2
		err = withSetup(ctx, options, tell)
	case flag.NArg() == 1 && flag.Arg(0) == "run":
		options.heartbeatSeconds, options.staleSeconds, options.verbose = 30, 120, true
		err = withSetup(ctx, options, stay)
	default:
		err = errors.New("usage: demo [-program FILE] [-sentinels FILE] [-etcd FILE] story|run")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
