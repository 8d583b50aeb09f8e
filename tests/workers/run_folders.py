"""Run folders of small runs, written by the recorder as a trainer writes them, without one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_api.job import DistillationJob, parse_job
from distill_api.metrics import StepStage
from distill_api.protocol import Phase
from distill_api.status import Result
from distill_workers.data.sample import Sample
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.metrics import Metrics
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.recorder import Recorder
from distill_workers.reporting.step_line import Step
from distill_workers.run_folder.run_folder import RunFolder

STAGES = {
    StepStage.ROLLOUT: 1.0,
    StepStage.TEACHER_SCORE: 0.5,
    StepStage.TRAIN: 0.25,
    StepStage.WEIGHT_SYNC: 0.25,
}
"""Seconds of a step."""


def manifest_of(output: Path, name: str = "sums", **spec: Any) -> dict[str, Any]:
    """A job of twenty steps; `spec` replaces fields."""
    return {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": name},
        "spec": {
            "accelerator": "none",
            "student": {"model": "Qwen/Qwen3-0.6B"},
            "teacher": {"model": "Qwen/Qwen3-8B"},
            "data": {"prompts": {"path": "/inputs/train.jsonl"}},
            "schedule": {"steps": 20},
            "output": {"path": str(output)},
            **spec,
        },
    }


def run_of(
    manifest: dict[str, Any],
    *,
    steps: int = 20,
    measured: Sequence[Measurement] = (),
    kl: float = 1.0,
    seconds: float = 2.0,
) -> tuple[DistillationJob, RunFolder]:
    """A run that is done: each step has two tokens `kl / step` nats from the teacher and a reward of 0.5, and takes
    `seconds`."""
    job = parse_job(manifest)
    folder = RunFolder(job)
    folder.claim()
    reporter = ProgressReporter(folder, Metrics(), job.spec.schedule.steps)
    recorder = Recorder(folder, reporter, job.spec, lambda ids: "ab")
    for number in range(steps + 1):
        if number:
            recorder.begin_step()
            for stage, spent in STAGES.items():
                recorder.spent(stage, spent)
            trained = {"reverse_kl": kl / number, "loss": 0.5, "grad_norm": 1.0, "entropy": 1.0}
            recorder.step(Step(number, [_sample(kl / number)], trained, policy_lag=0.0, seconds=seconds))
        for one in measured:
            if one.step == number:
                recorder.evaluation(one)
    result = Result(model_path=str(folder.model), step=steps)
    reporter.update(phase=Phase.DONE, result=result)
    return job, folder


def _sample(kl: float) -> Sample:
    return Sample(
        prompt_index=0,
        index_in_group=0,
        prompt_ids=[65],
        response_ids=[66, 67],
        token_versions=[0, 0],
        truncated=False,
        engine_logprobs=[-1.5, -1.5],
        teacher_logprobs=[-1.5 - kl] * 2,
        reward=0.5,
    )
