package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"golang.org/x/net/dns/dnsmessage"
)

// dnsReply is the reply of a test's DNS to one lookup.
type dnsReply struct {
	addresses []string
	err       error
}

// testResolver returns a resolver whose lookups wait for a reply in replies. Unlike real
// lookups, they ignore the end of the context.
func testResolver(t *testing.T) (r *resolver, lookups chan string, replies chan dnsReply) {
	t.Helper()
	lookups, replies = make(chan string, 100), make(chan dnsReply)
	r = newResolver(net.DefaultResolver)
	r.lookUp = func(ctx context.Context, host string) ([]string, error) {
		lookups <- host
		select {
		case a := <-replies:
			return a.addresses, a.err
		case <-t.Context().Done():
			return nil, errors.New("the test is over")
		}
	}
	return r, lookups, replies
}

func (r *resolver) wantResolved(t *testing.T, host string, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if got, err := r.resolve(ctx, host); err != nil || !slices.Equal(got, want) {
		t.Errorf("%s is at %v, %v; want %v", host, got, err, want)
	}
}

// wantCachedSoon waits until the cache has the addresses.
func (r *resolver) wantCachedSoon(t *testing.T, host string, want ...string) {
	t.Helper()
	rig.Eventually(t, 5*time.Second, func() error {
		if known, _ := r.start(host); !slices.Equal(known, want) {
			return fmt.Errorf("%s is at %v, want %v", host, known, want)
		}
		return nil
	})
}

// keepFresh makes a cached reply fresh for a while.
func (r *resolver) keepFresh(host string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts[host] = resolvedHost{r.hosts[host].addresses, time.Now().Add(d)}
}

// A lookup slower than a dial's deadline goes on in the background. The dials meanwhile
// start no other, and later ones use its reply.
func TestResolveSlowDNS(t *testing.T) {
	t.Parallel()
	r, lookups, replies := testResolver(t)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, err := r.resolve(ctx, "a.test")
		var dns *net.DNSError
		if !errors.As(err, &dns) || !dns.IsTimeout || dns.Name != "a.test" {
			t.Errorf("without a reply: got %v", err)
		}
		cancel()
	}
	replies <- dnsReply{addresses: []string{"192.0.2.1"}}
	r.wantCachedSoon(t, "a.test", "192.0.2.1")
	r.wantResolved(t, "a.test", "192.0.2.1")
	if len(lookups) != 1 {
		t.Errorf("%d lookups, want 1", len(lookups))
	}
}

// The resolver uses an old reply as long as there is no new one.
func TestResolveOldReply(t *testing.T) {
	t.Parallel()
	r, lookups, replies := testResolver(t)
	go func() { replies <- dnsReply{addresses: []string{"192.0.2.1"}} }()
	r.wantResolved(t, "a.test", "192.0.2.1")
	r.expire("a.test")
	r.wantResolved(t, "a.test", "192.0.2.1") // the lookup is unanswered
	replies <- dnsReply{err: &net.DNSError{Err: "server misbehaving", Name: "a.test"}}
	r.wantResolved(t, "a.test", "192.0.2.1") // the lookup failed
	go func() { replies <- dnsReply{addresses: []string{"192.0.2.2", "192.0.2.3"}} }()
	r.wantCachedSoon(t, "a.test", "192.0.2.2", "192.0.2.3")
	if len(lookups) != 3 {
		t.Errorf("%d lookups, want 3", len(lookups))
	}
}

func TestResolveUnknownHost(t *testing.T) {
	t.Parallel()
	r, _, replies := testResolver(t)
	go func() { replies <- dnsReply{err: &net.DNSError{Err: "no such host", Name: "a.test"}} }()
	_, err := r.dial(t.Context(), "tcp", "a.test:1")
	if err == nil || !strings.Contains(err.Error(), "lookup a.test: no such host") || !isUnreachable(err) {
		t.Errorf("got %v, want no such host", err)
	}
}

