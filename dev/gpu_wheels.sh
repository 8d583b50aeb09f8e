#!/bin/bash
# gpu_wheels.sh [FOLDER] - collects what tests/gpu needs on a machine that has only PyTorch with CUDA, transformers and
# triton, and no network: some wheels of workers/requirements-gpu.lock, and this repository's code, below 60 MB.
#
#   PYTHON=3.12 dev/gpu_wheels.sh build/gpu/bring      # the Python of that machine; by default 3.11
#
# There:  tar xf distillation-operator.tar && pip install --no-index --find-links . --no-deps *.whl
#         cd distillation-operator && python tests/gpu/run.py
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-build/gpu/bring}
PYTHON=${PYTHON:-3.11}
LIMIT_MB=60
# What the trainer imports, and transformers does not bring.
PACKAGES=(megatron-core einops psutil pydantic pydantic-core annotated-types typing-extensions typing-inspection pyyaml)

pins() { # the lines of those packages in the lock, with their hashes
  local name
  for name in "${PACKAGES[@]}"; do
    awk -v name="$name" '$0 ~ "^" name "==" {on = 1} on {print} on && !/\\$/ {exit}' workers/requirements-gpu.lock
  done
}

mkdir -p "$FOLDER"
pins > "$FOLDER/requirements.txt"
[ "$(grep -c '==' "$FOLDER/requirements.txt")" = "${#PACKAGES[@]}" ] || { echo "workers/requirements-gpu.lock lacks one of: ${PACKAGES[*]}" >&2; exit 1; }
platforms=()
for glibc in 17 24 27 28 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary=:all: --require-hashes --python-version "$PYTHON" \
  "${platforms[@]}" --platform manylinux2014_x86_64 -r "$FOLDER/requirements.txt" -d "$FOLDER"
git archive --prefix=distillation-operator/ -o "$FOLDER/distillation-operator.tar" HEAD crds workers tests/gpu LICENSE
size=$(($(du -sk "$FOLDER" | cut -f1) / 1024))
[ "$size" -le "$LIMIT_MB" ] || { echo "$FOLDER has $size MB, above $LIMIT_MB" >&2; exit 1; }
echo "$FOLDER: $(ls "$FOLDER"/*.whl | wc -l) wheels for Python $PYTHON and the code, $size MB"
