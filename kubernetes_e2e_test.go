//go:build e2e

package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

func init() { newAPIServer = startRealAPIServer }

// kubeconfig is the configuration that kubectl uses.
type kubeconfig struct {
	Clusters []struct {
		Cluster struct {
			Server string `json:"server"`
			CA     []byte `json:"certificate-authority-data"`
		} `json:"cluster"`
	} `json:"clusters"`
	Users []struct {
		User struct {
			Certificate []byte `json:"client-certificate-data"`
			Key         []byte `json:"client-key-data"`
		} `json:"user"`
	} `json:"users"`
}

// realAPI is the API server of KUBECONFIG.
type realAPI struct {
	server *url.URL
	ca     []byte
	// proxy forwards to the server with the rights of KUBECONFIG's user. The user needs a
	// client certificate.
	proxy http.Handler
}

var findRealAPI = sync.OnceValues(func() (*realAPI, error) {
	text, err := exec.Command("kubectl", "config", "view", "--raw", "--minify", "--flatten", "-o", "json").Output()
	if err != nil {
		return nil, fmt.Errorf("kubectl config view: %w", err)
	}
	var c kubeconfig
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, err
	}
	if len(c.Clusters) == 0 || len(c.Users) == 0 {
		return nil, errors.New("KUBECONFIG names no cluster")
	}
	server, err := url.Parse(c.Clusters[0].Cluster.Server)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(c.Users[0].User.Certificate, c.Users[0].User.Key)
	if err != nil {
		return nil, fmt.Errorf("the client certificate of KUBECONFIG: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.Clusters[0].Cluster.CA)
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(server)
			r.Out.Header.Del("Authorization")
		},
		FlushInterval: -1,
		Transport: &http.Transport{ForceAttemptHTTP2: true,
			TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}},
	}
	return &realAPI{server, c.Clusters[0].Cluster.CA, proxy}, nil
})

func startRealAPIServer(t testing.TB) *rig.APIServer {
	t.Helper()
	real, err := findRealAPI()
	rig.Must(t, err)
	return rig.StartAPIServerFor(t, real.proxy)
}

// The API server itself is killed and restarted.
func TestKubernetesRestartedAPIServer(t *testing.T) {
	restart := os.Getenv("NODE_RESTART")
	if restart == "" {
		t.Fatal("NODE_RESTART is not set: it is the command " +
			"that restarts a component of the node, see test/e2e/setup_test.go")
	}
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	s.CreatePod(t, n, rig.GatedPod("old"))
	k := startWatching(t, clientSettings(s), n)
	k.want(t, 1, "old")
	s.WantWatches(t, 1)
	out, err := exec.Command("sh", "-c", "COMPONENT=apiserver SIGNAL=KILL; "+restart).CombinedOutput()
	if err != nil {
		t.Fatalf("restart the API server: %v: %s", err, out)
	}
	rig.Eventually(t, time.Minute, func() error {
		if w := s.TryDirect(t, http.MethodGet, "/readyz", nil); w.Code != http.StatusOK {
			return fmt.Errorf("the API server is not ready: %d %s", w.Code, w.Body)
		}
		return nil
	})
	s.CreatePod(t, n, rig.GatedPod("new"))
	rig.Eventually(t, 40*time.Second, func() error { // after a new list, or without one
		if k.get("new") == nil || k.get("old") == nil {
			return fmt.Errorf("the watch has the pods %v", k.pods)
		}
		return nil
	})
}

