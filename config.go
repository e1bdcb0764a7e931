package main

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	corev1 "k8s.io/api/core/v1"
)

// The user and group of the injected containers: nonroot of the distroless image. With
// sidecarUserNone, the containers name no user.
const (
	nonroot         int64 = 65532
	sidecarUserNone       = "none"
)

const imageRepository = "ghcr.io/kaidotio/at-least-semaphore-pod-hook"

// webhookConfig is the settings of the mode webhook.
type webhookConfig struct {
	settings
	host                    string
	port                    int
	certDir                 string
	pathSecretFile          string
	clientCAFile            string
	clientNames             []string
	sidecarImage            string
	sidecarImagePullSecret  string
	sidecarUser             string // sidecarUserNone for none
	sidecarLimits           corev1.ResourceList
	sidecarRequests         corev1.ResourceList
	podAnnotations          map[string]string
	restartAwait            bool
	enableSidecarContainers bool
	whenFull                string
	maxHeadStart            time.Duration
	sidecarRedisSecret      string
	sidecarRedisCA          objectReference
	sidecarEtcdSecret       string
	metricsBindAddress      string
	semaphoresFile          string
}

// sidecarConfig is the settings of the mode sidecar.
type sidecarConfig struct {
	settings
	tokenConfig
	terminationGracePeriod time.Duration // see giveBackSeconds
	podUID                 string        // empty outside of a pod: there is no await to answer
	takenAs                string        // the name under which the webhook took the token; empty if it took none
	pod                    podName

	podNamespace, podNameAlone, node string // of the pod, as its environment says
}

// tokenConfig is the token that a sidecar keeps, as its arguments name it.
type tokenConfig struct {
	semaphore  semaphoreID
	token      string
	length     int // zero: the webhook has already taken the token, so the sidecar waits for nothing
	tokens     int // that the pod needs
	headStart  time.Duration
	expiration time.Duration
	wait       waitEnd
}

// gateConfig is the settings of the mode gate.
type gateConfig struct {
	settings
	kubernetes         kubernetesSettings
	semaphoresFile     string
	unschedulable      time.Duration // for this long, a pod keeps its token without the lift, and then without starting
	metricsBindAddress string
}

// The values of -o of the mode status.
const (
	outputTable = "table"
	outputJSON  = "json"
)

// The operands by which the mode status changes a semaphore.
const (
	statusRelease = "release"
	statusSet     = "set"
	statusPause   = "pause"
	statusFirst   = "first"

	// These change nothing.
	statusServe   = "serve"
	statusHistory = "history"
)

// statusOperands are what follows the operand that names the change.
var statusOperands = map[string]string{
	statusRelease: "NAMESPACE/KEY TOKEN|POD",
	statusSet:     "NAMESPACE/KEY length=NUMBER",
	statusPause:   "NAMESPACE/KEY",
	statusFirst:   "NAMESPACE/KEY TOKEN|POD",
}

// statusConfig is the settings of the mode status.
type statusConfig struct {
	settings
	output    string
	watch     bool
	serve     bool // a page
	history   bool // show how the time of the last pods ended
	port      int  // of the page
	yes       bool
	own       semaphoreID   // of the container; zero: of none
	namespace string        // empty for all
	semaphore semaphoreID   // zero for all of the namespace
	change    string        // one of statusOperands; empty: only show
	pod       string        // that is to be released or moved, or its token
	clear     bool          // set: end the override
	override  override      // set and pause: the new one, without its end
	lasts     time.Duration // set and pause: how long the override lasts
}

// The values of --webhook-certificate.
const (
	certificateOwn   = "own"
	certificateGiven = "given"
)

// setupConfig is the settings of the mode setup.
type setupConfig struct {
	kubernetes         kubernetesSettings
	namespace          string   // of the installation
	webhookCertificate string   // certificateOwn or certificateGiven
	queue              settings // of the queue, where setup keeps the limits: its address, which may be empty, and times
	redisAddresses     []string // servers that get the users of tokens; empty for none
	lockAddresses      []string // servers of locks only, which get others; empty for none
	redisCAFile        string   // empty for the authority of setup
	replicationUser    bool
	sidecarRedisSecret string // name of the Secret in each namespace with sidecars
	metricsBindAddress string
}

// parseWebhookConfig reads the command line of the mode webhook. Its error is a
// *usageError or a *helpRequest.
func parseWebhookConfig(args []string, getenv func(string) string) (c webhookConfig, err error) {
	err = parseFlags(&c, "webhook", "[flags]", args, getenv)
	return c, err
}

// parseSidecarConfig reads the command line of the mode sidecar. Its error is a
// *usageError or a *helpRequest.
func parseSidecarConfig(args []string, getenv func(string) string) (c sidecarConfig, err error) {
	err = parseFlags(&c, "sidecar", "[flags] NAMESPACE/KEY TOKEN", args, getenv)
	return c, err
}

// parseGateConfig reads the command line of the mode gate. Its error is a *usageError or
// a *helpRequest.
func parseGateConfig(args []string, getenv func(string) string) (c gateConfig, err error) {
	err = parseFlags(&c, "gate", "[flags]", args, getenv)
	return c, err
}

