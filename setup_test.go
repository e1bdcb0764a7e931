package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// installation is an API server with the webhook's configuration, webhooks that get their
// Secrets as from a kubelet, and a clock that only the test moves.
type installation struct {
	*testing.T
	api      *rig.APIServer
	clock    atomic.Int64 // added to the time
	webhooks []*installedWebhook

	traffic sync.RWMutex // held for reading by each admission
	refused atomic.Pointer[string]
	served  atomic.Int64
}

// hook is the namespace of the installation.
const hook = "at-least-semaphore-pod-hook"

func newInstallation(t *testing.T) *installation {
	t.Helper()
	i := &installation{T: t, api: rig.StartAPIServer(t)}
	_, status := i.api.Store.Namespaces.Create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: hook}})
	i.want(status)
	return i
}

func (i *installation) want(status *metav1.Status) {
	i.Helper()
	if status != nil {
		i.Fatal(status.Message)
	}
}

// apply creates the webhook's configuration as deploy/ does.
func (i *installation) apply() *installation {
	i.Helper()
	i.api.CreateConfiguration(i)
	return i
}

func (i *installation) now() time.Time { return time.Now().Add(time.Duration(i.clock.Load())) }

// pass moves the clock, after all admissions that began before have ended.
func (i *installation) pass(d time.Duration) {
	i.traffic.Lock()
	defer i.traffic.Unlock()
	i.clock.Add(int64(d))
}

// setup returns a setup and its log. Nothing runs but what the test calls.
func (i *installation) setup(change ...func(*setupConfig)) (*setup, *rig.Log) {
	i.Helper()
	c := setupConfig{kubernetes: clientSettings(i.api), namespace: hook, webhookCertificate: certificateOwn,
		sidecarRedisSecret: "at-least-semaphore-pod-redis"}
	for _, ch := range change {
		ch(&c)
	}
	log := new(rig.Log)
	s, err := newSetup(c, slog.New(slog.NewJSONHandler(log, nil)))
	rig.Must(i.T, err)
	s.bounds.now = i.now
	s.bounds.answer = 20 * time.Second
	s.users.done = true // its own tests run it
	i.Cleanup(func() {
		if i.Failed() {
			i.Logf("log of setup:\n%s", log)
		}
	})
	return s, log
}

// reconcile runs a pass, in which no step may fail. Steps may wait.
func (i *installation) reconcile(s *setup) (waits string) {
	i.Helper()
	s.reconcile(i.Context())
	for _, step := range s.steps {
		switch _, err := step.state(); {
		case errors.As(err, new(*waiting)):
			waits += step.name + ": " + err.Error() + "\n"
		case err != nil:
			i.Fatalf("%s: %v", step.name, err)
		}
	}
	return waits
}

// secret returns the value of a key, or nil.
func (i *installation) secret(name, key string) []byte {
	s, _ := i.api.Store.Secrets.Get(hook, name)
	if s == nil {
		return nil
	}
	return s.Data[key]
}

// forget deletes a key of a Secret; without a key, the Secret.
func (i *installation) forget(name, key string) {
	i.Helper()
	var status *metav1.Status
	if key == "" {
		_, status = i.api.Store.Secrets.Delete(hook, name)
	} else {
		_, status = i.api.Store.Secrets.Change(hook, name, func(s *corev1.Secret) { s.Data[key] = nil; delete(s.Data, key) })
	}
	i.want(status)
}

// configured returns what the API server trusts and calls. All webhooks must agree.
func (i *installation) configured() (bundle []byte, path string) {
	i.Helper()
	c, status := i.api.Store.Webhooks.Get("", webhookConfigurationName)
	i.want(status)
	for _, w := range c.Webhooks {
		if p := w.ClientConfig.Service.Path; p != nil {
			path = *p
		}
		if other := c.Webhooks[0].ClientConfig; !bytes.Equal(other.CABundle, w.ClientConfig.CABundle) {
			i.Errorf("the webhooks have different bundles")
		}
	}
	return c.Webhooks[0].ClientConfig.CABundle, path
}

// trusts returns the number of trusted certificates.
func (i *installation) trusts() int {
	i.Helper()
	bundle, _ := i.configured()
	return bytes.Count(bundle, []byte("BEGIN CERTIFICATE"))
}

// writes counts the requests up to now that change something.
func (i *installation) writes() int {
	return i.api.Count(func(r string) bool { return !strings.HasPrefix(r, "GET ") && !strings.Contains(r, "/events") })
}

