"""A whole run whose student and teacher were swapped, and whose evaluation is its training data: it says so."""

import json
from pathlib import Path

import pytest
from runs import MODELS, Run, arithmetic

from distill_api.job import parse_job
from distill_api.protocol import ExitCode, ProgressReport
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer

pytestmark = pytest.mark.timeout(600)


def test_a_run_of_swapped_models_that_is_measured_on_its_training_data_has_two_notes(tmp_path: Path) -> None:
    train = str(MODELS / "arithmetic" / "train.jsonl")
    manifest = arithmetic(
        tmp_path,
        "swapped",
        student={"model": "/models/arithmetic/teacher"},
        teacher={"model": "/models/arithmetic/student"},
        rollout={"promptsPerStep": 2, "samplesPerPrompt": 2},
        objective={"reward": {"source": "exact-match"}},
        schedule={"steps": 1, "checkpointEverySteps": 1, "evaluateEverySteps": 1},
    )
    prompts = {**manifest["spec"]["evaluation"][0]["prompts"], "path": train}
    manifest["spec"]["evaluation"][0] |= {"prompts": prompts, "maxPrompts": 4}
    spec = parse_job(manifest).spec
    server = SGLangServer(spec.teacher.model or "", spec, "teacher", port=reserve_port(), log=tmp_path / "teacher.log")
    server.start()
    try:
        server.wait_ready(300)
        outcome = Run(manifest, f"127.0.0.1:{server.port}", tmp_path).wait()
    finally:
        server.stop()
    assert outcome.code == ExitCode.DONE, outcome.log
    state = json.loads((outcome.folder / "state.json").read_text())
    held_out, larger = ProgressReport.model_validate(state).notes
    assert held_out.startswith("HeldOut: evaluation heldout: 4 of 4 prompts are training prompts too")
    assert larger.startswith("TeacherIsLarger: the student has ")
    log = (outcome.folder / "logs" / "rank-0.log").read_text()
    assert "preflight: all checks passed in " in log and "preflight: RewardScores (" in log
