"""Checkpoints between the steps."""

from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.callbacks.evaluation import EvaluationCallback
from distill_workers.run.checkpoint_manager import CheckpointManager


class CheckpointCallback:
    """Saves the run by the schedule, and the best step; an evaluated step once its evaluation is known."""

    def __init__(self, checkpoints: CheckpointManager, evaluation: EvaluationCallback) -> None:
        self._checkpoints, self._evaluation = checkpoints, evaluation

    async def before_update(self, step: TrainStep) -> None:
        """Save what was measured: trainer and engines still hold exactly those weights."""
        if step.evaluations:
            await self._checkpoints.save_if_best()
            await self._checkpoints.save_if_due()

    async def after_step(self, step: TrainStep) -> None:
        if not self._evaluation.under_way:
            await self._checkpoints.save_if_due()
