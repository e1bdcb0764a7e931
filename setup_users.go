package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// ownSecret has the passwords of our own users, each as USER-password. usersSecret has
	// all users as Redis reads them, and the hashes of all passwords that Redis accepts.
	ownSecret, usersSecret = "redis", "redis-users"

	// maxSecret is the most that Kubernetes accepts in a Secret, in bytes of its values.
	maxSecret = 1 << 20

	// maxPasswords caps the passwords of a user: a client that may write the Secret of
	// a namespace could fill usersSecret.
	maxPasswords = 16
)

// The keys of usersSecret. setupLogin is a password by which setup can log in at servers
// that do not have its newest one yet.
const (
	usersFile, locksFile, passwordsFile = "users.acl", "locks.acl", "passwords"
	setupLogin                          = "setup-password"
)

// The reasons of events about users.
const (
	reasonPasswords = "PasswordsMade"
	reasonOpened    = "NamespaceOpened"
	reasonClosed    = "NamespaceClosed"
	reasonForeign   = "SecretNotOurs"
)

// userTimes are the times of a userKeeper. Tests use shorter ones.
type userTimes struct {
	every  time.Duration // between two looks at the servers of Redis
	retry  time.Duration // until the next look if a server or the API server did not answer
	gather time.Duration // between a change and the look, which so takes many changes
	pods   time.Duration // between two looks at the pods of one namespace

	// old is how long after a new password our own users may use the one before: the kubelet
	// takes up to two minutes to write a file. Passwords that were never handed out go as
	// late.
	old time.Duration

	// A pod that is created within handOut of the making of a password may have got the one
	// before. What is not handed out within half of that is dated anew.
	handOut time.Duration

	// unlisted is how long a namespace keeps a shared semaphore that the settings no
	// longer give it: the kubelet takes up to two minutes to write the webhooks' file.
	unlisted time.Duration
}

func newUserTimes() userTimes {
	return userTimes{every: 10 * time.Second, retry: 2 * time.Second, gather: 100 * time.Millisecond,
		pods: 30 * time.Second, old: 10 * time.Minute, handOut: 2 * time.Minute, unlisted: 3 * time.Minute}
}

// userKeeper makes the users of Redis, and what labelled namespaces need. It compares what
// there is with what there should be: after each change, and every ten seconds. So it does
// not matter what was done before, or by another process.
//
// A new password goes first into usersSecret, for servers that start, then to all servers
// that answer, and only then into the Secret of those that log in with it.
type userKeeper struct {
	config   setupConfig
	times    userTimes
	k        *kubernetes
	servers  []*userServer
	ofHome   *mirror[*corev1.Secret]
	ofAll    *mirror[*corev1.Secret]    // for the sidecars, in all namespaces
	labelled *mirror[*corev1.Namespace] // with labelSidecars
	owners   func() (s ownerSettings, known bool)
	changed  wakeup // something that a watch tells has changed
	log      *slog.Logger

	// Only look uses these.
	written map[string]writtenSecret        // by NAMESPACE/NAME
	made    map[string]string               // passwords that are not in a Secret yet, by user
	wanted  map[redisDuty]map[string]string // the users that usersSecret has; nil: not known yet
	saved   string                          // the text of their passwords
	login   string                          // the newest password of setup that all servers accept
	pods    map[string]podsSeen             // by namespace
	said    map[string]saidProblem          // by subject

	unlisted map[string]time.Time // when the settings stopped to give a user a shared key, by USER KEY

	shownMu sync.Mutex // guards the fields below
	shown   userCounts
	done    bool  // usersSecret was written once
	failed  error // why usersSecret could not be written
}

// writtenSecret is a Secret that this process has just written. Its mirror may still show
// the version before.
type writtenSecret struct {
	before string         // resourceVersion; empty: there was none
	after  *corev1.Secret // nil: deleted
	at     time.Time
}

