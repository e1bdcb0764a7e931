//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// Each of these tests changes the webhooks, and leaves the settings of deploy/ to the
// next restart.
func TestWebhooks(t *testing.T) {
	t.Run("ClientCertificate", testClientCertificate)
	t.Run("ClassicSidecar", testClassicSidecar)
	t.Run("Settings", testSettings)
	t.Run("EtcdLock", testEtcdLock)
	t.Run("OwnRedis", testOwnRedis)
	t.Run("RollingRestart", testRollingRestart)
	if webhooksDiffer {
		restartWebhooks(t)
	}
	must(t, errOf(hook("delete", "statefulset,service,networkpolicy", "etcd", "--ignore-not-found")))
}

// webhooksDiffer says that the webhooks do not have the settings of deploy/, but would
// have them after a restart.
var webhooksDiffer bool

// A webhook that wants a client certificate serves the API server, and no caller without
// a certificate. ".ci/client-certificate" makes what the API server needs.
func testClientCertificate(t *testing.T) {
	authority := os.Getenv("API_CLIENT_CA")
	if authority == "" {
		t.Skip("API_CLIENT_CA is not set: this API server has no client certificate for webhooks")
	}
	n := newNamespace(t)
	_, err := hook("create", "secret", "generic", "webhook-clients", "--from-file=ca.crt="+authority)
	must(t, err)
	t.Cleanup(func() {
		webhooksDiffer = true
		must(t, errOf(hook("rollout", "undo", "deployment/webhook")))
		must(t, errOf(hook("delete", "secret", "webhook-clients")))
	})
	_, err = hook("patch", "deployment", "webhook", "--type=json", "-p", `[
		{"op": "add", "path": "/spec/template/spec/volumes/-",
			"value": {"name": "clients", "secret": {"secretName": "webhook-clients"}}},
		{"op": "add", "path": "/spec/template/spec/containers/0/volumeMounts/-",
			"value": {"name": "clients", "mountPath": "/var/run/clients", "readOnly": true}},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-",
			"value": "--client-ca-file=/var/run/clients/ca.crt"},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-",
			"value": "--client-name=kube-apiserver"}]`)
	must(t, err)
	must(t, rolledOut("deployment/webhook"))
	n.create(pod("admitted", "certificate", 1))
	n.wantOneSidecar(n.wantRunning("admitted"))
	if status, err := call(t, servedPath(t), n.name); err == nil {
		t.Errorf("without a certificate: %d", status)
	}
}

// restartWebhooks replaces the webhooks by some with the settings of now.
func restartWebhooks(t *testing.T) {
	t.Helper()
	webhooksDiffer = false
	_, err := hook("rollout", "restart", "deployment/webhook")
	must(t, err)
	must(t, rolledOut("deployment/webhook"))
	eventually(t, patience, func() error { // the old webhooks must not answer any more
		pods, err := hook("get", "pods", "-l", "app.kubernetes.io/component=webhook", "-o", "name")
		if err == nil && len(strings.Fields(pods)) != 2 {
			err = errors.New(pods)
		}
		return err
	})
}

// The classic sidecar is the last container. The webhook warns of it on pods that should
// complete.
func testClassicSidecar(t *testing.T) {
	_, err := hook("patch", "configmap", "settings", "-p", `{"data": {"ENABLE_SIDECAR_CONTAINERS": "false"}}`)
	must(t, err)
	t.Cleanup(func() {
		webhooksDiffer = true
		apply(t, "deploy")
	})
	restartWebhooks(t)
	n := newNamespace(t)
	n.create(pod("p", "classic", 1))
	p := n.wantRunning("p")
	inits, all := p.Spec.InitContainers, p.Spec.Containers
	if len(inits) != 0 || len(all) != 2 || all[1].Name != sidecarName {
		t.Errorf("init containers %v, containers %v", inits, all)
	}
	n.wantSidecarLog("p", "holding the token") // a process that is just starting gives nothing back
	n.wantCounts("classic", 0, 1)
	n.delete("p")
	n.wantCounts("classic", 1, 0)

	warnings, err := n.createWarned(pod("once", "classic", 1, object{"restartPolicy": "Never"}))
	must(t, err)
	if !strings.Contains(warnings, "Warning: this pod will not complete") {
		t.Errorf("warned: %q", warnings)
	}
	warnings, err = n.createWarned(job("work", "jobs", 1, "sleep 1"))
	must(t, err)
	if !strings.Contains(warnings, "Warning: the pods of this Job will not complete") {
		t.Errorf("warned of the Job: %q", warnings)
	}
	want := denied + "invalid annotations: " + annotationPrefix + `when-full is "wait": this needs native sidecars`
	if got := n.wantRefused(waiting(pod("waiter", "classic", 1))); !strings.Contains(got, want) {
		t.Errorf("refused with %s", got)
	}
}

