package chaos

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The servers have users as in deploy/. The tenant's namespace has one, too.
const (
	tenant = "tenant"

	// scriptsWithin is the time in which a webhook loads the scripts that a server lacks.
	scriptsWithin = 2 * time.Second

	// The tenant opens connections and leaves them idle. They use up what a server accepts
	// within ten seconds, unless it closes them.
	idleEvery   = 50 * time.Millisecond // at each server
	idleTimeout = "5"                   // seconds
	maxClients  = "300"
)

func sidecarUser(namespace string) string { return "sidecar/" + namespace }

// userRules are the rules of the users of one server.
type userRules struct{ webhook, sidecar, gate string }

var (
	queueUsers = userRules{
		webhook: withoutLock(rig.WebhookACL) + groupRules,
		sidecar: withoutLock(rig.SidecarACL) + groupRules,
		gate:    withoutLock(rig.SidecarACL) + groupRules + " " + rig.GateACL,
	}
	lockUsers = userRules{webhook: rig.LockACL + " " + rig.WebhookLockACL, sidecar: rig.LockACL, gate: rig.LockACL}
)

const groupRules = " " + rig.SentinelACL + " " + rig.ClusterACL

func withoutLock(rules string) string { return strings.ReplaceAll(rules, "~lock/* ", "") }

// serverArgs returns the arguments of a server. The user "default" may do all: the test and
// the other servers log in as that user.
func serverArgs(users userRules) []string {
	return slices.Concat(
		[]string{"--timeout", idleTimeout, "--maxclients", maxClients},
		rig.UserArgs("webhook", users.webhook),
		rig.UserArgs("gate", users.gate),
		rig.UserArgs(sidecarUser("shop"), rig.NamespaceRules(users.sidecar, "shop")),
		rig.UserArgs(sidecarUser(tenant), rig.NamespaceRules(users.sidecar, tenant)),
	)
}

// loginAs returns the environment of a process with a user of Redis.
func loginAs(user string) []string {
	return append(os.Environ(), "REDIS_USERNAME="+user, "REDIS_PASSWORD="+rig.Password)
}

// startTenants lets a tenant misuse all servers until the pods end: with the password of
// its namespace, and without one.
func (w *world) startTenants() {
	for _, s := range slices.Concat(w.queue.data(), w.locks) {
		go w.sendEndlessScripts(s.Address)
		go w.openIdleConnections(s.Address)
	}
}

// sendEndlessScripts tries to run scripts that do not end, and cannot be killed.
func (w *world) sendEndlessScripts(address string) {
	const patience = 2 * time.Second
	id := rig.ID{Namespace: tenant, Key: "web"}
	const script = "redis.call('set', KEYS[1], 'x') while true do end"
	for rig.Sleep(w.ctx, time.Second) == nil {
		conn, err := redis.Dial("tcp", address, redis.DialConnectTimeout(patience), redis.DialReadTimeout(patience),
			redis.DialUsername(sidecarUser(tenant)), redis.DialPassword(rig.Password))
		if err != nil {
			continue
		}
		for _, key := range []string{id.StateKey(), id.LockKey()} {
			_, err = conn.Do("EVAL", script, 1, key)
			w.noteRefusal(err)
		}
		_, err = conn.Do("SCRIPT", "LOAD", script)
		w.noteRefusal(err)
		conn.Close()
	}
}

// noteRefusal counts a refused command of the tenant. The server may also be away.
func (w *world) noteRefusal(err error) {
	var answered redis.Error
	switch {
	case err == nil:
		w.complain("a script of the tenant was not refused")
	case errors.As(err, &answered) && strings.HasPrefix(answered.Error(), "NOPERM"):
		w.mu.Lock()
		defer w.mu.Unlock()
		w.refused++
	}
}

// openIdleConnections opens connections without a password, one after another, and keeps
// each until the server closes it. A server that does not answer gets no more of them: its
// backlog would be an outage of its own.
func (w *world) openIdleConnections(address string) {
	for rig.Sleep(w.ctx, idleEvery) == nil {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err != nil {
			continue
		}
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		_, err = conn.Write([]byte("PING\r\n"))
		if err == nil {
			_, err = conn.Read(make([]byte, 100))
		}
		if err != nil {
			conn.Close()
			continue
		}
		_ = conn.SetDeadline(time.Time{})
		go func() {
			defer context.AfterFunc(w.ctx, func() { conn.Close() })()
			defer conn.Close()
			_, _ = io.Copy(io.Discard, conn)
		}()
	}
}

// wantTenantRefused checks that the tenant's scripts came to the servers.
func (w *world) wantTenantRefused() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t.Logf("the servers refused %d commands of the tenant", w.refused)
	if w.refused == 0 {
		w.t.Error("no script of the tenant came to a server")
	}
}