// A dial takes the first address that accepts. If none does, the next dial looks the host
// up again.
func TestDialResolved(t *testing.T) {
	t.Parallel()
	r, lookups, replies := testResolver(t)
	_, port, _ := net.SplitHostPort(rig.StartRedis(t).Address)
	dial := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		defer cancel()
		c, err := r.dial(ctx, "tcp", "a.test:"+port)
		if err == nil {
			c.Close()
		}
		return err
	}
	go func() { replies <- dnsReply{addresses: []string{"127.0.0.99"}} }() // no server listens there
	if err := dial(); err == nil || !strings.Contains(err.Error(), "127.0.0.99:"+port) {
		t.Errorf("got %v, want the address in the error", err)
	}
	go func() { replies <- dnsReply{addresses: []string{"127.0.0.99", "127.0.0.1"}} }()
	rig.Must(t, dial())
	rig.Must(t, dial())
	if len(lookups) != 2 {
		t.Errorf("%d lookups, want 2", len(lookups))
	}
}

// resolverOf returns a resolver that asks a test's DNS.
func resolverOf(d *rig.DNS) *resolver {
	return newResolver(&net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", d.Address())
	}})
}

// A DNS that loses some of the questions costs a second. The names have a last dot, so that
// the search domains of this machine do not matter.
func TestResolveWithAFaultyDNS(t *testing.T) {
	t.Parallel()
	lost := func(q dnsmessage.Question, _ int) (dnsmessage.RCode, bool) { return 0, q.Type == dnsmessage.TypeAAAA }
	for name, c := range map[string]struct {
		fault   rig.DNSFault
		has     []string // the addresses in DNS
		want    []string // those that the resolver returns
		queries int      // for IPv4 addresses
	}{
		"sound":                 {nil, []string{"127.0.0.1"}, []string{"127.0.0.1"}, 1},
		"IPv6 only":             {nil, []string{"::1"}, []string{"::1"}, 1},
		"no answers about IPv6": {lost, []string{"127.0.0.1"}, []string{"127.0.0.1"}, 2},
		"no answers about IPv6, of a host with both": {lost, []string{"127.0.0.1", "::1"}, []string{"127.0.0.1"}, 2},
		"errors about IPv6": {func(q dnsmessage.Question, _ int) (dnsmessage.RCode, bool) {
			if q.Type == dnsmessage.TypeAAAA {
				return dnsmessage.RCodeServerFailure, false
			}
			return 0, false
		}, []string{"127.0.0.1"}, []string{"127.0.0.1"}, 1},
		"the first question lost": {func(q dnsmessage.Question, n int) (dnsmessage.RCode, bool) {
			return 0, q.Type == dnsmessage.TypeA && n == 1
		}, []string{"127.0.0.1"}, []string{"127.0.0.1"}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := rig.StartDNS(t, "127.0.0.1:0")
			d.SetFault(c.fault)
			d.Set("a.test", c.has...)
			start := time.Now()
			resolverOf(d).wantResolved(t, "a.test.", c.want...)
			rig.WantWithin(t, time.Since(start), 2*time.Second, "a look-up")
			if n := d.Asked("a.test"); n < c.queries {
				t.Errorf("%d questions, want %d", n, c.queries)
			}
		})
	}
}

// A provider moves its name to another server. The old one still accepts connections, but
// refuses writes, or hangs. The answer of DNS would be fresh for an hour.
func TestProviderMovesItsName(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(t *testing.T, old *rig.Redis){
		"refuses": func(t *testing.T, old *rig.Redis) { old.Do(t, "REPLICAOF", "127.0.0.1", "1") },
		"hangs":   func(t *testing.T, old *rig.Redis) { old.Pause(t) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			single := rig.RedisOptions{Kind: rig.SingleQueue}
			old, successor := rig.StartRedisWith(t, single), rig.StartRedisWith(t, single)
			forward(t, "127.0.0.2:"+rig.Port(old.Address), successor.Address)
			d := rig.StartDNS(t, "127.0.0.1:0")
			d.Set("redis.test", "127.0.0.1")
			c := testConfig(old.Address)
			c.queueRedisAddress = mustAddress("redis.test.:" + rig.Port(old.Address))
			c.redis.resolver = resolverOf(d)
			s, id := semaphoresOf(t, c), freshID()
			locks := newRedlock([]string{successor.Address}, redisSettings{}, 1)
			t.Cleanup(func() { rig.Must(t, locks.close()) })
			s.locks = locks
			acquire(t, s, id, 9)
			fail(t, old)
			d.Set("redis.test", "127.0.0.2")
			c.redis.resolver.keepFresh("redis.test.", time.Hour)
			start := time.Now()
			token := acquire(t, s, id, 9)
			rig.WantWithin(t, time.Since(start), 3*time.Second, "the acquire")
			successor.WantInflight(t, id, token)
		})
	}
}

