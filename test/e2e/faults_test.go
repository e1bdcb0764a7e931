//go:build e2e

package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// bracketed is a pattern that matches a text, but not itself in the arguments of who looks for it.
func bracketed(text string) string { return "[" + text[:1] + "]" + text[1:] }

// A pod that is deleted by force.
func TestForcedDeletion(t *testing.T) {
	n := newNamespace(t)
	n.create(pod("first", "force", 1))
	n.wantRunning("first")
	n.wantFull("second", "force", 1, 1)
	n.kubectl("delete", "pod", "first", "--grace-period=0", "--force")
	n.wantAdmittedWithin(staleSeconds*time.Second+20*time.Second, pod("second", "force", 1))
	n.wantRunning("second")
}

// A sidecar that is killed is started again and keeps its token.
func TestSidecarKilled(t *testing.T) {
	n := newNamespace(t)
	n.create(pod("p", "killed", 1))
	token := n.wantRunning("p").Annotations[annotationPrefix+"token"]
	must(t, onNode("pkill -KILL -f '"+bracketed(token)+"'"))
	n.wantStartedAgain("p", sidecarName)
	n.wantCounts("killed", 0, 1)
	n.wantFull("q", "killed", 1, 1)
}

// The kubelet is stopped and the sidecar killed, as when a node is lost: the token is reclaimed after the stale threshold.
// When the node is back, the pod is counted again, and nobody is admitted until there is room.
func TestNodeLost(t *testing.T) {
	n := newNamespace(t)
	n.create(pod("lost", "node", 1))
	token := n.wantRunning("lost").Annotations[annotationPrefix+"token"]
	resume := sync.OnceFunc(func() { must(t, onNode("pkill -CONT -x kubelet")) })
	must(t, onNode("pkill -STOP -x kubelet"))
	defer resume()
	must(t, onNode("pkill -KILL -f '"+bracketed(token)+"'"))
	start := time.Now()
	n.wantFull("next", "node", 1, 1)
	n.wantAdmittedWithin(staleSeconds*time.Second+20*time.Second, pod("next", "node", 1))
	t.Logf("admitted %s after the kill, with a stale threshold of %d s", time.Since(start).Round(100*time.Millisecond), staleSeconds)
	resume()
	n.wantRunning("next")
	n.wantCounts("node", 0, 2) // the sidecar of the lost pod was started again
	n.wantFull("third", "node", 1, 2)
	n.kubectl("delete", "pod", "lost")
	n.wantFull("third", "node", 1, 1)
	n.kubectl("delete", "pod", "next")
	n.create(pod("third", "node", 1))
}

// stream creates pods one after the other until it is stopped, and reports each that is not admitted.
type stream struct {
	stopping chan struct{}
	done     chan struct{}
	created  int
	failures []string
}

func startStream(n *namespace, name string) *stream {
	s := &stream{stopping: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for i := 0; ; i++ {
			select {
			case <-s.stopping:
				return
			default:
			}
			if err := n.tryCreate(pod(fmt.Sprintf("%s-%d", name, i), "stream", 5000, unschedulable)); err != nil {
				s.failures = append(s.failures, err.Error())
			}
			s.created++
		}
	}()
	return s
}

func (s *stream) wantNoFailure(t *testing.T) {
	t.Helper()
	close(s.stopping)
	<-s.done
	t.Logf("%d pods were created", s.created)
	if len(s.failures) > 0 || s.created < 10 {
		t.Errorf("%d of %d pods were not admitted:\n%s", len(s.failures), s.created, strings.Join(s.failures, "\n"))
	}
}

// The webhooks are restarted one after the other under a stream of admissions: none fails.
func TestRollingRestart(t *testing.T) {
	n := newNamespace(t)
	s := startStream(n, "restart")
	for range 2 {
		restartWebhook(t)
	}
	s.wantNoFailure(t)
}

