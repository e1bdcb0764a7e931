package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestEtcdWithTLSAndAuth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	files := etcdSettings{caFile: crt, certFile: crt, keyFile: key}
	tlsConfig, err := files.tls()
	rig.Must(t, err)
	m := &rig.Etcd{Address: rig.FreeAddress(t)}
	peer := "http://" + rig.FreeAddress(t)
	m.Serve(t, "https://"+m.Address, tlsConfig, "--cert-file", crt, "--key-file", key, "--trusted-ca-file", crt, "--client-cert-auth",
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer, "--bcrypt-cost", "4")
	m.WantServing(t)
	ctx := context.Background()
	for _, step := range []func() error{
		func() error { return errOf(m.Control.UserAdd(ctx, "root", "admin")) },
		func() error { return errOf(m.Control.UserGrantRole(ctx, "root", "root")) },
		func() error { return errOf(m.Control.RoleAdd(ctx, "locks")) },
		func() error {
			return errOf(m.Control.RoleGrantPermission(ctx, "locks", "lock/", clientv3.GetPrefixRangeEnd("lock/"), clientv3.PermissionType(clientv3.PermReadWrite)))
		},
		func() error { return errOf(m.Control.UserAdd(ctx, "webhook", rig.Password)) },
		func() error { return errOf(m.Control.UserGrantRole(ctx, "webhook", "locks")) },
		func() error { return errOf(m.Control.AuthEnable(ctx)) },
	} {
		rig.Must(t, step())
	}
	admin, err := clientv3.New(clientv3.Config{Endpoints: []string{m.Address}, TLS: tlsConfig, Username: "root", Password: "admin", DialTimeout: 5 * time.Second})
	rig.Must(t, err)
	defer admin.Close()

	settings := files
	settings.username, settings.password = "webhook", rig.Password
	for _, address := range []string{m.Address, "https://" + m.Address} {
		l := newEtcdLock([]string{address}, settings)
		for range 3 {
			unlock, err := l.tryLock(ctx, "lock/{shop/web}", time.Minute)
			rig.Must(t, err)
			wantTaken(t, l, "lock/{shop/web}")
			rig.Must(t, unlock(ctx))
			// What changes users makes all log-ins void.
			rig.Must(t, errOf(admin.UserAdd(ctx, "another-"+uuid.NewString(), "x")))
		}
		if _, err := l.tryLock(ctx, "elsewhere", time.Minute); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("a key that the role does not have: %v", err)
		}
		rig.Must(t, l.close())
	}

	for want, change := range map[string]func(*etcdSettings){
		"invalid user ID or password": func(s *etcdSettings) { s.password = "wrong-" + rig.Password },
		"no such file":                func(s *etcdSettings) { s.caFile = filepath.Join(dir, "none") },
		"Unavailable":                 func(s *etcdSettings) { s.certFile, s.username, s.password = "", "", "" },
	} {
		wrong := settings
		change(&wrong)
		l := newEtcdLock([]string{m.Address}, wrong)
		_, err := l.tryLock(ctx, "lock/{shop/web}", time.Minute)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), m.Address) || strings.Contains(err.Error(), rig.Password) {
			t.Errorf("got %v, want %q", err, want)
		}
		rig.Must(t, l.close())
	}
}

// No secret is in the arguments or the logs of a webhook that cannot log in, nor in what it answers.
func TestSecretsAreNotShown(t *testing.T) {
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "requirepass", "something-else")
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	t.Setenv("REDIS_PASSWORD", rig.Password)
	t.Setenv("ETCD_USERNAME", "webhook")
	t.Setenv("ETCD_PASSWORD", rig.Password)
	address := rig.FreeAddress(t)
	p := rig.StartProgram(t, "webhook", "--host=127.0.0.1", "--port="+rig.Port(address), "--metrics-bind-address="+rig.FreeAddress(t), "--certDir="+dir,
		"--queue-redis-address="+r.Address, "--redis-addresses="+r.Address, "--lock-mode=etcd", "--sidecar-redis-secret=redis",
		"--sidecar-etcd-secret=etcd")
	p.WantLog(t, "serving")
	body := filepath.Join(dir, "review.json")
	rig.Must(t, os.WriteFile(body, rig.Review(t, freshID(), 1), 0o600))
	answer, err := exec.Command("curl", "-sS", "--cacert", filepath.Join(dir, "tls.crt"), "-H", "Content-Type: application/json",
		"--data", "@"+body, "https://"+address+"/mutate").CombinedOutput()
	rig.Must(t, err)
	if !strings.Contains(string(answer), "WRONGPASS") || strings.Contains(string(answer), rig.Password) {
		t.Errorf("answered %s", answer)
	}
	p.Log.WantLines(t, "admission", 1)
	p.WantNoSecret(t)
}

