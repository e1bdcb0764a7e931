#!/bin/sh
# namespace.sh NAMESPACE: prepares a namespace for annotated pods. It makes the Redis user
# sidecar/NAMESPACE, which can reach the semaphores of this namespace only. It puts the
# user's password into a Secret there, which the sidecars read. It labels the namespace: the
# NetworkPolicies of Redis and etcd admit no other. Run it again for a new password: running
# pods keep theirs.
#
# namespace.sh --delete NAMESPACE: removes all three.
#
# The Secret redis-namespaces keeps all passwords; each Redis of deploy/ reads them when
# it starts. Needs openssl, and kubectl with KUBECONFIG as usual.
set -eu

hook=at-least-semaphore-pod-hook
label=at-least-semaphore-pod-hook.kaidotio.github.io/sidecars

delete=
if [ "${1:-}" = --delete ]; then
  delete=yes
  shift
fi
namespace=${1:-}
case "$#,$namespace" in
1,-* | *[!a-z0-9,-]* | 1, | [!1]*)
  echo "usage: $0 [--delete] NAMESPACE" >&2
  exit 2
  ;;
esac
if [ -z "$(kubectl -n "$hook" get statefulset redis --ignore-not-found -o name)" ]; then
  echo "there is no statefulset/redis in $hook: in a Redis of your own, make users by the rules in docs/security.md" >&2
  exit 1
fi
there=$(kubectl get namespace "$namespace" --ignore-not-found -o name)
if [ -z "$there$delete" ]; then
  echo "there is no namespace $namespace" >&2
  exit 1
fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
umask 077

secret=$(kubectl -n "$hook" get configmap settings --ignore-not-found -o 'jsonpath={.data.SIDECAR_REDIS_SECRET}')
secret=${secret:-at-least-semaphore-pod-redis}

# put NAMESPACE SECRET <PATCH: merges the patch into the Secret, and makes it if there is
# none.
put() {
  cat >patch.json
  kubectl -n "$1" create secret generic "$2" >made 2>&1 || grep -q "already exists" made || { cat made >&2; return 1; }
  kubectl -n "$1" patch secret "$2" --type=merge --patch-file=patch.json >/dev/null
}

# update_redis FILE: sends the passwords to all servers at once. A server that does not
# answer reads new passwords from the Secret within two minutes.
update_redis() {
  for pod in $(kubectl -n "$hook" get pods -l app.kubernetes.io/component=redis --field-selector=status.phase=Running -o name); do
    send "$pod" "$1" ||
      echo "$pod does not answer: it reads new passwords within two minutes, and drops old users when it restarts" >&2 &
  done
  wait
}

# send POD FILE: fails after twenty seconds, as an exec into a pod that is being replaced
# may never end.
send() {
  kubectl -n "$hook" exec -i "$1" -c redis -- sh /etc/redis/namespace "$namespace" <"$2" &
  exec=$!
  { sleep 20 && kill "$exec"; } >/dev/null 2>&1 &
  limit=$!
  wait "$exec" || return 1
  kill "$limit"
}

# pods: prints the pods with a sidecar, by creation time.
pods() {
  kubectl -n "$namespace" get pods --field-selector=status.phase!=Succeeded,status.phase!=Failed \
    -o 'jsonpath={range .items[*]}{.metadata.creationTimestamp} {.metadata.name} {.spec.initContainers[*].name} {.spec.containers[*].name}{"\n"}{end}' >all
  grep ' at-least-semaphore-pod-sidecar' all | sort || true
}

if [ -n "$delete" ]; then
  [ -z "$there" ] || pods >running
  if [ -n "$there" ] && [ -s running ]; then
    # shellcheck disable=SC2046 # joins the lines
    echo "$namespace has pods with a sidecar, which would lose their tokens; delete these first:" $(cut -d ' ' -f 2 <running | head -n 5) >&2
    exit 1
  fi
  if [ -n "$there" ]; then
    kubectl -n "$namespace" delete secret "$secret" --ignore-not-found >/dev/null
    kubectl label namespace "$namespace" "$label-" >/dev/null
  fi
  echo "{\"data\": {\"$namespace\": null}}" | put "$hook" redis-namespaces
  update_redis /dev/null
  echo "Redis has no user sidecar/$namespace any more"
  exit
fi

# The passwords in use, as PASSWORD TIME, the newest first. A replaced password stays
# valid until all pods from before its successor are gone. The namespace's present
# password always stays valid. A newer one was never handed out.
kubectl -n "$hook" get secret redis-namespaces --ignore-not-found \
  -o "go-template={{with .data}}{{with index . \"$namespace\"}}{{. | base64decode}}{{end}}{{end}}" >old
kubectl -n "$namespace" get secret "$secret" --ignore-not-found -o 'go-template={{with .data}}{{with .password}}{{. | base64decode}}{{end}}{{end}}' >now
echo >>now
pods >running
now=$(kubectl -n "$hook" create configmap clock --dry-run=server -o 'jsonpath={.metadata.creationTimestamp}')
echo "$(openssl rand -hex 32) $now" >new
awk -v oldest="$(head -n 1 running | cut -d ' ' -f 1)" '
  NR == 1 { now = $1 }
  FILENAME == "now" { next }
  $1 == now { n = 0 }
  { line[++n] = $0; since[n] = $2 }
  END { for (i = 1; i <= n; i++) if (i == 1 || oldest != "" && since[i - 1] >= oldest) print line[i] }
' now old >kept

cat new kept >passwords
echo "{\"data\": {\"$namespace\": \"$(base64 <passwords | tr -d '\n')\"}}" | put "$hook" redis-namespaces
update_redis passwords
echo "{\"stringData\": {\"username\": \"sidecar/$namespace\", \"password\": \"$(cut -d ' ' -f 1 new)\"}}" | put "$namespace" "$secret"
kubectl label namespace "$namespace" "$label=true" --overwrite >/dev/null
echo "the sidecars of $namespace log in to Redis as sidecar/$namespace, with the password in the Secret $secret"
