#!/bin/bash
# lock.sh - makes the hashed locks from pyproject.toml again. Versions that are locked stay, unless pyproject.toml says
# otherwise; `lock.sh --upgrade` takes the newest.
. "$(dirname "$0")/lib.sh"

lock_apart() { # FILE EXTRA [OPTION...]
  local file=$REPO/$1 extra=$2 scratch
  shift 2
  scratch=$(mktemp -d)
  python3.11 "$DEV/requirements_apart.py" "$REPO/pyproject.toml" "$extra" > "$scratch/requirements.in"
  # Outside the repository, whose [tool.uv] leaves out what a CPU's workers never import.
  (cd "$scratch" && python3.11 -m uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 \
    "$@" ${UPGRADE:+--upgrade} --output-file "$file" requirements.in)
  rm -r "$scratch"
}

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
step "workers/requirements-dev.lock" lock workers/requirements-dev.lock workers dev models s3 store-tests
# What the workers' CPU lock has, as it has it, and what the overrides leave out of it.
step "workers/requirements-gpu.lock" lock_apart workers/requirements-gpu.lock workers --constraint "$REPO/workers/requirements-cpu.lock"
step "workers/requirements-verifiers.lock" lock_apart workers/requirements-verifiers.lock verifiers
