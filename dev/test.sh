#!/bin/bash
# test.sh LAYER... - runs the test layers in the order given, says how long each took, stops at the first that fails.
#
# Two processes share the modules of a layer (tests/in_parallel.py), whose lines begin with [1] and [2];
# TEST_PROCESSES=1 runs one. docs/testing.md says what each layer promises.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${DISTILL_CACHE:-}" ] || export DISTILL_CACHE="$HOME/.cache/distillation-operator"
PROCESSES=${TEST_PROCESSES:-2}

# in_parallel PYTHON FOLDER...: the tests of the folders. Fails if one process does; the others run to their end.
in_parallel() {
  local python=$1 claims number failed=0 pids=()
  shift
  claims=$(mktemp -d)
  for ((number = 0; number < PROCESSES; number++)); do
    (
      set -o pipefail
      DISTILL_TEST_PARALLEL="$number:$claims" PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}" \
        "$python" -m pytest -q -p in_parallel -p failures_last -p no:cacheprovider --color=no "$@" 2>&1 |
        sed -u "s/^/[$((number + 1))] /"
    ) &
    pids+=($!)
  done
  for number in "${pids[@]}"; do
    wait "$number" || { echo "a process of the layer ended with code $?"; failed=1; }
  done
  rm -rf "$claims"
  return $failed
}

# instruction_sets: the numerical tests with the kernels of each set of instructions that this processor has.
instruction_sets() {
  local pair aten onednn
  for pair in default:SSE41 avx2:AVX2 avx512:AVX512_CORE; do
    aten=${pair%:*} onednn=${pair#*:}
    case $aten in
      avx2) grep -qw avx2 /proc/cpuinfo || continue ;;
      avx512) grep -qw avx512f /proc/cpuinfo || continue ;;
    esac
    echo "=== isa: ATEN_CPU_CAPABILITY=$aten ONEDNN_MAX_CPU_ISA=$onednn"
    ATEN_CPU_CAPABILITY=$aten ONEDNN_MAX_CPU_ISA=$onednn OMP_NUM_THREADS=1 in_parallel workers/.venv/bin/python \
      tests/workers/test_megatron_*.py tests/workers/test_objective_*.py tests/workers/test_vocabulary_divergence.py ||
      return 1
  done
}

# end_to_end: what brings up a cluster of its own, or needs none, runs beside the jobs on the embedded one.
end_to_end() {
  local python=operator/.venv/bin/python options=(-m pytest -q -s -p no:cacheprovider --color=no) failed=0 pids=() pid
  local own=(tests/e2e/test_cluster.py tests/e2e/test_release.py)
  if [ "$PROCESSES" = 1 ]; then
    "$python" "${options[@]}" tests/e2e
    return
  fi
  (set -o pipefail; "$python" "${options[@]}" tests/e2e "${own[@]/#/--ignore=}" 2>&1 | sed -u "s/^/[1] /") &
  pids+=($!)
  (set -o pipefail; "$python" "${options[@]}" "${own[@]}" 2>&1 | sed -u "s/^/[2] /") &
  pids+=($!)
  for pid in "${pids[@]}"; do
    wait "$pid" || { echo "a process of the layer ended with code $?"; failed=1; }
  done
  return $failed
}

layer() {
  case $1 in
    lint) make --no-print-directory lint ;;
    unit | api | chart) in_parallel operator/.venv/bin/python "tests/$1" ;;
    workers) make --no-print-directory models && dev/verifiers.sh > /dev/null && OMP_NUM_THREADS=1 in_parallel workers/.venv/bin/python tests/workers ;;
    isa) make --no-print-directory models && instruction_sets ;;
    e2e) make --no-print-directory models && end_to_end ;;
    *) echo "no test layer $1: unit, api, chart, workers, isa, e2e or lint" >&2; return 2 ;;
  esac
}

# failed LAYER SECONDS: what failed, last and short, for whoever sees only the end of the output.
failed() {
  echo "=== $1 FAILED after $2 s"
  cat "$DISTILL_TEST_FAILURES"/* 2>/dev/null | head -n 6
}

DISTILL_TEST_FAILURES=$(mktemp -d)
export DISTILL_TEST_FAILURES
trap 'rm -rf "$DISTILL_TEST_FAILURES"' EXIT
begin=$SECONDS
summary=""
for name in "$@"; do
  echo "=== $name"
  start=$SECONDS
  layer "$name" || { failed "$name" $((SECONDS - start)); exit 1; }
  summary+="$(printf '  %-8s %5d s' "$name" $((SECONDS - start)))"$'\n'
  echo "=== $name passed in $((SECONDS - start)) s"
done
printf 'all layers passed in %d s\n%s' $((SECONDS - begin)) "$summary"
