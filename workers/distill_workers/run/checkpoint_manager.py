"""Where a run stands, and what is kept of that so that another attempt goes on from there."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.metrics import StepStage
from distill_api.spec import Schedule
from distill_workers.data.prompts import Cursor
from distill_workers.evaluation.guards import Guards
from distill_workers.reporting.recorder import Recorder
from distill_workers.run.team import Team
from distill_workers.run_folder.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass
class Standing:
    """What a run has done so far."""

    cursor: dict[str, Any]
    """Of the prompts, after those of `step` steps; the cursor itself may be ahead."""
    step: int = 0
    """Optimiser steps done, and so the version of the weights."""


class Keeper:
    """Makes and restores the checkpoints of a run."""

    def __init__(
        self,
        schedule: Schedule,
        folder: RunFolder,
        team: Team,
        cursor: Cursor,
        record: Recorder,
        guards: Guards,
        standing: Standing,
    ) -> None:
        self._schedule, self._folder, self._team, self._cursor = schedule, folder, team, cursor
        self._record, self._guards, self._at = record, guards, standing
        self.step = -1
        """Of the newest checkpoint, made or being made; -1 if there is none, or it must be made again."""
        self._saving: asyncio.Future[None] | None = None

    async def resume(self) -> None:
        """From the newest checkpoint, if there is one."""
        newest = self._folder.latest_checkpoint()
        if newest is None:
            self._folder.trim(-1)
            return
        path, state = newest
        await self._team.run(self._team.load, path)
        self._at.step = self.step = state["step"]
        self._at.cursor = state["cursor"]
        self._cursor.restore(state["cursor"])
        self._record.restore(state, self._at.step)
        self._guards.restore(state["guards"])
        log.info("resumed from %s", path)

    async def checkpoint(self) -> None:
        """Copies the run's state after `step` steps, unless that is done; it is written while training goes on.

        The last good state is on disk at every moment: written aside, renamed, `latest` moved last.
        """
        if self.step == self._at.step:
            return
        await self.saved()
        with self._record.timed(StepStage.CHECKPOINT):
            aside = self._folder.checkpoint_aside(self._at.step)
            await self._team.run(self._team.save, aside)
        self._saving = asyncio.ensure_future(self._publish(aside, self.state()))
        self.step = self._at.step

    async def checkpoint_if_due(self) -> None:
        """By the schedule; else ends the one before, if that can be done at once."""
        step, schedule = self._at.step, self._schedule
        if step and (step % schedule.checkpoint_every_steps == 0 or step == schedule.steps):
            await self.checkpoint()
        elif self._saving is not None and self._saving.done():
            await self.saved()

    async def saved(self) -> None:
        """Waits until the checkpoint that is being written, if one is, is the newest. Raises what went wrong."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self._record.timed(StepStage.CHECKPOINT):
                await saving

    def state(self) -> dict[str, Any]:
        guards = {"guards": self._guards.state()}
        return {"step": self._at.step, "cursor": self._at.cursor, **guards, **self._record.state()}

    async def _publish(self, aside: Path, state: dict[str, Any]) -> None:
        """Makes a checkpoint the newest, once every rank has written it."""
        await self._team.written()
        await self._team.run(self._team.saved)
        await asyncio.to_thread(self._folder.publish_checkpoint, aside, state, self._schedule)
        self._record.checkpoint(state["step"])