// installedWebhook is a webhook with a pod in the store. Its files change only by kubelet.
type installedWebhook struct {
	i       *installation
	dir     string
	address string
	cert    *certificate
	callers *callers
}

// start starts a webhook, which needs its Secrets. Its flags are those of the pod.
func (i *installation) start(name string, change ...func(*webhookConfig)) *installedWebhook {
	i.Helper()
	w := &installedWebhook{i: i, dir: i.TempDir()}
	w.write()
	log := slog.New(slog.DiscardHandler)
	c := testConfig(rig.CommonRedis(i.T).Address)
	c.pathSecretFile = filepath.Join(w.dir, "secret")
	for _, ch := range change {
		ch(&c)
	}
	var err error
	w.cert, err = loadCertificate(w.dir, log)
	rig.Must(i.T, err)
	w.callers, err = newCallers(c, log)
	rig.Must(i.T, err)
	served := &webhook{admitter: newAdmitter(c, semaphoresOf(i.T, c)), callers: w.callers, bounds: newBounds(), log: log}
	server := httptest.NewUnstartedServer(served.routes())
	server.TLS = w.callers.tls(w.cert)
	served.bounds.apply(server.Config)
	server.StartTLS()
	i.Cleanup(server.Close)
	w.address = server.Listener.Addr().String()
	port := int32(server.Listener.Addr().(*net.TCPAddr).Port)
	_, status := i.api.Store.Create(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: hook, Name: name, Labels: map[string]string{
			"app.kubernetes.io/name": "at-least-semaphore-pod-hook", "app.kubernetes.io/component": "webhook"}},
		Spec: corev1.PodSpec{NodeName: "node-1", Containers: []corev1.Container{{Name: "webhook",
			Args: []string{"webhook", "--path-secret-file=" + c.pathSecretFile}, Ports: []corev1.ContainerPort{
				{Name: "health", ContainerPort: 1}, {Name: "webhook", ContainerPort: port}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "127.0.0.1"}})
	i.want(status)
	i.webhooks = append(i.webhooks, w)
	return w
}

// write writes the Secrets into the files, as a kubelet does. Those of a deleted Secret
// stay.
func (w *installedWebhook) write() {
	for file, secret := range map[string]string{"tls.crt": secretWebhook, "tls.key": secretWebhook, "secret": secretOfPath} {
		if text := w.i.secret(secret, file); text != nil {
			rig.Must(w.i.T, os.WriteFile(filepath.Join(w.dir, file), text, 0o600))
		}
	}
}

// kubelet gives the webhooks the present Secrets.
func (i *installation) kubelet(webhooks ...*installedWebhook) {
	i.Helper()
	for _, w := range webhooks {
		w.write()
		_, err := w.cert.reload()
		rig.Must(i.T, err)
		if w.callers.secrets != nil {
			_, err = w.callers.secrets.reload()
			rig.Must(i.T, err)
		}
	}
}

// admit calls each webhook as an API server does that has read its configuration a moment
// ago.
func (i *installation) admit(body []byte) error {
	i.traffic.RLock()
	defer i.traffic.RUnlock()
	bundle, path := i.configured()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	for _, w := range i.webhooks {
		transport := &http.Transport{DisableKeepAlives: true,
			TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "webhook." + hook + ".svc", Time: i.now}}
		response, err := (&http.Client{Transport: transport}).Post("https://"+w.address+path+"?timeout=10s", "application/json",
			bytes.NewReader(body))
		if err != nil {
			return err
		}
		text, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s %s", response.Status, text)
		}
	}
	return nil
}

// load sends admissions until the test ends, of which none may be refused.
func (i *installation) load() {
	i.Helper()
	body := rig.Review(i.T, freshID(), maxLength)
	for range 2 {
		inBackground(i.T, func(ctx context.Context) {
			for ctx.Err() == nil {
				if err := i.admit(body); err != nil {
					i.refused.CompareAndSwap(nil, new(err.Error()))
					return
				}
				i.served.Add(1)
				_ = sleep(ctx, 10*time.Millisecond)
			}
		})
	}
	i.wantServed()
}

