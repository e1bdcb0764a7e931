# Ready: the primary, or a replica in sync with it. So a rolling update or a drain
# continues only when this pod could replace the next one.
. "${0%/*}/functions.sh"
role=$(role)
case "$role" in
master | "slave connected") exit 0 ;;
esac
echo "role: $role"
exit 1