// The sidecar gets its credentials by reference, and its CA by a volume.
func TestPatchForSecureRedis(t *testing.T) {
	for _, kind := range []string{"secret", "configmap"} {
		c := testConfig("rediss://redis:6379")
		c.sidecarRedisSecret, c.sidecarRedisCA = "redis-sidecar", objectReference{kind, "redis-ca"}
		for name, object := range fixtures(t) {
			first := patched(t, c, object, testToken)
			again := patched(t, c, mustJSON(t, first), testToken)
			for _, p := range []map[string]any{first, again} {
				sidecar := containers(p, "initContainers")[0].(map[string]any)
				if env := string(mustJSON(t, sidecar["env"])); env != `[{"name":"GOMAXPROCS","value":"1"},{"name":"POD_NAME","valueFrom":{"fieldRef":{"fieldPath":"metadata.name"}}},{"name":"NODE_NAME","valueFrom":{"fieldRef":{"fieldPath":"spec.nodeName"}}},`+
					`{"name":"REDIS_USERNAME","valueFrom":{"secretKeyRef":{"key":"username","name":"redis-sidecar","optional":true}}},`+
					`{"name":"REDIS_PASSWORD","valueFrom":{"secretKeyRef":{"key":"password","name":"redis-sidecar","optional":false}}},`+
					`{"name":"POD_UID","valueFrom":{"fieldRef":{"fieldPath":"metadata.uid"}}}]` {
					t.Errorf("%s: env is %s", name, env)
				}
				if !slices.Contains(sidecar["args"].([]any), any("--redis-ca-file=/var/run/at-least-semaphore-pod-hook/redis-ca/ca.crt")) {
					t.Errorf("%s: args are %v", name, sidecar["args"])
				}
				if mounts := string(mustJSON(t, sidecar["volumeMounts"])); mounts != `[{"mountPath":"/var/run/at-least-semaphore-pod-hook/redis-ca","name":"at-least-semaphore-pod-redis-ca","readOnly":true}]` {
					t.Errorf("%s: mounts are %s", name, mounts)
				}
				volumes := containers(p, "volumes")
				want := map[string]string{
					"secret":    `{"name":"at-least-semaphore-pod-redis-ca","secret":{"items":[{"key":"ca.crt","path":"ca.crt"}],"secretName":"redis-ca"}}`,
					"configmap": `{"configMap":{"items":[{"key":"ca.crt","path":"ca.crt"}],"name":"redis-ca"},"name":"at-least-semaphore-pod-redis-ca"}`,
				}[kind]
				if got := string(mustJSON(t, volumes[len(volumes)-1])); got != want {
					t.Errorf("%s: the volume is %s", name, got)
				}
				var original map[string]any
				rig.Must(t, json.Unmarshal(object, &original))
				if len(volumes) != len(containers(original, "volumes"))+1 {
					t.Errorf("%s: %d volumes", name, len(volumes))
				}
			}
		}
	}
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	rig.Must(t, err)
	return b
}

// The flags for TLS, as they are given.
func TestTLSFlags(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	rig.WriteCertificate(t, elsewhere, 2)
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	none := func(string) string { return "" }
	c, err := parseWebhookConfig([]string{"--queue-redis-address=rediss://r:1", "--redis-ca-file=" + crt, "--sidecar-redis-ca=configmap/ca",
		"--etcd-addresses=https://e:1,f:2", "--etcd-ca-file=" + crt, "--etcd-cert-file=" + crt, "--etcd-key-file=" + key}, none)
	rig.Must(t, err)
	if want := (etcdSettings{caFile: crt, certFile: crt, keyFile: key}); c.etcd != want || c.redis.caFile != crt || c.sidecarRedisCA != (objectReference{"configmap", "ca"}) {
		t.Errorf("parsed %+v, %+v, %+v", c.etcd, c.redis, c.sidecarRedisCA)
	}
	for want, args := range map[string]string{
		"--etcd-cert-file and --etcd-key-file go together":                        "--etcd-cert-file=" + crt,
		"--etcd-cert-file: tls: private key does not match public key":            "--etcd-cert-file=" + crt + " --etcd-key-file=" + filepath.Join(elsewhere, "tls.key"),
		"--etcd-ca-file: no PEM certificate in " + key:                            "--etcd-ca-file=" + key,
		"--etcd-addresses: http:// is not encrypted":                              "--etcd-addresses=http://e:1 --etcd-ca-file=" + crt,
		"--redis-ca-file: is not used: no address of Redis begins":                "--redis-ca-file=" + crt,
		"--sidecar-redis-ca: is needed where --redis-ca-file is set":              "--queue-redis-address=rediss://r:1 --redis-ca-file=" + crt,
		"sidecar-redis-ca: is needed where --redis-ca-file is set":                "--redis-addresses=rediss://r:1 --redis-ca-file=" + crt,
		"--sidecar-redis-ca: is not used":                                         "--redis-addresses=rediss://r:1 --lock-mode=etcd --sidecar-redis-ca=secret/x",
		"--sidecar-etcd-secret: is needed where":                                  "--lock-mode=etcd --etcd-ca-file=" + crt,
		`--sidecar-etcd-secret: "A_B" is not the name of an object`:               "--sidecar-etcd-secret=A_B",
		`--sidecar-redis-ca: "pod/x" is not secret/NAME or configmap/NAME`:        "--sidecar-redis-ca=pod/x",
		`--sidecar-redis-secret: "A_B" is not the name of an object`:              "--sidecar-redis-secret=A_B",
		"--redis-addresses: there are no credentials in an address":               "--redis-addresses=redis://u:" + rig.Password + "@h:1,redis://u:" + rig.Password + "@h:1",
		"--queue-redis-address: there are no credentials in an address":           "--queue-redis-address=redis://u:" + rig.Password + "%40h:1",
		"--queue-redis-address: an address is not HOST:PORT or redis://HOST:PORT": "--queue-redis-address=redis://u:" + rig.Password + ":h:1",
		"--queue-redis-address: is one address, not 2":                            "--queue-redis-address=a:1,b:1",
	} {
		_, err := parseWebhookConfig(strings.Fields(args), none)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), rig.Password) {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}