// wantServed waits until an admission was served that began after this call. None may
// have been refused.
func (i *installation) wantServed() {
	i.Helper()
	before := i.served.Load()
	rig.Eventually(i.T, time.Minute, func() error {
		if why := i.refused.Load(); why != nil {
			i.Fatalf("an admission was refused: %s", *why)
		}
		if i.served.Load() < before+4 {
			return errors.New("no admission was served")
		}
		return nil
	})
}

// installed returns an installation with two webhooks under load, and its setup.
func installed(t *testing.T) (*installation, *setup, *rig.Log) {
	t.Helper()
	i := newInstallation(t).apply()
	s, log := i.setup()
	if waits := i.reconcile(s); waits != "" {
		t.Fatalf("a first start waits: %s", waits)
	}
	i.start("webhook-1")
	i.start("webhook-2")
	i.load()
	return i, s, log
}

// A first start makes everything in one pass, and the next one changes nothing.
func TestSetupFirstStart(t *testing.T) {
	t.Parallel()
	i := newInstallation(t)
	s, _ := i.setup()
	s.reconcile(t.Context())
	if _, err := s.ready(t.Context()); err == nil || !strings.Contains(err.Error(), "apply deploy/") {
		t.Errorf("without a configuration: ready says %v", err)
	}
	for name, keys := range map[string][]string{secretAuthority: {"tls.crt", "tls.key"}, secretWebhook: {"tls.crt", "tls.key"},
		secretRedis: {"tls.crt", "tls.key", "ca.crt"}, secretOfPath: {"secret"}} {
		for _, key := range keys {
			if len(i.secret(name, key)) == 0 {
				t.Errorf("without a configuration: the Secret %s has no %s", name, key)
			}
		}
	}
	i.apply()
	if waits := i.reconcile(s); waits != "" {
		t.Errorf("waits: %s", waits)
	}
	if warning, err := s.ready(t.Context()); warning != "" || err != nil {
		t.Errorf("ready says %q, %v", warning, err)
	}
	bundle, path := i.configured()
	if secret := strings.TrimSpace(string(i.secret(secretOfPath, "secret"))); path != "/mutate/"+secret || len(secret) != 64 {
		t.Errorf("the path is %s, the secret %s", path, secret)
	}
	if !bytes.Equal(bundle, i.secret(secretAuthority, "tls.crt")) || !bytes.Equal(bundle, i.secret(secretRedis, "ca.crt")) {
		t.Errorf("the bundle is %s", bundle)
	}
	i.start("webhook-1")
	i.load()
	pair, why := s.readLeaf(&corev1.Secret{Data: map[string][]byte{"tls.crt": i.secret(secretRedis, "tls.crt"),
		"tls.key": i.secret(secretRedis, "tls.key")}}, []string{"redis." + hook + ".svc", "redis-0.redis." + hook + ".svc"})
	if why != "" || pair.cert.IsCA {
		t.Errorf("the certificate of Redis: %s", why)
	}

	before := i.writes()
	for range 3 {
		i.reconcile(s)
	}
	other, _ := i.setup()
	i.reconcile(other)
	if n := i.writes() - before; n != 0 {
		t.Errorf("%d writes without a change", n)
	}
	rec := httptest.NewRecorder()
	s.healthRoutes().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, want := range []string{`setup_certificate_expiry_timestamp_seconds{certificate="webhook"} 1`,
		`setup_failures_total{step="trust"} 1`, `setup_failing{step="trust"} 0`, `setup_failures_total{step="authority"} 0`} {
		if !strings.Contains(rec.Body.String(), metricsPrefix+want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
}

// A person rotates the path by deleting the key. No admission is refused.
func TestSetupRotatesPath(t *testing.T) {
	t.Parallel()
	for what, key := range map[string]string{"key": "secret", "Secret": ""} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			i, s, _ := installed(t)
			_, old := i.configured()
			i.forget(secretOfPath, key)
			waits := i.reconcile(s)
			lines := strings.Fields(string(i.secret(secretOfPath, "secret")))
			if len(lines) != 2 || "/mutate/"+lines[1] != old || !strings.Contains(waits, "it does not know the new path yet") {
				t.Fatalf("lines %q, waits %q", lines, waits)
			}
			i.kubelet(i.webhooks[0])
			i.reconcile(s)
			i.pass(s.bounds.refresh) // both webhooks answer, so time changes nothing
			i.reconcile(s)
			if _, path := i.configured(); path != old {
				t.Errorf("the path has changed before all webhooks know the new one")
			}
			i.kubelet(i.webhooks...)
			i.reconcile(s)
			if _, path := i.configured(); path != "/mutate/"+lines[0] {
				t.Errorf("the path is %s", path)
			}
			i.wantServed()
			i.pass(s.bounds.settle - time.Second)
			i.reconcile(s)
			i.pass(s.bounds.settle - time.Second)
			if waits := i.reconcile(s); waits != "" {
				t.Errorf("waits: %s", waits)
			}
			if got := strings.Fields(string(i.secret(secretOfPath, "secret"))); !slices.Equal(got, lines[:1]) {
				t.Errorf("lines %q, want only the new one", got)
			}
			i.kubelet(i.webhooks...)
			i.wantServed()
		})
	}
}

