"""On-policy distillation, as the algorithm reads (GKD, arXiv 2306.13649).

    repeat:
        the student writes responses to a batch of prompts       rollouts.py   (engines, weight version v)
        the teacher scores every token of them                   teacher.py
        the student takes one step down the divergence           megatron/     (loss: objective/)
        the engines get the new weights                          fleet.py      (weight version v + 1)

The first three run side by side, also on-policy: the gradient of the responses that are there is computed while others
are still being written, and the step is taken once all are in (periodic asynchrony, arXiv 2511.18871).

Rank 0 of the trainer runs this; the other ranks only take part in what `Team` announces. Weight version n means: the
weights after n optimiser steps.
"""

import asyncio
import dataclasses
import logging
import statistics
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from distill_api.guards import GuardAction
from distill_api.job import DistillationJob
from distill_api.metrics import Stage
from distill_api.status import Result
from distill_api.wire import Phase
from distill_workers.evaluation import Evaluator
from distill_workers.failures import Failure, Stopped
from distill_workers.fleet import Fleet
from distill_workers.guards import Decision, Guards
from distill_workers.objective.coefficients import step_coefficients
from distill_workers.objective.schedule import learning_rate
from distill_workers.preflight import preflight
from distill_workers.progress import Reporter
from distill_workers.prompts import Cursor
from distill_workers.recorder import Recorder, Step
from distill_workers.rollouts import Batch, Rollouts
from distill_workers.runfolder import RunFolder
from distill_workers.sample import Sample
from distill_workers.teacher import TeacherPool
from distill_workers.team import Team

