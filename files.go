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

// certificate is a TLS key pair that follows its files.
type certificate struct{ *watchedFile[tls.Certificate] }

// loadCertificate reads tls.crt and tls.key in dir.
func loadCertificate(dir string, log *slog.Logger) (*certificate, error) {
	f, err := newWatchedFile(log, parsePair, func(pair tls.Certificate) {
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

// fileInterval is how often files are looked at. They are read and compared: the kubelet changes a mounted Secret by a symbolic
// link, which notifications on the files do not show.
const fileInterval = time.Second

// watchedFile is what is read from files, and follows them when they change.
type watchedFile[T any] struct {
	files    []string
	parse    func(texts [][]byte) (T, error) // of the files, in their order
	onChange func(T)                         // is told, and logs, what is in use a moment later
	current  atomic.Pointer[T]
	looked   bool   // there is something seen
	seen     []byte // content of the files, good or bad
	log      *slog.Logger
}

// newWatchedFile reads the files, which have to be good.
func newWatchedFile[T any](log *slog.Logger, parse func(texts [][]byte) (T, error), taken func(T), files ...string) (*watchedFile[T], error) {
	f := &watchedFile[T]{files: files, parse: parse, onChange: taken, log: log}
	if _, err := f.reload(); err != nil {
		return nil, err
	}
	return f, nil
}

// reload reads the files again. If they have changed since the last call, it takes what they hold, or says what is wrong with it and
// keeps what was there before.
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

// changed remembers what was seen and reports whether it is new.
func (f *watchedFile[T]) changed(what []byte) bool {
	if f.looked && bytes.Equal(what, f.seen) {
		return false
	}
	f.looked, f.seen = true, what
	return true
}

// watch reloads every interval until ctx is done, and logs each bad change once.
func (f *watchedFile[T]) watch(ctx context.Context, interval time.Duration) {
	for sleep(ctx, interval) == nil {
		if changed, err := f.reload(); changed && err != nil {
			f.log.Error("changed files not taken, what they held before stays in use", "error", err.Error())
		}
	}
}