// forward forwards the connections to an address to a server.
func forward(t *testing.T, address, server string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	rig.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer from.Close()
				to, err := net.Dial("tcp", server)
				if err != nil {
					return
				}
				defer to.Close()
				go func() { _, _ = io.Copy(to, from) }()
				_, _ = io.Copy(from, to)
			}()
		}
	}()
}

// The ACL rules of the Redis users.
const (
	webhookACL     = rig.WebhookACL
	sidecarACL     = rig.SidecarACL
	statusACL      = rig.StatusACL
	releaseACL     = rig.ReleaseACL
	gateACL        = rig.GateACL
	forgottenACL   = rig.ForgottenACL
	sentinelACL    = rig.SentinelACL
	ofSentinelsACL = rig.OnSentinelsACL
	clusterACL     = rig.ClusterACL
	lockACL        = rig.LockACL
	webhookLockACL = rig.WebhookLockACL
)

// isDenied reports whether Redis denied the user a permission.
func isDenied(err error) bool {
	return strings.Contains(err.Error(), "NOPERM") || isPermissionError(err.Error())
}

// startSecureRedis starts a redis-server that accepts only TLS, with the users webhook
// and sidecar.
func startSecureRedis(t *testing.T, dir string) *rig.Redis {
	t.Helper()
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	listen := func(port string) []string {
		args := []string{"--port", "0", "--tls-port", port, "--tls-cert-file", crt, "--tls-key-file", key,
			"--tls-ca-cert-file", crt, "--tls-auth-clients", "no"}
		for _, user := range []string{
			"default on >admin ~* &* +@all",
			"webhook on >" + rig.Password + " " + webhookACL,
			"sidecar on >" + rig.Password + " " + sidecarACL,
		} {
			args = append(append(args, "--user"), strings.Fields(user)...)
		}
		return args
	}
	roots, err := readCA(crt)
	rig.Must(t, err)
	r := rig.StartRedisWith(t, rig.RedisOptions{Args: listen, Young: true,
		Dial: []redis.DialOption{redis.DialUseTLS(true), redis.DialTLSConfig(&tls.Config{RootCAs: roots}),
			redis.DialPassword("admin")}})
	r.WantAge(t, 2*time.Second) // it admits no pod before, with an interval of a second
	return r
}

// On a lock server, the ACL rules for locks suffice, and each is needed.
func TestLockACLIsMinimal(t *testing.T) {
	t.Parallel()
	for user, all := range map[string]string{"sidecar": lockACL, "webhook": lockACL + " " + webhookLockACL} {
		t.Run(user, func(t *testing.T) {
			loads := user == "webhook"
			r := rig.StartRedisWith(t, rig.RedisOptions{Bare: loads})
			settings := redisSettings{username: user, password: rig.Password, loadsScripts: loads}
			lock := func() error {
				l := newRedlock([]string{r.Address}, settings, 1)
				defer l.close()
				unlock, err := l.tryLock(t.Context(), freshID().lockKey(), time.Minute)
				if err == nil {
					err = unlock(t.Context())
				}
				if err == nil && loads {
					r.Do(t, "SCRIPT", "FLUSH")
					_, err = l.scripted()[0].loadScripts(t.Context())
				}
				return err
			}
			rules := strings.Fields(all)
			r.Do(t, "ACL", append([]any{"SETUSER", user, "on", ">" + rig.Password}, rig.Anys(rules)...)...)
			rig.Must(t, inTime(lock))
			for _, rule := range rules[1:] {
				r.Do(t, "ACL", "SETUSER", user, "-"+rule[1:])
				if err := inTime(lock); err == nil || !isDenied(err) {
					t.Errorf("without %s: got %v, want NOPERM", rule, err)
				}
				r.Do(t, "ACL", "SETUSER", user, rule)
			}
		})
	}
}

