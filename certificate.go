package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
)

// certificate is a TLS key pair that follows its files.
type certificate struct{ *followed[tls.Certificate] }

// loadCertificate reads tls.crt and tls.key in dir.
func loadCertificate(dir string, log *slog.Logger) (*certificate, error) {
	f, err := follow(log, parsePair, func(pair tls.Certificate) {
		// The serial number is as openssl prints it.
		log.Info("certificate taken", "serialNumber", fmt.Sprintf("%X", pair.Leaf.SerialNumber), "notAfter", pair.Leaf.NotAfter, "dnsNames", pair.Leaf.DNSNames)
	}, filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		return nil, fmt.Errorf("--certDir: %w", err)
	}
	return &certificate{f}, nil
}

func parsePair(texts [][]byte) (tls.Certificate, error) { return tls.X509KeyPair(texts[0], texts[1]) }

// get is for tls.Config.GetCertificate.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current.Load(), nil
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
	pool, err := parseCA([][]byte{text})
	if err != nil {
		return nil, fmt.Errorf("%w in %s", err, file)
	}
	return pool, nil
}

// errNoCertificate says that a file of certificates has none.
var errNoCertificate = errors.New("no PEM certificate")

func parseCA(texts [][]byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(texts[0]) {
		return nil, errNoCertificate
	}
	return pool, nil
}
