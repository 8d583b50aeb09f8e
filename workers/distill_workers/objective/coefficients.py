"""The weights of divergence and reward in the loss of a step."""

import math
from dataclasses import dataclass

from distill_api.spec import CoefficientSchedule, Decay, Objective


@dataclass(frozen=True)
class StepCoefficients:
    """What one optimiser step multiplies its two terms with."""

    divergence: float
    reward: float

    def lowered(self, factor: float) -> "StepCoefficients":
        """The divergence's multiplied, as a guard wants it."""
        return StepCoefficients(self.divergence * factor, self.reward)


def step_coefficients(objective: Objective, step: int) -> StepCoefficients:
    """Of the step after `step` optimiser steps. A pure function of it: a resumed run goes on as it would have."""
    return StepCoefficients(
        divergence=scheduled(objective.coefficient, objective.coefficient_schedule, step),
        reward=scheduled(objective.reward_coefficient, objective.reward_coefficient_schedule, step),
    )


def scheduled(start: float, schedule: CoefficientSchedule, step: int) -> float:
    """From `start` at step 0 to the end value at step `schedule.steps`, where it stays."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if schedule.steps is None:
        return start
    progress = min(1.0, step / schedule.steps)
    if schedule.decay is Decay.COSINE:
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (schedule.end_value - start) * progress
