package main

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

// namespacesUser is the user of Redis that makes those of the namespaces: deploy/namespace.sh logs in as it.
const namespacesUser = "namespaces"

// namespaceUser is the user of Redis for the sidecars of a namespace.
func namespaceUser(namespace string) string { return "sidecar/" + namespace }

// namespaceUsers knows which namespaces have a user of Redis, to tell of one that was forgotten.
type namespaceUsers struct {
	queue queue // nil where Redis has no users

	asking sync.Mutex
	asked  time.Time
	users  map[string]bool
}

// What is known of the users is believed for usersTime. A namespace that is not among them is asked for, but not more often than each
// usersPause; without an answer in sideTimeout, nothing is known.
const (
	usersTime  = time.Minute
	usersPause = time.Second
)

// forgotten reports whether the sidecars of a namespace cannot log in to Redis, as nobody has run deploy/namespace.sh for it. Where
// that is not known, or users are made by other means, it is false.
func (n *namespaceUsers) forgotten(ctx context.Context, namespace string) bool {
	if n.queue == nil || !n.asking.TryLock() {
		return false
	}
	defer n.asking.Unlock()
	known := func() bool { return n.users[namespaceUser(namespace)] }
	if age := time.Since(n.asked); age > usersTime || age > usersPause && !known() {
		n.users = n.ask(ctx)
		n.asked = time.Now()
	}
	return n.users[namespacesUser] && !known()
}

// ask asks Redis for the names of its users, which the webhook's user may do by +acl|users.
func (n *namespaceUsers) ask(ctx context.Context) map[string]bool {
	names, err := redis.Strings(askQueue(ctx, n.queue, "ACL", "USERS"))
	if err != nil {
		return nil
	}
	users := map[string]bool{}
	for _, name := range names {
		if name == namespacesUser || strings.HasPrefix(name, namespaceUser("")) {
			users[name] = true
		}
	}
	return users
}
