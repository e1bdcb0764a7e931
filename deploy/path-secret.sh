#!/bin/sh
# path-secret.sh: makes a secret path, which authenticates the API server: the webhook
# refuses callers that do not know it. It puts the secret into the Secret webhook-path and
# into the webhook's configuration. Run it again for a new secret: both are valid
# meanwhile, so that no admission fails. certificate.sh runs it, too.
#
# Needs openssl, and kubectl with KUBECONFIG as usual.
set -eu

namespace=at-least-semaphore-pod-hook
configuration=mutatingwebhookconfiguration/at-least-semaphore-pod-hook
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
umask 077

openssl rand -hex 32 >new
# The present path, with or without a secret. The API server calls it until all webhooks
# know the new one.
path=$(kubectl get "$configuration" -o 'jsonpath={.webhooks[0].clientConfig.service.path}')
case "$path" in
/mutate/*) echo "${path#/mutate/}" >old ;;
*) : >old ;;
esac

accept() { # accept FILE: sets the valid secrets, one a line
  kubectl -n "$namespace" create secret generic webhook-path --from-file=secret="$1" --dry-run=client -o yaml | kubectl apply -f - >/dev/null
}

cat new old >both
accept both
if [ -s old ]; then
  digest=$(openssl dgst -sha256 -r <both | cut -c 1-16)
  # behind: prints the webhooks that have not logged the new secret.
  behind() {
    list=$(kubectl -n "$namespace" get pods -l app.kubernetes.io/component=webhook --field-selector=status.phase!=Failed,status.phase!=Succeeded -o name) ||
      { echo unknown; return; }
    for pod in $list; do
      kubectl -n "$namespace" logs "$pod" 2>&1 | grep -q "\"digest\":\"$digest\"" || echo "$pod"
    done
  }
  echo "waiting until all webhooks know the new secret, which takes the kubelets a minute or two"
  deadline=$(($(date +%s) + 300))
  while pods=$(behind) && [ -n "$pods" ]; do
    if [ "$(date +%s)" -gt "$deadline" ]; then
      # shellcheck disable=SC2086 # joins the lines
      echo "without the new secret:" $pods "- the old one stays in use" >&2
      exit 1
    fi
    sleep 2
  done
fi
step() { printf '{"op":"add","path":"/webhooks/%d/clientConfig/service/path","value":"/mutate/%s"}' "$1" "$(cat new)"; }
printf '[%s,%s]' "$(step 0)" "$(step 1)" >patch.json
kubectl patch "$configuration" --type=json --patch-file=patch.json
# The old secret stays valid until all API servers know the new path.
[ ! -s old ] || sleep 30
accept new
