package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// The Secrets of certificates and of the path, in the namespace of the installation.
const (
	secretAuthority = "authority"
	secretWebhook   = "webhook-certificate"
	secretRedis     = "redis-certificate"
	secretOfPath    = "webhook-path"
)

// The name of the webhook's configuration, and of its Service.
const (
	webhookConfigurationName = "at-least-semaphore-pod-hook"
	webhookService           = "webhook"
)

// webhookSelector matches the webhook's pods.
const webhookSelector = "app.kubernetes.io/name=at-least-semaphore-pod-hook,app.kubernetes.io/component=webhook"

// keyPair is a certificate and its key.
type keyPair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (p *keyPair) digest() string {
	sum := sha256.Sum256(p.cert.Raw)
	return hex.EncodeToString(sum[:])
}

// pool returns the certificates to verify by.
func pool(certificates ...*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range certificates {
		pool.AddCert(c)
	}
	return pool
}

// readPair reads the pair of a Secret. It returns why the pair is of no use, or has to be
// renewed.
func (s *setup) readPair(secret *corev1.Secret) (pair *keyPair, why string) {
	if len(secret.Data["tls.crt"]) == 0 || len(secret.Data["tls.key"]) == 0 {
		return nil, "there was none"
	}
	read, err := tls.X509KeyPair(secret.Data["tls.crt"], secret.Data["tls.key"])
	if err != nil {
		return nil, "the old one is of no use: " + err.Error()
	}
	key, ok := read.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, "the key of the old one is not of the kind that setup makes"
	}
	pair = &keyPair{read.Leaf, key}
	now, life := s.bounds.now(), read.Leaf.NotAfter.Sub(read.Leaf.NotBefore)
	switch due := read.Leaf.NotBefore.Add(life * 2 / 3); {
	case now.Before(read.Leaf.NotBefore):
		why = "the old one is valid from " + read.Leaf.NotBefore.Format(time.RFC3339) + " only"
	case !now.Before(read.Leaf.NotAfter):
		why = "the old one expired at " + read.Leaf.NotAfter.Format(time.RFC3339)
	case !now.Before(due):
		why = "two thirds of the old one's life are over; it expires at " + read.Leaf.NotAfter.Format(time.RFC3339)
	}
	return pair, why
}

// readLeaf is readPair for a server with these names, whose certificate the authority must
// have signed.
func (s *setup) readLeaf(secret *corev1.Secret, names []string) (leaf *keyPair, why string) {
	leaf, why = s.readPair(secret)
	if why != "" {
		return leaf, why
	}
	for _, name := range names {
		if err := leaf.cert.VerifyHostname(strings.Replace(name, "*", "any", 1)); err != nil {
			return leaf, "the old one is for other names: " + err.Error()
		}
	}
	if err := s.signed(leaf.cert, s.authority.cert); err != nil {
		return leaf, "another authority has signed the old one"
	}
	return leaf, ""
}

// signed returns why a server's certificate is not of one of the authorities.
func (s *setup) signed(leaf *x509.Certificate, authorities ...*x509.Certificate) error {
	_, err := leaf.Verify(x509.VerifyOptions{Roots: pool(authorities...), CurrentTime: s.bounds.now()})
	return err
}

// writePair makes a pair for a Secret. Without an authority it is an authority itself.
func (s *setup) writePair(secret *corev1.Secret, authority *keyPair, life time.Duration, names ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	now := s.bounds.now()
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: webhookConfigurationName + " authority"},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(life), // the clocks of machines differ
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	signer := &keyPair{template, key}
	if authority != nil {
		signer = authority
		template.Subject.CommonName, template.DNSNames = names[0], names
		template.IsCA, template.KeyUsage = false, x509.KeyUsageDigitalSignature
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		if template.NotAfter.After(authority.cert.NotAfter) {
			template.NotAfter = authority.cert.NotAfter
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, &key.PublicKey, signer.key)
	if err != nil {
		return err
	}
	text, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	secret.Data["tls.crt"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	secret.Data["tls.key"] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text})
	return nil
}

// readBundle returns the certificates of a PEM bundle that still are valid. It leaves out
// all else.
func (s *setup) readBundle(text []byte) (certificates []*x509.Certificate) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err == nil && s.bounds.now().Before(c.NotAfter) && !slices.ContainsFunc(certificates, c.Equal) {
			certificates = append(certificates, c)
		}
	}
	return certificates
}

func writeBundle(certificates []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certificates {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer never fails
	}
	return b.Bytes()
}

