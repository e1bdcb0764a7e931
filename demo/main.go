// demo shows the main job of at-least-semaphore-pod-hook, start to end, with nothing installed: the real program
// as processes, a throw-away certificate, AdmissionReviews as a real API server sent them, over TLS and
// HTTP/2; only Redis is an embedded look-alike.
//
//	demo [flags] story   tells a story and checks each step; exits 0 only if every step went as told
//	demo [flags] run     starts the same set-up and stays up until it is interrupted
//
// With -etcd FILE, the lock is in a real etcd, which is started from that file.
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
	flag.Parse()
	var err error
	switch {
	case flag.NArg() == 1 && flag.Arg(0) == "story":
		err = withSetup(ctx, setupOptions{program: *program, etcd: *etcd, heartbeatSeconds: 1, staleSeconds: 2}, tell)
	case flag.NArg() == 1 && flag.Arg(0) == "run":
		err = withSetup(ctx, setupOptions{program: *program, etcd: *etcd, heartbeatSeconds: 30, staleSeconds: 120, verbose: true}, stay)
	default:
		err = errors.New("usage: demo [-program FILE] [-etcd FILE] story|run")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