// parseSetupConfig reads the command line of the mode setup. Its error is a *usageError or
// a *helpRequest.
func parseSetupConfig(args []string, getenv func(string) string) (c setupConfig, err error) {
	err = parseFlags(&c, "setup", "[flags]", args, getenv)
	return c, err
}

// parseStatusConfig reads the command line of the mode status. Its error is a *usageError
// or a *helpRequest.
func parseStatusConfig(args []string, getenv func(string) string) (c statusConfig, err error) {
	const arguments = "[flags] [NAMESPACE | NAMESPACE/KEY | @KEY]\n" +
		"       at-least-semaphore-pod-hook status [flags] history NAMESPACE/KEY\n" +
		"       at-least-semaphore-pod-hook status [flags] release NAMESPACE/KEY TOKEN|POD\n" +
		"       at-least-semaphore-pod-hook status [flags] set NAMESPACE/KEY length=NUMBER --for DURATION\n" +
		"       at-least-semaphore-pod-hook status [flags] set NAMESPACE/KEY --clear\n" +
		"       at-least-semaphore-pod-hook status [flags] pause NAMESPACE/KEY --for DURATION\n" +
		"       at-least-semaphore-pod-hook status [flags] first NAMESPACE/KEY TOKEN|POD\n" +
		"       at-least-semaphore-pod-hook status [flags] serve"
	err = parseFlags(&c, "status", arguments, args, getenv)
	return c, err
}

// declareFlags declares the flags of the queue and of the lock, for the modes webhook,
// sidecar and gate.
func (c *settings) declareFlags(f *flags, getenv func(string) string) {
	c.declareQueueFlags(f, getenv)
	c.declareLockFlags(f, getenv)
}

// declareQueueFlags declares the flags of the queue. The mode status needs no lock, and
// has only these.
func (c *settings) declareQueueFlags(f *flags, getenv func(string) string) {
	c.redis.username, c.redis.password = getenv("REDIS_USERNAME"), getenv("REDIS_PASSWORD")
	c.readSentinelLogin(getenv)
	declare(f, &c.queueRedisAddress, readQueueAddress, "queue-redis-address", "127.0.0.1:6379",
		"Redis that holds the tokens: `HOST:PORT`, or "+sentinelExample+", or "+clusterExample+
			"; for TLS, rediss instead of redis")
	c.declareTimeFlags(f)
	declare(f, &c.redis.caFile, readCAFile, "redis-ca-file", "",
		"`FILE` of the PEM CA certificates for rediss://; without it, the system's")
}

// readSentinelLogin reads the credentials for the Sentinels.
func (c *settings) readSentinelLogin(getenv func(string) string) {
	c.redis.sentinelUsername = getenv("REDIS_SENTINEL_USERNAME")
	c.redis.sentinelPassword = getenv("REDIS_SENTINEL_PASSWORD")
}

// declareTimeFlags declares the times by which holders are judged.
func (c *settings) declareTimeFlags(f *flags) {
	declare(f, &c.heartbeatInterval, readSeconds(1, 3600), "heartbeat-interval-seconds", "30",
		"`SECONDS` between two heartbeats of a sidecar")
	declare(f, &c.staleThreshold, readSeconds(2, 86400), "stale-threshold-seconds", "120",
		"`SECONDS` without a heartbeat after which a token is reclaimed; at least twice the heartbeat interval")
}

// declarePasswordFile declares the file of the password for Redis, for the modes whose
// containers mount it. A sidecar does not: its Secret stays as long as its pod.
func (c *settings) declarePasswordFile(f *flags, file string) {
	declare(f, &c.redis.passwordFile, readPasswordFile, "redis-password-file", file,
		"`FILE` of the password for all Redis servers, reread at each connection; without it, REDIS_PASSWORD")
}

// declareLockFlags declares the flags of the lock.
func (c *settings) declareLockFlags(f *flags, getenv func(string) string) {
	c.etcd.username, c.etcd.password = getenv("ETCD_USERNAME"), getenv("ETCD_PASSWORD")
	declare(f, &c.lockMode, readChoice(lockModeRedlock, lockModeEtcd), "lock-mode", lockModeRedlock,
		"lock for repairs: `redlock|etcd`")
	declare(f, &c.redisAddresses, readAddresses("redis://", "rediss://"), "redis-addresses", "127.0.0.1:6379",
		"Redis servers of the lock mode redlock, as `HOST:PORT,...`; for TLS, rediss://HOST:PORT")
	declare(f, &c.etcdAddresses, readAddresses("http://", "https://"), "etcd-addresses", "127.0.0.1:2379",
		"etcd servers of the lock mode etcd, as `HOST:PORT,...`; for TLS, https://HOST:PORT or one of the --etcd files")
	declare(f, &c.etcd.caFile, readCAFile, "etcd-ca-file", "",
		"`FILE` of the PEM CA certificates for etcd; without it, the system's")
	declare(f, &c.etcd.certFile, readText, "etcd-cert-file", "", "`FILE` of the PEM client certificate for etcd")
	declare(f, &c.etcd.keyFile, readText, "etcd-key-file", "", "`FILE` of the PEM key of --etcd-cert-file")
}

