#!/bin/sh
# certificate.sh: Skaffold runs it before each deployment. The first time, it makes the
# webhook's certificate; later it does nothing. It cannot run after the deployment:
# Skaffold waits for the webhook, which waits for its certificate.
#
# Needs what ../certificate.sh needs, and the name of the cluster's context in
# SKAFFOLD_KUBE_CONTEXT.
set -eu
cd "$(dirname "$0")"

# Use the context that Skaffold deploys to, not the current one.
kubeconfig=$(mktemp)
trap 'rm -f "$kubeconfig"' EXIT
kubectl config view --context "$SKAFFOLD_KUBE_CONTEXT" --minify --flatten --raw >"$kubeconfig"
export KUBECONFIG="$kubeconfig"

# After an earlier run, Kubernetes may still be deleting the namespace and its Secrets.
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