// withAuthority puts the authority first, and returns the others, too.
func (s *setup) withAuthority(certificates []*x509.Certificate) (all, others []*x509.Certificate) {
	others = slices.DeleteFunc(slices.Clone(certificates), s.authority.cert.Equal)
	return append([]*x509.Certificate{s.authority.cert}, others...), others
}

// errNoAuthority ends the steps that need the authority.
var errNoAuthority = errors.New("the authority is not known, see that step")

// keepAuthority keeps the certificate authority. All other certificates follow it.
func (s *setup) keepAuthority(ctx context.Context) error {
	secret, err := s.keep(ctx, secretAuthority, corev1.SecretTypeTLS, func(secret *corev1.Secret) (string, error) {
		pair, why := s.readPair(secret)
		if why == "" && !pair.cert.IsCA {
			why = "the old one may sign nothing"
		}
		if why == "" {
			return "", nil
		}
		return "a new authority: " + why, s.writePair(secret, nil, s.bounds.authorityLife)
	})
	if err != nil {
		return err
	}
	pair, why := s.readPair(secret)
	if why != "" {
		return fmt.Errorf("the Secret %s: %s", secretAuthority, why)
	}
	s.authority = pair
	s.expires("authority", pair)
	return nil
}

func (s *setup) expires(name string, pair *keyPair) {
	s.expiry.WithLabelValues(name).Set(float64(pair.cert.NotAfter.Unix()))
}

// trust is what the API server trusts.
type trust struct {
	known        bool
	all          []*x509.Certificate // in the configuration; none if there is no configuration
	authorityFor time.Duration       // since when the authority is in it; negative: it is not, or there is no configuration
}

// configuration reads the webhook's configuration. It returns which of its webhooks are
// ours; without a configuration, none.
func (s *setup) configuration(ctx context.Context) (c *webhookConfiguration, ours []int, err error) {
	c, err = s.kubernetes.getWebhookConfiguration(ctx, webhookConfigurationName)
	if err != nil {
		return nil, nil, fmt.Errorf("read the webhook's configuration: %w", err)
	}
	for i, w := range c.Webhooks {
		if to := w.ClientConfig.Service; to.Name == webhookService && to.Namespace == s.config.namespace {
			ours = append(ours, i)
		}
	}
	if len(ours) == 0 {
		return nil, nil, fmt.Errorf("the configuration %s has no webhook of the Service %s/%s: apply deploy/ again",
			webhookConfigurationName, s.config.namespace, webhookService)
	}
	return c, ours, nil
}

// configure adds a value to each of our webhooks, if the configuration is as it was read.
func (s *setup) configure(ctx context.Context, c *webhookConfiguration, ours []int, value any, path ...string) error {
	var steps patch
	steps.test(c.Metadata.ResourceVersion, "metadata", "resourceVersion")
	for _, i := range ours {
		at := strconv.Itoa(i)
		steps.test(c.Webhooks[i].Name, "webhooks", at, "name")
		steps.add(value, append([]string{"webhooks", at, "clientConfig"}, path...)...)
	}
	if err := s.kubernetes.patchWebhookConfiguration(ctx, webhookConfigurationName, steps.json()); err != nil {
		return fmt.Errorf("patch the webhook's configuration: %w", err)
	}
	return nil
}

// keepTrust keeps the authority in the webhook's configuration. Other certificates stay
// there until every webhook has one of the authority.
func (s *setup) keepTrust(ctx context.Context) (err error) {
	if s.authority == nil {
		return errNoAuthority
	}
	for range writeAttempts {
		if err = s.tryTrust(ctx); !errors.Is(err, errChanged) {
			return err
		}
	}
	return err
}

func (s *setup) tryTrust(ctx context.Context) error {
	c, ours, err := s.configuration(ctx)
	if errors.Is(err, errNotFound) { // nobody calls the webhook yet
		s.trust = trust{known: true, authorityFor: -1}
		return fmt.Errorf("%w: apply deploy/", err)
	}
	if err != nil {
		return err
	}
	var found []*x509.Certificate
	for _, i := range ours {
		found = append(found, s.readBundle(c.Webhooks[i].ClientConfig.CABundle)...)
	}
	all, others := s.withAuthority(s.readBundle(writeBundle(found)))
	var wait error
	if len(others) > 0 {
		if wait = s.haveLeaf(ctx); wait == nil {
			all = all[:1]
		}
	}
	bundle := writeBundle(all)
	if slices.ContainsFunc(ours, func(i int) bool { return !bytes.Equal(c.Webhooks[i].ClientConfig.CABundle, bundle) }) {
		if err := s.configure(ctx, c, ours, bundle, "caBundle"); err != nil {
			return err
		}
		s.log.Info("made", "what", fmt.Sprintf("the API server trusts the authority, and %d others", len(all)-1))
	}
	s.trust = trust{known: true, all: all, authorityFor: s.since.of("trust", s.authority.digest(), s.bounds.now())}
	return wait
}

