//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
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

// secretChange follows the webhooks while a Secret or ConfigMap of theirs changes. Each
// logs the text when it has read the change.
type secretChange struct {
	*testing.T
	text   string
	logged map[string]int // pods/NAME of each webhook -> how often it had logged the text before
}

func newSecretChange(t *testing.T, text string) *secretChange {
	t.Helper()
	c := &secretChange{t, text, map[string]int{}}
	pods, err := hook("get", "pods", "-l", "app.kubernetes.io/component=webhook", "-o", "name")
	must(t, err)
	for pod := range strings.FieldsSeq(strings.ReplaceAll(pods, "pod/", "pods/")) {
		c.logged[pod], err = c.count(pod)
		must(t, err)
	}
	return c
}

func (c *secretChange) count(pod string) (int, error) {
	log, err := api.do(http.MethodGet, "/api/v1/namespaces/"+hookNamespace+"/"+pod+"/log", "", nil)
	return strings.Count(string(log), c.text), err
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
			sync := object{"metadata": object{"annotations": object{"e2e/sync": fmt.Sprint(before, tries)}}}
			_, err := api.do(http.MethodPatch, "/api/v1/namespaces/"+hookNamespace+"/"+pod, "application/merge-patch+json", sync)
			if err != nil {
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

// deleteKey returns the command that deletes a key of a Secret. setup makes it anew.
func deleteKey(secret, key string) string {
	return fmt.Sprintf(`kubectl -n %s patch secret %s --type=json -p '[{"op": "remove", "path": "/data/%s"}]'`,
		hookNamespace, secret, key)
}

// setup makes a new certificate where one is deleted. No admission fails meanwhile.
func TestCertificateRenewed(t *testing.T) {
	t.Parallel()
	configuring.Lock()
	defer configuring.Unlock()
	n := newNamespace(t)
	s := startStream(n)
	newSecretChange(t, `"serialNumber":`).reachDuring("kubectl -n "+hookNamespace+" delete secret webhook-certificate", s)
	s.wantAllAdmitted()
}

// The password of the webhook changes, and no admission fails meanwhile.
func TestPasswordChanged(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	s := startStream(n)
	password := func() string {
		out, err := hook("get", "secret", "redis", "-o", `go-template={{with index .data "webhook-password"}}{{. | base64decode}}{{end}}`)
		must(t, err)
		return out
	}
	before := password()
	must(t, shell(deleteKey("redis", "webhook-password")))
	eventually(t, patience, func() error {
		if now := password(); now == "" || now == before {
			return fmt.Errorf("the password is %q", now)
		}
		return nil
	})
	s.wantMore(30)
	s.wantAllAdmitted()
}

// The only Redis goes while pods are created, hold tokens and wait for them, and another
// one starts empty. The holders put themselves back, never too many apps work, no pod
// loses its place, and the line moves on.
func TestRedisGone(t *testing.T) {
	l := newLine(newNamespace(t), 4)
	for name, flags := range map[string][]string{"deleted": nil, "by force": {"--grace-period=0", "--force"}} {
		if !t.Run(name, func(t *testing.T) {
			l.T = t
			s := startStream(l.namespace)
			s.wantAdmittedSince(time.Now())
			gone := time.Now()
			deleteRedis(t, flags...)
			s.wantRefusedSince(gone) // one that is deleted by force may answer for a while
			s.wantAdmittedSince(time.Now())
			back := time.Now()
			t.Logf("a new pod was admitted %s after the loss; %d s of these are those of holders to come back",
				inSeconds(back.Sub(gone)), heartbeatSeconds+3)
			s.wantMore(10)
			s.wantAdmitted(gone, back)
			l.wantWhole()
		}) {
			return // its pods may have lost their places
		}
	}
	l.T = t
}
