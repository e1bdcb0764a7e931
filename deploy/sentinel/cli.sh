# For people: cli.sh COMMAND... sends a command to the primary, as the webhook's user.
. "${0%/*}/functions.sh"
primary=$(known)
REDISCLI_AUTH=$(cat /etc/redis-password/webhook-password) exec redis-cli -h "$primary" -p 6379 --user webhook --no-auth-warning "$@"
