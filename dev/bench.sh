#!/bin/bash
# bench.sh [NAME]... - runs benchmarks of bench/, each beside its peer in one run; all of them without a name. On a quiet
# machine: every figure is of the processor. About half an hour in all. JOBS=1000 for operator_scale as in the documents.
# By name only: silent_killers, and methods, whose every run takes minutes: SETS="control baseline" SEEDS="0 1 2" STEPS=40.
. "$(dirname "$0")/lib.sh"

export PYTHONPATH=$REPO/crds:$REPO/cli:$REPO/workers OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
WORKERS=$REPO/workers/.venv/bin/python
PEERS=$REPO/bench/.venv

peers() { # TRL, in an environment of its own
  local key
  key=$(hash_of "$REPO/bench/requirements.lock")
  [ "$(cat "$PEERS/.set-up" 2>/dev/null)" != "$key" ] || return 0
  python3.11 -m uv venv --quiet --clear --python python3.11 "$PEERS"
  python3.11 -m uv pip sync --quiet --require-hashes --python "$PEERS/bin/python" "$REPO/bench/requirements.lock"
  echo "$key" > "$PEERS/.set-up"
}

[ $# -gt 0 ] || set -- loop_overlap teacher_scoring divergence weight_sync hf_load checkpoint_stall handover operator_scale
for name in "$@"; do
  echo "=== $name"
  case $name in
    divergence) USUAL="a minute or two the first time" step "Python packages of the peers" peers; "$PEERS/bin/python" -W ignore "$REPO/bench/divergence.py" ;;
    loop_overlap | teacher_scoring | weight_sync | hf_load | checkpoint_stall | handover) "$WORKERS" -W ignore "$REPO/bench/$name.py" ;;
    silent_killers) USUAL="a minute or two the first time" step "Python packages of the peers" peers; "$PEERS/bin/python" -W ignore "$REPO/bench/silent_killers.py" ;;
    # shellcheck disable=SC2086  # both are lists
    methods) "$WORKERS" -W ignore "$REPO/bench/methods.py" --sets ${SETS:-control} --seeds ${SEEDS:-0 1 2} ${STEPS:+--steps "$STEPS"} ${OUT:+--out "$OUT"} ;;
    operator_scale) PYTHONPATH=$REPO/crds:$REPO/operator "$REPO/operator/.venv/bin/python" "$REPO/bench/$name.py" "${JOBS:-100}" ;;
    *) die "no benchmark $name in bench/." ;;
  esac
done
