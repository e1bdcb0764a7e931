#!/bin/sh
# certificate.sh: what Skaffold runs before each deployment. The first time, it makes the webhook's certificate; after that,
# it does nothing. It cannot be done after the deployment: Skaffold waits for the webhook before, and the webhook for the
# certificate.
#
# Needs what ../certificate.sh needs, and the name of the cluster's context in SKAFFOLD_KUBE_CONTEXT.
set -eu
cd "$(dirname "$0")"

# Only the context that Skaffold deploys to, whatever the current one is.
kubeconfig=$(mktemp)
trap 'rm -f "$kubeconfig"' EXIT
kubectl config view --context "$SKAFFOLD_KUBE_CONTEXT" --minify --flatten --raw >"$kubeconfig"
export KUBECONFIG="$kubeconfig"

# Of a loop that was stopped a moment ago, the namespace may still be going, and the Secret with it.
namespace=$(kubectl get namespace at-least-semaphore-pod-hook --ignore-not-found -o 'jsonpath={.status.phase}')
if [ "$namespace" = Terminating ]; then
  echo "waiting for the end of the namespace at-least-semaphore-pod-hook, which is being deleted"
  kubectl wait --for=delete namespace/at-least-semaphore-pod-hook --timeout=3m
fi

if [ -z "$(kubectl -n at-least-semaphore-pod-hook get secret webhook-certificate --ignore-not-found -o name)" ]; then
  kubectl delete --ignore-not-found -f ../base/webhook-configuration.yaml
  kubectl apply -f ../base/00-namespace.yaml -f ../base/webhook-configuration.yaml
  ../certificate.sh
fi
