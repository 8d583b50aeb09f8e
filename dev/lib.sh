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
STEP_LOG='' STEP_TICKER=''

clock() { # within `make demo`, whose first second DISTILL_STARTED is: "[  61.2 s] "
  [ -z "${DISTILL_STARTED:-}" ] || printf '[%6s s] ' "$(since "$DISTILL_STARTED")"
}

# TEXT COMMAND... : "TEXT ... 1.2 s". A longer step shows from its fifth second on that it lives: on a terminal a line that
# grows, elsewhere one line for each 30 s. USUAL="about 7 minutes" before it says what to expect. Its output is a file,
# named where a wait is announced, and shown (its end) if the command fails.
step() {
  local text=$1 usual=${USUAL:-} from
  shift
  from=$(now)
  STEP_TEXT=$text STEP_FROM=$from STEP_LOG=$(mktemp "${TMPDIR:-/tmp}/distill-step.XXXXXX")
  if [ -n "$usual" ]; then echo "$(clock)$text: usually $usual; its output: $STEP_LOG"; fi
  if [ -t 3 ]; then printf '%s ... ' "$(clock)$text" >&3; fi
  exec {STEP_TICKER}> >(tick "$text" "$usual" >&3)
  STEP_TICKER_PID=$!
  "$@" >"$STEP_LOG" 2>&1
  end_ticker
  rm -f "$STEP_LOG"
  STEP_LOG=
  echo "$(clock)$text ... $(since "$from") s"
}

step_detail() { # the last line of the step's output; a script may have something better to say
  tail -c 400 "$STEP_LOG" 2>/dev/null | tr '\r' '\n' | tr -cd '[:print:]\n' | grep . | tail -n 1 | cut -c 1-70
}

tick() { # TEXT USUAL : shows that the step lives, until a line or the end of the input comes
  local from=$SECONDS elapsed status last=0 width=80
  trap - EXIT
  if [ -t 3 ]; then width=$(stty size <&3 2>/dev/null | cut -d' ' -f2); fi
  while true; do
    status=0
    read -rt 1 _ || status=$?
    # Above 128: nothing came. A script that was killed outright says nothing either.
    if [ "$status" -le 128 ] || ! kill -0 "$$" 2>/dev/null; then break; fi
    elapsed=$((SECONDS - from))
    [ "$elapsed" -ge 5 ] || continue
    if [ -t 3 ]; then
      # No longer than the terminal is wide: a line that wraps cannot be written over.
      printf '\r\033[K%s' "$(growing "$@" | cut -c "1-$((${width:-80} - 1))")"
    elif [ $((elapsed / 30)) -gt "$last" ]; then
      last=$((elapsed / 30))
      growing "$@"
    fi
  done
  if [ -t 3 ]; then printf '\r\033[K'; fi
}

growing() { # TEXT USUAL
  local detail
  detail=$(step_detail) || true                   # no output yet
  echo "$(clock)$1 ... $((SECONDS - from)) s${2:+ of $2}${detail:+, $detail}"
}

end_ticker() {
  [ -n "$STEP_TICKER" ] || return 0
  (echo >&"$STEP_TICKER") 2>/dev/null || true      # in a process of its own, which SIGPIPE may end
  exec {STEP_TICKER}>&-
  STEP_TICKER=
  wait "$STEP_TICKER_PID" 2>/dev/null || true
}

report_failed_step() {
  local status=$?
  [ -n "$STEP_LOG" ] || return 0
  end_ticker
  echo "$(clock)$STEP_TEXT failed after $(since "$STEP_FROM") s" >&3
  if [ "$status" -eq 0 ]; then
    rm -f "$STEP_LOG"
  else
    tail -n 40 "$STEP_LOG" >&4
    echo "all of its output: $STEP_LOG" >&4
  fi
}
trap report_failed_step EXIT

again() { # COMMAND...: three tries, for what a download needs that Go does not try again itself
  local pause
  for pause in 5 20; do
    "$@" && return 0
    echo "failed; once more in $pause s: $*" >&2
    sleep "$pause"
  done
  "$@"
}

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
