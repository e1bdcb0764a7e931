package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// usersTest is an API server with the namespace of setup.
type usersTest struct {
	*testing.T
	api    *rig.APIServer
	config setupConfig
	times  userTimes
}

const (
	usersHome     = "hook"
	sidecarSecret = "at-least-semaphore-pod-redis"
)

func newUsersTest(t *testing.T) *usersTest {
	t.Helper()
	u := &usersTest{t, rig.StartAPIServer(t),
		setupConfig{namespace: usersHome, sidecarRedisSecret: sidecarSecret}, newUserTimes()}
	u.times.every, u.times.retry, u.times.gather = time.Second, 200*time.Millisecond, 10*time.Millisecond
	u.times.pods = 100 * time.Millisecond
	u.namespace(usersHome)
	return u
}

// namespace creates a namespace without the label.
func (u *usersTest) namespace(name string) {
	u.Helper()
	_, status := u.api.Store.Namespaces.Create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
	u.wantOK(status)
}

func (u *usersTest) wantOK(status *metav1.Status) {
	u.Helper()
	if status != nil {
		u.Fatal(status.Message)
	}
}

// open labels a namespace, which it creates if there is none.
func (u *usersTest) open(namespace string) {
	u.Helper()
	if _, missing := u.api.Store.Namespaces.Get("", namespace); missing != nil {
		u.namespace(namespace)
	}
	_, status := u.api.Store.Namespaces.Change("", namespace, func(n *corev1.Namespace) {
		n.Labels = map[string]string{labelSidecars: "true"}
	})
	u.wantOK(status)
}

// close takes the label away.
func (u *usersTest) close(namespace string) {
	u.Helper()
	_, status := u.api.Store.Namespaces.Change("", namespace, func(n *corev1.Namespace) { n.Labels = nil })
	u.wantOK(status)
}

// start starts a userKeeper. It ends with the test, or by stop.
func (u *usersTest) start() (keeper *userKeeper, log *rig.Log, stop func()) {
	u.Helper()
	log = new(rig.Log)
	to := slog.New(slog.NewJSONHandler(log, nil))
	k, err := newKubernetes(clientSettings(u.api), to)
	rig.Must(u.T, err)
	changed := newWakeup()
	ofHome := k.secretsOf(usersHome, changed.wake)
	keeper = newUserKeeper(u.config, k, ofHome, changed, to)
	keeper.times = u.times
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for _, run := range []func(context.Context){k.run, ofHome.run, keeper.run} {
		all.Go(func() { run(ctx) })
	}
	stop = func() {
		cancel()
		all.Wait()
	}
	u.Cleanup(stop)
	u.Cleanup(func() {
		if u.Failed() {
			u.Logf("log of setup:\n%s", log)
		}
	})
	return keeper, log, stop
}

// secret returns a Secret; nil if there is none.
func (u *usersTest) secret(namespace, name string) *corev1.Secret {
	s, missing := u.api.Store.Secrets.Get(namespace, name)
	if missing != nil {
		return nil
	}
	return s
}

// wantSecret waits for a Secret with a value, and returns the value.
func (u *usersTest) wantSecret(namespace, name, key string) (text string) {
	u.Helper()
	rig.Eventually(u.T, 30*time.Second, func() error {
		if text = value(u.secret(namespace, name), key); text == "" {
			return fmt.Errorf("the Secret %s/%s has no %s", namespace, name, key)
		}
		return nil
	})
	return text
}

// password waits for the password of a namespace.
func (u *usersTest) password(namespace string) string {
	u.Helper()
	return u.wantSecret(namespace, sidecarSecret, "password")
}

// forget deletes a key of a Secret, as a person does who wants a new value.
func (u *usersTest) forget(namespace, name, key string) {
	u.Helper()
	_, status := u.api.Store.Secrets.Change(namespace, name, func(s *corev1.Secret) { delete(s.Data, key) })
	u.wantOK(status)
}

// wantNew waits for another value of a key.
func (u *usersTest) wantNew(namespace, name, key, old string) (text string) {
	u.Helper()
	rig.Eventually(u.T, 30*time.Second, func() error {
		if text = value(u.secret(namespace, name), key); text == "" || text == old {
			return fmt.Errorf("%s of %s/%s is still %q", key, namespace, name, text)
		}
		return nil
	})
	return text
}

// pod creates a pod with a sidecar, as old as age.
func (u *usersTest) pod(namespace, name string, age time.Duration) {
	u.Helper()
	p := rig.AdmittedPod(name, rig.ID{Namespace: namespace, Key: "web"}, 1, 10)
	p.Namespace, p.CreationTimestamp = namespace, metav1.NewTime(time.Now().Add(-age))
	_, status := u.api.Store.Create(p)
	u.wantOK(status)
}

