package deploy

import (
	"fmt"
	"net/http"
	"regexp"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The liveness probe of deploy/etcd fails for a member that hangs, and not for one that has
// lost its quorum. The readiness probe fails for both.
func TestEtcdProbes(t *testing.T) {
	t.Parallel()
	manifest := rig.ReadFile(t, "deploy/etcd/etcd.yaml")
	path := func(probe string) string {
		m := regexp.MustCompile(probe + `:\n +httpGet: \{path: (\S+), port: client\}\n`).FindStringSubmatch(manifest)
		if m == nil {
			t.Fatalf("deploy/etcd has no %s", probe)
		}
		return m[1]
	}
	members := rig.StartEtcd(t, 3)
	member := members[0]
	client := http.Client{Timeout: 5 * time.Second}
	probe := func(name string) error {
		response, err := client.Get("http://" + member.Address + path(name))
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", path(name), response.Status)
		}
		return nil
	}
	want := func(when, name string, passes bool) {
		t.Helper()
		rig.Eventually(t, time.Minute, func() error {
			if err := probe(name); (err == nil) != passes {
				return fmt.Errorf("%s, the %s passes: %t (%v)", when, name, err == nil, err)
			}
			return nil
		})
	}
	want("at rest", "livenessProbe", true)
	want("at rest", "readinessProbe", true)
	members[1].Kill()
	members[2].Kill()
	want("without a quorum", "readinessProbe", false)
	want("without a quorum", "livenessProbe", true)
	member.Pause(t)
	want("hung", "livenessProbe", false)
	member.Resume(t)
	want("resumed", "livenessProbe", true)
}
