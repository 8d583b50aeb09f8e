"""What RollBack and StopRun do to the run: it goes on from the best checkpoint, or ends with it, for good."""

import dataclasses

from distill_api.spec.guards import Guard
from distill_workers.evaluation.guards import Decision, Guards
from distill_workers.reporting.recorder import Recorder
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.run.callbacks.base import RollBack, StopRun
from distill_workers.run.callbacks.publishing import PublishingCallback
from distill_workers.run.callbacks.teacher_weights import TeacherWeights
from distill_workers.run.checkpoint_manager import CheckpointManager
from distill_workers.run.run_end import RunEnd
from distill_workers.run.run_state import RunState
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder


class GuardActions:
    """Carries out what callbacks/guards.py raises, between two steps."""

    def __init__(
        self,
        guards: Guards,
        checkpoints: CheckpointManager,
        folder: RunFolder,
        trainer: TrainerRanks,
        engines: EnginePool,
        rollouts: RolloutPipeline,
        recorder: Recorder,
        state: RunState,
        rules: list[Guard],
        teacher_weights: TeacherWeights,
        publishing: PublishingCallback,
    ) -> None:
        """`rules` are the guards of the job."""
        self._rules, self._teacher_weights, self._publishing = rules, teacher_weights, publishing
        self._guards, self._checkpoints, self._folder, self._trainer = guards, checkpoints, folder, trainer
        self._engines, self._rollouts, self._recorder, self._state = engines, rollouts, recorder, state

    async def roll_back(self, wanted: RollBack) -> None:
        """Let trainer, engines, prompts, guards and run folder go on from a checkpoint."""
        decision, (path, saved) = wanted.decision, wanted.checkpoint
        self._rollouts.cancel()
        await self._publishing.roll_back(saved["step"])
        # An engine that comes back gets the trainer's weights as they are: not these, under the old version.
        async with self._engines.updating_weights():
            await self._checkpoints.roll_back(path, saved)
            step = self._state.step
            done = dataclasses.replace(decision, message=f"{decision.message}; back to step {step}")
            self._recorder.guard(done, step, self._guards.coefficient_factor)
            self._folder.roll_back(path, self._checkpoints.content())
            await self._engines.drain()
            await self._engines.push(self._trainer.weights, step)
            self._recorder.weights(step)
        await self._teacher_weights.restore()

    async def stop(self, wanted: StopRun) -> Decision:
        """End the run: load what is exported, the best checkpoint, or the weights as they are where none is kept.

        The run folder remembers the end from here on. Returns the decision, which then says what is exported.
        """
        decision = wanted.decision
        self._recorder.guard(decision, self._state.step, self._guards.coefficient_factor)
        step = self._state.step if wanted.checkpoint is None else wanted.checkpoint[1]["step"]
        message = f"{decision.message}; the model of step {step} is exported"
        end = RunEnd(dataclasses.replace(decision, message=message), step, self._recorder.state())
        end.record(self._folder, self._rules)
        if wanted.checkpoint is None:
            # After the record: an attempt that finds this checkpoint, and no end, would train on from it.
            await self._checkpoints.save()
            await self._checkpoints.finish()
            end = dataclasses.replace(end, progress=self._recorder.state())
            end.record(self._folder, self._rules)
        else:
            await self._trainer.load(wanted.checkpoint[0])
            self._state.step = step
        return end.decision

    async def resume_end(self) -> Decision | None:
        """Load what is exported of a run that a guard has stopped in an earlier attempt. Returns that decision; None
        for a run that goes on. Raises DamagedCheckpoints, DamagedEnd."""
        end = RunEnd.recorded(self._folder, self._rules)
        if end is None:
            return None
        await self._trainer.load(end.checkpoint(self._folder))
        self._recorder.restore_end(end.progress)
        self._state.step = end.step
        return end.decision