// The certificate is renewed under a stream of admissions, by the documented command and in place: none fails.
func TestCertificateRenewed(t *testing.T) {
	n := newNamespace(t)
	s := startStream(n, "command")
	must(t, shell("deploy/certificate.sh"))
	s.wantNoFailure(t)

	// In place, as cert-manager does it: nothing is restarted.
	s = startStream(n, "place")
	dir := t.TempDir()
	must(t, shell(fmt.Sprintf("openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=renewed -set_serial 0x5EED -addext subjectAltName=DNS:webhook.%s.svc -keyout %s/tls.key -out %s/tls.crt 2>&1", hookNamespace, dir, dir)))
	renewed, err := os.ReadFile(filepath.Join(dir, "tls.crt"))
	must(t, err)
	configuration := "mutatingwebhookconfiguration/" + hookNamespace
	encoded, err := kubectl("", "get", configuration, "-o", "jsonpath={.webhooks[0].clientConfig.caBundle}")
	must(t, err)
	old, err := base64.StdEncoding.DecodeString(encoded)
	must(t, err)
	trust := func(bundle []byte) {
		for i := range 2 {
			_, err := kubectl("", "patch", configuration, "--type=json", "-p", fmt.Sprintf(`[{"op": "add", "path": "/webhooks/%d/clientConfig/caBundle", "value": %q}]`, i, base64.StdEncoding.EncodeToString(bundle)))
			must(t, err)
		}
	}
	trust(append(append([]byte{}, old...), renewed...))
	secret, err := hook("create", "secret", "tls", "webhook-certificate", "--cert="+dir+"/tls.crt", "--key="+dir+"/tls.key", "--dry-run=client", "-o", "yaml")
	must(t, err)
	_, err = kubectl(secret, "-n", hookNamespace, "apply", "-f", "-")
	must(t, err)
	eventually(t, 4*time.Minute, func() error { // the kubelet takes a minute or two to hand it on
		logs, err := hook("logs", "-l", "app.kubernetes.io/component=webhook", "--tail=-1", "--prefix")
		if err == nil && strings.Count(logs, `"serialNumber":"5EED"`) < 2 {
			err = errors.New("the new certificate is not taken by both")
		}
		return err
	})
	trust(renewed)
	s.wantNoFailure(t)
}

// restartWebhook makes the settings take effect.
func restartWebhook(t *testing.T) {
	t.Helper()
	_, err := hook("rollout", "restart", "deployment/webhook")
	must(t, err)
	must(t, rolledOut("deployment/webhook"))
	eventually(t, time.Minute, func() error { // those that are going must not answer any more
		pods, err := hook("get", "pods", "-l", "app.kubernetes.io/component=webhook", "-o", "name")
		if err == nil && len(strings.Fields(pods)) != 2 {
			err = errors.New(pods)
		}
		return err
	})
}

// apply applies a folder of deploy/ with the settings of this run.
func apply(t *testing.T, folder string) {
	t.Helper()
	text, err := manifests(folder)
	must(t, err)
	_, err = kubectl(text, "apply", "-f", "-")
	must(t, err)
}

// The classic sidecar: the last container; on a pod that is to complete, a warning.
func TestClassicSidecar(t *testing.T) {
	_, err := hook("patch", "configmap", "settings", "-p", `{"data": {"ENABLE_SIDECAR_CONTAINERS": "false"}}`)
	must(t, err)
	t.Cleanup(func() {
		apply(t, "deploy")
		restartWebhook(t)
	})
	restartWebhook(t)
	n := newNamespace(t)
	n.create(pod("p", "classic", 1))
	p := n.wantRunning("p")
	if last := p.Spec.Containers[len(p.Spec.Containers)-1]; len(p.Spec.InitContainers) != 0 || len(p.Spec.Containers) != 2 || last.Name != sidecarName {
		t.Errorf("init containers %v, containers %v", p.Spec.InitContainers, p.Spec.Containers)
	}
	n.wantCounts("classic", 0, 1)
	n.kubectl("delete", "pod", "p")
	n.wantCounts("classic", 1, 0)

	_, stderr, err := kubectlWarned(encode(pod("once", "classic", 1, object{"restartPolicy": "Never"})), "-n", n.name, "create", "-f", "-")
	must(t, err)
	if !strings.Contains(stderr, "Warning: this pod will not complete") {
		t.Errorf("warned: %q", stderr)
	}
	_, stderr, err = kubectlWarned(encode(job("work", "jobs", 1, "sleep 1")), "-n", n.name, "create", "-f", "-")
	must(t, err)
	if !strings.Contains(stderr, "Warning: this Job will not complete") {
		t.Errorf("warned of the Job: %q", stderr)
	}
	if got := n.wantRefused(waiting(pod("waiter", "classic", 1))); !strings.Contains(got, `denied the request: invalid annotations: `+annotationPrefix+`when-full is "wait": this needs native sidecars`) {
		t.Errorf("refused with %s", got)
	}
}

// The other lock: what deploy/etcd adds works, and repairs go through it.
func TestEtcdLock(t *testing.T) {
	apply(t, "deploy/etcd")
	t.Cleanup(func() {
		apply(t, "deploy")
		must(t, rolledOut("statefulset/redis"))
		restartWebhook(t)
		_, err := hook("delete", "statefulset,service,networkpolicy", "etcd")
		must(t, err)
	})
	must(t, rolledOut("statefulset/etcd"))
	restartWebhook(t)
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
