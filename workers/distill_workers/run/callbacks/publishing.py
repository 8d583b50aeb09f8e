"""The model of each checkpoint of the schedule, published while training goes on where spec.output.publish wants it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from distill_api.job import DistillationJob
from distill_api.metrics import StepStage
from distill_api.spec.output import PublishedStep
from distill_workers.reporting.recorder import Recorder
from distill_workers.results.publisher import Model, Publisher
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.checkpoint_manager import CheckpointManager
from distill_workers.run.publication import exported
from distill_workers.run.run_state import RunState
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder

PUBLISHED = "published"
"""The folder in the run folder with the model of a checkpoint that is published."""

log = logging.getLogger(__name__)


class PublishingCallback:
    """Exports the model of a checkpoint of the schedule, for which training waits, and publishes it, for which it does
    not.

    Other checkpoints, of the best step or of a stop, are not published. One that comes while the one before is still
    on its way is left out, since the model in the run folder is being read. The model of the last step is published
    at the end of the run (publication.py), in the place of one that is on its way then.
    """

    def __init__(
        self,
        job: DistillationJob,
        folder: RunFolder,
        trainer: TrainerRanks,
        recorder: Recorder,
        checkpoints: CheckpointManager,
        state: RunState,
    ) -> None:
        self._job, self._folder, self._trainer = job, folder, trainer
        self._recorder, self._checkpoints, self._state = recorder, checkpoints, state
        self._places = job.spec.output.at_checkpoints
        self._publisher = Publisher(job, folder)
        self._tried: int | None = None
        """The step whose checkpoint was taken up last in this attempt."""
        self._resumed: int | None = None
        """The step that this attempt began with; None once the run was led back."""
        self._publishing: asyncio.Task[None] | None = None

    async def before_update(self, step: TrainStep) -> None:
        await self._publish_if_due()

    async def after_step(self, step: TrainStep) -> None:
        await self._publish_if_due()

    @asynccontextmanager
    async def while_training(self) -> AsyncIterator[None]:
        """Publish from the step that the run has reached. What is on its way at the end is given up: the exported model
        takes its place, or the next attempt goes on with it."""
        self._resumed = self._state.step
        if self._places:
            self._publisher.forget_after(self._resumed)
        try:
            yield
        finally:
            await self._give_up()

    async def roll_back(self, step: int) -> None:
        """Give up what is on its way, and publish from `step`: the later steps are trained again."""
        await self._give_up()
        self._tried = self._resumed = None
        if self._places:
            self._publisher.forget_after(step)

    async def _give_up(self) -> None:
        if self._publishing is not None:
            publishing, self._publishing = self._publishing, None
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)

    async def _publish_if_due(self) -> None:
        if not self._places or (self._publishing is not None and not self._publishing.done()):
            return
        if self._publishing is not None:
            publishing, self._publishing = self._publishing, None
            await publishing
        step, schedule = self._state.step, self._job.spec.schedule
        if self._checkpoints.newest != step or step in (0, self._tried, schedule.steps):
            return
        if step % schedule.checkpoint_every_steps:
            return
        self._tried = step
        # An attempt that goes on from a checkpoint publishes it where the one before has not come to that.
        wanted = [p for p in self._places if step != self._resumed or not self._publisher.is_published(p, step)]
        if not wanted:
            return
        with self._recorder.timed(StepStage.CHECKPOINT):
            model = await exported(self._job, self._folder, self._trainer, PUBLISHED, step)
        if model.problem is not None:
            log.error("publish: %s", model.problem)
            return
        self._publishing = asyncio.create_task(self._publish(model, self._checkpoints.saving))

    async def _publish(self, model: Model, saving: asyncio.Future[None] | None) -> None:
        """Publish a model, once its checkpoint is whole; the publisher says in the log what became of it."""
        if saving is not None:
            try:
                await asyncio.shield(saving)
            except Exception:
                return  # the loop raises it
        await self._publisher.publish({PublishedStep.LAST: model}, self._places)
