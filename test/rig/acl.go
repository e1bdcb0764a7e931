package rig

import "strings"

// The permissions of the Redis users, as docs/security.md documents them. Each constant
// has all rules of a user, or additional rules.
const (
	WebhookACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~history/* ~lock/* &waiters/* " +
		"+eval +evalsha +time +scan +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del +zadd +zrem +zcard +zcount " +
		"+zrange +zrangebyscore +zscore +zremrangebyscore +ttl +expire +persist +publish +info|replication +info|server +set +get"
	SidecarACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~history/* ~lock/* &waiters/* " +
		"+evalsha +time +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del +zadd +zrem +zcard +zcount " +
		"+zrange +zrangebyscore +zrank +zscore +zremrangebyscore +ttl +expire +publish +subscribe +info|replication +info|server +set +get"
	StatusACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~history/* " +
		"+time +scan +llen +lrange +zcard +zcount +zrange +zscore +hmget"

	// "status release" needs these in addition to StatusACL.
	ReleaseACL = "&waiters/* " +
		"+evalsha +exists +hset +hdel +zrem +zrangebyscore +rpush +ltrim +del +ttl +expire +publish"

	// "status set" needs these in addition to both.
	SetACL = "+persist +zadd +info|server +info|replication"

	HistoryACL   = "+lrange"      // of a sidecar, for "status history", in addition to SidecarACL
	GateACL      = "+unsubscribe" // of the gate, in addition to SidecarACL
	ForgottenACL = "+acl|users"   // of the webhook, to warn about namespaces without a user
	EvictionACL  = "+info|memory" // of the webhook, to warn about a Redis that may evict tokens

	// Webhook and sidecar also need SentinelACL on servers that Sentinels watch, and
	// OnSentinelsACL on the Sentinels.
	SentinelACL    = "+role"
	OnSentinelsACL = "+sentinel|master +sentinel|get-master-addr-by-name"

	ClusterACL = "+role +cluster|slots +asking" // of webhook and sidecar, in addition, on a Cluster

	// On servers that hold only locks.
	LockACL        = "~lock/* +evalsha +set +get +del" // of sidecar and gate
	WebhookLockACL = "+eval"                           // of the webhook, in addition
)

// AdminUser is the user by which Sentinels and redis-cli log in; see Redis.hideAge.
const AdminUser = "administrator"

// NamespaceRules returns the rules of a namespace's user: the rules of all sidecars, with
// the namespace in each key and channel.
func NamespaceRules(rules, namespace string) string {
	var all []string
	for rule := range strings.FieldsSeq(rules) {
		switch {
		case strings.HasPrefix(rule, "~"):
			rule = strings.TrimSuffix(rule, "*") + "{" + namespace + "/*}"
		case strings.HasPrefix(rule, "&"):
			rule = strings.TrimSuffix(rule, "*") + "{" + namespace + "/*"
		}
		all = append(all, rule)
	}
	return strings.Join(all, " ")
}

// Ageless returns rules of a user without the right to ask for the age of a server: a test's
// server is young, and would let no pod in.
func Ageless(rules string) string { return strings.ReplaceAll(rules, " +info|server", "") }

// UserArgs returns the arguments of a redis-server for a user with the Password.
func UserArgs(user, rules string) []string {
	return append([]string{"--user", user, "on", ">" + Password}, strings.Fields(rules)...)
}
