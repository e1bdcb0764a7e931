//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// forwarded returns an address of a port of a Deployment. "kubectl port-forward" serves it,
// until the pod closes a connection.
func forwarded(t *testing.T, deployment, port string) (address string) {
	t.Helper()
	cmd := exec.Command("kubectl", "-n", hookNamespace, "port-forward", "deployment/"+deployment, ":"+port)
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
	address := forwarded(t, "webhook", "9443")
	body, err := os.ReadFile(filepath.Join(root, "test/testdata/admission-reviews/deployment-pod.json"))
	must(t, err)
	body = bytes.ReplaceAll(body, []byte(`"namespace": "shop"`), []byte(fmt.Sprintf(`"namespace": %q`, namespace)))
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	response, err := client.Post("https://"+address+path, "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	response.Body.Close()
	return response.StatusCode, nil
}

// servedPath returns the path that the API server calls.
func servedPath(t *testing.T) string {
	t.Helper()
	path, err := kubectl("", "get", "mutatingwebhookconfiguration", hookNamespace,
		"-o", "jsonpath={.webhooks[0].clientConfig.service.path}")
	must(t, err)
	return path
}

// configuring serializes changes of the webhook's configuration.
var configuring sync.Mutex

// The webhook serves only callers that know the path. Where the key of the
// secret is deleted, setup makes another one, and no admission fails meanwhile.
func TestPathSecret(t *testing.T) {
	t.Parallel()
	configuring.Lock()
	defer configuring.Unlock()
	n := newNamespace(t)
	path := servedPath(t)
	if !strings.HasPrefix(path, "/mutate/") {
		t.Fatalf("the path is %s", path)
	}
	for _, p := range []string{"/mutate", "/", "/mutate/0123456789abcdef0123456789abcdef"} {
		if status, err := call(t, p, n.name); err != nil || status != http.StatusNotFound {
			t.Errorf("a caller of %s: %d, %v", p, status, err)
		}
	}
	if out, err := status(n.name); err != nil || !strings.HasPrefix(out, "no semaphore was used") {
		t.Errorf("these callers have used a semaphore: %s, %v", out, err)
	}

	s := startStream(n)
	newSecretChange(t, `"digest":`).reachDuring(deleteKey("webhook-path", "secret"), s)
	eventually(t, patience, func() error {
		if now := servedPath(t); !strings.HasPrefix(now, "/mutate/") || now == path {
			return fmt.Errorf("the path is %s, and was %s", now, path)
		}
		return nil
	})
	s.wantMore(10)
	s.wantAllAdmitted()
}
