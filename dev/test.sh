#!/bin/bash
# test.sh LAYER... - runs the test layers in the order given, says how long each took, stops at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${DISTILL_CACHE:-}" ] || export DISTILL_CACHE="$HOME/.cache/distillation-operator"

layer() {
  case $1 in
    lint) make --no-print-directory lint ;;
    unit) operator/.venv/bin/python -m pytest -q tests/unit ;;
    api) operator/.venv/bin/python -m pytest -q tests/api ;;
    chart) operator/.venv/bin/python -m pytest -q tests/chart ;;
    workers) make --no-print-directory models && OMP_NUM_THREADS=1 workers/.venv/bin/python -m pytest -q tests/workers ;;
    e2e) make --no-print-directory models && operator/.venv/bin/python -m pytest -q tests/e2e ;;
    *) echo "no test layer $1: unit, api, chart, workers, e2e or lint" >&2; return 2 ;;
  esac
}

begin=$SECONDS
summary=""
for name in "$@"; do
  echo "=== $name"
  start=$SECONDS
  layer "$name" || { echo "=== $name FAILED after $((SECONDS - start)) s"; exit 1; }
  summary+="$(printf '  %-8s %5d s' "$name" $((SECONDS - start)))"$'\n'
  echo "=== $name passed in $((SECONDS - start)) s"
done
printf 'all layers passed in %d s\n%s' $((SECONDS - begin)) "$summary"
