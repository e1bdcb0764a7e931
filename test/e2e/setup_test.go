//go:build e2e

// Package e2e tests the webhook as operators install it, on the cluster that KUBECONFIG
// names. It installs deploy/ once, with its own image and short thresholds, and removes
// it at the end.
//
// Tests without t.Parallel run alone: each restarts or stops something that all others
// need. The others run at the same time, each in its own namespace.
//
// Environment variables:
//
//	PROGRAM       the static binary
//	IMAGE         the name of its image. Each build needs a new one, as nodes keep images
//	LOAD_IMAGE    shell command that makes the image and loads it into the cluster, for example
//	              kind:  docker build -t $IMAGE . && kind load docker-image $IMAGE
//	              k3d:   docker build -t $IMAGE . && k3d image import $IMAGE
//	NODE_SHELL    command that runs a script on the node. The tests kill processes, refuse
//	              connections (iptables) and read files there. For example
//	              kind:  docker exec kind-control-plane sh -c
//	              k3d:   docker exec k3d-k3s-default-server-0 sh -c
//	NODE_RESTART  shell command that ends COMPONENT (kubelet, containerd, apiserver, scheduler or
//	              controller-manager) with SIGNAL (TERM or KILL). The command or the component's
//	              supervisor starts it again. The Makefile has the command for kind
//	API_CLIENT_CA the authority of the API server's client certificate, if it has one
//	MEASURE       if not empty, the measurements (TestMeasure...) run, too
//	DEPLOY        the folder that is installed, deploy if empty; deploy/sentinel for its own tests
//	KEEP          if not empty, the installation stays
package e2e

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
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

	// A busy node takes several seconds to restart a killed sidecar. The threshold leaves
	// it that time.
	heartbeatSeconds = 2
	staleSeconds     = 15

	// patience bounds the wait for what must happen. It only decides how late a failure
	// is reported: no test depends on the speed of the node.
	patience = 3 * time.Minute
)

const sentinelFolder = "deploy/sentinel"

// installed is the folder of the installation.
var installed = cmp.Or(os.Getenv("DEPLOY"), "deploy")

func TestMain(m *testing.M) {
	code := 1
	start := time.Now()
	if err := install(); err != nil {
		fmt.Fprintln(os.Stderr, "install:", err)
	} else {
		fmt.Println("installed in", inSeconds(time.Since(start)))
		code = m.Run()
	}
	inRedis.close()
	if os.Getenv("KEEP") == "" {
		start = time.Now()
		if err := uninstall(); err != nil {
			fmt.Fprintln(os.Stderr, "uninstall:", err)
			code = 1
		}
		fmt.Println("uninstalled in", inSeconds(time.Since(start)))
	}
	if api != nil {
		api.stop()
	}
	os.Exit(code)
}

// kubectl runs kubectl with an input and returns its output. The error contains its error
// output.
func kubectl(input string, args ...string) (string, error) {
	out, _, err := kubectlWarned(input, args...)
	return out, err
}

// kubectlWarned is kubectl that also returns the error output, such as warnings.
func kubectlWarned(input string, args ...string) (stdout, stderr string, err error) {
	cmd := exec.Command("kubectl", args...)
	cmd.Stdin = strings.NewReader(input)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
		return out.String(), errs.String(), err
	}
	return out.String(), errs.String(), nil
}

// hook is kubectl in the webhook's namespace.
func hook(args ...string) (string, error) {
	return kubectl("", append([]string{"-n", hookNamespace}, args...)...)
}

// shell runs a shell command in the repository. An image build may take a quarter of an
// hour.
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

// nodeOutput runs a script on the node and returns its output.
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

// restartOnNode restarts a component of the node and waits until the node is ready.
func restartOnNode(t *testing.T, component, signal string) {
	t.Helper()
	command := os.Getenv("NODE_RESTART")
	if command == "" {
		t.Fatal("NODE_RESTART is not set: it is the command that restarts a component of the node")
	}
	must(t, shell(fmt.Sprintf("COMPONENT=%s SIGNAL=%s; %s", component, signal, command)))
	eventually(t, patience, func() error { return errOf(kubectl("", "get", "--raw", "/readyz")) })
	eventually(t, patience, func() error {
		return errOf(kubectl("", "wait", "--for=condition=Ready", "nodes", "--all", "--timeout=1s"))
	})
	eventually(t, patience, func() error { return errOf(api.do(http.MethodGet, "/readyz", "", nil)) })
}

// manifests returns those of a folder of deploy/, with the image of this run and short
// thresholds.
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

