package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// The locks to choose from.
const (
	lockModeRedlock = "redlock"
	lockModeEtcd    = "etcd"
)

const imageRepository = "ghcr.io/kaidotio/at-least-semaphore-pod-hook"

// sharedConfig are the settings that both modes have.
type sharedConfig struct {
	lockMode          string
	redisAddresses    []string
	etcdAddresses     []string
	queueRedisAddress string
	heartbeatInterval time.Duration
	staleThreshold    time.Duration
	redis             redisSettings
	etcd              etcdSettings
}

// webhookConfig are the settings of the webhook mode.
type webhookConfig struct {
	sharedConfig
	host                    string
	port                    int
	certDir                 string
	sidecarImage            string
	enableSidecarContainers bool
	sidecarRedisSecret      string
	sidecarRedisCA          objectReference
	metricsBindAddress      string
}

// objectReference names a Secret or a ConfigMap; empty for none.
type objectReference struct{ kind, name string }

// sidecarConfig are the settings of the sidecar mode.
type sidecarConfig struct {
	sharedConfig
	terminationGracePeriod time.Duration
	semaphore              semaphoreID
	token                  string
}

// usageError says what is wrong with the command line, all of it at once.
type usageError struct {
	problems []string
	help     string // printed below the problems, if not empty
}

func (e *usageError) Error() string {
	if len(e.problems) == 1 {
		return e.problems[0]
	}
	return fmt.Sprintf("%d wrong settings:\n  %s", len(e.problems), strings.Join(e.problems, "\n  "))
}

// helpRequest is the error for --help.
type helpRequest struct{ text string }

func (*helpRequest) Error() string { return "help requested" }

// flags is a flag set that collects wrong values instead of stopping at the first: all flags are read as
// text, and the typed readers below note what is wrong.
type flags struct {
	*flag.FlagSet
	synopsis string
	problems []string
}

func newFlags(mode, synopsis string) *flags {
	f := &flags{FlagSet: flag.NewFlagSet(mode, flag.ContinueOnError), synopsis: synopsis}
	f.SetOutput(io.Discard)
	return f
}

func (f *flags) parse(args []string) error {
	err := f.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return &helpRequest{f.help()}
	}
	if err != nil {
		return &usageError{problems: []string{f.Name() + ": " + err.Error()}, help: f.help()}
	}
	return nil
}

func (f *flags) help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: at-least-semaphore-pod-hook %s\n\nFlags:\n", f.synopsis)
	f.VisitAll(func(fl *flag.Flag) {
		name, text := flag.UnquoteUsage(fl)
		fmt.Fprintf(&b, "  --%s %s\n        %s", fl.Name, name, text)
		if fl.DefValue != "" {
			fmt.Fprintf(&b, " (default %s)", fl.DefValue)
		}
		b.WriteByte('\n')
	})
	b.WriteString("\nEnvironment:\n" +
		"  REDIS_USERNAME, REDIS_PASSWORD  credentials of all Redis servers; no user name for the default user\n" +
		"  ETCD_USERNAME, ETCD_PASSWORD    credentials of the etcd servers\n")
	return b.String()
}

// result is nil, or an error that names all problems.
func (f *flags) result() error {
	if len(f.problems) == 0 {
		return nil
	}
	return &usageError{problems: f.problems}
}

func (f *flags) problem(name, format string, args ...any) {
	f.problems = append(f.problems, "--"+name+": "+fmt.Sprintf(format, args...))
}

// boolText is a flag that may stand without a value, and is only judged after parsing.
type boolText string

func (b *boolText) String() string     { return string(*b) }
func (b *boolText) Set(s string) error { *b = boolText(s); return nil }
func (b *boolText) IsBoolFlag() bool   { return true }

func (f *flags) number(name, text string, least, most int) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		f.problem(name, "%q is not a whole number from %d to %d", text, least, most)
	}
	return n
}

func (f *flags) seconds(name, text string, least, most int) time.Duration {
	return time.Duration(f.number(name, text, least, most)) * time.Second
}