func (c *settings) validate(f *flags) {
	if (c.etcd.certFile == "") != (c.etcd.keyFile == "") {
		f.problem("--etcd-cert-file and --etcd-key-file go together")
	} else if c.etcd.certFile != "" {
		if _, err := tls.LoadX509KeyPair(c.etcd.certFile, c.etcd.keyFile); err != nil {
			f.problem("--etcd-cert-file: %v", err)
		}
	}
	if (c.etcd.caFile != "" || c.etcd.certFile != "") && anyHas("http://", c.etcdAddresses...) {
		f.problem("--etcd-addresses: http:// is not encrypted: --etcd-ca-file and --etcd-cert-file would not be used")
	}
	if c.redis.caFile != "" && !anyHas("rediss://", slices.Concat(c.queueRedisAddress.servers, c.redisAddresses)...) {
		f.problem("--redis-ca-file: is not used: no address of Redis begins with rediss://")
	}
	c.validateTimes(f)
	if c.redis.username != "" && !c.redis.hasPassword() && !f.wrong["redis-password-file"] {
		f.problem("REDIS_USERNAME is set and REDIS_PASSWORD is not")
	}
	if c.redis.password != "" && c.redis.passwordFile != "" && !f.wrong["redis-password-file"] {
		f.problem("--redis-password-file: a password is in the environment, too: set one of them")
	}
	c.validateSentinels(f)
	if (c.etcd.username == "") != (c.etcd.password == "") {
		f.problem("ETCD_USERNAME and ETCD_PASSWORD go together")
	}
}

func (c *settings) validateTimes(f *flags) {
	bothRead := !f.wrong["stale-threshold-seconds"] && !f.wrong["heartbeat-interval-seconds"]
	if bothRead && c.staleThreshold < 2*c.heartbeatInterval {
		f.problem("--stale-threshold-seconds: %d is less than twice --heartbeat-interval-seconds %d: "+
			"one late heartbeat would cost a running pod its token",
			seconds(c.staleThreshold), seconds(c.heartbeatInterval))
	}
}

func (c *settings) validateSentinels(f *flags) {
	if c.redis.sentinelUsername != "" && c.redis.sentinelPassword == "" {
		f.problem("REDIS_SENTINEL_USERNAME is set and REDIS_SENTINEL_PASSWORD is not")
	}
	if c.redis.sentinelPassword != "" && c.queueRedisAddress.kind != queueSentinel && !f.wrong["queue-redis-address"] {
		f.problem("REDIS_SENTINEL_PASSWORD is not used: --queue-redis-address names no Sentinels, as %s does",
			sentinelExample)
	}
}

// anyHas reports whether one of the addresses has the scheme.
func anyHas(scheme string, addresses ...string) bool {
	return strings.Contains(strings.Join(addresses, ","), scheme)
}

