#!/bin/bash
# kuberay.sh - installs the KubeRay operator 1.6.1 into the embedded cluster, with Helm, and waits until it is ready.
# CRDs and permissions come from the very module version that the binary was built from (dev/tools/kuberay/go.mod).
. "$(dirname "$0")/lib.sh"
need_root
need_go
need_cluster
[ -x "$BIN/helm" ] || die "$BIN/helm is missing: run dev/tools.sh."
take_lock

NAMESPACE=kuberay-system
MODULE=github.com/ray-project/kuberay/ray-operator
cd "$DEV/tools/kuberay"
SOURCE=$(go list -m -f '{{.Dir}}' "$MODULE")
if [ -z "$SOURCE" ]; then
  step "KubeRay's module" again go mod download "$MODULE"
  SOURCE=$(go list -m -f '{{.Dir}}' "$MODULE")
fi

apply_crds() { # by the server: they are too large for the annotation of a client-side apply, and Helm never updates CRDs
  kubectl apply --server-side --force-conflicts -f "$SOURCE/config/crd/bases"
  kubectl wait --for=condition=Established --timeout=300s crd/rayclusters.ray.io crd/rayjobs.ray.io crd/rayservices.ray.io crd/raycronjobs.ray.io
}

install_chart() {
  local chart
  chart=$(mktemp -d)
  cp -r "$DEV/charts/kuberay/." "$chart"
  mkdir "$chart/files"
  cp "$SOURCE/config/rbac/role.yaml" "$chart/files/"
  # An interrupted run leaves a release that Helm calls "pending" and refuses to touch.
  if [[ $(helm status kuberay -n "$NAMESPACE" 2>/dev/null) = *"STATUS: pending"* ]]; then helm uninstall kuberay -n "$NAMESPACE" --wait; fi
  helm upgrade --install kuberay "$chart" -n "$NAMESPACE" --create-namespace --wait --timeout 300s
  rm -rf "$chart"
}

ready() { kubectl -n "$NAMESPACE" rollout status deployment/kuberay-operator --timeout=300s; }

has_image local.test/kuberay-operator:1.6.1 || "$DEV/images.sh" kuberay
# What is installed says what it was made from: nothing to do if that is still the same.
KEY=$(hash_of "$DEV"/charts/kuberay/{Chart,values}.yaml "$DEV"/charts/kuberay/templates/*.yaml "$DEV/tools/kuberay/go.sum")
if [ "$(kubectl get namespace "$NAMESPACE" -o 'jsonpath={.metadata.annotations.distillation-operator\.io/installed}' 2>/dev/null)" != "$KEY" ]; then
  step "KubeRay's CRDs" apply_crds
  step "KubeRay's operator (Helm)" install_chart
  kubectl annotate --overwrite namespace "$NAMESPACE" "distillation-operator.io/installed=$KEY" >/dev/null
fi
step "KubeRay is ready" ready
