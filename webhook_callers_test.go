package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	secretA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	secretB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	secretC = "cccccccccccccccccccccccccccccccccccccccc"
)

// statusAt posts a review to a path.
func (w *testWebhook) statusAt(t *testing.T, path string, body []byte) (status int, text string) {
	t.Helper()
	response, err := w.server.Client().Post(w.server.URL+path, "application/json", bytes.NewReader(body))
	rig.Must(t, err)
	defer response.Body.Close()
	all, err := io.ReadAll(response.Body)
	rig.Must(t, err)
	return response.StatusCode, string(all)
}

func (w *testWebhook) wantStatusAt(t *testing.T, path string, body []byte, want int) {
	t.Helper()
	if status, text := w.statusAt(t, path, body); status != want {
		t.Errorf("%s: got %d %s, want %d", path, status, text, want)
	}
}

// A client without the path secret gets no token and learns nothing. While the file has an
// old and a new secret, both are valid.
func TestPathSecret(t *testing.T) {
	r := rig.CommonRedis(t)
	file := filepath.Join(t.TempDir(), "secret")
	write := func(lines ...string) { rig.Must(t, os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600)) }
	write(secretA)
	c := testConfig(r.Address)
	c.pathSecretFile = file
	w := startWebhook(t, c)
	id := freshID()
	body := rig.Review(t, id, maxLength)
	for _, path := range []string{
		"/mutate", "/", "/mutate/", "/mutate/" + secretB, "/mutate/" + secretA[1:],
		"/mutate/" + secretA + "/", "/mutate//" + secretA,
		"/" + secretA, "/mutate/" + secretA + "a", "/mutate/../mutate/" + secretB, "/mutate/-"} {
		w.wantStatusAt(t, path, body, http.StatusNotFound)
	}
	if free, inUse, err := r.Counts(id); free != 0 || inUse != 0 || err != nil {
		t.Errorf("unauthenticated clients made tokens: %d free, %d in use, %v", free, inUse, err)
	}
	w.wantStatusAt(t, "/mutate/"+secretA+"?timeout=10s", body, http.StatusOK)
	r.WantCounts(t, id, 255, 1)
	if n := len(w.log.Lines(t, "a client calls without the path's secret, or with another")); n != badRequestsLogged {
		t.Errorf("unauthenticated clients were logged %d times, want %d", n, badRequestsLogged)
	}

	// setup asks so whether the webhook knows a path. That is no admission, and is not logged.
	w.log.WantLines(t, "admission", 1) // it follows the answer
	before := len(w.log.String())
	for path, want := range map[string]int{"/mutate/" + secretA: http.StatusNoContent, "/mutate/" + secretB: http.StatusNotFound} {
		request, err := http.NewRequest(http.MethodOptions, w.server.URL+path, nil)
		rig.Must(t, err)
		response, err := w.server.Client().Do(request)
		rig.Must(t, err)
		response.Body.Close()
		if response.StatusCode != want || len(w.log.String()) != before {
			t.Errorf("OPTIONS %s: got %s, want %d; log: %s", path, response.Status, want, w.log.String()[before:])
		}
	}

	change := func(valid, refused []string, lines ...string) {
		t.Helper()
		write(lines...)
		if _, err := w.callers.secrets.reload(); err != nil {
			t.Error(err)
		}
		for _, secret := range valid {
			w.wantStatusAt(t, "/mutate/"+secret, body, http.StatusOK)
		}
		for _, secret := range refused {
			w.wantStatusAt(t, "/mutate/"+secret, body, http.StatusNotFound)
		}
	}
	change([]string{secretA, secretB}, []string{secretC}, secretB, secretA)
	change([]string{secretB}, []string{secretA, secretC}, secretB)

	for _, bad := range []string{
		"", "short", secretA + "\nno secret at all", secretA + "\n\n" + secretB,
		strings.Repeat("a", 129), strings.Repeat("A", 20), "-" + secretA, secretA + "\n-",
	} {
		rig.Must(t, os.WriteFile(file, []byte(bad), 0o600))
		_, err := w.callers.secrets.reload()
		if err == nil || strings.Contains(err.Error(), secretA) || strings.Contains(err.Error(), "no secret at all") {
			t.Errorf("%q: got %v, want an error without the secret", bad, err)
		}
		w.wantStatusAt(t, "/mutate/"+secretB, body, http.StatusOK)
	}
	if log := w.log.String(); strings.Contains(log, secretA) || strings.Contains(log, secretB) {
		t.Errorf("a secret is in the log:\n%s", log)
	}
}

