package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// writeCertificate puts a new self-signed pair, tls.crt and tls.key, with that serial number into dir. It is good for a
// server at 127.0.0.1 and for a client, and is its own authority.
func writeCertificate(t testing.TB, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(serial),
		Subject:               pkix.Name{CommonName: "test"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "tls.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "tls.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
}

const testPassword = "correct-horse"

func wantNoSecret(t *testing.T, p *process) {
	t.Helper()
	if strings.Contains(p.log.String(), testPassword) || strings.Contains(strings.Join(p.Args, " "), testPassword) {
		t.Errorf("the password is shown: %v\n%s", p.Args, p.log.String())
	}
}

func TestEtcdWithTLSAndAuth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeCertificate(t, dir, 1)
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	files := etcdSettings{caFile: crt, certFile: crt, keyFile: key}
	tlsConfig, err := files.tls()
	must(t, err)
	m := &etcdMember{address: freeAddress(t)}
	peer := "http://" + freeAddress(t)
	m.start(t, "https://"+m.address, tlsConfig, "--cert-file", crt, "--key-file", key, "--trusted-ca-file", crt, "--client-cert-auth",
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer, "--bcrypt-cost", "4")
	m.wait(t)
	ctx := context.Background()
	for _, step := range []func() error{
		func() error { return errOf(m.control.UserAdd(ctx, "root", "admin")) },
		func() error { return errOf(m.control.UserGrantRole(ctx, "root", "root")) },
		func() error { return errOf(m.control.RoleAdd(ctx, "locks")) },
		func() error {
			return errOf(m.control.RoleGrantPermission(ctx, "locks", "lock/", clientv3.GetPrefixRangeEnd("lock/"), clientv3.PermissionType(clientv3.PermReadWrite)))
		},
		func() error { return errOf(m.control.UserAdd(ctx, "webhook", testPassword)) },
		func() error { return errOf(m.control.UserGrantRole(ctx, "webhook", "locks")) },
		func() error { return errOf(m.control.AuthEnable(ctx)) },
	} {
		must(t, step())
	}
	admin, err := clientv3.New(clientv3.Config{Endpoints: []string{m.address}, TLS: tlsConfig, Username: "root", Password: "admin", DialTimeout: 5 * time.Second})
	must(t, err)
	defer admin.Close()

	settings := files
	settings.username, settings.password = "webhook", testPassword
	for _, address := range []string{m.address, "https://" + m.address} {
		l := newEtcdLock([]string{address}, settings)
		for range 3 {
			unlock, err := l.tryLock(ctx, "lock/{shop/web}", time.Minute)
			must(t, err)
			wantTaken(t, l, "lock/{shop/web}")
			must(t, unlock(ctx))
			// What changes users makes all log-ins void.
			must(t, errOf(admin.UserAdd(ctx, "another-"+uuid.NewString(), "x")))
		}
		if _, err := l.tryLock(ctx, "elsewhere", time.Minute); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("a key that the role does not have: %v", err)
		}
		must(t, l.close())
	}

	for want, change := range map[string]func(*etcdSettings){
		"invalid user ID or password": func(s *etcdSettings) { s.password = "wrong-" + testPassword },
		"no such file":                func(s *etcdSettings) { s.caFile = filepath.Join(dir, "none") },
		"Unavailable":                 func(s *etcdSettings) { s.certFile, s.username, s.password = "", "", "" },
	} {
		wrong := settings
		change(&wrong)
		l := newEtcdLock([]string{m.address}, wrong)
		_, err := l.tryLock(ctx, "lock/{shop/web}", time.Minute)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), m.address) || strings.Contains(err.Error(), testPassword) {
			t.Errorf("got %v, want %q", err, want)
		}
		must(t, l.close())
	}
}

// No secret is in the arguments or the logs of a webhook that cannot log in, nor in what it answers.
func TestSecretsAreNotShown(t *testing.T) {
	r := startRedis(t)
	r.do(t, "CONFIG", "SET", "requirepass", "something-else")
	dir := t.TempDir()
	writeCertificate(t, dir, 1)
	t.Setenv("REDIS_PASSWORD", testPassword)
	t.Setenv("ETCD_USERNAME", "webhook")
	t.Setenv("ETCD_PASSWORD", testPassword)
	address := freeAddress(t)
	p := startProcess(t, "webhook", "--host=127.0.0.1", "--port="+portOf(address), "--metrics-bind-address="+freeAddress(t), "--certDir="+dir,
		"--queue-redis-address="+r.address, "--redis-addresses="+r.address, "--lock-mode=etcd", "--sidecar-redis-secret=redis",
		"--sidecar-etcd-secret=etcd")
	p.wantLog(t, "serving")
	body := filepath.Join(dir, "review.json")
	must(t, os.WriteFile(body, review(t, freshID(), 1), 0o600))
	answer, err := exec.Command("curl", "-sS", "--cacert", filepath.Join(dir, "tls.crt"), "-H", "Content-Type: application/json",
		"--data", "@"+body, "https://"+address+"/mutate").CombinedOutput()
	must(t, err)
	if !strings.Contains(string(answer), "WRONGPASS") || strings.Contains(string(answer), testPassword) {
		t.Errorf("answered %s", answer)
	}
	p.log.wantLines(t, "admission", 1)
	wantNoSecret(t, p)
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
				must(t, json.Unmarshal(object, &original))
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
	must(t, err)
	return b
}

// The flags for TLS, as they are given.
func TestTLSFlags(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	writeCertificate(t, dir, 1)
	writeCertificate(t, elsewhere, 2)
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	none := func(string) string { return "" }
	c, err := parseWebhookConfig([]string{"--queue-redis-address=rediss://r:1", "--redis-ca-file=" + crt, "--sidecar-redis-ca=configmap/ca",
		"--etcd-addresses=https://e:1,f:2", "--etcd-ca-file=" + crt, "--etcd-cert-file=" + crt, "--etcd-key-file=" + key}, none)
	must(t, err)
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
		"--redis-addresses: there are no credentials in an address":               "--redis-addresses=redis://u:" + testPassword + "@h:1,redis://u:" + testPassword + "@h:1",
		"--queue-redis-address: there are no credentials in an address":           "--queue-redis-address=redis://u:" + testPassword + "%40h:1",
		"--queue-redis-address: an address is not HOST:PORT or redis://HOST:PORT": "--queue-redis-address=redis://u:" + testPassword + ":h:1",
		"--queue-redis-address: is one address, not 2":                            "--queue-redis-address=a:1,b:1",
	} {
		_, err := parseWebhookConfig(strings.Fields(args), none)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), testPassword) {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}
