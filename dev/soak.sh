#!/bin/bash
# soak.sh - what needs hours: SOAK_MINUTES (120) over four layers, each of whose parts does its least also in no time.
# Prints what each part did, and exits by the result of all of them. Of the runs that
# are disturbed on the cluster SOAK_RUNS sets the number, and SOAK_SEED repeats one.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -n "${DISTILL_CACHE:-}" ] || export DISTILL_CACHE="$HOME/.cache/distillation-operator"
export SOAK_MINUTES=${SOAK_MINUTES:-120} OMP_NUM_THREADS=1 PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}"

failed=()
for part in operator/unit operator/api workers/workers operator/e2e; do
  echo "=== soak: tests/${part#*/}"
  "${part%/*}/.venv/bin/python" -m pytest -q -s -m soak "tests/${part#*/}" || failed+=("tests/${part#*/}")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "=== soak FAILED after $SECONDS s: ${failed[*]}"
  exit 1
fi
echo "=== soak passed in $SECONDS s"
