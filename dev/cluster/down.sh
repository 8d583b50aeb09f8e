#!/bin/bash
# down.sh [--purge] - stops the embedded cluster and leaves no process, mount, namespace, interface, route or cgroup of it.
# Certificates and images stay for the next start; --purge deletes the whole state folder (its images too).
# Clients that go on talking to its addresses afterwards reach the machine's default gateway: stop them first.
. "$(dirname "$0")/lib.sh"
need_root
FROM=$(now)
take_lock

stop_containers() { # ended by containerd while it lives: it then knows of no container at the next start
  local id i
  for id in $(ctrk tasks ls -q); do timeout 10 ctr -a "$SOCKET" -n k8s.io tasks kill -s KILL -a "$id" || true; done
  for ((i = 0; i < 50; i++)); do
    if [[ $(ctrk tasks ls) != *RUNNING* ]]; then break; fi
    sleep 0.1
  done
  for id in $(ctrk containers ls -q); do
    timeout 10 ctr -a "$SOCKET" -n k8s.io tasks rm -f "$id" || true
    ctrk containers rm "$id" || true
    ctrk snapshots rm "$id" || true
  done
}

stop_daemons() {
  local name
  for name in prometheus-targets prometheus kubelet kube-proxy coredns kube-scheduler kube-controller-manager; do stop "$name"; done
  if alive containerd; then stop_containers; fi
  for name in kube-apiserver etcd containerd; do stop "$name" 20; done
}

clean=false
if cluster_is_up; then clean=true; fi
if [ -d "$RUN" ]; then step "stop daemons and containers" stop_daemons; fi
step "clear mounts, namespace, cgroups" clear_leftovers
if $clean; then touch "$STATE/stopped-cleanly"; fi

# Deleting gigabytes can take minutes. Moved first, an interrupted purge never leaves half a store of images in place.
if [ "$1" = --purge ] && [ -d "$STATE" ]; then mv "$STATE" "$STATE.gone.$$"; fi
if compgen -G "$STATE.gone.*" >/dev/null; then step "delete the state folder" rm -rf "$STATE".gone.*; fi
if [ "$1" = --purge ]; then rm -f "$STATE.lock"; fi
echo "cluster is down after $(since "$FROM") s"
