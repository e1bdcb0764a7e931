package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// certificate is a TLS key pair that is reread when its files change.
type certificate struct{ *watchedFile[tls.Certificate] }

// loadCertificate reads tls.crt and tls.key in dir.
func loadCertificate(dir string, log *slog.Logger) (*certificate, error) {
	f, err := newWatchedFile(log, parsePair, func(pair tls.Certificate) {
		serial := fmt.Sprintf("%X", pair.Leaf.SerialNumber) // as openssl prints it
		log.Info("certificate taken", "serialNumber", serial, "notAfter", pair.Leaf.NotAfter, "dnsNames", pair.Leaf.DNSNames)
	}, filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		return nil, fmt.Errorf("--certDir: %w", err)
	}
	return &certificate{f}, nil
}

func parsePair(texts [][]byte) (tls.Certificate, error) { return tls.X509KeyPair(texts[0], texts[1]) }

// get implements tls.Config.GetCertificate.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current.Load(), nil
}

// readCA reads a file of PEM certificates. For no file it returns nil: the system's
// certificates.
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

// readPassword reads a file that has one password, with or without a newline.
func readPassword(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	switch password := strings.TrimRight(string(text), "\r\n"); {
	case password == "":
		return "", fmt.Errorf("%s is empty", file)
	case strings.ContainsAny(password, "\r\n"):
		return "", fmt.Errorf("%s has more than one line, not one password", file)
	default:
		return password, nil
	}
}

// errNoCertificate means that a file contains no certificate.
var errNoCertificate = errors.New("no PEM certificate")

func parseCA(texts [][]byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(texts[0]) {
		return nil, errNoCertificate
	}
	return pool, nil
}

// fileInterval is the interval at which files are read and compared. File notifications
// do not work here: the kubelet updates a mounted Secret by replacing a symbolic link.
const fileInterval = time.Second

// watchedFile is a value that is read from files, and reread when they change.
type watchedFile[T any] struct {
	files    []string
	parse    func(texts [][]byte) (T, error) // texts are the contents, in the order of files
	onChange func(T)                         // runs just before a value comes into use
	current  atomic.Pointer[T]
	hasRead  bool   // last is set
	last     []byte // last content of the files, or the last error of reading them
	log      *slog.Logger
}

// newWatchedFile reads the files. It fails if their content is bad.
func newWatchedFile[T any](log *slog.Logger, parse func(texts [][]byte) (T, error), onChange func(T),
	files ...string) (*watchedFile[T], error) {
	f := &watchedFile[T]{files: files, parse: parse, onChange: onChange, log: log}
	if _, err := f.reload(); err != nil {
		return nil, err
	}
	return f, nil
}

// reload reads the files again. If they have changed since the last call, it takes the
// new value. If that is bad, it returns an error and keeps the old value.
func (f *watchedFile[T]) reload() (changed bool, err error) {
	var texts [][]byte
	for _, file := range f.files {
		text, err := os.ReadFile(file)
		if err != nil {
			return f.changed([]byte(err.Error())), err
		}
		texts = append(texts, text)
	}
	if !f.changed(bytes.Join(texts, []byte{0})) {
		return false, nil
	}
	value, err := f.parse(texts)
	if err != nil {
		return true, fmt.Errorf("%s: %w", strings.Join(f.files, " and "), err)
	}
	f.onChange(value)
	f.current.Store(&value)
	return true, nil
}

// changed reports whether content differs from that of the last call.
func (f *watchedFile[T]) changed(content []byte) bool {
	if f.hasRead && bytes.Equal(content, f.last) {
		return false
	}
	f.hasRead, f.last = true, content
	return true
}

// watch reloads every interval until ctx is done. It logs each bad change once.
func (f *watchedFile[T]) watch(ctx context.Context, interval time.Duration) {
	for sleep(ctx, interval) == nil {
		if changed, err := f.reload(); changed && err != nil {
			f.log.Error("changed files not taken, what they held before stays in use", "error", err.Error())
		}
	}
}