// A person rotates the authority by deleting it. The API server trusts both until all
// webhooks have a certificate of the new one.
func TestSetupRotatesAuthority(t *testing.T) {
	t.Parallel()
	for what, names := range map[string][]string{"authority": {secretAuthority}, "both": {secretAuthority, secretWebhook}} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			i, s, _ := installed(t)
			old := i.secret(secretWebhook, "tls.crt")
			for _, name := range names {
				i.forget(name, "")
			}
			waits := i.reconcile(s)
			if leaf := i.secret(secretWebhook, "tls.crt"); leaf != nil && !bytes.Equal(leaf, old) || i.trusts() != 2 ||
				!strings.Contains(waits, "all API servers to trust the new authority") {
				t.Fatalf("trusts %d, waits %q", i.trusts(), waits)
			}
			if n := bytes.Count(i.secret(secretRedis, "ca.crt"), []byte("BEGIN")); n != 2 {
				t.Errorf("the clients of Redis trust %d authorities, want 2", n)
			}
			i.pass(s.bounds.settle)
			i.reconcile(s)
			if leaf := i.secret(secretWebhook, "tls.crt"); bytes.Equal(leaf, old) {
				t.Errorf("the old certificate is still there")
			}
			i.kubelet(i.webhooks[0])
			i.wantServed()
			i.pass(s.bounds.refresh)
			if waits := i.reconcile(s); i.trusts() != 2 || !strings.Contains(waits, "webhook-2: it has a certificate of another") {
				t.Errorf("trusts %d, waits %q", i.trusts(), waits)
			}
			i.kubelet(i.webhooks...)
			i.reconcile(s)
			if i.trusts() != 1 {
				t.Errorf("trusts %d", i.trusts())
			}
			i.wantServed()
			i.pass(2 * s.bounds.refresh)
			if waits := i.reconcile(s); waits != "" {
				t.Errorf("waits: %s", waits)
			}
			if got, want := i.secret(secretRedis, "ca.crt"), i.secret(secretAuthority, "tls.crt"); !bytes.Equal(got, want) {
				t.Errorf("the clients of Redis trust %s, want %s", got, want)
			}
		})
	}
}

// A certificate is renewed after two thirds of its life, and the webhooks may be late.
func TestSetupRenews(t *testing.T) {
	t.Parallel()
	i, s, log := installed(t)
	old := i.secret(secretWebhook, "tls.crt")
	i.pass(60*24*time.Hour - time.Hour)
	i.reconcile(s)
	if !bytes.Equal(i.secret(secretWebhook, "tls.crt"), old) {
		t.Error("renewed before two thirds of its life")
	}
	i.pass(2 * time.Hour)
	if waits := i.reconcile(s); waits != "" || bytes.Equal(i.secret(secretWebhook, "tls.crt"), old) {
		t.Errorf("not renewed; waits: %s", waits)
	}
	if !strings.Contains(log.String(), "two thirds of the old one's life are over") {
		t.Error("the log does not say why")
	}
	i.wantServed()
	i.kubelet(i.webhooks[0])
	i.reconcile(s)
	i.wantServed()
	i.kubelet(i.webhooks...)
	before := i.writes()
	i.reconcile(s)
	i.wantServed()
	if i.writes() != before {
		t.Error("written again")
	}
}

