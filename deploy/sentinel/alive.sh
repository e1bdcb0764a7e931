# alive.sh PORT. Alive: that server answers within five seconds, and not that a script keeps
# it BUSY. After any other answer, a restart would not help. Redis says BUSY only to
# clients that have logged in.
answer=$(timeout 5 redis-cli -h 127.0.0.1 -p "$1" --user sentinel --no-auth-warning PING 2>&1)
case "$answer" in
"" | *BUSY* | "Could not connect"*) ;;
*) exit 0 ;;
esac
echo "port $1: ${answer:-no answer}"
exit 1
