package rig

// The permissions of the Redis users, as docs/security.md documents them. Each constant
// has all rules of a user, or additional rules.
const (
	WebhookACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~lock/* &waiters/* " +
		"+eval +evalsha +time +scan +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del +zadd +zrem +zcard +zcount " +
		"+zrange +zrangebyscore +zscore +zremrangebyscore +ttl +expire +publish +info|replication +set +get"
	SidecarACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* ~lock/* &waiters/* " +
		"+eval +evalsha +time +exists +hmget +hset +hdel +llen +lpop +rpush +ltrim +del +zadd +zrem +zcard +zcount " +
		"+zrange +zrangebyscore +zrank +zscore +zremrangebyscore +ttl +expire +publish +subscribe +info|replication +set +get"
	StatusACL = "~queue/* ~inflight/* ~waiters/* ~seen/* ~names/* ~state/* " +
		"+time +scan +llen +zcard +zcount +zrange +zscore +hmget"

	// "status release" needs these in addition to StatusACL.
	ReleaseACL = "&waiters/* " +
		"+eval +evalsha +exists +hset +hdel +zrem +zrangebyscore +rpush +ltrim +del +ttl +expire +publish"

	GateACL       = "+unsubscribe"              // of the gate, in addition to SidecarACL
	ForgottenACL  = "+acl|users"                // of the webhook, to warn about namespaces without a user
	EvictionACL   = "+info|memory"              // of the webhook, to warn about a Redis that may evict tokens
	NamespacesACL = "+acl|setuser +acl|deluser" // of the user by which deploy/namespace.sh makes users

	// Webhook and sidecar also need SentinelACL on servers that Sentinels watch, and
	// OnSentinelsACL on the Sentinels.
	SentinelACL    = "+role"
	OnSentinelsACL = "+sentinel|master +sentinel|get-master-addr-by-name"

	ClusterACL = "+role +cluster|slots +asking" // of webhook and sidecar, in addition, on a Cluster

	LockACL = "~lock/* +eval +set +get +del" // of webhook and sidecar on servers that hold only locks
)