// redis starts a Redis that knows only the user setup, and gives setup its password.
func (u *usersTest) redis() *usersRedis {
	u.Helper()
	r := startUsersRedis(u.T, userPasswords{userOfSetup: {{hashPassword("administrator"), time.Now()}}})
	u.config.redisAddresses = append(u.config.redisAddresses, r.Address)
	if u.secret(usersHome, ownSecret) == nil {
		_, status := u.api.Store.Secrets.Create(&corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: usersHome, Name: ownSecret},
			Data:       map[string][]byte{"setup-password": []byte("administrator")}})
		u.wantOK(status)
	}
	return r
}

// The first start: Redis waits for its file of users, and the webhook for its password.
func TestUsersAtTheFirstStart(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	r := startUsersRedis(t, userPasswords{})
	r.Stop()
	u.config.redisAddresses = []string{r.Address}
	u.open("shop")
	keeper, log, _ := u.start()
	r.write(t, u.wantSecret(usersHome, usersSecret, usersFile))
	passwords := map[string]string{"sidecar/shop": u.password("shop")}
	for _, user := range []string{"setup", "webhook", "gate", "status"} {
		passwords[user] = u.wantSecret(usersHome, ownSecret, user+"-password")
	}
	rig.Must(t, r.Start())
	for user, password := range passwords {
		rig.Must(t, r.tryLogin(user, password))
		if len(password) != 64 {
			t.Errorf("the password of %s has %d digits", user, len(password))
		}
	}
	wantCounts(t, keeper, userCounts{ready: 1, answering: 1})
	if value(u.secret("shop", sidecarSecret), "username") != "sidecar/shop" {
		t.Errorf("the Secret has the username %q", value(u.secret("shop", sidecarSecret), "username"))
	}
	// Anyone may ask whether Redis is alive, and nothing else.
	c, err := redis.Dial("tcp", r.Address)
	rig.Must(t, err)
	defer c.Close()
	if _, err := c.Do("PING"); err != nil {
		t.Error(err)
	}
	if _, err := c.Do("DBSIZE"); err == nil {
		t.Error("without a password, DBSIZE is allowed")
	}
	for _, password := range passwords {
		if strings.Contains(log.String(), password) {
			t.Error("the log has a password")
		}
	}
	if strings.Contains(value(u.secret(usersHome, usersSecret), usersFile), passwords["webhook"]) {
		t.Error("users.acl has a password, and not its hash")
	}
}

func wantCounts(t *testing.T, keeper *userKeeper, want userCounts) {
	t.Helper()
	rig.Eventually(t, 30*time.Second, func() error {
		keeper.shownMu.Lock()
		defer keeper.shownMu.Unlock()
		if keeper.shown != want {
			return fmt.Errorf("counted %+v, want %+v", keeper.shown, want)
		}
		return nil
	})
}

