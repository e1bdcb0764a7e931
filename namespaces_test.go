package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// deployedScript is a script of deploy/base/redis-scripts.yaml.
func deployedScript(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("deploy/base/redis-scripts.yaml")
	rig.Must(t, err)
	_, rest, ok := strings.Cut(string(text), "\n  "+name+": |\n")
	if !ok {
		t.Fatalf("there is no script %s", name)
	}
	var script strings.Builder
	for line := range strings.Lines(rest) {
		if strings.TrimSpace(line) != "" && !strings.HasPrefix(line, "    ") {
			break
		}
		script.WriteString(strings.TrimPrefix(line, "    "))
	}
	return script.String()
}

// deployedServers are a Redis for tokens and one for locks, as a pod of deploy/ has them, and the folder of the passwords of namespaces.
type deployedServers struct {
	tokens, locks   *rig.Redis
	scripts, folder string
}

func startDeployedServers(t *testing.T) *deployedServers {
	t.Helper()
	s := &deployedServers{tokens: rig.StartRedis(t), locks: rig.StartRedis(t), scripts: t.TempDir(), folder: t.TempDir()}
	here := strings.NewReplacer("/etc/redis-namespaces", s.folder, "/etc/redis/", s.scripts+"/",
		"6379", rig.Port(s.tokens.Address), "6380", rig.Port(s.locks.Address))
	for _, name := range []string{"namespaces", "namespace"} {
		rig.Must(t, os.WriteFile(filepath.Join(s.scripts, name), []byte(here.Replace(deployedScript(t, name))), 0o600))
	}
	for _, server := range []*rig.Redis{s.tokens, s.locks} {
		server.Do(t, "ACL", append([]any{"SETUSER", namespacesUser, "on", ">" + rig.Password}, rig.Anys(strings.Fields(namespacesACL))...)...)
	}
	return s
}

// command is a shell that runs a script beside those of deploy/.
func (s *deployedServers) command(script string) *exec.Cmd {
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = s.scripts
	cmd.Env = append(os.Environ(), "REPLICATION_PASSWORD="+rig.Password)
	return cmd
}

