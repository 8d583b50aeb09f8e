"""Guards: what they decide by a step's numbers and by evaluations is done to the run, or raised for the loop to do."""

import dataclasses

from distill_api.spec.guards import GuardAction
from distill_workers.evaluation.guards import Decision, Guards
from distill_workers.reporting.recorder import Recorder
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.run.callbacks.base import RepeatStep, RollBack, StopRun, TrainStep
from distill_workers.run.checkpoint_manager import CheckpointManager
from distill_workers.run.run_state import RunState
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder


class GuardCallback:
    """Shows the guards (evaluation/guards.py) what they watch, and applies what they decide."""

    def __init__(
        self,
        guards: Guards,
        folder: RunFolder,
        trainer: TrainerRanks,
        rollouts: RolloutPipeline,
        recorder: Recorder,
        checkpoints: CheckpointManager,
        state: RunState,
    ) -> None:
        self._guards, self._folder, self._trainer, self._rollouts = guards, folder, trainer, rollouts
        self._recorder, self._checkpoints, self._state = recorder, checkpoints, state

    async def before_update(self, step: TrainStep) -> None:
        """Judge the evaluations. Any decision discards the gradient, which knew nothing of it, and keeps the batch."""
        decisions = [d for entry in step.evaluations if (d := self._guards.after_evaluation(entry)) is not None]
        if not decisions:
            return
        if step.batch is not None:
            await self._trainer.discard()
            self._rollouts.put_back(step.batch)
        await self._checkpoints.save_if_best()
        for decision in decisions:
            await self._apply(decision)
        await self._checkpoints.save_if_due()
        raise RepeatStep

    async def after_step(self, step: TrainStep) -> None:
        """Judge the step's line."""
        decision = self._guards.after_step(step.line)
        if decision is not None:
            await self._apply(decision)

    async def _apply(self, decision: Decision) -> None:
        """Record a lowered coefficient, which Guards itself remembers; raise anything else."""
        if decision.action is GuardAction.LOWER_COEFFICIENT:
            self._recorder.guard(decision, self._state.step, self._guards.coefficient_factor)
            return
        await self._checkpoints.finish()
        best = self._folder.best_checkpoint()
        if decision.action is GuardAction.ROLL_BACK and best is not None:
            raise RollBack(decision, best)
        if decision.action is GuardAction.ROLL_BACK:
            why = f"{decision.message}; no checkpoint of the best step is kept that the run could go back to"
            decision = dataclasses.replace(decision, action=GuardAction.STOP, message=why)
        raise StopRun(decision, best)
