#!/bin/bash
# daemon.sh stop|kill|start|restart NAME - ends one daemon of the running cluster, by SIGTERM or SIGKILL, or starts it again
# as it was: for the tests of what an outage does. NAME is one of etcd kube-apiserver containerd kube-controller-manager
# kube-scheduler kubelet kube-proxy coredns. Pods go on meanwhile. What stays stopped, dev/cluster/down.sh clears like
# anything else.
. "$(dirname "$0")/lib.sh"
need_root
[ $# = 2 ] || die "usage: daemon.sh stop|kill|start|restart NAME"
[[ " ${COMPONENTS[*]} " = *" $2 "* ]] || die "there is no daemon $2: ${COMPONENTS[*]}."
[ -d "$RUN" ] || die "the embedded cluster is not running: start it with dev/cluster/up.sh."
take_lock

COMMAND=$RUN/$2.command

remembered() { # how it was started
  local pid
  if alive "$1"; then
    read -r pid _ < "$RUN/$1.pid"
    cp "/proc/$pid/cmdline" "$COMMAND"
  fi
}

stopped() {
  remembered "$1"
  stop "$1"
}

killed() {
  local pid
  remembered "$1"
  alive "$1" || return 0
  read -r pid _ < "$RUN/$1.pid"
  kill -KILL "$pid"
  while alive "$1"; do sleep 0.1; done
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
  kill) step "kill $2" killed "$2" ;;
  start) step "start $2" started "$2" ;;
  restart)
    step "stop $2" stopped "$2"
    step "start $2" started "$2"
    ;;
  *) die "usage: daemon.sh stop|kill|start|restart NAME" ;;
esac
