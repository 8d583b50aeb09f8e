"""The suite for the first GPU (tests/gpu) runs whole, but for CUDA itself, in its tiny form on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPO

SUITE = REPO / "tests" / "gpu" / "run.py"
OF_THE_TRAINER = ("parity", "training_step", "kernels", "buckets", "files")
"""Without engine_step, a whole `distill run`, which test_local_run.py has many of."""


ABSENT = (
    "sglang",
    "ray",
    "aiohttp",
    "orjson",
    "prometheus_client",
    "click",
    "rich",
    "datasets",
    "matplotlib",
    "pytest",
)
"""Packages of the workers that neither PyTorch nor transformers brings, and dev/gpu_wheels.sh does not collect."""
WITHOUT = f"""
import sys

for name in {ABSENT}:
    sys.modules[name] = None  # an import of it is an error
"""


def suite(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SUITE), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(400)
def test_every_part_of_the_trainer_runs_with_few_packages_keeps_its_bounds_and_is_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    done = suite(*OF_THE_TRAINER, "--folder", str(tmp_path), DISTILL_GPU_TINY="cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert [(part["part"], part["status"]) for part in found["parts"]] == [(p, "passed") for p in OF_THE_TRAINER]
    checked = {row["what"]: row["value"] for part in found["parts"] for row in part["rows"] if row["holds"]}
    assert checked["tensors held after a step"] == pytest.approx(18, abs=0.01), "bytes for each parameter, of sizing.md"
    assert checked["steps that were left out"] == checked["exported tensors that are others"] == 0
    table = (tmp_path / "table.md").read_text()
    assert all(f"| **{part}** | passed: all bounds hold |" in table for part in OF_THE_TRAINER)


def test_without_cuda_the_suite_is_skipped_with_a_sentence() -> None:
    done = suite(CUDA_VISIBLE_DEVICES="", DISTILL_GPU_TINY="")
    assert done.returncode == 0 and done.stdout.startswith("tests/gpu: skipped, torch sees no CUDA device here")


def test_a_part_that_does_not_exist_is_refused_with_those_that_do() -> None:
    done = suite("parity", "colour")
    assert done.returncode == 2 and "no part colour; there are parity, training_step" in done.stderr