func (c *webhookConfig) declareFlags(f *flags, getenv func(string) string) {
	c.settings.declareFlags(f, getenv)
	c.declarePasswordFile(f, "")
	declare(f, &c.host, readText, "host", "0.0.0.0", "`ADDRESS` to serve /mutate on, over TLS")
	declare(f, &c.port, readNumber(1, 65535), "port", "9443", "TCP `PORT` to serve /mutate on")
	declare(f, &c.certDir, readNonEmpty, "certDir", "/var/k8s-webhook-server/serving-certs",
		"`DIRECTORY` of tls.crt and tls.key, which are reread when they change")
	declare(f, &c.pathSecretFile, readText, "path-secret-file", "",
		"`FILE` of the secrets of the path /mutate/SECRET, one a line, reread when it changes; "+
			"without it, the path is /mutate")
	declare(f, &c.clientCAFile, readCAFile, "client-ca-file", "",
		"`FILE` of the PEM CA certificates that clients' certificates must be signed by; "+
			"without it, clients need no certificate")
	declare(f, &c.clientNames, readNameList, "client-name", "",
		"`NAME,...` of the accepted clients: common name or DNS name of their certificates; "+
			"without it, any signed certificate")
	declare(f, &c.metricsBindAddress, readAddress(), "metrics-bind-address", "0.0.0.0:8080",
		"`HOST:PORT` to serve /metrics, /healthz and /readyz on, over plain HTTP")
	declare(f, &c.whenFull, readChoice(whenFullChoices...), "when-full", whenFullDeny,
		"for a pod that finds no free token: `deny|wait|gate`; its annotation when-full takes precedence")
	declareSemaphoresFile(f, &c.semaphoresFile)
	declare(f, &c.maxHeadStart, readSeconds(0, mostHeadStart), "max-head-start", "3600",
		"`SECONDS`: the greatest head start in line that a pod may ask for")
	declare(f, &c.unstarted, readSeconds(1, 86400), "unstarted-seconds", "",
		"`SECONDS` after which the token of an admitted pod is reclaimed if its sidecar has not started, "+
			"with when-full deny; without it, the stale threshold")
	declare(f, &c.enableSidecarContainers, readBool, "enable-sidecar-containers", "true",
		"`true|false`: inject a native sidecar (Kubernetes 1.30 or later), or a classic container")
	declare(f, &c.sidecarImage, readImage, "sidecar-image", imageRepository+":"+version,
		"`IMAGE` of the injected containers")
	declare(f, &c.sidecarImagePullSecret, readObjectName, "sidecar-image-pull-secret", "",
		"`NAME` of a Secret in the pod's namespace, which the webhook adds to the pod's imagePullSecrets")
	declare(f, &c.sidecarUser, readChoice(strconv.FormatInt(nonroot, 10), sidecarUserNone), "sidecar-run-as-user",
		strconv.FormatInt(nonroot, 10),
		"`65532|none`: user and group of the injected containers, for their securityContext; "+
			"none leaves the choice to the cluster, the pod and the image, for OpenShift")
	declare(f, &c.sidecarLimits, readResources, "sidecar-resources", "cpu=100m,memory=64Mi",
		"limits, as `RESOURCE=QUANTITY,...`, of each injected container; "+
			"in a pod of the QoS class Guaranteed, also its requests")
	declare(f, &c.sidecarRequests, readResources, "sidecar-requests", "cpu=5m,memory=32Mi",
		"requests, as `RESOURCE=QUANTITY,...`, of each injected container in all other pods")
	declare(f, &c.restartAwait, readBool, "await-restart", "false",
		"`true|false`: give the init container await the restartPolicy OnFailure (Kubernetes 1.35 or later); "+
			"without it, a pod with restartPolicy Never fails if await is killed")
	declare(f, &c.podAnnotations, readAnnotations, "pod-annotations", "",
		"`NAME=VALUE,...` to add to the pods that get a sidecar, unless they have them, for service meshes; "+
			"a part without = belongs to the value before it")
	declare(f, &c.sidecarRedisSecret, readObjectName, "sidecar-redis-secret", "",
		"`NAME` of a Secret in the pod's namespace: "+
			"its keys username (optional) and password are the sidecar's credentials for Redis")
	declare(f, &c.sidecarRedisCA, readObject, "sidecar-redis-ca", "",
		"`secret/NAME|configmap/NAME` in the pod's namespace: "+
			"its key ca.crt has the sidecar's CA certificates for rediss://")
	declare(f, &c.sidecarEtcdSecret, readObjectName, "sidecar-etcd-secret", "",
		"`NAME` of a Secret in the pod's namespace: "+
			"its keys username and password, ca.crt, tls.crt and tls.key are the sidecar's access to etcd, "+
			"each if the webhook has it")
}

func (c *webhookConfig) validate(f *flags) {
	c.settings.validate(f)
	if c.unstarted > c.staleThreshold && !f.wrong["unstarted-seconds"] && !f.wrong["stale-threshold-seconds"] {
		f.problem("--unstarted-seconds: %d is more than --stale-threshold-seconds %d: "+
			"every token without a heartbeat is reclaimed after that", seconds(c.unstarted), seconds(c.staleThreshold))
	}
	bothRead := !f.wrong["enable-sidecar-containers"] && !f.wrong["when-full"]
	if bothRead && c.whenFull != whenFullDeny && !c.enableSidecarContainers {
		f.problem("--when-full: %s needs native sidecars: "+
			"with --enable-sidecar-containers=false the containers of a pod "+
			"start all at once, with or without a token", c.whenFull)
	}
	if (c.redis.hasPassword() || c.redis.sentinelPassword != "") && c.sidecarRedisSecret == "" {
		f.problem("--sidecar-redis-secret: is needed where " +
			"REDIS_PASSWORD, --redis-password-file or REDIS_SENTINEL_PASSWORD is set: " +
			"the sidecars would have no credentials")
	}
	switch sidecarsUseTLS := anyHas("rediss://", c.sidecarRedisAddresses()...); {
	case sidecarsUseTLS && c.redis.caFile != "" && c.sidecarRedisCA.name == "":
		f.problem("--sidecar-redis-ca: is needed where --redis-ca-file is set: the sidecars would not trust Redis")
	case !sidecarsUseTLS && c.sidecarRedisCA.name != "":
		f.problem("--sidecar-redis-ca: is not used: no address that the sidecars get begins with rediss://")
	}
	sidecarsUseEtcd := c.lockMode == lockModeEtcd && c.enableSidecarContainers
	if sidecarsUseEtcd && c.etcd.username+c.etcd.caFile+c.etcd.certFile != "" && c.sidecarEtcdSecret == "" {
		f.problem("--sidecar-etcd-secret: is needed where ETCD_USERNAME, --etcd-ca-file or --etcd-cert-file is set: " +
			"the sidecars could not take the lock")
	}
	for name, request := range c.sidecarRequests {
		if limit, ok := c.sidecarLimits[name]; ok && request.Cmp(limit) > 0 {
			f.problem("--sidecar-requests: %s=%s is more than the limit in --sidecar-resources, %s",
				name, &request, &limit)
		}
	}
	if c.restartAwait && !c.enableSidecarContainers && !f.wrong["enable-sidecar-containers"] {
		f.problem("--await-restart: is not used with --enable-sidecar-containers=false: " +
			"nothing holds back the app of a pod with a classic sidecar")
	}
	if len(c.clientNames) > 0 && c.clientCAFile == "" {
		f.problem("--client-name: is not used: there is no --client-ca-file to check certificates by")
	}
	if f.NArg() > 0 {
		f.problem("unexpected argument %q: the webhook takes flags only", f.Arg(0))
	}
}