// podsSeen is what a look at the pods of a namespace has found.
type podsSeen struct {
	at     time.Time
	oldest time.Time       // creation of the oldest pod with a sidecar; zero: there is none
	shared map[string]bool // keys of shared semaphores that a sidecar names
}

// userCounts are the values of metrics.
type userCounts struct {
	ready, waiting, foreign     int // namespaces
	answering, silent, refusing int // servers
}

// newUserKeeper returns a userKeeper that reads the Secrets of our own namespace from
// ofHome, whose changes wake it.
func newUserKeeper(c setupConfig, k *kubernetes, ofHome *mirror[*corev1.Secret],
	owners func() (s ownerSettings, known bool), changed wakeup, log *slog.Logger) *userKeeper {
	u := &userKeeper{config: c, times: newUserTimes(), k: k, ofHome: ofHome, owners: owners, changed: changed, log: log,
		written: map[string]writtenSecret{}, made: map[string]string{}, pods: map[string]podsSeen{},
		said: map[string]saidProblem{}}
	u.ofAll = k.secretsNamed(c.sidecarRedisSecret, changed.wake)
	u.labelled = k.namespacesWith(labelSidecars+"=true", changed.wake)
	for _, address := range c.redisAddresses {
		u.servers = append(u.servers, &userServer{address: address, duty: c.duties()[0]})
	}
	for _, address := range c.lockAddresses {
		u.servers = append(u.servers, &userServer{address: address, duty: holdsLocks})
	}
	return u
}

// run looks until ctx is done.
func (u *userKeeper) run(ctx context.Context) {
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(func() { u.ofAll.run(ctx) })
	background.Go(func() { u.labelled.run(ctx) })
	defer func() {
		for _, s := range u.servers {
			s.close()
		}
	}()
	for {
		next := u.times.every
		if u.look(ctx) {
			next = u.times.retry
		}
		select {
		case <-u.changed:
			next = u.times.gather
		case <-time.After(next):
			continue
		case <-ctx.Done():
			return
		}
		_ = sleep(ctx, next)
		select {
		case <-u.changed: // the look takes it, too
		default:
		}
	}
}

// userLook is one look of a userKeeper: what there is, and what there should be.
type userLook struct {
	*userKeeper
	own, users *corev1.Secret // nil: none
	ca         string         // of the servers' certificate; empty: none
	leaf       []byte
	given      map[string]*corev1.Secret    // by namespace
	namespaces map[string]*corev1.Namespace // by name

	accepted userPasswords     // what Redis should accept
	sharing  sharedKeys        // and for which shared semaphores
	pending  map[string]string // passwords to hand out, by namespace
	counts   userCounts
	soon     bool // something is to be done soon

	mu       sync.Mutex
	problems map[string]error // by subject
}

// look compares once, and does what is missing. It reports whether something is to be done
// soon.
func (u *userKeeper) look(ctx context.Context) (soon bool) {
	// First, as the view must not be from before. The watches log the error.
	unheard := errors.Join(u.ofHome.check(), u.ofAll.check(), u.labelled.check())
	l := u.newLook()
	if unheard != nil {
		l.keepServers(ctx) // those that restart get the users all the same
		return l.end(true, nil)
	}
	l.decide(ctx)
	err := l.save(ctx)
	l.fail("Secret "+usersSecret, err)
	if l.keepServers(ctx) && err == nil {
		l.handOutOwn(ctx)
		l.handOut(ctx)
	}
	return l.end(false, err)
}

func (u *userKeeper) newLook() *userLook {
	l := &userLook{userKeeper: u, given: map[string]*corev1.Secret{}, namespaces: map[string]*corev1.Namespace{},
		pending: map[string]string{}, problems: map[string]error{}}
	l.own, l.users = u.latest(u.ofHome, u.config.namespace, ownSecret), u.latest(u.ofHome, u.config.namespace, usersSecret)
	for _, n := range u.labelled.all() {
		l.namespaces[n.Name] = n
		l.given[n.Name] = u.latest(u.ofAll, n.Name, u.config.sidecarRedisSecret)
	}
	for _, s := range u.ofAll.all() {
		l.given[s.Namespace] = u.latest(u.ofAll, s.Namespace, u.config.sidecarRedisSecret)
	}
	maps.DeleteFunc(l.given, func(_ string, s *corev1.Secret) bool { return s == nil })
	l.readCA()
	return l
}

