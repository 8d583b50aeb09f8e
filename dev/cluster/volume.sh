#!/bin/bash
# volume.sh NAMESPACE CLAIM FOLDER [SIZE] - gives a folder of this machine to a namespace of the embedded cluster as a
# PersistentVolumeClaim that many pods may write to. The folder is made for user 1000, as whom the workers run, if it is
# absent; its contents are never deleted. Run again at any time: a volume whose claim was deleted is made anew.
. "$(dirname "$0")/lib.sh"
need_root
[ $# -ge 3 ] || die "usage: volume.sh NAMESPACE CLAIM FOLDER [SIZE]"
need_cluster

NAMESPACE=$1
CLAIM=$2
FOLDER=$(realpath -m "$3")
SIZE=${4:-50Gi}
VOLUME=$NAMESPACE-$CLAIM

make_folder() {
  [ -d "$FOLDER" ] && return 0
  mkdir -p "$FOLDER"
  chown 1000:1000 "$FOLDER"
}

remove_stale_volume() { # released: it still names a claim that is gone, and would never be bound again. Or another folder.
  local found
  found=$(kubectl get persistentvolume "$VOLUME" -o 'jsonpath={.status.phase} {.spec.hostPath.path}' 2>/dev/null) || return 0
  case $found in
    "Bound $FOLDER" | "Available $FOLDER" | "Pending $FOLDER") return 0 ;;
    "Bound "*) echo "claim $CLAIM in $NAMESPACE is bound to another folder (${found#Bound }): delete the claim first"; return 1 ;;
  esac
  kubectl delete persistentvolume "$VOLUME" --timeout=30s
}

make_volume() {
  make_folder
  remove_stale_volume
  kubectl create namespace "$NAMESPACE" --dry-run=client -o yaml | kubectl apply --server-side -f -
  kubectl apply --server-side -f - <<Y
apiVersion: v1
kind: PersistentVolume
metadata: {name: "$VOLUME"}
spec:
  capacity: {storage: "$SIZE"}
  accessModes: [ReadWriteMany]
  storageClassName: ""
  persistentVolumeReclaimPolicy: Retain
  hostPath: {path: "$FOLDER", type: Directory}
  claimRef: {namespace: "$NAMESPACE", name: "$CLAIM"}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: "$CLAIM", namespace: "$NAMESPACE"}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: ""
  volumeName: "$VOLUME"
  resources: {requests: {storage: "$SIZE"}}
Y
  kubectl -n "$NAMESPACE" wait --for=jsonpath='{.status.phase}'=Bound "persistentvolumeclaim/$CLAIM" --timeout=60s
}

step "volume $NAMESPACE/$CLAIM on $FOLDER" make_volume
