"""Where the time of a step goes."""

import time
from collections.abc import Awaitable
from typing import TypeVar

from distill_api.metrics import StepStage

T = TypeVar("T")


class StepClock:
    """Seconds of one step that the loop spends on each stage, computing or waiting."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._spent: dict[StepStage, float] = {}
        self._waits: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._begin

    async def timed(self, stage: StepStage, work: Awaitable[T]) -> T:
        """Return the result of `work`, whose time is the stage's."""
        begin = time.monotonic()
        result = await work
        self._spent[stage] = self._spent.get(stage, 0.0) + time.monotonic() - begin
        return result

    async def waited(self, work: Awaitable[T]) -> T:
        """Return the result of `work`, which is a wait for samples."""
        begin = time.monotonic()
        result = await work
        self._waits.append((begin, time.monotonic()))
        return result

    def stages(self, generated_at: float) -> dict[StepStage, float]:
        """Seconds by stage. What training waited for was the engines until the batch's last response was there
        (`generated_at`, time.monotonic seconds), then the teacher."""
        rollout = scoring = 0.0
        for begin, end in self._waits:
            generated = min(max(generated_at, begin), end)
            rollout += generated - begin
            scoring += end - generated
        return {
            StepStage.WEIGHT_SYNC: self._spent.get(StepStage.WEIGHT_SYNC, 0.0),
            StepStage.TRAIN: self._spent.get(StepStage.TRAIN, 0.0),
            StepStage.ROLLOUT: self._spent.get(StepStage.ROLLOUT, 0.0) + rollout,
            StepStage.TEACHER_SCORE: scoring,
        }
