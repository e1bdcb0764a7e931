package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// usersTest is an API server with the namespace of setup.
type usersTest struct {
	*testing.T
	api    *rig.APIServer
	config setupConfig
	times  userTimes
	owners atomic.Pointer[ownerSettings]

	unheard atomic.Bool // the settings are not known
}

const (
	usersHome     = "hook"
	sidecarSecret = "at-least-semaphore-pod-redis"
)

func newUsersTest(t *testing.T) *usersTest {
	t.Helper()
	u := &usersTest{T: t, api: rig.StartAPIServer(t), times: newUserTimes(),
		config: setupConfig{namespace: usersHome, sidecarRedisSecret: sidecarSecret}}
	u.times.every, u.times.retry, u.times.gather = time.Second, 200*time.Millisecond, 10*time.Millisecond
	u.times.pods = 100 * time.Millisecond
	u.namespace(usersHome)
	return u
}

// settings returns what owners have set.
func (u *usersTest) settings() (s ownerSettings, known bool) {
	if u.unheard.Load() {
		return s, false
	}
	if s := u.owners.Load(); s != nil {
		return *s, true
	}
	return ownerSettings{}, true
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
	keeper = newUserKeeper(u.config, k, ofHome, u.settings, changed, to)
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

// A password that is deleted before its maker has looked again does not come back.
func TestPasswordDeletedAtOnce(t *testing.T) {
	t.Parallel()
	u := newUsersTest(t)
	u.times.gather = 500 * time.Millisecond
	r := u.redis()
	u.start()
	u.open("shop")
	shop := u.password("shop")
	u.forget("shop", sidecarSecret, "password")
	gate := u.wantSecret(usersHome, ownSecret, "gate-password")
	u.forget(usersHome, ownSecret, "gate-password")
	r.wantLogin(t, "sidecar/shop", u.wantNew("shop", sidecarSecret, "password", shop), true)
	r.wantLogin(t, "gate", u.wantNew(usersHome, ownSecret, "gate-password", gate), true)
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
	n, size := 0, len(l.accepted.text())+len(l.accepted.file(holdsAll, l.sharing))
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

// limitsTest is a limitKeeper with a Redis of our users, as a webhook serves it.
type limitsTest struct {
	*usersTest
	redis  *rig.Redis
	reader *semaphores
	keeper *limitKeeper
	log    *rig.Log
}

// startLimits starts a limitKeeper on a queue, after begin.
func startLimits(t *testing.T, r *rig.Redis, address string, begin ...func(*limitsTest)) *limitsTest {
	t.Helper()
	u := newUsersTest(t)
	c := testConfig(address)
	c.queueRedisAddress = mustAddress(address)
	c.redis = redisSettings{username: "webhook", password: "webhook"}
	u.config.queue = settings{queueRedisAddress: c.queueRedisAddress, heartbeatInterval: 30 * time.Second,
		staleThreshold: 2 * time.Minute}
	_, status := u.api.Store.Secrets.Create(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: usersHome, Name: ownSecret},
		Data: map[string][]byte{"status-password": []byte("status")}})
	u.wantOK(status)
	l := &limitsTest{usersTest: u, redis: r, reader: semaphoresOf(t, c), log: new(rig.Log)}
	log := slog.New(slog.NewJSONHandler(l.log, nil))
	k, err := newKubernetes(clientSettings(u.api), log)
	rig.Must(t, err)
	secrets := k.secretsOf(usersHome, func() {})
	l.keeper = newLimitKeeper(u.config, k, secrets, func() {}, log)
	for _, do := range begin {
		do(l)
	}
	for _, run := range []func(context.Context){k.run, secrets.run, l.keeper.run} {
		inBackground(t, run)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of setup:\n%s", l.log)
		}
	})
	return l
}