// A namespace keeps its user and Secret while it has the label, or a pod with a sidecar.
func TestNamespaceIsOpenedAndClosed(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	r := u.redis()
	u.times.handOut = time.Second
	u.start()
	u.open("shop")
	u.open("blog")
	rig.Must(t, r.tryLogin("sidecar/shop", u.password("shop")))
	first := u.password("blog")
	rig.Must(t, r.tryLogin("sidecar/blog", first))

	u.pod("shop", "web-1", 0)
	u.close("shop")
	u.close("blog")
	r.wantLogin(t, "sidecar/blog", first, false)
	if u.secret("blog", sidecarSecret) != nil {
		t.Error("blog has a Secret, and no user")
	}
	shop := u.password("shop")
	rig.Must(t, r.tryLogin("sidecar/shop", shop))
	_, status := u.api.Store.Change("shop", "web-1", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
	u.wantOK(status)
	r.wantLogin(t, "sidecar/shop", shop, false)
	if u.secret("shop", sidecarSecret) != nil {
		t.Error("shop has a Secret, and no user")
	}

	// A namespace that is made again under the old name gets another password.
	u.open("blog")
	second := u.password("blog")
	if second == first {
		t.Error("the password is the old one")
	}
	rig.Must(t, r.tryLogin("sidecar/blog", second))
	_, status = u.api.Store.Secrets.Delete("blog", sidecarSecret)
	u.wantOK(status)
	_, status = u.api.Store.Namespaces.Delete("", "blog")
	u.wantOK(status)
	r.wantLogin(t, "sidecar/blog", second, false)
}

// A Secret of that name that is not ours stays as it is, until somebody deletes it.
func TestForeignSecret(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	r := u.redis()
	u.namespace("shop")
	foreign := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: sidecarSecret},
		Data: map[string][]byte{"username": []byte("sidecar/blog"), "password": []byte("theirs")}}
	_, status := u.api.Store.Secrets.Create(foreign)
	u.wantOK(status)
	u.open("shop")
	keeper, log, _ := u.start()
	u.open("blog")
	rig.Must(t, r.tryLogin("sidecar/blog", u.password("blog")))
	wantCounts(t, keeper, userCounts{ready: 1, foreign: 1, answering: 1})
	if got := value(u.secret("shop", sidecarSecret), "password"); got != "theirs" {
		t.Errorf("the Secret of another has the password %q now", got)
	}
	lines := log.WantLines(t, "not done, to be retried", 1)
	if text := fmt.Sprint(lines[0]); !strings.Contains(text, "namespace shop") || !strings.Contains(text, "sidecar/shop") {
		t.Errorf("the log says %s", text)
	}
	rig.Eventually(t, 10*time.Second, func() error {
		for _, e := range u.api.Store.EventsOf(usersHome) {
			if e.Reason == reasonForeign && strings.Contains(e.Note, "namespace shop") {
				return nil
			}
		}
		return errors.New("no event tells of it")
	})
	u.close("shop")
	wantCounts(t, keeper, userCounts{ready: 1, answering: 1})
	if u.secret("shop", sidecarSecret) == nil {
		t.Error("the Secret of another is gone")
	}
	u.open("shop")
	_, status = u.api.Store.Secrets.Delete("shop", sidecarSecret)
	u.wantOK(status)
	rig.Must(t, r.tryLogin("sidecar/shop", u.password("shop")))
}

// Passwords that are deleted from their Secrets are made anew. Nothing is refused
// meanwhile: the new one works before it is handed out, and the old one for a while after.
func TestRotation(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	r := u.redis()
	u.times.handOut, u.times.old = 2*time.Second, 3*time.Second
	u.start()
	u.open("shop")
	first := u.password("shop")
	webhook := u.wantSecret(usersHome, ownSecret, "webhook-password")
	rig.Must(t, r.tryLogin("webhook", webhook))

	address := "redis://" + r.Address
	sidecar := func(key, password string) *rig.Process {
		t.Helper()
		p := rig.NewProcess(rig.Program(t), "sidecar", "--queue-redis-address="+address, "--redis-addresses="+r.Address,
			"--length=1", "--heartbeat-interval-seconds=1", "--stale-threshold-seconds=120", "shop/"+key, uuid.NewString())
		p.Cmd.Env = append(os.Environ(), "REDIS_USERNAME=sidecar/shop", "REDIS_PASSWORD="+password)
		p.Start(t)
		return p
	}
	r.LoadScripts()
	u.pod("shop", "old", time.Minute)
	old := sidecar("old", first)
	old.WantLog(t, rig.HeldText)

	// This client reads the Secrets again and again, as the kubelet does for new pods.
	ctx, cancel := context.WithCancel(t.Context())
	refused := make(chan error, 1)
	go func() {
		defer close(refused)
		for ctx.Err() == nil {
			for user, password := range map[string]string{"sidecar/shop": value(u.secret("shop", sidecarSecret), "password"),
				"webhook": value(u.secret(usersHome, ownSecret), "webhook-password")} {
				if err := r.tryLogin(user, password); password != "" && err != nil {
					refused <- fmt.Errorf("%s: %w", user, err)
					return
				}
			}
		}
	}()
	u.forget("shop", sidecarSecret, "password")
	second := u.wantNew("shop", sidecarSecret, "password", first)
	u.forget(usersHome, ownSecret, "webhook-password")
	u.wantNew(usersHome, ownSecret, "webhook-password", webhook)
	u.forget(usersHome, ownSecret, "setup-password")
	u.wantNew(usersHome, ownSecret, "setup-password", "administrator")
	rig.Must(t, r.tryLogin("webhook", webhook))
	fresh := sidecar("new", second)
	fresh.WantLog(t, rig.HeldText)
	r.wantLogin(t, "webhook", webhook, false)
	r.wantLogin(t, "setup", "administrator", false)
	cancel()
	rig.Must(t, <-refused)

	// The old pod logs in as before, until it is gone.
	rig.Must(t, r.tryLogin("sidecar/shop", first))
	r.Do(t, "CLIENT", "KILL", "USER", "sidecar/shop")
	for _, id := range []string{"old", "new"} {
		semaphore := semaphoreID{"shop", id}
		r.Do(t, "ZADD", semaphore.inflightKey(), "XX", 1e9, r.Inflight(t, semaphore)[0])
		rig.Eventually(t, 20*time.Second, func() error {
			if at := r.LastHeartbeat(t, semaphore, r.Inflight(t, semaphore)[0]); at == 1e9 {
				return fmt.Errorf("no heartbeat of %s", semaphore)
			}
			return nil
		})
	}
	for _, p := range []*rig.Process{old, fresh} {
		if strings.Contains(p.Log.String(), "WRONGPASS") {
			t.Errorf("refused: %s", p.Log.String())
		}
	}
	u.api.DeletePod(t, "shop", "old")
	r.wantLogin(t, "sidecar/shop", first, false)
	rig.Must(t, r.tryLogin("sidecar/shop", second))
}

