#!/bin/bash
# install.sh - installs or upgrades the chart: into CONTEXT=... with the images of REGISTRY=... (as `make images` pushed
# them), or, without CONTEXT, into the embedded cluster with the images built there.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' "$REPO/pyproject.toml" | head -n 1)
if [ -n "${CONTEXT:-}" ]; then
  [ -n "${REGISTRY:-}" ] || die "CONTEXT is given but REGISTRY is not: run 'make images REGISTRY=...' and give the same REGISTRY here."
  where=(--kube-context "$CONTEXT")
  images=(--set "image.repository=$REGISTRY/distillation-operator" --set "image.tag=$VERSION"
    --set "workersImage=$REGISTRY/distillation-workers:$VERSION")
else
  export KUBECONFIG=${KUBECONFIG:-$CACHE/cluster/pki/admin.conf}
  [ -f "$KUBECONFIG" ] || die "there is no cluster: run 'make cluster-up', or name one of your own with CONTEXT=..."
  where=()
  # A changed image has the same tag here, so a hash of its code goes into the pods: a change restarts the operator.
  images=(--set image.repository=local.test/distillation-operator --set image.tag=dev
    --set workersImage=local.test/distillation-workers:dev
    --set-string "podAnnotations.image-id=$(hash_of_tree operator/distill_operator operator/Dockerfile crds/distill_api)")
fi
USUAL="10 to 30 seconds" step "helm upgrade --install distillation-operator" helm upgrade --install distillation-operator \
  "$REPO/charts/distillation-operator" --namespace distillation-system --create-namespace \
  --take-ownership "${where[@]}" "${images[@]}" --wait --timeout 3m
