package main

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// sortedWords returns a text with its words sorted.
func sortedWords(text string) string {
	return strings.Join(slices.Sorted(strings.FieldsSeq(text)), " ")
}

// docs/security.md has the rules of the users that setup makes. groupRules are there for
// all users together.
func TestUserRulesAreDocumented(t *testing.T) {
	page := rig.ReadFile(t, "docs/security.md")
	documented := map[string]string{}
	line := regexp.MustCompile(`(?m)^ACL SETUSER (\S+) (?:on >PASSWORD )?(.*)$`)
	for _, m := range line.FindAllStringSubmatch(page, -1) {
		documented[m[1]] += " " + m[2]
	}
	for _, user := range []string{"webhook", "gate", "status", namespaceUser("shop"), userOfSetup} {
		want := documented[user]
		if user == "webhook" {
			want += " " + forgottenACL + " " + rig.EvictionACL
		}
		if user != userOfSetup {
			want += " " + groupRules
		}
		if got := holdsAll.rules(user); sortedWords(got) != sortedWords(want) {
			t.Errorf("%s has\n%s, documented is\n%s", user, sortedWords(got), sortedWords(want))
		}
	}
	if !strings.Contains(page, "`"+lockRules+"`") || !strings.Contains(page, "`"+groupRules+"`") {
		t.Errorf("%q or %q is not documented", lockRules, groupRules)
	}
	for user, want := range map[string]string{"webhook": lockACL + " " + webhookLockACL, "gate": lockACL,
		namespaceUser("shop"): rig.NamespaceRules(lockACL, "shop"), "status": "",
		userOfReplicas: "", userOfSetup: setupRules} {
		if got := holdsLocks.rules(user); sortedWords(got) != sortedWords(want) {
			t.Errorf("on a lock server, %s has\n%s, want\n%s", user, got, want)
		}
	}
	for _, user := range []string{"webhook", "gate", namespaceUser("shop")} {
		if rules := holdsTokens.rules(user); strings.Contains(rules, "lock/") || strings.Contains(rules, "+set") {
			t.Errorf("without locks, %s has %s", user, rules)
		}
	}
}

// samplePasswords returns the passwords of all users: each user's is its name.
func samplePasswords(users ...string) userPasswords {
	all := userPasswords{}
	for _, user := range append([]string{userOfSetup, "webhook", "gate", "status"}, users...) {
		all[user] = []userPassword{{hashPassword(user), time.Unix(1e9, 0)}}
	}
	return all
}

func TestUserPasswordsAreReadAsWritten(t *testing.T) {
	p := samplePasswords(namespaceUser("shop"))
	p["gate"] = append(p["gate"], userPassword{hashPassword("old"), time.Unix(5e8, 0)})
	read, err := parseUserPasswords(p.text())
	rig.Must(t, err)
	if read.text() != p.text() || len(read["gate"]) != 2 || read["gate"][0].hash != hashPassword("gate") {
		t.Errorf("got\n%s, want\n%s", read.text(), p.text())
	}
	hash := hashPassword("x")
	for _, wrong := range []string{"gate 1234 2026-01-01T00:00:00Z", "gate " + hash, "gate " + hash + " now"} {
		if _, err := parseUserPasswords(p.text() + wrong); err == nil || !strings.Contains(err.Error(), "line 7") {
			t.Errorf("%q: %v", wrong, err)
		}
	}
}

// usersRedis is a redis-server as in deploy/: its users are in a file. The test has one
// more user.
type usersRedis struct {
	*rig.Redis
	dir, file string
}

func startUsersRedis(t *testing.T, p userPasswords, more ...string) *usersRedis {
	t.Helper()
	dir := t.TempDir()
	r := &usersRedis{dir: dir, file: filepath.Join(dir, "users.acl")}
	r.write(t, p.file(holdsAll))
	args := func(port string) []string {
		if more == nil {
			more = rig.PlainPort(port)
		}
		return append(slices.Clone(more), "--aclfile", r.file)
	}
	r.Redis = rig.StartRedisWith(t, rig.RedisOptions{Args: args, Bare: true, Kind: rig.SingleQueue,
		Dial: []redis.DialOption{redis.DialUsername("test"), redis.DialPassword("test")}})
	return r
}

func (r *usersRedis) write(t *testing.T, users string) {
	t.Helper()
	rig.Must(t, os.WriteFile(r.file, []byte(users+"user test on >test ~* &* +@all\n"), 0o600))
}

// tryLogin logs in, and closes the connection.
func (r *usersRedis) tryLogin(user, password string) error {
	c, err := redis.Dial("tcp", r.Address, redis.DialUsername(user), redis.DialPassword(password))
	if err == nil {
		c.Close()
	}
	return err
}

