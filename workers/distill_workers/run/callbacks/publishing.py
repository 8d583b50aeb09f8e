"""The model of each checkpoint, at the places of spec.output.publish that want it, while training goes on."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from distill_api.job import DistillationJob
from distill_api.metrics import StepStage
from distill_api.spec.output import PublishedStep
from distill_workers.failures import Failure, Superseded
from distill_workers.reporting.recorder import Recorder
from distill_workers.results.model_card import card_if_possible
from distill_workers.results.publisher import Model, Publisher
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.checkpoint_manager import CheckpointManager
from distill_workers.run.run_state import RunState
from distill_workers.run.stop_signal import StopSignal
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder

PUBLISHED = "published"
"""The folder in the run folder with the model of a checkpoint that is published."""

log = logging.getLogger(__name__)


class PublishingCallback:
    """Exports the model of a new checkpoint, for which training waits, and publishes it, for which it does not.

    A checkpoint that comes while the one before is still on its way is left out, since the model in the run folder is
    being read. The model of the last step is published at the end of the run (publication.py).
    """

    def __init__(
        self,
        job: DistillationJob,
        folder: RunFolder,
        trainer: TrainerRanks,
        recorder: Recorder,
        checkpoints: CheckpointManager,
        state: RunState,
        stop: StopSignal,
    ) -> None:
        self._job, self._folder, self._trainer = job, folder, trainer
        self._recorder, self._checkpoints, self._state, self._stop = recorder, checkpoints, state, stop
        self._places = job.spec.output.at_checkpoints
        self._publisher = Publisher(job, folder)
        self._tried: int | None = None
        """The step whose checkpoint was taken up last in this attempt."""
        self._publishing: asyncio.Task[None] | None = None

    async def before_update(self, step: TrainStep) -> None:
        await self._publish_if_due()

    async def after_step(self, step: TrainStep) -> None:
        await self._publish_if_due()

    @asynccontextmanager
    async def until_published(self) -> AsyncIterator[None]:
        """Wait, at the end of the block, for what is being published; give it up where the block, or SIGTERM, ends the
        run before: the next attempt goes on with it. Raises Stopped, Superseded."""
        try:
            yield
            await self._stop.interrupting(self._finish())
        finally:
            if self._publishing is not None:
                self._publishing.cancel()
                await asyncio.gather(self._publishing, return_exceptions=True)

    async def _finish(self) -> None:
        if self._publishing is not None:
            publishing, self._publishing = self._publishing, None
            await publishing

    async def _publish_if_due(self) -> None:
        if not self._places or (self._publishing is not None and not self._publishing.done()):
            return
        await self._finish()
        step = self._state.step
        if self._checkpoints.newest != step or step in (self._tried, self._job.spec.schedule.steps):
            return
        first, self._tried = self._tried is None, step
        # An attempt that goes on from a checkpoint publishes it where the one before has not come to that.
        wanted = [p for p in self._places if not (first and self._publisher.is_published(p, step))]
        if wanted and (model := await self._exported(step)) is not None:
            self._publishing = asyncio.create_task(self._publish(model, self._checkpoints.saving))

    async def _exported(self, step: int) -> Model | None:
        """Return the model of the weights as they are; None, with a line in the log, where it cannot be written."""
        folder = self._folder.root / PUBLISHED / "model"
        about = (self._job, self._folder.root, self._trainer.model_path, step)
        try:
            self._folder.check_ownership()
            with self._recorder.timed(StepStage.CHECKPOINT):
                await self._trainer.export(folder, await asyncio.to_thread(card_if_possible, *about))
        except Superseded:
            raise
        except (Failure, OSError, ValueError) as error:
            log.error("publish: the model of step %d was not exported: %s", step, error)
            return None
        return Model(folder, step)

    async def _publish(self, model: Model, saving: asyncio.Future[None] | None) -> None:
        """Publish a model, once its checkpoint is whole; the publisher says in the log what became of it."""
        if saving is not None:
            try:
                await asyncio.shield(saving)
            except Exception:
                return  # the loop raises it
        await self._publisher.publish({PublishedStep.LAST: model}, self._places)
