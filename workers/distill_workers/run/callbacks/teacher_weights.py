"""The weights of a teacher that is the student of some steps ago, or its average: written, and given to its servers.

A run that goes on from a checkpoint, or back to one, gives the servers what they had at that step: the weights of
each version lie in the run folder as long as a checkpoint needs them.
"""

import asyncio
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from distill_api.spec.job_spec import Spec
from distill_api.teacher.student import StudentAsTeacher, average_decay
from distill_workers.failures import Failure
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.run_state import RunState
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.teacher.refreshed import RefreshedTeacher
from distill_workers.teacher.teachers import Teachers
from distill_workers.weight_sync.buckets import BUCKET_BYTES, Buffers
from distill_workers.weight_sync.model_folder import write_model_folder

log = logging.getLogger(__name__)


class TeacherWeights:
    """Keeps and gives the weights of one teacher; does nothing for a job that has no such teacher."""

    def __init__(
        self, spec: Spec, folder: RunFolder, trainer: TrainerRanks, teachers: Teachers, state: RunState
    ) -> None:
        self._folder, self._trainer, self._state = folder, trainer, state
        # What the hub's client has downloaded here is not where the servers have it.
        self._servers_have_start = spec.student.model.startswith("/")
        self._student: StudentAsTeacher | None = None if spec.teacher is None else spec.teacher.student
        found = [pool for pool in teachers.pools.values() if isinstance(pool, RefreshedTeacher)]
        self._teacher = found[0] if found else None
        self._decay = average_decay(spec)
        self._buffers = Buffers(BUCKET_BYTES, torch.device("cpu"))

    async def after_step(self, step: TrainStep) -> None:
        """Give the teacher new weights where the schedule wants it. Scores of the next step then begin."""
        if self._teacher is not None and self._version(self._state.step) == self._state.step:
            await self._write()
            await self._hold(self._state.step)

    async def restore(self) -> None:
        """Give the teacher the weights that it had at the step which the run has gone to. Raises Failure."""
        if self._teacher is None:
            return
        version = self._version(self._state.step)
        place = self._place(version)
        if not place.is_dir():
            if version != self._state.step:
                raise Failure(
                    f"{place} is not there: the teacher's weights of step {version}, which the checkpoint of step "
                    f"{self._state.step} goes on with; bring the folder back, or remove that checkpoint"
                )
            await self._write()  # the trainer has them
        await self._hold(version)

    def _version(self, step: int) -> int:
        """Return the step whose weights the teacher has after `step` steps."""
        assert self._student is not None, "a teacher that is given weights is the student"
        return step - step % self._student.every_steps

    def _place(self, version: int) -> Path:
        if version == 0 and self._servers_have_start:
            return self._trainer.model_path
        return self._folder.teacher / f"version-{version:06d}"

    async def _write(self) -> None:
        """Write the trainer's weights. Raises Superseded, also where a newer trainer has removed what is written."""
        self._folder.check_ownership()
        self._folder.teacher.mkdir(exist_ok=True)
        await asyncio.to_thread(_remove, self._folder.teacher.glob("version-*.tmp"))  # of attempts that are dead
        source = self._trainer.weights if self._decay is None else self._trainer.averages
        final, model, check = self._place(self._state.step), self._trainer.model_path, self._folder.check_ownership
        try:
            await write_model_folder(final, source, model, self._buffers, durable=True, check=check)
        except OSError:
            self._folder.check_ownership()
            raise

    async def _hold(self, version: int) -> None:
        """Give the servers the weights of `version`; then remove those that neither they nor a checkpoint need."""
        assert self._teacher is not None
        await self._teacher.hold(version, self._place(version))
        self._folder.check_ownership()
        needed = {self._place(self._version(step)) for step in [self._state.step, *self._folder.checkpoint_steps()]}
        found = self._folder.teacher.glob("version-*")
        await asyncio.to_thread(_remove, [path for path in found if path not in needed])


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
