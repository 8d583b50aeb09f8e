"""What holds the steps up, and what a run holds meanwhile."""

from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of

from distill_workers.reporting.bottleneck import bottleneck
from distill_workers.reporting.cost import accelerators


def seconds(
    rollout: float = 0, teacher: float = 0, train: float = 0, sync: float = 0, environment: float = 0
) -> dict[str, float]:
    found = {"rollout": rollout, "teacher_score": teacher, "train": train, "weight_sync": sync}
    return found | ({"environment": environment} if environment else {})


CASES: dict[str, tuple[dict[str, float], dict[str, Any], str, str]] = {
    "engines on-policy": (
        seconds(rollout=7.1, teacher=0.9, train=1.5, sync=0.5),
        {},
        "rollout",
        "rollout: the trainer waits for the engines 71 % of the step; raise rollout.replicas, or set "
        "rollout.maxPolicyLag 1 so that they draw while it trains",
    ),
    "engines that lag": (
        seconds(rollout=5, train=5.0 - 1e-9),
        {"rollout": {"maxPolicyLag": 1}},
        "rollout",
        "raise rollout.replicas, or set rollout.partial so that no response is waited for",
    ),
    "engines that are never waited for": (
        seconds(rollout=5),
        {"rollout": {"maxPolicyLag": 2, "partial": True}},
        "rollout",
        "100 % of the step; raise rollout.replicas, or lower rollout.maxResponseTokens",
    ),
    "a deterministic run": (seconds(rollout=5), {"deterministic": True}, "rollout", "one response at a time"),
    "a slow environment": (
        seconds(rollout=1, environment=6, teacher=2, train=1),
        {},
        "environment",
        "environment: the trainer waits for rollout.environment 60 % of the step; make reset and step faster, or set "
        "rollout.maxPolicyLag 1 so that they answer while it trains",
    ),
    "a slow environment of a run that lags": (
        seconds(rollout=1, environment=6),
        {"rollout": {"maxPolicyLag": 1}},
        "environment",
        "make reset and step faster, or lower rollout.environment.maxTurns; more engines do not help",
    ),
    "a slow teacher": (
        seconds(rollout=2, teacher=6, train=2),
        {},
        "teacher",
        "teacher: the trainer waits for scores 60 % of the step; raise teacher.replicas",
    ),
    "a deterministic teacher": (seconds(teacher=1), {"deterministic": True}, "teacher", "leave it off"),
    "stored scores": (
        seconds(teacher=6, train=4),
        {
            "objective": {"support": "top-k", "datasetShare": 1, "teacherLogprobs": "precomputed"},
            "data": {"prompts": {"path": "/p.jsonl", "responseField": "response"}},
        },
        "teacher",
        "teacher: the trainer waits for scores 60 % of the step; they are stored, and read from the output volume "
        "(output.path): use one that answers faster",
    ),
    "a trainer that computes": (
        seconds(rollout=1, train=3),
        {},
        "trainer",
        "trainer: forward and backward take 75 % of the step; raise trainer.gpusPerNode or nodes",
    ),
    "a trainer that computes twice": (
        seconds(train=3),
        {"trainer": {"recompute": "full"}},
        "trainer",
        "set trainer.recompute selective",
    ),
    "weights by disk": (seconds(train=1, sync=3), {"trainer": {"weightSync": "disk"}}, "sync", "distributed"),
    "weights by network": (seconds(train=1, sync=3), {}, "sync", "75 % of the step; raise rollout.promptsPerStep"),
    "a checkpoint that is waited for": (seconds(train=1) | {"checkpoint": 99.0}, {}, "trainer", "100 %"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_part_that_takes_most_of_the_step_is_named_with_what_to_change(case: str) -> None:
    measured, changes, part, advice = CASES[case]
    found = bottleneck(measured, spec_of(Path("/s"), Path("/t"), **changes))
    assert found is not None and found.part == part
    assert advice in found.advice
    assert len(found.advice) <= 256, "as long as status.progress.advice may be"


def test_before_the_first_step_nothing_is_held_up() -> None:
    assert bottleneck({}, spec_of(Path("/s"), Path("/t"))) is None


def test_each_role_holds_the_accelerators_of_all_its_pods() -> None:
    teacher = {"model": "/t", "replicas": 3, "tensorParallelSize": 4}
    rollout = {"replicas": 5, "tensorParallelSize": 2}
    trainer = {"nodes": 2, "gpusPerNode": 8, "parallelism": {"tensor": 4}}
    spec = spec_of(Path("/s"), Path("/t"), teacher=teacher, rollout=rollout, trainer=trainer)
    assert accelerators(spec, spec.rollout.replicas) == {"teacher": 12, "rollout": 10, "trainer": 16}
