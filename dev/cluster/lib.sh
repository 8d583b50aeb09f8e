# shellcheck shell=bash disable=SC2034
# cluster/lib.sh - settings and process helpers of the embedded cluster (bash; sourced, never run).
#
# Everything that a second cluster on the same machine must have for itself comes from the environment, so that the
# tests of the cluster's own recovery never touch the developer's.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# Without symbolic links, since the kernel names mounts so; short, since unix socket paths end at 108 characters.
STATE=$(realpath -m "${DISTILL_CLUSTER_STATE:-$CACHE/cluster}")
NETNS=${DISTILL_CLUSTER_NETNS:-distill}          # network namespace of the node; at most 14 characters (interface v<name>)
NET=${DISTILL_CLUSTER_NET:-10.200}               # first two numbers of the /16 that the cluster may use
NODE=${DISTILL_CLUSTER_NODE:-node1}
CGROUP=${DISTILL_CLUSTER_CGROUP:-distill}        # cgroup that holds every process and pod of the cluster

HOST_IP=$NET.0.1
NODE_IP=$NET.0.2
NODE_NET=$NET.0.0/24
POD_NET=$NET.16.0/20
NODE_POD_NET=$NET.16.0/22                        # what the one node hands out: 1,021 addresses
SERVICE_NET=$NET.32.0/20
API_SERVICE_IP=$NET.32.1
DNS_IP=$NET.32.10

PKI=$STATE/pki
RUN=$STATE/run
LOG=$STATE/log
SOCKET=$RUN/containerd.sock
export KUBECONFIG=$PKI/admin.conf

COMPONENTS=(etcd kube-apiserver containerd kube-controller-manager kube-scheduler kubelet kube-proxy coredns)

# --- processes -------------------------------------------------------------------------------------------------------

start_time_of() { # PID : empty for a dead process and for a zombie (init may reap late, which must not look alive)
  awk '{sub(/.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null || true
}

alive() { # NAME : the process that we started under NAME lives. The start time tells a recycled pid from ours.
  local pid started
  [ -f "$RUN/$1.pid" ] || return 1
  read -r pid started < "$RUN/$1.pid" || return 1
  [ -n "$started" ] && [ "$(start_time_of "$pid")" = "$started" ]
}

spawn() { # NAME COMMAND... : starts it unless it runs, in the node's network namespace and cgroup
  local name=$1
  shift
  spawn_on_host "$name" nsenter --net="/run/netns/$NETNS" -- "$@"
}

spawn_on_host() { # NAME COMMAND... : the same in the host's network
  local name=$1 pid
  shift
  alive "$name" && return 0
  (
    echo "$BASHPID" > "$(process_cgroup)/cgroup.procs"
    exec 3>&- 4>&- 9>&-                          # the terminal and the lock of the script that starts us
    if [ -n "$STEP_TICKER" ]; then exec {STEP_TICKER}>&-; fi
    exec setsid "$@"
  ) </dev/null >>"$LOG/$name.log" 2>&1 &
  pid=$!
  echo "$pid $(start_time_of "$pid")" > "$RUN/$name.pid"
}

stop() { # NAME [SECONDS] : TERM, a bounded wait, KILL
  local pid started i
  if alive "$1"; then
    read -r pid started < "$RUN/$1.pid"
    kill -TERM "$pid" 2>/dev/null || true
    for ((i = 0; i < ${2:-10} * 10; i++)); do alive "$1" || break; sleep 0.1; done
    if alive "$1"; then kill -KILL "$pid" 2>/dev/null || true; fi
  fi
  rm -f "$RUN/$1.pid"
}

wait_for() { # SECONDS NAME-OR-- COMMAND... : polls; gives up early when the named process has died
  local limit=$1 name=$2 from=$SECONDS
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ "$name" != - ] && ! alive "$name"; then
      echo "$name died; the end of $LOG/$name.log:" >&2
      tail -n 8 "$LOG/$name.log" >&2
      return 1
    fi
    if [ $((SECONDS - from)) -ge "$limit" ]; then
      echo "gave up after $limit s waiting for: $*" >&2
      return 1
    fi
    sleep 0.2
  done
}

cluster_is_up() {
  local name
  for name in "${COMPONENTS[@]}"; do alive "$name" || return 1; done
}

need_cluster() { cluster_is_up || die "the embedded cluster is not running: start it with dev/cluster/up.sh."; }

ctrk() { ctr -a "$SOCKET" -n k8s.io "$@"; }

# Not "… | grep -q": it stops reading at the first match, and under pipefail the writer's broken pipe is a failure.
has_image() { [ -n "$(ctrk images ls -q "name==$1")" ]; }

