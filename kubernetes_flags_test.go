package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// A pod needs no flags; elsewhere, they say where the API server is.
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
		{args: []string{"--kubernetes-address=https://127.0.0.1:6443", "--kubernetes-ca-file=" + ca, "--kubernetes-token-file=token", "--namespaces=a,b"},
			want: kubernetesSettings{"https://127.0.0.1:6443", ca, "token", []string{"a", "b"}}},
		{env: inPod, args: []string{"--kubernetes-ca-file=" + ca},
			want: kubernetesSettings{"[fd00::1]:6443", ca, "/var/run/secrets/kubernetes.io/serviceaccount/token", nil}},
		{env: inPod, // which is not one
			problems: []string{"--kubernetes-ca-file: open /var/run/secrets/kubernetes.io/serviceaccount/ca.crt: no such file or directory"}},
		{problems: []string{"--kubernetes-address: is needed outside of a pod", "--kubernetes-token-file: is needed outside of a pod"}},
		{args: []string{"--kubernetes-address=http://127.0.0.1:8080", "--kubernetes-ca-file=" + notCA, "--kubernetes-token-file=token", "--namespaces=a,"},
			problems: []string{"--kubernetes-address: an address is not HOST:PORT or https://HOST:PORT",
				"--kubernetes-ca-file: no PEM certificate in " + notCA, `--namespaces: "a," has an empty name`}},
	} {
		var got kubernetesSettings
		err := parseFlags(&got, "gate", "[flags]", c.args, func(name string) string { return c.env[name] })
		var wrong *usageError
		if errors.As(err, &wrong) {
			if !slices.Equal(wrong.problems, c.problems) {
				t.Errorf("%q: problems %q, want %q", c.args, wrong.problems, c.problems)
			}
		} else if err != nil || c.problems != nil || got.address != c.want.address || got.caFile != c.want.caFile || got.tokenFile != c.want.tokenFile ||
			!slices.Equal(got.namespaces, c.want.namespaces) {
			t.Errorf("%q: %+v, %v", c.args, got, err)
		}
	}
}

// A client whose files are not good says so at once, and shows no token.
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
		if k, err := newKubernetes(c, nil); want == "" && (err != nil || *k.token.current.Load() != "one-secret") || want != "" && (err == nil || err.Error() != want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
