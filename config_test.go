package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// runArgs runs the program in this process, and returns its exit code and output.
func runArgs(env map[string]string, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	err := run(context.Background(), args, func(k string) string { return env[k] }, strings.NewReader(""), &out, &errs)
	code = exitCode(err, &errs)
	return code, out.String(), errs.String()
}

func TestHelp(t *testing.T) {
	for _, c := range []struct {
		args string
		want []string
	}{
		{"help", []string{"webhook ", "sidecar ", "await ", "version "}},
		{"--help", []string{"webhook ", "sidecar ", "await ", "version "}},
		{"-h", []string{"webhook ", "sidecar ", "await ", "version "}},
		{"webhook --help", []string{
			"--certDir DIRECTORY", "(default /var/k8s-webhook-server/serving-certs)",
			"--enable-sidecar-containers true|false", "--heartbeat-interval-seconds SECONDS", "(default 30)",
			"--host ADDRESS", "--port PORT", "--lock-mode", "--metrics-bind-address", "--when-full deny|wait",
			"--sidecar-etcd-secret NAME", "--queue-redis-address", "--redis-addresses", "--etcd-addresses",
			"--sidecar-image", "--stale-threshold-seconds", "REDIS_PASSWORD",
		}},
		{"sidecar -h", []string{
			"--length NUMBER", "--expiration-seconds SECONDS", "POD_UID", "sidecar [flags] NAMESPACE/KEY TOKEN",
			"--termination-grace-period-seconds SECONDS", "(default 10)", "--heartbeat-interval-seconds",
			"--lock-mode", "--queue-redis-address", "--redis-addresses", "--etcd-addresses",
			"--stale-threshold-seconds",
		}},
		{"version", []string{"at-least-semaphore-pod-hook dev ("}},
	} {
		code, stdout, stderr := runArgs(nil, strings.Fields(c.args)...)
		if code != 0 || stderr != "" {
			t.Errorf("%s: exit code %d, %q", c.args, code, stderr)
		}
		for _, want := range c.want {
			if !strings.Contains(stdout, want) {
				t.Errorf("%s: no %q in\n%s", c.args, want, stdout)
			}
		}
	}
}

func TestWrongUsage(t *testing.T) {
	const token = "b7a1f0de-8a0e-4b0c-9d52-0a3c1a7de001"
	for args, want := range map[string][]string{
		"":                      {"no mode given", "Modes:", "webhook "},
		"serve":                 {`unknown mode "serve"`, "Modes:", "sidecar "},
		"webhook --prot=1":      {"flag provided but not defined: -prot", "--port PORT"},
		"sidecar --port=1":      {"flag provided but not defined: -port", "--termination-grace-period-seconds"},
		"webhook now":           {`unexpected argument "now": the webhook takes flags only`},
		"sidecar":               {"0 arguments after the flags; they are NAMESPACE/KEY TOKEN"},
		"sidecar shop/web":      {"1 arguments after the flags"},
		"sidecar web " + token:  {`NAMESPACE/KEY: "web" is not a namespace, a slash and a key`},
		"sidecar /web " + token: {"NAMESPACE/KEY"},
		"sidecar shop/w{} t":    {"2 wrong settings", "NAMESPACE/KEY", `TOKEN: "t" is not a UUID`},
		"webhook --port=0 --host= --heartbeat-interval-seconds=x --queue-redis-address=redis " +
			"--redis-addresses=a:1,b,a:1 --etcd-addresses= --lock-mode=file --enable-sidecar-containers=maybe " +
			"--metrics-bind-address=:0 --sidecar-image= --certDir= --when-full=queue": {
			"12 wrong settings",
			`--when-full: "queue" is not deny or wait`,
			`--port: "0" is not a whole number from 1 to 65535`,
			`--heartbeat-interval-seconds: "x" is not a whole number from 1 to 3600`,
			`--queue-redis-address: "redis" is not HOST:PORT`,
			`--redis-addresses: "b" is not HOST:PORT`,
			`--redis-addresses: "a:1" is named twice`,
			`--etcd-addresses: "" is not HOST:PORT`,
			`--lock-mode: "file" is not redlock or etcd`,
			`--enable-sidecar-containers: "maybe" is not true or false`,
			`--metrics-bind-address: ":0" is not HOST:PORT`,
			`--sidecar-image: "" is not an image`,
			`--certDir: is empty`,
		},
		"webhook --stale-threshold-seconds=90 --unstarted-seconds=91": {
			"--unstarted-seconds: 91 is more than --stale-threshold-seconds 90: every token without a heartbeat",
		},
		"webhook --unstarted-seconds=0": {`--unstarted-seconds: "0" is not a whole number from 1 to 86400`},
		"webhook --heartbeat-interval-seconds=30 --stale-threshold-seconds=59": {
			"--stale-threshold-seconds: 59 is less than twice --heartbeat-interval-seconds 30",
		},
		"webhook --when-full=wait --enable-sidecar-containers=false": {
			"--when-full: wait needs native sidecars: with --enable-sidecar-containers=false",
		},
		"webhook --sidecar-resources=cpu=1,cpu=2 --sidecar-requests=memory --pod-annotations=a " +
			"--sidecar-image-pull-secret=A --await-restart=x": {
			"5 wrong settings",
			`--sidecar-resources: cpu is named twice`,
			`--sidecar-requests: "memory" is not RESOURCE=QUANTITY, such as cpu=100m or memory=64Mi`,
			`--pod-annotations: "a" is not NAME=VALUE, with the name of an annotation`,
			`--sidecar-image-pull-secret: "A" is not the name of an object`,
			`--await-restart: "x" is not true or false`,
		},
		"webhook --sidecar-resources=cpu=0 --pod-annotations=" + annotationKey + "=x": {
			"2 wrong settings", `--sidecar-resources: "cpu=0" is not`, annotationKey + " is for pods to set",
		},
		"webhook --sidecar-resources=memory=16Mi,cpu=1": {
			"--sidecar-requests: memory=32Mi is more than the limit in --sidecar-resources, 16Mi",
		},
		"webhook --await-restart --enable-sidecar-containers=false": {
			"--await-restart: is not used with --enable-sidecar-containers=false",
		},
		"sidecar --length=0 --expiration-seconds=3601 a/b " + token: {
			"2 wrong settings", `--length: "0" is not a whole number from 1 to 10000`, "--expiration-seconds",
		},
		"sidecar --wait-seconds=604801 --when-waited=go a/b " + token: {
			"3 wrong settings", `--wait-seconds: "604801" is not a whole number from 1 to 604800`,
			`--when-waited: "go" is not fail or run`,
		},
		"sidecar --when-waited=run a/b " + token: {"--when-waited: is not used without --wait-seconds"},
		"sidecar --wait-seconds=1 a/b " + token:  {"--wait-seconds: is not used without --length"},
		"await":                                  {"await takes no arguments, and asks the sidecar of the pod that POD_UID names"},
		"sidecar --termination-grace-period-seconds=0 --stale-threshold-seconds=1 a/b " + token: {
			"2 wrong settings", "--termination-grace-period-seconds", "--stale-threshold-seconds",
		},
	} {
		code, stdout, stderr := runArgs(nil, strings.Fields(args)...)
		if code != 2 || stdout != "" {
			t.Errorf("%q: exit code %d, stdout %q", args, code, stdout)
		}
		for _, w := range want {
			if !strings.Contains(stderr, w) {
				t.Errorf("%q: no %q in\n%s", args, w, stderr)
			}
		}
	}
}