// readCA reads the CA of the servers: the operator's, or ours with our certificate.
func (l *userLook) readCA() {
	if file := l.config.redisCAFile; file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			l.problem("--redis-ca-file", err)
		}
		l.ca = string(text)
		return
	}
	c := l.ofHome.get(l.config.namespace, secretRedis)
	if c == nil {
		return
	}
	if pair, err := parsePair([][]byte{c.Data["tls.crt"], c.Data["tls.key"]}); err == nil {
		l.ca, l.leaf = value(c, "ca.crt"), pair.Leaf.Raw
	}
}

// latest returns a Secret as this process has written it, or as its mirror shows it; nil if
// there is none.
func (u *userKeeper) latest(m *mirror[*corev1.Secret], namespace, name string) *corev1.Secret {
	shown := m.get(namespace, name)
	w, ok := u.written[namespace+"/"+name]
	if !ok {
		return shown
	}
	if versionOf(shown) == w.before && time.Since(w.at) < u.times.every {
		return w.after
	}
	delete(u.written, namespace+"/"+name)
	return shown
}

// versionOf returns the version of a Secret; empty without one.
func versionOf(s *corev1.Secret) string {
	if s == nil {
		return ""
	}
	return s.ResourceVersion
}

// value returns a value of a Secret; empty without one.
func value(s *corev1.Secret, key string) string {
	if s == nil {
		return ""
	}
	return string(s.Data[key])
}

// isOurs reports whether setup may change a Secret for sidecars.
func isOurs(s *corev1.Secret) bool {
	return s != nil && s.Type == corev1.SecretTypeOpaque && value(s, "username") == namespaceUser(s.Namespace)
}

// decide works out which passwords Redis should accept: from those that it accepts, those
// that are handed out, and the namespaces.
func (l *userLook) decide(ctx context.Context) {
	listed, err := parseUserPasswords(value(l.users, passwordsFile))
	if err != nil {
		l.problem("Secret "+usersSecret,
			fmt.Errorf("%s: %w: made anew from the passwords that are handed out", passwordsFile, err))
		listed = userPasswords{}
	}
	l.accepted = userPasswords{}
	for _, p := range l.config.ownPasswords() {
		for _, user := range p.users {
			l.accepted[user] = listed[user]
		}
		password := l.accept(value(l.own, p.key), p.users...)
		for _, user := range p.users {
			l.prune(user, password, func(since time.Time) bool { return time.Since(since) < l.times.old })
		}
	}
	rest := map[string]bool{} // namespaces without the label that have something
	for user, passwords := range listed {
		if namespace, ok := strings.CutPrefix(user, sidecarUsers); ok {
			l.accepted[user] = passwords
			rest[namespace] = true
		}
	}
	for namespace, s := range l.given {
		if isOurs(s) {
			rest[namespace] = true
		}
	}
	maps.DeleteFunc(l.pods, func(namespace string, _ podsSeen) bool { return !rest[namespace] })
	for namespace, n := range l.namespaces {
		if delete(rest, namespace); n.DeletionTimestamp == nil {
			l.open(ctx, namespace)
		} // else it takes no new objects, and its pods give their tokens back
	}
	for namespace := range rest {
		l.leave(ctx, namespace)
	}
	l.share(ctx)
	l.fit(listed)
}

