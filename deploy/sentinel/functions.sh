# Functions of the other scripts. They need a shell with "timeout" and "sed", and the
# programs of Redis 7.0 or later, or of Valkey under these names. The password is in
# REDISCLI_AUTH, and in no argument.

# Kubernetes puts the addresses of the pods' own Services into the environment. They stay
# the same when a pod gets a new address. Host names would stay, too, but Sentinel blocks
# while it resolves one. If that takes two seconds, as it may just after a node is lost,
# Sentinel enters TILT mode and replaces no primary for half a minute.
first=${REDIS_0_SERVICE_HOST:?there is no Service redis-0}
servers="$first ${REDIS_1_SERVICE_HOST:?there is no Service redis-1} ${REDIS_2_SERVICE_HOST:?there is no Service redis-2}"
# shellcheck disable=SC2034 # the other scripts use them
case $POD in
*-0) me=$first others=${servers#* } ;;
*-1) me=$REDIS_1_SERVICE_HOST others="$first $REDIS_2_SERVICE_HOST" ;;
*) me=$REDIS_2_SERVICE_HOST others=${servers% *} ;;
esac

# redis SERVER COMMAND..., sentinel SERVER COMMAND...: print the reply, a line for each
# value. They fail after two seconds, or on an error, which they print.
redis() {
  server=$1
  shift
  timeout 2 redis-cli -e -h "$server" -p 6379 --user sentinel --no-auth-warning "$@" 2>&1
}
sentinel() {
  server=$1
  shift
  timeout 2 redis-cli -e -h "$server" -p 26379 --user sentinel --no-auth-warning "$@" 2>&1
}

# opinion_of SERVER: prints the config-epoch of its Sentinel, and the primary that it
# names. The highest epoch is the newest. While a Sentinel replaces the primary, only the
# first command names the new one.
opinion_of() {
  printf '%s\n' "SENTINEL GET-MASTER-ADDR-BY-NAME tokens" "SENTINEL MASTER tokens" | sentinel "$1" | {
    read -r named && read -r _ && while read -r field && read -r value; do
      [ "$field" != config-epoch ] || echo "$value $named"
    done
  }
}

# saved FIELD: prints a field that our own Sentinel has saved: "monitor" (the primary) or
# "config-epoch".
saved() {
  [ ! -e /data/sentinel.conf ] || sed -n "s/^sentinel $1 tokens \([^ ]*\).*/\1/p" /data/sentinel.conf
}

# saved_primary: prints the primary that our own Sentinel has saved, if there is such a
# server.
saved_primary() {
  primary=$(saved monitor)
  case " $servers " in
  *" ${primary:-none} "*) echo "$primary" ;;
  esac
}

# known: prints the primary of the highest config-epoch. It compares the Sentinels that
# answer with what our own has saved. Without any, it prints the first server. When all
# pods start at once, the first Sentinel that answers may hold an old state.
known() {
  primary=$(saved_primary) latest=$(saved config-epoch)
  latest=${latest:-0}
  [ -n "$primary" ] || primary=$first latest=-1
  for server in $servers; do
    opinion=$(opinion_of "$server") epoch=${opinion% *}
    if [ "${epoch:--1}" -gt "$latest" ]; then
      latest=$epoch primary=${opinion#* }
    fi
  done
  echo "$primary"
}

# role: prints "master", or "slave" with the state of its link. It fails if Redis does not
# answer.
role() {
  answer=$(redis 127.0.0.1 ROLE) && echo "$answer" | {
    read -r role && read -r _ && read -r _ && read -r state
    [ "$role" = slave ] && echo "slave $state" || echo "$role"
  }
}