take_lock() { # one script at a time changes the cluster; the lock goes with the process, however it ends
  mkdir -p "$(dirname "$STATE")"
  exec 9>"$STATE.lock"
  flock -n 9 || { echo "waiting for another script that works on $STATE"; flock 9; }
}

# --- cgroups ---------------------------------------------------------------------------------------------------------
# Every process of the cluster lives below one cgroup: our own daemons and containerd's shims in its child "node", pods
# in "kubepods". So "what is left of the cluster" has an exact answer, even after a hard kill and with no pid file left.

cgroup_roots() { # the hierarchies of this machine: one for cgroup v2, one per controller for v1, both kinds where mixed
  awk '$3 == "cgroup" || $3 == "cgroup2" {print $2}' /proc/self/mounts
}

process_cgroup() { # pids counts and limits nothing by itself: a neutral place on v1
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then echo "/sys/fs/cgroup/$CGROUP/node"; else echo "/sys/fs/cgroup/pids/$CGROUP/node"; fi
}

make_cgroups() { # kubelet wants its root in every hierarchy
  local root
  for root in $(cgroup_roots); do
    mkdir -p "$root/$CGROUP"
    if [ -e "$root/cpuset.cpus" ] && [ -z "$(cat "$root/$CGROUP/cpuset.cpus")" ]; then  # v1 starts them empty, which forbids processes
      cat "$root/cpuset.mems" > "$root/$CGROUP/cpuset.mems"
      cat "$root/cpuset.cpus" > "$root/$CGROUP/cpuset.cpus"
    fi
  done
  mkdir -p "$(process_cgroup)"
}

cluster_pids() { # every process below our cgroup, in any hierarchy
  local root
  for root in $(cgroup_roots); do
    if [ -d "$root/$CGROUP" ]; then find "$root/$CGROUP" -name cgroup.procs -exec cat {} + 2>/dev/null; fi
  done | sort -un
}

remove_cgroups() {
  local root
  for root in $(cgroup_roots); do
    if [ -d "$root/$CGROUP" ]; then find "$root/$CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null; fi
  done
}

# --- what a run leaves behind ----------------------------------------------------------------------------------------

cluster_mounts() { # deepest first; the kernel writes spaces and the like as octal escapes, hence printf %b
  local point
  awk -v state="$STATE/" 'index($2, state) == 1 {print $2}' /proc/self/mounts | sort -r | while read -r point; do printf '%b\n' "$point"; done
}

kill_leftovers() {
  local i pids
  for ((i = 0; i < 300; i++)); do
    pids=$(cluster_pids)
    [ -n "$pids" ] || return 0
    # A frozen v1 cgroup would keep its processes from dying.
    find "/sys/fs/cgroup/freezer/$CGROUP" -name freezer.state -exec sh -c 'echo THAWED > "$1"' _ {} \; 2>/dev/null
    # shellcheck disable=SC2086  # a list of numbers
    kill -KILL $pids 2>/dev/null
    sleep 0.1
  done
  die "these processes of the cluster do not end: $(cluster_pids | tr '\n' ' ')"
}

clear_leftovers() { # brings the machine back to "no cluster", whatever a hard kill left; keeps certificates and images
  set +e                                         # each line clears what it can; what stays is noticed by the next start
  local point address
  kill_leftovers
  for _ in 1 2 3; do                             # mounts may be stacked on one another
    cluster_mounts | while IFS= read -r point; do umount -l "$point" 2>/dev/null; done
  done
  # What is deleted below must not reach through a mount into somebody's folder.
  [ -z "$(cluster_mounts)" ] || die "these mounts of the cluster cannot be removed: $(cluster_mounts | tr '\n' ' ')"
  find "$STATE/containerd-run" -name address -path '*k8s.io*' 2>/dev/null | while read -r address; do
    rm -f "$(sed 's#^unix://##' "$address")"     # shims keep their sockets in one folder that all containerds share
  done
  if [ -e "/run/netns/$NETNS" ]; then
    ip netns delete "$NETNS" 2>/dev/null || rm -f "/run/netns/$NETNS"   # a plain file is left if its mount is gone
  fi
  ip link delete "v$NETNS" 2>/dev/null           # goes with the namespace, unless that is kept alive elsewhere
  remove_cgroups
  rm -rf "${STATE:?}"/{etcd,kubelet,cni,podlogs,containerd-run,run} "$STATE/containerd/io.containerd.grpc.v1.cri"
  if [ -d "$LOG" ]; then rm -rf "$LOG.previous"; mv "$LOG" "$LOG.previous"; fi
  set -e
}
