package deploy

import (
	"slices"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	securityPage   = "docs/security.md"
	namespacesUser = "namespaces" // deploy/namespace.sh makes users as this user
)

// namespaceUser is the user of the sidecars of a namespace.
func namespaceUser(namespace string) string { return "sidecar/" + namespace }

// The documented rules are the tested rules.
func TestACLsAreDocumented(t *testing.T) {
	page := rig.ReadFile(t, securityPage)
	for _, rules := range []string{
		rig.WebhookACL, rig.SidecarACL,
		"status on >PASSWORD " + rig.StatusACL + "\n", "SETUSER status " + rig.ReleaseACL + "\n",
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
	want := "SETUSER sidecar/shop on >PASSWORD " + rig.NamespaceRules(rig.SidecarACL, "shop") + "\n"
	if !strings.Contains(rig.ReadFile(t, securityPage), want) {
		t.Errorf("not in %s: %s", securityPage, want)
	}
}

// withoutLock returns the rules for servers without locks that Sentinels watch.
func withoutLock(rules string) string {
	return strings.NewReplacer("~lock/* ", "", " +set", "", " +get", "").Replace(rules) + " " + rig.SentinelACL
}

// The users in deploy/ have the tested rules. There, separate servers hold the locks, and
// Sentinels watch the servers of the tokens.
func TestACLsAreDeployed(t *testing.T) {
	want := map[string][]string{
		"webhook": {withoutLock(rig.WebhookACL) + " " + rig.ForgottenACL + " " + rig.EvictionACL,
			rig.LockACL + " " + rig.WebhookLockACL},
		"sidecar":    {}, // each namespace has its own user: see TestNamespaceUsersFollowTheirFiles
		"gate":       {withoutLock(rig.SidecarACL) + " " + rig.GateACL, rig.LockACL},
		"namespaces": {rig.NamespacesACL + " " + rig.AliveACL, rig.NamespacesACL + " " + rig.AliveACL},
		"status":     {rig.StatusACL + " " + rig.ReleaseACL + " " + rig.SentinelACL},
		"default": {"off", "on resetpass ~* &* +@all",
			"on nopass resetchannels -@all +ping " + rig.OnSentinelsACL},
	}
	got := map[string][]string{}
	for line := range strings.Lines(rig.ReadFile(t, scriptsFile)) {
		words := rig.UserLine(line)
		if len(words) < 3 || words[0] != "user" || want[words[1]] == nil {
			continue
		}
		rules := words[2:]
		if len(rules) > 1 && strings.HasPrefix(rules[1], ">$") {
			rules = rules[2:]
		}
		got[words[1]] = append(got[words[1]], sorted(strings.Join(rules, " ")))
	}
	for user, all := range want {
		for i := range all {
			all[i] = sorted(all[i])
		}
		slices.Sort(all)
		slices.Sort(got[user])
		if !slices.Equal(got[user], all) {
			t.Errorf("%s has\n%s, want\n%s", user, strings.Join(got[user], "\n"), strings.Join(all, "\n"))
		}
	}
}

// sorted returns a text with its words sorted.
func sorted(text string) string { return strings.Join(slices.Sorted(strings.FieldsSeq(text)), " ") }