func TestSecretsComeFromTheEnvironment(t *testing.T) {
	env := map[string]string{"REDIS_USERNAME": "hook"}
	code, _, stderr := runArgs(env, "webhook")
	if code != 2 || !strings.Contains(stderr, "REDIS_USERNAME is set and REDIS_PASSWORD is not") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	env["REDIS_PASSWORD"] = "pa55word"
	getenv := func(k string) string { return env[k] }
	_, err := parseWebhookConfig(nil, getenv)
	const want = "--sidecar-redis-secret: is needed where REDIS_PASSWORD, --redis-password-file or REDIS_SENTINEL_PASSWORD is set: " +
		"the sidecars would have no credentials"
	if err == nil || err.Error() != want {
		t.Errorf("without a Secret for the sidecars: got %v", err)
	}
	c, err := parseWebhookConfig([]string{"--sidecar-redis-secret=redis"}, getenv)
	rig.Must(t, err)
	if c.redis != (redisSettings{username: "hook", password: "pa55word"}) {
		t.Errorf("credentials %v", c.redis)
	}
	file := rig.WriteFile(t, "password", "pa55word\n")
	for text, want := range map[string]string{
		file:            "--redis-password-file: a password is in the environment, too: set one of them",
		"/no/such/file": "--redis-password-file: open /no/such/file: no such file or directory",
	} {
		_, err := parseGateConfig([]string{"--redis-password-file=" + text, "--kubernetes-address=a:1",
			"--kubernetes-token-file=b"}, getenv)
		if err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", text, err, want)
		}
	}
	_, stdout, _ := runArgs(env, "webhook", "--help")
	if strings.Contains(stdout, "pa55word") {
		t.Error("the help shows the password")
	}
}

// A boolean flag without a value is true.
func TestBoolFlag(t *testing.T) {
	for arg, want := range map[string]bool{
		"--enable-sidecar-containers": true, "--enable-sidecar-containers=false": false, "--port=1": true,
	} {
		c, err := parseWebhookConfig([]string{arg}, func(string) string { return "" })
		rig.Must(t, err)
		if c.enableSidecarContainers != want {
			t.Errorf("%s: enableSidecarContainers is %t", arg, c.enableSidecarContainers)
		}
	}
}

