# For people: prints the pod that is the primary.
. "${0%/*}/functions.sh"
primary=$(known) pod=0
for server in $servers; do
  [ "$server" != "$primary" ] || echo "redis-$pod"
  pod=$((pod + 1))
done
