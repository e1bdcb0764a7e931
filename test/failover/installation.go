// Package failover makes the servers of a queue fail under load: Sentinel groups,
// Clusters, and a provider's address that moves. It also kills and pauses gates.
// Webhooks, sidecars and gates are processes, and each test has its own servers.
package failover

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// patience limits each wait. It is long because the machine may be busy.
const patience = time.Minute

// checkedProgram is the program, with the race detector if the tests have it. Sidecars
// that hold a token run without it: there are many, and the waiting sidecars run the same
// code later.
var checkedProgram = sync.OnceValues(func() (path string, err error) {
	var flags []string
	race := debug.BuildSetting{Key: "-race", Value: "true"}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, race) {
		flags = append(flags, "-race")
	}
	path = filepath.Join(rig.Folder(), "checked")
	return path, rig.Build(rig.Root(), path, flags...)
})

// program is the path of checkedProgram.
func program(t *testing.T) string {
	t.Helper()
	path, err := checkedProgram()
	rig.Must(t, err)
	return path
}

// wantNoRace fails the test if the race detector reports a race until the process ends.
// Call it before the start.
func wantNoRace(t *testing.T, p *rig.Process) {
	t.Helper()
	t.Cleanup(func() {
		if strings.Contains(p.Log.String(), "WARNING: DATA RACE") {
			t.Errorf("%v:\n%s", p.Cmd.Args, p.Log.String())
		}
	})
}

// installation has what the processes of one test share.
type installation struct {
	queue  string     // address
	lock   *rig.Redis // of the test's own
	timing rig.Timing
}

// slowTiming has a threshold that is longer than any test: only a wrong repair takes a
// token away.
var slowTiming = rig.Timing{Interval: 2 * time.Second, Threshold: 120 * time.Second}

func newInstallation(t *testing.T, queue string, timing rig.Timing) *installation {
	t.Helper()
	return &installation{queue, rig.StartRedis(t), timing}
}

func (i *installation) flags() []string {
	return []string{
		"--queue-redis-address=" + i.queue,
		"--redis-addresses=" + i.lock.Address,
		fmt.Sprintf("--heartbeat-interval-seconds=%d", i.timing.Interval/time.Second),
		fmt.Sprintf("--stale-threshold-seconds=%d", i.timing.Threshold/time.Second),
	}
}

// newWebhook returns a webhook, not started.
func (i *installation) newWebhook(t *testing.T, flags ...string) *rig.Webhook {
	t.Helper()
	w := rig.NewWebhook(t, program(t), i.lock.Address, append(i.flags(), flags...)...)
	wantNoRace(t, w.Process)
	return w
}

// startWebhook starts a webhook and waits until it is ready.
func (i *installation) startWebhook(t *testing.T) *rig.Webhook {
	t.Helper()
	w := i.newWebhook(t)
	w.Begin(t)
	return w
}

// startGate starts a gate for an API server. flags follow those of the installation.
func (i *installation) startGate(t *testing.T, api *rig.APIServer, flags ...string) *rig.Gate {
	t.Helper()
	g := rig.NewGate(t, program(t), api, i.lock.Address, append(i.flags(), flags...)...)
	wantNoRace(t, g.Process)
	g.Start(t)
	return g
}

// newSidecar returns the sidecar, not started, of a pod whose token a webhook has taken.
func (i *installation) newSidecar(t *testing.T, id rig.ID, token string) *rig.Process {
	t.Helper()
	args := slices.Concat([]string{"sidecar"}, i.flags(), []string{id.String(), token})
	return rig.NewProcess(rig.Program(t), args...)
}

// newWaitingSidecar returns a sidecar, not started, that acquires its token itself.
func (i *installation) newWaitingSidecar(t *testing.T, id rig.ID, token string, length int) *rig.Process {
	t.Helper()
	own := []string{fmt.Sprintf("--length=%d", length), id.String(), token}
	p := rig.NewProcess(program(t), slices.Concat([]string{"sidecar"}, i.flags(), own)...)
	wantNoRace(t, p)
	return p
}

// setEnv adds variables, NAME=VALUE, to the environment of a process before its start.
func setEnv(p *rig.Process, variables ...string) { p.Cmd.Env = append(os.Environ(), variables...) }

// ask sends a review to a webhook, like an API server that gives up after timeout.
func ask(w *rig.Webhook, body []byte, timeout time.Duration) (status int, text string, err error) {
	response, err := w.Client.Post(w.URL+"/mutate?timeout="+timeout.String(), "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	return response.StatusCode, string(b), err
}