// share works out which shared semaphores each namespace may use: those of the settings;
// and those that it could use before, while one of its pods does, or a webhook that has
// not heard of the change may admit one. Without settings, each keeps what it has.
func (l *userLook) share(ctx context.Context) {
	owners, known := l.owners()
	before := parseSharedKeys(value(l.users, usersFile))
	l.sharing = sharedKeys{}
	unlisted, isMore := map[string]time.Time{}, false
	for user := range l.accepted {
		namespace, ok := strings.CutPrefix(user, sidecarUsers)
		if !ok {
			continue
		}
		var keys []string
		if _, isOpen := l.namespaces[namespace]; isOpen && known {
			keys = owners.sharedBy(namespace)
		}
		isMore = isMore || slices.ContainsFunc(keys, func(key string) bool { return !slices.Contains(before[user], key) })
		for _, key := range before[user] {
			if slices.Contains(keys, key) {
				continue
			}
			if subject := user + " " + key; known {
				if unlisted[subject] = time.Now(); !l.unlisted[subject].IsZero() {
					unlisted[subject] = l.unlisted[subject]
				}
				if time.Since(unlisted[subject]) >= l.times.unlisted && !l.usesShared(ctx, namespace, key) {
					continue
				}
			}
			keys = append(keys, key)
		}
		if slices.Sort(keys); keys != nil {
			l.sharing[user] = keys
		}
	}
	l.unlisted = unlisted
	if isMore && l.size() > maxSecret {
		for user, keys := range l.sharing {
			l.sharing[user] = slices.DeleteFunc(keys, func(key string) bool { return !slices.Contains(before[user], key) })
		}
		l.problem("Secret "+usersSecret, fmt.Errorf("it holds at most %d bytes: no namespace gets more shared semaphores; "+
			"list fewer namespaces in the ConfigMap %s", maxSecret, ownerMap))
	}
}

// usesShared reports whether a namespace has a pod whose sidecar uses a shared semaphore,
// or may have.
func (l *userLook) usesShared(ctx context.Context, namespace, key string) bool {
	_, err := l.oldestPod(ctx, namespace)
	return err != nil || l.pods[namespace].shared[key]
}

// accept makes users accept a password, and returns it. If there is none, it makes one.
func (l *userLook) accept(password string, users ...string) string {
	if password != "" {
		delete(l.made, users[0])
	} else if password = l.made[users[0]]; password == "" {
		password = newPassword()
		l.made[users[0]] = password
	}
	now, hash := time.Now().Truncate(time.Second), hashPassword(password)
	for _, user := range users {
		all := slices.Clone(l.accepted[user])
		i := slices.IndexFunc(all, func(p userPassword) bool { return p.hash == hash })
		if i >= 0 && l.made[users[0]] != "" && time.Since(all[i].since) > l.times.handOut/2 {
			all, i = slices.Delete(all, i, i+1), -1
		}
		if i < 0 {
			all = slices.Insert(all, 0, userPassword{hash, now})
		}
		l.accepted[user] = all[:min(len(all), maxPasswords)]
	}
	return password
}

func newPassword() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// prune drops passwords that nobody uses: those that are older than the present one, unless
// isUsed, which gets the time of the present one; and those that are newer, if no process
// has handed them out for a while.
func (l *userLook) prune(user, password string, isUsed func(since time.Time) bool) {
	all, hash := l.accepted[user], hashPassword(password)
	present := slices.IndexFunc(all, func(p userPassword) bool { return p.hash == hash })
	var kept []userPassword
	for i, p := range all {
		if i == present || i < present && time.Since(p.since) < l.times.old || i > present && isUsed(all[present].since) {
			kept = append(kept, p)
		}
	}
	l.accepted[user] = kept
}

