#!/bin/sh
# certificate.sh: for clusters without cert-manager. It makes a certificate for the
# webhook, valid for ten years, and puts it into the Secret webhook-certificate. It puts
# the certificate's own authority into the webhook's configuration and throws the
# authority's key away. Run it again to renew: the API server trusts both authorities
# meanwhile, so that no admission fails. If the webhook has no secret path yet, it runs
# path-secret.sh, too.
#
# Needs openssl, and kubectl with KUBECONFIG as usual.
set -eu

namespace=at-least-semaphore-pod-hook
service=webhook.$namespace.svc
configuration=mutatingwebhookconfiguration/at-least-semaphore-pod-hook
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=$service authority" -out ca.crt
openssl ecparam -name prime256v1 -genkey -noout -out tls.key
openssl req -new -key tls.key -subj "/CN=$service" -out tls.csr
printf 'subjectAltName=DNS:%s,DNS:%s.cluster.local\nextendedKeyUsage=serverAuth\n' "$service" "$service" >extensions
serial=1$(openssl rand -hex 15 | tr abcdef ABCDEF)
openssl x509 -req -set_serial "0x$serial" -in tls.csr -CA ca.crt -CAkey ca.key -days 3650 -extfile extensions -out tls.crt 2>/dev/null

trust() { # trust FILE: sets what the API server trusts
  bundle=$(base64 <"$1" | tr -d '\n')
  step() { printf '{"op":"add","path":"/webhooks/%d/clientConfig/caBundle","value":"%s"}' "$1" "$bundle"; }
  kubectl patch "$configuration" --type=json -p "[$(step 0),$(step 1)]"
}

kubectl get "$configuration" -o 'jsonpath={.webhooks[0].clientConfig.caBundle}' | base64 -d >old.crt
cat ca.crt old.crt >both.crt
trust both.crt
kubectl -n "$namespace" create secret tls webhook-certificate --cert=tls.crt --key=tls.key --dry-run=client -o yaml | kubectl apply -f -
# behind: prints the running webhooks that have not logged the new certificate.
behind() {
  list=$(kubectl -n "$namespace" get pods -l app.kubernetes.io/component=webhook --field-selector=status.phase!=Failed,status.phase!=Succeeded -o name) ||
    { echo unknown; return; }
  for pod in $list; do
    kubectl -n "$namespace" logs "$pod" 2>&1 | grep -q "\"serialNumber\":\"$serial\"" || echo "$pod"
  done
}

if [ -s old.crt ]; then # a renewal: the old authority stays until all webhooks have the new certificate
  echo "waiting until all webhooks have the new certificate, which takes the kubelets a minute or two"
  deadline=$(($(date +%s) + 300))
  while pods=$(behind) && [ -n "$pods" ]; do
    if [ "$(date +%s)" -gt "$deadline" ]; then
      # shellcheck disable=SC2086 # joins the lines
      echo "without the certificate with serial number $serial:" $pods "- both authorities stay trusted" >&2
      exit 1
    fi
    sleep 2
  done
fi
trust ca.crt

case "$(kubectl get "$configuration" -o 'jsonpath={.webhooks[0].clientConfig.service.path}')" in
/mutate/*) ;;
*) "$here/path-secret.sh" ;;
esac
