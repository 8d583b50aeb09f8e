#!/bin/bash
# daemon.sh stop|start|restart NAME - ends one daemon of the running cluster, or starts it again as it was: for the tests
# of what an outage does. NAME is one of etcd kube-apiserver containerd kube-controller-manager kube-scheduler kubelet
# kube-proxy coredns. Pods go on meanwhile. What stays stopped, dev/cluster/down.sh clears like anything else.
. "$(dirname "$0")/lib.sh"
need_root
[ $# = 2 ] || die "usage: daemon.sh stop|start|restart NAME"
[[ " ${COMPONENTS[*]} " = *" $2 "* ]] || die "there is no daemon $2: ${COMPONENTS[*]}."
[ -d "$RUN" ] || die "the embedded cluster is not running: start it with dev/cluster/up.sh."
take_lock

COMMAND=$RUN/$2.command

stopped() { # remembers how it was started
  local pid
  if alive "$1"; then
    read -r pid _ < "$RUN/$1.pid"
    cp "/proc/$pid/cmdline" "$COMMAND"
  fi
  stop "$1"
}

started() {
  local command
  [ -f "$COMMAND" ] || die "nothing says how $1 was started: stop it with daemon.sh, or run dev/cluster/up.sh."
  mapfile -d '' -t command < "$COMMAND"
  spawn "$1" "${command[@]}"
  if [ "$1" = kube-apiserver ]; then wait_for 180 "$1" kubectl get --raw /readyz; fi
}

case $1 in
  stop) step "stop $2" stopped "$2" ;;
  start) step "start $2" started "$2" ;;
  restart)
    step "stop $2" stopped "$2"
    step "start $2" started "$2"
    ;;
  *) die "usage: daemon.sh stop|start|restart NAME" ;;
esac