// haveLeaf returns nil if the webhook's Secret and every running webhook have a
// certificate of the present authority.
func (s *setup) haveLeaf(ctx context.Context) error {
	secret, err := s.kubernetes.getSecret(ctx, s.config.namespace, secretWebhook)
	if err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	if leaf, _ := s.readPair(secret); leaf == nil || s.signed(leaf.cert, s.authority.cert) != nil {
		return waitingFor("the Secret %s to have a certificate of the new authority", secretWebhook)
	}
	return s.askWebhooks(ctx, "certificate", s.authority.digest(), func(ctx context.Context, address string) error {
		leaf, err := presentedLeaf(ctx, address, webhookService)
		if err != nil {
			return err
		}
		if s.signed(leaf, s.authority.cert) != nil {
			return waitingFor("it has a certificate of another authority")
		}
		return nil
	})
}

// presentedLeaf returns the certificate of a TLS server, which it does not verify. Servers
// that ask for a client certificate show theirs, too.
func presentedLeaf(ctx context.Context, address, name string) (leaf *x509.Certificate, err error) {
	dialer := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS12, ServerName: name, InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) (err error) {
			leaf, err = x509.ParseCertificate(raw[0])
			return err
		}}}
	c, err := dialer.DialContext(ctx, "tcp", address)
	if c != nil {
		c.Close()
	}
	if leaf != nil {
		err = nil
	}
	return leaf, err
}

// webhookNames are the DNS names of the webhook's Service.
func (s *setup) webhookNames() []string {
	name := webhookService + "." + s.config.namespace + ".svc"
	return []string{name, name + ".cluster.local"}
}

// keepWebhookCertificate keeps the webhook's certificate. It writes none that the API
// server does not trust yet.
func (s *setup) keepWebhookCertificate(ctx context.Context) error {
	if s.authority == nil {
		return errNoAuthority
	}
	secret, err := s.keep(ctx, secretWebhook, corev1.SecretTypeTLS, func(secret *corev1.Secret) (string, error) {
		_, why := s.readLeaf(secret, s.webhookNames())
		switch {
		case why == "":
			return "", nil
		case !s.trust.known:
			return "", errors.New("what the API server trusts is not known, see the step trust")
		case len(s.trust.all) > 1 && s.trust.authorityFor < s.bounds.settle:
			return "", waitingFor("all API servers to trust the new authority")
		}
		return "a new certificate of the webhook: " + why,
			s.writePair(secret, s.authority, s.bounds.certificateLife, s.webhookNames()...)
	})
	if secret != nil {
		if leaf, _ := s.readPair(secret); leaf != nil {
			s.expires("webhook", leaf)
		}
	}
	return err
}

// redisNames are the DNS names of the servers of Redis.
func (s *setup) redisNames() []string {
	in := "redis." + s.config.namespace
	return []string{"redis", in, in + ".svc", in + ".svc.cluster.local", "*." + in + ".svc", "localhost"}
}

// keepRedisCertificate keeps the certificate of Redis, and beside it the authorities that
// the clients trust. The new authority is among them before a server has a certificate of
// it, and the old one until all servers have.
func (s *setup) keepRedisCertificate(ctx context.Context) error {
	if s.authority == nil {
		return errNoAuthority
	}
	var wait error
	secret, err := s.keep(ctx, secretRedis, corev1.SecretTypeTLS, func(secret *corev1.Secret) (string, error) {
		wait = nil
		before := s.readBundle(secret.Data["ca.crt"])
		all, others := s.withAuthority(before)
		leaf, why := s.readLeaf(secret, s.redisNames())
		known := s.since.of("redis", s.authority.digest(), s.bounds.now()) // all clients may trust it after a while
		var made string
		switch {
		case why == "" && len(others) > 0:
			if wait = s.haveRedisLeaf(ctx, leaf.digest()); wait == nil {
				all, made = all[:1], "the clients of Redis trust the old authority no longer"
			}
		case why == "":
		case len(others) > 0 && len(before) == len(others):
			made = "the clients of Redis trust the new authority, too"
		case len(others) > 0 && known < s.bounds.refresh:
			return "", waitingFor("all clients of Redis to trust the new authority")
		default:
			made = "a new certificate of Redis: " + why
			if err := s.writePair(secret, s.authority, s.bounds.certificateLife, s.redisNames()...); err != nil {
				return "", err
			}
		}
		bundle := writeBundle(all)
		if made == "" && !bytes.Equal(secret.Data["ca.crt"], bundle) {
			made = "the clients of Redis trust the authority"
		}
		secret.Data["ca.crt"] = bundle
		return made, nil
	})
	if secret != nil {
		if leaf, _ := s.readPair(secret); leaf != nil {
			s.expires("redis", leaf)
		}
	}
	if err == nil {
		err = wait
	}
	return err
}

