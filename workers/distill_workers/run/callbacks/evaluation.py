"""Evaluation of step v beside the rollouts and the gradient of step v + 1, awaited before that gradient is applied."""

import asyncio
import time

from distill_api.metrics import StepStage
from distill_api.spec.job_spec import Schedule
from distill_api.status import EvaluationScore
from distill_workers.evaluation.evaluator import Evaluator, Measurement
from distill_workers.reporting.recorder import Recorder
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.checkpoint_manager import CheckpointManager
from distill_workers.run.run_state import RunState
from distill_workers.run.stop_signal import StopSignal
from distill_workers.teacher.teachers import Teachers


class EvaluationCallback:
    """Begins the evaluations that are due, and puts their results into the step that waits for them."""

    def __init__(
        self,
        schedule: Schedule,
        evaluators: list[Evaluator],
        engines: EnginePool,
        teachers: Teachers,
        recorder: Recorder,
        checkpoints: CheckpointManager,
        state: RunState,
        stop: StopSignal,
    ) -> None:
        self._schedule, self._evaluators, self._engines, self._teachers = schedule, evaluators, engines, teachers
        self._recorder, self._checkpoints, self._state, self._stop = recorder, checkpoints, state, stop
        self._measuring: asyncio.Task[list[Measurement]] | None = None
        self._interval = (0.0, 0.0)
        """Beginning and end of the last evaluation, time.monotonic seconds."""

    @property
    def under_way(self) -> bool:
        """Whether the weights as they are, are being measured."""
        return self._measuring is not None

    def begin(self) -> None:
        """Begin to measure the weights that an attempt starts with, where the schedule wants it: unless the attempt
        before has done that already. One that was stopped in the middle of an evaluation leaves it to the next."""
        if self._state.step == 0 or not self._recorder.evaluated(self._state.step):
            self._begin_if_due()

    async def before_update(self, step: TrainStep) -> None:
        step.evaluations = await self.await_evaluation()
        if step.evaluations:
            step.clock.add(StepStage.EVALUATE, *self._interval)

    async def after_step(self, step: TrainStep) -> None:
        self._begin_if_due()

    async def await_evaluation(self) -> list[EvaluationScore]:
        """Wait for the evaluation that is under way, and record it. Returns its entries in status; none where none is
        under way. Raises Stopped."""
        if self._measuring is None:
            return []
        measuring, self._measuring = self._measuring, None
        with self._recorder.timed(StepStage.EVALUATE):
            measured = await self._stop.interrupting(measuring)
        # A checkpoint of this step that was made without its evaluation, by an attempt that was stopped, is made anew.
        self._checkpoints.outdate()
        return [self._recorder.evaluation(one) for one in measured]

    def cancel(self) -> None:
        """End the evaluation that is under way, if one is."""
        if self._measuring is not None:
            self._measuring.cancel()

    def _begin_if_due(self) -> None:
        step, schedule = self._state.step, self._schedule
        if self._evaluators and (step % schedule.evaluate_every_steps == 0 or step == schedule.steps):
            self._measuring = asyncio.create_task(self._measure(step))

    async def _measure(self, step: int) -> list[Measurement]:
        begin = time.monotonic()
        found = await asyncio.gather(*(e.measure(step, self._engines, self._teachers) for e in self._evaluators))
        self._interval = (begin, time.monotonic())
        return found