// All functions over TLS, with the users of docs/security.md.
func TestRedisWithTLSAndACL(t *testing.T) {
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	r := startSecureRedis(t, dir)
	address, ca := "rediss://"+r.Address, filepath.Join(dir, "tls.crt")
	c := configWithInterval(address, time.Second)
	c.redis = redisSettings{username: "webhook", password: rig.Password, caFile: ca, loadsScripts: true}
	w := startWebhook(t, c)
	id := freshID()
	rig.Must(t, w.semaphores.check(context.Background()))
	token := w.wantAdmitted(t, id, 2)
	r.MakeStale(t, id, w.wantAdmitted(t, id, 2))
	w.semaphores.giveBack(id, w.wantAdmitted(t, id, 2)) // after a repair
	w.wantFull(t, id, 1, 1)
	r.ForgetLength(t, id)
	maintain(t, w.semaphores, id, 1) // a trim
	r.WantCounts(t, id, 0, 1)

	t.Setenv("REDIS_USERNAME", "sidecar")
	t.Setenv("REDIS_PASSWORD", rig.Password)
	p := rig.StartSidecar(t, address, id, token, "--redis-ca-file="+ca)
	p.WantLog(t, "holding the token")
	r.Do(t, "DEL", id.inflightKey())
	r.WantCounts(t, id, 0, 1)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	r.WantCounts(t, id, 1, 0)
	p.WantNoSecret(t)
}

