"""On-policy distillation, as the algorithm reads (GKD, arXiv 2306.13649).

    repeat:
        the student writes responses to a batch of prompts       rollouts.py   (engines, weight version v)
        the teacher scores every token of them                   teacher.py
        the student takes one step down the divergence           megatron/     (loss: objective/)
        the engines get the new weights                          fleet.py      (weight version v + 1)

The first three run side by side, also on-policy: the gradient of the responses that are there is computed while others
are still being written, and the step is taken once all are in (periodic asynchrony, arXiv 2511.18871).

An evaluation of step v runs beside the rollouts and the gradient of step v + 1, and ends before that is applied. Until
then engines and trainer hold exactly the weights that are measured: nothing has to be copied for a best checkpoint that
may not come, and what a guard decides takes effect from step v. Training waits for no more of it than outlasts the next
batch.

Rank 0 of the trainer runs this; the other ranks only take part in what `Team` announces. Weight version n means: the
weights after n optimiser steps.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from distill_api.job import DistillationJob
from distill_api.metrics import StepStage
from distill_api.protocol import Phase
from distill_api.status import Result
from distill_workers.data.prompts import Cursor
from distill_workers.data.sample import Sample
from distill_workers.evaluation.evaluator import Evaluator, Measurement
from distill_workers.evaluation.guards import Guards
from distill_workers.failures import Failure, Stopped
from distill_workers.objective.coefficients import step_coefficients
from distill_workers.objective.schedule import learning_rate
from distill_workers.reporting.progress import Reporter
from distill_workers.reporting.recorder import Recorder, Step
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import Batch, RolloutPipeline
from distill_workers.run.checkpoint_manager import Keeper, Standing
from distill_workers.run.guard_actions import Intervention
from distill_workers.run.preflight import preflight
from distill_workers.run.team import Team
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.teacher.teachers import Teachers

T = TypeVar("T")


@dataclass
class Accumulated:
    """A batch whose gradient is there, and where the time went."""

    samples: list[Sample] = field(default_factory=list)
    training_seconds: float = 0.0
    rollout_seconds: float = 0.0
    """Waiting for responses."""
    scoring_seconds: float = 0.0
    """Waiting for scores."""


class Loop:
    """One run, from its newest checkpoint or from the start."""

    def __init__(
        self,
        job: DistillationJob,
        folder: RunFolder,
        team: Team,
        engines: EnginePool,
        teachers: Teachers,
        cursor: Cursor,
        rollouts: RolloutPipeline,
        evaluators: list[Evaluator],
        reporter: Reporter,
        tokenizer: Any,
    ) -> None:
        self._spec, self._folder, self._team, self._engines = job.spec, folder, team, engines
        self._teachers, self._cursor, self._rollouts, self._evaluators = teachers, cursor, rollouts, evaluators
        self._reporter, self._tokenizer = reporter, tokenizer
        self._at = Standing(cursor.state())
        self._record = Recorder(folder, reporter, job.spec, tokenizer.decode)
        self._record.engines = engines.count_placed
        self._guards = Guards(job.spec)
        self._keeper = Keeper(job.spec.schedule, folder, team, cursor, self._record, self._guards, self._at)
        self._intervention = Intervention(
            self._guards, self._keeper, self._at, folder, team, engines, rollouts, cursor, self._record
        )
        self._measuring: asyncio.Task[list[Measurement]] | None = None
        """The evaluation of the weights as they are, until it is heard."""
        self._stopping = asyncio.Event()

    async def run(self) -> str:
        """Returns how it ended, as a sentence. Raises Failure; Stopped after `stop`."""
        await self._keeper.resume()
        async with self._engines.updating_weights():
            await self._push()
        if self._at.step == 0:
            self._reporter.update(phase=Phase.PREFLIGHT)
            checks = preflight(self._spec, self._tokenizer, self._team, self._engines, self._teachers, self._cursor)
            await self._unless_stopped(checks)
        self._reporter.update(phase=Phase.TRAINING, preflight_passed=True)
        try:
            await self._train()
        finally:
            if self._measuring is not None:
                self._measuring.cancel()
        await self._keeper.saved()
        self._reporter.update(phase=Phase.EXPORTING)
        self._folder.check_ownership()
        await self._team.run(self._team.export, self._folder.model)
        guard = self._intervention.stopped_by
        result = Result(
            model_path=str(self._folder.model),
            step=self._at.step,
            best_step=self._record.best_step(),
            stopped_by=guard and guard.guard,
        )
        self._reporter.update(phase=Phase.DONE, result=result)
        if guard is None:
            return "all steps are done and the model is exported"
        return f"guard {guard.guard} stopped the run after step {guard.step}: {guard.message}"

    async def _train(self) -> None:
        at, steps = self._at, self._spec.schedule.steps
        # An attempt that was stopped in the middle of an evaluation leaves it to the next.
        if at.step == 0 or not self._record.evaluated(at.step):
            self._evaluate_if_due()
        while self._intervention.stopped_by is None and (at.step < steps or self._measuring is not None):
            if at.step == steps:
                await self._hear(None)
                continue
            line = await self._train_step()
            if line is None or not await self._intervention.heed(self._guards.after_step(line)):
                continue
            self._evaluate_if_due()
            # The engines need not wait for the checkpoint to be copied.
            self._rollouts.start_ahead(at.step, steps)
            if self._measuring is None:
                await self._keeper.checkpoint_if_due()

    def stop(self) -> None:
        """Ends the run at the next moment at which the state is whole; `run` then raises Stopped."""
        self._stopping.set()

    async def checkpoint(self) -> None:
        """Saves the run as it stands, and waits until that is on disk."""
        await self._keeper.checkpoint()
        await self._keeper.saved()

    async def _train_step(self) -> dict[str, Any] | None:
        """Returns the step's line of metrics.jsonl; None if a guard has decided upon the weights it began with."""
        begin = time.monotonic()
        self._record.begin_step()
        batch = self._rollouts.take(self._at.step, self._spec.schedule.steps)
        done = await self._accumulate(batch)
        if not done.samples:
            raise Failure(f"no sample of step {self._at.step + 1} could be scored; the log names the reasons")
        if not await self._hear(batch):
            return None
        lag = statistics.fmean(self._at.step - s.weight_version for s in done.samples)
        rate = learning_rate(self._spec.trainer.optimizer, self._at.step, self._spec.schedule.steps)
        async with self._engines.updating_weights():
            applying = time.monotonic()
            trained = await self._team.run(self._team.apply, rate)
            if trained["skipped"]:
                raise Failure(
                    f"the gradient of step {self._at.step + 1} was not finite, so nothing was updated; if the next "
                    "attempt ends here too, lower trainer.optimizer.learningRate or objective.coefficient"
                )
            self._at.step, self._at.cursor = self._at.step + 1, batch.cursor_after
            settling = time.monotonic()
            await self._engines.drain()
            settled = time.monotonic()
            with self._record.timed(StepStage.WEIGHT_SYNC):
                await self._push()
        self._record.spent(StepStage.TRAIN, done.training_seconds + settling - applying)
        self._record.spent(StepStage.ROLLOUT, done.rollout_seconds + settled - settling)
        self._record.spent(StepStage.TEACHER_SCORE, done.scoring_seconds)
        return self._record.step(Step(self._at.step, done.samples, trained, lag, time.monotonic() - begin))

    async def _accumulate(self, batch: Batch) -> Accumulated:
        """Forward and backward of the samples as they come in, in portions that fill a micro-batch of every replica.

        The weights do not change before `apply`, so the gradient is that of the whole batch at once.
        """
        done, portion = Accumulated(), list[Sample]()
        planned = step_coefficients(self._spec.objective, self._at.step)
        coefficients = planned.lowered(self._guards.coefficient_factor)
        waits: list[tuple[float, float]] = []
        enough = self._spec.trainer.max_tokens_per_micro_batch * self._team.replicas
        arrivals = batch.arrivals(in_order=self._spec.deterministic)
        try:
            arrived: list[Sample] | None = []
            while arrived is not None:
                begin = time.monotonic()
                arrived = await self._unless_stopped(anext(arrivals, None))
                waits.append((begin, time.monotonic()))
                portion += arrived or []
                if portion and (arrived is None or sum(s.tokens for s in portion) >= enough):
                    begin = time.monotonic()
                    await self._team.run(self._team.accumulate, portion, coefficients)
                    done.training_seconds += time.monotonic() - begin
                    done.samples += portion
                    portion = []
        except Stopped:
            await self._team.run(self._team.discard)
            raise
        for begin, end in waits:
            # What training waited for: until the last response was there that is the engines, then the teacher.
            generated = min(max(batch.generated_at, begin), end)
            done.rollout_seconds += generated - begin
            done.scoring_seconds += end - generated
        return done

    async def _push(self) -> None:
        """The engines get the weights after `step` steps."""
        await self._engines.push(self._team.weights, self._at.step)
        self._record.weights(self._at.step)

    def _evaluate_if_due(self) -> None:
        """Begins to measure the weights as they are."""
        step, schedule = self._at.step, self._spec.schedule
        if self._evaluators and (step % schedule.evaluate_every_steps == 0 or step == schedule.steps):
            self._measuring = asyncio.create_task(self._measure(step))

    async def _measure(self, step: int) -> list[Measurement]:
        work = (evaluator.measure(step, self._engines, self._teachers) for evaluator in self._evaluators)
        return await asyncio.gather(*work)

    async def _hear(self, begun: Batch | None) -> bool:
        """Waits for the evaluation that is under way, if one is, and does what follows from it. Whether the gradient of
        the batch that was begun meanwhile may be applied: not after a decision, which it knew nothing of."""
        if self._measuring is None:
            return True
        measuring, self._measuring = self._measuring, None
        with self._record.timed(StepStage.EVALUATE):
            measured = await self._unless_stopped(measuring)
        # A checkpoint of this step that was made without its evaluation, by an attempt that was stopped, is made anew.
        self._keeper.step = -1
        entries = [self._record.evaluation(m) for m in measured]
        decisions = [decision for e in entries if (decision := self._guards.after_evaluation(e)) is not None]
        if decisions and begun is not None:
            await self._team.run(self._team.discard)
            self._rollouts.put_back(begun)
        if self._spec.schedule.keep_best and self._record.best_step() == self._at.step:
            # A best step that was not saved could not be gone back to.
            await self._keeper.checkpoint()
        for decision in decisions:
            if not await self._intervention.heed(decision):
                return False
        await self._keeper.checkpoint_if_due()
        return not decisions

    async def _unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of work that changes no state, or Stopped as soon as `stop` is called."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                raise Stopped(f"stopped by SIGTERM after step {self._at.step}; the next attempt goes on from there")
            return task.result()
        finally:
            stop.cancel()
            task.cancel()