// The help of a mode shows the default of each flag that has one. The defaults are valid.
func TestFlagDefaults(t *testing.T) {
	shared := map[string]string{
		"lock-mode": "redlock", "redis-addresses": "127.0.0.1:6379", "etcd-addresses": "127.0.0.1:2379",
		"queue-redis-address": "127.0.0.1:6379", "heartbeat-interval-seconds": "30", "stale-threshold-seconds": "120",
		"redis-ca-file": "", "etcd-ca-file": "", "etcd-cert-file": "", "etcd-key-file": "",
	}
	webhook := map[string]string{
		"host": "0.0.0.0", "port": "9443", "certDir": "/var/k8s-webhook-server/serving-certs",
		"path-secret-file": "", "client-ca-file": "", "client-name": "",
		"metrics-bind-address": "0.0.0.0:8080", "when-full": "deny", "enable-sidecar-containers": "true",
		"sidecar-image": imageRepository + ":dev", "sidecar-image-pull-secret": "",
		"sidecar-resources": "cpu=100m,memory=64Mi", "sidecar-run-as-user": "65532",
		"sidecar-requests": "cpu=5m,memory=32Mi", "await-restart": "false", "pod-annotations": "",
		"sidecar-redis-secret": "", "sidecar-redis-ca": "", "sidecar-etcd-secret": "", "unstarted-seconds": "",
		"max-head-start": "3600",
	}
	sidecar := map[string]string{"length": "", "expiration-seconds": "10", "termination-grace-period-seconds": "10",
		"tokens": "1", "head-start-seconds": "0", "wait-seconds": "", "when-waited": ""}
	gate := map[string]string{
		"kubernetes-address": "", "kubernetes-ca-file": "", "kubernetes-token-file": "", "namespaces": "",
		"unschedulable-seconds": "300", "metrics-bind-address": "0.0.0.0:8080",
	}
	maps.Copy(gate, shared)
	maps.Copy(webhook, shared)
	maps.Copy(sidecar, shared)
	gate["redis-password-file"], webhook["redis-password-file"] = "", ""
	gate["semaphores-file"], webhook["semaphores-file"] = "", ""
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
		t.Errorf("the defaults were parsed as %+v", c)
	}
	s, err := parseSidecarConfig([]string{"--length=", "shop/web", "b7a1f0de-8a0e-4b0c-9d52-0a3c1a7de001"}, none)
	rig.Must(t, err)
	if s.length != 0 || seconds(s.expiration) != 10 || s.semaphore != (semaphoreID{"shop", "web"}) {
		t.Errorf("the defaults were parsed as %+v", s)
	}
}

// One error names all problems, in the order of the declarations. They include wrong
// values, several in one flag, conflicting settings, the environment and the arguments.
func TestAllFlagProblems(t *testing.T) {
	code, _, stderr := runArgs(map[string]string{"REDIS_USERNAME": "hook", "ETCD_PASSWORD": "pa55word"}, "webhook",
		"--port=x", "--queue-redis-address=a,b:1", "--stale-threshold-seconds=59", "--etcd-cert-file=a",
		"--sidecar-redis-ca=secret/A", "--when-full=wait", "--enable-sidecar-containers=false",
		"--sidecar-image=a b", "now")
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

// An invalid value is not also compared with others.
func TestWrongFlagIsReportedOnce(t *testing.T) {
	for args, want := range map[string]string{
		"--stale-threshold-seconds=1": `--stale-threshold-seconds: "1" is not a whole number from 2 to 86400`,
		"--heartbeat-interval-seconds=4000": `--heartbeat-interval-seconds: "4000" is not a whole number ` +
			"from 1 to 3600",
		"--when-full=wait --enable-sidecar-containers=maybe": `--enable-sidecar-containers: "maybe" ` +
			"is not true or false",
		"--redis-addresses=rediss://u:p@h:1 --sidecar-redis-ca=secret/ca": "--redis-addresses: there are no " +
			"credentials in an address: they come from the environment, see --help",
	} {
		_, err := parseWebhookConfig(strings.Fields(args), func(string) string { return "" })
		if err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", args, err, want)
		}
	}
}

// If a flag is repeated, its last value counts, valid or not.
func TestRepeatedFlag(t *testing.T) {
	c, err := parseWebhookConfig([]string{"--port=x", "--redis-addresses=a:1,b:2", "--port=1", "--redis-addresses=c:3"},
		func(string) string { return "" })
	rig.Must(t, err)
	if c.port != 1 || len(c.redisAddresses) != 1 || c.redisAddresses[0] != "c:3" {
		t.Errorf("port %d, Redis %v", c.port, c.redisAddresses)
	}
}

