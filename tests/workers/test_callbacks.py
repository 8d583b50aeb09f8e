"""Callbacks: the order in which they see a step, and what the loop does about the exceptions they raise."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import REPO

sys.path.insert(0, str(REPO / "bench"))
from test_loop import Told, Weights, loop_of, virtually

from distill_api.spec.guards import GuardAction
from distill_workers.evaluation.guards import Decision
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.run.callbacks.base import Callbacks, StopRun, TrainStep
from distill_workers.run.loop import Loop

DECISION = Decision("g", GuardAction.STOP, 1, "it went wrong")


class Raising:
    """A callback that raises once, at one step, and notes every step that it sees."""

    def __init__(self, at: int | None = None, error: Exception | None = None) -> None:
        self.at, self.error, self.seen = at, error, list[int]()

    async def before_update(self, step: TrainStep) -> None:
        await self.after_step(step)

    async def after_step(self, step: TrainStep) -> None:
        self.seen.append(step.index)
        if step.index == self.at and self.error is not None:
            error, self.error = self.error, None
            raise error


def loop(folder: Path, trainer: Weights, **schedule: Any) -> Loop:
    return loop_of(folder, trainer, Told({}), {"steps": 3, "evaluateEverySteps": 1, **schedule})


def test_callbacks_see_a_step_in_their_order_and_one_that_raises_hides_it_from_the_rest() -> None:
    first, second, third = Raising(), Raising(at=1, error=StopRun(DECISION, None)), Raising()
    callbacks = Callbacks(before=[first, second, third], after=[])

    async def work() -> None:
        for index in (0, 1):
            await callbacks.before_update(TrainStep(index, StepCoefficients(divergence=1.0, reward=0.0)))

    with pytest.raises(StopRun):
        asyncio.run(work())
    assert (first.seen, second.seen, third.seen) == ([0, 1], [0, 1], [0])


def test_evaluation_and_guards_come_before_checkpoints_and_the_next_batches_before_a_copy(tmp_path: Path) -> None:
    made: list[Loop] = []

    async def work() -> None:
        made.append(loop(tmp_path, Weights()))

    virtually(work)
    before, after = made[0].callbacks.before, made[0].callbacks.after

    def names(callbacks: Sequence[object]) -> list[str]:
        return [type(c).__name__.removesuffix("Callback") for c in callbacks]

    first = ["Evaluation", "Phase", "Guard", "Checkpoint", "Publishing"]
    assert names(before) == first
    then = ["Metrics", "EngineAgreement", "TeacherWeights", "Guard", "Evaluation", "NextBatches", "Checkpoint"]
    assert names(after) == [*then, "Publishing"]
    same = [name for name in first if name != "Phase"]
    found = dict(zip(names(after), after, strict=True))
    assert [found[name] for name in same] == [c for c in before if type(c).__name__ != "PhaseCallback"]