// sidecarRedisAddresses returns the Redis servers that the sidecars use. Only native
// sidecars ever take a lock.
func (c *webhookConfig) sidecarRedisAddresses() []string {
	addresses := slices.Clone(c.queueRedisAddress.servers)
	if c.enableSidecarContainers && c.lockMode == lockModeRedlock {
		addresses = append(addresses, c.redisAddresses...)
	}
	return addresses
}

func (c *sidecarConfig) declareFlags(f *flags, getenv func(string) string) {
	c.settings.declareFlags(f, getenv)
	c.podUID = getenv("POD_UID")
	c.podNamespace, c.podNameAlone, c.node = getenv("POD_NAMESPACE"), getenv("POD_NAME"), getenv("NODE_NAME")
	c.tokenConfig.declareFlags(f, getenv)
	declare(f, &c.terminationGracePeriod, readSeconds(1, 3600),
		"termination-grace-period-seconds", strconv.Itoa(giveBackSeconds),
		"`SECONDS` to keep trying to give the token back after SIGTERM")
}

func (c *sidecarConfig) validate(f *flags) {
	c.settings.validate(f)
	c.tokenConfig.validate(f)
	c.pod = newPodName(c.semaphore.podName(c.podNamespace, c.podNameAlone), c.node)
	// A copy of the pod has the same arguments. So a pod's own name of its token is its UID.
	if c.podUID != "" && c.podUID != c.token {
		c.token, c.takenAs = c.podUID, c.token
	}
}

func (c *tokenConfig) declareFlags(f *flags, _ func(string) string) {
	declare(f, &c.length, readNumber(1, maxLength), "length", "",
		"`NUMBER` of tokens of the semaphore: the sidecar waits in line, and await ends when it has what the pod needs; "+
			"without it, the webhook has already taken the token")
	declare(f, &c.tokens, readNumber(1, maxTokens), "tokens", "1",
		"`NUMBER` of tokens that the pod needs, all or none")
	declare(f, &c.headStart, readSeconds(0, mostHeadStart), "head-start-seconds", "0",
		"`SECONDS` that its place in line is before its arrival")
	declare(f, &c.expiration, readSeconds(1, maxExpiration), "expiration-seconds", "10",
		"`SECONDS` after which the lock of a repair expires")
	declare(f, &c.wait.after, readSeconds(1, maxWait), "wait-seconds", "",
		"`SECONDS` in line after which the pod stops waiting; without it, it waits until it has a token")
	declare(f, &c.wait.then, readChoice(whenWaitedChoices...), "when-waited", "",
		"`fail|run`: what the pod does then, give up or take a token beyond the length; without it, fail")
}

// validate also reads the arguments after the flags.
func (c *tokenConfig) validate(f *flags) {
	if c.wait.after > 0 && c.length == 0 && !f.wrong["length"] {
		f.problem("--wait-seconds: is not used without --length: the sidecar waits for no token")
	}
	if c.tokens > 1 && c.length == 0 && !f.wrong["length"] {
		f.problem("--tokens: is not used without --length: the webhook has taken one token")
	}
	if c.wait.then != "" && c.wait.after == 0 && !f.wrong["wait-seconds"] {
		f.problem("--when-waited: is not used without --wait-seconds")
	}
	if f.NArg() != 2 {
		f.problem("%d arguments after the flags; they are NAMESPACE/KEY TOKEN", f.NArg())
		return
	}
	var ok bool
	c.semaphore, ok = parseSemaphoreID(f.Arg(0))
	c.token = f.Arg(1)
	if !ok {
		f.problem("NAMESPACE/KEY: %q is not a namespace, a slash and a key, nor @ and a key", f.Arg(0))
	}
	if uuid.Validate(c.token) != nil {
		f.problem("TOKEN: %q is not a UUID", c.token)
	}
}

// declareFlags declares the flags of the API server. In a pod, their defaults are right.
func (c *kubernetesSettings) declareFlags(f *flags, getenv func(string) string) {
	var address, caFile, tokenFile string
	if host := getenv("KUBERNETES_SERVICE_HOST"); host != "" {
		address = net.JoinHostPort(host, cmp.Or(getenv("KUBERNETES_SERVICE_PORT"), "443"))
		caFile, tokenFile = path.Join(serviceAccount, "ca.crt"), path.Join(serviceAccount, "token")
	}
	declare(f, &c.address, readAddress("https://"), "kubernetes-address", address,
		"`HOST:PORT` of the API server; in a pod, by default, that of its cluster")
	declare(f, &c.caFile, readCAFile, "kubernetes-ca-file", caFile,
		"`FILE` of the PEM CA certificates for the API server, reread when it changes; without it, the system's")
	declare(f, &c.tokenFile, readText, "kubernetes-token-file", tokenFile,
		"`FILE` of the ServiceAccount's token, reread when it changes")
}

