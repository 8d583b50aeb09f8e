"""A step's line of metrics.jsonl."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

from distill_workers.data.sample import Sample
from distill_workers.objective.statistics import SCOPES
from distill_workers.reporting.token_kl import source_kl, summary, teacher_kl, turns

TRAINED = (*SCOPES, "grad_norm", "learning_rate", "coefficient", "reward_coefficient")
"""What MegatronStudent.update returns and a step's line shows."""


@dataclass(frozen=True)
class ObjectivePhase:
    """The phase of a step (spec.phases)."""

    name: str
    number: int
    """From 1, as people count."""


@dataclass(frozen=True)
class Step:
    """One optimiser step that is done."""

    number: int
    samples: list[Sample]
    trained: dict[str, float]
    """What MegatronStudent.update returned."""
    policy_lag: float
    seconds: float
    phase: ObjectivePhase | None = None
    """None without phases."""
    teacher_lag: float | None = None
    """As policy_lag of the weights that scored; None where the teacher is not the student."""


def step_line(step: Step, stages: dict[str, float]) -> dict[str, Any]:
    """Return the step's line of metrics.jsonl: nats, seconds, tokens. `stages` has the seconds of each stage."""
    samples, trained = step.samples, step.trained
    rewards = [s.reward for s in samples if s.reward is not None]
    copied = [share for s in samples if (share := s.copied_share) is not None]
    return {
        "kind": "step",
        "step": step.number,
        "phase": step.phase and step.phase.name,
        "phase_number": step.phase and step.phase.number,
        "time": time.time(),
        "seconds": step.seconds,
        "samples": len(samples),
        "response_tokens": sum(s.trained_tokens for s in samples),
        # What had no token to be measured at is not there.
        **{key: trained.get(key) for key in TRAINED},
        "policy_lag": step.policy_lag,
        "teacher_lag": step.teacher_lag,
        "copied_ratio": statistics.fmean(copied) if copied else None,
        "truncated_ratio": statistics.fmean(s.truncated for s in samples),
        "reward": statistics.fmean(rewards) if rewards else None,
        "reward_stddev": statistics.pstdev(rewards) if rewards else None,
        "token_kl": summary(samples),
        "turns": turns(samples),
        "reverse_kl_by_source": source_kl(samples),
        "reverse_kl_by_teacher": teacher_kl(samples),
        "reward_by_source": {
            source: statistics.fmean(s.reward for s in samples if s.reward is not None and s.source == source)
            for source in sorted({s.source for s in samples if s.reward is not None})
        },
        "stages": stages,
    }
