package main

import (
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
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/alicebob/miniredis/v2"
)

const (
	reviewFile = "test/testdata/admission-reviews/deployment-pod.json"
	// stepTimeout is long enough for two votes of the Sentinels, which are twice their
	// failover-timeout of six seconds apart.
	stepTimeout = 30 * time.Second
)

type setupOptions struct {
	program                        string // the program's file
	sentinels                      string // redis-server's file, for Sentinels; empty for the embedded Redis
	etcd                           string // etcd's file; empty for the redlock
	heartbeatSeconds, staleSeconds int
	verbose                        bool // print the logs of the processes as they come
	details                        bool // print flags, patches and outputs, too
	terminal, colours              bool // a person reads along; the terminal shows colours
}

// setup has everything that a semaphore needs: Redis, a certificate and the webhook.
type setup struct {
	queue      queue
	webhook    *process
	webhookURL string
	caFile     string
	dir        string
	client     *http.Client
	lock       []string // the flags for the lock
	options    setupOptions
	pods       map[string]*pod
	steps      int        // of the story, so far
	markers    []string   // what the sidecars leave behind
	processes  []*process // files that the sidecars leave behind
}

// withSetup starts the set-up, calls use, and stops everything.
func withSetup(ctx context.Context, o setupOptions, use func(context.Context, *setup) error) (err error) {
	dir, err := os.MkdirTemp("", "at-least-semaphore-pod-hook-demo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s := &setup{dir: dir, caFile: filepath.Join(dir, "tls.crt"), client: &http.Client{}, options: o,
		pods: map[string]*pod{}}
	defer func() {
		s.client.CloseIdleConnections() // or the webhook waits for them
		s.stopAll()
		if s.queue != nil { // after the sidecars, which give their tokens back
			s.queue.close()
		}
		s.removeMarkers()
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w: everything is stopped", context.Cause(ctx))
		}
	}()
	if err := s.startQueue(ctx); err != nil {
		return fmt.Errorf("start Redis: %w", err)
	}
	if err := s.startWebhook(ctx); err != nil {
		return err
	}
	return use(ctx, s)
}

func (s *setup) startQueue(ctx context.Context) error {
	if s.options.sentinels == "" {
		embedded, err := miniredis.Run()
		if err == nil {
			s.queue = embeddedQueue{embedded}
		}
		return err
	}
	if _, err := exec.LookPath(s.options.sentinels); err != nil {
		return fmt.Errorf("%w: install Redis, or leave out the Sentinels", err)
	}
	q, err := s.startSentinelQueue(ctx, s.options.sentinels)
	if err == nil {
		s.queue = q
	}
	return err
}

func (s *setup) startWebhook(ctx context.Context) error {
	ca, err := writeCertificate(s.dir)
	if err != nil {
		return err
	}
	s.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca}}
	s.lock = []string{"--redis-addresses=" + s.queue.lockServer()}
	if s.options.etcd != "" {
		etcd, err := s.startEtcd(ctx)
		if err != nil {
			return fmt.Errorf("start etcd: %w", err)
		}
		s.lock = []string{"--lock-mode=etcd", "--etcd-addresses=" + etcd}
	}
	for range 5 { // another process may take its ports first
		var health string
		health, err = s.launchWebhook()
		if err != nil {
			return err
		}
		if err = waitFor(ctx, s.webhook, "http://"+health+"/readyz"); !s.webhook.ended() {
			return err
		}
	}
	return fmt.Errorf("start the webhook: %w", err)
}

// launchWebhook starts the webhook on free ports, and returns the address of its probes.
func (s *setup) launchWebhook() (health string, err error) {
	webhook, err := freeAddress()
	if err != nil {
		return "", err
	}
	health, err = freeAddress()
	if err != nil {
		return "", err
	}
	host, port, err := net.SplitHostPort(webhook)
	if err != nil {
		return "", err
	}
	s.webhookURL = "https://" + webhook + "/mutate?timeout=10s"
	s.webhook, err = s.start(nil, s.options.program, append([]string{"webhook",
		"--host=" + host, "--port=" + port, "--metrics-bind-address=" + health, "--certDir=" + s.dir,
		"--queue-redis-address=" + s.queue.address(),
		"--heartbeat-interval-seconds=" + strconv.Itoa(s.options.heartbeatSeconds),
		"--stale-threshold-seconds=" + strconv.Itoa(s.options.staleSeconds)}, s.lock...)...)
	return health, err
}

// startEtcd starts an etcd cluster of one server, and returns its address.
func (s *setup) startEtcd(ctx context.Context) (string, error) {
	client, err := freeAddress()
	if err != nil {
		return "", err
	}
	peer, err := freeAddress()
	if err != nil {
		return "", err
	}
	etcd, err := s.start(nil, s.options.etcd,
		"--data-dir="+filepath.Join(s.dir, "etcd"), "--unsafe-no-fsync", "--log-level=error",
		"--listen-client-urls=http://"+client, "--advertise-client-urls=http://"+client,
		"--listen-peer-urls=http://"+peer, "--initial-advertise-peer-urls=http://"+peer,
		"--initial-cluster=default=http://"+peer)
	if err != nil {
		return "", err
	}
	return client, waitFor(ctx, etcd, "http://"+client+"/health")
}

// waitFor waits until a URL of a process answers 200. It fails at once if the process
// ends.
func waitFor(ctx context.Context, p *process, url string) error {
	err := poll(ctx, "not ready: "+url, func() error {
		if p.ended() {
			return nil
		}
		response, err := http.Get(url)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	})
	if p.ended() {
		err = fmt.Errorf("it has ended:\n%s", p.log.String())
	}
	return err
}

// poll calls check until it returns nil, and reports its last error after stepTimeout.
func poll(ctx context.Context, what string, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return ctx.Err() // an interrupted story ends here
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}

// writeCertificate writes a throw-away certificate for 127.0.0.1, which is its own
// authority.
func writeCertificate(dir string) (*x509.CertPool, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "at-least-semaphore-pod-hook demo"},
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return pool, errors.Join(
		os.WriteFile(filepath.Join(dir, "tls.crt"), certPEM, 0o644),
		os.WriteFile(filepath.Join(dir, "tls.key"), keyPEM, 0o600))
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
