// at-least-semaphore-pod-hook gives annotated Kubernetes pods a counting semaphore: pods
// of a namespace that share a key share N tokens, and a pod's app starts only with a
// token.
//
// One binary has six modes:
//
//   - webhook answers the API server's AdmissionReviews. It takes a token in Redis for an
//     annotated pod, and injects the containers of sidecar and await.
//   - sidecar runs beside the pod's containers. It waits for a token if the pod has none,
//     keeps it alive by heartbeats, and gives it back on SIGTERM or SIGINT.
//   - await is an init container. It holds back the app, and ends when the sidecar holds
//     the token.
//   - gate waits in line for pods that stay unscheduled until they have a token.
//   - setup makes what an installation needs, and keeps it so: certificates, passwords, the
//     secret path, and what a labelled namespace needs.
//   - status prints the holders of the tokens and the waiting pods. By hand, it releases
//     a token, and sets the length of a semaphore for a time.
//
// Settings are flags: see config.go, or run a mode with --help. Secrets, and facts about
// the container, come from the environment:
//
//	REDIS_USERNAME, REDIS_PASSWORD    credentials for all Redis servers; without a name, the default user
//	STATUS_REDIS_USERNAME, STATUS_REDIS_PASSWORD, STATUS_REDIS_PASSWORD_FILE
//	                                  of status: they win over the two above
//	                                  if a password or its file is set
//	REDIS_SENTINEL_USERNAME, REDIS_SENTINEL_PASSWORD
//	                                  credentials for the Sentinels
//	ETCD_USERNAME, ETCD_PASSWORD      credentials for the etcd servers
//	POD_UID, POD_NAME, NODE_NAME      the pod's UID, name and node, in injected containers
//	POD_NAMESPACE                     its namespace, if it shares a semaphore with others
//	SEMAPHORE                         of status: what it shows in the container of a sidecar
//	QUEUE_REDIS_ADDRESS, REDIS_CA_FILE, HEARTBEAT_INTERVAL_SECONDS, STALE_THRESHOLD_SECONDS
//	                                  of status: defaults of the flags with these names, in
//	                                  the containers of webhook, gate and sidecar
//	USER, HOSTNAME                    of status: who sets a length
//	KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT
//	                                  of gate and setup: default of --kubernetes-address
//
// Exit codes: 0 done, 1 failed, 2 wrong mode, flag or value, 143 an await that was
// stopped before the token was held, 75 an await whose pod gave up waiting. A sidecar that
// was stopped ends with 0, whatever it left to go stale.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
)

const usage = `Usage: at-least-semaphore-pod-hook MODE [flags]

Gives annotated Kubernetes pods a counting semaphore.

Modes:
  webhook   answer the API server's AdmissionReviews: take tokens, inject sidecar and await
  sidecar   wait for a pod's token, keep it alive, and give it back on SIGTERM
  await     wait until the sidecar of the pod POD_UID holds its token; log the reason of the wait
  gate      wait in line for the pods with our scheduling gate; lift the gate when a pod has a token
  setup     make what an installation needs: certificates, passwords, users, Secrets of namespaces
  status    print the holders of the tokens and the waiting pods; release a token, or set a length for a time
  version   print the version
  help      print this text

Run a mode with --help for its flags.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, func() { signal.Reset(syscall.SIGINT) }) // a second Ctrl-C ends the process at once
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
	os.Exit(exitCode(err, os.Stderr))
}

// run is the program without its process. It returns when ctx is done and all work has
// ended.
func run(ctx context.Context, args []string, getenv func(string) string,
	stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return &usageError{problems: []string{"no mode given"}, help: usage}
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	switch mode := args[0]; mode {
	case "webhook":
		c, err := parseWebhookConfig(args[1:], getenv)
		if err != nil {
			return printHelp(err, stdout)
		}
		return runWebhook(ctx, c, log)
	case "sidecar":
		c, err := parseSidecarConfig(args[1:], getenv)
		if err != nil {
			return printHelp(err, stdout)
		}
		runSidecar(ctx, c, log)
		return nil
	case "await":
		podUID := getenv("POD_UID")
		if podUID == "" || len(args) > 1 {
			const problem = "await takes no arguments, and asks the sidecar of the pod that POD_UID names"
			return &usageError{problems: []string{problem}, help: usage}
		}
		return runAwait(ctx, podUID, log)
	case "gate":
		c, err := parseGateConfig(args[1:], getenv)
		if err != nil {
			return printHelp(err, stdout)
		}
		return runGate(ctx, c, log)
	case "setup":
		c, err := parseSetupConfig(args[1:], getenv)
		if err != nil {
			return printHelp(err, stdout)
		}
		return runSetup(ctx, c, log)
	case "status":
		c, err := parseStatusConfig(args[1:], getenv)
		if err != nil {
			return printHelp(err, stdout)
		}
		return runStatus(ctx, c, stdin, stdout, log)
	case "version", "--version", "-version":
		fmt.Fprintln(stdout, versionText())
		return nil
	case "help", "--help", "-help", "-h":
		fmt.Fprint(stdout, usage)
		return nil
	default:
		return &usageError{problems: []string{fmt.Sprintf("unknown mode %q", mode)}, help: usage}
	}
}

// printHelp prints the help if err is a *helpRequest. It returns any other error.
func printHelp(err error, stdout io.Writer) error {
	var help *helpRequest
	if errors.As(err, &help) {
		fmt.Fprint(stdout, help.text)
		return nil
	}
	return err
}

// exitStopped is the exit code of an await that was stopped: that of a process that
// SIGTERM ended. It must not be 0, or the kubelet may start the app.
const exitStopped = 128 + int(syscall.SIGTERM)

// exitCode writes err to stderr and returns the exit code for it.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	var wrong *usageError
	if errors.As(err, &wrong) {
		fmt.Fprintf(stderr, "at-least-semaphore-pod-hook: %v\n", wrong)
		if wrong.help != "" {
			fmt.Fprintf(stderr, "\n%s", wrong.help)
		}
		return 2
	}
	slog.New(slog.NewJSONHandler(stderr, nil)).Error("failed", "error", err.Error())
	switch {
	case errors.Is(err, errNotHeld):
		return exitStopped
	case errors.As(err, new(*gaveUpError)):
		return exitGaveUp
	}
	return 1
}

func versionText() string {
	commit := "unknown commit"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = "commit " + s.Value
			}
		}
	}
	return fmt.Sprintf("at-least-semaphore-pod-hook %s (%s, %s)", version, commit, runtime.Version())
}
