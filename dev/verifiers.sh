#!/bin/bash
# verifiers.sh - a Python with the package verifiers, for rollout.environment.verifiers, in the cache; prints its path.
# Does nothing but that when nothing has changed.
. "$(dirname "$0")/lib.sh"

venv=$CACHE/verifiers
lock=$REPO/workers/requirements-verifiers.lock

make_environment() {
  python3.11 -m uv venv --quiet --clear --python python3.11 "$venv"
  python3.11 -m uv pip sync --quiet --require-hashes --compile-bytecode --python "$venv/bin/python" "$lock"
  sha256sum < "$lock" > "$venv/.made-from"  # last: an interrupted run starts over
}

mkdir -p "$CACHE"
exec {held}> "$venv.lock"
flock "$held"
[ "$(cat "$venv/.made-from" 2> /dev/null)" = "$(sha256sum < "$lock")" ] || step "Python packages of verifiers" make_environment >&2
echo "$venv/bin/python"