// Each pair that is of no use is made anew, and the log says why.
func TestSetupReplacesBadCertificates(t *testing.T) {
	t.Parallel()
	i := newInstallation(t).apply()
	s, log := i.setup()
	i.reconcile(s)
	wrong := &corev1.Secret{Data: map[string][]byte{}}
	rig.Must(t, s.writePair(wrong, s.authority, time.Hour, "example.org"))
	other := &corev1.Secret{Data: map[string][]byte{}}
	rig.Must(t, s.writePair(other, nil, time.Hour))
	for _, c := range []struct {
		why    string
		change func(data map[string][]byte)
	}{
		{"tls: failed to find any PEM data", func(data map[string][]byte) { data["tls.crt"] = []byte("hello") }},
		{"private key does not match public key", func(data map[string][]byte) { data["tls.key"] = wrong.Data["tls.key"] }},
		{"is for other names", func(data map[string][]byte) {
			data["tls.crt"], data["tls.key"] = wrong.Data["tls.crt"], wrong.Data["tls.key"]
		}},
		{"another authority has signed|is for other names", func(data map[string][]byte) {
			data["tls.crt"], data["tls.key"] = other.Data["tls.crt"], other.Data["tls.key"]
		}},
		{"there was none", func(data map[string][]byte) { data["tls.key"] = []byte{} }},
	} {
		for _, name := range []string{secretWebhook, secretRedis} {
			_, status := i.api.Store.Secrets.Change(hook, name, func(s *corev1.Secret) { c.change(s.Data) })
			i.want(status)
		}
		before := len(log.String())
		i.reconcile(s)
		told := log.String()[before:]
		ok := slices.ContainsFunc(strings.Split(c.why, "|"), func(why string) bool { return strings.Count(told, why) >= 2 })
		if !ok {
			t.Errorf("want twice %q in %s", c.why, told)
		}
		for name, names := range map[string][]string{secretWebhook: s.webhookNames(), secretRedis: s.redisNames()} {
			now, _ := i.api.Store.Secrets.Get(hook, name)
			if _, why := s.readLeaf(now, names); why != "" {
				t.Errorf("%s: after %q: %s", name, c.why, why)
			}
		}
	}
	i.pass(91 * 24 * time.Hour)
	before := len(log.String())
	i.reconcile(s)
	if told := log.String()[before:]; strings.Count(told, "the old one expired at") != 2 {
		t.Errorf("expired certificates: %s", told)
	}
	// A Secret of another type cannot be changed: it is replaced.
	i.forget(secretWebhook, "")
	_, status := i.api.Store.Secrets.Create(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: hook, Name: secretWebhook}})
	i.want(status)
	i.reconcile(s)
	if now, _ := i.api.Store.Secrets.Get(hook, secretWebhook); now.Type != corev1.SecretTypeTLS || len(now.Data["tls.key"]) == 0 {
		t.Errorf("the Secret is %+v", now)
	}
}

// Two setups at once make the same as one.
func TestSetupTwice(t *testing.T) {
	t.Parallel()
	i := newInstallation(t).apply()
	var both [2]*setup
	for n := range both {
		both[n], _ = i.setup()
	}
	together := func() {
		t.Helper()
		var all sync.WaitGroup
		for _, s := range both {
			all.Go(func() { s.reconcile(t.Context()) })
		}
		all.Wait()
	}
	together()
	for _, s := range both {
		i.reconcile(s)
	}
	i.start("webhook-1")
	i.start("webhook-2")
	i.load()
	for range 2 {
		i.forget(secretAuthority, "")
		i.forget(secretOfPath, "secret")
		for n := range 12 {
			together()
			if n%2 == 1 {
				i.kubelet(i.webhooks...)
			}
			i.wantServed()
			i.pass(both[0].bounds.settle)
		}
		for _, s := range both {
			i.pass(2 * s.bounds.refresh)
			i.reconcile(s)
			i.pass(2 * s.bounds.refresh)
			if waits := i.reconcile(s); waits != "" || i.trusts() != 1 {
				t.Errorf("trusts %d, waits: %s", i.trusts(), waits)
			}
		}
	}
}

// While the API server refuses, the other steps go on. Afterwards all is made.
func TestSetupRefused(t *testing.T) {
	t.Parallel()
	for _, code := range []int32{http.StatusConflict, http.StatusInternalServerError, http.StatusForbidden} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			i, s, log := installed(t)
			refuse := func(path string, writes bool) {
				i.api.Fail(func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.URL.Path, path) || (r.Method != http.MethodGet) != writes {
						return false
					}
					rig.Respond(w, 0, nil, rig.Failure(code, "", "said on purpose"))
					return true
				})
			}
			for _, path := range []string{"/secrets", "/mutatingwebhookconfigurations", "/pods"} {
				for _, writes := range []bool{true, false} {
					refuse(path, writes)
					i.forget(secretOfPath, "secret")
					i.forget(secretAuthority, "")
					s.reconcile(t.Context())
					i.wantServed()
					i.api.Fail(nil)
					for range 6 {
						i.reconcile(s)
						i.kubelet(i.webhooks...)
						i.pass(s.bounds.settle)
					}
					i.wantServed()
				}
			}
			lines := log.Lines(t, "a step failed, to be repeated")
			if len(lines) == 0 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "said on purpose") {
				t.Errorf("logged %v", lines)
			}
		})
	}
}

