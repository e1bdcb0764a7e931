//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// password returns the password of new sidecars of the namespace.
func (n *namespace) password() string {
	n.Helper()
	return n.kubectl("get", "secret", "at-least-semaphore-pod-redis",
		"-o", "go-template={{with .data.password}}{{. | base64decode}}{{end}}")
}

// newPassword deletes the password of new sidecars, and waits until setup has made another.
func (n *namespace) newPassword() {
	n.Helper()
	before := n.password()
	n.kubectl("patch", "secret", "at-least-semaphore-pod-redis", "--type=json", "-p", `[{"op": "remove", "path": "/data/password"}]`)
	eventually(n.T, patience, func() error {
		if now := n.password(); now == "" || now == before {
			return fmt.Errorf("the password is %q", now)
		}
		return nil
	})
}

// good returns how many passwords of the namespace Redis accepts.
func (n *namespace) good() int {
	n.Helper()
	out, err := hook("get", "secret", "redis-users", "-o", "go-template={{index .data \"passwords\" | base64decode}}")
	must(n.T, err)
	return strings.Count("\n"+out, "\nsidecar/"+n.name+" ")
}

// wantGood waits until Redis accepts so many passwords of the namespace.
func (n *namespace) wantGood(want int) {
	n.Helper()
	eventually(n.T, patience, func() error {
		if got := n.good(); got != want {
			return fmt.Errorf("%d passwords are good, want %d", got, want)
		}
		return nil
	})
}

// The webhook warns of a namespace without the label, and a pod there starts when the
// namespace has got it. Pods keep their tokens when the password changes. Without the label,
// user and Secret go with the last pod.
func TestNamespace(t *testing.T) {
	t.Parallel()
	n := forgottenNamespace(t)
	label := "kubectl label namespace " + n.name + " " + labelSidecars
	eventually(t, patience, func() error { // a webhook asks for the users once a minute
		warnings, err := n.createWarned(pod("first", "own", 3), "--dry-run=server")
		if err == nil && !strings.Contains(warnings, label) {
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
	start := time.Now()
	n.enable()
	n.wantRunning("first")
	t.Logf("a pod that waited for the label ran after %s", inSeconds(time.Since(start)))
	warnings, err := n.createWarned(pod("second", "own", 3))
	if err != nil || warnings != "" {
		t.Errorf("warned of %q, %v", warnings, err)
	}
	n.wantRunning("second")
	n.newPassword()
	n.wantGood(2)
	n.create(pod("third", "own", 3))
	n.wantRunning("third")
	n.delete("first", "second", "third")
	n.wantCounts("own", 3, 0) // all sidecars could give back, with the passwords that they had
	n.wantGood(1)             // no pod has the older password

	n.create(pod("last", "own", 3))
	n.wantRunning("last")
	must(t, errOf(kubectl("", "label", "namespace", n.name, labelSidecars+"-")))
	n.delete("last")
	n.wantCounts("own", 3, 0)
	eventually(t, patience, func() error {
		out, err := n.try("get", "secret", "at-least-semaphore-pod-redis", "--ignore-not-found")
		if good := n.good(); err == nil && out+fmt.Sprint(good) != "0" {
			err = fmt.Errorf("there are still %d passwords, and %s", good, out)
		}
		return err
	})
}
