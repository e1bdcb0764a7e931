package main

import (
	"fmt"
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

// What becomes of a pod for which no token is free.
const (
	whenFullDeny = "deny" // it is refused
	whenFullWait = "wait" // it is admitted, and its sidecar waits for a token before any other container starts
)

// whenFullChoices are what --when-full and the annotation when-full may say.
var whenFullChoices = []string{whenFullDeny, whenFullWait}

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
	whenFull                string
	sidecarRedisSecret      string
	sidecarRedisCA          objectReference
	sidecarEtcdSecret       string
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
	length                 int // zero: the pod runs already, there is nothing to wait for
	expiration             time.Duration
	podUID                 string // empty outside of a pod: there is no startup probe
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

// sidecarLockAddresses are the lock servers of that mode that the sidecars use. Only native ones ever take a lock.
func (c webhookConfig) sidecarLockAddresses(mode string) []string {
	switch {
	case !c.enableSidecarContainers || c.lockMode != mode:
		return nil
	case mode == lockModeEtcd:
		return c.etcdAddresses
	}
	return slices.Clone(c.redisAddresses)
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
	sidecarEtcd := f.String("sidecar-etcd-secret", "", "`NAME` of a Secret in the pod's namespace with what the sidecars need for the etcd lock: username and password, ca.crt, tls.crt and tls.key, each if the webhook has it")
	whenFull := f.String("when-full", whenFullDeny, "what becomes of a pod for which no token is free: `deny|wait`; its annotation when-full wins")
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
		whenFull:           *whenFull,
		sidecarRedisCA:     f.object("sidecar-redis-ca", *sidecarCA),
		sidecarEtcdSecret:  f.objectName("sidecar-etcd-secret", *sidecarEtcd),
		metricsBindAddress: f.oneAddress("metrics-bind-address", *metrics),
	}
	var err error
	if c.enableSidecarContainers, err = strconv.ParseBool(string(native)); err != nil {
		f.problem("enable-sidecar-containers", "%q is not true or false", string(native))
	}
	switch {
	case !slices.Contains(whenFullChoices, c.whenFull):
		f.problem("when-full", "%q is not %s", c.whenFull, strings.Join(whenFullChoices, " or "))
	case c.whenFull == whenFullWait && err == nil && !c.enableSidecarContainers:
		f.problem("when-full", "wait needs native sidecars: with --enable-sidecar-containers=false the containers of a pod start all at once, with or without a token")
	}
	if c.redis.password != "" && c.sidecarRedisSecret == "" {
		f.problem("sidecar-redis-secret", "is needed where REDIS_PASSWORD is set: the sidecars would have no credentials")
	}
	switch sidecarsUseTLS := strings.Contains(strings.Join(append(c.sidecarLockAddresses(lockModeRedlock), c.queueRedisAddress), ","), "rediss://"); {
	case sidecarsUseTLS && c.redis.caFile != "" && c.sidecarRedisCA.name == "":
		f.problem("sidecar-redis-ca", "is needed where --redis-ca-file is set: the sidecars would not trust Redis")
	case !sidecarsUseTLS && c.sidecarRedisCA.name != "":
		f.problem("sidecar-redis-ca", "is not used: no address that the sidecars get begins with rediss://")
	}
	if e := c.etcd; c.lockMode == lockModeEtcd && e.username+e.caFile+e.certFile != "" && c.sidecarEtcdSecret == "" && c.enableSidecarContainers {
		f.problem("sidecar-etcd-secret", "is needed where ETCD_USERNAME, --etcd-ca-file or --etcd-cert-file is set: the sidecars could not take the lock")
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
	length := f.String("length", "", "`NUMBER` of tokens of the semaphore: the sidecar waits until it has one, and the startup probe succeeds then. Without it, the token is already taken")
	expiration := f.String("expiration-seconds", "10", "`SECONDS` that a repair may hold the lock")
	grace := f.String("termination-grace-period-seconds", "10", "`SECONDS` to go on trying to give the token back after SIGTERM")
	if err := f.parse(args); err != nil {
		return sidecarConfig{}, err
	}
	c := sidecarConfig{
		sharedConfig:           shared(),
		terminationGracePeriod: f.seconds("termination-grace-period-seconds", *grace, 1, 3600),
		token:                  f.Arg(1),
		expiration:             f.seconds("expiration-seconds", *expiration, 1, maxExpiration),
		podUID:                 getenv("POD_UID"),
	}
	if *length != "" {
		c.length = f.number("length", *length, 1, maxLength)
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
