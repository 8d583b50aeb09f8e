"""Where the time of a step goes."""

import time
from collections.abc import Awaitable
from typing import TypeVar

from distill_api.metrics import StepStage

T = TypeVar("T")


class StepClock:
    """Seconds of one step that the loop spends on each stage, computing or waiting."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self._intervals: dict[StepStage, list[tuple[float, float]]] = {}
        self._waits: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self.begin

    @property
    def arrived_at(self) -> float:
        """time.monotonic of the end of the last wait for samples; the beginning of the step before the first."""
        return self._waits[-1][1] if self._waits else self.begin

    async def timed(self, stage: StepStage, work: Awaitable[T]) -> T:
        """Return the result of `work`, whose time is the stage's."""
        begin = time.monotonic()
        result = await work
        self.add(stage, begin, time.monotonic())
        return result

    def add(self, stage: StepStage, begin: float, end: float) -> None:
        """Note that a stage went on between two times of time.monotonic."""
        self._intervals.setdefault(stage, []).append((begin, end))

    def extent(self, stage: StepStage) -> tuple[float, float] | None:
        """Return the beginning and the end of a stage, with whatever came between its parts; None if it was not."""
        found = self._intervals.get(stage)
        return (found[0][0], found[-1][1]) if found else None

    async def waited(self, work: Awaitable[T]) -> T:
        """Return the result of `work`, which is a wait for samples."""
        begin = time.monotonic()
        result = await work
        self._waits.append((begin, time.monotonic()))
        return result

    def stages(self, generated_at: float, environment_share: float = 0.0) -> dict[StepStage, float]:
        """Seconds by stage. What training waited for was the engines until the batch's last response was there
        (`generated_at`, time.monotonic seconds), then the teacher. `environment_share`, 0 to 1, of the time of the
        engines was that of an environment which they waited for."""
        rollout = scoring = 0.0
        for begin, end in self._waits:
            generated = min(max(generated_at, begin), end)
            rollout += generated - begin
            scoring += end - generated
        environment = rollout * environment_share
        return {
            StepStage.WEIGHT_SYNC: self._spent(StepStage.WEIGHT_SYNC),
            StepStage.TRAIN: self._spent(StepStage.TRAIN),
            StepStage.ROLLOUT: self._spent(StepStage.ROLLOUT) + rollout - environment,
            StepStage.TEACHER_SCORE: scoring,
            **({StepStage.ENVIRONMENT: environment} if environment else {}),
        }

    def _spent(self, stage: StepStage) -> float:
        return sum(end - begin for begin, end in self._intervals.get(stage, ()))
