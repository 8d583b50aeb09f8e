"""Callbacks: the order in which they see a step, and what the loop does about the exceptions they raise."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import REPO

sys.path.insert(0, str(REPO / "bench"))
from test_loop import Told, Weights, loop_of, train, virtually

from distill_api.spec.guards import GuardAction
from distill_workers.evaluation.guards import Decision
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.run.callbacks.base import Callbacks, RollBack, StopRun, TrainStep
from distill_workers.run.loop import Loop
from distill_workers.run_folder.checkpoints import Checkpoints

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
    assert [type(c).__name__ for c in before] == ["EvaluationCallback", "GuardCallback", "CheckpointCallback"]
    names = ["Metrics", "EngineAgreement", "Guard", "Evaluation", "NextBatches", "Checkpoint"]
    assert [type(c).__name__.removesuffix("Callback") for c in after] == names
    assert (before[0], before[1], before[2]) == (after[3], after[2], after[5])


def test_a_step_is_updated_only_after_every_callback_has_seen_its_whole_gradient(tmp_path: Path) -> None:
    trainer, seen = Weights(), list[tuple[int, int, int]]()

    class Watching:
        async def before_update(self, step: TrainStep) -> None:
            seen.append((step.index, trainer.steps, len(step.samples)))

    async def work() -> None:
        watched = loop(tmp_path, trainer)
        watched.callbacks.before.append(Watching())
        await train(watched)

    virtually(work)
    assert seen == [(0, 0, 8), (1, 1, 8), (2, 2, 8), (3, 3, 0)], "and once more after the last, without a batch"


def test_stop_run_ends_the_training_and_returns_the_decision_with_what_is_exported(tmp_path: Path) -> None:
    trainer, stopped = Weights(), list[Decision | None]()

    async def work() -> None:
        stopping = loop(tmp_path, trainer)
        stopping.callbacks.after.append(Raising(at=1, error=StopRun(DECISION, None)))
        stopped.append(await train(stopping))

    virtually(work)
    assert trainer.of("load") == [] and len(trainer.of("update")) == 2
    assert stopped[0] is not None and stopped[0].message == "it went wrong; the model of step 2 is exported"


def test_roll_back_goes_on_from_the_checkpoint_that_it_names(tmp_path: Path) -> None:
    trainer = Weights()

    async def work() -> None:
        back = loop(tmp_path, trainer, checkpointEverySteps=1, keepLast=3)

        class ToStepOne(Raising):
            async def after_step(self, step: TrainStep) -> None:
                self.seen.append(step.index)
                if self.seen == [0, 1]:
                    await back.checkpoints.finish()
                    path = Checkpoints(back._folder.checkpoints).complete()[1]
                    raise RollBack(DECISION, (path, json.loads((path / "state.json").read_text())))

        watching = ToStepOne()
        back.callbacks.after.append(watching)
        assert await train(back) is None
        assert watching.seen == [0, 1, 1, 2]

    virtually(work)
    assert trainer.of("load") == [1] and len(trainer.of("update")) == 4