func (s *deployedServers) run(t *testing.T, stdin, script string) string {
	t.Helper()
	cmd := s.command(script)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// sidecars are what the sidecars of a namespace can do.
func (s *deployedServers) sidecars(t *testing.T, namespace, password string) *semaphores {
	t.Helper()
	c := testConfig(s.tokens.Address)
	c.queueRedisAddress, c.redisAddresses = mustAddress(s.tokens.Address), []string{s.locks.Address}
	c.redis = redisSettings{username: namespaceUser(namespace), password: password}
	return semaphoresOf(t, c)
}

// lives reports whether they can do all that they need, on a semaphore of their own.
func (s *deployedServers) lives(t *testing.T, all *semaphores, namespace string) error {
	id := semaphoreID{namespace, uuid.NewString()}
	token, _, err := all.acquire(t.Context(), id, "", 1, time.Second) // with a repair
	if err != nil {
		return err
	}
	w := newWaiter(all, id, 1)
	done := make(chan error, 1)
	go func() { done <- w.waitOnly(t.Context()) }()
	rig.Eventually(t, 10*time.Second, func() error {
		line, err := s.tokens.Line(id)
		if err == nil && !slices.Contains(line, w.token) {
			err = fmt.Errorf("in line are %v", line)
		}
		return err
	})
	_, err = all.heartbeat(t.Context(), id, token, "", 0)
	if _, e := all.release(t.Context(), id, token); e != nil || err != nil {
		return errors.Join(err, e)
	}
	return <-done
}

// The sidecars of a namespace can do with its semaphores what they have to, and nothing with those of another: neither read, take, give
// back, wait, call nor list.
func TestNamespacesAreKeptApart(t *testing.T) {
	s := startDeployedServers(t)
	s.run(t, "shop-password\n", "sh namespace shop")
	s.run(t, "other-password\n", "sh namespace shop-2")
	shop := s.sidecars(t, "shop", "shop-password")
	rig.Must(t, s.lives(t, shop, "shop"))
	rig.Must(t, s.lives(t, s.sidecars(t, "shop-2", "other-password"), "shop-2"))

	id := semaphoreID{"shop-2", "web"}
	admin := testConfig(s.tokens.Address)
	admin.queueRedisAddress = mustAddress(s.tokens.Address)
	owner := semaphoresOf(t, admin)
	token := acquire(t, owner, id, 2)
	rig.Must(t, owner.maintain(t.Context(), id, 2, true))
	wantDenied := func(what string, err error) {
		t.Helper()
		if err == nil || !isDenied(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, _, err := shop.acquire(t.Context(), id, "", 2, time.Second)
	wantDenied("acquire", err)
	_, err = shop.runAcquire(t.Context(), id, acquireRequest{uuid.NewString(), 2, joinLine, ""})
	wantDenied("join the line", err)
	_, err = shop.heartbeat(t.Context(), id, uuid.NewString(), "", 0)
	wantDenied("heartbeat", err)
	_, err = shop.release(t.Context(), id, token)
	wantDenied("release", err)
	wantDenied("maintain", shop.maintain(t.Context(), id, 2, true))
	_, err = shop.locks.tryLock(t.Context(), id.lockKey(), time.Second)
	wantDenied("lock", err)
	_, err = shop.survey(t.Context(), "shop-2")
	wantDenied("survey", err)
	_, err = shop.inspect(t.Context(), id)
	wantDenied("inspect", err)

	server := serverOf(t, shop, id)
	for _, command := range [][]any{
		{"SUBSCRIBE", id.channel(token)}, {"PSUBSCRIBE", "*"}, {"PUBLISH", id.channel(token), yourTurn}, {"SCAN", 0}, {"KEYS", "*"}, {"RANDOMKEY"},
		{"ACL", "LIST"}, {"ACL", "USERS"}, {"ACL", "WHOAMI"}, {"CONFIG", "GET", "*"}, {"MONITOR"}, {"FLUSHALL"}, {"PUBSUB", "CHANNELS"}, {"OBJECT", "FREQ", id.queueKey()},
		{"ZRANGE", id.inflightKey(), 0, -1}, {"HMGET", id.namesKey(), token}, {"LLEN", id.queueKey()}, {"RPUSH", id.queueKey(), "free"}, {"DEL", id.stateKey()},
		{"EVAL", "return redis.call('LPOP', '" + id.queueKey() + "')", 0}, {"EVAL", "return redis.call('DEL', KEYS[1])", 1, id.waitersKey()},
	} {
		conn := server.pool.Get()
		_, err := conn.Do(command[0].(string), command[1:]...)
		wantDenied(fmt.Sprint(command...), err)
		conn.Close()
	}
	s.tokens.WantCounts(t, id, 1, 1)
}

// Passwords come, are replaced and go while the servers run: what is connected stays so, and older passwords are good for as long as they
// are there.
func TestNamespaceUsersFollowTheirFiles(t *testing.T) {
	s := startDeployedServers(t)
	write := func(namespace, passwords string) {
		t.Helper()
		rig.Must(t, os.WriteFile(filepath.Join(s.folder, namespace), []byte(passwords), 0o600))
	}
	wantUsers := func(want ...string) {
		t.Helper()
		rig.Eventually(t, 20*time.Second, func() error {
			for _, server := range []*rig.Redis{s.tokens, s.locks} {
				users, err := redis.Strings(server.Control.Do("ACL", "USERS"))
				users = slices.DeleteFunc(users, func(u string) bool { return !strings.HasPrefix(u, namespaceUser("")) })
				slices.Sort(users)
				if err != nil || !slices.Equal(users, want) {
					return fmt.Errorf("%s has the users %q, want %q (%v)", server.Address, users, want, err)
				}
			}
			return nil
		})
	}
	follow := rig.NewProcessOf(s.command(". ./namespaces; follow"))
	follow.Start(t)
	write("shop", "first 2026-01-01T00:00:00Z\n")
	wantUsers("sidecar/shop")
	ofShop := func(rules string) string {
		return sorted("user sidecar/shop on >first " + strings.NewReplacer("~lock/* ", "~lock/{shop/*} ", "&waiters/*", "&waiters/{shop/*", "/* ", "/{shop/*} ").Replace(rules))
	}
	for server, rules := range map[*rig.Redis]string{s.tokens: withoutLock(sidecarACL), s.locks: lockACL} {
		if line := s.run(t, "", ". ./namespaces; users "+rig.Port(server.Address)); sorted(line) != ofShop(rules) {
			t.Errorf("in the configuration is\n%s, want\n%s", sorted(line), ofShop(rules))
		}
	}
	old := s.sidecars(t, "shop", "first")
	rig.Must(t, s.lives(t, old, "shop"))
	id := semaphoreID{"shop", "held"}
	connected, err := redis.Dial("tcp", s.tokens.Address, redis.DialUsername(namespaceUser("shop")), redis.DialPassword("first"))
	rig.Must(t, err)
	defer connected.Close()

	write("shop", "second 2026-01-02T00:00:00Z\nfirst 2026-01-01T00:00:00Z\n")
	write("blog", "blog\n")
	wantUsers("sidecar/blog", "sidecar/shop")
	rig.Must(t, errOf(connected.Do("TIME")))
	rig.Must(t, s.lives(t, s.sidecars(t, "shop", "second"), "shop"))
	rig.Must(t, s.lives(t, s.sidecars(t, "shop", "first"), "shop"))
	rig.Must(t, s.lives(t, old, "shop"))

	// What was told at once is what the file says later.
	s.run(t, "third\n", "sh namespace shop")
	acquire(t, s.sidecars(t, "shop", "third"), id, 1)
	rig.Must(t, errOf(connected.Do("TIME")))
	write("shop", "third 2026-01-03T00:00:00Z\n")
	rig.Must(t, os.Remove(filepath.Join(s.folder, "blog"))) // by mistake
	rig.Eventually(t, 20*time.Second, func() error {
		conn, err := redis.Dial("tcp", s.locks.Address, redis.DialUsername(namespaceUser("shop")), redis.DialPassword("second"))
		if err == nil {
			conn.Close()
			return errors.New("a password that is gone is good yet")
		}
		return nil
	})
	wantUsers("sidecar/blog", "sidecar/shop")
	rig.Must(t, s.lives(t, s.sidecars(t, "shop", "third"), "shop"))
	if err := s.lives(t, s.sidecars(t, "shop", "second"), "shop"); err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
		t.Errorf("with a password that is gone: %v", err)
	}
	for _, namespace := range []string{"shop", "blog"} {
		s.run(t, "", "sh namespace "+namespace)
	}
	wantUsers()
	if out, err := s.command("REPLICATION_PASSWORD=wrong sh namespace shop </dev/null").CombinedOutput(); err == nil || !strings.Contains(string(out), "WRONGPASS") {
		t.Errorf("with a wrong password: %v: %s", err, out)
	}
}

// Whoever creates a pod in a namespace that was forgotten hears the command that is missing, and nobody hears it where users are made
// by other means.
func TestForgottenNamespace(t *testing.T) {
	r := rig.StartRedis(t)
	setUser := func(name string, rules ...string) {
		t.Helper()
		r.Do(t, "ACL", append([]any{"SETUSER", name, "on", ">" + rig.Password}, rig.Anys(strings.Fields(strings.Join(rules, " ")))...)...)
	}
	setUser("webhook", webhookACL, "+role +cluster|slots")
	c := testConfig(r.Address)
	c.redis = redisSettings{username: "webhook", password: rig.Password}
	c.sidecarRedisSecret = "redis"
	warned := func(c webhookConfig) (w *testWebhook, warnings string) {
		t.Helper()
		w = startWebhook(t, c)
		return w, strings.Join(w.admit(t, rig.Review(t, semaphoreID{"shop", uuid.NewString()}, 1)).Warnings, "; ")
	}
	want := fmt.Sprintf(warningForgotten, "shop")
	for _, step := range []struct {
		what string
		do   func()
		want string
	}{
		{"without the right to ask", func() { setUser(namespacesUser) }, ""},
		{"forgotten", func() { setUser("webhook", forgottenACL) }, want},
		{"another namespace's user", func() { setUser(namespaceUser("shop-2")) }, want},
		{"a user of no namespace", func() { setUser("sidecar") }, want},
		{"its own user", func() { setUser(namespaceUser("shop")) }, ""},
		{"users made by other means", func() { r.Do(t, "ACL", "DELUSER", namespacesUser, namespaceUser("shop")) }, ""},
	} {
		step.do()
		if _, got := warned(c); got != step.want {
			t.Errorf("%s: warned of %q, want %q", step.what, got, step.want)
		}
	}

	setUser(namespacesUser)
	for _, whenFull := range whenFullChoices {
		c.whenFull = whenFull
		if w, got := warned(c); !strings.HasPrefix(got, want) {
			t.Errorf("%s: warned of %q", whenFull, got)
		} else if a := w.admit(t, rig.Review(t, semaphoreID{"shop", "job"}, 1, asJob)); len(a.Warnings) == 0 || a.Warnings[0] != want {
			t.Errorf("of a Job: warned of %q", a.Warnings)
		}
	}

	// A webhook that runs notices it, and asks seldom.
	w, _ := warned(c)
	setUser(namespaceUser("shop"))
	rig.Eventually(t, 10*time.Second, func() error {
		if a := w.admit(t, rig.Review(t, semaphoreID{"shop", "web"}, 1000)); strings.Contains(strings.Join(a.Warnings, "; "), want) {
			return errors.New("warned yet")
		}
		return nil
	})
	before := r.CommandCalls(t)["acl|users"]
	for range 20 {
		w.admit(t, rig.Review(t, semaphoreID{"shop", "web"}, 1000))
	}
	if n := r.CommandCalls(t)["acl|users"] - before; n > 0 {
		t.Errorf("asked %d times for 20 pods", n)
	}
}

// deploy/namespace.sh ends though one Redis does not hear it, as where its pod is just being replaced, and says so.
func TestNamespaceOfARedisThatHangs(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	kubectl := `#!/bin/sh
case "$*" in
*" exec "*redis-1*) exec sleep 1000 ;;
*" exec "*) cat >>told ;;
*" statefulset "*) echo statefulset/redis ;;
*"get namespace"*) echo namespace/shop ;;
*component=redis*) printf 'pod/redis-0\npod/redis-1\n' ;;
*" clock "*) echo 2026-01-01T00:00:00Z ;;
esac
`
	rig.Must(t, os.WriteFile(filepath.Join(folder, "kubectl"), []byte(strings.Replace(kubectl, "told", filepath.Join(folder, "told"), 1)), 0o700))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "deploy/namespace.sh", "shop")
	cmd.Env = append(os.Environ(), "PATH="+folder+":"+os.Getenv("PATH"))
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "pod/redis-1 does not answer") || strings.Contains(string(out), "pod/redis-0") || !strings.Contains(string(out), "as sidecar/shop") {
		t.Errorf("%v, it says:\n%s", err, out)
	}
	if told, err := os.ReadFile(filepath.Join(folder, "told")); err != nil || len(strings.Fields(string(told))) != 2 {
		t.Errorf("redis-0 was told %q, %v", told, err)
	}
}
