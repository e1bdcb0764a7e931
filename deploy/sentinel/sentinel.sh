# The Sentinel. Clients may ask for the primary without a password; all else needs one.
# The identities are fixed: otherwise a Sentinel that has lost its volume would count as
# a fourth, and its old vote would be missing.
. "${0%/*}/functions.sh"
umask 077
# Its own state only: the other Sentinels soon send it what is new.
primary=$(saved_primary)
primary=${primary:-$first}
epochs=
[ ! -e /data/sentinel.conf ] || epochs=$(sed -n '/^sentinel [a-z]*-epoch /p' /data/sentinel.conf)
peers() {
  identity=0
  for server in $servers; do
    id=7e5700000000000000000000000000000000000$identity
    [ "$server" = "$primary" ] || echo "sentinel known-replica tokens $server 6379"
    [ "$server" = "$me" ] && echo "sentinel myid $id" || echo "sentinel known-sentinel tokens $server 26379 $id"
    identity=$((identity + 1))
  done
}
cat >/data/sentinel.conf.new <<CONFIGURATION || exit 1
port 26379
protected-mode no
dir /data
user default on nopass resetchannels -@all +ping +sentinel|master +sentinel|get-master-addr-by-name
user sentinel on >$REDISCLI_AUTH allchannels +@all
sentinel sentinel-user sentinel
sentinel sentinel-pass $REDISCLI_AUTH
sentinel announce-ip $me
sentinel monitor tokens $primary 6379 2
sentinel auth-user tokens sentinel
sentinel auth-pass tokens $REDISCLI_AUTH
sentinel down-after-milliseconds tokens 5000
sentinel failover-timeout tokens 15000
$(peers)
$epochs
CONFIGURATION
mv /data/sentinel.conf.new /data/sentinel.conf || exit 1 # the container next to this one reads it
exec redis-server /data/sentinel.conf --sentinel
