package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// runArgs runs the program in this process and returns what a user sees.
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
		{"webhook --help", []string{"--certDir DIRECTORY", "(default /var/k8s-webhook-server/serving-certs)", "--enable-sidecar-containers true|false",
			"--heartbeat-interval-seconds SECONDS", "(default 30)", "--host ADDRESS", "--port PORT", "--lock-mode", "--metrics-bind-address", "--when-full deny|wait",
			"--sidecar-etcd-secret NAME",
			"--queue-redis-address", "--redis-addresses", "--etcd-addresses", "--sidecar-image", "--stale-threshold-seconds", "REDIS_PASSWORD"}},
		{"sidecar -h", []string{"--length NUMBER", "--expiration-seconds SECONDS", "POD_UID", "sidecar [flags] NAMESPACE/KEY TOKEN", "--termination-grace-period-seconds SECONDS", "(default 10)",
			"--heartbeat-interval-seconds", "--lock-mode", "--queue-redis-address", "--redis-addresses", "--etcd-addresses", "--stale-threshold-seconds"}},
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
		"webhook --port=0 --host= --heartbeat-interval-seconds=x --queue-redis-address=redis --redis-addresses=a:1,b,a:1 --etcd-addresses= --lock-mode=file --enable-sidecar-containers=maybe --metrics-bind-address=:0 --sidecar-image= --certDir= --when-full=queue": {
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
		"webhook --heartbeat-interval-seconds=30 --stale-threshold-seconds=59": {"--stale-threshold-seconds: 59 is less than twice --heartbeat-interval-seconds 30"},
		"webhook --when-full=wait --enable-sidecar-containers=false":           {"--when-full: wait needs native sidecars: with --enable-sidecar-containers=false"},
		"webhook --sidecar-resources=cpu=1,cpu=2 --sidecar-requests=memory --pod-annotations=a --sidecar-image-pull-secret=A --await-restart=x": {
			"5 wrong settings",
			`--sidecar-resources: cpu is named twice`,
			`--sidecar-requests: "memory" is not RESOURCE=QUANTITY, such as cpu=100m or memory=64Mi`,
			`--pod-annotations: "a" is not NAME=VALUE, with the name of an annotation`,
			`--sidecar-image-pull-secret: "A" is not the name of an object`,
			`--await-restart: "x" is not true or false`,
		},
		"webhook --sidecar-resources=cpu=0 --pod-annotations=" + annotationKey + "=x": {"2 wrong settings", `--sidecar-resources: "cpu=0" is not`, annotationKey + " is for pods to set"},
		"webhook --sidecar-resources=memory=16Mi,cpu=1":                               {"--sidecar-requests: memory=32Mi is more than the limit in --sidecar-resources, 16Mi"},
		"webhook --await-restart --enable-sidecar-containers=false":                   {"--await-restart: is not used with --enable-sidecar-containers=false"},
		"sidecar --length=0 --expiration-seconds=3601 a/b " + token:                   {"2 wrong settings", `--length: "0" is not a whole number from 1 to 10000`, "--expiration-seconds"},
		"await": {"await takes no arguments, and asks the sidecar of the pod that POD_UID names"},
		"sidecar --termination-grace-period-seconds=0 --stale-threshold-seconds=1 a/b " + token: {"2 wrong settings", "--termination-grace-period-seconds", "--stale-threshold-seconds"},
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
	if err == nil || err.Error() != "--sidecar-redis-secret: is needed where REDIS_PASSWORD or REDIS_SENTINEL_PASSWORD is set: the sidecars would have no credentials" {
		t.Errorf("without a Secret for the sidecars: %v", err)
	}
	c, err := parseWebhookConfig([]string{"--sidecar-redis-secret=redis"}, getenv)
	rig.Must(t, err)
	if c.redis != (redisSettings{username: "hook", password: "pa55word"}) {
		t.Errorf("credentials %v", c.redis)
	}
	_, stdout, _ := runArgs(env, "webhook", "--help")
	if strings.Contains(stdout, "pa55word") {
		t.Error("the help shows the password")
	}
}

// A flag without a value is true; with one it is that.
func TestBoolFlag(t *testing.T) {
	for arg, want := range map[string]bool{"--enable-sidecar-containers": true, "--enable-sidecar-containers=false": false, "--port=1": true} {
		c, err := parseWebhookConfig([]string{arg}, func(string) string { return "" })
		rig.Must(t, err)
		if c.enableSidecarContainers != want {
			t.Errorf("%s: %t", arg, c.enableSidecarContainers)
		}
	}
}