// With a given certificate, setup leaves the Secret and the caBundle alone.
func TestSetupGivenCertificate(t *testing.T) {
	t.Parallel()
	i := newInstallation(t).apply()
	s, _ := i.setup(func(c *setupConfig) { c.webhookCertificate = certificateGiven })
	if waits := i.reconcile(s); waits != "" {
		t.Errorf("waits: %s", waits)
	}
	if bundle, path := i.configured(); bundle != nil || !strings.HasPrefix(path, "/mutate/") {
		t.Errorf("the bundle is %q, the path %q", bundle, path)
	}
	if i.secret(secretWebhook, "tls.crt") != nil {
		t.Error("setup made a certificate")
	}
	if i.secret(secretRedis, "tls.crt") == nil {
		t.Error("setup made no certificate of Redis")
	}
}

// Webhooks without the flag of the path serve /mutate, whether they ask for certificates
// or not.
func TestSetupWithoutPath(t *testing.T) {
	t.Parallel()
	i, s, _ := installed(t)
	for n := range i.webhooks {
		_, status := i.api.Store.Change(hook, fmt.Sprint("webhook-", n+1), func(p *corev1.Pod) {
			p.Spec.Containers[0].Args = []string{"webhook", "--client-ca-file=/ca.crt", "--path-secret-file="}
		})
		i.want(status)
		s.reconcile(t.Context())
		_, path := i.configured()
		if got, want := path == mutatePath, n == 1; got != want {
			t.Errorf("%d of 2 without the flag: the path is %s", n+1, path)
		}
	}
}

// A webhook that asks for client certificates shows its own certificate all the same, and
// cannot be asked for its path: it has the time of the kubelets.
func TestSetupWithClientCertificates(t *testing.T) {
	t.Parallel()
	i := newInstallation(t).apply()
	s, _ := i.setup()
	i.reconcile(s)
	file := filepath.Join(t.TempDir(), "ca.crt")
	newAuthority(t).write(t, file)
	w := i.start("webhook-1", func(c *webhookConfig) { c.clientCAFile = file })
	leaf, err := presentedLeaf(t.Context(), w.address, "webhook")
	if err != nil || s.signed(leaf, s.authority.cert) != nil {
		t.Fatalf("got %v, %v", leaf, err)
	}
	_, old := i.configured()
	i.forget(secretOfPath, "secret")
	i.reconcile(s)
	i.pass(s.bounds.refresh - time.Minute)
	i.reconcile(s)
	if _, path := i.configured(); path != old {
		t.Error("the path has changed before the kubelets had their time")
	}
	i.pass(time.Minute)
	i.reconcile(s)
	if _, path := i.configured(); path == old {
		t.Error("the path has not changed")
	}
}

// The loop repairs at once what a watch tells.
func TestSetupLoop(t *testing.T) {
	t.Parallel()
	i := newInstallation(t).apply()
	s, _ := i.setup()
	s.bounds.every = time.Hour
	inBackground(t, s.run)
	wanted := func(before []byte) {
		t.Helper()
		rig.Eventually(t, time.Minute, func() error {
			if now := i.secret(secretRedis, "tls.key"); len(now) == 0 || bytes.Equal(now, before) {
				return errors.New("no new certificate of Redis")
			}
			return nil
		})
	}
	wanted(nil)
	rig.Eventually(t, time.Minute, func() error { return s.secrets.check() })
	old := i.secret(secretRedis, "tls.key")
	i.forget(secretRedis, "")
	wanted(old)
	rig.Eventually(t, time.Minute, func() error {
		for _, e := range i.api.Store.EventsOf(hook) {
			if e.Regarding.Name == secretRedis && strings.Contains(e.Note, "a new certificate of Redis") {
				return nil
			}
		}
		return errors.New("no event tells of it")
	})
}
