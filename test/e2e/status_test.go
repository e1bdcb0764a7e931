//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// status runs the mode status in a webhook, as operators do.
func status(args ...string) (string, error) {
	command := []string{"exec", "deployment/webhook", "--", "/at-least-semaphore-pod-hook", "status"}
	return hook(append(command, args...)...)
}

// wantStatus waits until the status has lines that match the patterns, in this order.
func wantStatus(t *testing.T, what string, patterns ...string) {
	t.Helper()
	eventually(t, patience, func() error {
		out, err := status(what)
		if err == nil && !regexp.MustCompile("(?m)^"+strings.Join(patterns, "$[^§]*^")+"$").MatchString(out) {
			err = fmt.Errorf("no %q in\n%s", patterns, out)
		}
		return err
	})
}

// The status shows holders and waiters with the names of their pods and nodes. A living
// waiter that is released by hand joins the line again.
func TestStatus(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.create(pod("holder", "seen", 1))
	node := n.wantRunning("holder").Spec.NodeName
	n.create(waiting(pod("waiter", "seen", 1)))
	n.wantWaiters("seen", n.wantWaiting("waiter"))
	wantStatus(t, n.name, `NAMESPACE .*`, n.name+` +seen +1 +0 +1 +0 +1 +\d+ s +\d+ s ago`)
	wantStatus(t, n.name+"/seen", n.name+`/seen: 1 of 1 tokens in use \(0 stale\), 0 free, 1 waiting in line`,
		`holder +`+node+` +\d+ s +\d+ s ago +[-0-9a-f]{36}`,
		`1st +waiter +`+node+` +\d+ s +\d s ago +1 +[-0-9a-f]{36}`)
	n.wantSidecarLog("waiter", "; in use by holder (")
	inSidecar := []string{"exec", "waiter", "-c", sidecarName, "--", "/at-least-semaphore-pod-hook", "status"}
	own, err := n.try(inSidecar...)
	if err != nil || !strings.Contains(own, n.name+"/seen: 1 of 1 tokens in use") || !strings.Contains(own, "1st    waiter") {
		t.Errorf("in a sidecar: %s, %v", own, err)
	}
	want := "1 of 1 tokens in use, by holder ("
	if got := n.wantRefused(pod("late", "seen", 1)); !strings.Contains(got, want) {
		t.Errorf("refused with %q, want %q", got, want)
	}
	out, err := status("release", n.name+"/seen", "waiter", "--yes")
	if err != nil || !strings.Contains(out, "Its sidecar is alive") ||
		!strings.HasSuffix(strings.TrimSpace(out), "taken out of the line") {
		t.Errorf("%s, %v", out, err)
	}
	wantStatus(t, n.name+"/seen", `1st +waiter +.*`)
	own, err = n.try(append(inSidecar, "history")...)
	if err != nil || !regexp.MustCompile(`(?m)^\d+ s ago +waiter +`+node+` +\d+ s +- +by hand$`).MatchString(own) {
		t.Errorf("in a sidecar: %s, %v", own, err)
	}
	out, err = status(n.name, "-o", "json")
	must(t, err)
	var all struct {
		Semaphores []struct{ Key string }
	}
	err = json.Unmarshal([]byte(out), &all)
	if err != nil || len(all.Semaphores) != 1 || all.Semaphores[0].Key != "seen" {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := status(n.name, "--queue-redis-address=redis-9:6379"); err == nil {
		t.Errorf("without a Redis: %s", out)
	}
}

// The page shows the pods with tokens to whoever may forward a port of its pod.
func TestStatusPage(t *testing.T) {
	t.Parallel()
	text := manifestsOf(t, "deploy/status")
	must(t, errOf(kubectl(text, "apply", "-f", "-")))
	t.Cleanup(func() { must(t, errOf(kubectl(text, "delete", "-f", "-"))) })
	n := newNamespace(t)
	n.create(pod("holder", "page", 1))
	n.wantRunning("holder")
	must(t, rolledOut("deployment/status"))
	address := forwarded(t, "status", "8082")
	eventually(t, patience, func() error {
		response, err := http.Get("http://" + address + "/data?semaphore=" + n.name + "/page")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if text := string(body); err == nil && (!strings.Contains(text, "1 of 1 tokens in use") || !strings.Contains(text, `"holder"`)) {
			err = fmt.Errorf("the page has %s", text)
		}
		return err
	})
}