func (c *kubernetesSettings) validate(f *flags) {
	if c.address == "" && !f.wrong["kubernetes-address"] {
		f.problem("--kubernetes-address: is needed outside of a pod")
	}
	if c.tokenFile == "" {
		f.problem("--kubernetes-token-file: is needed outside of a pod")
	}
}

func (c *gateConfig) declareFlags(f *flags, getenv func(string) string) {
	c.settings.declareFlags(f, getenv)
	c.declarePasswordFile(f, "")
	c.kubernetes.declareFlags(f, getenv)
	declare(f, &c.kubernetes.namespaces, readNamespaces, "namespaces", "",
		"`NAMESPACE,...` to watch for gated pods; without it, all")
	declareSemaphoresFile(f, &c.semaphoresFile)
	declare(f, &c.unschedulable, readSeconds(1, 86400), "unschedulable-seconds", "300",
		"`SECONDS` until a pod loses its token if its gate cannot be lifted, or if it has not started since the lift")
	declare(f, &c.metricsBindAddress, readAddress(), "metrics-bind-address", "0.0.0.0:8080",
		"`HOST:PORT` to serve /metrics, /healthz and /readyz on, over plain HTTP")
}

// declareSemaphoresFile declares the file of the ConfigMap semaphores.
func declareSemaphoresFile(f *flags, field *string) {
	declare(f, field, readText, "semaphores-file", "",
		"`FILE` of the lengths that owners set, reread when it changes; it may be missing")
}

func (c *gateConfig) validate(f *flags) {
	c.settings.validate(f)
	c.kubernetes.validate(f)
	if f.NArg() > 0 {
		f.problem("unexpected argument %q: gate takes flags only", f.Arg(0))
	}
}

func (c *setupConfig) declareFlags(f *flags, getenv func(string) string) {
	c.kubernetes.declareFlags(f, getenv)
	declare(f, &c.namespace, readNamespace, "namespace", "at-least-semaphore-pod-hook",
		"`NAMESPACE` of the installation")
	declare(f, &c.webhookCertificate, readChoice(certificateOwn, certificateGiven), "webhook-certificate", certificateOwn,
		"`own|given`: setup keeps the webhook's certificate and the caBundle of its configuration, "+
			"or leaves both to cert-manager or to you")
	declare(f, &c.redisAddresses, readAddresses("redis://", "rediss://"), "user-redis-addresses", "",
		"Redis servers that setup makes the users on, as `HOST:PORT,...`; for TLS, rediss://HOST:PORT; "+
			"without it, setup only keeps the Secrets")
	declare(f, &c.queue.queueRedisAddress, readQueueAddress, "queue-redis-address", "",
		"`HOST:PORT` of the Redis that holds the tokens, where setup keeps the lengths of the ConfigMap semaphores, "+
			"as the webhook has it; without it, setup keeps none")
	c.queue.readSentinelLogin(getenv)
	c.queue.declareTimeFlags(f)
	declare(f, &c.lockAddresses, readAddresses("redis://", "rediss://"), "user-lock-addresses", "",
		"Redis servers of the lock, as `HOST:PORT,...`, where they are others than those of the tokens; "+
			"for TLS, rediss://HOST:PORT")
	declare(f, &c.redisCAFile, readCAFile, "redis-ca-file", "",
		"`FILE` of the PEM CA certificates for rediss://, which the sidecars get, too; without it, setup's own authority")
	declare(f, &c.replicationUser, readBool, "replication-user", "false",
		"`true|false`: make the users of replicas and Sentinels, for deploy/sentinel")
	declare(f, &c.sidecarRedisSecret, readObjectName, "sidecar-redis-secret", "at-least-semaphore-pod-redis",
		"`NAME` of the Secret that each namespace with sidecars gets")
	declare(f, &c.metricsBindAddress, readAddress(), "metrics-bind-address", "0.0.0.0:8080",
		"`HOST:PORT` to serve /metrics, /healthz and /readyz on, over plain HTTP")
}

func (c *setupConfig) validate(f *flags) {
	c.kubernetes.validate(f)
	c.queue.validateTimes(f)
	c.queue.validateSentinels(f)
	servers := slices.Concat(c.queue.queueRedisAddress.servers, c.redisAddresses, c.lockAddresses)
	if c.redisCAFile != "" && !anyHas("rediss://", servers...) {
		f.problem("--redis-ca-file: is not used: no address of Redis begins with rediss://")
	}
	if len(c.lockAddresses) > 0 && len(c.redisAddresses) == 0 {
		f.problem("--user-lock-addresses: is not used without --user-redis-addresses")
	}
	if f.NArg() > 0 {
		f.problem("unexpected argument %q: setup takes flags only", f.Arg(0))
	}
}