// write writes the ConfigMap.
func (l *limitsTest) write(lines ...string) *corev1.ConfigMap {
	l.Helper()
	data := map[string]string{ownerMap: strings.Join(lines, "\n") + "\n"}
	m, missing := l.api.Store.ConfigMaps.Change(usersHome, ownerMap, func(m *corev1.ConfigMap) { m.Data = data })
	if missing != nil {
		var status *metav1.Status
		m, status = l.api.Store.ConfigMaps.Create(&corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Namespace: usersHome, Name: ownerMap}, Data: data})
		l.wantOK(status)
	}
	return m
}

// refuseMaps makes the API server refuse all requests for ConfigMaps while refuses says so.
func (l *limitsTest) refuseMaps(refuses func() bool) {
	l.api.Fail(func(w http.ResponseWriter, r *http.Request) bool {
		isRefused := strings.Contains(r.URL.Path, "/configmaps") && refuses()
		if isRefused {
			rig.Respond(w, 0, nil, rig.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, "said on purpose"))
		}
		return isRefused
	})
}

// wantLimits waits until Redis knows these limits; -1 is: there is none.
func (l *limitsTest) wantLimits(want map[semaphoreID]int) {
	l.Helper()
	rig.Eventually(l.T, 20*time.Second, func() error {
		for id, length := range want {
			d, err := l.reader.inspect(l.Context(), id, detailMost)
			if err != nil || d.setting.limit != (limit{known: true, length: length}) {
				return fmt.Errorf("%s has %+v, %v; want %d", id, d.setting.limit, err, length)
			}
		}
		return nil
	})
}

// wantFailing waits until the metric of the step has a value, and returns its error.
func (l *limitsTest) wantFailing(want float64) (text string) {
	l.Helper()
	registry := prometheus.NewRegistry()
	l.keeper.register(registry)
	rig.Eventually(l.T, 20*time.Second, func() error {
		families, err := registry.Gather()
		rig.Must(l.T, err)
		_, failed := l.keeper.state()
		if text = fmt.Sprint(failed); families[0].GetMetric()[0].GetGauge().GetValue() != want {
			return fmt.Errorf("failing is not %v: %s", want, text)
		}
		return nil
	})
	return text
}

// use makes Redis know a semaphore, as a sidecar does.
func (l *limitsTest) use(id semaphoreID) {
	l.Helper()
	l.redis.Heartbeat(l.T, rig.ID{Namespace: id.namespace, Key: id.key}, uuid.NewString(), "", 0)
}

var web, mail = semaphoreID{"shop", "web"}, semaphoreID{"shop", "mail"}

// Redis knows what the ConfigMap says, also of semaphores that are made later, and again
// after it has lost all. A bad ConfigMap changes nothing, and tells its owner.
func TestLimitsOfTheConfigMap(t *testing.T) {
	t.Parallel()
	r := startUsersRedis(t, samplePasswords())
	rig.Must(t, r.LoadScripts())
	l := startLimits(t, r.Redis, r.Address)
	l.use(web)
	l.wantFailing(0)
	if d, err := l.reader.inspect(t.Context(), web, detailMost); err != nil || d.setting.limit.known {
		t.Errorf("without a ConfigMap, Redis knows of %+v, %v", d.setting.limit, err)
	}

	l.write("shop/web length=3", "shop/* length=10", "@matlab length=5 namespaces=shop")
	matlab := semaphoreID{shared, "matlab"}
	l.wantLimits(map[semaphoreID]int{web: 3, matlab: 5})
	l.use(mail)
	l.wantLimits(map[semaphoreID]int{mail: 10})
	l.write("shop/web length=0")
	l.wantLimits(map[semaphoreID]int{web: 0, mail: -1, matlab: -1})

	bad := l.write("shop/web length=7", "shop/mail length=many")
	if text := l.wantFailing(1); !strings.Contains(text, `line 2: length is "many"`) {
		t.Errorf("the step says %s", text)
	}
	rig.Eventually(t, 10*time.Second, func() error {
		for _, e := range l.api.Store.EventsOf(usersHome) {
			if about := e.Regarding; e.Reason == reasonSettings && about.Kind == "ConfigMap" && about.UID == bad.UID &&
				strings.Contains(e.Note, "line 2: ") {
				return nil
			}
		}
		return errors.New("no event of the ConfigMap tells of line 2")
	})
	r.Do(t, "FLUSHALL")
	l.use(mail)
	l.wantLimits(map[semaphoreID]int{web: 0})
	l.log.WantLines(t, "the ConfigMap of semaphores is not taken, what it held before stays in force", 1)
	if lines := l.log.Lines(t, "a step failed, to be repeated"); len(lines) > 0 {
		t.Errorf("logged again: %v", lines)
	}

	l.write("shop/web length=7")
	l.wantLimits(map[semaphoreID]int{web: 7})
	l.wantFailing(0)
	_, status := l.api.Store.ConfigMaps.Delete(usersHome, ownerMap)
	l.wantOK(status)
	l.wantLimits(map[semaphoreID]int{web: -1})
}