// Lists of resources and annotations allow spaces, commas in values, and empty values.
func TestListsOfNamesAndValues(t *testing.T) {
	args := []string{
		"--sidecar-resources=cpu=1, memory=1Gi,example.org/device=2", "--sidecar-requests=memory=1Gi",
		"--pod-annotations=traffic.sidecar.istio.io/excludeOutboundPorts=6379,2379,a=b=c,empty=",
	}
	c, err := parseWebhookConfig(args, func(string) string { return "" })
	rig.Must(t, err)
	if l := c.sidecarLimits; len(l) != 3 || l.Cpu().String() != "1" || l.Memory().String() != "1Gi" ||
		l.Name("example.org/device", "").Value() != 2 {
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

// In a pod, the client needs no flags. Elsewhere, flags name the API server.
func TestKubernetesFlags(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	ca := filepath.Join(dir, "tls.crt")
	notCA := filepath.Join(dir, "token")
	rig.Must(t, os.WriteFile(notCA, []byte("token"), 0o600))
	inPod := map[string]string{"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
	for _, c := range []struct {
		env      map[string]string
		args     []string
		want     kubernetesSettings
		problems []string
	}{
		{args: []string{"--kubernetes-address=https://127.0.0.1:6443", "--kubernetes-ca-file=" + ca,
			"--kubernetes-token-file=token", "--namespaces=a,b"},
			want: kubernetesSettings{"https://127.0.0.1:6443", ca, "token", []string{"a", "b"}}},
		{env: inPod, args: []string{"--kubernetes-ca-file=" + ca, "--namespaces=shop, blog"},
			want: kubernetesSettings{"[fd00::1]:6443", ca, "/var/run/secrets/kubernetes.io/serviceaccount/token",
				[]string{"shop", "blog"}}},
		{env: inPod, args: []string{"--kubernetes-ca-file=" + ca, "--namespaces=shop,Blog,shop,a/b"},
			problems: []string{`--namespaces: "Blog" is not the name of a namespace`,
				`--namespaces: "shop" is named twice`, `--namespaces: "a/b" is not the name of a namespace`}},
		{env: inPod, args: []string{"--kubernetes-ca-file=" + ca},
			want: kubernetesSettings{"[fd00::1]:6443", ca, "/var/run/secrets/kubernetes.io/serviceaccount/token", nil}},
		{env: inPod, // but its files do not exist
			problems: []string{"--kubernetes-ca-file: open /var/run/secrets/kubernetes.io/serviceaccount/ca.crt: " +
				"no such file or directory"}},
		{problems: []string{
			"--kubernetes-address: is needed outside of a pod", "--kubernetes-token-file: is needed outside of a pod",
		}},
		{args: []string{"--kubernetes-address=http://127.0.0.1:8080", "--kubernetes-ca-file=" + notCA,
			"--kubernetes-token-file=token", "--namespaces=a,"},
			problems: []string{"--kubernetes-address: an address is not HOST:PORT or https://HOST:PORT",
				"--kubernetes-ca-file: no PEM certificate in " + notCA, `--namespaces: "a," has an empty name`}},
	} {
		var parsed gateConfig
		err := parseFlags(&parsed, "gate", "[flags]", c.args, func(name string) string { return c.env[name] })
		got := parsed.kubernetes
		var wrong *usageError
		if errors.As(err, &wrong) {
			if !slices.Equal(wrong.problems, c.problems) {
				t.Errorf("%q: problems %q, want %q", c.args, wrong.problems, c.problems)
			}
		} else if err != nil || c.problems != nil || got.address != c.want.address || got.caFile != c.want.caFile ||
			got.tokenFile != c.want.tokenFile || !slices.Equal(got.namespaces, c.want.namespaces) {
			t.Errorf("%q: got %+v, %v", c.args, got, err)
		}
	}
}

// With invalid files, a new client fails at once, and its error shows no token.
func TestKubernetesFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := kubernetesSettings{address: "127.0.0.1:6443", tokenFile: filepath.Join(dir, "token")}
	for text, want := range map[string]string{
		"":             "--kubernetes-token-file: " + c.tokenFile + ": is not a token: it must be one word",
		"two secrets":  "--kubernetes-token-file: " + c.tokenFile + ": is not a token: it must be one word",
		"one-secret\n": "",
	} {
		rig.Must(t, os.WriteFile(c.tokenFile, []byte(text), 0o600))
		k, err := newKubernetes(c, nil)
		if want == "" && (err != nil || *k.token.current.Load() != "one-secret") ||
			want != "" && (err == nil || err.Error() != want) {
			t.Errorf("token file %q: got %v, want %q", text, err, want)
		}
	}
}

func TestQueueAddresses(t *testing.T) {
	for text, want := range map[string]queueAddress{
		"redis:6379":                   {queueServerAlone, []string{"redis:6379"}, "", ""},
		"rediss://redis:6379":          {queueServerAlone, []string{"rediss://redis:6379"}, "", ""},
		"redis+sentinel://a:1,b:2/m":   {queueSentinel, []string{"a:1", "b:2"}, "m", ""},
		"rediss+sentinel://a:1/m-.1":   {queueSentinel, []string{"rediss://a:1"}, "m-.1", ""},
		"redis+cluster://a:1, [::1]:2": {queueCluster, []string{"a:1", "[::1]:2"}, "", ""},
		"rediss+cluster://a:1":         {queueCluster, []string{"rediss://a:1"}, "", ""},
	} {
		got, err := readQueueAddress(text)
		if err != nil || got.kind != want.kind || !slices.Equal(got.servers, want.servers) ||
			got.name != want.name || got.text != text {
			t.Errorf("%s: got %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"redis+sentinel://a:1":  "the name of the primary is missing (an example: " + sentinelExample + ")",
		"redis+sentinel://a:1/": "the name of the primary is missing",
		"redis+sentinel://a/m,n": `"m,n" is no name of a primary: it has letters, digits, ` +
			`and the characters ._- only; "a" is not HOST:PORT (an example: `,
		"redis+cluster://a:1,a:1": `"a:1" is named twice (an example: ` + clusterExample + ")",
		"redis+cluster://":        `"" is not HOST:PORT (an example`,
		"redis+ring://a:1": `"redis+ring://" is no scheme: an address is HOST:PORT, or like ` +
			sentinelExample + " or " + clusterExample,
		"http+sentinel://a:1/m": `"http+sentinel://" is no scheme`,
		"a:1,b:2": "is one address, not 2 (for a group of servers: " +
			sentinelExample + " or " + clusterExample + ")",
		"redis+sentinel://u:p@a:1/m": "there are no credentials in an address",
	} {
		_, err := readQueueAddress(text)
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "u:p") {
			t.Errorf("%s: got %v, want %s", text, err, want)
		}
	}
}

// The sidecars get the address unchanged, and the credentials of the Sentinels from their
// Secret.
func TestSidecarsOfASentinelGroup(t *testing.T) {
	env := map[string]string{"REDIS_SENTINEL_PASSWORD": "pa55word"}
	getenv := func(name string) string { return env[name] }
	const address = "rediss+sentinel://a:1,b:2/tokens"
	for args, want := range map[string]string{
		"--queue-redis-address=" + address: "--sidecar-redis-secret: is needed where " +
			"REDIS_PASSWORD, --redis-password-file or REDIS_SENTINEL_PASSWORD is set",
		"--queue-redis-address=a:1 --sidecar-redis-secret=s": "REDIS_SENTINEL_PASSWORD is not used: " +
			"--queue-redis-address names no Sentinels",
	} {
		_, err := parseWebhookConfig(strings.Fields(args), getenv)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", args, err, want)
		}
	}
	c, err := parseWebhookConfig([]string{"--queue-redis-address=" + address, "--sidecar-redis-secret=s"}, getenv)
	rig.Must(t, err)
	sidecar, _ := sidecarContainer(c, injectedResources(c, new(pod)), testID, testSpec, testToken)
	if !slices.Contains(sidecar.Args, "--queue-redis-address="+address) {
		t.Errorf("args %v", sidecar.Args)
	}
	optional := map[string]bool{}
	for _, e := range sidecar.Env {
		if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
			optional[e.Name+" "+e.ValueFrom.SecretKeyRef.Key] = *e.ValueFrom.SecretKeyRef.Optional
		}
	}
	for name, want := range map[string]bool{"REDIS_PASSWORD password": true, "REDIS_USERNAME username": true,
		"REDIS_SENTINEL_USERNAME sentinel-username": true, "REDIS_SENTINEL_PASSWORD sentinel-password": false} {
		if got, ok := optional[name]; !ok || got != want {
			t.Errorf("%s: optional is %t (set: %t)", name, got, ok)
		}
	}
	env["REDIS_SENTINEL_USERNAME"], env["REDIS_SENTINEL_PASSWORD"] = "a", ""
	_, err = parseWebhookConfig(nil, getenv)
	if err == nil || err.Error() != "REDIS_SENTINEL_USERNAME is set and REDIS_SENTINEL_PASSWORD is not" {
		t.Errorf("without a password: got %v", err)
	}
}

// The TLS flags are parsed, and their problems are named.
func TestTLSFlags(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	rig.WriteCertificate(t, elsewhere, 2)
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	none := func(string) string { return "" }
	c, err := parseWebhookConfig([]string{
		"--queue-redis-address=rediss://r:1", "--redis-ca-file=" + crt, "--sidecar-redis-ca=configmap/ca",
		"--etcd-addresses=https://e:1,f:2", "--etcd-ca-file=" + crt, "--etcd-cert-file=" + crt,
		"--etcd-key-file=" + key,
	}, none)
	rig.Must(t, err)
	want := etcdSettings{caFile: crt, certFile: crt, keyFile: key}
	if c.etcd != want || c.redis.caFile != crt || c.sidecarRedisCA != (objectReference{"configmap", "ca"}) {
		t.Errorf("parsed %+v, %+v, %+v", c.etcd, c.redis, c.sidecarRedisCA)
	}
	for want, args := range map[string]string{
		"--etcd-cert-file and --etcd-key-file go together": "--etcd-cert-file=" + crt,
		"--etcd-cert-file: tls: private key does not match public key": "--etcd-cert-file=" + crt +
			" --etcd-key-file=" + filepath.Join(elsewhere, "tls.key"),
		"--etcd-ca-file: no PEM certificate in " + key: "--etcd-ca-file=" + key,
		"--etcd-addresses: http:// is not encrypted": "--etcd-addresses=http://e:1 " +
			"--etcd-ca-file=" + crt,
		"--redis-ca-file: is not used: no address of Redis begins": "--redis-ca-file=" + crt,
		"--sidecar-redis-ca: is needed where --redis-ca-file is set": "--queue-redis-address=rediss://r:1 " +
			"--redis-ca-file=" + crt,
		"sidecar-redis-ca: is needed where --redis-ca-file is set": "--redis-addresses=rediss://r:1 " +
			"--redis-ca-file=" + crt,
		"--sidecar-redis-ca: is not used": "--redis-addresses=rediss://r:1 " +
			"--lock-mode=etcd --sidecar-redis-ca=secret/x",
		"--sidecar-etcd-secret: is needed where":                           "--lock-mode=etcd --etcd-ca-file=" + crt,
		`--sidecar-etcd-secret: "A_B" is not the name of an object`:        "--sidecar-etcd-secret=A_B",
		`--sidecar-redis-ca: "pod/x" is not secret/NAME or configmap/NAME`: "--sidecar-redis-ca=pod/x",
		`--sidecar-redis-secret: "A_B" is not the name of an object`:       "--sidecar-redis-secret=A_B",
		"--redis-addresses: there are no credentials in an address": "--redis-addresses=redis://u:" + rig.Password +
			"@h:1,redis://u:" + rig.Password + "@h:1",
		"--queue-redis-address: there are no credentials in an address": "--queue-redis-address=redis://u:" +
			rig.Password + "%40h:1",
		"--queue-redis-address: an address is not HOST:PORT or redis://HOST:PORT": "--queue-redis-address=redis://u:" +
			rig.Password + ":h:1",
		"--queue-redis-address: is one address, not 2": "--queue-redis-address=a:1,b:1",
	} {
		_, err := parseWebhookConfig(strings.Fields(args), none)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), rig.Password) {
			t.Errorf("%s: got %v, want %s", args, err, want)
		}
	}
}

