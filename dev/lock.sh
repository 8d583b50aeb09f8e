#!/bin/bash
# lock.sh - makes the hashed locks from pyproject.toml again. Versions that are locked stay, unless pyproject.toml says
# otherwise; `lock.sh --upgrade` takes the newest.
. "$(dirname "$0")/lib.sh"

lock() { # FILE EXTRA...
  local file=$REPO/$1 extras=()
  shift
  for extra in "$@"; do extras+=(--extra "$extra"); done
  # No annotations and no header: they would name the index that was asked.
  python3.11 -m uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 \
    "${extras[@]}" ${UPGRADE:+--upgrade} --output-file "$file" "$REPO/pyproject.toml"
}

[ "${1:-}" != --upgrade ] || UPGRADE=1
step "operator/requirements.lock" lock operator/requirements.lock operator
step "operator/requirements-dev.lock" lock operator/requirements-dev.lock operator cli dev docs
step "workers/requirements-cpu.lock" lock workers/requirements-cpu.lock workers
step "workers/requirements-dev.lock" lock workers/requirements-dev.lock workers dev models
