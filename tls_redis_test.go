package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// What the users of the webhook and of the sidecar need in Redis, as docs/security.md has it.
const (
	webhookACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~lock/* &waiters/* +ping +eval +evalsha +time +scan +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del +zadd +zrem +zcard +zcount +zrange +zrangebyscore +zscore +zremrangebyscore +ttl +expire +publish +set +get"
	sidecarACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~lock/* &waiters/* +eval +evalsha +time +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del +zadd +zrem +zcard +zcount +zrange +zrangebyscore +zrank +zscore +zremrangebyscore +ttl +expire +publish +subscribe +set +get"
	statusACL  = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* +time +scan +llen +zcard +zcount +zrange +zscore +hmget"
	releaseACL = "&waiters/* +eval +evalsha +exists +hset +hdel +zrem +zrangebyscore +rpush +ltrim +del +ttl +expire +publish" // of "status release", beside statusACL

	gateACL       = "+unsubscribe"              // of the gate, beside sidecarACL
	forgottenACL  = "+acl|users"                // of the webhook, to warn of namespaces that have no user
	namespacesACL = "+acl|setuser +acl|deluser" // of deploy/namespace.sh

	// What both need beside it with Sentinels, and of these; and in a Cluster. TestSentinelUsers and TestClusterSlotMoving use them.
	sentinelACL    = "+role"
	ofSentinelsACL = "+sentinel|master +sentinel|get-master-addr-by-name"
	clusterACL     = "+role +cluster|slots +asking"

	// What both need on servers that are there for the lock only.
	lockACL = "~lock/* +eval +set +get +del"
)

// isDenied reports whether an error says that the user may not do it.
func isDenied(err error) bool {
	return strings.Contains(err.Error(), "NOPERM") || isPermissionError(err.Error())
}

// startSecureRedis starts a redis-server that speaks TLS only, with a user for the webhook and one for the sidecar.
func startSecureRedis(t *testing.T, dir string) *redisServer {
	t.Helper()
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	listen := func(port string) []string {
		args := []string{"--port", "0", "--tls-port", port, "--tls-cert-file", crt, "--tls-key-file", key, "--tls-ca-cert-file", crt, "--tls-auth-clients", "no"}
		for _, user := range []string{"default on >admin ~* &* +@all", "webhook on >" + testPassword + " " + webhookACL, "sidecar on >" + testPassword + " " + sidecarACL} {
			args = append(append(args, "--user"), strings.Fields(user)...)
		}
		return args
	}
	roots, err := readCA(crt)
	must(t, err)
	r, err := launchRedis(t.TempDir(), listen, redis.DialUseTLS(true), redis.DialTLSConfig(&tls.Config{RootCAs: roots}), redis.DialPassword("admin"))
	must(t, err)
	t.Cleanup(r.stop)
	return r
}

// The rules in docs/security.md are those that are tested here.
func TestACLsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("docs/security.md")
	must(t, err)
	for _, rule := range []string{webhookACL, sidecarACL, "status on >PASSWORD " + statusACL + "\n", "`" + gateACL + "`", "`" + forgottenACL + "`", "SETUSER status " + releaseACL + "\n", "`" + sentinelACL + "`", "`" + ofSentinelsACL + "`", "`" + clusterACL + "`", "`" + lockACL + "`"} {
		if !strings.Contains(string(page), rule) {
			t.Errorf("not in docs/security.md: %s", rule)
		}
	}
}

// withoutLock are rules of servers on which there are no locks, but that have Sentinels.
func withoutLock(rules string) string {
	return strings.NewReplacer("~lock/* ", "", " +set", "", " +get", "").Replace(rules) + " " + sentinelACL
}

// The users that deploy/ makes have these rules: the lock is on servers of its own there, and there are Sentinels.
func TestACLsAreDeployed(t *testing.T) {
	scripts, err := os.ReadFile("deploy/base/redis-scripts.yaml")
	must(t, err)
	want := map[string][]string{
		"webhook":    {withoutLock(webhookACL) + " " + forgottenACL, lockACL},
		"sidecar":    {withoutLock(sidecarACL), lockACL},
		"gate":       {withoutLock(sidecarACL) + " " + gateACL, lockACL},
		"namespaces": {namespacesACL, namespacesACL},
		"status":     {statusACL + " " + releaseACL + " " + sentinelACL},
		"default":    {"off", "on resetpass ~* &* +@all", "on nopass resetchannels -@all +ping " + ofSentinelsACL},
	}
	got := map[string][]string{}
	for line := range strings.Lines(string(scripts)) {
		words := userLine(line)
		if len(words) < 3 || words[0] != "user" || want[words[1]] == nil {
			continue
		}
		rules := words[2:]
		if len(rules) > 1 && strings.HasPrefix(rules[1], ">$") {
			rules = rules[2:]
		}
		got[words[1]] = append(got[words[1]], sorted(strings.Join(rules, " ")))
	}
	for user, all := range want {
		for i := range all {
			all[i] = sorted(all[i])
		}
		slices.Sort(all)
		slices.Sort(got[user])
		if !slices.Equal(got[user], all) {
			t.Errorf("%s has\n%s, want\n%s", user, strings.Join(got[user], "\n"), strings.Join(all, "\n"))
		}
	}
}

// The servers that deploy/ installs start again when their scripts change.
func TestScriptsAreDeployed(t *testing.T) {
	scripts, err := os.ReadFile("deploy/base/redis-scripts.yaml")
	must(t, err)
	manifest, err := os.ReadFile("deploy/base/redis.yaml")
	must(t, err)
	if want := fmt.Sprintf("scripts: %q", fmt.Sprintf("%x", sha256.Sum256(scripts))[:12]); !strings.Contains(string(manifest), want) {
		t.Errorf("the annotation in deploy/base/redis.yaml must be %s", want)
	}
}

// sorted is a text with its words in order.
func sorted(text string) string { return strings.Join(slices.Sorted(strings.FieldsSeq(text)), " ") }

// On a server for the lock, nothing can be left out of the rules for it, and nothing is missing.
func TestLockACLIsMinimal(t *testing.T) {
	r := startRedis(t)
	settings := redisSettings{username: "locker", password: testPassword}
	lock := func() error {
		l := newRedlock([]string{r.address}, settings, 1)
		defer l.close()
		unlock, err := l.tryLock(t.Context(), freshID().lockKey(), time.Minute)
		if err != nil {
			return err
		}
		return unlock(t.Context())
	}
	rules := strings.Fields(lockACL)
	r.do(t, "ACL", append([]any{"SETUSER", "locker", "on", ">" + testPassword}, anys(rules)...)...)
	must(t, lock())
	for _, rule := range rules[1:] {
		r.do(t, "ACL", "SETUSER", "locker", "-"+rule[1:])
		if err := lock(); err == nil || !isDenied(err) {
			t.Errorf("without %s: %v", rule, err)
		}
		r.do(t, "ACL", "SETUSER", "locker", rule)
	}
}

// The whole job over TLS, with the users of docs/security.md.
func TestRedisWithTLSAndACL(t *testing.T) {
	dir := t.TempDir()
	writeCertificate(t, dir, 1)
	r := startSecureRedis(t, dir)
	address, ca := "rediss://"+r.address, filepath.Join(dir, "tls.crt")
	c := testConfig(address)
	c.redis = redisSettings{username: "webhook", password: testPassword, caFile: ca}
	w := startWebhook(t, c)
	id := freshID()
	must(t, w.semaphores.check(context.Background()))
	token := w.wantAdmitted(t, id, 2)
	r.makeStale(t, id, w.wantAdmitted(t, id, 2))
	w.semaphores.giveBack(id, w.wantAdmitted(t, id, 2)) // after a repair
	w.wantFull(t, id, 1, 1)
	r.askedLongAgo(t, id)
	maintain(t, w.semaphores, id, 1) // a trim
	r.wantCounts(t, id, 0, 1)

	t.Setenv("REDIS_USERNAME", "sidecar")
	t.Setenv("REDIS_PASSWORD", testPassword)
	p := startSidecar(t, address, id, token, "--redis-ca-file="+ca)
	p.wantLog(t, "holding the token")
	r.do(t, "DEL", id.inflightKey())
	r.wantCounts(t, id, 0, 1)
	p.signal(t, syscall.SIGTERM)
	p.wantExit(t, 0)
	r.wantCounts(t, id, 1, 0)
	wantNoSecret(t, p)
}

// The rules allow what the sidecar and the webhook do, and all that they allow is needed.
func TestACLsAreMinimal(t *testing.T) {
	dir := t.TempDir()
	writeCertificate(t, dir, 1)
	r := startSecureRedis(t, dir)
	ctx, address := context.Background(), "rediss://"+r.address
	semaphoresOf := func(user string) *semaphores {
		c := testConfig(address)
		c.redis = redisSettings{username: user, password: testPassword, caFile: filepath.Join(dir, "tls.crt")}
		return newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), 1, slog.New(slog.DiscardHandler))
	}
	// What both do: take tokens, repair, call waiters, give back.
	life := func(user string) (*semaphores, semaphoreID, error) {
		s, id := semaphoresOf(user), freshID()
		unlock, err := s.locks.tryLock(ctx, id.lockKey(), time.Minute)
		if err != nil {
			return s, id, err
		}
		if err := unlock(ctx); err != nil {
			return s, id, err
		}
		if r.do(t, "EXISTS", id.lockKey()) != int64(0) {
			return s, id, errors.New("NOPERM: the lock was not freed")
		}
		for _, length := range []int{3, 2} { // refill, trim
			if err := s.maintain(ctx, id, length, true); err != nil {
				return s, id, err
			}
			r.askedLongAgo(t, id)
		}
		token, _, err := s.acquire(ctx, id, "", 1, time.Second)
		if err != nil {
			return s, id, err
		}
		r.do(t, "ZADD", id.waitersKey(), 1, "gone")
		r.do(t, "ZADD", id.seenKey(), 1, "gone")
		r.do(t, "HSET", id.namesKey(), "gone", 1)
		r.do(t, "ZADD", id.waitersKey(), 2, "there")
		r.do(t, "ZADD", id.seenKey(), time.Now().Unix(), "there")
		if _, err := s.release(ctx, id, token); err != nil {
			return s, id, err
		}
		r.do(t, "ZADD", id.inflightKey(), 99999999999, uuid.NewString()) // to be caught up with
		r.askedLongAgo(t, id)
		if err := s.maintain(ctx, id, 1, true); err != nil { // trim to nothing
			return s, id, err
		}
		_, err = s.ask(ctx, id, question{token: uuid.NewString(), length: 1})
		return s, id, err
	}
	sidecarLife := func() error {
		s, id, err := life("sidecar")
		defer s.close(ctx)
		if err != nil {
			return err
		}
		token := uuid.NewString()
		for range 2 { // it rejoins, and renews
			if _, err := s.heartbeat(ctx, id, token, "", 0); err != nil {
				return err
			}
		}
		other := uuid.NewString()
		if _, err := s.ask(ctx, id, question{other, 1, joinLine, ""}); err != nil {
			return err
		}
		if _, err := s.release(ctx, id, other); err != nil {
			return err
		}
		if _, err := s.release(ctx, id, token); err != nil { // to the queue, or it would not be popped
			return err
		}
		if _, err := s.heartbeat(ctx, id, token, "", 0); err != nil {
			return err
		}
		attempt, cancel := context.WithCancel(ctx)
		defer cancel()
		c := &calls{ring: make(chan struct{}, 1)}
		heard := make(chan error, 1)
		go func() { heard <- (&waiter{semaphores: s, id: id, token: token}).hear(attempt, c) }()
		select {
		case <-c.ring:
			return nil
		case err := <-heard:
			return err
		}
	}
	webhookLife := func() error {
		s, _, err := life("webhook")
		defer s.close(ctx)
		return errors.Join(err, s.check(ctx), errOf(s.survey(ctx, "")))
	}
	for user, c := range map[string]struct {
		rule string
		live func() error
	}{"sidecar": {sidecarACL, sidecarLife}, "webhook": {webhookACL, webhookLife}} {
		must(t, c.live())
		for rule := range strings.FieldsSeq(c.rule) {
			command, isCommand := strings.CutPrefix(rule, "+")
			if !isCommand || command == "ping" { // which webhooks asked before, and still ask beside new ones
				continue
			}
			r.do(t, "ACL", "SETUSER", user, "-"+command)
			r.do(t, "SCRIPT", "FLUSH")
			r.do(t, "ACL", "LOG", "RESET")
			err := c.live()
			if denied, _ := redis.Values(r.do(t, "ACL", "LOG"), nil); err == nil && len(denied) > 0 {
				err = errors.New("NOPERM, for which it makes up") // a waiter that cannot be called asks
			}
			if err == nil || !isDenied(err) {
				t.Errorf("%s without %s: %v", user, rule, err)
			}
			r.do(t, "ACL", "SETUSER", user, rule)
		}
		must(t, c.live())
	}

	settings := redisSettings{username: "sidecar", password: testPassword, caFile: filepath.Join(dir, "tls.crt")}
	conn, err := dialRedis(ctx, "rediss://"+r.address, settings, time.Second)
	must(t, err)
	defer conn.Close()
	for _, command := range []string{"FLUSHALL", "KEYS *", "CONFIG GET *", "ACL LIST", "PING", "GET other", "SET other 1", "PUBLISH other x",
		"LRANGE queue/{a/b} 0 -1", "ZADD other 1 a", "RPUSH other a", "SCRIPT FLUSH", "SHUTDOWN", "MONITOR", "SUBSCRIBE c"} {
		words := strings.Fields(command)
		var args []any
		for _, w := range words[1:] {
			args = append(args, w)
		}
		if reply, err := conn.Do(words[0], args...); err == nil || !strings.HasPrefix(err.Error(), "NOPERM") {
			t.Errorf("%s: answered %v, %v", command, reply, err)
		}
	}
}

// What is wrong with the credentials or the certificate is said, without the password.
func TestRedisRefusesUs(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	writeCertificate(t, dir, 1)
	writeCertificate(t, elsewhere, 2)
	r := startSecureRedis(t, dir)
	ca := filepath.Join(dir, "tls.crt")
	for want, settings := range map[string]redisSettings{
		"WRONGPASS":                        {username: "webhook", password: "wrong-" + testPassword, caFile: ca},
		"NOAUTH":                           {caFile: ca},
		"certificate signed by unknown au": {username: "webhook", password: testPassword, caFile: filepath.Join(elsewhere, "tls.crt")},
		"no such file or directory":        {username: "webhook", password: testPassword, caFile: filepath.Join(elsewhere, "none")},
	} {
		c := testConfig("rediss://" + r.address)
		c.redis = settings
		s := newSemaphores(c.sharedConfig, nil, 1, testSemaphores(t, r.address).log)
		err := s.check(context.Background())
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), testPassword) {
			t.Errorf("got %v, want %q", err, want)
		}
		s.queue.close()
	}
}