// open makes the user of a labelled namespace.
func (l *userLook) open(ctx context.Context, namespace string) {
	s, user := l.given[namespace], namespaceUser(namespace)
	if s != nil && !isOurs(s) {
		l.counts.foreign++
		err := fmt.Errorf("its Secret %s is not ours: an Opaque Secret with the username %s would be; "+
			"delete it, or take the label from the namespace", l.config.sidecarRedisSecret, user)
		subject := "namespace " + namespace
		l.problem(subject, err)
		if _, isOld := l.said[subject]; !isOld {
			l.tell(true, reasonForeign, "Open", subject+": "+err.Error(), string(s.UID))
		}
		return
	}
	password := l.accept(value(s, "password"), user)
	if l.made[user] != "" || l.ca != "" && value(s, "ca.crt") != l.ca {
		l.pending[namespace] = password
	}
	if len(l.accepted[user]) == 1 {
		delete(l.pods, namespace)
	}
	l.prune(user, password, func(since time.Time) bool {
		handedOut := since.Add(l.times.handOut)
		if time.Now().Before(handedOut) {
			return true
		}
		oldest, err := l.oldestPod(ctx, namespace)
		l.fail("namespace "+namespace, err)
		return err != nil || !oldest.IsZero() && oldest.Before(handedOut)
	})
}

// leave removes what a namespace has that has lost its label, or is gone: first the Secret,
// so that no new pod gets it, and after another look at the pods the user. Pods with a
// sidecar keep both.
func (l *userLook) leave(ctx context.Context, namespace string) {
	s, user := l.given[namespace], namespaceUser(namespace)
	if password := value(s, "password"); isOurs(s) && password != "" {
		l.accept(password, user) // usersSecret may have been lost
	}
	isUsed, err := l.isUsed(ctx, namespace)
	switch {
	case err != nil || isUsed:
	case isOurs(s):
		if err = l.k.deleteSecret(ctx, s); err != nil && !errors.Is(err, errNotFound) {
			err = fmt.Errorf("delete its Secret %s: %w", s.Name, err)
			break
		}
		err = nil
		l.written[namespace+"/"+s.Name] = writtenSecret{before: s.ResourceVersion, at: time.Now()}
		delete(l.pods, namespace)
		l.soon = true
	default:
		delete(l.accepted, user)
		l.tell(false, reasonClosed, "Close",
			"removed the user "+user+": its namespace has no label and no pod with a sidecar", user)
	}
	l.fail("namespace "+namespace, err)
}

// isUsed reports whether a namespace that the watch shows without the label has a pod with
// a sidecar, or has the label after all: another setup may have heard of it first.
func (l *userLook) isUsed(ctx context.Context, namespace string) (bool, error) {
	oldest, err := l.oldestPod(ctx, namespace)
	if err != nil || !oldest.IsZero() {
		return true, err
	}
	var n corev1.Namespace
	err = l.k.exchangeObject(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace, nil, &n)
	if errors.Is(err, errNotFound) {
		return false, nil
	}
	return n.Labels[labelSidecars] == "true", err
}

// oldestPod returns the creation of the oldest pod with a sidecar; zero if there is none.
// It is not older than times.pods.
func (l *userLook) oldestPod(ctx context.Context, namespace string) (time.Time, error) {
	if seen, ok := l.pods[namespace]; ok && time.Since(seen.at) < l.times.pods {
		return seen.oldest, nil
	}
	seen := podsSeen{at: time.Now(), shared: map[string]bool{}}
	err := l.k.eachPod(ctx, namespace, "", func(p *corev1.Pod) {
		created := p.CreationTimestamp.Time
		if hasSidecar(p) && (seen.oldest.IsZero() || created.Before(seen.oldest)) {
			seen.oldest = created
		}
		for _, key := range sharedKeysOf(p) {
			seen.shared[key] = true
		}
	})
	if err != nil {
		delete(l.pods, namespace)
		return time.Time{}, fmt.Errorf("list its pods: %w", err)
	}
	l.pods[namespace] = seen
	return seen.oldest, nil
}

// hasSidecar reports whether a pod has a sidecar that may still run.
func hasSidecar(p *corev1.Pod) bool {
	isSidecar := func(c corev1.Container) bool { return c.Name == sidecarName }
	return p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed &&
		slices.ContainsFunc(slices.Concat(p.Spec.InitContainers, p.Spec.Containers), isSidecar)
}