// deploy/etcd installs the etcd lock, and repairs use it.
func testEtcdLock(t *testing.T) {
	apply(t, "deploy/etcd")
	t.Cleanup(func() {
		webhooksDiffer = true
		apply(t, "deploy")
	})
	must(t, rolledOut("statefulset/etcd"))
	restartWebhooks(t)
	n := newNamespace(t)
	n.create(pod("p", "etcd", 2))
	n.wantRunning("p")
	n.wantCounts("etcd", 1, 1)
	logs, err := hook("logs", "-l", "app.kubernetes.io/component=webhook", "--tail=-1")
	must(t, err)
	if !strings.Contains(logs, `"lockMode":"etcd"`) || !strings.Contains(logs, `"msg":"maintained"`) {
		t.Errorf("logs:\n%s", logs)
	}
}

// The tokens move to a Redis of one's own, without TLS. setup makes its users there, with the
// password of the administrator.
func testOwnRedis(t *testing.T) {
	n := newNamespace(t)
	password, err := hook("get", "secret", "redis", "-o", `go-template={{index .data "setup-password" | base64decode}}`)
	must(t, err)
	n.create(object{"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": "own", "labels": object{"app": "own"}},
		"spec": object{"terminationGracePeriodSeconds": 1, "containers": []object{{
			"name": "redis", "image": "docker.io/valkey/valkey:8.1",
			"command": []string{"redis-server", "--requirepass", password, "--maxmemory-policy", "noeviction"}}}}})
	n.create(object{"apiVersion": "v1", "kind": "Service", "metadata": object{"name": "own"},
		"spec": object{"selector": object{"app": "own"}, "ports": []object{{"port": 6379}}}})
	n.wantRunning("own")
	address := "own." + n.name + ".svc:6379"
	_, err = hook("patch", "configmap", "settings", "-p", encode(object{"data": object{
		"QUEUE_REDIS_ADDRESS": address, "REDIS_ADDRESSES": address, "USER_REDIS_ADDRESSES": address,
		"REDIS_CA_FILE": "", "SIDECAR_REDIS_CA": "",
	}}))
	must(t, err)
	restartSetup := func() {
		_, err := hook("rollout", "restart", "deployment/setup")
		must(t, err)
		must(t, rolledOut("deployment/setup"))
	}
	t.Cleanup(func() { // before the namespace goes, and its Redis
		apply(t, "deploy")
		restartSetup()
		restartWebhooks(t)
	})
	restartSetup()
	restartWebhooks(t)
	n.wantAdmitted(pod("p", "own", 2))
	n.wantRunning("p")
	out, err := n.try("exec", "own", "--", "sh", "-c", fmt.Sprintf(
		"REDISCLI_AUTH=%s redis-cli --no-auth-warning ZCARD 'inflight/{%s/own}'", password, n.name))
	if err != nil || strings.TrimSpace(out) != "1" {
		t.Errorf("%s tokens are in use there, %v", out, err)
	}
	n.delete("p")
}

// The webhooks have settings for other clusters.
func testSettings(t *testing.T) {
	_, err := hook("patch", "configmap", "settings", "-p", encode(object{"data": object{
		"AWAIT_RESTART":             "true",
		"SIDECAR_RESOURCES":         "cpu=200m,memory=96Mi,ephemeral-storage=16Mi",
		"SIDECAR_REQUESTS":          "cpu=10m,memory=48Mi,ephemeral-storage=16Mi",
		"SIDECAR_IMAGE_PULL_SECRET": "mirror",
		"POD_ANNOTATIONS":           "example.org/ports=6379,2379,example.org/mesh=off",
	}}))
	must(t, err)
	t.Cleanup(func() {
		webhooksDiffer = true
		apply(t, "deploy")
	})
	restartWebhooks(t)
	n := newNamespace(t)
	n.create(waiting(pod("holder", "settings", 1)))
	n.wantRunning("holder")
	spec := object{"restartPolicy": "Never", "imagePullSecrets": []object{{"name": "own"}}}
	n.create(waiting(pod("never", "settings", 1, spec)))
	p := n.wantWaiting("never")
	for _, c := range p.Spec.InitContainers {
		limits := c.Resources.Limits
		got := fmt.Sprint(limits.Cpu(), limits.Memory(), limits.StorageEphemeral(), c.Resources.Requests.Cpu())
		if got != "200m 96Mi 16Mi 10m" {
			t.Errorf("%s: resources %s", c.Name, got)
		}
	}
	if s := p.Spec.ImagePullSecrets; len(s) != 2 || s[0].Name != "own" || s[1].Name != "mirror" {
		t.Errorf("pull secrets %v", s)
	}
	if a := p.Annotations; a["example.org/ports"] != "6379,2379" || a["example.org/mesh"] != "off" {
		t.Errorf("annotations %v", a)
	}
	killAwait(t, p)
	n.wantStartedAgain("never", awaitName)
	n.wantWaiters("settings", p)
	n.end("holder")
	n.wantRunning("never")
	out := n.kubectl("get", "pod", "never",
		"-o", "jsonpath={.status.initContainerStatuses[1].state.terminated.exitCode}")
	if strings.TrimSpace(out) != "0" {
		t.Errorf("exit code %s", out)
	}
}

// The webhooks restart one after the other, and no admission fails meanwhile.
func testRollingRestart(t *testing.T) {
	s := startStream(newNamespace(t))
	for range 2 {
		restartWebhooks(t)
	}
	s.wantAllAdmitted()
}
