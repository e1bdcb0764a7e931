//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// forwarded is where a webhook can be reached from here, as by a stranger: by "kubectl port-forward", which ends with a connection that the
// webhook closes.
func forwarded(t *testing.T) (address string) {
	t.Helper()
	cmd := exec.Command("kubectl", "-n", hookNamespace, "port-forward", "deployment/webhook", ":9443")
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if m := regexp.MustCompile(`from (127\.0\.0\.1:\d+)`).FindStringSubmatch(lines.Text()); m != nil {
			go func() {
				for lines.Scan() {
				}
			}()
			return m[1]
		}
	}
	t.Fatal("no port is forwarded")
	return ""
}

// call posts a review of an annotated pod to a webhook.
func call(t *testing.T, path, namespace string) (status int, err error) {
	t.Helper()
	address := forwarded(t)
	body, err := os.ReadFile("../test/testdata/admission-reviews/deployment-pod.json")
	must(t, err)
	body = bytes.ReplaceAll(body, []byte(`"namespace": "shop"`), []byte(fmt.Sprintf(`"namespace": %q`, namespace)))
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	response, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Post("https://"+address+path, "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	response.Body.Close()
	return response.StatusCode, nil
}

// servedPath is what the API server calls.
func servedPath(t *testing.T) string {
	t.Helper()
	path, err := kubectl("", "get", "mutatingwebhookconfiguration", hookNamespace, "-o", "jsonpath={.webhooks[0].clientConfig.service.path}")
	must(t, err)
	return path
}

// Who reaches the webhook and does not know the secret gets nothing. From no secret, as it was installed before, to one, by the documented
// command, no admission fails.
func TestPathSecret(t *testing.T) {
	n := newNamespace(t)
	path := servedPath(t)
	if !strings.HasPrefix(path, "/mutate/") {
		t.Fatalf("the path is %s", path)
	}
	for _, p := range []string{"/mutate", "/", "/mutate/0123456789abcdef0123456789abcdef"} {
		if status, err := call(t, p, n.name); err != nil || status != http.StatusNotFound {
			t.Errorf("a stranger at %s: %d, %v", p, status, err)
		}
	}
	if out, err := status(n.name); err != nil || !strings.HasPrefix(out, "no semaphore was used") {
		t.Errorf("strangers have used one: %s, %v", out, err)
	}

	// As before there were secrets.
	old := base64.StdEncoding.EncodeToString([]byte(strings.TrimPrefix(path, "/mutate/") + "\n-\n"))
	_, err := hook("patch", "secret", "webhook-path", "-p", fmt.Sprintf(`{"data": {"secret": %q}}`, old))
	must(t, err)
	eventually(t, 3*time.Minute, func() error {
		logs, err := hook("logs", "-l", "app.kubernetes.io/component=webhook", "--tail=-1")
		if n := strings.Count(logs, `"paths":2`); err == nil && n < 2 {
			err = fmt.Errorf("%d webhooks accept the path without a secret", n)
		}
		return err
	})
	_, err = kubectl("", "patch", "mutatingwebhookconfiguration", hookNamespace, "--type=json", "-p",
		`[{"op": "replace", "path": "/webhooks/0/clientConfig/service/path", "value": "/mutate"}, {"op": "replace", "path": "/webhooks/1/clientConfig/service/path", "value": "/mutate"}]`)
	must(t, err)

	s := startStream(n, "secret")
	must(t, shell("deploy/path-secret.sh"))
	s.wantNoFailure(t)
	if now := servedPath(t); !strings.HasPrefix(now, "/mutate/") || now == path {
		t.Errorf("the path is %s, and was %s", now, path)
	}
}

// Where the API server has a client certificate, those without one are not served, whatever they know. The certificate, and its
// authority, are those of API_CLIENT_CA: ".ci/client-certificate" makes what an API server needs, and docs/operating.md says how.
func TestClientCertificate(t *testing.T) {
	authority := os.Getenv("API_CLIENT_CA")
	if authority == "" {
		t.Skip("API_CLIENT_CA is not set: this API server has no client certificate for webhooks")
	}
	n := newNamespace(t)
	_, err := hook("create", "secret", "generic", "webhook-clients", "--from-file=ca.crt="+authority)
	must(t, err)
	defer func() {
		_, err := hook("rollout", "undo", "deployment/webhook")
		must(t, errors.Join(err, rolledOut("deployment/webhook"), errOf(hook("delete", "secret", "webhook-clients"))))
	}()
	_, err = hook("patch", "deployment", "webhook", "--type=json", "-p", `[
		{"op": "add", "path": "/spec/template/spec/volumes/-", "value": {"name": "clients", "secret": {"secretName": "webhook-clients"}}},
		{"op": "add", "path": "/spec/template/spec/containers/0/volumeMounts/-", "value": {"name": "clients", "mountPath": "/var/run/clients", "readOnly": true}},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--client-ca-file=/var/run/clients/ca.crt"},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--client-name=kube-apiserver"}]`)
	must(t, err)
	must(t, rolledOut("deployment/webhook"))
	n.create(pod("admitted", "certificate", 1))
	n.wantOneSidecar(n.wantRunning("admitted"))
	if status, err := call(t, servedPath(t), n.name); err == nil {
		t.Errorf("without a certificate: %d", status)
	}
}