// sharedKeysOf returns the keys of the shared semaphores that the sidecar of a pod may
// use.
func sharedKeysOf(p *corev1.Pod) (keys []string) {
	if !hasSidecar(p) {
		return nil
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if n := len(c.Args); c.Name == sidecarName && n > 1 && strings.HasPrefix(c.Args[n-2], shared) {
			keys = append(keys, strings.TrimPrefix(c.Args[n-2], shared))
		}
	}
	return keys
}

// fit leaves out new namespaces, the last by name, if usersSecret would be too large for
// Kubernetes.
func (l *userLook) fit(listed userPasswords) {
	size, open := l.size(), 0
	var added []string
	for user := range l.accepted {
		if namespace, ok := strings.CutPrefix(user, sidecarUsers); ok {
			open++
			if listed[user] == nil {
				added = append(added, namespace)
			}
		}
	}
	slices.Sort(added)
	n := len(added)
	for ; n > 0 && size > maxSecret; n-- {
		user := namespaceUser(added[n-1])
		size -= l.sizeOf(user)
		delete(l.accepted, user)
		delete(l.made, user)
		delete(l.pending, added[n-1])
		l.counts.waiting++
	}
	if left := len(added) - n; left > 0 {
		l.problem("Secret "+usersSecret, fmt.Errorf("it holds at most %d bytes, enough for %d namespaces: "+
			"%d more have no user, %s is the first; take the label from some", maxSecret, open-left, left, added[n]))
	}
}

// size returns the bytes of usersSecret, or a few more.
func (l *userLook) size() int {
	size := 1 << 10 // for the user default, and setupLogin
	for user := range l.accepted {
		size += l.sizeOf(user)
	}
	return size
}

// sizeOf returns the bytes of a user in usersSecret.
func (l *userLook) sizeOf(user string) int {
	one := userPasswords{user: l.accepted[user]}
	size := len(one.text())
	for _, duty := range l.config.duties() {
		size += len("user  \n") + len(user) + len(one.users(duty, l.sharing)[user])
	}
	return size
}

// save writes usersSecret if it is to change.
func (l *userLook) save(ctx context.Context) error {
	login := value(l.users, setupLogin)
	if now := value(l.own, userOfSetup+"-password"); login == "" || now != "" && now == l.login {
		login = cmp.Or(now, l.made[userOfSetup])
	}
	duties, text := l.config.duties(), l.accepted.text()
	data := map[string][]byte{passwordsFile: []byte(text), setupLogin: []byte(login),
		usersFile: []byte(l.accepted.file(duties[0], l.sharing))}
	if len(duties) > 1 {
		data[locksFile] = []byte(l.accepted.file(holdsLocks, l.sharing))
	}
	if l.users == nil || !maps.EqualFunc(data, l.users.Data, bytes.Equal) {
		var err error
		if l.users, err = l.put(ctx, l.users, l.config.namespace, usersSecret, data); err != nil {
			return err
		}
	}
	if saved := text + string(data[usersFile]); l.wanted == nil || saved != l.saved {
		l.wanted, l.saved = map[redisDuty]map[string]string{}, saved
		for _, duty := range duties {
			l.wanted[duty] = l.accepted.users(duty, l.sharing)
		}
	}
	return nil
}

// put writes the data of a Secret, over the version that was read.
func (l *userLook) put(ctx context.Context, read *corev1.Secret, namespace, name string,
	data map[string][]byte) (*corev1.Secret, error) {
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Type: corev1.SecretTypeOpaque}
	if read != nil {
		s = read.DeepCopy()
	}
	s.Data = data
	now, err := l.k.putSecret(ctx, s)
	if err != nil {
		return read, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.written[namespace+"/"+name] = writtenSecret{versionOf(read), now, time.Now()}
	return now, nil
}