// The ACL rules of the webhook and the sidecar suffice, and each is needed.
func TestACLsAreMinimal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	r := startSecureRedis(t, dir)
	ctx, address := context.Background(), "rediss://"+r.Address
	semaphoresOf := func(user string) *semaphores {
		c := configWithInterval(address, time.Second)
		c.redis = redisSettings{username: user, password: rig.Password, caFile: filepath.Join(dir, "tls.crt"),
			loadsScripts: user == "webhook"}
		return newSemaphores(c.settings, newLocker(c.settings, lockConnections), 1, slog.New(slog.DiscardHandler))
	}
	// The common commands of both: lock, repair, acquire, wake waiters, release.
	commonWork := func(user string) (*semaphores, semaphoreID, error) {
		s, id := semaphoresOf(user), freshID()
		unlock, err := s.locks.tryLock(ctx, id.lockKey(), time.Minute)
		if err != nil {
			return s, id, err
		}
		if err := unlock(ctx); err != nil {
			return s, id, err
		}
		if r.Do(t, "EXISTS", id.lockKey()) != int64(0) {
			return s, id, errors.New("NOPERM: the lock was not freed")
		}
		for _, length := range []int{3, 2} { // refill, trim
			if err := s.maintain(ctx, id, length, true); err != nil {
				return s, id, err
			}
			r.ForgetLength(t, id)
		}
		token, _, err := s.acquire(ctx, id, "", 1, limit{}, time.Second)
		if err != nil {
			return s, id, err
		}
		r.Do(t, "ZADD", id.waitersKey(), 1, "gone")
		r.Do(t, "ZADD", id.seenKey(), 1, "gone")
		r.Do(t, "HSET", id.namesKey(), "gone", 1)
		r.Do(t, "ZADD", id.waitersKey(), 2, "there")
		r.Do(t, "ZADD", id.seenKey(), time.Now().Unix(), "there")
		r.Do(t, "HSET", id.namesKey(), "there", "+1") // it listened, and misses its call
		if _, err := s.release(ctx, id, token, ""); err != nil {
			return s, id, err
		}
		// a score in the future, for maintain to correct
		r.Do(t, "ZADD", id.inflightKey(), 99999999999, uuid.NewString())
		r.ForgetLength(t, id)
		if err := s.maintain(ctx, id, 1, true); err != nil { // trim to nothing
			return s, id, err
		}
		_, err = s.runAcquire(ctx, id, acquireRequest{token: uuid.NewString(), length: 1})
		return s, id, err
	}
	sidecarWork := func() error {
		s, id, err := commonWork("sidecar")
		defer s.close(ctx)
		if err != nil {
			return err
		}
		token := uuid.NewString()
		for range 2 { // a rejoin, then a refresh
			if _, err := s.heartbeat(ctx, id, token, "", "", 0, 1); err != nil {
				return err
			}
		}
		other := uuid.NewString()
		if _, err := s.runAcquire(ctx, id, acquireRequest{token: other, length: 1, arrival: joinLine}); err != nil {
			return err
		}
		if _, err := s.release(ctx, id, other, ""); err != nil {
			return err
		}
		if _, err := s.release(ctx, id, token, ""); err != nil { // into the queue, so that the heartbeat removes it there
			return err
		}
		if _, err := s.heartbeat(ctx, id, token, "", "", 0, 1); err != nil {
			return err
		}
		attempt, cancel := context.WithCancel(ctx)
		defer cancel()
		subscribed := newWakeup()
		calls := newSubscription(s.queue, id, s.log)
		calls.add(subscribed, id, token)
		received := make(chan error, 1)
		go func() { received <- calls.receive(attempt) }()
		select {
		case <-subscribed:
			return nil
		case err := <-received:
			return err
		}
	}
	webhookWork := func() error {
		s, id, err := commonWork("webhook")
		defer s.close(ctx)
		return errors.Join(err, s.check(ctx), errOf(s.survey(ctx, "")),
			s.setLimit(ctx, id, limit{known: true, length: 1}, time.Hour, false))
	}
	for user, c := range map[string]struct {
		rule string
		work func() error
	}{"sidecar": {sidecarACL, sidecarWork}, "webhook": {webhookACL, webhookWork}} {
		rig.Must(t, inTime(c.work))
		for rule := range strings.FieldsSeq(c.rule) {
			command, isCommand := strings.CutPrefix(rule, "+")
			if !isCommand {
				continue
			}
			command, _, _ = strings.Cut(command, "|")
			r.Do(t, "ACL", "SETUSER", user, "-"+command)
			if user == "webhook" {
				r.Do(t, "SCRIPT", "FLUSH")
			}
			r.Do(t, "ACL", "LOG", "RESET")
			err := inTime(c.work)
			if denied, _ := redis.Values(r.Do(t, "ACL", "LOG"), nil); err == nil && len(denied) > 0 {
				// a waiter without a subscription polls instead
				err = errors.New("NOPERM in the ACL log, though the command succeeded by other means")
			}
			if err == nil || !isDenied(err) {
				t.Errorf("%s without %s: got %v, want NOPERM", user, rule, err)
			}
			for rule := range strings.FieldsSeq(c.rule) { // also the other sections of INFO
				if strings.HasPrefix(rule, "+"+command) {
					r.Do(t, "ACL", "SETUSER", user, rule)
				}
			}
		}
		rig.Must(t, inTime(c.work))
		rig.Must(t, r.LoadScripts())
	}

	settings := redisSettings{username: "sidecar", password: rig.Password, caFile: filepath.Join(dir, "tls.crt")}
	conn, err := dialRedis(ctx, "rediss://"+r.Address, settings, time.Second)
	rig.Must(t, err)
	defer conn.Close()
	for _, command := range []string{
		"FLUSHALL", "KEYS *", "CONFIG GET *", "ACL LIST", "PING", "GET other", "SET other 1", "PUBLISH other x",
		"LRANGE queue/{a/b} 0 -1", "ZADD other 1 a", "RPUSH other a", "SCRIPT FLUSH", "SHUTDOWN", "MONITOR",
		"PERSIST state/{a/b}",
		"SUBSCRIBE c", "EVAL return 0", "EVAL_RO return 0", "SCRIPT LOAD x", "SCRIPT KILL", "FUNCTION LIST", "FCALL f 0",
	} {
		words := strings.Fields(command)
		var args []any
		for _, w := range words[1:] {
			args = append(args, w)
		}
		if reply, err := conn.Do(words[0], args...); err == nil || !strings.HasPrefix(err.Error(), "NOPERM") {
			t.Errorf("%s: got %v, %v, want NOPERM", command, reply, err)
		}
	}
}

