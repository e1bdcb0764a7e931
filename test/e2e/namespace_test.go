//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// password returns the password of new sidecars of the namespace.
func (n *namespace) password() string {
	n.Helper()
	return n.kubectl("get", "secret", "at-least-semaphore-pod-redis",
		"-o", "go-template={{.data.password | base64decode}}")
}

// good returns how many passwords of the namespace Redis accepts.
func (n *namespace) good() int {
	n.Helper()
	out, err := hook("get", "secret", "redis-namespaces",
		"-o", fmt.Sprintf("go-template={{index .data %q | base64decode}}", n.name))
	must(n.T, err)
	return strings.Count(out, "\n")
}

// The webhook warns of a namespace without a user in Redis, and a pod there starts when
// the command has made one. Pods keep their tokens when the password changes. The command
// also removes the user. For passwords after a restart of Redis, see testAllRedisDeleted.
func TestNamespace(t *testing.T) {
	t.Parallel()
	n := forgottenNamespace(t)
	eventually(t, patience, func() error { // a webhook asks for the users once a minute
		warnings, err := n.createWarned(pod("first", "own", 3), "--dry-run=server")
		if err == nil && !strings.Contains(warnings, "kubectl label namespace "+n.name) {
			err = fmt.Errorf("warned of %q", warnings)
		}
		return err
	})
	n.create(pod("first", "own", 3))
	eventually(t, patience, func() error {
		out, err := n.try("get", "pod", "first",
			"-o", "jsonpath={.status.initContainerStatuses[0].state.waiting.reason}")
		if err == nil && out != "CreateContainerConfigError" {
			err = fmt.Errorf("its sidecar is in %q", out)
		}
		return err
	})
	n.enable()
	n.wantRunning("first")
	warnings, err := n.createWarned(pod("second", "own", 3))
	if err != nil || warnings != "" {
		t.Errorf("warned of %q, %v", warnings, err)
	}
	n.wantRunning("second")
	first := n.password()

	n.enable()
	if n.password() == first || n.good() != 2 {
		t.Errorf("%d passwords are good; the password is the same: %v", n.good(), n.password() == first)
	}
	n.create(pod("third", "own", 3))
	n.wantRunning("third")
	n.delete("first", "second", "third")
	n.wantCounts("own", 3, 0) // all sidecars could give back, with the passwords that they had
	n.enable()
	n.enable()
	if n.good() != 2 { // no pod has an older password
		t.Errorf("%d passwords are good", n.good())
	}

	n.create(pod("last", "own", 3))
	n.wantRunning("last")
	err = shell("deploy/namespace.sh --delete " + n.name)
	if err == nil || !strings.Contains(err.Error(), "delete these first: last") {
		t.Errorf("with a pod: %v", err)
	}
	n.delete("last")
	n.enable("--delete")
	for i := range 3 {
		for _, port := range []string{"6379", "6380"} {
			again := fmt.Sprintf(`. /etc/redis/namespaces; echo "ACL DELUSER sidecar/%s" | acl %s`, n.name, port)
			removed, err := hook("exec", fmt.Sprintf("redis-%d", i), "-c", "redis", "--", "sh", "-c", again)
			if err != nil || strings.TrimSpace(removed) != "0" {
				t.Errorf("port %s of redis-%d still had the user: %s, %v", port, i, removed, err)
			}
		}
	}
	out, err := n.try("get", "secret", "at-least-semaphore-pod-redis", "--ignore-not-found")
	if err != nil || out != "" {
		t.Errorf("there is still %s, %v", out, err)
	}
	n.enable("--delete") // again
	for _, wrong := range []string{"", "Shop", "--delete", "a b", "../shop", "no-such-namespace"} {
		if err := shell("deploy/namespace.sh " + wrong); err == nil {
			t.Errorf("it accepts %q", wrong)
		}
	}
}
