//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// password is what sidecars of the namespace log in with from now on.
func (n *namespace) password() string {
	n.Helper()
	return n.kubectl("get", "secret", "at-least-semaphore-pod-redis", "-o", "go-template={{.data.password | base64decode}}")
}

// good is how many passwords of the namespace are.
func (n *namespace) good() int {
	n.Helper()
	out, err := hook("get", "secret", "redis-namespaces", "-o", fmt.Sprintf("go-template={{index .data %q | base64decode}}", n.name))
	must(n.T, err)
	return strings.Count(out, "\n")
}

// A namespace that was forgotten is told so, and goes on where it stopped when the command has been run. Another password hurts nobody
// who has the old one, not even when all of Redis starts again. In the end all is gone.
func TestNamespace(t *testing.T) {
	n := forgottenNamespace(t)
	eventually(t, 90*time.Second, func() error { // a webhook believes what it knows for a minute
		_, warnings, err := kubectlWarned(encode(pod("first", "own", 3)), "-n", n.name, "create", "--dry-run=server", "-f", "-")
		if err == nil && !strings.Contains(warnings, "run deploy/namespace.sh "+n.name) {
			err = fmt.Errorf("warned of %q", warnings)
		}
		return err
	})
	n.create(pod("first", "own", 3))
	eventually(t, time.Minute, func() error {
		out, err := n.try("get", "pod", "first", "-o", "jsonpath={.status.initContainerStatuses[0].state.waiting.reason}")
		if err == nil && out != "CreateContainerConfigError" {
			err = fmt.Errorf("its sidecar is in %q", out)
		}
		return err
	})
	n.enable()
	n.wantRunning("first")
	_, warnings, err := kubectlWarned(encode(pod("second", "own", 3)), "-n", n.name, "create", "-f", "-")
	if err != nil || warnings != "" {
		t.Errorf("warned of %q, %v", warnings, err)
	}
	n.wantRunning("second")
	first := n.password()

	n.enable()
	if n.password() == first || n.good() != 2 {
		t.Errorf("%d passwords are good, and it was %v the same", n.good(), n.password() == first)
	}
	n.create(pod("third", "own", 3))
	n.wantRunning("third")
	_, err = hook("delete", "pod", "-l", "app.kubernetes.io/component=redis")
	must(t, err)
	must(t, rolledOut("statefulset/redis"))
	for _, name := range []string{"first", "second", "third"} {
		n.kubectl("delete", "pod", name, "--wait=false")
		n.wantGone(name)
	}
	n.wantCounts("own", 3, 0) // all could give back, by the passwords that they had
	n.enable()
	n.enable()
	if n.good() != 2 { // nobody has one that is older
		t.Errorf("%d passwords are good", n.good())
	}

	n.create(pod("last", "own", 3))
	n.wantRunning("last")
	if err := shell("deploy/namespace.sh --delete " + n.name); err == nil || !strings.Contains(err.Error(), "delete these first: last") {
		t.Errorf("with a pod: %v", err)
	}
	n.kubectl("delete", "pod", "last")
	n.enable("--delete")
	for i := range 3 {
		for _, port := range []string{"6379", "6380"} {
			again := fmt.Sprintf(`. /etc/redis/namespaces; echo "ACL DELUSER sidecar/%s" | acl %s`, n.name, port)
			if removed, err := hook("exec", fmt.Sprintf("redis-%d", i), "-c", "redis", "--", "sh", "-c", again); err != nil || strings.TrimSpace(removed) != "0" {
				t.Errorf("on port %s of redis-%d the user was there: %s, %v", port, i, removed, err)
			}
		}
	}
	if out, err := n.try("get", "secret", "at-least-semaphore-pod-redis", "--ignore-not-found"); err != nil || out != "" {
		t.Errorf("there is %s, %v", out, err)
	}
	n.enable("--delete") // again
	for _, wrong := range []string{"", "Shop", "--delete", "a b", "../shop", "no-such-namespace"} {
		if err := shell("deploy/namespace.sh " + wrong); err == nil {
			t.Errorf("%q is taken", wrong)
		}
	}
}