// Errors of credentials and certificates name the reason, without the password.
func TestRedisErrorsOfCredentials(t *testing.T) {
	t.Parallel()
	dir, elsewhere := t.TempDir(), t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	rig.WriteCertificate(t, elsewhere, 2)
	r := startSecureRedis(t, dir)
	ca := filepath.Join(dir, "tls.crt")
	for want, settings := range map[string]redisSettings{
		"WRONGPASS": {username: "webhook", password: "wrong-" + rig.Password, caFile: ca},
		"NOAUTH":    {caFile: ca},
		"certificate signed by unknown au": {
			username: "webhook", password: rig.Password, caFile: filepath.Join(elsewhere, "tls.crt"),
		},
		"no such file or directory": {
			username: "webhook", password: rig.Password, caFile: filepath.Join(elsewhere, "none"),
		},
	} {
		c := testConfig("rediss://" + r.Address)
		c.redis = settings
		s := newSemaphores(c.settings, nil, 1, testSemaphores(t, r.Address).log)
		err := s.check(context.Background())
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), rig.Password) {
			t.Errorf("got %v, want %q", err, want)
		}
		s.queue.close()
	}
}

// sidecarConfigOf is testConfig for a process that may not load scripts.
func sidecarConfigOf(address string) webhookConfig {
	c := testConfig(address)
	c.redis.loadsScripts = false
	return c
}

// wantScripts waits until a server knows scripts, no longer than a webhook may take.
func wantScripts(t *testing.T, r *rig.Redis, scripts ...*redis.Script) {
	t.Helper()
	args := []any{"EXISTS"}
	for _, s := range scripts {
		args = append(args, s.Hash())
	}
	start := time.Now()
	rig.Eventually(t, 10*time.Second, func() error {
		there, err := redis.Ints(r.Control.Do("SCRIPT", args...))
		if err == nil && slices.Contains(there, 0) {
			err = fmt.Errorf("%s knows %v of the scripts", r.Address, there)
		}
		return err
	})
	rig.WantWithin(t, time.Since(start), scriptsWithin, "loading the scripts")
}

// Without an admission, a webhook loads its scripts, and those of the last release, into
// the queue and the lock servers: at its start, and after a SCRIPT FLUSH. It writes
// nothing.
func TestWebhookLoadsScripts(t *testing.T) {
	t.Parallel()
	queue := rig.StartRedisWith(t, rig.RedisOptions{Bare: true})
	locks := rig.StartLockServers(t, 3, rig.RedisOptions{Bare: true, Kind: rig.SingleQueue})
	s, loaded := rig.StartRedisWith(t, rig.RedisOptions{Kind: rig.SingleQueue}), loadedScripts(previousFiles)
	for _, script := range loaded[:len(ownScripts)] {
		wantScripts(t, s, script) // test/rig loads the same
	}
	rig.StartWebhook(t, rig.QueueAddress(queue.Address), "--redis-addresses="+strings.Join(locks.Addresses(), ","))
	for range 2 {
		wantScripts(t, queue, loaded...)
		for _, lock := range locks {
			wantScripts(t, lock, unlockScript())
		}
		for _, r := range append(locks, queue) {
			r.Do(t, "SCRIPT", "FLUSH")
		}
	}
	rig.Must(t, locks.LocksLeft())
}