// users returns the names of the users.
func (r *usersRedis) users(t *testing.T) []string {
	t.Helper()
	names, err := redis.Strings(r.Do(t, "ACL", "USERS"), nil)
	rig.Must(t, err)
	slices.Sort(names)
	return names
}

func wantsOf(p userPasswords, logins ...string) userServerWants {
	return userServerWants{users: map[redisDuty]map[string]string{holdsAll: p.users(holdsAll)}, logins: logins}
}

func TestUserServer(t *testing.T) {
	t.Parallel()
	p := samplePasswords(namespaceUser("shop"), namespaceUser("blog"))
	r := startUsersRedis(t, samplePasswords(namespaceUser("gone")))
	s := &userServer{address: r.Address}
	defer s.close()
	keep := func(p userPasswords) {
		t.Helper()
		rig.Must(t, s.keep(t.Context(), wantsOf(p, "wrong", userOfSetup)))
	}
	keep(p)
	want := []string{"default", "gate", "setup", "sidecar/blog", "sidecar/shop", "status", "test", "webhook"}
	ours := func(user string) bool { return user == rig.AdminUser }
	if got := slices.DeleteFunc(r.users(t), ours); !slices.Equal(got, want) {
		t.Fatalf("users %q, want %q", got, want)
	}

	before := r.CommandCalls(t)
	for range 5 {
		keep(p)
	}
	calls := r.CommandCalls(t)
	for name, n := range calls {
		calls[name] = n - before[name]
	}
	maps.DeleteFunc(calls, func(_ string, n int) bool { return n == 0 })
	if want := map[string]int{"info": 6}; !maps.Equal(calls, want) { // one is the test's
		t.Errorf("nothing has changed, and setup sends %v, want %v", calls, want)
	}

	// Open connections stay. The old password works until it goes.
	open, err := redis.Dial("tcp", r.Address, redis.DialUsername("sidecar/shop"), redis.DialPassword("sidecar/shop"))
	rig.Must(t, err)
	defer open.Close()
	rotated := maps.Clone(p)
	rotated["sidecar/shop"] = append([]userPassword{{hashPassword("new"), time.Now()}}, p["sidecar/shop"]...)
	delete(rotated, "sidecar/blog")
	keep(rotated)
	rig.Must(t, r.tryLogin("sidecar/shop", "new"))
	rig.Must(t, r.tryLogin("sidecar/shop", "sidecar/shop"))
	rotated["sidecar/shop"] = rotated["sidecar/shop"][:1]
	keep(rotated)
	rig.Must(t, r.tryLogin("sidecar/shop", "new"))
	if err := r.tryLogin("sidecar/shop", "sidecar/shop"); err == nil {
		t.Error("the old password still works")
	}
	_, err = open.Do("TIME")
	rig.Must(t, err)
	if slices.Contains(r.users(t), "sidecar/blog") {
		t.Error("sidecar/blog is still there")
	}

	// A restart loses what is not in the file. Until then, an error tells of the silence.
	r.Stop()
	if err := s.keep(t.Context(), wantsOf(p, userOfSetup)); err == nil || !isUnreachable(err) {
		t.Errorf("a server that is away: %v", err)
	}
	rig.Must(t, r.Start())
	keep(rotated)
	rig.Must(t, r.tryLogin("sidecar/shop", "new"))
	if slices.Contains(r.users(t), "sidecar/gone") {
		t.Error("sidecar/gone is there again")
	}

	// Other hands have deleted a user.
	r.Do(t, "ACL", "DELUSER", "sidecar/shop")
	s.since = s.since.Add(-usersAgain)
	keep(rotated)
	rig.Must(t, r.tryLogin("sidecar/shop", "new"))

	// It needs all of its rights; TestRedisRereadsItsCertificate has the one for CONFIG SET.
	for _, rule := range strings.Fields(setupRules) {
		if rule == "+config|set" {
			continue
		}
		r.Do(t, "ACL", "SETUSER", "setup", "-"+rule[1:])
		r.Do(t, "ACL", "SETUSER", "sidecar/gone")
		s.made = nil
		err := s.keep(t.Context(), wantsOf(rotated, userOfSetup))
		if err == nil || !strings.Contains(err.Error(), "NOPERM") || !strings.Contains(err.Error(), setupRules) {
			t.Errorf("without %s: %v", rule, err)
		}
		r.Do(t, "ACL", "SETUSER", "setup", rule)
		keep(rotated)
	}
	r.Do(t, "ACL", "SETUSER", "setup", "resetpass")
	s.close()
	if err := s.keep(t.Context(), wantsOf(p, userOfSetup)); err == nil || !strings.Contains(err.Error(), "administrator") {
		t.Errorf("without a password: %v", err)
	}
}

