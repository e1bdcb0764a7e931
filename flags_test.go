package main

import (
	"maps"
	"regexp"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The help of a mode shows each default, and none where there is none. The defaults are no problem.
func TestFlagDefaults(t *testing.T) {
	shared := map[string]string{
		"lock-mode": "redlock", "redis-addresses": "127.0.0.1:6379", "etcd-addresses": "127.0.0.1:2379",
		"queue-redis-address": "127.0.0.1:6379", "heartbeat-interval-seconds": "30", "stale-threshold-seconds": "120",
		"redis-ca-file": "", "etcd-ca-file": "", "etcd-cert-file": "", "etcd-key-file": "",
	}
	webhook := map[string]string{
		"host": "0.0.0.0", "port": "9443", "certDir": "/var/k8s-webhook-server/serving-certs", "path-secret-file": "", "client-ca-file": "", "client-name": "",
		"metrics-bind-address": "0.0.0.0:8080", "when-full": "deny", "enable-sidecar-containers": "true",
		"sidecar-image": imageRepository + ":dev", "sidecar-image-pull-secret": "", "sidecar-resources": "cpu=100m,memory=64Mi",
		"sidecar-requests": "cpu=5m,memory=32Mi", "await-restart": "false", "pod-annotations": "", "sidecar-redis-secret": "", "sidecar-redis-ca": "", "sidecar-etcd-secret": "",
	}
	sidecar := map[string]string{"length": "", "expiration-seconds": "10", "termination-grace-period-seconds": "10"}
	gate := map[string]string{"kubernetes-address": "", "kubernetes-ca-file": "", "kubernetes-token-file": "", "namespaces": "", "unschedulable-seconds": "300",
		"metrics-bind-address": "0.0.0.0:8080"}
	maps.Copy(gate, shared)
	maps.Copy(webhook, shared)
	maps.Copy(sidecar, shared)
	flagPattern := regexp.MustCompile(`(?m)^  --(\S+) \S+\n        .*?(?: \(default (.*)\))?$`)
	for mode, want := range map[string]map[string]string{"webhook": webhook, "sidecar": sidecar, "gate": gate} {
		_, help, _ := runArgs(nil, mode, "--help")
		got := map[string]string{}
		for _, m := range flagPattern.FindAllStringSubmatch(help, -1) {
			got[m[1]] = m[2]
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: defaults %v, want %v in\n%s", mode, got, want, help)
		}
	}
	none := func(string) string { return "" }
	c, err := parseWebhookConfig(nil, none)
	rig.Must(t, err)
	if c.port != 9443 || c.whenFull != whenFullDeny || len(c.redisAddresses) != 1 || seconds(c.staleThreshold) != 120 {
		t.Errorf("the defaults were read as %+v", c)
	}
	s, err := parseSidecarConfig([]string{"--length=", "shop/web", "b7a1f0de-8a0e-4b0c-9d52-0a3c1a7de001"}, none)
	rig.Must(t, err)
	if s.length != 0 || seconds(s.expiration) != 10 || s.semaphore != (semaphoreID{"shop", "web"}) {
		t.Errorf("the defaults were read as %+v", s)
	}
}

// Wrong values, several in one flag, settings that do not go together, the environment and the arguments: one error
// names them all, in the order of the declarations.
func TestAllFlagProblems(t *testing.T) {
	code, _, stderr := runArgs(map[string]string{"REDIS_USERNAME": "hook", "ETCD_PASSWORD": "pa55word"}, "webhook",
		"--port=x", "--queue-redis-address=a,b:1", "--stale-threshold-seconds=59", "--etcd-cert-file=a",
		"--sidecar-redis-ca=secret/A", "--when-full=wait", "--enable-sidecar-containers=false", "--sidecar-image=a b", "now")
	const want = `at-least-semaphore-pod-hook: 12 wrong settings:
  --queue-redis-address: "a" is not HOST:PORT or redis://HOST:PORT or rediss://HOST:PORT
  --queue-redis-address: is one address, not 2 (for a group of servers: redis+sentinel://a:26379,b:26379,c:26379/NAME or redis+cluster://a:6379,b:6379,c:6379)
  --port: "x" is not a whole number from 1 to 65535
  --sidecar-image: "a b" is not an image
  --sidecar-redis-ca: "A" is not the name of an object
  --etcd-cert-file and --etcd-key-file go together
  --stale-threshold-seconds: 59 is less than twice --heartbeat-interval-seconds 30: one late heartbeat would cost a running pod its token
  REDIS_USERNAME is set and REDIS_PASSWORD is not
  ETCD_USERNAME and ETCD_PASSWORD go together
  --when-full: wait needs native sidecars: with --enable-sidecar-containers=false the containers of a pod start all at once, with or without a token
  --sidecar-redis-ca: is not used: no address that the sidecars get begins with rediss://
  unexpected argument "now": the webhook takes flags only
`
	if code != 2 || stderr != want {
		t.Errorf("exit code %d,\n%swant\n%s", code, stderr, want)
	}
}

// A value that is wrong by itself is not compared with others.
func TestWrongFlagIsReportedOnce(t *testing.T) {
	for args, want := range map[string]string{
		"--stale-threshold-seconds=1": `--stale-threshold-seconds: "1" is not a whole number from 2 to 86400`,
		"--heartbeat-interval-seconds=4000": `--heartbeat-interval-seconds: "4000" is not a whole number ` +
			"from 1 to 3600",
		"--when-full=wait --enable-sidecar-containers=maybe": `--enable-sidecar-containers: "maybe" is not true or false`,
		"--redis-addresses=rediss://u:p@h:1 --sidecar-redis-ca=secret/ca": "--redis-addresses: there are no credentials " +
			"in an address: they come from the environment, see --help",
	} {
		_, err := parseWebhookConfig(strings.Fields(args), func(string) string { return "" })
		if err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}

// The last of a flag that is given twice counts, right or wrong.
func TestRepeatedFlag(t *testing.T) {
	c, err := parseWebhookConfig([]string{"--port=x", "--redis-addresses=a:1,b:2", "--port=1", "--redis-addresses=c:3"},
		func(string) string { return "" })
	rig.Must(t, err)
	if c.port != 1 || len(c.redisAddresses) != 1 || c.redisAddresses[0] != "c:3" {
		t.Errorf("port %d, Redis %v", c.port, c.redisAddresses)
	}
}

// What stands in a list of resources or annotations is what a user would expect.
func TestListsOfNamesAndValues(t *testing.T) {
	c, err := parseWebhookConfig([]string{"--sidecar-resources=cpu=1, memory=1Gi,example.org/device=2", "--sidecar-requests=memory=1Gi",
		"--pod-annotations=traffic.sidecar.istio.io/excludeOutboundPorts=6379,2379,a=b=c,empty="}, func(string) string { return "" })
	rig.Must(t, err)
	if l := c.sidecarLimits; len(l) != 3 || l.Cpu().String() != "1" || l.Memory().String() != "1Gi" || l.Name("example.org/device", "").Value() != 2 {
		t.Errorf("limits %v", c.sidecarLimits)
	}
	if r := c.sidecarRequests; len(r) != 1 || r.Memory().String() != "1Gi" {
		t.Errorf("requests %v", r)
	}
	want := map[string]string{"traffic.sidecar.istio.io/excludeOutboundPorts": "6379,2379", "a": "b=c", "empty": ""}
	if !maps.Equal(c.podAnnotations, want) {
		t.Errorf("annotations %v", c.podAnnotations)
	}
}