// docsModes are the modes in the order of docs/flags.md. The mode await has neither flags
// nor a help.
var docsModes = []string{"webhook", "sidecar", "gate", "setup", "status"}

// documentedSetting is a flag, or a line of environment variables, with the modes whose
// help shows it.
type documentedSetting struct {
	name, fallback, meaning string
	modes                   []string
}

// TestFlagsDoc compares docs/flags.md with the help of each mode. With REWRITE_DOCS=1, it
// writes the page instead.
func TestFlagsDoc(t *testing.T) {
	const page = "docs/flags.md"
	want := flagsPage(t)
	if os.Getenv("REWRITE_DOCS") != "" {
		rig.Must(t, os.WriteFile(page, []byte(want), 0o644))
	}
	got, err := os.ReadFile(page)
	rig.Must(t, err)
	if string(got) == want {
		return
	}
	gotLines, wantLines := strings.Split(string(got), "\n"), strings.Split(want, "\n")
	for i := range max(len(gotLines), len(wantLines)) {
		if i >= len(gotLines) || i >= len(wantLines) || gotLines[i] != wantLines[i] {
			t.Fatalf("%s differs from --help at line %d: to rewrite it, run REWRITE_DOCS=1 go test -run TestFlagsDoc .",
				page, i+1)
		}
	}
}

