# shellcheck shell=bash disable=SC2034
# lib.sh - settings and helpers of every script under dev/ (bash; sourced, never run).

DEV=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(dirname "$DEV")
CACHE=${DISTILL_CACHE:-$HOME/.cache/distillation-operator}  # survives between runs: Go binaries, images, cluster state
BIN=$CACHE/bin
UV_VERSION=0.13.9
export PATH=$BIN:$PATH:/usr/sbin:/sbin                      # Debian keeps nft, debootstrap and friends in sbin

now() { date +%s.%N; }
since() { awk -v from="$1" -v to="$(now)" 'BEGIN {printf "%.1f", to - from}'; }

die() { # SENTENCE : what is missing or wrong, and what to do about it
  echo "error: $*" >&2
  exit 1
}

# A failing command must end the script, inside a step too; "step … || …" would switch that off. So the report of a
# failed step stands in the EXIT trap. 3 and 4 are the terminal, wherever the step's own output goes.
set -e -o pipefail
exec 3>&1 4>&2
STEP_LOG=

step() { # TEXT COMMAND... : one line "TEXT ... 1.2 s"; the command's output is shown only if it fails
  local text=$1 from
  shift
  from=$(now)
  STEP_FROM=$from STEP_LOG=$(mktemp)
  printf '%s ... ' "$text"
  "$@" >"$STEP_LOG" 2>&1
  rm -f "$STEP_LOG"
  STEP_LOG=
  echo "$(since "$from") s"
}

report_failed_step() {
  local status=$?
  [ -n "$STEP_LOG" ] || return 0
  echo "failed after $(since "$STEP_FROM") s" >&3
  [ "$status" -eq 0 ] || tail -n 40 "$STEP_LOG" >&4
  rm -f "$STEP_LOG"
}
trap report_failed_step EXIT

hash_of() { # FILE... : one hash for the contents of all of them
  cat -- "$@" | sha256sum | cut -c1-16
}

hash_of_tree() { # FOLDER-OR-FILE... : names and contents, without Python's caches
  (cd "$REPO" && find "$@" -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0r sha256sum) | sha256sum | cut -c1-16
}

# One sentence each for what a machine may lack.
need_root() { [ "$(id -u)" -eq 0 ] || die "this must run as root: namespaces, mounts and cgroups need it."; }
need_command() { command -v "$1" >/dev/null || die "'$1' is missing: run dev/setup.sh (Debian package: ${2:-$1})."; }
need_go() {
  command -v go >/dev/null || die "Go 1.26 or newer is missing: install it and put its bin folder into PATH."
  local version
  version=$(cd / && go env GOVERSION)
  [ "$(printf '%s\n' "go1.26" "$version" | sort -V | head -n 1)" = "go1.26" ] || die "Go 1.26 or newer is needed, found $version."
}
need_python() { command -v python3.11 >/dev/null || die "Python 3.11 is missing: install the Debian package python3.11 (and python3.11-dev)."; }
need_gcc() { command -v gcc >/dev/null || die "A C compiler is missing: install the Debian packages gcc and libc6-dev."; }
need_disk() { # GIB FOLDER
  local free
  mkdir -p "$2"
  free=$(df --output=avail -BG "$2" | tail -n 1 | tr -dc 0-9)
  [ "$free" -ge "$1" ] || die "$1 GiB must be free on the disk of $2, but only $free GiB are: make room, or set DISTILL_CACHE to a larger disk."
}