// A setup that starts with a bad ConfigMap leaves Redis alone. So does one that does not
// hear of it.
func TestLimitsAreUnknownAtTheStart(t *testing.T) {
	t.Parallel()
	for name, begin := range map[string]func(*limitsTest){
		"bad": func(l *limitsTest) { l.write("shop/web") },
		"no key": func(l *limitsTest) {
			l.write()
			_, status := l.api.Store.ConfigMaps.Change(usersHome, ownerMap, func(m *corev1.ConfigMap) {
				m.Data = map[string]string{"lengths.txt": "shop/web length=4"}
			})
			l.wantOK(status)
		},
		"unheard": func(l *limitsTest) {
			l.refuseMaps(func() bool { return true })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startUsersRedis(t, samplePasswords())
			rig.Must(t, r.LoadScripts())
			l := startLimits(t, r.Redis, r.Address, func(l *limitsTest) {
				rig.Must(t, l.reader.setLimit(t.Context(), web, limit{known: true, length: 3}, time.Hour, false))
				begin(l)
			})
			l.wantFailing(1)
			if _, known := l.keeper.settings(); known {
				t.Error("the settings are known")
			}
			l.wantLimits(map[semaphoreID]int{web: 3})
			if n := r.CommandCalls(t)["scan"]; n > 0 {
				t.Errorf("setup has read Redis %d times", n)
			}
			l.api.Fail(nil)
			l.write("shop/web length=4")
			l.wantLimits(map[semaphoreID]int{web: 4})
			l.wantFailing(0)
		})
	}
}

// A limit that Redis knows is replaced only if the API server confirms the ConfigMap now:
// a webhook, or another setup, may have heard of a newer one. A missing limit is written.
func TestLimitsOfAnOldView(t *testing.T) {
	t.Parallel()
	r := startUsersRedis(t, samplePasswords())
	rig.Must(t, r.LoadScripts())
	l := startLimits(t, r.Redis, r.Address)
	l.write("shop/web length=3", "shop/mail length=2")
	l.wantLimits(map[semaphoreID]int{web: 3, mail: 2})
	var cut atomic.Bool
	cut.Store(true)
	l.refuseMaps(cut.Load)
	rig.Must(t, l.reader.setLimit(t.Context(), web, limit{known: true, length: 0}, time.Hour, false))
	r.Do(t, "DEL", mail.stateKey())
	l.wantLimits(map[semaphoreID]int{mail: 2})
	if text := l.wantFailing(1); !strings.Contains(text, "said on purpose") {
		t.Errorf("the step fails: %s", text)
	}
	l.wantLimits(map[semaphoreID]int{web: 0})
	cut.Store(false)
	l.wantLimits(map[semaphoreID]int{web: 3})
	l.wantFailing(0)
}

// A semaphore that a namespace's user has spoilt keeps setup neither from the limits of
// others, nor from telling of overrides.
func TestLimitsBesideASpoiltSemaphore(t *testing.T) {
	t.Parallel()
	r := startUsersRedis(t, samplePasswords())
	rig.Must(t, r.LoadScripts())
	r.Do(t, "RPUSH", semaphoreID{"blog", "spoilt"}.stateKey(), "x")
	l := startLimits(t, r.Redis, r.Address)
	l.write("shop/web length=3")
	l.wantLimits(map[semaphoreID]int{web: 3})
	_, _, err := l.reader.setOverride(t.Context(), web, override{length: 1}, time.Hour)
	rig.Must(t, err)
	l.log.WantLines(t, "override seen", 1)
	l.wantFailing(0)
}

