# The Redis that holds the tokens: the primary, or one of its replicas.
. "${0%/*}/functions.sh"
primary=$(known)
# A primary that has lost its volume would empty its replicas. It waits until the
# Sentinels have replaced it. If the others hold no data either, this is a fresh
# installation.
while [ "$primary" = "$me" ] && [ ! -e /data/appendonlydir ]; do
  empty='' full=''
  for server in $others; do
    case "$(redis "$server" DBSIZE)" in
    0) empty=yes ;;
    [1-9]* | *LOADING*) full=yes ;;
    esac
  done
  [ -z "$empty" ] || [ -n "$full" ] || break
  echo "nothing in /data: waiting for another server that has the tokens, or that has none either"
  sleep 1
  primary=$(known)
done
[ "$primary" = "$me" ] && follow= || follow="replicaof $primary 6379"
echo "the primary is $primary"
exec redis-server - <<CONFIGURATION
include /etc/redis/redis.conf
$follow
replica-announce-ip $me
masterauth $REDISCLI_AUTH
CONFIGURATION