// flagsPage returns the text of docs/flags.md.
func flagsPage(t *testing.T) string {
	t.Helper()
	code, usage, _ := runArgs(nil, "help")
	if code != 0 {
		t.Fatalf("help: exit code %d", code)
	}
	usages := map[string]string{"await": "at-least-semaphore-pod-hook await"}
	var flags, variables []*documentedSetting
	for _, mode := range docsModes {
		code, help, _ := runArgs(nil, mode, "--help")
		head, rest, hasFlags := strings.Cut(help, "\n\nFlags:\n")
		flagLines, environment, hasEnvironment := strings.Cut(rest, "\n\nEnvironment:\n")
		if code != 0 || !hasFlags || !hasEnvironment {
			t.Fatalf("%s --help: exit code %d, %q", mode, code, help)
		}
		usages[mode] = strings.ReplaceAll(strings.TrimPrefix(head, "Usage: "), "\n       ", "\n")
		flags = addSettings(t, flags, mode, strings.TrimRight(flagLines, "\n"), flagInHelp)
		variables = addSettings(t, variables, mode, environment, variableInHelp)
	}

	var b strings.Builder
	b.WriteString("# Flags\n\nWhich settings does each mode have, and what are their defaults?\n\n" +
		"`--help` of each mode prints what this page says. The installation sets the flags in\n" +
		"`deploy/base/settings.yaml`: see [install.md](install.md#settings).\n" +
		"The webhook passes the sidecars the flags that they need.\n\n" +
		"At start, the program refuses wrong values, names all of them, and exits with code 2.\n\n" +
		"A test writes this page: `REWRITE_DOCS=1 go test -run TestFlagsDoc .`\n\n" +
		"```\n" + strings.TrimSpace(usage) + "\n```\n\n## Flags of several modes\n\n")
	for _, f := range flags {
		if len(f.modes) > 1 {
			b.WriteString(f.entry())
		}
	}
	for _, mode := range slices.Insert(slices.Clone(docsModes), 2, "await") {
		fmt.Fprintf(&b, "\n## %s\n\n```\n%s\n```\n", mode, usages[mode])
		if mode == "await" {
			b.WriteString("\nIt takes no flags. It reads `POD_UID` and asks the sidecar of that pod.\n")
			continue
		}
		b.WriteString("\n")
		for _, f := range flags {
			if slices.Equal(f.modes, []string{mode}) {
				b.WriteString(f.entry())
			}
		}
	}
	b.WriteString("\n## Environment\n\nSecrets come from the environment or from files, never from flags.\n\n")
	for _, v := range variables {
		if len(v.modes) == 1 {
			v.meaning += ". Mode: " + v.modes[0]
		}
		b.WriteString(v.entry())
	}
	return b.String()
}