// In a Redis of one's own, the password of an administrator is enough to begin with: that
// of the user setup, or of the user default.
func TestUserServerOfOnesOwn(t *testing.T) {
	t.Parallel()
	for name, user := range map[string]string{
		"a user with all rights": "setup", "the user default": "default",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := rig.StartRedisWith(t, rig.RedisOptions{Bare: true, Kind: rig.SingleQueue})
			r.Do(t, "ACL", "SETUSER", user, "on", "resetpass", ">administrator", "~*", "&*", "+@all")
			p := samplePasswords(namespaceUser("shop"))
			p[userOfSetup][0].hash = hashPassword("administrator")
			s := &userServer{address: r.Address}
			defer s.close()
			rig.Must(t, s.keep(t.Context(), wantsOf(p, "administrator")))
			s.close()
			rig.Must(t, s.keep(t.Context(), wantsOf(p, "administrator")))
			if who, err := redis.String(s.conn.Do("ACL", "WHOAMI")); err == nil || !isDenied(err) {
				t.Errorf("setup has more rights than it needs: it is %s, %v", who, err)
			}
			if user == "default" {
				rig.Must(t, (&usersRedis{Redis: r}).tryLogin("default", "administrator"))
			}
		})
	}
}

// Redis shows a renewed certificate as soon as its files have it, and connections stay.
func TestRedisRereadsItsCertificate(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	rig.WriteCertificate(t, folder, 1)
	file := func(name string) string { return filepath.Join(folder, name) }
	leafOf := func(folder string) []byte {
		c, err := loadCertificate(folder, slog.New(slog.DiscardHandler))
		rig.Must(t, err)
		return c.current.Load().Leaf.Raw
	}
	read := func(folder string) string {
		text, err := os.ReadFile(filepath.Join(folder, "tls.crt"))
		rig.Must(t, err)
		return string(text)
	}
	p := samplePasswords()
	users := file("users.acl")
	rig.Must(t, os.WriteFile(users, []byte(p.file(holdsAll)+"user test on >test ~* &* +@all\n"), 0o600))
	r := rig.StartRedisWith(t, rig.RedisOptions{Bare: true, Kind: rig.SingleQueue, Args: func(port string) []string {
		return []string{"--port", "0", "--tls-port", port, "--tls-cert-file", file("tls.crt"),
			"--tls-key-file", file("tls.key"), "--tls-ca-cert-file", file("tls.crt"), "--tls-auth-clients", "no", "--aclfile", users}
	}, Dial: []redis.DialOption{redis.DialUseTLS(true), redis.DialTLSSkipVerify(true),
		redis.DialUsername("test"), redis.DialPassword("test")}})
	s := &userServer{address: "rediss://" + r.Address}
	defer s.close()
	w := wantsOf(p, userOfSetup)
	w.redis.ca, w.leaf, w.certificates = read(folder), leafOf(folder), folder
	rig.Must(t, s.keep(t.Context(), w))

	renewed := t.TempDir()
	rig.WriteCertificate(t, renewed, 2)
	w.redis.ca, w.leaf = w.redis.ca+read(renewed), leafOf(renewed)
	r.Do(t, "ACL", "SETUSER", "setup", "-config|set")
	if err := s.keep(t.Context(), w); err == nil || !strings.Contains(err.Error(), "NOPERM") {
		t.Errorf("without +config|set: %v", err)
	}
	r.Do(t, "ACL", "SETUSER", "setup", "+config|set")
	rig.Must(t, s.keep(t.Context(), w))
	conn := s.conn
	rig.Must(t, s.keep(t.Context(), w)) // the kubelet has not written the files yet
	if slices.Equal(s.leaf, w.leaf) {
		t.Fatal("Redis shows a certificate that it does not have")
	}
	for _, name := range []string{"tls.crt", "tls.key"} {
		text, err := os.ReadFile(filepath.Join(renewed, name))
		rig.Must(t, err)
		rig.Must(t, os.WriteFile(file(name), text, 0o600))
	}
	rig.Must(t, s.keep(t.Context(), w))
	if !slices.Equal(s.leaf, w.leaf) || s.conn != conn {
		t.Errorf("Redis shows another certificate, or lost the connection of setup: %t", s.conn != conn)
	}
	before := r.CommandCalls(t)["config|set"]
	rig.Must(t, s.keep(t.Context(), w))
	if n := r.CommandCalls(t)["config|set"] - before; n > 0 {
		t.Errorf("%d times CONFIG SET without a new certificate", n)
	}
}

// wantLogin waits until a user can log in, or cannot.
func (r *usersRedis) wantLogin(t *testing.T, user, password string, can bool) {
	t.Helper()
	rig.Eventually(t, 30*time.Second, func() error {
		err := r.tryLogin(user, password)
		if (err == nil) != can {
			return fmt.Errorf("%s with the password %s: %v", user, password, err)
		}
		return nil
	})
}