// keepServers makes the users on all servers. It reports whether all that answer have them.
func (l *userLook) keepServers(ctx context.Context) bool {
	if l.wanted == nil {
		return false
	}
	w := userServerWants{users: l.wanted, redis: redisSettings{ca: l.ca}, leaf: l.leaf}
	newest := value(l.own, userOfSetup+"-password")
	for _, password := range []string{newest, value(l.users, setupLogin), l.login, l.made[userOfSetup]} {
		if password != "" && !slices.Contains(w.logins, password) {
			w.logins = append(w.logins, password)
		}
	}
	failures := make([]error, len(l.servers))
	var all sync.WaitGroup
	for i, s := range l.servers {
		all.Go(func() { failures[i] = s.keep(ctx, w) })
	}
	all.Wait()
	isSafe := true
	for i, err := range failures {
		var answered redis.Error
		switch {
		case err == nil:
			l.counts.answering++
			continue
		case errors.As(err, &answered) && !isOffDuty(answered):
			l.counts.refusing++
			isSafe = false
		default:
			l.counts.silent++
		}
		l.soon = true
		l.problem("Redis "+l.servers[i].address, err)
	}
	if l.counts.silent+l.counts.refusing == 0 && strings.Contains(l.saved, hashPassword(newest)) {
		l.login = newest
	}
	return isSafe
}

// handOutOwn writes the new passwords of our own users.
func (l *userLook) handOutOwn(ctx context.Context) {
	data := map[string][]byte{}
	if l.own != nil {
		maps.Copy(data, l.own.Data)
	}
	var keys []string
	for _, p := range l.config.ownPasswords() {
		if password := l.made[p.users[0]]; password != "" {
			data[p.key] = []byte(password)
			keys = append(keys, p.key)
		}
	}
	if keys == nil {
		return
	}
	now, err := l.put(ctx, l.own, l.config.namespace, ownSecret, data)
	if err != nil {
		l.fail("Secret "+ownSecret, err)
		return
	}
	l.own = now
	for _, p := range l.config.ownPasswords() {
		delete(l.made, p.users[0])
	}
	l.tell(false, reasonPasswords, "MakePasswords", "made "+strings.Join(keys, ", "), now.ResourceVersion)
}

// handOut writes the Secrets of the namespaces.
func (l *userLook) handOut(ctx context.Context) {
	var all sync.WaitGroup
	busy := make(slots, callsInFlight)
	for namespace, password := range maps.Clone(l.pending) { // give shortens it
		free, err := busy.take(ctx)
		if err != nil {
			break
		}
		all.Go(func() {
			defer free()
			if err := l.give(ctx, namespace, password); err != nil {
				l.fail("namespace "+namespace, fmt.Errorf("write its Secret %s: %w", l.config.sidecarRedisSecret, err))
			}
		})
	}
	all.Wait()
}

// give writes the Secret of a namespace.
func (l *userLook) give(ctx context.Context, namespace, password string) error {
	s, user := l.given[namespace], namespaceUser(namespace)
	data := map[string][]byte{"username": []byte(user), "password": []byte(password)}
	if ca := cmp.Or(l.ca, value(s, "ca.crt")); ca != "" {
		data["ca.crt"] = []byte(ca)
	}
	now, err := l.put(ctx, s, namespace, l.config.sidecarRedisSecret, data)
	if errors.Is(err, errNotFound) { // the namespace is gone, which its watch will tell
		return nil
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.pending, namespace)
	delete(l.made, user) // who deletes it from the Secret wants another, even before the next look
	if value(s, "password") == "" {
		l.tell(false, reasonOpened, "Open",
			"made the user "+user+" and the Secret "+namespace+"/"+now.Name, now.ResourceVersion)
	}
	return nil
}

// problem notes a problem of a subject.
func (l *userLook) problem(subject string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problems[subject] = errors.Join(l.problems[subject], err)
}

// fail notes a failed call of the API server, unless err is nil.
func (l *userLook) fail(subject string, err error) {
	if err == nil {
		return
	}
	l.problem(subject, err)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.soon = l.soon || errors.Is(err, errTryAgain) || errors.Is(err, errChanged)
}

// saidProblem is a problem that was logged.
type saidProblem struct {
	at     time.Time
	isOver bool
}