// addressPattern is what can be shown of a wrong address: nothing that might hold a password.
var addressPattern = regexp.MustCompile(`^[A-Za-z0-9.-]*(:[0-9]*)?$`)

// address reads HOST:PORT, with or without one of the schemes before it.
func (f *flags) address(name, text string, schemes ...string) string {
	hostPort := text
	for _, s := range schemes {
		hostPort = strings.TrimPrefix(hostPort, s)
	}
	if _, port, err := net.SplitHostPort(hostPort); err == nil && isPort(port) {
		return text
	}
	shown := "an address"
	if addressPattern.MatchString(hostPort) {
		shown = strconv.Quote(text)
	}
	want := "HOST:PORT"
	for _, s := range schemes {
		want += " or " + s + "HOST:PORT"
	}
	f.problem(name, "%s is not %s", shown, want)
	return text
}

// addresses reads a list without repetitions: a server that is named twice would count twice in a quorum.
func (f *flags) addresses(name, text string, schemes ...string) []string {
	if strings.Contains(text, "@") || strings.Contains(text, "%40") {
		f.problem(name, "there are no credentials in an address: they come from the environment, see --help")
		return nil
	}
	var list []string
	for a := range strings.SplitSeq(text, ",") {
		a = f.address(name, strings.TrimSpace(a), schemes...)
		if slices.Contains(list, a) && addressPattern.MatchString(a[strings.LastIndexByte(a, '/')+1:]) {
			f.problem(name, "%q is named twice", a)
		}
		list = append(list, a)
	}
	return list
}

// keyPair reads the names of a PEM certificate and its key; empty for none.
func (f *flags) keyPair(certName, certFile, keyName, keyFile string) (string, string) {
	if certFile == "" && keyFile == "" {
		return "", ""
	}
	if certFile == "" || keyFile == "" {
		f.problems = append(f.problems, fmt.Sprintf("--%s and --%s go together", certName, keyName))
	} else if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		f.problem(certName, "%v", err)
	}
	return certFile, keyFile
}

// certificates reads the name of a file of PEM certificates; empty for none.
func (f *flags) certificates(name, path string) string {
	if _, err := readCA(path); err != nil {
		f.problem(name, "%v", err)
	}
	return path
}

var objectNamePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)

func (f *flags) objectName(name, text string) string {
	if text != "" && (len(text) > 253 || !objectNamePattern.MatchString(text)) {
		f.problem(name, "%q is not the name of an object", text)
	}
	return text
}

func (f *flags) object(name, text string) objectReference {
	if text == "" {
		return objectReference{}
	}
	kind, object, _ := strings.Cut(text, "/")
	if kind != "secret" && kind != "configmap" || object == "" {
		f.problem(name, "%q is not secret/NAME or configmap/NAME", text)
	}
	return objectReference{kind, f.objectName(name, object)}
}