log = logging.getLogger(__name__)
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
        fleet: Fleet,
        teacher: TeacherPool,
        cursor: Cursor,
        rollouts: Rollouts,
        evaluators: list[Evaluator],
        reporter: Reporter,
        tokenizer: Any,
    ) -> None:
        self._spec, self._folder, self._team, self._fleet = job.spec, folder, team, fleet
        self._teacher, self._cursor, self._rollouts, self._evaluators = teacher, cursor, rollouts, evaluators
        self._reporter, self._tokenizer = reporter, tokenizer
        self._record = Recorder(folder, reporter, job.spec, tokenizer.decode)
        self._guards = Guards(job.spec)
        self._stopped_by: Decision | None = None
        self._step = 0
        """Optimiser steps done, and so the version of the weights."""
        self._cursor_state = cursor.state()
        """After the prompts of those steps; the cursor itself may be ahead."""
        self._checkpoint_step = -1
        self._saving: asyncio.Future[None] | None = None
        """A checkpoint that is being written."""
        self._stopping = asyncio.Event()

    async def run(self) -> str:
        """Returns how it ended, as a sentence. Raises Failure; Stopped after `stop`."""
        schedule = self._spec.schedule
        await self._resume()
        async with self._fleet.weights_change():
            await self._push()
        if self._step == 0:
            self._reporter.update(phase=Phase.PREFLIGHT)
            checks = preflight(self._spec, self._tokenizer, self._team, self._fleet, self._teacher, self._cursor)
            await self._unless_stopped(checks)
        self._reporter.update(phase=Phase.TRAINING, preflight_passed=True)
        self._rollouts.ahead(self._step, schedule.steps)
        if self._step == 0:
            await self._evaluate()
        while self._step < schedule.steps and self._stopped_by is None:
            line = await self._train_step()
            if not await self._heed(self._guards.after_step(line)):
                continue
            # The engines need not wait for evaluation or checkpoint to end.
            self._rollouts.ahead(self._step, schedule.steps)
            evaluate = self._step % schedule.evaluate_every_steps == 0 or self._step == schedule.steps
            if evaluate and not await self._evaluate():
                continue
            if self._step % schedule.checkpoint_every_steps == 0 or self._step == schedule.steps:
                await self.checkpoint()
            elif self._saving is not None and self._saving.done():
                await self.saved()
        await self.saved()
        self._reporter.update(phase=Phase.EXPORTING)
        await self._team.run(self._team.export, self._folder.model)
        guard = self._stopped_by
        result = Result(
            model_path=str(self._folder.model),
            step=self._step,
            best_step=self._record.best_step(),
            stopped_by=guard and guard.guard,
        )
        self._reporter.update(phase=Phase.DONE, result=result)
        if guard is None:
            return "all steps are done and the model is exported"
        return f"guard {guard.guard} stopped the run after step {guard.step}: {guard.message}"

    def stop(self) -> None:
        """Ends the run at the next moment at which the state is whole; `run` then raises Stopped."""
        self._stopping.set()

    async def checkpoint(self) -> None:
        """Copies the run's state after `step` steps, unless that is done; it is written while training goes on.

        The last good state is on disk at every moment: written aside, renamed, `latest` moved last.
        """
        if self._checkpoint_step == self._step:
            return
        await self.saved()
        with self._record.timed(Stage.CHECKPOINT):
            aside = self._folder.checkpoint_aside(self._step)
            await self._team.run(self._team.save, aside)
        self._saving = asyncio.ensure_future(self._publish(aside, self._state()))
        self._checkpoint_step = self._step

    async def _publish(self, aside: Path, state: dict[str, Any]) -> None:
        """Makes a checkpoint the newest, once every rank has written it."""
        await self._team.written()
        await self._team.run(self._team.saved)
        await asyncio.to_thread(self._folder.publish_checkpoint, aside, state, self._spec.schedule)
        self._record.checkpoint(state["step"])

    async def saved(self) -> None:
        """Waits until the checkpoint that is being written, if one is, is the newest. Raises what went wrong."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self._record.timed(Stage.CHECKPOINT):
                await saving

    def _state(self) -> dict[str, Any]:
        guards = {"guards": self._guards.state()}
        return {"step": self._step, "cursor": self._cursor_state, **guards, **self._record.state()}

    async def _resume(self) -> None:
        newest = self._folder.latest_checkpoint()
        if newest is None:
            self._folder.trim(-1)
            return
        path, state = newest
        await self._team.run(self._team.load, path)
        self._step = self._checkpoint_step = state["step"]
        self._cursor_state = state["cursor"]
        self._cursor.restore(state["cursor"])
        self._record.restore(state, self._step)
        self._guards.restore(state["guards"])
        log.info("resumed from %s", path)

    async def _train_step(self) -> dict[str, Any]:
        """Returns the step's line of metrics.jsonl."""
        begin = time.monotonic()
        self._record.begin_step()
        batch = self._rollouts.take(self._step, self._spec.schedule.steps)
        done = await self._accumulate(batch)
        if not done.samples:
            raise Failure(f"no sample of step {self._step + 1} could be scored; the log names the reasons")
        lag = statistics.fmean(self._step - s.weight_version for s in done.samples)
        rate = learning_rate(self._spec.trainer.optimizer, self._step, self._spec.schedule.steps)
        async with self._fleet.weights_change():
            applying = time.monotonic()
            trained = await self._team.run(self._team.apply, rate)
            if trained["skipped"]:
                raise Failure(
                    f"the gradient of step {self._step + 1} was not finite, so nothing was updated; if the next "
                    "attempt ends here too, lower trainer.optimizer.learningRate or objective.coefficient"
                )
            self._step, self._cursor_state = self._step + 1, batch.cursor_after
            settling = time.monotonic()
            await self._fleet.settle()
            settled = time.monotonic()
            with self._record.timed(Stage.WEIGHT_SYNC):
                await self._push()
        self._record.spent(Stage.TRAIN, done.training_seconds + settling - applying)
        self._record.spent(Stage.ROLLOUT, done.rollout_seconds + settled - settling)
        self._record.spent(Stage.TEACHER_SCORE, done.scoring_seconds)
        return self._record.step(Step(self._step, done.samples, trained, lag, time.monotonic() - begin))

    async def _accumulate(self, batch: Batch) -> Accumulated:
        """Forward and backward of the samples as they come in, in portions that fill a micro-batch of every replica.

        The weights do not change before `apply`, so the gradient is that of the whole batch at once.
        """
        done, portion = Accumulated(), list[Sample]()
        planned = step_coefficients(self._spec.objective, self._step)
        coefficients = planned.lowered(self._guards.coefficient_factor)
        waits: list[tuple[float, float]] = []
        enough = self._spec.trainer.max_tokens_per_micro_batch * self._team.data_size
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
        await self._fleet.push(self._team.weights, self._step)
        self._record.weights(self._step)

    async def _evaluate(self) -> bool:
        """Whether the run goes on from this step."""
        with self._record.timed(Stage.EVALUATE):
            work = (evaluator.measure(self._step, self._fleet, self._teacher) for evaluator in self._evaluators)
            measured = await self._unless_stopped(asyncio.gather(*work))
        decisions = [self._guards.after_evaluation(self._record.evaluation(m)) for m in measured]
        if self._spec.schedule.keep_best and self._record.best_step() == self._step:
            # A best step that was not saved could not be gone back to.
            await self.checkpoint()
        for decision in decisions:
            if not await self._heed(decision):
                return False
        return True

    async def _heed(self, decision: Decision | None) -> bool:
        """Does what a guard wants. Whether the run goes on from this step: not after a stop or a roll-back."""
        if decision is None:
            return True
        if decision.action is GuardAction.LOWER_COEFFICIENT:
            self._record.guard(decision, self._step, self._guards.coefficient_factor)
            return True
        await self.saved()
        best = self._folder.best_checkpoint()
        if decision.action is GuardAction.ROLL_BACK and best is not None:
            await self._roll_back(decision, *best)
            return False
        if decision.action is GuardAction.ROLL_BACK:
            why = f"{decision.message}; no checkpoint of the best step is kept that the run could go back to"
            decision = dataclasses.replace(decision, action=GuardAction.STOP, message=why)
        await self._stop_by(decision, best)
        return False

    async def _stop_by(self, decision: Decision, best: tuple[Path, dict[str, Any]] | None) -> None:
        """The best checkpoint is what will be exported, or the weights as they are where none is kept."""
        self._record.guard(decision, self._step, self._guards.coefficient_factor)
        if best is not None:
            path, state = best
            await self._team.run(self._team.load, path)
            self._step = state["step"]
        self._stopped_by = dataclasses.replace(
            decision, message=f"{decision.message}; the model of step {self._step} is exported"
        )

    async def _roll_back(self, decision: Decision, path: Path, saved: dict[str, Any]) -> None:
        """Goes on from a checkpoint, but with the prompts that come next: with those that led away from there, in the
        same order, it would be led away again (PaLM, arXiv 2204.02311, section 5.1)."""
        self._rollouts.cancel()
        # An engine that comes back gets the trainer's weights as they are: not these, under the old version.
        async with self._fleet.weights_change():
            await self._team.run(self._team.load, path)
            self._step = self._checkpoint_step = saved["step"]
            self._cursor.restore(self._cursor_state)
            self._guards.rolled_back(saved["guards"])
            self._record.rolled_back(saved, self._step)
            told = dataclasses.replace(decision, message=f"{decision.message}; back to step {self._step}")
            self._record.guard(told, self._step, self._guards.coefficient_factor)
            self._folder.roll_back(path, self._state())
            await self._fleet.settle()
            await self._push()

    async def _unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of work that changes no state, or Stopped as soon as `stop` is called."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                raise Stopped(f"stopped by SIGTERM after step {self._step}; the next attempt goes on from there")
            return task.result()
        finally:
            stop.cancel()
            task.cancel()