var (
	// A flag in the help: its name and placeholder; below, its meaning, with the default
	// at the end.
	flagInHelp = regexp.MustCompile(`^  (-\S+ \S+)\n +(.*?)(?: \(default (.*)\))?$`)

	// Variables in the help: their names; beside or below, their meaning.
	variableInHelp = regexp.MustCompile(`^  ([A-Z_]+(?:, [A-Z_]+)*)(?: +|\n +)(.*)()$`)

	// The first line of an entry; its other lines are indented further.
	entryInHelp = regexp.MustCompile(`(?m)^  \S`)
)

// addSettings parses the entries in a part of a mode's help. A setting that another mode
// has too gets one more mode.
func addSettings(
	t *testing.T, settings []*documentedSetting, mode, text string, pattern *regexp.Regexp,
) []*documentedSetting {
	t.Helper()
	text = strings.TrimRight(text, "\n")
	starts := entryInHelp.FindAllStringIndex(text, -1)
	for i, start := range starts {
		end := len(text)
		if i+1 < len(starts) {
			end = starts[i+1][0] - 1
		}
		m := pattern.FindStringSubmatch(text[start[0]:end])
		if m == nil {
			t.Fatalf("%s --help: cannot parse %q", mode, text[start[0]:end])
		}
		found := documentedSetting{name: m[1], fallback: strings.Replace(m[3], ":"+version, ":VERSION", 1)}
		_, placeholder, _ := strings.Cut(m[1], " ")
		found.meaning = strings.TrimPrefix(m[2], placeholder+": ")
		same := slices.IndexFunc(settings, func(s *documentedSetting) bool {
			return s.name == found.name && s.fallback == found.fallback && s.meaning == found.meaning
		})
		if same < 0 {
			same = len(settings)
			settings = append(settings, &found)
		}
		settings[same].modes = append(settings[same].modes, mode)
	}
	return settings
}

// entry returns the setting as the page shows it.
func (s *documentedSetting) entry() string {
	text := fmt.Sprintf("- `%s`: %s.", strings.ReplaceAll(s.name, ", ", "`, `"), s.meaning)
	if s.fallback != "" {
		text += fmt.Sprintf(" Default: `%s`.", s.fallback)
	}
	if len(s.modes) > 1 {
		text += fmt.Sprintf(" Modes: %s.", strings.Join(s.modes, ", "))
	}
	return text + "\n"
}

// documents returns the paths of all documents.
func documents(t *testing.T) []string {
	t.Helper()
	pages, err := filepath.Glob("docs/*.md")
	rig.Must(t, err)
	if len(pages) < 10 {
		t.Fatalf("only %d pages in docs/: %q", len(pages), pages)
	}
	return append(pages, "README.md", "CHANGELOG.md", ".github/SECURITY.md")
}

// Documents are short, and each page of docs/ begins with the question that it answers.
func TestDocsAreShort(t *testing.T) {
	const mostOfPage, mostOfReadme, mostLinesOfChangelog, mostOfCell = 15360, 9216, 40, 160
	link := regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
	for _, page := range documents(t) {
		text, err := os.ReadFile(page)
		rig.Must(t, err)
		most := mostOfPage
		if page == "README.md" {
			most = mostOfReadme
		}
		if len(text) > most {
			t.Errorf("%s has %d bytes, at most %d are allowed", page, len(text), most)
		}
		if n := strings.Count(string(text), "\n"); page == "CHANGELOG.md" && n > mostLinesOfChangelog {
			t.Errorf("%s has %d lines, at most %d are allowed", page, n, mostLinesOfChangelog)
		}
		lines := strings.Split(string(text), "\n")
		if strings.HasPrefix(page, "docs/") && (len(lines) < 3 || !strings.Contains(lines[2], "?")) {
			t.Errorf("%s does not begin with the question that it answers", page)
		}
		for n, line := range strings.Split(withoutCode(string(text)), "\n") {
			if !strings.HasPrefix(line, "|") {
				continue
			}
			for cell := range strings.SplitSeq(strings.ReplaceAll(line, `\|`, "/"), "|") {
				if cell = strings.TrimSpace(link.ReplaceAllString(cell, "$1")); len(cell) > mostOfCell {
					t.Errorf("%s:%d: a cell has %d characters, at most %d are allowed: %s",
						page, n+1, len(cell), mostOfCell, cell)
				}
			}
		}
	}
}

