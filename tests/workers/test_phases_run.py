"""A whole run in phases: the teacher's responses, distillation until an evaluation is flat, the reward alone."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import MODELS, Outcome, Run, arithmetic

from distill_api.job import parse_job
from distill_api.protocol import ExitCode
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer

pytestmark = pytest.mark.timeout(900)

ROWS = {"promptField": "prompt", "answerField": "answer", "applyChatTemplate": False}
STEPS, NAMES = 6, ["warm-start", "warm-start", "distil", "distil", "reinforce", "reinforce"]
WARM_START = {"divergence": "forward-kl", "support": "target", "datasetShare": 1, "datasetResponses": "teacher"}
JOB: dict[str, Any] = {
    "deterministic": True,
    "data": {"prompts": {"path": str(MODELS / "arithmetic" / "train.jsonl"), **ROWS}},
    "rollout": {"promptsPerStep": 4, "samplesPerPrompt": 2},
    "objective": {"support": "sampled-token", "topK": 16, "reward": {"source": "exact-match"}, "rewardCoefficient": 0},
    "schedule": {"steps": STEPS, "checkpointEverySteps": 1, "keepLast": 100, "evaluateEverySteps": 1},
    "evaluation": [
        {"name": "heldout", "prompts": {"path": str(MODELS / "arithmetic" / "test.jsonl"), **ROWS}, "maxPrompts": 4}
        | {"reward": {"source": "exact-match"}, "measureReverseKL": False}
    ],
    "phases": [
        {"name": "warm-start", "objective": WARM_START, "untilStep": 2},
        # No score rises by more than 1: the first evaluation of the phase, at step 2, is its best, the next is flat.
        {"name": "distil", "untilFlat": {"evaluation": "heldout", "patience": 1, "minimumGain": 1}},
        {"name": "reinforce", "objective": {"coefficient": 0, "rewardCoefficient": 1}},
    ],
}


def curve(outcome: Outcome) -> list[tuple[Any, ...]]:
    keys = ("step", "phase", "phase_number", "samples", "loss", "divergence", "reverse_kl", "reward", "grad_norm")
    return [tuple(line[key] for key in keys) for line in outcome.lines("step")]


def scores(outcome: Outcome) -> list[tuple[int, float]]:
    return [(line["step"], line["score"]) for line in outcome.lines("evaluation")]


def model_hash(outcome: Outcome) -> str:
    return hashlib.sha256((outcome.folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_in_phases_goes_on_from_inside_one_to_the_same_last_bit(tmp_path: Path) -> None:
    """From the checkpoint of step 1: the next step is of the first phase, and both others begin after it."""
    whole, part = (arithmetic(tmp_path / name, "phases", **JOB) for name in ("whole", "part"))
    spec = parse_job(whole).spec
    assert spec.teacher is not None and spec.teacher.model is not None
    server = SGLangServer(spec.teacher.model, spec, "teacher", port=reserve_port(), log=tmp_path / "teacher.log")
    server.start()
    try:
        server.wait_ready(300)
        address = f"127.0.0.1:{server.port}"
        uninterrupted = Run(whole, address, tmp_path).wait()
        assert uninterrupted.code == ExitCode.DONE, uninterrupted.log
        folder = tmp_path / "part" / "phases"
        shutil.copytree(tmp_path / "whole" / "phases", folder)
        shutil.rmtree(folder / "model")
        (folder / "checkpoints" / "latest").write_text("step-000001")
        resumed = Run(part, address, tmp_path).wait()
        assert resumed.code == ExitCode.DONE, resumed.log
    finally:
        server.stop()
    assert "resumed from" in resumed.log
    lines = uninterrupted.lines("step")
    assert [line["phase"] for line in lines] == NAMES
    # The teacher's response to each prompt once, of which no reverse KL is known; then two of the student's own.
    assert [line["samples"] for line in lines] == [4, 4, 8, 8, 8, 8]
    assert [line["reverse_kl"] is None for line in lines] == [True, True, False, False, False, False]
    assert [line["coefficient"] for line in lines] == [1, 1, 1, 1, 0, 0]
    assert curve(resumed) == curve(uninterrupted)
    assert scores(resumed) == scores(uninterrupted) and len(scores(resumed)) == STEPS + 1
    assert model_hash(resumed) == model_hash(uninterrupted)
