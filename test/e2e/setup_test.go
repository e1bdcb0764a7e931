//go:build e2e

// Package e2e tests the webhook as operators install it, on the cluster that KUBECONFIG names. It installs deploy/ with an
// image of its own and short thresholds, and uninstalls it at the end.
//
// Settings, as environment variables:
//
//	PROGRAM     the static binary
//	IMAGE       the name that its image gets; a new one for each build, as nodes keep images
//	LOAD_IMAGE  shell command that makes the image and gets it into the cluster, for example
//	            kind:  docker build -t $IMAGE . && kind load docker-image $IMAGE
//	            k3d:   docker build -t $IMAGE . && k3d image import $IMAGE
//	NODE_SHELL  command that runs a script on the node, for the tests that kill processes, refuse connections (iptables) and read files there, for example
//	            kind:  docker exec kind-control-plane sh -c
//	            k3d:   docker exec k3d-k3s-default-server-0 sh -c
//	NODE_RESTART  shell command that ends COMPONENT (kubelet, containerd, apiserver, scheduler or controller-manager) by SIGNAL
//	            (TERM or KILL) and starts it again, or leaves that to whatever watches over it. The Makefile has that for kind
//	KEEP        if not empty, nothing is uninstalled
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	root = "../.." // of the repository

	hookNamespace = "at-least-semaphore-pod-hook"
	releasedImage = "ghcr.io/kaidotio/at-least-semaphore-pod-hook:v0.1.0"

	heartbeatSeconds = 2
	staleSeconds     = 8

	webhookPassword     = "0123456789abcdef"
	replicationPassword = "00112233445566778899"
	statusPassword      = "99887766554433221100"
	gatePassword        = "55667788990011223344"
)

