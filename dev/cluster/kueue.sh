#!/bin/bash
# kueue.sh [down] - installs Kueue 0.19.2 into the embedded cluster, with its own Helm chart, and waits until it answers;
# down removes it, with everything in its queues. The chart is that of the module version that the binary was built from
# (dev/tools/kueue/go.mod). Only the test of Kueue (tests/e2e/test_kueue.py) needs it.
. "$(dirname "$0")/lib.sh"
need_root
need_go
need_cluster
[ -x "$BIN/helm" ] || die "$BIN/helm is missing: run dev/tools.sh."
take_lock

NAMESPACE=kueue-system
MODULE=sigs.k8s.io/kueue

remove() { # what has a finalizer goes while the manager is there to take it away
  if kubectl get crd clusterqueues.kueue.x-k8s.io >/dev/null 2>&1; then
    kubectl delete workloads.kueue.x-k8s.io,localqueues.kueue.x-k8s.io --all --all-namespaces --timeout=60s
    kubectl delete clusterqueues.kueue.x-k8s.io,resourceflavors.kueue.x-k8s.io --all --timeout=60s
  fi
  helm uninstall kueue -n "$NAMESPACE" --ignore-not-found --wait --timeout 120s
  kubectl delete namespace "$NAMESPACE" --ignore-not-found --wait
}

if [ "${1:-}" = down ]; then
  step "Kueue is removed" remove
  exit
fi

cd "$DEV/tools/kueue"
SOURCE=$(go list -m -f '{{.Dir}}' "$MODULE")
if [ -z "$SOURCE" ]; then
  step "Kueue's module" again go mod download "$MODULE"
  SOURCE=$(go list -m -f '{{.Dir}}' "$MODULE")
fi

install_chart() {
  if [[ $(helm status kueue -n "$NAMESPACE" 2>/dev/null) = *"STATUS: pending"* ]]; then helm uninstall kueue -n "$NAMESPACE" --wait; fi
  helm upgrade --install kueue "$SOURCE/charts/kueue" -n "$NAMESPACE" --create-namespace \
    --values "$DEV/charts/kueue.yaml" --wait --timeout 300s
}

# Its webhooks answer once its certificates are in them, seconds after the pod is ready.
answers() { kubectl create --dry-run=server -f "$REPO/examples/kueue/queues.yaml" 2>&1 | grep -q "resourceflavor.*created"; }
answered() {
  local end=$((SECONDS + 120))
  until answers; do
    [ "$SECONDS" -lt "$end" ] || die "Kueue's webhooks do not answer: kubectl -n $NAMESPACE logs deployment/kueue-controller-manager says why."
    sleep 1
  done
}

[ -x "$BIN/kueue-manager" ] || die "$BIN/kueue-manager is missing: run dev/tools.sh kueue."
"$DEV/images.sh" kueue
step "Kueue (Helm)" install_chart
step "Kueue answers" answered
