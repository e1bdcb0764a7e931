package deploy

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const setupFile = "deploy/base/setup.yaml"

// Webhook and gate read the ConfigMap semaphores where it is mounted. It is the user's
// own: no manifest has it, or applying that again would reset it.
func TestSettingsOfOwnersAreMounted(t *testing.T) {
	const folder = "/var/run/at-least-semaphore-pod-hook/semaphores"
	for _, file := range []string{"deploy/base/webhook.yaml", "deploy/gate/gate.yaml"} {
		text := rig.ReadFile(t, file)
		for _, part := range []string{
			"- --semaphores-file=" + folder + "/semaphores\n",
			"- name: semaphores\n              mountPath: " + folder + "\n              readOnly: true\n",
			"- name: semaphores\n          configMap:\n            name: semaphores\n            optional: true\n",
		} {
			if !strings.Contains(text, part) {
				t.Errorf("%s lacks %s", file, part)
			}
		}
	}
	for _, name := range []string{"queue-redis-address", "heartbeat-interval-seconds", "stale-threshold-seconds"} {
		variable := strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		if !strings.Contains(rig.ReadFile(t, setupFile), "- --"+name+"=$("+variable+")\n") {
			t.Errorf("setup does not get --%s", name)
		}
	}
	files, err := filepath.Glob(rig.Path("deploy/*/*.yaml"))
	rig.Must(t, err)
	owned := regexp.MustCompile(`kind: ConfigMap\nmetadata:\n *name: semaphores\n`)
	for _, file := range files {
		if owned.MatchString(rig.ReadFile(t, "deploy/"+filepath.Base(filepath.Dir(file))+"/"+filepath.Base(file))) {
			t.Errorf("%s has the ConfigMap", file)
		}
	}
}

// The account of setup may do what its work needs, and nothing else. Only its own policy
// binds the creation of Secrets.
func TestRightsOfSetup(t *testing.T) {
	text := regexp.MustCompile(`(?m)^ *#.*\n`).ReplaceAllString(rig.ReadFile(t, setupFile), "")
	rule := regexp.MustCompile(`  - apiGroups: \[(.*)\]\n    resources: \[(.*)\]\n(?:    resourceNames: \[(.*)\]\n)?    verbs: \[(.*)\]\n`)
	rules := map[string][]string{}
	kinds := map[string]int{}
	for document := range strings.SplitSeq(text, "---\n") {
		kind := regexp.MustCompile(`(?m)^kind: (\w+)$`).FindStringSubmatch(document)[1]
		kinds[kind]++
		if kind != "Role" && kind != "ClusterRole" {
			continue
		}
		_, list, _ := strings.Cut(document, "\nrules:\n")
		for _, m := range rule.FindAllStringSubmatch(list, -1) {
			rules[kind] = append(rules[kind], strings.Join(m[1:], " | "))
		}
		if rest := rule.ReplaceAllString(list, ""); rest != "" {
			t.Errorf("%s: not read: %q", kind, rest)
		}
	}
	for kind, want := range map[string][]string{
		"Role": {
			`"" | secrets |  | get, list, watch, create, update, delete`,
			`"" | configmaps | semaphores | get, list, watch`,
			`events.k8s.io | events |  | create`,
		},
		"ClusterRole": {
			`"" | namespaces |  | get, list, watch`,
			`"" | pods |  | list`,
			`"" | secrets | at-least-semaphore-pod-redis | get, list, watch, update, delete`,
			`"" | secrets |  | create`,
			`admissionregistration.k8s.io | mutatingwebhookconfigurations | at-least-semaphore-pod-hook | get, patch`,
		},
	} {
		if !slices.Equal(rules[kind], want) {
			t.Errorf("%s: rules %q, want %q", kind, rules[kind], want)
		}
	}
	for _, kind := range []string{"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding",
		"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "Deployment", "NetworkPolicy"} {
		if kinds[kind] != 1 {
			t.Errorf("%d objects of the kind %s, want 1", kinds[kind], kind)
		}
	}
	for _, part := range []string{
		`request.userInfo.username == "system:serviceaccount:at-least-semaphore-pod-hook:setup"`,
		"failurePolicy: Fail", "operations: [CREATE, UPDATE]", "validationActions: [Deny]",
		`variables.type in ["Opaque", "kubernetes.io/tls"]`,
		`variables.type == "Opaque" && variables.opened && object.?metadata.?name.orValue("") == "at-least-semaphore-pod-redis"`,
	} {
		if !strings.Contains(text, part) {
			t.Errorf("the policy has no %s", part)
		}
	}
	// Manifests never set what setup owns: applying them again must not take it away.
	files, err := filepath.Glob(rig.Path("deploy/base/*.yaml"))
	rig.Must(t, err)
	owned := regexp.MustCompile(`(?m)^ *(caBundle|path: /mutate)`)
	for _, file := range files {
		if found := owned.FindString(rig.ReadFile(t, "deploy/base/"+filepath.Base(file))); found != "" {
			t.Errorf("%s sets %s, which setup owns", file, found)
		}
	}
}
