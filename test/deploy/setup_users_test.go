package deploy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	home         = "at-least-semaphore-pod-hook"
	givenSecret  = "at-least-semaphore-pod-redis"
	labelSidecar = "at-least-semaphore-pod-hook.kaidotio.github.io/sidecars"
)

// secretValue waits for a value of a Secret.
func secretValue(t *testing.T, api *rig.APIServer, namespace, name, key string) (text string) {
	t.Helper()
	rig.Eventually(t, 30*time.Second, func() error {
		if s, missing := api.Store.Secrets.Get(namespace, name); missing == nil {
			text = string(s.Data[key])
		}
		if text == "" {
			return fmt.Errorf("the Secret %s/%s has no %s", namespace, name, key)
		}
		return nil
	})
	return text
}

// Under the users that setup makes, over TLS and with the file that Redis reads at its
// start, each mode does its work, and the sidecars of a namespace nothing else.
func TestSetupMakesUsers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		t.Helper()
		rig.Must(t, os.WriteFile(file(name), []byte(text), 0o600))
	}
	writeUsers := func(users string) { write("users.acl", users+"user test on >test ~* &* +@all\n") }
	rig.WriteCertificate(t, dir, 1) // until setup has made one
	writeUsers("")
	tls := []redis.DialOption{redis.DialUseTLS(true), redis.DialTLSSkipVerify(true)}
	r := rig.StartRedisWith(t, rig.RedisOptions{Bare: true, Kind: rig.SingleQueue, Args: func(port string) []string {
		return []string{"--port", "0", "--tls-port", port, "--tls-cert-file", file("tls.crt"),
			"--tls-key-file", file("tls.key"), "--tls-ca-cert-file", file("tls.crt"), "--tls-auth-clients", "no", "--aclfile", file("users.acl")}
	}, Dial: append(tls, redis.DialUsername("test"), redis.DialPassword("test"))})
	r.Stop()
	r.Address = "localhost:" + rig.Port(r.Address) // the name is in the certificate
	s := &deployedServers{tokens: r, locks: r, scheme: "rediss://", dial: tls,
		flags: []string{"--redis-ca-file=" + file("ca.crt")}}

	api := rig.StartAPIServer(t)
	api.CreateConfiguration(t)
	for _, name := range []string{home, "shop", "shop-2"} {
		n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if name != home {
			n.Labels = map[string]string{labelSidecar: "true"}
		}
		if _, status := api.Store.Namespaces.Create(n); status != nil {
			t.Fatal(status.Message)
		}
	}
	health := rig.FreeAddress(t)
	setup := &rig.Service{Process: rig.NewProcess(rig.Program(t), "setup", "--user-redis-addresses=rediss://"+r.Address,
		"--webhook-certificate=given", "--metrics-bind-address="+health,
		"--kubernetes-address="+api.Address, "--kubernetes-ca-file="+api.CAFile, "--kubernetes-token-file="+api.TokenFile),
		HealthURL: "http://" + health}
	setup.Start(t)
	for _, key := range []string{"tls.crt", "tls.key", "ca.crt"} {
		write(key, secretValue(t, api, home, "redis-certificate", key))
	}
	writeUsers(secretValue(t, api, home, "redis-users", "users.acl"))
	rig.Must(t, r.Start())
	setup.WantReady(t)

	password := func(user string) string { return secretValue(t, api, home, "redis", user+"-password") }
	webhook := rig.NewWebhook(t, rig.Program(t), "rediss://"+r.Address, "--redis-ca-file="+file("ca.crt"),
		"--sidecar-redis-secret="+givenSecret, "--sidecar-redis-ca=secret/"+givenSecret)
	webhook.Cmd.Env = append(os.Environ(), "REDIS_USERNAME=webhook", "REDIS_PASSWORD="+password("webhook"))
	webhook.Begin(t)
	gate := rig.NewGate(t, rig.Program(t), api, "rediss://"+r.Address, "--redis-ca-file="+file("ca.crt"))
	gate.Cmd.Env = append(os.Environ(), "REDIS_USERNAME=gate", "REDIS_PASSWORD="+password("gate"))
	gate.Start(t)
	gate.WantReady(t)

	given := func(namespace, key string) string { return secretValue(t, api, namespace, givenSecret, key) }
	shop, other := given("shop", "password"), given("shop-2", "password")
	if ca := given("shop", "ca.crt"); ca != secretValue(t, api, home, "redis-certificate", "ca.crt") {
		t.Errorf("the sidecars of shop get the CA %q", ca)
	}
	rig.Must(t, s.live(t, "shop", shop))
	rig.Must(t, s.live(t, "shop-2", other))
	rig.Eventually(t, time.Minute, func() error { // a young Redis gives nothing out
		info, err := redis.String(r.Control.Do("INFO", "server"))
		_, text, _ := strings.Cut(info, "uptime_in_seconds:")
		var age float64
		if _, scanned := fmt.Sscan(text, &age); err == nil && (scanned != nil || age <= rig.DefaultTiming.Interval.Seconds()+3) {
			err = fmt.Errorf("Redis is %v s old, %v", age, scanned)
		}
		return err
	})
	s.wantIsolated(t, shop)

	webhook.WantAdmitted(t, rig.ID{Namespace: "shop", Key: "admitted"}, 1)
	gated := rig.ID{Namespace: "shop", Key: "gated"}
	pod := api.CreatePod(t, "shop", rig.AdmittedPod("gated", gated, 1, 10))
	rig.Eventually(t, 30*time.Second, func() error {
		if now, _ := api.Store.Get("shop", "gated"); len(now.Spec.SchedulingGates) > 0 {
			return fmt.Errorf("the pod still has the gates %v", now.Spec.SchedulingGates)
		}
		return nil
	})
	r.WantInflight(t, gated, string(pod.UID))
	release := []string{"--yes=true", "release", gated.String(), string(pod.UID)}
	for _, args := range [][]string{{"shop"}, {gated.String()}, release} {
		args = append([]string{"status", "--queue-redis-address=rediss://" + r.Address}, args...)
		p := s.program(t, "status", password("status"), args...)
		p.WantExit(t, 0)
	}
	for _, p := range []*rig.Process{webhook.Process, gate.Process, setup.Process} {
		if log := p.Log.String(); isRefusal(log) || strings.Contains(log, shop) {
			t.Errorf("refused, or the log has a password: %s", log)
		}
	}
	for _, series := range []string{`at_least_semaphore_setup_namespaces{state="ready"}`,
		`at_least_semaphore_setup_redis_servers{state="ready"}`} {
		if n, ok := setup.Metric(t, series); !ok || n < 1 {
			t.Errorf("%s is %v, %v", series, n, ok)
		}
	}
}