// oneAddress reads a list of one.
func (f *flags) oneAddress(name, text string, schemes ...string) string {
	list := f.addresses(name, text, schemes...)
	if len(list) > 1 {
		f.problem(name, "is one address, not %d", len(list))
	}
	return text
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// sharedFlags defines the flags that both modes have; the function it returns reads them after parsing.
func sharedFlags(f *flags, getenv func(string) string) func() sharedConfig {
	lockMode := f.String("lock-mode", lockModeRedlock, "lock that guards repairs: `redlock|etcd`")
	redisAddresses := f.String("redis-addresses", "127.0.0.1:6379", "Redis servers of the redlock, as `HOST:PORT,...`; rediss://HOST:PORT for TLS")
	etcdAddresses := f.String("etcd-addresses", "127.0.0.1:2379", "etcd servers of the etcd lock, as `HOST:PORT,...`; https://HOST:PORT, or one of the --etcd files, for TLS")
	queueRedis := f.String("queue-redis-address", "127.0.0.1:6379", "Redis server that holds the tokens, as `HOST:PORT`; rediss://HOST:PORT for TLS")
	redisCA := f.String("redis-ca-file", "", "`FILE` of the PEM certificates to trust for rediss://; none for those of the system")
	etcdCA := f.String("etcd-ca-file", "", "`FILE` of the PEM certificates to trust for etcd; none for those of the system")
	etcdCert := f.String("etcd-cert-file", "", "`FILE` of the PEM client certificate for etcd")
	etcdKey := f.String("etcd-key-file", "", "`FILE` of the PEM key of --etcd-cert-file")
	interval := f.String("heartbeat-interval-seconds", "30", "`SECONDS` between two heartbeats of a sidecar")
	stale := f.String("stale-threshold-seconds", "120", "`SECONDS` without a heartbeat after which a token is reclaimed; at least twice the interval")
	return func() sharedConfig {
		c := sharedConfig{
			lockMode:          *lockMode,
			redisAddresses:    f.addresses("redis-addresses", *redisAddresses, "redis://", "rediss://"),
			etcdAddresses:     f.addresses("etcd-addresses", *etcdAddresses, "http://", "https://"),
			queueRedisAddress: f.oneAddress("queue-redis-address", *queueRedis, "redis://", "rediss://"),
			heartbeatInterval: f.seconds("heartbeat-interval-seconds", *interval, 1, 3600),
			staleThreshold:    f.seconds("stale-threshold-seconds", *stale, 2, 86400),
			redis: redisSettings{
				username: getenv("REDIS_USERNAME"), password: getenv("REDIS_PASSWORD"),
				caFile: f.certificates("redis-ca-file", *redisCA),
			},
			etcd: etcdSettings{
				username: getenv("ETCD_USERNAME"), password: getenv("ETCD_PASSWORD"),
				caFile: f.certificates("etcd-ca-file", *etcdCA),
			},
		}
		c.etcd.certFile, c.etcd.keyFile = f.keyPair("etcd-cert-file", *etcdCert, "etcd-key-file", *etcdKey)
		if (*etcdCA != "" || *etcdCert != "") && strings.Contains(*etcdAddresses, "http://") {
			f.problem("etcd-addresses", "http:// is not encrypted: --etcd-ca-file and --etcd-cert-file would not be used")
		}
		if *redisCA != "" && !strings.Contains(*redisAddresses+*queueRedis, "rediss://") {
			f.problem("redis-ca-file", "is not used: no address of Redis begins with rediss://")
		}
		if c.lockMode != lockModeRedlock && c.lockMode != lockModeEtcd {
			f.problem("lock-mode", "%q is not redlock or etcd", c.lockMode)
		}
		if len(f.problems) == 0 && c.staleThreshold < 2*c.heartbeatInterval {
			f.problem("stale-threshold-seconds", "%s is less than twice --heartbeat-interval-seconds %s: one late heartbeat would cost a running pod its token", *stale, *interval)
		}
		if c.redis.username != "" && c.redis.password == "" {
			f.problems = append(f.problems, "REDIS_USERNAME is set and REDIS_PASSWORD is not")
		}
		if (c.etcd.username == "") != (c.etcd.password == "") {
			f.problems = append(f.problems, "ETCD_USERNAME and ETCD_PASSWORD go together")
		}
		return c
	}
}

// parseWebhookConfig reads the webhook's command line. Its errors are *usageError and *helpRequest.
func parseWebhookConfig(args []string, getenv func(string) string) (webhookConfig, error) {
	f := newFlags("webhook", "webhook [flags]")
	shared := sharedFlags(f, getenv)
	host := f.String("host", "0.0.0.0", "`ADDRESS` to serve /mutate on, over TLS")
	port := f.String("port", "9443", "TCP `PORT` to serve /mutate on")
	certDir := f.String("certDir", "/var/k8s-webhook-server/serving-certs", "`DIRECTORY` of tls.crt and tls.key; reread when they change")
	sidecarImage := f.String("sidecar-image", imageRepository+":"+version, "`IMAGE` of the injected sidecar")
	sidecarSecret := f.String("sidecar-redis-secret", "", "`NAME` of a Secret in the pod's namespace whose keys username (optional) and password are the sidecar's credentials for Redis")
	sidecarCA := f.String("sidecar-redis-ca", "", "`secret/NAME|configmap/NAME` in the pod's namespace whose key ca.crt holds the certificates that the sidecar trusts for rediss://")
	metrics := f.String("metrics-bind-address", "0.0.0.0:8080", "`HOST:PORT` to serve /healthz and /readyz on, over plain HTTP")
	native := boolText("true")
	f.Var(&native, "enable-sidecar-containers", "`true|false`: inject a native sidecar (Kubernetes 1.29 or later), or a classic container")
	if err := f.parse(args); err != nil {
		return webhookConfig{}, err
	}
	c := webhookConfig{
		sharedConfig:       shared(),
		host:               *host,
		port:               f.number("port", *port, 1, 65535),
		certDir:            *certDir,
		sidecarImage:       *sidecarImage,
		sidecarRedisSecret: f.objectName("sidecar-redis-secret", *sidecarSecret),
		sidecarRedisCA:     f.object("sidecar-redis-ca", *sidecarCA),
		metricsBindAddress: f.oneAddress("metrics-bind-address", *metrics),
	}
	var err error
	if c.enableSidecarContainers, err = strconv.ParseBool(string(native)); err != nil {
		f.problem("enable-sidecar-containers", "%q is not true or false", string(native))
	}
	if c.redis.password != "" && c.sidecarRedisSecret == "" {
		f.problem("sidecar-redis-secret", "is needed where REDIS_PASSWORD is set: the sidecars would have no credentials")
	}
	if c.redis.caFile != "" && strings.HasPrefix(c.queueRedisAddress, "rediss://") && c.sidecarRedisCA.name == "" {
		f.problem("sidecar-redis-ca", "is needed where --redis-ca-file is set: the sidecars would not trust the queue Redis")
	}
	if c.certDir == "" {
		f.problem("certDir", "is empty")
	}
	if c.sidecarImage == "" || strings.ContainsAny(c.sidecarImage, " \t\n") {
		f.problem("sidecar-image", "%q is not an image", c.sidecarImage)
	}
	if f.NArg() > 0 {
		f.problems = append(f.problems, fmt.Sprintf("unexpected argument %q: the webhook takes flags only", f.Arg(0)))
	}
	return c, f.result()
}

// parseSidecarConfig reads the sidecar's command line. Its errors are *usageError and *helpRequest.
func parseSidecarConfig(args []string, getenv func(string) string) (sidecarConfig, error) {
	f := newFlags("sidecar", "sidecar [flags] NAMESPACE/KEY TOKEN")
	shared := sharedFlags(f, getenv)
	grace := f.String("termination-grace-period-seconds", "10", "`SECONDS` to go on trying to give the token back after SIGTERM")
	if err := f.parse(args); err != nil {
		return sidecarConfig{}, err
	}
	c := sidecarConfig{
		sharedConfig:           shared(),
		terminationGracePeriod: f.seconds("termination-grace-period-seconds", *grace, 1, 3600),
		token:                  f.Arg(1),
	}
	if f.NArg() != 2 {
		f.problems = append(f.problems, fmt.Sprintf("%d arguments after the flags; they are NAMESPACE/KEY TOKEN", f.NArg()))
		return c, f.result()
	}
	namespace, key, _ := strings.Cut(f.Arg(0), "/")
	c.semaphore = semaphoreID{namespace, key}
	if problem := checkKey(key); namespace == "" || problem != "" {
		f.problems = append(f.problems, fmt.Sprintf("NAMESPACE/KEY: %q is not a namespace, a slash and a key", f.Arg(0)))
	}
	if uuid.Validate(c.token) != nil {
		f.problems = append(f.problems, fmt.Sprintf("TOKEN: %q is not a UUID", c.token))
	}
	return c, f.result()
}