// Links to pages, to their sections and to files of the repository have a target.
func TestDocsLinksResolve(t *testing.T) {
	t.Parallel()
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	checked := 0
	for _, page := range documents(t) {
		text, err := os.ReadFile(page)
		rig.Must(t, err)
		for _, m := range link.FindAllStringSubmatch(withoutCode(string(text)), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			checked++
			name, section, hasSection := strings.Cut(m[1], "#")
			target := page
			if name != "" {
				target = filepath.Join(filepath.Dir(page), name)
			}
			linked, err := os.Stat(target)
			if err != nil {
				t.Errorf("%s links to %s: %v", page, m[1], err)
				continue
			}
			if hasSection && (linked.IsDir() || !slices.Contains(sectionsOf(t, target), section)) {
				t.Errorf("%s links to %s: there is no such section", page, m[1])
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d links were checked", checked)
	}
}

// Tests that the documents name exist, and each report about others names one that shows
// what excludes it here.
func TestDocsNameTests(t *testing.T) {
	t.Parallel()
	declared, named := regexp.MustCompile(`(?m)^func (Test\w+)\(`), regexp.MustCompile(`\bTest[A-Z]\w+`)
	exist := map[string]bool{}
	for _, pattern := range []string{"*_test.go", "test/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		rig.Must(t, err)
		for _, file := range files {
			for _, m := range declared.FindAllStringSubmatch(rig.ReadFile(t, file), -1) {
				exist[m[1]] = true
			}
		}
	}
	for _, page := range documents(t) {
		for _, name := range named.FindAllString(rig.ReadFile(t, page), -1) {
			if !exist[name] {
				t.Errorf("%s names %s: there is no such test", page, name)
			}
		}
	}
	_, reports, _ := strings.Cut(rig.ReadFile(t, "docs/compare.md"), "| shown by |\n")
	found := 0
	for line := range strings.Lines(reports) {
		if strings.Contains(line, "](https://") {
			found++
			if !named.MatchString(line) {
				t.Errorf("docs/compare.md names no test in %s", line)
			}
		}
	}
	if found < 9 {
		t.Errorf("only %d reports were found", found)
	}
}

// withoutCode returns a page with the lines of its code blocks emptied.
func withoutCode(text string) string {
	inCode := false
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		fence := strings.HasPrefix(strings.TrimSpace(line), "```")
		if fence || inCode {
			lines[i] = ""
		}
		inCode = inCode != fence
	}
	return strings.Join(lines, "\n")
}

// sectionsOf returns the anchors of a page's headings, as GitHub makes them.
func sectionsOf(t *testing.T, page string) (sections []string) {
	t.Helper()
	text, err := os.ReadFile(page)
	rig.Must(t, err)
	other := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for line := range strings.SplitSeq(withoutCode(string(text)), "\n") {
		level := strings.IndexFunc(line, func(r rune) bool { return r != '#' })
		if level > 0 && line[level] == ' ' {
			heading := other.ReplaceAllString(strings.ToLower(strings.TrimSpace(line[level:])), "")
			sections = append(sections, strings.ReplaceAll(heading, " ", "-"))
		}
	}
	return sections
}

// Any command line is parsed, or the error names its problems.
func FuzzFlags(f *testing.F) {
	f.Add("webhook", "--queue-redis-address=redis+sentinel://a:1,b:2/c\n--sidecar-resources=cpu=1,memory=1Gi")
	f.Add("sidecar", "--length=3\nshop/web\n0a7b9d10-0000-4000-8000-000000000000")
	f.Add("status", "release\nshop/web\nweb-1\n--yes\n-o\njson")
	f.Add("status", "set\nshop/web\nlength=1\n--for\n1d2h\n--note\ndb upgrade")
	f.Fuzz(func(t *testing.T, mode, line string) {
		args := strings.Split(line, "\n")
		none := func(string) string { return "" }
		var err error
		switch mode {
		case "webhook":
			_, err = parseWebhookConfig(args, none)
		case "sidecar":
			_, err = parseSidecarConfig(args, none)
		default:
			_, err = parseStatusConfig(args, none)
		}
		var usage *usageError
		var help *helpRequest
		if err != nil && !errors.As(err, &usage) && !errors.As(err, &help) {
			t.Errorf("%q: %v", args, err)
		}
	})
}