// haveRedisLeaf returns nil if every server of Redis has a certificate of the present
// authority. It cannot ask servers that it does not know: those have some time.
func (s *setup) haveRedisLeaf(ctx context.Context, leaf string) error {
	known := false
	for _, address := range slices.Concat(s.config.redisAddresses, s.config.lockAddresses) {
		hostPort, secure := strings.CutPrefix(address, "rediss://")
		if !secure {
			continue
		}
		known = true
		host, _, _ := net.SplitHostPort(hostPort)
		ctx, cancel := context.WithTimeout(ctx, s.bounds.answer)
		shown, err := presentedLeaf(ctx, hostPort, host)
		cancel()
		if err != nil {
			return waitingFor("an answer of Redis: %v", err)
		}
		if s.signed(shown, s.authority.cert) != nil {
			return waitingFor("%s to load the new certificate", hostPort)
		}
	}
	if !known && s.since.of("redis-leaf", leaf, s.bounds.now()) < s.bounds.refresh {
		return waitingFor("Redis to load the new certificate")
	}
	return nil
}

// webhookPods returns the scheduled pods of the webhook that have not ended.
func (s *setup) webhookPods(ctx context.Context) (pods []*corev1.Pod, err error) {
	err = s.kubernetes.eachPod(ctx, s.config.namespace, webhookSelector, func(p *corev1.Pod) {
		if p.Spec.NodeName != "" && p.Status.Phase != corev1.PodFailed && p.Status.Phase != corev1.PodSucceeded {
			pods = append(pods, p)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list the webhook's pods: %w", err)
	}
	return pods, nil
}

// webhookAddress returns where a pod serves admissions, or an empty text.
func webhookAddress(p *corev1.Pod) string {
	for _, c := range p.Spec.Containers {
		for _, port := range c.Ports {
			if port.Name == webhookService && p.Status.PodIP != "" {
				return net.JoinHostPort(p.Status.PodIP, strconv.Itoa(int(port.ContainerPort)))
			}
		}
	}
	return ""
}

// askWebhooks asks all webhooks at once. It returns a *waiting while one gives such an
// answer. A webhook that does not answer counts as one that has what is new once the
// kubelets have had the time to give it to all pods. subject and what name the question.
func (s *setup) askWebhooks(ctx context.Context, subject, what string, ask func(ctx context.Context, address string) error) error {
	pods, err := s.webhookPods(ctx)
	if err != nil {
		return err
	}
	given := s.since.of(subject, what, s.bounds.now()) >= s.bounds.refresh
	answers := make([]error, len(pods))
	var all sync.WaitGroup
	for i, p := range pods {
		all.Go(func() {
			address := webhookAddress(p)
			if address == "" {
				answers[i] = errors.New("it has no address yet")
				return
			}
			ctx, cancel := context.WithTimeout(ctx, s.bounds.answer)
			defer cancel()
			answers[i] = ask(ctx, address)
		})
	}
	all.Wait()
	for i, err := range answers {
		if err != nil && (!given || errors.As(err, new(*waiting))) {
			return waitingFor("the webhook %s: %v", pods[i].Name, err)
		}
	}
	for i, err := range answers {
		if err != nil {
			s.log.Warn("a webhook did not answer, and counts as up to date after the time that kubelets need", "pod", pods[i].Name,
				"question", subject, "error", err.Error())
		}
	}
	return nil
}

// errPathUnknown is the answer of a webhook that refuses a path.
var errPathUnknown = &waiting{"it does not know the new path yet"}

// askPath asks a webhook whether it serves a path. It returns errPathUnknown if not. It
// trusts the webhooks that the API server trusts: another server must not learn the path.
func (s *setup) askPath(ctx context.Context, address, path string, bundle []byte) error {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: s.webhookNames()[0], Time: s.bounds.now}
	if len(bundle) > 0 {
		c.RootCAs = pool(s.readBundle(bundle)...)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	request, err := http.NewRequestWithContext(ctx, http.MethodOptions, "https://"+address+path, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), path, mutatePath+"/..."))
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusNotFound {
		return errPathUnknown
	}
	return nil
}

