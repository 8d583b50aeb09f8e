"""Checkpoints of a run: what is in them, when they are made, and how a run goes on from one."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_api.metrics import StepStage
from distill_api.spec.job_spec import Schedule
from distill_workers.data.cursor import Cursor
from distill_workers.data.identity import Content, changed
from distill_workers.evaluation.guards import Guards
from distill_workers.failures import PromptError
from distill_workers.objective.phases import Phases
from distill_workers.reporting.recorder import Recorder
from distill_workers.run.preflight.resumption import optimizer_continues
from distill_workers.run.run_state import RunState
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.run_folder.run_folder import RunFolder

log = logging.getLogger(__name__)


class CheckpointManager:
    """Makes and restores the checkpoints of a run, one at a time; they are written while training goes on."""

    def __init__(
        self,
        schedule: Schedule,
        folder: RunFolder,
        trainer: TrainerRanks,
        cursor: Cursor,
        recorder: Recorder,
        guards: Guards,
        state: RunState,
        held_out: Mapping[str, Content] | None = None,
        phases: Phases | None = None,
    ) -> None:
        """`held_out` is the content of the evaluations' prompts, by their names."""
        self._held_out = {name: dict(content) for name, content in (held_out or {}).items()}
        self._schedule, self._folder, self._trainer, self._cursor = schedule, folder, trainer, cursor
        self._recorder, self._guards, self._state, self._phases = recorder, guards, state, phases
        self._newest: int | None = None
        """Step of the newest checkpoint, made or being made; None if there is none, or it must be made again."""
        self._saving: asyncio.Future[None] | None = None

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint, made or being made."""
        return self._newest

    @property
    def saving(self) -> asyncio.Future[None] | None:
        """The checkpoint that is being written."""
        return self._saving

    async def resume(self) -> None:
        """Restore the newest checkpoint, if there is one. Raises DamagedCheckpoints."""
        newest = self._folder.latest_checkpoint()
        if newest is None:
            self._folder.trim(-1)
            return
        path, saved = newest
        self._check_held_out(saved.get("heldOut", {}))
        optimizer_continues(saved["step"], path)
        await self._trainer.load(path)
        self._state.step, self._state.cursor = saved["step"], saved["cursor"]
        self._cursor.restore(saved["cursor"])
        self._recorder.restore(saved, self._state.step)
        self._guards.restore(saved["guards"])
        self._restore_phases(saved)
        self._newest = self._state.step
        log.info("resumed from %s", path)

    async def roll_back(self, path: Path, saved: dict[str, Any]) -> None:
        """Restore an earlier checkpoint, with the prompts that come next: with those that led away from there, in the
        same order, the run would be led away again (PaLM, arXiv 2204.02311, section 5.1)."""
        await self._trainer.load(path)
        self._state.step = saved["step"]
        self._cursor.restore(self._state.cursor)
        self._guards.rolled_back(saved["guards"])
        self._restore_phases(saved)
        self._recorder.rolled_back(saved, self._state.step)
        self._newest = self._state.step

    async def save(self) -> None:
        """Copy the run's state after `step` steps and begin to write it, unless that is done.

        The last good state is on disk at every moment: written aside, renamed, `latest` moved last.
        """
        if self._newest == self._state.step:
            return
        await self.finish()
        with self._recorder.timed(StepStage.CHECKPOINT):
            aside = self._folder.checkpoint_aside(self._state.step)
            await self._trainer.begin_save(aside)
        self._saving = asyncio.ensure_future(self._publish(aside, self.content()))
        self._newest = self._state.step

    def outdate(self) -> None:
        """Let the next save of this step make it again: what is saved of it lacks something that is known by now."""
        self._newest = None

    async def save_if_due(self) -> None:
        """Save by the schedule; else publish the checkpoint before, if that can be done at once."""
        step, schedule = self._state.step, self._schedule
        if step and (step % schedule.checkpoint_every_steps == 0 or step == schedule.steps):
            await self.save()
        elif self._saving is not None and self._saving.done():
            await self.finish()

    async def save_if_best(self) -> None:
        """Save a best step that schedule.keepBest wants kept: it could not be gone back to otherwise."""
        if self._schedule.keep_best and self._recorder.best_step() == self._state.step:
            await self.save()

    async def finish(self) -> None:
        """Wait until the checkpoint that is being written, if one is, is the newest. Raises what went wrong."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self._recorder.timed(StepStage.CHECKPOINT):
                await saving

    def content(self) -> dict[str, Any]:
        """What a checkpoint's state.json holds: step, cursor, guards, phases, the evaluations' data and progress."""
        phases = {} if self._phases is None else self._phases.state()
        of_run = {"guards": self._guards.state(), "phases": phases, "heldOut": self._held_out}
        return {"step": self._state.step, "cursor": self._state.cursor, **of_run, **self._recorder.state()}

    def _restore_phases(self, saved: Mapping[str, Any]) -> None:
        if self._phases is not None:
            self._phases.restore(saved.get("phases", {}))

    def _check_held_out(self, saved: Mapping[str, Content]) -> None:
        """Raise PromptError if an evaluation has other prompts than when the checkpoint was made."""
        for name, content in self._held_out.items():
            if others := changed(saved.get(name, {}), content):
                raise PromptError(
                    f"the checkpoint was made with other data of evaluation {name}: its {', '.join(others)} differ; "
                    "restore the data, or start in a new output folder"
                )

    async def _publish(self, aside: Path, content: dict[str, Any]) -> None:
        """Make a checkpoint the newest, once every rank has written it."""
        await self._trainer.written()
        await self._trainer.finish_save()
        await asyncio.to_thread(self._folder.publish_checkpoint, aside, content, self._schedule)
        self._recorder.checkpoint(content["step"])
