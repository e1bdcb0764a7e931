#!/bin/sh
# namespace.sh NAMESPACE: lets annotated pods of a namespace have sidecars. It makes a user of Redis for them, sidecar/NAMESPACE, which can
# touch the semaphores of this namespace and no other, and puts its password into a Secret there, which the sidecars read. Run it again
# for another password: what runs keeps the one that it has.
#
# namespace.sh --delete NAMESPACE: removes both.
#
# The passwords are kept in the Secret redis-namespaces, from which each Redis of deploy/ reads them when it starts. Needs openssl, and
# kubectl with KUBECONFIG as usual.
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

# put NAMESPACE SECRET <PATCH: into the Secret, which is made if there is none, and may have other keys, too.
put() {
  cat >patch.json
  kubectl -n "$1" create secret generic "$2" >made 2>&1 || grep -q "already exists" made || { cat made >&2; return 1; }
  kubectl -n "$1" patch secret "$2" --type=merge --patch-file=patch.json >/dev/null
}

# tell_redis FILE: the passwords, to all servers at once. What one does not hear, it reads in the Secret: new passwords within two minutes.
tell_redis() {
  for pod in $(kubectl -n "$hook" get pods -l app.kubernetes.io/component=redis --field-selector=status.phase=Running -o name); do
    tell "$pod" "$1" || echo "$pod does not answer: it learns new passwords within two minutes, and forgets old users when it starts again" >&2 &
  done
  wait
}

# tell POD FILE: fails after twenty seconds, as an exec into a pod that is just being replaced may never end.
tell() {
  kubectl -n "$hook" exec -i "$1" -c redis -- sh /etc/redis/namespace "$namespace" <"$2" &
  exec=$!
  { sleep 20 && kill "$exec"; } >/dev/null 2>&1 &
  limit=$!
  wait "$exec" || return 1
  kill "$limit"
}

# pods: those that have a sidecar, by the time of their creation.
pods() {
  kubectl -n "$namespace" get pods --field-selector=status.phase!=Succeeded,status.phase!=Failed \
    -o 'jsonpath={range .items[*]}{.metadata.creationTimestamp} {.metadata.name} {.spec.initContainers[*].name} {.spec.containers[*].name}{"\n"}{end}' >all
  grep ' at-least-semaphore-pod-sidecar' all | sort || true
}

if [ -n "$delete" ]; then
  [ -z "$there" ] || pods >running
  if [ -n "$there" ] && [ -s running ]; then
    # shellcheck disable=SC2046 # joins the lines
    echo "$namespace has pods with a sidecar, which would lose their tokens: delete these first:" $(cut -d ' ' -f 2 <running | head -n 5) >&2
    exit 1
  fi
  if [ -n "$there" ]; then
    kubectl -n "$namespace" delete secret "$secret" --ignore-not-found >/dev/null
    kubectl label namespace "$namespace" "$label-" >/dev/null
  fi
  echo "{\"data\": {\"$namespace\": null}}" | put "$hook" redis-namespaces
  tell_redis /dev/null
  echo "Redis has no user sidecar/$namespace any more"
  exit
fi

# What is in use: PASSWORD TIME, the newest first. A password that a newer one has replaced is good until no pod is left from before. The
# one that the namespace has now is good in any case, and what is newer than that was never given to anybody.
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
tell_redis passwords
echo "{\"stringData\": {\"username\": \"sidecar/$namespace\", \"password\": \"$(cut -d ' ' -f 1 new)\"}}" | put "$namespace" "$secret"
kubectl label namespace "$namespace" "$label=true" --overwrite >/dev/null
echo "the sidecars of $namespace log in to Redis as sidecar/$namespace, by the Secret $secret"
