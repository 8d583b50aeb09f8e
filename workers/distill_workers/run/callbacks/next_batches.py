"""The batches of the next steps, begun as soon as the engines have the weights they may be written with."""

from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.run.callbacks.base import TrainStep


class NextBatchesCallback:
    """Begins them before a checkpoint is copied, which the engines need not wait for."""

    def __init__(self, rollouts: RolloutPipeline, last_step: int) -> None:
        self._rollouts, self._last_step = rollouts, last_step

    async def after_step(self, step: TrainStep) -> None:
        self._rollouts.start_ahead(step.index + 1, self._last_step)