// A webhook loads each script of the last release as that release sent it.
func TestLoadedScripts(t *testing.T) {
	own := loadedScripts(fstest.MapFS{})
	all := loadedScripts(fstest.MapFS{
		"lua/previous/README.md":     {Data: []byte("text")},
		"lua/previous/semaphore.lua": {Data: []byte("local a = 1\n")},
		"lua/previous/one.lua":       {Data: []byte("return a\n")},
		"lua/previous/two.lua":       {Data: []byte("return a + 1\n")},
	})
	if len(own) != len(ownScripts) || len(all) != len(own)+2 {
		t.Fatalf("%d own scripts, and %d with those of the last release", len(own), len(all))
	}
	for i, text := range []string{"local a = 1\nreturn a\n", "local a = 1\nreturn a + 1\n"} {
		if got := all[len(own)+i].Hash(); got != redis.NewScript(0, text).Hash() {
			t.Errorf("script %d has the hash %s, not that of %q", i, got, text)
		}
	}
	for i, s := range ownScripts {
		if own[i].Hash() != s.made().Hash() {
			t.Errorf("%s is sent and loaded with different texts", s.name)
		}
	}
}

// A webhook whose user may not load scripts says so.
func TestScriptsNotLoaded(t *testing.T) {
	t.Parallel()
	r := rig.StartRedisWith(t, rig.RedisOptions{Bare: true})
	rules := strings.Fields(sidecarACL + " " + sentinelACL + " " + clusterACL)
	r.Do(t, "ACL", append([]any{"SETUSER", "webhook", "on", ">" + rig.Password}, rig.Anys(rules)...)...)
	c := testConfig(r.Address)
	c.redis = redisSettings{username: "webhook", password: rig.Password, loadsScripts: true}
	w := startWebhook(t, c)
	w.semaphores.keepScripts()
	rig.Eventually(t, 10*time.Second, func() error {
		lines := w.log.Lines(t, "scripts not loaded, to be retried")
		if len(lines) == 0 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "NOPERM") {
			return fmt.Errorf("logged %v:\n%s", lines, w.log)
		}
		return nil
	})
}

