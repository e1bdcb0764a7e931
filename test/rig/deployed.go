package rig

import (
	"regexp"
	"testing"
)

// DeployedMemory returns the webhook's memory settings of Go in deploy/: GOMEMLIMIT=VALUE
// and GOGC=VALUE.
func DeployedMemory(t testing.TB) (environment []string) {
	t.Helper()
	manifest := ReadFile(t, "deploy/base/webhook.yaml")
	for _, name := range []string{"GOMEMLIMIT", "GOGC"} {
		m := regexp.MustCompile(`name: ` + name + `\n +value: "?([^"\n]+)"?\n`).FindStringSubmatch(manifest)
		if m == nil {
			t.Fatalf("deploy/base/webhook.yaml does not set %s", name)
		}
		environment = append(environment, name+"="+m[1])
	}
	return environment
}