// The account of the mode gate can lift its gate and change nothing else of a pod. A
// stolen token of it cannot change an image.
func TestKubernetesRights(t *testing.T) {
	kubectl := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("kubectl", args...).CombinedOutput(); err != nil {
			t.Fatalf("kubectl %q: %v: %s", args, err, out)
		}
	}
	kubectl("apply", "-f", "deploy/base/00-namespace.yaml", "-f", "deploy/gate/rights.yaml")
	t.Cleanup(func() { kubectl("delete", "-f", "deploy/gate/rights.yaml") })
	s := newAPIServer(t)
	n := s.NewNamespace(t)
	k := clientOfGate(t, s)
	p := rig.GatedPod("p")
	p.Annotations["example.org/second"] = "two"
	p.Spec.InitContainers = []corev1.Container{{Name: "init", Image: "example.org/init:v1"}}
	uid := string(s.CreatePod(t, n, p).UID)

	label := []string{"metadata", "labels", rig.LabelGated}
	refused := map[string]func(*patch){
		"image": func(p *patch) {
			p.add("example.org/evil:v1", "spec", "containers", "0", "image")
		},
		"image of an init": func(p *patch) {
			p.add("example.org/evil:v1", "spec", "initContainers", "0", "image")
		},
		"deadline": func(p *patch) { p.add(1, "spec", "activeDeadlineSeconds") },
		"toleration": func(p *patch) {
			p.add(corev1.Toleration{Key: "x", Operator: corev1.TolerationOpExists}, "spec", "tolerations", "-")
		},
		"node selector": func(p *patch) { // Kubernetes allows it for gated pods
			p.add(map[string]string{"x": "y"}, "spec", "nodeSelector")
		},
		"new annotation":      func(p *patch) { p.add("x", "metadata", "annotations", "example.org/new") },
		"our annotation":      func(p *patch) { p.add("x", "metadata", "annotations", annotationKey) },
		"annotation removed":  func(p *patch) { p.remove("metadata", "annotations", "example.org/second") },
		"annotations removed": func(p *patch) { p.remove("metadata", "annotations") },
		"new label":           func(p *patch) { p.add("x", "metadata", "labels", "example.org/new") },
		"label of another":    func(p *patch) { p.add("x", "metadata", "labels", "app") },
		"label removed":       func(p *patch) { p.remove("metadata", "labels", "app") },
		"labels removed":      func(p *patch) { p.remove("metadata", "labels") },
		"finalizer":           func(p *patch) { p.add([]string{"example.org/x"}, "metadata", "finalizers") },
		"owner": func(p *patch) {
			owners := `[{"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "` + uid + `"}]`
			p.add(json.RawMessage(owners), "metadata", "ownerReferences")
		},
		"gate of another": func(p *patch) { p.remove("spec", "schedulingGates", "0") },
		"all gates":       func(p *patch) { p.remove("spec", "schedulingGates") },
		"gate and image": func(p *patch) {
			p.remove("spec", "schedulingGates", "1")
			p.add("example.org/evil:v1", "spec", "containers", "0", "image")
		},
	}
	// A new policy takes effect after some seconds.
	var annotate patch
	refused["new annotation"](&annotate)
	rig.Eventually(t, time.Minute, func() error {
		err := k.patchPod(t.Context(), n, "p", annotate.json())
		if err == nil {
			var back patch
			back.remove("metadata", "annotations", "example.org/new")
			s.Direct(t, http.MethodPatch, podPath(n, "p"), back, nil)
			return errors.New("the policy does not refuse a changed annotation yet")
		} else if !isPolicy(err) {
			return err
		}
		return nil
	})
	for name, steps := range refused {
		var p patch
		steps(&p)
		if err := k.patchPod(t.Context(), n, "p", p.json()); !isPolicy(err) {
			t.Errorf("%s: got %v, want a refusal by the policy", name, err)
		}
		// An administrator may make the change: the policy is about this account only.
		if w := s.TryDirect(t, http.MethodPatch, podPath(n, "p")+"?dryRun=All", p); w.Code != http.StatusOK {
			t.Errorf("%s by an administrator: got %d %s", name, w.Code, w.Body)
		}
	}
	fail := func(p *patch) {
		p.add("Failed", "status", "phase")
		p.add(reasonGaveUp, "status", "reason")
	}
	for name, steps := range map[string]func(*patch){
		"no reason": func(p *patch) { p.add("Failed", "status", "phase") },
		"no phase":  func(p *patch) { p.add(reasonGaveUp, "status", "reason") },
		"completed": func(p *patch) {
			fail(p)
			p.add("Succeeded", "status", "phase")
		},
		"address": func(p *patch) {
			fail(p)
			p.add("10.0.0.1", "status", "podIP")
		},
		"condition of another": func(p *patch) {
			fail(p)
			p.add(map[string]string{"type": "Ready", "status": "True"}, "status", "conditions", "-")
		},
		"label": func(p *patch) {
			fail(p)
			p.add("x", "metadata", "labels", "app")
		},
	} {
		var p patch
		steps(&p)
		if err := k.patchPodStatus(t.Context(), n, "p", p.json()); !isPolicy(err) {
			t.Errorf("status: %s: got %v, want a refusal by the policy", name, err)
		}
	}
	for _, steps := range []func(*patch){
		func(p *patch) { p.add("false", label...) },
		func(p *patch) { p.remove(label...) },
		func(p *patch) { p.add("true", label...) },
		func(p *patch) {
			*p = liftGate(uid)
			p.remove(label...)
		},
	} {
		var p patch
		steps(&p)
		rig.Must(t, k.patchPod(t.Context(), n, "p", p.json()))
	}
	got, err := k.getPod(t.Context(), n, "p", uid)
	rig.Must(t, err)
	if !slices.Equal(got.gates, []string{"example.org/other"}) || got.labels[rig.LabelGated] != "" {
		t.Errorf("gates %q, labels %v", got.gates, got.labels)
	}
	rig.Must(t, k.sendEvent(t.Context(), objectEvent{
		about: got.reference(), reporter: "gate", reason: "TokenTaken", action: "Lifting", note: "token taken after 41 s in line",
	}))

	var failed patch
	fail(&failed)
	if err := k.patchPodStatus(t.Context(), n, "p", failed.json()); !isPolicy(err) {
		t.Errorf("a pod without our gate: got %v, want a refusal by the policy", err)
	}
	s.CreatePod(t, n, rig.GatedPod("q"))
	rig.Must(t, k.patchPodStatus(t.Context(), n, "q", failed.json()))

	// RBAC refuses all other requests.
	for _, c := range []struct{ method, path string }{
		{http.MethodDelete, podPath(n, "p")},
		{http.MethodPut, podPath(n, "p") + "/status"},
		{http.MethodPatch, podPath(n, "p") + "/ephemeralcontainers"},
		{http.MethodGet, podPath(n, "p") + "/log"},
		{http.MethodPost, podPath(n, "p") + "/binding"},
		{http.MethodGet, "/api/v1/namespaces/" + n + "/secrets"},
		{http.MethodGet, "/apis/events.k8s.io/v1/namespaces/" + n + "/events"}, {http.MethodPost, podsPath(n)},
	} {
		err := k.exchange(t.Context(), callTimeout, c.method, c.path, "application/json-patch+json", []byte("[]"), nil)
		answer := (*apiError)(nil)
		if !errors.As(err, &answer) || answer.Code != http.StatusForbidden ||
			!strings.Contains(answer.Message, "cannot") {
			t.Errorf("%s %s: got %v, want 403", c.method, c.path, err)
		}
	}
}

