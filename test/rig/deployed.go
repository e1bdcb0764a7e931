package rig

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
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

// DeployedGroup has the servers of the three pods of deploy/sentinel, with their scripts
// and settings. Each pod has an address of its own, on the ports that all have.
type DeployedGroup struct {
	SentinelGroup
	Locks []*Redis
	dirs  []string // of the pods
}

// usersOfGroup are the users of deploy/sentinel that have no other test, one for the test
// itself, and those of clients, which take the servers for old.
var usersOfGroup = `user default on resetpass ~* &* +@all
user replication on >PASSWORD +ping +psync +replconf
user sentinel on >PASSWORD &__sentinel__:hello +ping +role +info +multi +exec +slaveof +replicaof +config|rewrite +publish +subscribe +client|setname +client|kill +script|kill +dbsize
user control on >PASSWORD ~* &* +@all -info +info|replication +info|stats +info|clients
user webhook on >PASSWORD ` + Ageless(WebhookACL) + " " + SentinelACL + " " + EvictionACL + `
user sidecar on >PASSWORD ` + Ageless(SidecarACL) + " " + SentinelACL + `
`

const usersOfLocks = `user default off
user sentinel on >PASSWORD +ping
user control on >PASSWORD ~* &* +@all
user webhook on >PASSWORD ` + LockACL + " " + WebhookLockACL + `
user sidecar on >PASSWORD ` + LockACL + `
`

// StartDeployedGroup starts a group and waits until it is complete.
func StartDeployedGroup(t testing.TB) *DeployedGroup {
	t.Helper()
	g := new(DeployedGroup)
	network := 1 + rand.IntN(1<<16-2) // all of 127.0.0.0/8 is this machine
	ports := []string{Port(FreeAddress(t)), Port(FreeAddress(t)), Port(FreeAddress(t))}
	env := []string{"REDISCLI_AUTH=" + Password}
	var addresses []string
	for i := range 3 {
		addresses = append(addresses, fmt.Sprintf("127.%d.%d.%d", network>>8, network&255, i+1))
		env = append(env, fmt.Sprintf("REDIS_%d_SERVICE_HOST=%s", i, addresses[i]))
	}
	for i, address := range addresses {
		dir := t.TempDir()
		g.dirs = append(g.dirs, dir)
		writeDeployed(t, dir, address, ports)
		server := func(port, user, program string, args ...string) *Redis {
			r := &Redis{Address: net.JoinHostPort(address, port), program: program, Args: args,
				dial: []redis.DialOption{redis.DialUsername(user), redis.DialPassword(Password),
					redis.DialReadTimeout(5 * time.Second)},
				env: func(string) []string { return slices.Concat(env, []string{fmt.Sprintf("POD=redis-%d", i)}) }}
			t.Cleanup(func() {
				if r.Process != nil {
					r.Stop()
				}
			})
			return r
		}
		g.Servers = append(g.Servers, server(ports[0], "control", "sh", filepath.Join(dir, "redis.sh")))
		g.Locks = append(g.Locks, server(ports[1], "control", "", filepath.Join(dir, "lock.conf")))
		g.Sentinels = append(g.Sentinels, server(ports[2], "sentinel", "sh", filepath.Join(dir, "sentinel.sh")))
	}
	g.StartPods(t, 0, 1, 2)
	g.WantReady(t, 2)
	return g
}

// writeDeployed writes the scripts and settings of a pod with an address and its ports:
// Redis, lock and Sentinel.
func writeDeployed(t testing.TB, dir, address string, ports []string) {
	t.Helper()
	here := strings.NewReplacer("/etc/redis/", dir+"/", "/etc/redis-users/", dir+"/", "/data", dir+"/data",
		"127.0.0.1", address, "redis-server ", RedisProgram+" ",
		"replica-announce-ip $me", "replica-announce-ip $me\nbind $me\nport "+ports[0],
		"sentinel announce-ip $me", "sentinel announce-ip $me\nbind $me",
		"port 6380", "port "+ports[1]+"\nbind "+address,
		"26379", ports[2], "6379", ports[0])
	files, err := os.ReadDir(Path("deploy/sentinel"))
	Must(t, err)
	for _, file := range files {
		if extension := filepath.Ext(file.Name()); extension == ".sh" || extension == ".conf" {
			text := here.Replace(ReadFile(t, "deploy/sentinel/"+file.Name()))
			Must(t, os.WriteFile(filepath.Join(dir, file.Name()), []byte(text), 0o600))
		}
	}
	for name, users := range map[string]string{"users.acl": usersOfGroup, "locks.acl": usersOfLocks} {
		users = strings.ReplaceAll(users, "PASSWORD", Password)
		Must(t, os.WriteFile(filepath.Join(dir, name), []byte(users), 0o600))
	}
	Must(t, os.Mkdir(filepath.Join(dir, "data"), 0o700))
}

// serversOf returns the servers of a pod.
func (g *DeployedGroup) serversOf(pod int) []*Redis {
	return []*Redis{g.Servers[pod], g.Locks[pod], g.Sentinels[pod]}
}

// StartPods starts all servers of some pods, and waits until they answer.
func (g *DeployedGroup) StartPods(t testing.TB, pods ...int) {
	t.Helper()
	var all []*Redis
	for _, pod := range pods {
		all = append(all, g.serversOf(pod)...)
	}
	for _, r := range all {
		Must(t, r.begin())
	}
	for _, r := range all {
		Must(t, r.answered(time.Minute))
	}
}

// SignalPod sends a signal to all servers of a pod, and waits until they have ended.
func (g *DeployedGroup) SignalPod(t testing.TB, pod int, signal syscall.Signal) {
	t.Helper()
	for _, r := range g.serversOf(pod) {
		r.Signal(t, signal)
	}
	for _, r := range g.serversOf(pod) {
		<-r.Done()
	}
}

// EmptyPod removes all files of a pod's volume.
func (g *DeployedGroup) EmptyPod(t testing.TB, pod int) {
	t.Helper()
	data := filepath.Join(g.dirs[pod], "data")
	Must(t, os.RemoveAll(data))
	Must(t, os.Mkdir(data, 0o700))
}

// RunIn runs a script in a pod, and returns its output.
func (g *DeployedGroup) RunIn(pod int, script string, args ...string) (string, error) {
	cmd := exec.Command("sh", append([]string{filepath.Join(g.dirs[pod], script)}, args...)...)
	cmd.Env = append(os.Environ(), g.Servers[pod].env("")...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}
