package deploy

import (
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	securityPage = "docs/security.md"
)

// namespaceUser is the user of the sidecars of a namespace.
func namespaceUser(namespace string) string { return "sidecar/" + namespace }

// The documented rules are the tested rules.
func TestACLsAreDocumented(t *testing.T) {
	page := rig.ReadFile(t, securityPage)
	for _, rules := range []string{
		rig.WebhookACL, rig.SidecarACL,
		"status on >PASSWORD " + rig.StatusACL + "\n", "SETUSER status " + rig.ReleaseACL + "\n",
		"SETUSER status " + rig.SetACL + "\n",
		"`" + rig.GateACL + "`", "`" + rig.ForgottenACL + "`", "`" + rig.EvictionACL + "`", "`" + rig.SentinelACL + "`",
		"`" + rig.OnSentinelsACL + "`", "`" + rig.ClusterACL + "`", "`" + rig.LockACL + "`",
		"`" + rig.WebhookLockACL + "`",
	} {
		if !strings.Contains(page, rules) {
			t.Errorf("not in %s: %s", securityPage, rules)
		}
	}
}

// The documented rules of a namespace's user are those of a sidecar, with the namespace
// in each key.
func TestNamespaceACLIsDocumented(t *testing.T) {
	want := "SETUSER sidecar/shop on >PASSWORD " + rig.NamespaceRules(rig.SidecarACL+" "+rig.HistoryACL, "shop") + "\n"
	if !strings.Contains(rig.ReadFile(t, securityPage), want) {
		t.Errorf("not in %s: %s", securityPage, want)
	}
}