// queueVariables are the defaults of status for its flags. The containers of webhook, gate
// and sidecar have these variables, so that status needs no flags there.
var queueVariables = map[string]string{
	"queue-redis-address":        "QUEUE_REDIS_ADDRESS",
	"heartbeat-interval-seconds": "HEARTBEAT_INTERVAL_SECONDS",
	"stale-threshold-seconds":    "STALE_THRESHOLD_SECONDS",
	"redis-ca-file":              "REDIS_CA_FILE",
}

// semaphoreVariable is the semaphore that status shows in the container of a sidecar,
// whose user may not list semaphores.
const semaphoreVariable = "SEMAPHORE"

func (c *statusConfig) declareFlags(f *flags, getenv func(string) string) {
	c.declareQueueFlags(f, getenv)
	password, file := getenv("STATUS_REDIS_PASSWORD"), getenv("STATUS_REDIS_PASSWORD_FILE")
	if password != "" || file != "" {
		c.redis.username, c.redis.password = getenv("STATUS_REDIS_USERNAME"), password
	}
	c.declarePasswordFile(f, file)
	for name, variable := range queueVariables {
		if text := getenv(variable); text != "" {
			f.setDefault(name, text)
		}
	}
	declare(f, &c.output, readChoice(outputTable, outputJSON), "o", outputTable, "output format: `table|json`")
	declare(f, &c.watch, readBool, "watch", "false", "`true|false`: repeat the output every two seconds")
	declare(f, &c.port, readNumber(0, 65535), "port", "8082",
		"`PORT` on 127.0.0.1 of the page that serve shows to browsers; 0: a free one")
	declare(f, &c.yes, readBool, "yes", "false", "`true|false`: release, set, pause or move without confirmation")
	declare(f, &c.lasts, readOverrideTime, "for", "",
		"`DURATION` of set or pause, from 1m to 7d, such as 30m, 2h or 2d: then it ends by itself")
	declare(f, &c.override.note, readNote, "note", "",
		"`TEXT` that says why, for set and pause; status, refusals and waiting pods show it")
	declare(f, &c.clear, readBool, "clear", "false", "`true|false`: with set, end what set or pause has set")
	if id, ok := parseSemaphoreID(getenv(semaphoreVariable)); ok {
		c.own = id
	}
	c.override.by = changedBy(getenv("USER"), getenv("HOSTNAME"))
}

// readOverrideTime reads how long an override lasts: a duration of Go, which days may
// precede.
func readOverrideTime(text string) (time.Duration, error) {
	var days int
	var err error
	rest := text
	if before, after, found := strings.Cut(text, "d"); found {
		days, err = readNumber(0, int(mostOverride/(24*time.Hour)))(before)
		rest = cmp.Or(after, "0s")
	}
	lasts, wrong := time.ParseDuration(rest)
	lasts += time.Duration(days) * 24 * time.Hour
	if err != nil || wrong != nil || lasts < leastOverride || lasts > mostOverride {
		err = fmt.Errorf("%s is not a duration from 1m to 7d, such as 30m, 2h or 2d", quoteShort(text))
	}
	return lasts, err
}

// readNote reads a text that fits on one line of a terminal.
func readNote(text string) (string, error) {
	switch {
	case len(text) > mostNote:
		return text, fmt.Errorf("%s has %d bytes: at most %d are allowed", quoteShort(text), len(text), mostNote)
	case !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }):
		return text, fmt.Errorf("%s is not printable text on one line", quoteShort(text))
	}
	return text, nil
}

// changedBy names the user of this process, as far as the environment does.
func changedBy(user, host string) string {
	if user != "" && host != "" {
		user += "@"
	}
	return truncate(user+host, mostNote)
}

func (c *statusConfig) validate(f *flags) {
	c.settings.validate(f)
	operands, wanted := f.operands, ""
	if len(operands) == 1 && operands[0] == statusServe {
		c.serve, operands = true, nil
	}
	if len(operands) > 0 && operands[0] == statusHistory {
		c.history, operands = true, operands[1:]
	} else if len(operands) > 0 {
		if wanted = statusOperands[operands[0]]; wanted != "" {
			c.change, operands = operands[0], operands[1:]
		}
	}
	switch second := len(operands) == 2; {
	case c.change == "" && len(operands) > 1:
		f.problem("%d arguments: there may be one, NAMESPACE or NAMESPACE/KEY", len(operands))
	case (c.change == statusRelease || c.change == statusFirst) && second:
		c.pod = operands[1]
	case c.change == statusSet && second && c.clear:
		f.problem("set: %s and --clear do not go together", quoteShort(operands[1]))
	case c.change == statusSet && second:
		c.readLength(f, operands[1])
	case c.change == statusSet && c.clear && len(operands) == 1:
	case c.change != "" && len(operands) != len(strings.Fields(wanted)):
		f.problem("%s: %d arguments; they are %s", c.change, len(operands), wanted)
	}
	if len(operands) > 0 && (c.change != "" || len(operands) == 1) {
		c.readSemaphore(f, operands[0])
	} else if len(operands) == 0 {
		c.semaphore = c.own
	}
	if c.history && c.semaphore == (semaphoreID{}) && len(operands) < 2 {
		f.problem("history: of which semaphore? The argument is NAMESPACE/KEY")
	}
	if what := cmp.Or(c.change, map[bool]string{true: statusServe}[c.serve]); c.watch && what != "" {
		f.problem("--watch and %s do not go together", what)
	}
	c.validateChange(f)
}