// Without a file, the path has no secret.
func TestNoPathSecret(t *testing.T) {
	w := startWebhook(t, testConfig(rig.CommonRedis(t).Address))
	w.wantStatusAt(t, "/mutate", rig.Review(t, freshID(), 1), http.StatusOK)
	status, text := w.statusAt(t, "/mutate/"+secretA, nil)
	if status != http.StatusNotFound || !strings.Contains(text, "served at /mutate") {
		t.Errorf("got %d %s", status, text)
	}
}

// The webhook rereads the file, and logs its digest.
func TestPathSecretIsReread(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "secret")
	rig.Must(t, os.WriteFile(file, []byte(secretA+"\n"), 0o600))
	w := rig.StartWebhook(t, rig.CommonRedis(t).Address, "--path-secret-file="+file)
	rig.Must(t, os.WriteFile(file, []byte(secretB+"\n"+secretC+"\n"), 0o600))
	body := rig.Review(t, freshID(), maxLength)
	rig.Eventually(t, 10*time.Second, func() error {
		response, err := w.Client.Post(w.URL+"/mutate/"+secretB, "application/json", bytes.NewReader(body))
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s", response.Status)
		}
		return nil
	})
	lines := w.Log.Lines(t, "path secret taken")
	if len(lines) != 2 || lines[1]["digest"] != "24f03438de2d33fa" {
		t.Errorf("logged %v", lines)
	}
}

// authority signs client certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	rig.Must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"},
		NotBefore: time.Now().Add(-time.Hour),
		NotAfter:  time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	rig.Must(t, err)
	cert, err := x509.ParseCertificate(der)
	rig.Must(t, err)
	return &authority{cert, key}
}

func (a *authority) write(t *testing.T, file string) {
	t.Helper()
	rig.Must(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o600))
}

// sign makes a client certificate.
func (a *authority) sign(t *testing.T, name string, notAfter time.Time, usage x509.ExtKeyUsage) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	rig.Must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		DNSNames:  []string{name + ".example.org"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter, ExtKeyUsage: []x509.ExtKeyUsage{usage}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	rig.Must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// With client authorities, the webhook serves only clients with a certificate of one of
// them, and of the right name.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "ca.crt")
	ours, others := newAuthority(t), newAuthority(t)
	ours.write(t, file)
	w := rig.StartWebhook(t, rig.CommonRedis(t).Address,
		"--client-ca-file="+file, "--client-name=kube-apiserver,api.example.org")
	later := time.Now().Add(time.Hour)
	body := rig.Review(t, freshID(), maxLength)
	call := func(certificates ...tls.Certificate) error {
		transport := &http.Transport{ForceAttemptHTTP2: true,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: certificates}}
		defer transport.CloseIdleConnections()
		response, err := (&http.Client{Transport: transport}).Post(
			w.URL+"/mutate?timeout=10s", "application/json", bytes.NewReader(body))
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK || response.ProtoMajor != 1 {
			t.Errorf("got %s by %s, want 200 by HTTP/1.1", response.Status, response.Proto)
		}
		return nil
	}
	client := x509.ExtKeyUsageClientAuth
	rig.Must(t, call(ours.sign(t, "kube-apiserver", later, client)))
	rig.Must(t, call(ours.sign(t, "api", later, client)))
	for what, certificates := range map[string][]tls.Certificate{
		"no certificate":         nil,
		"another authority":      {others.sign(t, "kube-apiserver", later, client)},
		"another name":           {ours.sign(t, "kubelet", later, client)},
		"a server certificate":   {ours.sign(t, "kube-apiserver", later, x509.ExtKeyUsageServerAuth)},
		"an expired certificate": {ours.sign(t, "kube-apiserver", time.Now().Add(-time.Minute), client)},
	} {
		if err := call(certificates...); err == nil {
			t.Errorf("the webhook served a client with %s", what)
		}
	}
	others.write(t, file)
	rig.Eventually(t, 10*time.Second, func() error { return call(others.sign(t, "kube-apiserver", later, client)) })
	if err := call(ours.sign(t, "kube-apiserver", later, client)); err == nil {
		t.Error("the webhook served a client of the old authority")
	}
}