// problemsLogged caps the lines about problems of one look.
const problemsLogged = 10

// end logs the problems, each at most once a minute, and keeps what the metrics show. If
// the view of the namespaces may be old, so are their counts. err is why usersSecret was
// not written.
func (l *userLook) end(isOld bool, err error) (soon bool) {
	lines := 0
	for _, subject := range slices.Sorted(maps.Keys(l.problems)) {
		if time.Since(l.said[subject].at) < logEvery || lines == problemsLogged {
			continue
		}
		lines++
		l.said[subject] = saidProblem{at: time.Now()}
		l.log.Warn("not done, to be retried", "subject", subject, "error", l.problems[subject].Error())
	}
	for subject, said := range l.said {
		switch {
		case l.problems[subject] != nil:
		case !said.isOver:
			l.said[subject] = saidProblem{said.at, true}
			l.log.Info("done at last", "subject", subject)
		case time.Since(said.at) > logEvery:
			delete(l.said, subject)
		}
	}
	l.counts.waiting += len(l.pending)
	l.counts.ready = len(l.namespaces) - l.counts.waiting - l.counts.foreign
	l.shownMu.Lock()
	defer l.shownMu.Unlock()
	if isOld {
		l.counts.ready, l.counts.waiting, l.counts.foreign = l.shown.ready, l.shown.waiting, l.shown.foreign
	}
	if l.shown = l.counts; !isOld {
		l.done, l.failed = l.done || err == nil, err
	}
	return l.soon || isOld
}

// tell tells people, by a line of the log and an event about usersSecret. Of events with
// equal reason and id, Kubernetes keeps one an hour. Warnings are logged as problems.
func (l *userLook) tell(warning bool, reason, action, note, id string) {
	if !warning {
		l.log.Info("made", "what", note)
	}
	about := corev1.ObjectReference{APIVersion: "v1", Kind: "Secret", Namespace: l.config.namespace, Name: usersSecret}
	if l.users != nil {
		about.UID = l.users.UID
	}
	l.k.createEvent(objectEvent{about: about, reporter: "setup", warning: warning, reason: reason, action: action,
		note: note, id: id})
}

// usersStep is the name of a userKeeper among the steps of setup.
const usersStep = "users"

// state returns whether usersSecret was written once, and why it cannot be written.
// Problems of single namespaces and servers are no reason: log and metrics tell of them.
func (u *userKeeper) state() (done bool, last error) {
	u.shownMu.Lock()
	defer u.shownMu.Unlock()
	return u.done, u.failed
}

// register adds the metrics.
func (u *userKeeper) register(r *prometheus.Registry) {
	r.MustRegister(failingGauge(usersStep, u.state))
	gauge := func(name, help, label, value string, count func(userCounts) int) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + name, Help: help,
			ConstLabels: prometheus.Labels{label: value}}, func() float64 {
			u.shownMu.Lock()
			defer u.shownMu.Unlock()
			return float64(count(u.shown))
		}))
	}
	const namespaces, servers = "setup_namespaces", "setup_redis_servers"
	const ofNamespaces = "Namespaces with the label for sidecars: ready; waiting, as their user or Secret " +
		"is not made yet; or foreign, as a Secret of the name of ours is there that is not ours."
	const ofServers = "Redis servers for users: ready, with all users; silent, without an answer; " +
		"or refusing, as setup may not log in or make users there."
	gauge(namespaces, ofNamespaces, "state", "ready", func(c userCounts) int { return c.ready })
	gauge(namespaces, ofNamespaces, "state", "waiting", func(c userCounts) int { return c.waiting })
	gauge(namespaces, ofNamespaces, "state", "foreign", func(c userCounts) int { return c.foreign })
	gauge(servers, ofServers, "state", "ready", func(c userCounts) int { return c.answering })
	gauge(servers, ofServers, "state", "silent", func(c userCounts) int { return c.silent })
	gauge(servers, ofServers, "state", "refusing", func(c userCounts) int { return c.refusing })
}