// readSemaphore reads the operand NAMESPACE or NAMESPACE/KEY.
func (c *statusConfig) readSemaphore(f *flags, operand string) {
	id, isOne := parseSemaphoreID(operand)
	switch _, err := readNamespace(id.namespace); {
	case !isOne && (c.change != "" || id.namespace == "" || strings.ContainsAny(operand, shared+"/")):
		f.problem("%q is not a namespace, a slash and a key, nor @ and a key", operand)
	case err != nil && id.namespace != shared && (c.change == statusSet || c.change == statusPause):
		f.problem("%s: %v", c.change, err) // it would make a semaphore that no pod can use
	}
	c.namespace = id.namespace
	if isOne {
		c.semaphore = id
	}
}

// readLength reads the operand length=NUMBER.
func (c *statusConfig) readLength(f *flags, operand string) {
	number, found := strings.CutPrefix(operand, "length=")
	if !found {
		f.problem("set: %s is not length=NUMBER, such as length=1", quoteShort(operand))
		return
	}
	var err error
	if c.override.length, err = readNumber(0, maxLength)(number); err != nil {
		f.problem("length: %v", err)
	}
}

// validateChange checks the flags of set and pause.
func (c *statusConfig) validateChange(f *flags) {
	sets := c.change == statusSet || c.change == statusPause
	lasts, note := c.lasts != 0 || f.wrong["for"], c.override.note != ""
	switch {
	case c.clear && c.change == statusPause:
		f.problem("--clear: to end a pause, run status set NAMESPACE/KEY --clear")
	case c.clear && !sets:
		f.problem("--clear: is not used: it is for set")
	case c.clear && lasts:
		f.problem("--for: is not used with --clear, which ends at once what was set")
	case sets && !c.clear && !lasts:
		f.problem("--for: is needed, such as --for 2h: the length counts for a time, at most 7d")
	case !sets && lasts:
		f.problem("--for: is not used: it is for set and pause")
	}
	switch {
	case note && sets && c.clear:
		f.problem("--note: is not used with --clear")
	case note && !sets:
		f.problem("--note: is not used: it is for set and pause")
	}
}

// giveBackSeconds is the default time in which a sidecar tries to give its token back.
const giveBackSeconds = 10

// Examples of valid addresses, for messages.
const (
	sentinelExample = "redis+sentinel://a:26379,b:26379,c:26379/NAME"
	clusterExample  = "redis+cluster://a:6379,b:6379,c:6379"
)

// primaryName is a name that Sentinels accept.
var primaryName = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// readQueueAddress reads the address of one server, of a Sentinel group or of a Cluster.
func readQueueAddress(text string) (queueAddress, error) {
	scheme, rest, _ := strings.Cut(text, "://")
	plain, engine, isGroup := strings.Cut(scheme, "+")
	a := queueAddress{text: text}
	if !isGroup || strings.Contains(text, "@") || strings.Contains(text, "%40") {
		server, err := readAddress("redis://", "rediss://")(text)
		a.servers, a.text = []string{server}, server
		if err != nil && !strings.Contains(err.Error(), "credentials") {
			err = fmt.Errorf("%w (for a group of servers: %s or %s)", err, sentinelExample, clusterExample)
		}
		return a, err
	}
	wrongScheme := fmt.Errorf("%q is no scheme: an address is HOST:PORT, or like %s or %s",
		scheme+"://", sentinelExample, clusterExample)
	example := clusterExample
	var problems []error
	switch {
	case plain != "redis" && plain != "rediss":
		return a, wrongScheme
	case engine == "sentinel":
		a.kind, example = queueSentinel, sentinelExample
		var found bool
		rest, a.name, found = strings.Cut(rest, "/")
		switch {
		case !found || a.name == "":
			problems = append(problems, errors.New("the name of the primary is missing"))
		case !primaryName.MatchString(a.name):
			problems = append(problems, fmt.Errorf(
				"%s is no name of a primary: it has letters, digits, and the characters ._- only", quoteShort(a.name)))
		}
	case engine == "cluster":
		a.kind = queueCluster
	default:
		return a, wrongScheme
	}
	servers, err := readAddresses()(rest)
	if err != nil {
		problems = append(problems, err)
	}
	for _, s := range servers {
		if plain == "rediss" {
			s = "rediss://" + s
		}
		a.servers = append(a.servers, s)
	}
	if len(problems) > 0 {
		all := strings.ReplaceAll(errors.Join(problems...).Error(), "\n", "; ")
		return a, fmt.Errorf("%s (an example: %s)", all, example)
	}
	return a, nil
}
