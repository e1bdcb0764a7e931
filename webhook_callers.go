package main

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
)

// pathDigest is the digest of a valid path. A comparison of digests reveals nothing of
// the path, not even by its time.
type pathDigest [sha256.Size]byte

func newPathDigest(path string) pathDigest { return sha256.Sum256([]byte(path)) }

// pathDigests are the valid paths of a file.
type pathDigests struct {
	paths  []pathDigest
	digest string // of the file's content
}

// parsePathSecrets reads one secret from each line.
func parsePathSecrets(texts [][]byte) (good pathDigests, err error) {
	good.digest = fmt.Sprintf("%x", sha256.Sum256(texts[0]))[:16]
	for n, line := range strings.Split(strings.TrimSpace(string(texts[0])), "\n") {
		line = strings.TrimSpace(line)
		if !isPathSecret(line) {
			// The error does not show the line: it may be a secret.
			return good, fmt.Errorf("line %d is no secret: "+
				"it must be 16 to 128 of a-z 0-9 -, with no - at either end, as Kubernetes wants paths", n+1)
		}
		good.paths = append(good.paths, newPathDigest(mutatePath+"/"+line))
	}
	return good, nil
}

// callers authenticates the clients of the webhook: by the path, and by a certificate if
// one is required.
type callers struct {
	secrets     *watchedFile[pathDigests] // nil: the path has no secret
	authorities *watchedFile[*x509.CertPool]
	names       []string // of certificates; empty accepts any that an authority has signed
	log         *slog.Logger

	limit logLimiter // of warnings about unauthenticated clients
}

// newCallers reads the files.
func newCallers(c webhookConfig, log *slog.Logger) (*callers, error) {
	w := &callers{names: c.clientNames, limit: logLimiter{most: badRequestsLogged}, log: log}
	var err error
	if c.pathSecretFile != "" {
		taken := func(good pathDigests) { // a person can compare the digest
			log.Info("path secret taken", "digest", good.digest, "paths", len(good.paths))
		}
		if w.secrets, err = newWatchedFile(log, parsePathSecrets, taken, c.pathSecretFile); err != nil {
			return nil, fmt.Errorf("--path-secret-file: %w", err)
		}
	}
	if c.clientCAFile != "" {
		taken := func(*x509.CertPool) { log.Info("authorities of clients taken") }
		w.authorities, err = newWatchedFile(log, parseCA, taken, c.clientCAFile)
		if err != nil {
			return nil, fmt.Errorf("--client-ca-file: %w", err)
		}
	}
	return w, nil
}

// watch watches the files until ctx is done.
func (w *callers) watch(ctx context.Context) {
	if w.secrets != nil {
		go w.secrets.watch(ctx, fileInterval)
	}
	if w.authorities != nil {
		go w.authorities.watch(ctx, fileInterval)
	}
}

// mayCall reports whether admission reviews are served at a path. It takes the same time
// for each path.
func (w *callers) mayCall(path string) bool {
	if w.secrets == nil {
		return path == mutatePath
	}
	asked := newPathDigest(path)
	found := 0
	for _, good := range w.secrets.current.Load().paths {
		found |= subtle.ConstantTimeCompare(asked[:], good[:])
	}
	return found == 1
}

// refuse returns the text for an unauthenticated client. It logs some of these, because
// one may be an API server with another secret.
func (w *callers) refuse(remote string) string {
	if w.secrets == nil {
		return "not found: admission reviews are served at " + mutatePath
	}
	if dropped, ok := w.limit.allow(); ok {
		w.log.Warn("a client calls without the path's secret, or with another", "remote", remote,
			"notLoggedBefore", dropped)
	}
	return "not found: the path must end with the secret of --path-secret-file"
}

// tls returns the TLS settings of the server.
func (w *callers) tls(cert *certificate) *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cert.get, NextProtos: []string{"http/1.1"}}
	if w.authorities == nil {
		return c
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.VerifyConnection = w.checkName
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		now := c.Clone()
		now.ClientCAs = *w.authorities.current.Load()
		return now, nil
	}
	return c
}

// checkName refuses a client whose certificate has another name.
func (w *callers) checkName(state tls.ConnectionState) error {
	if len(w.names) == 0 {
		return nil
	}
	if len(state.PeerCertificates) == 0 {
		return errors.New("no client certificate")
	}
	leaf := state.PeerCertificates[0]
	for _, name := range append(leaf.DNSNames, leaf.Subject.CommonName) {
		if slices.Contains(w.names, name) {
			return nil
		}
	}
	return fmt.Errorf("the client certificate is of %s: --client-name is %s",
		quoteShort(leaf.Subject.CommonName), strings.Join(w.names, ","))
}