// A process that may not load scripts waits for a webhook that does. Its error says so,
// and it sends no script.
func TestWaitingForScripts(t *testing.T) {
	t.Parallel()
	r := rig.StartRedisWith(t, rig.RedisOptions{Bare: true})
	s, id, token := semaphoresOf(t, sidecarConfigOf(r.Address)), freshID(), uuid.NewString()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := s.heartbeat(ctx, id, token, "", "", 0, 1)
	if err == nil || !isNoScript(err) || !strings.Contains(err.Error(), "no webhook has loaded the scripts yet") {
		t.Errorf("without scripts, the error is %v", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.heartbeat(t.Context(), id, token, "", "", 0, 1)
		done <- err
	}()
	rig.Eventually(t, 10*time.Second, func() error {
		if s.outages.failingFor(s.queue.part(id)) == 0 {
			return errors.New("the heartbeat was not refused")
		}
		return nil
	})
	if calls := r.CommandCalls(t); calls["eval"] != 0 || calls["script|load"] != 0 {
		t.Errorf("a sidecar has sent a script: %v", calls)
	}
	testSemaphores(t, r.Address).keepScripts()
	rig.Must(t, <-done)
	r.WantInflight(t, id, token)
}

// While Redis lacks the scripts, commands leave no trace, so that the next one finds the
// silence: no token is stale before its holder had the time to come back.
func TestMissingScriptsAreASilence(t *testing.T) {
	t.Parallel()
	r, webhook, id := newSemaphoreOn(t, rig.StartRedis(t))
	sidecar := semaphoresOf(t, sidecarConfigOf(r.Address))
	holder := acquire(t, webhook, id, 1)
	r.Do(t, "SCRIPT", "FLUSH")
	before := r.Dump(t, id)
	for name, command := range map[string]func(ctx context.Context) error{
		"heartbeat": func(ctx context.Context) error { return errOf(sidecar.heartbeat(ctx, id, holder, "", "", 0, 1)) },
		"acquire": func(ctx context.Context) error {
			return errOf(sidecar.runAcquire(ctx, id, acquireRequest{token: uuid.NewString(), length: 1, arrival: joinLine}))
		},
		"release": func(ctx context.Context) error { return errOf(sidecar.release(ctx, id, holder, "")) },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		if err := command(ctx); err == nil || !isNoScript(err) {
			t.Errorf("%s: got %v, want NOSCRIPT", name, err)
		}
		cancel()
	}
	if after := r.Dump(t, id); !slices.Equal(after, before) {
		t.Error("commands without a script have changed the semaphore")
	}
	r.Shift(t, id, -2*webhook.timing().staleAfter())
	rig.Must(t, r.LoadScripts())
	wantFullError(t, webhook, id, 1, 1)
	if rejoined, err := sidecar.heartbeat(t.Context(), id, holder, "", "", 0, 1); err != nil || rejoined {
		t.Errorf("the holder comes back: rejoined %t, %v", rejoined, err)
	}
}

// An unlock waits until a webhook has loaded its script.
func TestUnlockWaitsForScripts(t *testing.T) {
	t.Parallel()
	locks := rig.StartLockServers(t, 3, rig.RedisOptions{Bare: true, Kind: rig.SingleQueue})
	l := newRedlock(locks.Addresses(), redisSettings{}, 1)
	defer l.close()
	unlock, err := l.tryLock(t.Context(), "lock/{shop/web}", time.Minute)
	rig.Must(t, err)
	done := make(chan error, 1)
	go func() { done <- unlock(t.Context()) }()
	for _, r := range locks {
		rig.Eventually(t, 10*time.Second, func() error {
			if r.Info(t, "commandstats", `cmdstat_evalsha:calls=`) == 0 {
				return errors.New("no unlock came to " + r.Address)
			}
			return nil
		})
	}
	for _, s := range l.scripted() {
		if n, err := s.loadScripts(t.Context()); n != 1 || err != nil {
			t.Errorf("%s: %d scripts loaded, %v", s.name, n, err)
		}
	}
	rig.Must(t, <-done)
	rig.Must(t, locks.LocksLeft())
}

// A user of Redis gets a second password, and later loses the first: webhook, lock and
// subscription log in with what the file has then, and no command fails.
func TestPasswordFileIsReread(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	file := rig.WriteFile(t, "password", "first\n")
	r.Do(t, "ACL", append([]any{"SETUSER", "webhook", "on", ">first"},
		rig.Anys(strings.Fields(rig.Ageless(webhookACL)+" "+sentinelACL+" "+clusterACL))...)...)
	c := testConfig(r.Address)
	c.redis = redisSettings{username: "webhook", passwordFile: file, loadsScripts: true}
	s, id := semaphoresOf(t, c), freshID()
	work := func(when string) {
		t.Helper()
		token, _, err := s.acquire(t.Context(), id, "", 1, limit{}, time.Second)
		if err == nil {
			_, err = s.release(t.Context(), id, token, "")
		}
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	dial := func() error {
		conn, err := dialRedis(t.Context(), r.Address, c.redis, time.Second)
		if err == nil {
			conn.Close()
		}
		return err
	}
	reconnect := func() { r.Do(t, "CLIENT", "KILL", "USER", "webhook") }
	work("with the first password")
	r.Do(t, "ACL", "SETUSER", "webhook", ">second")
	work("when both are good")
	reconnect()
	work("with the first, on a new connection")
	rig.Must(t, os.WriteFile(file, []byte("second"), 0o600))
	work("with the new file")
	r.Do(t, "ACL", "SETUSER", "webhook", "<first")
	work("without the first")
	reconnect()
	work("with the second, on a new connection")
	rig.Must(t, dial())
	for text, want := range map[string]string{
		"":       "password of Redis: " + file + " is empty",
		"a\nb\n": "password of Redis: " + file + " has more than one line, not one password",
		"first":  "WRONGPASS",
	} {
		rig.Must(t, os.WriteFile(file, []byte(text), 0o600))
		if err := dial(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("with %q in the file: got %v, want %s", text, err, want)
		}
	}
	rig.Must(t, os.Remove(file))
	if err := dial(); err == nil || !strings.HasPrefix(err.Error(), "password of Redis: open "+file) {
		t.Errorf("without the file: got %v", err)
	}
}
