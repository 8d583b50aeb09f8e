#!/bin/bash
# tools.sh - builds the Go programs of the embedded cluster from the modules pinned under dev/tools/ into the cache:
# Kubernetes' six and Helm and CoreDNS (one module, so that they share most of the compiling), KubeRay (its own: it needs
# older Kubernetes libraries), and kube-score, which reads the chart for the tests (its own, for a minute). From an empty
# cache that is about 13 minutes of two cores; with an unchanged go.mod nothing. `tools.sh kueue` builds Kueue's manager
# alone, which only its own test on the cluster needs.
. "$(dirname "$0")/lib.sh"

export CGO_ENABLED=0
KUBERNETES_VERSION=v1.36.2
STRIP="-s -w"
STAMP="-X k8s.io/component-base/version.gitVersion=$KUBERNETES_VERSION -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"

go_build() { # FOLDER LDFLAGS OUTPUT PACKAGE : -p 2, or compiling takes more memory than a small machine has
  (cd "$DEV/tools/$1" && echo "packages: $(again go list -deps "$4" | wc -l)" && again go build -v -p 2 -trimpath -ldflags "$2" -o "$3" "$4")
}

step_detail() { # go build -v names each package that it compiles; what is cached already, it does not
  awk '/^packages: /{all = $2; n = 0; next} /^go: /{last = $0; next} {n++}
    END {if (all) printf "%d of at most %d packages", n, all; else print substr(last, 1, 70)}' "$STEP_LOG"
}

build_kubernetes() {
  go_build kubernetes "$STRIP $STAMP" "$NEW/" tool
  go_build kubernetes "$STRIP $STAMP" "$NEW/coredns" ./coredns
}

build_lint() { go_build lint "$STRIP" "$NEW/" tool; }

build_kuberay() { go_build kuberay "$STRIP" "$NEW/kuberay-operator" github.com/ray-project/kuberay/ray-operator; }

build_kueue() { go_build kueue "$STRIP" "$NEW/kueue-manager" sigs.k8s.io/kueue/cmd/kueue; }

group() { # GROUP USUAL BINARY... : builds the group aside, then moves the binaries in place; its stamp comes last
  local name=$1 usual=$2 key binary missing=false
  shift 2
  key=$(find "$DEV/tools/$name" -type f ! -name '*.md' -print0 | sort -z | xargs -0 cat | sha256sum | cut -c1-16)
  for binary in "$@"; do
    if [ ! -x "$BIN/$binary" ]; then missing=true; fi
  done
  if ! $missing && [ "$(cat "$BIN/.$name" 2>/dev/null)" = "$key" ]; then return 0; fi
  need_go
  need_disk 12 "$CACHE"
  # Moved, never written in place: images hold hard links to binaries, and a running daemon its own.
  NEW=$BIN/.new.$name
  rm -rf "$NEW"
  mkdir -p "$NEW"
  USUAL="$usual the first time" step "build $name ($*)" "build_$name"
  mv -f "$NEW"/* "$BIN/"
  rmdir "$NEW"
  echo "$key" > "$BIN/.$name"
}

mkdir -p "$BIN"
exec 8>"$BIN/.lock"
flock -n 8 || { echo "waiting for another build of the tools"; flock 8; }
case "${1:-}" in
  '') ;;
  kueue)
    group kueue "some minutes" kueue-manager
    exit
    ;;
  *) die "unknown tools '$1': kueue, or nothing for all others." ;;
esac
group kubernetes "about 7 minutes" kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl helm coredns
group kuberay "about 2 minutes" kuberay-operator
group lint "about a minute" kube-score