// A server that restarts gets all users again, and one that was away those that it has
// missed. The other goes on meanwhile.
func TestUsersOfServersThatFail(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	one, two := u.redis(), u.redis()
	keeper, log, _ := u.start()
	u.open("shop")
	shop := u.password("shop")
	for _, r := range []*usersRedis{one, two} {
		rig.Must(t, r.tryLogin("sidecar/shop", shop))
	}
	one.Crash(t)
	rig.Must(t, one.Start()) // its file is as old as the test
	one.wantLogin(t, "sidecar/shop", shop, true)

	two.Stop()
	wantCounts(t, keeper, userCounts{ready: 1, answering: 1, silent: 1})
	u.open("blog")
	blog := u.password("blog")
	rig.Must(t, one.tryLogin("sidecar/blog", blog))
	rig.Must(t, two.Start())
	two.wantLogin(t, "sidecar/blog", blog, true)
	two.wantLogin(t, "sidecar/shop", shop, true)
	wantCounts(t, keeper, userCounts{ready: 2, answering: 2})
	if lines := log.Lines(t, "not done, to be retried"); len(lines) > 3 {
		t.Errorf("%d lines about failures: %v", len(lines), lines)
	}

	// A server that answers, and may not be changed, gets no new users handed out.
	two.Do(t, "ACL", "SETUSER", "setup", "-acl|setuser")
	u.open("mail")
	wantCounts(t, keeper, userCounts{ready: 2, waiting: 1, answering: 1, refusing: 1})
	if s := u.secret("mail", sidecarSecret); s != nil {
		t.Error("mail has a Secret with a password that a server does not know")
	}
	two.Do(t, "ACL", "SETUSER", "setup", "+acl|setuser")
	mail := u.password("mail")
	rig.Must(t, one.tryLogin("sidecar/mail", mail))
	rig.Must(t, two.tryLogin("sidecar/mail", mail))
}

// What is lost is made anew from what is left, with the passwords that are handed out.
func TestLostUsers(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	r := u.redis()
	_, _, stop := u.start()
	u.open("shop")
	shop, webhook := u.password("shop"), u.wantSecret(usersHome, ownSecret, "webhook-password")
	users := u.wantSecret(usersHome, usersSecret, usersFile)
	_, status := u.api.Store.Secrets.Delete(usersHome, usersSecret)
	u.wantOK(status)
	if again := u.wantSecret(usersHome, usersSecret, usersFile); again != users {
		t.Errorf("the users are\n%s, were\n%s", again, users)
	}
	stop()
	for _, data := range []map[string][]byte{nil, {passwordsFile: []byte("nonsense")}} {
		_, status = u.api.Store.Secrets.Change(usersHome, usersSecret, func(s *corev1.Secret) { s.Data = data })
		u.wantOK(status)
		_, _, stop = u.start()
		if again := u.wantSecret(usersHome, usersSecret, usersFile); again != users {
			t.Errorf("the users are\n%s, were\n%s", again, users)
		}
		stop()
	}
	rig.Must(t, r.tryLogin("sidecar/shop", shop))
	rig.Must(t, r.tryLogin("webhook", webhook))

	// All is lost while setup is away: it has its old login from usersSecret.
	u.start()
	_, status = u.api.Store.Secrets.Delete(usersHome, ownSecret)
	u.wantOK(status)
	rig.Must(t, r.tryLogin("webhook", u.wantNew(usersHome, ownSecret, "webhook-password", webhook)))
	if u.password("shop") != shop {
		t.Error("shop has another password")
	}
}

