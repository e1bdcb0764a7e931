package main

import (
	"errors"
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
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
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
		if got := holdsAll.rules(user, nil); sortedWords(got) != sortedWords(want) {
			t.Errorf("%s has\n%s, documented is\n%s", user, sortedWords(got), sortedWords(want))
		}
	}
	own, both := holdsTokens.rules(namespaceUser("shop"), nil), sharedKeys{namespaceUser("shop"): {"a", "b"}}
	for _, key := range []string{"a", "b"} {
		for _, part := range []string{"queue", "inflight", "waiters", "seen", "names", "state", "history"} {
			own += " ~" + part + "/{@/" + key + "}"
		}
		own += " &waiters/{@/" + key + "}/*"
	}
	if got := holdsTokens.rules(namespaceUser("shop"), both); sortedWords(got) != sortedWords(own) {
		t.Errorf("with shared semaphores, it has\n%s, want\n%s", sortedWords(got), sortedWords(own))
	}
	if !strings.Contains(page, "`"+lockRules+"`") || !strings.Contains(page, "`"+groupRules+"`") {
		t.Errorf("%q or %q is not documented", lockRules, groupRules)
	}
	for user, want := range map[string]string{"webhook": lockACL + " " + webhookLockACL, "gate": lockACL,
		namespaceUser("shop"): rig.NamespaceRules(lockACL, "shop"), "status": "",
		userOfReplicas: "", userOfSetup: setupRules} {
		if got := holdsLocks.rules(user, nil); sortedWords(got) != sortedWords(want) {
			t.Errorf("on a lock server, %s has\n%s, want\n%s", user, got, want)
		}
	}
	for _, user := range []string{"webhook", "gate", namespaceUser("shop")} {
		if rules := holdsTokens.rules(user, nil); strings.Contains(rules, "lock/") || strings.Contains(rules, "+set") {
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
	r.write(t, p.file(holdsAll, nil))
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
	return userServerWants{users: map[redisDuty]map[string]string{holdsAll: p.users(holdsAll, nil)}, logins: logins}
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

// A length is not for pods to set: of the users that setup makes, only status and webhook
// may run the script. For all others, Redis stays as it is.
func TestUsersThatSetALength(t *testing.T) {
	t.Parallel()
	namespace := namespaceUser("shop")
	r := startUsersRedis(t, samplePasswords(namespace))
	rig.Must(t, r.LoadScripts())
	id := semaphoreID{"shop", "web"}
	of := func(user string) *semaphores {
		c := testConfig(r.Address)
		c.queueRedisAddress = mustAddress(r.Address)
		c.redis = redisSettings{username: user, password: user}
		return semaphoresOf(t, c)
	}
	contents := func() string {
		return fmt.Sprint(r.Do(t, "HGETALL", id.stateKey()), r.Do(t, "KEYS", "*"), r.Do(t, "EXPIRETIME", id.stateKey()))
	}
	ctx := t.Context()
	for _, user := range []string{"status", "webhook"} {
		s := of(user)
		rig.Must(t, s.setLimit(ctx, id, limit{known: true, length: 3}, time.Hour, false))
		_, _, err := s.setOverride(ctx, id, override{length: 1, note: "db upgrade"}, time.Hour)
		rig.Must(t, err)
		d, err := of(namespace).inspect(ctx, id, detailMost) // a sidecar may look
		if err != nil || d.setting.override.length != 1 || d.setting.limit.length != 3 {
			t.Errorf("%s: got %+v, %v", user, d.setting, err)
		}
	}
	for _, user := range []string{namespace, "gate"} {
		s, before := of(user), contents()
		_, _, failed := s.setOverride(ctx, id, override{length: 9}, time.Hour)
		_, _, failedToo := s.clearOverride(ctx, id)
		for what, err := range map[string]error{
			"a limit":     s.setLimit(ctx, id, limit{known: true, length: 9}, time.Hour, false),
			"an override": failed,
			"no override": failedToo,
		} {
			if err == nil || !isDenied(err) {
				t.Errorf("%s sets %s: got %v, want NOPERM", user, what, err)
			}
		}
		if after := contents(); after != before {
			t.Errorf("%s has changed Redis:\n%s\n%s", user, before, after)
		}
	}
	env := map[string]string{"REDIS_USERNAME": namespace, "REDIS_PASSWORD": namespace, "QUEUE_REDIS_ADDRESS": r.Address}
	before := contents()
	code, _, stderr := runArgs(env, "status", "pause", id.String(), "--for=1h", "--yes")
	if code != 1 || !strings.Contains(stderr, "run status in a container of the webhook") {
		t.Errorf("a sidecar pauses: exit code %d, %s", code, stderr)
	}
	if after := contents(); after != before {
		t.Errorf("a sidecar has changed Redis:\n%s\n%s", before, after)
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
	rig.Must(t, os.WriteFile(users, []byte(p.file(holdsAll, nil)+"user test on >test ~* &* +@all\n"), 0o600))
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

// mustSettings parses lines of the ConfigMap semaphores.
func mustSettings(t *testing.T, lines ...string) *ownerSettings {
	t.Helper()
	s, err := parseOwnerSettings([][]byte{[]byte(strings.Join(lines, "\n"))})
	rig.Must(t, err)
	return &s
}

// wantShares waits until Redis, and the file that it reads at its start, have these
// shared semaphores for the users of namespaces.
func (r *usersRedis) wantShares(u *usersTest, want map[string]string) {
	u.Helper()
	rig.Eventually(u.T, 30*time.Second, func() error {
		list, err := redis.Strings(r.Do(u.T, "ACL", "LIST"), nil)
		rig.Must(u.T, err)
		now := parseSharedKeys(strings.Join(list, "\n"))
		saved := parseSharedKeys(value(u.secret(usersHome, usersSecret), usersFile))
		for namespace, keys := range want {
			user := namespaceUser(namespace)
			if got := strings.Join(now[user], " "); got != keys || strings.Join(saved[user], " ") != keys {
				return fmt.Errorf("%s may use %q, saved are %q; want %q", user, got, saved[user], keys)
			}
		}
		return nil
	})
}

// wantLooks waits until setup has looked at Redis n more times.
func (r *usersRedis) wantLooks(t *testing.T, n int) {
	t.Helper()
	asked, own := r.CommandCalls(t)["info"], 0 // the test asks, too
	rig.Eventually(t, 30*time.Second, func() error {
		own++
		if looks := r.CommandCalls(t)["info"] - asked - own; looks < n {
			return fmt.Errorf("setup has looked %d times", looks)
		}
		return nil
	})
}

// The sidecars of a listed namespace may do on a shared semaphore what they may do on
// their own, and nothing on another. Off the list, a namespace keeps what its pods use.
func TestUsersOfSharedSemaphores(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	u.times.unlisted = 0
	r := u.redis()
	rig.Must(t, r.LoadScripts())
	u.owners.Store(mustSettings(t, "@matlab length=5 namespaces=shop,lab-*", "@disk length=2 namespaces=shop"))
	for _, namespace := range []string{"shop", "lab-1", "blog"} {
		u.open(namespace)
	}
	_, _, stop := u.start()
	r.wantShares(u, map[string]string{"shop": "disk matlab", "lab-1": "matlab", "blog": ""})

	ctx, matlab := t.Context(), semaphoreID{shared, "matlab"}
	c := testConfig(r.Address)
	c.queueRedisAddress = mustAddress(r.Address)
	c.redis = redisSettings{username: "sidecar/lab-1", password: u.password("lab-1")}
	s := semaphoresOf(t, c)
	commands := func(id semaphoreID) map[string]error {
		token := uuid.NewString()
		_, _, full := s.acquire(ctx, id, "", 1, limit{}, time.Second)
		if errors.As(full, new(*fullError)) { // by a young Redis
			full = nil
		}
		_, lost := s.heartbeat(ctx, id, token, "", "", 0, 1)
		_, failed := s.release(ctx, id, token, "")
		return map[string]error{"acquire": full, "heartbeat": lost, "release": failed}
	}
	for what, err := range commands(matlab) {
		if err != nil {
			t.Errorf("%s on %s: %v", what, matlab, err)
		}
	}
	for _, id := range []semaphoreID{{shared, "disk"}, {shared, "matlab-2"}, {"shop", "web"}} {
		for what, err := range commands(id) {
			if err == nil || !isDenied(err) {
				t.Errorf("%s on %s: got %v, want NOPERM", what, id, err)
			}
		}
	}
	if err := s.setLimit(ctx, matlab, limit{known: true, length: 9}, time.Hour, false); err == nil || !isDenied(err) {
		t.Errorf("set: got %v, want NOPERM", err)
	}

	u.pod("shop", "user", 0)
	_, status := u.api.Store.Change("shop", "user", func(p *corev1.Pod) {
		args := p.Spec.InitContainers[0].Args
		args[len(args)-2] = "@matlab"
	})
	u.wantOK(status)
	u.owners.Store(mustSettings(t, "@disk length=2 namespaces=blog"))
	left := map[string]string{"shop": "matlab", "lab-1": "", "blog": "disk"}
	r.wantShares(u, left)
	if err := commands(matlab)["heartbeat"]; err == nil || !isDenied(err) {
		t.Errorf("lab-1 is off the list: got %v, want NOPERM", err)
	}

	// A setup that knows no settings takes nothing away: it has not heard of them yet, or
	// the ConfigMap is bad.
	stop()
	u.unheard.Store(true)
	u.start()
	r.wantLooks(t, 3)
	r.wantShares(u, left)
	u.unheard.Store(false)
	r.wantLooks(t, 3)
	r.wantShares(u, left)
	_, status = u.api.Store.Change("shop", "user", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
	u.wantOK(status)
	r.wantShares(u, map[string]string{"shop": "", "lab-1": "", "blog": "disk"})
}

// newShareTest returns a look with users of some namespaces, all labelled.
func newShareTest(settings *ownerSettings, sharing sharedKeys, namespaces ...string) *userLook {
	l := &userLook{userKeeper: &userKeeper{times: newUserTimes(), pods: map[string]podsSeen{},
		owners: func() (ownerSettings, bool) { return *settings, true }},
		accepted: userPasswords{}, namespaces: map[string]*corev1.Namespace{}, problems: map[string]error{}}
	for _, namespace := range namespaces {
		user := namespaceUser(namespace)
		l.accepted[user] = []userPassword{{hashPassword(user), time.Now()}}
		l.namespaces[namespace] = new(corev1.Namespace)
		l.pods[namespace] = podsSeen{at: time.Now()}
	}
	l.users = &corev1.Secret{Data: map[string][]byte{usersFile: []byte(l.accepted.file(holdsAll, sharing))}}
	return l
}

// A webhook that has not heard that a namespace is off the list may still admit its pods.
// So the namespace keeps the semaphore for a while, also without such a pod.
func TestSharedSemaphoreIsKeptForAWhile(t *testing.T) {
	t.Parallel()
	settings := mustSettings(t)
	l := newShareTest(settings, sharedKeys{"sidecar/shop": {"matlab"}}, "shop")
	want := func(keys ...string) {
		t.Helper()
		if l.share(t.Context()); !slices.Equal(l.sharing["sidecar/shop"], keys) {
			t.Errorf("shop may use %q, want %q", l.sharing["sidecar/shop"], keys)
		}
	}
	age := func(d time.Duration) { l.unlisted["sidecar/shop matlab"] = time.Now().Add(-d) }
	want("matlab")
	age(l.times.unlisted - time.Minute)
	want("matlab")
	*settings = *mustSettings(t, "@matlab length=1 namespaces=shop") // listed again, it counts anew
	want("matlab")
	*settings = *mustSettings(t)
	want("matlab")
	age(l.times.unlisted)
	want()
}

// If usersSecret would become too large, each namespace keeps what it has.
func TestTooManySharedSemaphores(t *testing.T) {
	t.Parallel()
	var namespaces []string
	for i := range 1500 {
		namespaces = append(namespaces, fmt.Sprintf("shop-%06d", i))
	}
	before := sharedKeys{"sidecar/shop-000007": {"a"}}
	l := newShareTest(mustSettings(t, "@a length=1 namespaces=*", "@b length=1 namespaces=shop-*"), before, namespaces...)
	l.share(t.Context())
	if l.size() > maxSecret || len(l.sharing["sidecar/shop-000007"]) != 1 || len(l.sharing["sidecar/shop-000008"]) > 0 {
		t.Errorf("%d bytes; some may use %q and %q", l.size(), l.sharing["sidecar/shop-000007"], l.sharing["sidecar/shop-000008"])
	}
	if err := l.problems["Secret "+usersSecret]; err == nil || !strings.Contains(err.Error(), "no namespace gets more") {
		t.Errorf("got %v", err)
	}
}