// isPolicy reports whether our policy refused a change.
func isPolicy(err error) bool {
	var refused *apiError
	return errors.As(err, &refused) && refused.Code == http.StatusForbidden &&
		strings.Contains(refused.Message, "ValidatingAdmissionPolicy 'at-least-semaphore-pod-hook-gate'") &&
		strings.Contains(refused.Message, "this account may")
}

// clientOfGate returns a client of the API server itself, with a token of the account
// gate.
func clientOfGate(t *testing.T, s *rig.APIServer) *kubernetes {
	t.Helper()
	real, err := findRealAPI()
	rig.Must(t, err)
	var answer struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	s.Direct(t, http.MethodPost, "/api/v1/namespaces/at-least-semaphore-pod-hook/serviceaccounts/gate/token",
		map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": map[string]any{}},
		&answer)
	dir := t.TempDir()
	c := kubernetesSettings{
		address:   real.server.Host,
		caFile:    filepath.Join(dir, "ca.crt"),
		tokenFile: filepath.Join(dir, "token"),
	}
	rig.Must(t, os.WriteFile(c.caFile, real.ca, 0o600))
	rig.Must(t, os.WriteFile(c.tokenFile, []byte(answer.Status.Token), 0o600))
	k, _ := newClient(t, c)
	return k
}
