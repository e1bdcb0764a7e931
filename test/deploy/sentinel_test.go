package deploy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const sentinelFolder = "deploy/sentinel"

// The scripts of deploy/sentinel stay small: they have at most 200 lines.
func TestSentinelScriptsAreSmall(t *testing.T) {
	files, err := filepath.Glob(rig.Path(sentinelFolder + "/*.sh"))
	rig.Must(t, err)
	lines := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		rig.Must(t, err)
		lines += strings.Count(string(text), "\n")
	}
	if lines == 0 || lines > 200 {
		t.Errorf("%d scripts have %d lines, want at most 200", len(files), lines)
	}
}

// Each script and setting of deploy/sentinel is in its ConfigMap. Its hash restarts the
// servers.
func TestSentinelScriptsAreDeployed(t *testing.T) {
	kustomization := rig.ReadFile(t, sentinelFolder+"/kustomization.yaml")
	entries, err := os.ReadDir(rig.Path(sentinelFolder))
	rig.Must(t, err)
	for _, entry := range entries {
		if filepath.Ext(entry.Name()) != ".yaml" && !strings.Contains(kustomization, "      - "+entry.Name()+"\n") {
			t.Errorf("the ConfigMap lacks %s", entry.Name())
		}
	}
	if strings.Contains(kustomization, "disableNameSuffixHash") {
		t.Error("the ConfigMap has no hash")
	}
}

// Both servers of a pod evict nothing, and close idle connections, also of clients that
// never log in. A replica soon leaves a dead connection to its primary.
func TestSentinelSettings(t *testing.T) {
	both := []string{"timeout 300", "maxmemory-policy noeviction"}
	for file, lines := range map[string][]string{
		"redis.conf": append([]string{"repl-timeout 5", "repl-ping-replica-period 1"}, both...),
		"lock.conf":  both,
	} {
		text := rig.ReadFile(t, sentinelFolder+"/"+file)
		for _, line := range lines {
			if !strings.Contains(text, "\n"+line+"\n") {
				t.Errorf("%s lacks %s", file, line)
			}
		}
	}
}

// The liveness probe fails while a server does not answer, or is BUSY with a script that
// cannot be killed. It passes with any other answer: a restart would not help.
func TestSentinelAlive(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	r.Do(t, "ACL", "SETUSER", "sentinel", "on", ">"+rig.Password, "+ping")
	want := func(when, text string) {
		t.Helper()
		rig.Eventually(t, time.Minute, func() error {
			cmd := exec.Command("sh", rig.Path(sentinelFolder+"/alive.sh"), rig.Port(r.Address))
			cmd.Env = append(os.Environ(), "REDISCLI_AUTH="+rig.Password)
			out, err := cmd.CombinedOutput()
			if (err != nil) != (text != "") || !strings.Contains(string(out), text) {
				return fmt.Errorf("%s: %v: %s", when, err, out)
			}
			return nil
		})
	}
	want("at rest", "")
	r.Do(t, "CONFIG", "SET", "maxclients", 1)
	want("with as many connections as it accepts", "")
	r.Do(t, "CONFIG", "SET", "maxclients", 100)
	r.Do(t, "ACL", "SETUSER", "sentinel", "resetpass", ">another")
	want("with another password", "")
	r.Do(t, "ACL", "SETUSER", "sentinel", "resetpass", ">"+rig.Password)
	r.Pause(t)
	want("paused", "no answer")
	r.Resume(t)
	want("resumed", "")
	r.Do(t, "CONFIG", "SET", "busy-reply-threshold", 10)
	rig.Must(t, r.Control.Send("EVAL", "redis.call('SET', KEYS[1], 1) while true do end", 1, "key"))
	rig.Must(t, r.Control.Flush())
	want("busy", "BUSY")
	r.Kill()
	want("gone", "Could not connect")
}
