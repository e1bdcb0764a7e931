package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
)

// The users of Redis. setup makes them; docs/security.md documents their rules. The rules
// do for a single server, for one that Sentinels watch, and for a node of a Cluster.
const (
	// userOfSetup makes all other users, and makes Redis reread its certificate.
	userOfSetup = "setup"

	// The users of a Sentinel group: of its replicas, and of its Sentinels and scripts. Both
	// have one password.
	userOfReplicas, userOfSentinels = "replication", "sentinel"

	userOfEveryone = "default"

	// sidecarUsers begins the names of the users of namespaces.
	sidecarUsers = "sidecar/"
)

// namespaceUser is the Redis user of the sidecars of a namespace.
func namespaceUser(namespace string) string { return sidecarUsers + namespace }

const (
	tokenKeys = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~history/*"
	lockKeys  = "~lock/*"

	// scriptRules are those of the scripts that webhook, gate and sidecars run.
	scriptRules = tokenKeys + " &waiters/* +evalsha +time +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del " +
		"+zadd +zrem +zcard +zcount +zrange +zrangebyscore +zscore +zremrangebyscore +ttl +expire +publish " +
		"+info|replication +info|server"

	// setRules are the right to set a length: sidecars and gate have none.
	setRules = "+persist"

	sidecarRules = scriptRules + " +zrank +subscribe"

	// historyRules let status show the history.
	historyRules = "+lrange"

	// groupRules find the server of a semaphore in a Sentinel group or a Cluster.
	groupRules = "+role +cluster|slots +asking"

	lockRules = lockKeys + " +evalsha +set +get +del"

	setupRules = "+info +acl|setuser +acl|deluser +acl|users +config|set"

	// pingRules let a probe ask without a password.
	pingRules = "nopass resetkeys resetchannels -@all +ping"

	// loadRules have no password: no client can log in. Redis reads an append-only file as the
	// user default, and would drop what that user may not do.
	loadRules = "resetpass ~* &* +@all"
)

// redisUser is a user of Redis, except for those of namespaces.
type redisUser struct {
	name  string
	rules string // on the servers of the tokens
	locks string // on servers for the lock only; empty: no user there
}

// redisUsers are in the order of the file users.acl. The webhook's last two rules are for
// its warnings, about namespaces without a user and about a Redis that may evict tokens.
var redisUsers = []redisUser{
	{userOfSetup, setupRules, setupRules},
	{"webhook", scriptRules + " " + setRules + " +eval +scan " + groupRules + " +acl|users +info|memory",
		lockRules + " +eval"},
	{"gate", sidecarRules + " +unsubscribe " + groupRules, lockRules},
	{"status", tokenKeys + " &waiters/* +time +scan +llen +zcard +zcount +zrange +zscore +hmget " + historyRules + " " +
		"+evalsha +exists +hset +hdel +zrem +zrangebyscore +rpush +ltrim +del +ttl +expire +publish " +
		setRules + " +zadd +info|server +info|replication " + groupRules, ""},
	{userOfReplicas, "+ping +psync +replconf", ""},
	{userOfSentinels, "&__sentinel__:hello +ping +role +info +multi +exec +slaveof +replicaof +config|rewrite +publish " +
		"+subscribe +client|setname +client|kill +client|pause +client|unpause +script|kill +dbsize", ""},
}

// redisDuty is what a server is for.
type redisDuty int

const (
	holdsAll    redisDuty = iota // tokens and the lock
	holdsTokens                  // tokens, and the lock has its own servers
	holdsLocks                   // the lock only
)

// sharedKeys are the keys of the shared semaphores that users of namespaces may use, by
// user.
type sharedKeys map[string][]string

// parseSharedKeys reads them from the users as Redis reads them at its start.
func parseSharedKeys(file string) sharedKeys {
	all := sharedKeys{}
	for line := range strings.Lines(file) {
		words := strings.Fields(line)
		for _, word := range words {
			key, found := strings.CutPrefix(word, "~queue/{"+shared+"/")
			if found && words[0] == "user" {
				all[words[1]] = append(all[words[1]], strings.TrimSuffix(key, "}"))
			}
		}
	}
	return all
}

// rules returns the rules of a user on a server. They are empty if there is no such user
// there.
func (d redisDuty) rules(user string, sharing sharedKeys) string {
	namespace, isSidecar := strings.CutPrefix(user, sidecarUsers)
	u := redisUser{user, sidecarRules + " " + historyRules + " " + groupRules, lockRules}
	if !isSidecar {
		i := slices.IndexFunc(redisUsers, func(u redisUser) bool { return u.name == user })
		if i < 0 {
			return ""
		}
		u = redisUsers[i]
	}
	rules := u.rules
	switch {
	case d == holdsLocks:
		rules = u.locks
	case d == holdsAll && u.locks != "" && user != userOfSetup:
		rules += " " + lockKeys + " +set +get"
	}
	if isSidecar {
		rules = ofNamespace(rules, namespace, sharing[user])
	}
	return rules
}

// ofNamespace limits the rules of sidecars to the semaphores of a namespace, and to
// shared ones.
func ofNamespace(rules, namespace string, shares []string) string {
	var all []string
	for _, rule := range strings.Fields(rules) {
		begin := strings.TrimSuffix(rule, "*")
		switch rule[0] {
		case '~':
			all = append(all, begin+"{"+namespace+"/*}")
			for _, key := range shares {
				all = append(all, begin+"{"+shared+"/"+key+"}")
			}
		case '&':
			all = append(all, begin+"{"+namespace+"/*")
			for _, key := range shares {
				all = append(all, begin+"{"+shared+"/"+key+"}/*")
			}
		default:
			all = append(all, rule)
		}
	}
	return strings.Join(all, " ")
}

// userPassword is a password that a user's clients may log in with.
type userPassword struct {
	hash  string    // SHA-256, 64 hex digits: Redis needs no more
	since time.Time // when it was made; in whole seconds
}

// userPasswords are all passwords that Redis accepts, by user, the newest first.
type userPasswords map[string][]userPassword

// hashPassword returns the hash by which Redis knows a password.
func hashPassword(password string) string {
	sum := sha256.Sum256([]byte(password))
	return hex.EncodeToString(sum[:])
}

// passwordHash matches a hash of hashLength digits. A pattern that counts them takes 16 KB of
// each sidecar.
var passwordHash = regexp.MustCompile(`^[0-9a-f]+$`)

const hashLength = 2 * sha256.Size

// parseUserPasswords reads lines of USER SHA256 SINCE. Users that need no rules here are
// dropped.
func parseUserPasswords(text string) (userPasswords, error) {
	all := userPasswords{}
	n := 0
	for line := range strings.Lines(text) {
		n++
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if len(words) != 3 || len(words[1]) != hashLength || !passwordHash.MatchString(words[1]) {
			return nil, fmt.Errorf("line %d is not USER SHA256 SINCE", n)
		}
		since, err := time.Parse(time.RFC3339, words[2])
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		all[words[0]] = append(all[words[0]], userPassword{words[1], since})
	}
	return all, nil
}

// text returns what parseUserPasswords reads.
func (p userPasswords) text() string {
	var b strings.Builder
	for _, user := range slices.Sorted(maps.Keys(p)) {
		for _, one := range p[user] {
			fmt.Fprintf(&b, "%s %s %s\n", user, one.hash, one.since.UTC().Format(time.RFC3339))
		}
	}
	return b.String()
}

// users returns what each user of a server may do, with its passwords.
func (p userPasswords) users(d redisDuty, sharing sharedKeys) map[string]string {
	users := make(map[string]string, len(p))
	for user, passwords := range p {
		rules := d.rules(user, sharing)
		if rules == "" || len(passwords) == 0 {
			continue
		}
		text := "on"
		for _, one := range passwords {
			text += " #" + one.hash
		}
		users[user] = text + " " + rules
	}
	return users
}

// file returns the users as Redis reads them at its start (aclfile).
func (p userPasswords) file(d redisDuty, sharing sharedKeys) string {
	users := p.users(d, sharing)
	everyone := pingRules
	if len(p[userOfReplicas]) > 0 && d != holdsLocks {
		everyone = loadRules
	}
	var b strings.Builder
	line := func(user, rules string) { fmt.Fprintf(&b, "user %s %s\n", user, rules) }
	line(userOfEveryone, "on "+everyone)
	for _, u := range redisUsers {
		if rules, ok := users[u.name]; ok {
			line(u.name, rules)
			delete(users, u.name)
		}
	}
	for _, user := range slices.Sorted(maps.Keys(users)) {
		line(user, users[user])
	}
	return b.String()
}

const (
	// userServerTimeout bounds all work at one server.
	userServerTimeout = 5 * time.Second

	// usersAgain is the time after which a server gets all users again, in case that other
	// hands have changed some.
	usersAgain = 10 * time.Minute

	// redisCertificates is the folder of the certificate in the containers of Redis.
	redisCertificates = "/etc/redis-tls"
)

// userServer is a server on which setup makes the users. One goroutine uses it.
type userServer struct {
	address string // with its scheme
	duty    redisDuty

	conn  *redisConn
	runID string            // of the process that has the users
	made  map[string]string // what each user may do there; nil: not known
	since time.Time         // when all users were made
	leaf  []byte            // of the certificate that the server shows; nil: not known
}

// userServerWants is what the servers should have.
type userServerWants struct {
	users        map[redisDuty]map[string]string // by name: what each may do
	logins       []string                        // passwords of the user setup, the newest first
	redis        redisSettings                   // its user and password are not used
	leaf         []byte                          // of the certificate that setup has made for Redis; nil: none
	certificates string                          // folder of the certificate in the containers of Redis
}

// keep makes the server have the users, and show the certificate. If nothing has changed,
// this is one INFO.
func (s *userServer) keep(ctx context.Context, w userServerWants) error {
	ctx, cancel := context.WithTimeout(ctx, userServerTimeout)
	defer cancel()
	err := s.keepUsers(ctx, w)
	if err == nil {
		err = s.keepCertificate(ctx, w)
	}
	if err != nil {
		s.close()
		return explained(err)
	}
	return nil
}

func (s *userServer) close() {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

// explained says what to do about an error.
func explained(err error) error {
	var answered redis.Error
	if !errors.As(err, &answered) {
		return err
	}
	switch errorCode(answered) {
	case "NOPERM":
		return fmt.Errorf("%w: its user %s needs the rules %q", err, userOfSetup, setupRules)
	case "WRONGPASS":
		return fmt.Errorf("%w: it accepts no password of its user %s that setup knows: restart a Redis of deploy/, "+
			"or put the password of an administrator into the key %s-password of the Secret redis",
			err, userOfSetup, userOfSetup)
	}
	return err
}

// login connects as setup. On a Redis of one's own, the password may be that of the user
// default: setup then makes its own user.
func (s *userServer) login(ctx context.Context, w userServerWants) error {
	err := errors.New("there is no password of the user " + userOfSetup)
	for _, user := range []string{userOfSetup, userOfEveryone} {
		for _, password := range w.logins {
			settings := w.redis
			settings.username, settings.password = user, password
			c, failed := dialRedis(ctx, s.address, settings, userServerTimeout)
			if failed == nil && user == userOfEveryone {
				// In deploy/, each client begins as default, and may only PING.
				if _, refused := redis.DoContext(c, ctx, "ACL", "USERS"); refused != nil {
					c.Close()
					continue
				}
			}
			if failed == nil {
				s.conn = c
				return nil
			}
			if user == userOfSetup {
				err = failed
			}
			if answered := redis.Error(""); !errors.As(failed, &answered) {
				return failed
			}
		}
	}
	return err
}

// keepUsers makes the users that the server lacks, changes those with other rules or
// passwords, and deletes those of namespaces that are not wanted. Open connections stay.
func (s *userServer) keepUsers(ctx context.Context, w userServerWants) error {
	if s.conn == nil || s.conn.idleError() != nil {
		s.close()
		if err := s.login(ctx, w); err != nil {
			return err
		}
	}
	info, err := redis.String(redis.DoContext(s.conn, ctx, "INFO", "server"))
	if err != nil {
		return err
	}
	if _, id, _ := strings.Cut(info, "\nrun_id:"); id == "" || !strings.HasPrefix(id, s.runID+"\r") {
		s.runID, _, _ = strings.Cut(id, "\r")
		s.made, s.leaf = nil, nil
	}
	wanted, made := w.users[s.duty], s.made
	if made == nil || time.Since(s.since) > usersAgain {
		names, err := redis.Strings(redis.DoContext(s.conn, ctx, "ACL", "USERS"))
		if err != nil {
			return err
		}
		s.made, s.since, made = nil, time.Now(), make(map[string]string, len(wanted))
		for _, name := range names {
			if strings.HasPrefix(name, sidecarUsers) {
				made[name] = ""
			}
		}
	}
	var commands [][]any
	for user := range made {
		if _, ok := wanted[user]; !ok && strings.HasPrefix(user, sidecarUsers) {
			commands = append(commands, []any{"DELUSER", user})
		}
	}
	for user, rules := range wanted {
		if made[user] == rules {
			continue
		}
		command := []any{"SETUSER", user, "reset"}
		for _, rule := range strings.Fields(rules) {
			command = append(command, rule)
		}
		commands = append(commands, command)
	}
	if len(commands) > 0 {
		s.made = nil // until all commands are known to have succeeded
		if err := s.acl(ctx, commands); err != nil {
			return err
		}
	}
	s.made = wanted
	return nil
}

// acl sends ACL commands in one round trip. Its error is that of the first one that failed.
func (s *userServer) acl(ctx context.Context, commands [][]any) error {
	for _, c := range commands {
		if err := s.conn.Send("ACL", c...); err != nil {
			return err
		}
	}
	replies, err := redis.Values(redis.DoContext(s.conn, ctx, ""))
	if err != nil {
		return err
	}
	for i, r := range replies {
		if failed, ok := r.(redis.Error); ok {
			return fmt.Errorf("ACL %s %s: %w", commands[i][0], commands[i][1], failed)
		}
	}
	return nil
}

// keepCertificate makes the server read its certificate again until it shows the wanted
// one. The kubelet takes up to two minutes to write the files.
func (s *userServer) keepCertificate(ctx context.Context, w userServerWants) error {
	if w.leaf == nil || bytes.Equal(s.leaf, w.leaf) || !strings.HasPrefix(s.address, "rediss://") {
		return nil
	}
	shown, err := shownLeaf(ctx, s.address, w.redis)
	if err != nil {
		return err
	}
	if s.leaf = shown; bytes.Equal(shown, w.leaf) {
		return nil
	}
	folder := cmp.Or(w.certificates, redisCertificates)
	_, err = redis.DoContext(s.conn, ctx, "CONFIG", "SET",
		"tls-cert-file", folder+"/tls.crt", "tls-key-file", folder+"/tls.key")
	if err != nil {
		return fmt.Errorf("reread the certificate: %w", err)
	}
	s.leaf, err = shownLeaf(ctx, s.address, w.redis)
	return err
}

// shownLeaf returns the certificate that a server shows, if it is trusted.
func shownLeaf(ctx context.Context, address string, settings redisSettings) ([]byte, error) {
	hostPort := strings.TrimPrefix(address, "rediss://")
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		return nil, err
	}
	roots, err := settings.roots()
	if err != nil {
		return nil, err
	}
	raw, err := cmp.Or(settings.resolver, processResolver).dial(ctx, "tcp", hostPort)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	c := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, RootCAs: roots})
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return c.ConnectionState().PeerCertificates[0].Raw, nil
}
