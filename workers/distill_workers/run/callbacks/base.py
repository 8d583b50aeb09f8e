"""What a callback is, what it sees of a step, and what it may raise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from distill_api.status import EvaluationScore
from distill_workers.data.sample import Sample
from distill_workers.evaluation.guards import Decision
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.rollout.batch import Batch
from distill_workers.run.step_clock import StepClock


class RepeatStep(Exception):
    """Raised before an update when a guard has lowered the coefficient: the step's gradient knew nothing of it, is
    discarded, and the same batch makes another."""


class RollBack(Exception):
    """Raised when a guard wants the run to go on from the best checkpoint."""

    def __init__(self, decision: Decision, checkpoint: tuple[Path, dict[str, Any]]) -> None:
        super().__init__(decision.message)
        self.decision, self.checkpoint = decision, checkpoint


class StopRun(Exception):
    """Raised when a guard ends the run: the best checkpoint is what will be exported, if one is kept."""

    def __init__(self, decision: Decision, checkpoint: tuple[Path, dict[str, Any]] | None) -> None:
        super().__init__(decision.message)
        self.decision, self.checkpoint = decision, checkpoint


@dataclass
class TrainStep:
    """One pass of the loop, as far as it has come."""

    index: int
    """Optimiser steps done before it: the version of the weights that its gradient is of."""
    coefficients: StepCoefficients
    phase: str | None = None
    """Name of the phase that it belongs to; None without phases."""
    batch: Batch | None = None
    """None after the last step, where no gradient is made."""
    samples: list[Sample] = field(default_factory=list)
    """Those whose gradient has been accumulated, and those that are masked: all of the batch, before the update."""
    evaluations: list[EvaluationScore] = field(default_factory=list)
    """Of the weights that the gradient is of, where they were measured; known before the update."""
    stats: dict[str, float] = field(default_factory=dict)
    """What MegatronStudent.update returned."""
    line: dict[str, Any] = field(default_factory=dict)
    """The step's line of metrics.jsonl, once it is written."""
    clock: StepClock = field(default_factory=StepClock)


class BeforeUpdate(Protocol):
    """A callback that runs while the gradient waits to be applied; after the last step once more, without a batch."""

    async def before_update(self, step: TrainStep) -> None:
        """May raise RollBack, RepeatStep, StopRun."""


class AfterStep(Protocol):
    """A callback that runs once the engines have the new weights."""

    async def after_step(self, step: TrainStep) -> None:
        """May raise RollBack, StopRun."""


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run, in the order in which they see a step. One that raises hides it from the rest."""

    before: list[BeforeUpdate]
    after: list[AfterStep]

    async def before_update(self, step: TrainStep) -> None:
        for callback in self.before:
            await callback.before_update(step)

    async def after_step(self, step: TrainStep) -> None:
        for callback in self.after:
            await callback.after_step(step)
