"""On-policy distillation, as the algorithm reads (GKD, arXiv 2306.13649, algorithm 1).

    repeat:
        the student writes responses to a batch of prompts       rollout/      (engines, weight version v)
        the teacher scores every token of them                   teacher/
        the student takes one step down the divergence           megatron/     (loss: objective/loss.py)
        the engines get the new weights                          weight_sync/  (weight version v + 1)

That is `Loop._steps`. The first three run side by side, also on-policy: the gradient of the responses that are there is
computed while others are still being written, and the step is taken once all are in (periodic asynchrony, arXiv
2511.18871).

Everything else that happens around an update is a callback (callbacks/, in the order of `Loop.__init__`). An evaluation
of step v runs beside the rollouts and the gradient of step v + 1, and ends before that is applied. Until then engines
and trainer hold exactly the weights that are measured: nothing has to be copied for a best checkpoint that may not
come, and what a guard decides takes effect from step v. Training waits for no more of it than outlasts the next batch.
A guard that sends the run back, or ends it, raises RollBack or StopRun; `Loop._train` does what they say.

Rank 0 of the trainer runs this; the other ranks only take part in what `TrainerRanks` calls. Weight version n means:
the weights after n optimiser steps.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from distill_api.job import DistillationJob
from distill_api.metrics import StepStage
from distill_api.protocol import Phase
from distill_api.status import Result
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Sample
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.evaluation.guards import Decision, Guards
from distill_workers.failures import ConfigurationError, Failure, Stopped
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.recorder import Recorder
from distill_workers.results.model_card import card_if_possible
from distill_workers.rollout.batch import Batch
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.run.callbacks.base import Callbacks, RepeatStep, RollBack, StopRun, TrainStep
from distill_workers.run.callbacks.checkpointing import CheckpointCallback
from distill_workers.run.callbacks.engine_agreement import EngineAgreementCallback
from distill_workers.run.callbacks.evaluation import EvaluationCallback
from distill_workers.run.callbacks.guards import GuardCallback
from distill_workers.run.callbacks.metrics import MetricsCallback
from distill_workers.run.callbacks.next_batches import NextBatchesCallback
from distill_workers.run.callbacks.phases import PhaseCallback
from distill_workers.run.callbacks.publishing import PublishingCallback
from distill_workers.run.callbacks.teacher_weights import TeacherWeights
from distill_workers.run.callbacks.traces import traces_of
from distill_workers.run.checkpoint_manager import CheckpointManager
from distill_workers.run.guard_actions import GuardActions
from distill_workers.run.learning_rate import learning_rate
from distill_workers.run.preflight.preflight import preflight
from distill_workers.run.preflight.resumption import cursor_continues
from distill_workers.run.publication import ModelPublication
from distill_workers.run.run_state import RunState
from distill_workers.run.stop_signal import StopSignal
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.teacher.teachers import Teachers


class Loop:
    """One run, from its newest checkpoint or from the start."""

    def __init__(
        self,
        job: DistillationJob,
        folder: RunFolder,
        trainer: TrainerRanks,
        engines: EnginePool,
        teachers: Teachers,
        cursor: Cursor,
        rollouts: RolloutPipeline,
        evaluators: list[Evaluator],
        reporter: ProgressReporter,
        tokenizer: Any,
    ) -> None:
        spec, self._job = job.spec, job
        self._spec, self._folder, self._trainer, self._engines = spec, folder, trainer, engines
        self._teachers, self._cursor, self._rollouts = teachers, cursor, rollouts
        self._reporter, self._tokenizer, self._last_step = reporter, tokenizer, spec.schedule.steps
        self._state = state = RunState(cursor.state())
        self._stop_signal = StopSignal(state)
        self._guards, self._phases = guards, phases = Guards(spec), rollouts.phases
        self._recorder = recorder = Recorder(folder, reporter, spec, tokenizer.decode)
        recorder.engines = engines.count_placed
        self.checkpoints = CheckpointManager(
            spec.schedule,
            folder,
            trainer,
            cursor,
            recorder,
            guards,
            state,
            {e.name: e.content for e in evaluators},
            phases,
        )
        self._teacher_weights = weights = TeacherWeights(spec, folder, trainer, teachers, state)
        self._publishing = publishing = PublishingCallback(job, folder, trainer, recorder, self.checkpoints, state)
        self._guard_actions = GuardActions(
            guards,
            self.checkpoints,
            folder,
            trainer,
            engines,
            rollouts,
            recorder,
            state,
            spec.guards,
            weights,
            publishing,
        )
        self.evaluation = EvaluationCallback(
            spec.schedule, evaluators, engines, teachers, recorder, self.checkpoints, state, self._stop_signal
        )
        guard = GuardCallback(guards, folder, trainer, rollouts, recorder, self.checkpoints, state)
        checkpoint = CheckpointCallback(self.checkpoints, self.evaluation)
        next_batches = NextBatchesCallback(rollouts, self._last_step)
        self._publication = ModelPublication(job, folder, trainer, recorder, state, self._stop_signal)
        self.traces = traces_of(job)
        self.callbacks = Callbacks(
            before=[self.evaluation, *self.traces, PhaseCallback(phases), guard, checkpoint, publishing],
            after=[
                MetricsCallback(recorder),
                *self.traces,
                EngineAgreementCallback(spec, engines, cursor, trainer),
                weights,
                guard,
                self.evaluation,
                next_batches,
                checkpoint,
                publishing,
            ],
        )

    async def run(self) -> str:
        """Do the whole run, export and publish its model. Returns how it ended, as a sentence. Raises Failure; Stopped
        after `stop`."""
        guard = await self._guard_actions.resume_end()
        if guard is None:
            await self._resume()
            self._reporter.update(phase=Phase.TRAINING, preflight_passed=True)
            async with self._publishing.while_training():
                guard = await self._train()
                await self.checkpoints.finish()
        self._reporter.update(phase=Phase.EXPORTING, preflight_passed=True)
        self._folder.check_ownership()
        about = (self._job, self._folder.root, self._trainer.model_path, self._state.step)
        await self._trainer.export(self._folder.model, await asyncio.to_thread(card_if_possible, *about))
        result = Result(
            model_path=str(self._folder.model),
            step=self._state.step,
            best_step=self._recorder.best_step(),
            stopped_by=guard and guard.guard,
        )
        publications = await self._publication.run()
        self._reporter.update(phase=Phase.DONE, result=result, publications=publications)
        if guard is None:
            return "all steps are done and the model is exported"
        return f"guard {guard.guard} stopped the run after step {guard.step}: {guard.message}"

    async def _resume(self) -> None:
        """Restore the newest checkpoint, give the engines its weights, and check what is left to train."""
        await self.checkpoints.resume()
        cursor_continues(self._spec, self._state.step, self._state.cursor)
        async with self._engines.updating_weights():
            await self._load_engines()
        await self._teacher_weights.restore()
        if self._state.step < self._last_step:  # else nothing is left but to export and publish
            self._reporter.update(phase=Phase.PREFLIGHT)
            parts = (self._trainer, self._engines, self._teachers, self._cursor)
            checks = preflight(self._spec, self._tokenizer, *parts, step=self._state.step)
            if notes := await self._stop_signal.interrupting(checks):
                self._reporter.update(notes=[*self._reporter.report.notes, *notes])

    def stop(self) -> None:
        """End the run as soon as its state is whole; `run` then raises Stopped."""
        self._stop_signal.set()

    async def checkpoint(self) -> None:
        """Save the run as it stands, and wait until that is on disk."""
        await self.checkpoints.save()
        await self.checkpoints.finish()

    async def _train(self) -> Decision | None:
        """Train to the last step, or until a guard stops the run. Returns that guard's decision; None without one."""
        self.evaluation.begin()
        try:
            while True:
                try:
                    await self._steps()
                    return None
                except RepeatStep:
                    continue
                except RollBack as wanted:
                    await self._guard_actions.roll_back(wanted)
                except StopRun as wanted:
                    return await self._guard_actions.stop(wanted)
        finally:
            self.evaluation.cancel()

    async def _steps(self) -> None:
        """Algorithm 1 of GKD, from the step that the run has reached to the last."""
        for step in self._remaining_steps():
            step.batch = self._rollouts.take(step.index, self._last_step)
            async for samples in self._portions(step, step.batch):
                await step.clock.timed(StepStage.TRAIN, self._trainer.accumulate(samples, step.coefficients))
            await self.callbacks.before_update(step)
            async with self._engines.updating_weights():
                step.stats = await step.clock.timed(StepStage.TRAIN, self._update(step.batch))
                await step.clock.timed(StepStage.ROLLOUT, self._engines.drain())
                await step.clock.timed(StepStage.WEIGHT_SYNC, self._load_engines())
            await self.callbacks.after_step(step)
        await self.callbacks.before_update(self._step())

    def _remaining_steps(self) -> Iterator[TrainStep]:
        while self._state.step < self._last_step:
            self._recorder.begin_step()
            yield self._step()

    def _step(self) -> TrainStep:
        """The step that the run has reached, with the coefficients of its phase as guards have lowered them."""
        step = self._state.step
        planned = self._phases.coefficients(step)
        return TrainStep(step, planned.lowered(self._guards.coefficient_factor), self._phases.name(step))

    async def _portions(self, step: TrainStep, batch: Batch) -> AsyncIterator[list[Sample]]:
        """The samples of the batch as they come in, in portions that fill a micro-batch of every replica.

        The weights do not change before the update, so the gradient is that of the whole batch at once. Raises Stopped,
        and Failure if there is no sample at all.
        """
        arrivals = batch.arrivals(in_order=self._spec.deterministic)
        enough = self._spec.trainer.max_tokens_per_micro_batch * self._trainer.replicas
        portion: list[Sample] = []
        arrived: list[Sample] | None = []
        while arrived is not None:
            try:
                arrived = await step.clock.waited(self._stop_signal.interrupting(anext(arrivals, None)))
            except Stopped:
                await self._trainer.discard()
                raise
            portion += [s for s in arrived or [] if not s.masked]
            step.samples += [s for s in arrived or [] if s.masked]
            if portion and (arrived is None or sum(s.tokens for s in portion) >= enough):
                yield portion
                step.samples += portion
                portion = []
        if not step.samples:
            error = ConfigurationError if batch.failed.permanent else Failure
            raise error(f"no sample of step {step.index + 1} could be scored: {batch.failed.sentence()}")
        if all(s.masked for s in step.samples):
            raise Failure(
                f"all {len(step.samples)} responses of step {step.index + 1} were cut off at "
                "rollout.maxResponseTokens, and rollout.truncated masks them; raise maxResponseTokens, or see whether "
                "the student ends its turns"
            )

    async def _update(self, batch: Batch) -> dict[str, float]:
        """The optimiser step. Raises Failure, with nothing updated, for a gradient that is not finite."""
        step = self._state.step
        stats = await self._trainer.update(learning_rate(self._spec.trainer.optimizer, step, self._last_step))
        if stats["skipped"]:
            raise Failure(
                f"the gradient of step {step + 1} was not finite, so nothing was updated; if the next "
                "attempt ends here too, lower trainer.optimizer.learningRate or objective.coefficient"
            )
        self._state.step, self._state.cursor = step + 1, batch.cursor_after
        return stats

    async def _load_engines(self) -> None:
        """Give the engines the weights after `step` steps."""
        await self._engines.push(self._trainer.weights, self._state.step)
        self._recorder.weights(self._state.step)