func TestMain(m *testing.M) {
	code := 1
	if err := install(); err != nil {
		fmt.Fprintln(os.Stderr, "install:", err)
	} else {
		code = m.Run()
	}
	if os.Getenv("KEEP") == "" {
		if err := uninstall(); err != nil {
			fmt.Fprintln(os.Stderr, "uninstall:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// kubectl runs kubectl with an input and returns what it prints; the error has what it complains of.
func kubectl(input string, args ...string) (string, error) {
	out, _, err := kubectlWarned(input, args...)
	return out, err
}

// kubectlWarned is kubectl that also returns what was printed to the standard error, such as warnings.
func kubectlWarned(input string, args ...string) (stdout, stderr string, err error) {
	cmd := exec.Command("kubectl", args...)
	cmd.Stdin = strings.NewReader(input)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), errs.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), errs.String(), nil
}

// hook is kubectl in the webhook's namespace.
func hook(args ...string) (string, error) {
	return kubectl("", append([]string{"-n", hookNamespace}, args...)...)
}

// shell runs a command, for a quarter of an hour at most: an image may have to be built.
func shell(script string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.Dir, cmd.WaitDelay = root, 10*time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return nil
}

// onNode runs a script on the node.
func onNode(script string) error { return errOf(nodeOutput(script)) }

// nodeOutput is onNode that returns what the script prints.
func nodeOutput(script string) (string, error) {
	command := strings.Fields(os.Getenv("NODE_SHELL"))
	if len(command) == 0 {
		return "", errors.New("NODE_SHELL is not set: it is the command that runs a script on the node")
	}
	out, err := exec.Command(command[0], append(command[1:], script)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("on the node: %s: %w: %s", script, err, out)
	}
	return string(out), nil
}

// restartOnNode ends and starts a component of the node, and waits until the node is ready.
func restartOnNode(t *testing.T, component, signal string) {
	t.Helper()
	command := os.Getenv("NODE_RESTART")
	if command == "" {
		t.Fatal("NODE_RESTART is not set: it is the command that restarts a component of the node")
	}
	must(t, shell(fmt.Sprintf("COMPONENT=%s SIGNAL=%s; %s", component, signal, command)))
	eventually(t, time.Minute, func() error { return errOf(kubectl("", "get", "--raw", "/readyz")) })
	eventually(t, time.Minute, func() error {
		return errOf(kubectl("", "wait", "--for=condition=Ready", "nodes", "--all", "--timeout=1s"))
	})
}

// manifests are those of a folder of deploy/, with the image of this run and short thresholds.
func manifests(folder string) (string, error) {
	text, err := kubectl("", "kustomize", filepath.Join(root, folder))
	if err != nil {
		return "", err
	}
	for old, replacement := range map[string]string{
		releasedImage:                      os.Getenv("IMAGE"),
		`HEARTBEAT_INTERVAL_SECONDS: "30"`: fmt.Sprintf(`HEARTBEAT_INTERVAL_SECONDS: "%d"`, heartbeatSeconds),
		`STALE_THRESHOLD_SECONDS: "120"`:   fmt.Sprintf(`STALE_THRESHOLD_SECONDS: "%d"`, staleSeconds),
	} {
		if !strings.Contains(text, old) {
			return "", fmt.Errorf("%s has no %s", folder, old)
		}
		text = strings.ReplaceAll(text, old, replacement)
	}
	return text, nil
}

func install() error {
	for _, name := range []string{"PROGRAM", "IMAGE", "LOAD_IMAGE"} {
		if os.Getenv(name) == "" {
			return fmt.Errorf("%s is not set; run \"make e2e\"", name)
		}
	}
	if _, err := kubectl("", "version"); err != nil {
		return fmt.Errorf("no cluster: %w", err)
	}
	if err := uninstall(); err != nil {
		return err
	}
	if err := shell(os.Getenv("LOAD_IMAGE")); err != nil {
		return err
	}
	if err := provideVolumes("redis", "etcd"); err != nil {
		return err
	}
	text, err := manifests("deploy")
	if err != nil {
		return err
	}
	if _, err := kubectl(text, "apply", "-f", "-"); err != nil {
		return err
	}
	if _, err := hook("create", "secret", "generic", "redis", "--from-literal=webhook-password="+webhookPassword, "--from-literal=replication-password="+replicationPassword, "--from-literal=status-password="+statusPassword, "--from-literal=gate-password="+gatePassword); err != nil {
		return err
	}
	if err := shell("deploy/certificate.sh"); err != nil {
		return err
	}
	if err := rolledOut("statefulset/redis", "deployment/webhook"); err != nil {
		return err
	}
	// Ready pods are not yet those that the API server reaches: that takes kube-proxy a moment.
	for deadline := time.Now().Add(time.Minute); ; {
		_, err := kubectl(encode(pod("first", "install", 1)), "-n", "default", "create", "--dry-run=server", "-f", "-")
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func rolledOut(workloads ...string) error {
	for _, w := range workloads {
		if out, err := hook("rollout", "status", w, "--timeout=3m"); err != nil {
			events, _ := hook("get", "pods,events")
			return fmt.Errorf("%w\n%s\n%s", err, out, events)
		}
	}
	return nil
}

// uninstall removes everything in the documented order.
func uninstall() error {
	for _, args := range [][]string{
		{"delete", "mutatingwebhookconfiguration", hookNamespace, "--ignore-not-found"},
		{"delete", "namespace", "-l", "e2e=at-least-semaphore-pod-hook", "--ignore-not-found"},
		{"delete", "-k", filepath.Join(root, "deploy/gate"), "--ignore-not-found"},
		{"delete", "namespace", hookNamespace, "--ignore-not-found"},
		{"delete", "persistentvolume", "-l", "e2e=at-least-semaphore-pod-hook", "--ignore-not-found"},
	} {
		if _, err := kubectl("", append(args, "--timeout=3m")...); err != nil {
			return err
		}
	}
	return nil
}

// provideVolumes makes volumes on the node for the claims of three pods each, where the cluster does not do so by itself.
func provideVolumes(names ...string) error {
	classes, err := kubectl("", "get", "storageclass", "-o", `jsonpath={.items[*].metadata.annotations.storageclass\.kubernetes\.io/is-default-class}`)
	if err != nil || strings.Contains(classes, "true") {
		return err
	}
	for _, name := range names {
		for i := range 3 {
			path := fmt.Sprintf("/var/tmp/at-least-semaphore-pod-hook-e2e/%s-%d", name, i)
			if err := onNode(fmt.Sprintf("rm -rf %s && mkdir -p %s && chmod 777 %s", path, path, path)); err != nil {
				return err
			}
			volume := fmt.Sprintf(`{"apiVersion": "v1", "kind": "PersistentVolume",
				"metadata": {"name": "e2e-%s-%d", "labels": {"e2e": "at-least-semaphore-pod-hook"}},
				"spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": %q},
					"claimRef": {"namespace": %q, "name": "data-%s-%d"}}}`, name, i, path, hookNamespace, name, i)
			if _, err := kubectl(volume, "apply", "-f", "-"); err != nil {
				return err
			}
		}
	}
	return nil
}

// eventually polls until check returns nil, and fails with its last error.
func eventually(t *testing.T, within time.Duration, check func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", within, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
