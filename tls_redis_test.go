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
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// What the users of the webhook and of the sidecar need in Redis, as docs/security.md has it.
const (
	webhookACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~lock/* &waiters/* +eval +evalsha +time +scan +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del +zadd +zrem +zcard +zcount +zrange +zrangebyscore +zscore +zremrangebyscore +ttl +expire +publish +set +get"
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
func startSecureRedis(t *testing.T, dir string) *rig.Redis {
	t.Helper()
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	listen := func(port string) []string {
		args := []string{"--port", "0", "--tls-port", port, "--tls-cert-file", crt, "--tls-key-file", key, "--tls-ca-cert-file", crt, "--tls-auth-clients", "no"}
		for _, user := range []string{"default on >admin ~* &* +@all", "webhook on >" + rig.Password + " " + webhookACL, "sidecar on >" + rig.Password + " " + sidecarACL} {
			args = append(append(args, "--user"), strings.Fields(user)...)
		}
		return args
	}
	roots, err := readCA(crt)
	rig.Must(t, err)
	return rig.StartRedisWith(t, rig.RedisOptions{Args: listen,
		Dial: []redis.DialOption{redis.DialUseTLS(true), redis.DialTLSConfig(&tls.Config{RootCAs: roots}), redis.DialPassword("admin")}})
}

// The rules in docs/security.md are those that are tested here.
func TestACLsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("docs/security.md")
	rig.Must(t, err)
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
	rig.Must(t, err)
	want := map[string][]string{
		"webhook":    {withoutLock(webhookACL) + " " + forgottenACL, lockACL},
		"sidecar":    {}, // the namespaces have users of their own, see TestNamespaceUsersFollowTheirFiles
		"gate":       {withoutLock(sidecarACL) + " " + gateACL, lockACL},
		"namespaces": {namespacesACL, namespacesACL},
		"status":     {statusACL + " " + releaseACL + " " + sentinelACL},
		"default":    {"off", "on resetpass ~* &* +@all", "on nopass resetchannels -@all +ping " + ofSentinelsACL},
	}
	got := map[string][]string{}
	for line := range strings.Lines(string(scripts)) {
		words := rig.UserLine(line)
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
	rig.Must(t, err)
	manifest, err := os.ReadFile("deploy/base/redis.yaml")
	rig.Must(t, err)
	if want := fmt.Sprintf("scripts: %q", fmt.Sprintf("%x", sha256.Sum256(scripts))[:12]); !strings.Contains(string(manifest), want) {
		t.Errorf("the annotation in deploy/base/redis.yaml must be %s", want)
	}
}

// sorted is a text with its words in order.
func sorted(text string) string { return strings.Join(slices.Sorted(strings.FieldsSeq(text)), " ") }

// On a server for the lock, nothing can be left out of the rules for it, and nothing is missing.
func TestLockACLIsMinimal(t *testing.T) {
	r := rig.StartRedis(t)
	settings := redisSettings{username: "locker", password: rig.Password}
	lock := func() error {
		l := newRedlock([]string{r.Address}, settings, 1)
		defer l.close()
		unlock, err := l.tryLock(t.Context(), freshID().lockKey(), time.Minute)
		if err != nil {
			return err
		}
		return unlock(t.Context())
	}
	rules := strings.Fields(lockACL)
	r.Do(t, "ACL", append([]any{"SETUSER", "locker", "on", ">" + rig.Password}, rig.Anys(rules)...)...)
	rig.Must(t, lock())
	for _, rule := range rules[1:] {
		r.Do(t, "ACL", "SETUSER", "locker", "-"+rule[1:])
		if err := lock(); err == nil || !isDenied(err) {
			t.Errorf("without %s: %v", rule, err)
		}
		r.Do(t, "ACL", "SETUSER", "locker", rule)
	}
}

// The whole job over TLS, with the users of docs/security.md.
func TestRedisWithTLSAndACL(t *testing.T) {
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	r := startSecureRedis(t, dir)
	address, ca := "rediss://"+r.Address, filepath.Join(dir, "tls.crt")
	c := testConfig(address)
	c.redis = redisSettings{username: "webhook", password: rig.Password, caFile: ca}
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

// The rules allow what the sidecar and the webhook do, and all that they allow is needed.
func TestACLsAreMinimal(t *testing.T) {
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	r := startSecureRedis(t, dir)
	ctx, address := context.Background(), "rediss://"+r.Address
	semaphoresOf := func(user string) *semaphores {
		c := testConfig(address)
		c.redis = redisSettings{username: user, password: rig.Password, caFile: filepath.Join(dir, "tls.crt")}
		return newSemaphores(c.settings, newLocker(c.settings, lockConnections), 1, slog.New(slog.DiscardHandler))
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
		if r.Do(t, "EXISTS", id.lockKey()) != int64(0) {
			return s, id, errors.New("NOPERM: the lock was not freed")
		}
		for _, length := range []int{3, 2} { // refill, trim
			if err := s.maintain(ctx, id, length, true); err != nil {
				return s, id, err
			}
			r.ForgetLength(t, id)
		}
		token, _, err := s.acquire(ctx, id, "", 1, time.Second)
		if err != nil {
			return s, id, err
		}
		r.Do(t, "ZADD", id.waitersKey(), 1, "gone")
		r.Do(t, "ZADD", id.seenKey(), 1, "gone")
		r.Do(t, "HSET", id.namesKey(), "gone", 1)
		r.Do(t, "ZADD", id.waitersKey(), 2, "there")
		r.Do(t, "ZADD", id.seenKey(), time.Now().Unix(), "there")
		if _, err := s.release(ctx, id, token); err != nil {
			return s, id, err
		}
		r.Do(t, "ZADD", id.inflightKey(), 99999999999, uuid.NewString()) // to be caught up with
		r.ForgetLength(t, id)
		if err := s.maintain(ctx, id, 1, true); err != nil { // trim to nothing
			return s, id, err
		}
		_, err = s.runAcquire(ctx, id, acquireRequest{token: uuid.NewString(), length: 1})
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
		if _, err := s.runAcquire(ctx, id, acquireRequest{other, 1, joinLine, ""}); err != nil {
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
		subscribed := newWakeup()
		calls := newSubscription(s.queue, id, s.log)
		calls.add(subscribed, id, token)
		heard := make(chan error, 1)
		go func() { heard <- calls.receive(attempt) }()
		select {
		case <-subscribed:
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
		rig.Must(t, c.live())
		for rule := range strings.FieldsSeq(c.rule) {
			command, isCommand := strings.CutPrefix(rule, "+")
			if !isCommand {
				continue
			}
			r.Do(t, "ACL", "SETUSER", user, "-"+command)
			r.Do(t, "SCRIPT", "FLUSH")
			r.Do(t, "ACL", "LOG", "RESET")
			err := c.live()
			if denied, _ := redis.Values(r.Do(t, "ACL", "LOG"), nil); err == nil && len(denied) > 0 {
				err = errors.New("NOPERM, for which it makes up") // a waiter that cannot be called asks
			}
			if err == nil || !isDenied(err) {
				t.Errorf("%s without %s: %v", user, rule, err)
			}
			r.Do(t, "ACL", "SETUSER", user, rule)
		}
		rig.Must(t, c.live())
	}

	settings := redisSettings{username: "sidecar", password: rig.Password, caFile: filepath.Join(dir, "tls.crt")}
	conn, err := dialRedis(ctx, "rediss://"+r.Address, settings, time.Second)
	rig.Must(t, err)
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
	rig.WriteCertificate(t, dir, 1)
	rig.WriteCertificate(t, elsewhere, 2)
	r := startSecureRedis(t, dir)
	ca := filepath.Join(dir, "tls.crt")
	for want, settings := range map[string]redisSettings{
		"WRONGPASS":                        {username: "webhook", password: "wrong-" + rig.Password, caFile: ca},
		"NOAUTH":                           {caFile: ca},
		"certificate signed by unknown au": {username: "webhook", password: rig.Password, caFile: filepath.Join(elsewhere, "tls.crt")},
		"no such file or directory":        {username: "webhook", password: rig.Password, caFile: filepath.Join(elsewhere, "none")},
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