// The log tells overrides that Redis has lost from those that a person has cleared.
func TestOverridesThatEnd(t *testing.T) {
	t.Parallel()
	r := startUsersRedis(t, samplePasswords())
	rig.Must(t, r.LoadScripts())
	l := startLimits(t, r.Redis, r.Address)
	l.write("shop/web length=3")
	l.wantLimits(map[semaphoreID]int{web: 3})
	set := func(id semaphoreID, seen int) {
		t.Helper()
		_, _, err := l.reader.setOverride(t.Context(), id, override{length: 1, note: "db\nupgrade", by: "anna"}, time.Hour)
		rig.Must(t, err)
		lines := l.log.WantLines(t, "override seen", seen)
		if note := lines[seen-1]["note"]; note != "db?upgrade" {
			t.Errorf("the note is %s", note)
		}
	}
	set(web, 1)
	set(mail, 2)
	_, _, err := l.reader.clearOverride(t.Context(), mail)
	rig.Must(t, err)
	if line := l.log.WantLines(t, "override cleared", 1)[0]; line["key"] != "mail" {
		t.Errorf("cleared is %v", line)
	}
	const lost = "Redis has lost an override with its data: set it again"
	if lines := l.log.Lines(t, lost); len(lines) > 0 {
		t.Errorf("logged as lost: %v", lines)
	}
	r.Crash(t)
	r.LoseData(t)
	rig.Must(t, r.Start())
	rig.Must(t, r.LoadScripts())
	l.use(web) // it is there again, without the override
	if line := l.log.WantLines(t, lost, 1)[0]; line["key"] != "web" || line["length"] != 1.0 {
		t.Errorf("lost is %v", line)
	}
	l.log.WantLines(t, "override cleared", 1)
}

// A new password of the user status counts as soon as its Secret has it. Redis that
// refuses it fails the step only if there is something to tell.
func TestLimitsOfANewPassword(t *testing.T) {
	t.Parallel()
	r := startUsersRedis(t, samplePasswords())
	rig.Must(t, r.LoadScripts())
	l := startLimits(t, r.Redis, r.Address)
	l.write("shop/web length=3")
	l.wantLimits(map[semaphoreID]int{web: 3})
	r.Do(t, "ACL", "SETUSER", "status", "resetpass", ">new")
	r.Do(t, "CLIENT", "KILL", "USER", "status")
	l.write("shop/web length=4")
	if text := l.wantFailing(1); !strings.Contains(text, "WRONGPASS") {
		t.Errorf("the step says %s", text)
	}
	_, status := l.api.Store.ConfigMaps.Delete(usersHome, ownerMap)
	l.wantOK(status)
	if text := l.wantFailing(0); !strings.Contains(text, "WRONGPASS") {
		t.Errorf("without settings, the step says %s", text)
	}
	l.write("shop/web length=5")
	l.wantFailing(1)
	_, status = l.api.Store.Secrets.Change(usersHome, ownSecret, func(s *corev1.Secret) {
		s.Data["status-password"] = []byte("new")
	})
	l.wantOK(status)
	l.wantLimits(map[semaphoreID]int{web: 5})
	l.wantFailing(0)
}

// In deploy/sentinel, setup asks the Sentinels without a password.
func TestLimitsOfASentinelGroup(t *testing.T) {
	t.Parallel()
	g := rig.StartDeployedGroup(t)
	primary := g.Primary(t)
	rig.Must(t, primary.LoadScripts())
	for user, text := range samplePasswords().users(holdsTokens, nil) {
		primary.Do(t, "ACL", append([]any{"SETUSER", user, "reset"}, anySlice(strings.Fields(text))...)...)
	}
	l := startLimits(t, primary, g.Address())
	l.write("shop/web length=3")
	l.wantLimits(map[semaphoreID]int{web: 3})
	l.wantFailing(0)
}
