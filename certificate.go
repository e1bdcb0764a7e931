package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// certificatePollInterval is how often the certificate's files are looked at. They are read and compared: the
// kubelet changes a mounted Secret by a symbolic link, which notifications on the files do not show.
const certificatePollInterval = time.Second

// certificate is a TLS key pair that follows its files.
type certificate struct {
	certFile, keyFile string
	current           atomic.Pointer[tls.Certificate]
	seen              []byte // content of both files, good or bad
	log               *slog.Logger
}

// loadCertificate reads tls.crt and tls.key in dir.
func loadCertificate(dir string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: filepath.Join(dir, "tls.crt"), keyFile: filepath.Join(dir, "tls.key"), log: log}
	if _, err := c.reload(); err != nil {
		return nil, fmt.Errorf("--certDir: %w", err)
	}
	c.logTaken()
	return c, nil
}

// get is for tls.Config.GetCertificate.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current.Load(), nil
}

// reload reads the files again. If they have changed since the last call, it takes the new pair, or says what is
// wrong with it and keeps the old one.
func (c *certificate) reload() (changed bool, err error) {
	certPEM, err := os.ReadFile(c.certFile)
	if err != nil {
		return c.see([]byte(err.Error())), err
	}
	keyPEM, err := os.ReadFile(c.keyFile)
	if err != nil {
		return c.see([]byte(err.Error())), err
	}
	if !c.see(bytes.Join([][]byte{certPEM, keyPEM}, []byte{0})) {
		return false, nil
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return true, fmt.Errorf("%s and %s: %w", c.certFile, c.keyFile, err)
	}
	c.current.Store(&pair)
	return true, nil
}

// see remembers what was seen and reports whether it is new.
func (c *certificate) see(what []byte) bool {
	if bytes.Equal(what, c.seen) {
		return false
	}
	c.seen = what
	return true
}

// watch reloads every interval until ctx is done, and logs each change once.
func (c *certificate) watch(ctx context.Context, interval time.Duration) {
	for sleep(ctx, interval) == nil {
		changed, err := c.reload()
		switch {
		case !changed:
		case err != nil:
			c.log.Error("new certificate not taken, the old one stays", "error", err.Error())
		default:
			c.logTaken()
		}
	}
}

// logTaken says which certificate is in use from now on; its serial number is as openssl prints it.
func (c *certificate) logTaken() {
	leaf := c.current.Load().Leaf
	c.log.Info("certificate taken", "serialNumber", fmt.Sprintf("%X", leaf.SerialNumber), "notAfter", leaf.NotAfter, "dnsNames", leaf.DNSNames)
}

// readCA reads a file of PEM certificates; nil, for those of the system, if there is no file.
func readCA(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("no PEM certificate in %s", file)
	}
	return pool, nil
}