// hasPathFlag reports whether a webhook's pod has the flag that makes its path secret.
func hasPathFlag(p *corev1.Pod) bool {
	for _, c := range p.Spec.Containers {
		for i, arg := range c.Args {
			name, value, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			if name == "path-secret-file" && (value != "" || !joined && i+1 < len(c.Args)) {
				return true
			}
		}
	}
	return false
}

// keepPath keeps the secret of the path, by which the webhook knows the API server. A new
// secret comes first in the file. When every webhook accepts it, the API server gets it.
// The old one leaves the file when all API servers have the new one.
func (s *setup) keepPath(ctx context.Context) (err error) {
	for range writeAttempts {
		if err = s.tryPath(ctx); !errors.Is(err, errChanged) {
			return err
		}
	}
	return err
}

// pathFor returns for how long the configuration has had the path of a secret, or another.
func (s *setup) pathFor(used bool, secret string) time.Duration {
	return s.since.of("path", fmt.Sprint(used, secret), s.bounds.now())
}

func (s *setup) tryPath(ctx context.Context) error {
	c, ours, missing := s.configuration(ctx)
	if missing != nil && !errors.Is(missing, errNotFound) {
		return missing
	}
	pods, err := s.webhookPods(ctx)
	if err != nil {
		return err
	}
	var paths []string // that API servers use
	for _, i := range ours {
		paths = append(paths, c.Webhooks[i].ClientConfig.Service.Path)
	}
	var lines []string
	_, err = s.keep(ctx, secretOfPath, corev1.SecretTypeOpaque, func(secret *corev1.Secret) (string, error) {
		var made []string
		lines = nil
		for line := range strings.Lines(string(secret.Data["secret"])) {
			if line = strings.TrimSpace(line); isPathSecret(line) && !slices.Contains(lines, line) {
				lines = append(lines, line)
			}
		}
		if len(lines) == 0 {
			random := make([]byte, 32)
			_, _ = rand.Read(random) // never fails
			lines, made = []string{hex.EncodeToString(random)}, append(made, "a new secret of the path: there was none")
		}
		for _, path := range paths {
			if used, ok := strings.CutPrefix(path, mutatePath+"/"); ok && isPathSecret(used) && !slices.Contains(lines, used) {
				lines, made = append(lines, used), append(made, "the webhook accepts the secret that the API server uses, too")
			}
		}
		used := len(paths) > 0 && !slices.ContainsFunc(paths, func(path string) bool { return path != mutatePath+"/"+lines[0] })
		if s.pathFor(used, lines[0]) >= s.bounds.settle && used && len(lines) > 1 {
			lines, made = lines[:1], append(made, "the webhook accepts the old secret of the path no longer")
		}
		text := strings.Join(lines, "\n") + "\n"
		if len(made) == 0 && text != string(secret.Data["secret"]) {
			made = append(made, "lines that are no secrets are out of the file")
		}
		secret.Data["secret"] = []byte(text)
		return strings.Join(made, "; "), nil
	})
	if err != nil {
		return err
	}
	if missing != nil {
		return fmt.Errorf("%w: apply deploy/", missing)
	}
	want := mutatePath + "/" + lines[0]
	switch flagged := len(slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool { return !hasPathFlag(p) })); {
	case len(pods) > 0 && flagged == 0:
		want = mutatePath
	case flagged < len(pods):
		return waitingFor("all webhooks to have the flag --path-secret-file, or none: %d of %d have it", flagged, len(pods))
	}
	if !slices.ContainsFunc(paths, func(path string) bool { return path != want }) {
		if len(lines) > 1 && want != mutatePath {
			return waitingFor("all API servers to use the new path")
		}
		return nil
	}
	secretInUse := slices.ContainsFunc(paths, func(path string) bool { return strings.HasPrefix(path, mutatePath+"/") })
	if secretInUse && want != mutatePath {
		bundle := c.Webhooks[ours[0]].ClientConfig.CABundle
		ask := func(ctx context.Context, address string) error { return s.askPath(ctx, address, want, bundle) }
		if err := s.askWebhooks(ctx, "new path", want, ask); err != nil {
			return err
		}
	}
	if err := s.configure(ctx, c, ours, want, "service", "path"); err != nil {
		return err
	}
	s.log.Info("made", "what", "the API server uses the present path of the webhook")
	s.pathFor(true, lines[0])
	if len(lines) > 1 {
		return waitingFor("all API servers to use the new path")
	}
	return nil
}