// apply applies a folder of deploy/ with the settings of this run.
func apply(t *testing.T, folder string) {
	t.Helper()
	text, err := manifests(folder)
	must(t, err)
	_, err = kubectl(text, "apply", "-f", "-")
	must(t, err)
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
	var err error
	if api, err = startProxy(); err != nil {
		return err
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
	text, err := manifests(installed)
	if err != nil {
		return err
	}
	redis := "deployment/redis"
	if installed == sentinelFolder {
		redis = "statefulset/redis"
		// The objects may come in any order. Those that come before the namespace are refused.
		text = shuffled(text)
		_, _ = kubectl(text, "apply", "-f", "-")
	}
	if _, err := kubectl(text, "apply", "-f", "-"); err != nil {
		return err
	}
	if err := rolledOut("deployment/setup", redis, "deployment/webhook"); err != nil {
		return err
	}
	if err := findRedis(); err != nil {
		return err
	}
	// The API server reaches ready pods only after kube-proxy has learned of them.
	return poll(patience, func() error {
		first := encode(pod("first", "install", 1))
		return errOf(kubectl(first, "-n", "default", "create", "--dry-run=server", "-f", "-"))
	})
}

// shuffled returns the objects of a file in a random order, and prints its seed.
func shuffled(text string) string {
	objects := strings.Split(text, "\n---\n")
	seed := rand.Uint64()
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(objects), func(i, j int) { objects[i], objects[j] = objects[j], objects[i] })
	fmt.Printf("%d objects in a random order, seed %d\n", len(objects), seed)
	return strings.Join(objects, "\n---\n")
}

func rolledOut(workloads ...string) error {
	for _, w := range workloads {
		if out, err := hook("rollout", "status", w, "--timeout="+patience.String()); err != nil {
			events, _ := hook("get", "pods,events")
			return fmt.Errorf("%w\n%s\n%s", err, out, events)
		}
	}
	return nil
}

// uninstall removes everything in the documented order. It ends all pods before it waits
// for namespaces: Kubernetes looks only every 20 seconds whether a namespace is empty.
func uninstall() error {
	const label = "e2e=at-least-semaphore-pod-hook"
	remove := func(args ...string) error {
		return errOf(kubectl("", append(append([]string{"delete"}, args...), "--ignore-not-found", "--timeout=5m")...))
	}
	if err := remove("mutatingwebhookconfiguration", hookNamespace); err != nil {
		return err
	}
	if err := remove("namespace", "-l", label, "--wait=false"); err != nil {
		return err
	}
	if err := poll(patience, func() error { return noPods("-l", label) }); err != nil {
		return err
	}
	for _, folder := range []string{"deploy/gate", installed} {
		if err := remove("-k", filepath.Join(root, folder)); err != nil {
			return err
		}
	}
	if err := remove("namespace", "-l", label); err != nil {
		return err
	}
	return remove("persistentvolume", "-l", label)
}

// noPods returns an error if the namespaces have pods.
func noPods(namespaces ...string) error {
	out, err := kubectl("", append([]string{"get", "namespace", "--ignore-not-found", "-o", "name"}, namespaces...)...)
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(out) {
		pods, err := kubectl("", "-n", strings.TrimPrefix(name, "namespace/"), "get", "pods", "-o", "name")
		if err != nil || pods != "" {
			return fmt.Errorf("%s has %s, %v", name, pods, err)
		}
	}
	return nil
}

// provideVolumes makes volumes on the node for the claims of three pods for each name,
// unless the cluster makes volumes itself.
func provideVolumes(names ...string) error {
	classes, err := kubectl("", "get", "storageclass",
		"-o", `jsonpath={.items[*].metadata.annotations.storageclass\.kubernetes\.io/is-default-class}`)
	if err != nil || strings.Contains(classes, "true") {
		return err
	}
	var folders, volumes strings.Builder
	for _, name := range names {
		for i := range 3 {
			path := fmt.Sprintf("/var/tmp/at-least-semaphore-pod-hook-e2e/%s-%d", name, i)
			fmt.Fprintf(&folders, "rm -rf %s && mkdir -p %s && chmod 777 %s || exit 1\n", path, path, path)
			fmt.Fprintf(&volumes, `{"apiVersion": "v1", "kind": "PersistentVolume",
				"metadata": {"name": "e2e-%s-%d", "labels": {"e2e": "at-least-semaphore-pod-hook"}},
				"spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": %q},
					"claimRef": {"namespace": %q, "name": "data-%s-%d"}}}`+"\n", name, i, path, hookNamespace, name, i)
		}
	}
	if err := onNode(folders.String()); err != nil {
		return err
	}
	return errOf(kubectl(volumes.String(), "apply", "-f", "-"))
}

// poll checks until the check returns nil, and returns its last error after that time.
func poll(within time.Duration, check func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s: %w", within, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// eventually is poll that must succeed.
func eventually(t *testing.T, within time.Duration, check func() error) {
	t.Helper()
	must(t, poll(within, check))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
