//go:build e2e

package e2e

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// bracketed returns a pattern that matches a text, but not the command line that contains
// the pattern.
func bracketed(text string) string { return "[" + text[:1] + "]" + text[1:] }

// The token of a pod that is deleted by force is reclaimed.
func TestForcedDeletion(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(pod("first", "force", 1))
	n.wantRunning("first")
	n.wantFull("second", "force", 1, 1)
	n.kubectl("delete", "pod", "first", "--grace-period=0", "--force")
	n.wantAdmitted(pod("second", "force", 1))
	n.wantRunning("second")
}

// A sidecar that is killed starts again and keeps its token.
func TestSidecarKilled(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(pod("p", "killed", 1))
	token := n.wantRunning("p").Annotations[annotationPrefix+"token"]
	must(t, onNode("pkill -KILL -f '"+bracketed(token)+"'"))
	n.wantStartedAgain("p", sidecarName)
	n.wantCounts("killed", 0, 1)
	n.wantFull("q", "killed", 1, 1)
}

// secretChange follows the webhooks while a Secret of theirs changes. Each logs the text
// when it has read the change.
type secretChange struct {
	*testing.T
	text   string
	logged map[string]int // how often each webhook had logged the text before
}

func newSecretChange(t *testing.T, text string) *secretChange {
	t.Helper()
	c := &secretChange{t, text, map[string]int{}}
	pods, err := hook("get", "pods", "-l", "app.kubernetes.io/component=webhook", "-o", "name")
	must(t, err)
	for _, pod := range strings.Fields(pods) {
		c.logged[pod], err = c.count(pod)
		must(t, err)
	}
	return c
}

func (c *secretChange) count(pod string) (int, error) {
	log, err := hook("logs", pod)
	return strings.Count(log, c.text), err
}

// reach waits until one webhook after the other has read the change. The kubelet hands on
// a Secret when it syncs the pod, at once after an annotation, or else within two
// minutes. between runs after each webhook.
func (c *secretChange) reach(between func()) {
	c.Helper()
	for pod, before := range c.logged {
		tries := 0
		eventually(c.T, patience, func() error {
			tries++
			if _, err := hook("annotate", pod, fmt.Sprintf("e2e/sync=%d-%d", before, tries), "--overwrite"); err != nil {
				return err
			}
			now, err := c.count(pod)
			if err == nil && now <= before {
				err = fmt.Errorf("%s has logged %s %d times", pod, c.text, now)
			}
			return err
		})
		between()
	}
}

// reachDuring runs a command that changes the Secret and waits for all webhooks. Between
// the webhooks, pods of the stream are admitted.
func (c *secretChange) reachDuring(command string, s *stream) {
	c.Helper()
	done := make(chan error, 1)
	go func() { done <- shell(command) }()
	c.reach(func() { s.wantMore(10) })
	must(c.T, <-done)
}

// The certificate is renewed by the documented command, and then in place. No admission
// fails meanwhile.
func TestCertificateRenewed(t *testing.T) {
	t.Parallel()
	configuring.Lock()
	defer configuring.Unlock()
	n := newNamespace(t)
	s := startStream(n)
	newSecretChange(t, `"serialNumber":`).reachDuring("deploy/certificate.sh", s)
	s.wantAllAdmitted()

	// In place, as cert-manager does it: no webhook restarts.
	s = startStream(n)
	dir := t.TempDir()
	must(t, shell(fmt.Sprintf(`openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=renewed -set_serial 0x5EED \
		-addext subjectAltName=DNS:webhook.%s.svc -keyout %s/tls.key -out %s/tls.crt 2>&1`, hookNamespace, dir, dir)))
	renewed, err := os.ReadFile(filepath.Join(dir, "tls.crt"))
	must(t, err)
	configuration := "mutatingwebhookconfiguration/" + hookNamespace
	encoded, err := kubectl("", "get", configuration, "-o", "jsonpath={.webhooks[0].clientConfig.caBundle}")
	must(t, err)
	old, err := base64.StdEncoding.DecodeString(encoded)
	must(t, err)
	trust := func(bundle []byte) {
		encoded := base64.StdEncoding.EncodeToString(bundle)
		must(t, errOf(kubectl("", "patch", configuration, "--type=json", "-p", fmt.Sprintf(`[
			{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": %q},
			{"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": %q}]`, encoded, encoded))))
	}
	trust(append(append([]byte{}, old...), renewed...))
	secret, err := hook("create", "secret", "tls", "webhook-certificate", "--cert="+dir+"/tls.crt", "--key="+dir+"/tls.key",
		"--dry-run=client", "-o", "yaml")
	must(t, err)
	change := newSecretChange(t, `"serialNumber":"5EED"`)
	_, err = kubectl(secret, "-n", hookNamespace, "apply", "-f", "-")
	must(t, err)
	change.reach(func() { s.wantMore(10) })
	trust(renewed)
	s.wantAllAdmitted()
}
