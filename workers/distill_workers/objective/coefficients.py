"""The coefficients of divergence and reward in the loss of a step, by their schedules."""

import math
from dataclasses import dataclass, replace

from distill_api.spec.job_spec import CoefficientSchedule, Decay, Objective


@dataclass(frozen=True)
class StepCoefficients:
    """The factors of the two terms of the loss in one optimiser step, and the phase whose loss it is."""

    divergence: float
    reward: float
    phase: int = 0
    """Number of the phase of the spec, from 0, whose objective the step has (phases.py); 0 without phases."""

    def lowered(self, factor: float) -> "StepCoefficients":
        """Return the coefficients with the divergence's multiplied by `factor`, which guards set."""
        return replace(self, divergence=self.divergence * factor)


def step_coefficients(objective: Objective, step: int, phase: int = 0) -> StepCoefficients:
    """Return the coefficients of the step after `step` optimiser steps of a phase; they depend on it alone, so a run
    resumes exactly."""
    return StepCoefficients(
        phase=phase,
        divergence=scheduled(objective.coefficient, objective.coefficient_schedule, step),
        reward=scheduled(objective.reward_coefficient, objective.reward_coefficient_schedule, step),
    )


def scheduled(start: float, schedule: CoefficientSchedule, step: int) -> float:
    """Return the value at a step, from `start` at step 0 to the end value at step `schedule.steps`, where it stays."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if schedule.steps is None:
        return start
    progress = min(1.0, step / schedule.steps)
    if schedule.decay is Decay.COSINE:
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (schedule.end_value - start) * progress