func TestCallerUsage(t *testing.T) {
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	bad := filepath.Join(dir, "bad")
	rig.Must(t, os.WriteFile(bad, []byte("hello"), 0o600))
	for flag, want := range map[string]string{
		"--client-name=a":         "--client-name: is not used: there is no --client-ca-file",
		"--client-name=a,":        `--client-name: "a," has an empty name`,
		"--client-ca-file=/no":    "--client-ca-file: open /no",
		"--client-ca-file=" + bad: "no PEM certificate",
	} {
		code, _, stderr := runArgs(nil, "webhook", "--certDir="+dir, flag)
		if code != 2 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %s", flag, code, stderr)
		}
	}
	empty := filepath.Join(dir, "empty")
	rig.Must(t, os.WriteFile(empty, nil, 0o600))
	for flag, want := range map[string]string{
		"--path-secret-file=/no":      "--path-secret-file: open /no",
		"--path-secret-file=" + empty: "--path-secret-file: " + empty + ": line 1 is no secret",
		"--path-secret-file=" + bad:   "--path-secret-file: " + bad + ": line 1 is no secret",
	} {
		code, _, stderr := runArgs(nil, "webhook", "--certDir="+dir, flag)
		if code != 1 || !strings.Contains(stderr, want) || strings.Contains(stderr, "hello") {
			t.Errorf("%s: exit code %d, %s", flag, code, stderr)
		}
	}
}

func TestCertificateFollowsItsFiles(t *testing.T) {
	dir := t.TempDir()
	var b rig.Log
	log := slog.New(slog.NewJSONHandler(&b, nil))
	if _, err := loadCertificate(dir, log); err == nil || !strings.Contains(err.Error(), "--certDir: open "+dir) {
		t.Errorf("without files: got %v", err)
	}
	rig.WriteCertificate(t, dir, 1)
	c, err := loadCertificate(dir, log)
	rig.Must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go c.watch(ctx, time.Millisecond)
	wantSerial := func(want int64) {
		t.Helper()
		rig.Eventually(t, 5*time.Second, func() error {
			pair, err := c.get(nil)
			if err == nil && pair.Leaf.SerialNumber.Int64() != want {
				err = fmt.Errorf("serial number %d, want %d", pair.Leaf.SerialNumber, want)
			}
			return err
		})
	}
	wantLines := func(message string, n int) {
		t.Helper()
		rig.Eventually(t, 5*time.Second, func() error {
			if got := len(b.Lines(t, message)); got < n {
				return fmt.Errorf("%d lines with %q", got, message)
			}
			return nil
		})
	}
	wantSerial(1)
	rig.WriteCertificate(t, dir, 2)
	wantSerial(2)
	wantLines("certificate taken", 2)

	rig.Must(t, os.WriteFile(filepath.Join(dir, "tls.key"), []byte("not a key"), 0o600))
	wantLines("changed files not taken, what they held before stays in use", 1)
	wantSerial(2)
	rig.Must(t, os.Remove(filepath.Join(dir, "tls.key")))
	wantLines("changed files not taken, what they held before stays in use", 2)
	wantSerial(2)
	rig.WriteCertificate(t, dir, 3)
	wantSerial(3)
}

// A bad pair is logged once, not at every check.
func TestBadCertificateIsReportedOnce(t *testing.T) {
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	c, err := loadCertificate(dir, slog.New(slog.DiscardHandler))
	rig.Must(t, err)
	rig.Must(t, os.WriteFile(filepath.Join(dir, "tls.crt"), []byte("not a certificate"), 0o600))
	for i, want := range []bool{true, false, false} {
		if changed, _ := c.reload(); changed != want {
			t.Errorf("check %d: changed is %t", i, changed)
		}
	}
	rig.Must(t, os.Remove(filepath.Join(dir, "tls.crt")))
	for i, want := range []bool{true, false} {
		changed, err := c.reload()
		if changed != want || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("removed, check %d: changed is %t, %v", i, changed, err)
		}
	}
}
