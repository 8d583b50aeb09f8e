"""The publication of a run that is done: the models that spec.output.publish wants, at their places."""

import asyncio
from pathlib import Path

from distill_api.job import DistillationJob
from distill_api.protocol import ExitReason, Publication
from distill_api.spec.output import PublishedStep
from distill_workers.failures import Failure, Stopped, Superseded
from distill_workers.reporting.recorder import Recorder
from distill_workers.results.model_card import card_if_possible
from distill_workers.results.publisher import Model, Publisher
from distill_workers.run.run_state import RunState
from distill_workers.run.stop_signal import StopSignal
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder

BEST = "best"
"""The folder in the run folder with the model of the best step, where that is published and is not the exported one."""


async def exported(
    job: DistillationJob, run: RunFolder, trainer: TrainerRanks, name: str, step: int, load: Path | None = None
) -> Model:
    """Export the weights that the ranks hold, or those of the checkpoint `load`, to NAME/model of the run folder.

    Returns the model, or why it could not be written. Raises Superseded.
    """
    folder = run.root / name / "model"
    try:
        run.check_ownership()
        if load is not None:
            await trainer.load(load)
        card = await asyncio.to_thread(card_if_possible, job, run.root, trainer.model_path, step)
        await trainer.export(folder, card)
    except Superseded:
        raise
    except (Failure, OSError, ValueError) as error:
        return Model(folder, step, problem=f"the model of step {step} was not exported: {error}")
    return Model(folder, step)


class StoppedPublishing(Failure):
    """Raised when SIGTERM comes while the model is published: the next attempt goes on with that alone."""

    reason = ExitReason.STOPPED


class ModelPublication:
    """What happens between the export of the model and the end of the run."""

    def __init__(
        self,
        job: DistillationJob,
        folder: RunFolder,
        trainer: TrainerRanks,
        recorder: Recorder,
        state: RunState,
        stop: StopSignal,
    ) -> None:
        self._job, self._folder, self._trainer = job, folder, trainer
        self._recorder, self._state, self._stop = recorder, state, stop

    async def run(self) -> list[Publication]:
        """Publish the exported model, and that of the best step. Returns what became of each place; never raises for
        one of them, but StoppedPublishing, and Superseded."""
        wanted = {place.step for place in self._job.spec.output.publish}
        if not wanted:
            return []
        models = {PublishedStep.LAST: Model(self._folder.model, self._state.step)}
        if PublishedStep.BEST in wanted:
            models[PublishedStep.BEST] = await self._best(models[PublishedStep.LAST])
        models = {step: model for step, model in models.items() if step in wanted}
        try:
            return await self._stop.interrupting(Publisher(self._job, self._folder).publish(models))
        except Stopped:
            raise StoppedPublishing(
                "stopped by SIGTERM while the model was published; the next attempt goes on with that"
            ) from None

    async def _best(self, last: Model) -> Model:
        """Return the model of the best step: the exported one, or else that of the best checkpoint, exported too.

        Afterwards the ranks hold those weights.
        """
        step = self._recorder.best_step()
        if step == last.step:
            return last
        kept = self._folder.best_checkpoint()
        if step is None or kept is None:
            why = "nothing was measured" if step is None else f"the checkpoint of step {step} is not kept"
            problem = f"there is no model of the best step: {why}"
            return Model(self._folder.root / BEST / "model", step or 0, problem)
        path, saved = kept
        return await exported(self._job, self._folder, self._trainer, BEST, saved["step"], load=path)