// Two at once, as in a roll-out, do no harm.
func TestTwoUserKeepers(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	r := u.redis()
	u.start()
	u.start()
	var names []string
	for i := range 20 {
		names = append(names, fmt.Sprintf("shop-%d", i))
		u.open(names[i])
	}
	for _, name := range names {
		r.wantLogin(t, "sidecar/"+name, u.password(name), true)
	}
	for _, name := range names {
		old := u.password(name)
		u.forget(name, sidecarSecret, "password")
		u.wantNew(name, sidecarSecret, "password", old)
	}
	for _, name := range names {
		r.wantLogin(t, "sidecar/"+name, u.password(name), true)
	}
	for _, user := range []string{"webhook", "gate", "status", "setup"} {
		r.wantLogin(t, user, u.wantSecret(usersHome, ownSecret, user+"-password"), true)
	}
}

// Many namespaces cost nothing while nothing changes. 200 that are labelled at once are
// ready in seconds.
func TestManyNamespaces(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	r := u.redis()
	keeper, _, _ := u.start()
	label := func(from, to int) {
		t.Helper()
		start := time.Now()
		for i := from; i < to; i++ {
			u.open(fmt.Sprintf("shop-%d", i))
		}
		wantCounts(t, keeper, userCounts{ready: to, answering: 1})
		t.Logf("%d namespaces with a label, %d more ready in %.1f s", from, to-from, time.Since(start).Seconds())
	}
	label(0, 300)
	label(300, 500)
	for i := range 500 {
		name := fmt.Sprintf("shop-%d", i)
		rig.Must(t, r.tryLogin("sidecar/"+name, u.password(name)))
	}
	calls := func() int {
		return u.api.Count(func(request string) bool {
			return !strings.Contains(request, "watch=true") && !strings.Contains(request, "/events")
		})
	}
	commands := func() int {
		total := 0
		for name, n := range r.CommandCalls(t) {
			if name != "info" {
				total += n
			}
		}
		return total
	}
	infos := func() int { return r.CommandCalls(t)["info"] }
	requests, sent, asked := calls(), commands(), infos()
	own := 0 // INFO by the test
	rig.Eventually(t, 60*time.Second, func() error {
		own++
		if looks := infos() - asked - own; looks < 10 {
			return fmt.Errorf("setup has looked %d times", looks)
		}
		return nil
	})
	if n := calls() - requests; n > 0 {
		t.Errorf("%d requests to the API server while nothing changed", n)
	}
	if n := commands() - sent; n > 0 {
		t.Errorf("%d commands to Redis other than INFO while nothing changed: %v", n, r.CommandCalls(t))
	}
}

// More namespaces than a Secret holds: those that have a user keep it.
func TestTooManyNamespaces(t *testing.T) {
	t.Parallel()
	l := &userLook{userKeeper: &userKeeper{made: map[string]string{}}, pending: map[string]string{},
		problems: map[string]error{}}
	l.accepted = samplePasswords()
	listed := userPasswords{}
	name := func(i int) string { return fmt.Sprintf("shop-%06d", i) }
	for i := range 3000 {
		user := namespaceUser(name(i))
		l.accepted[user] = []userPassword{{hashPassword(user), time.Now()}}
		if i%2 == 1 {
			listed[user] = l.accepted[user]
		} else {
			l.pending[name(i)] = user
		}
	}
	l.fit(listed)
	n, size := 0, len(l.accepted.text())+len(l.accepted.file(holdsAll))
	for user := range l.accepted {
		if strings.HasPrefix(user, sidecarUsers) {
			n++
		}
	}
	if size > maxSecret || size < maxSecret-4096 {
		t.Errorf("%d namespaces take %d bytes, want a little less than %d", n, size, maxSecret)
	}
	has := func(i int) bool { return len(l.accepted[namespaceUser(name(i))]) > 0 }
	if !has(2999) || has(2998) || !has(0) {
		t.Error("a namespace has lost its user, or the last new one has one")
	}
	if l.counts.waiting != 3000-n || len(l.pending) != n-1500 {
		t.Errorf("%d of 3000 namespaces have a user, %d are counted as waiting, %d pending", n, l.counts.waiting, len(l.pending))
	}
	want := fmt.Sprintf("enough for %d namespaces: %d more have no user", n, 3000-n)
	if err := l.problems["Secret "+usersSecret]; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	t.Logf("a Secret holds %d namespaces with names of %d characters", n, len(name(0)))
}

// A client that may write the Secret of a namespace adds at most so many passwords.
func TestUserHasFewPasswords(t *testing.T) {
	t.Parallel()
	l := &userLook{userKeeper: &userKeeper{made: map[string]string{}}, accepted: userPasswords{}}
	for i := range 100 {
		l.accept(fmt.Sprint(i), "sidecar/shop")
	}
	if all := l.accepted["sidecar/shop"]; len(all) != maxPasswords || all[0].hash != hashPassword("99") {
		t.Errorf("%d passwords, want %d, the newest first", len(all), maxPasswords)
	}
}
