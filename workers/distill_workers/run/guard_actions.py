"""What a guard's decision does to the run: lowers the coefficient, goes back to the best checkpoint, or ends it."""

import dataclasses
from pathlib import Path
from typing import Any

from distill_api.guards import GuardAction
from distill_workers.data.prompts import Cursor
from distill_workers.evaluation.guards import Decision, Guards
from distill_workers.reporting.recorder import Recorder
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.run.checkpoint_manager import Keeper, Standing
from distill_workers.run.team import Team
from distill_workers.run_folder.run_folder import RunFolder


class Intervention:
    """Carries out the decisions of guards (guards.py)."""

    def __init__(
        self,
        guards: Guards,
        keeper: Keeper,
        standing: Standing,
        folder: RunFolder,
        team: Team,
        engines: EnginePool,
        rollouts: RolloutPipeline,
        cursor: Cursor,
        record: Recorder,
    ) -> None:
        self._guards, self._keeper, self._at, self._folder = guards, keeper, standing, folder
        self._team, self._engines, self._rollouts, self._cursor, self._record = team, engines, rollouts, cursor, record
        self.stopped_by: Decision | None = None
        """What ends the run."""

    async def heed(self, decision: Decision | None) -> bool:
        """Does what a guard wants. Whether the run goes on from this step: not after a stop or a roll-back."""
        if decision is None:
            return True
        if decision.action is GuardAction.LOWER_COEFFICIENT:
            self._record.guard(decision, self._at.step, self._guards.coefficient_factor)
            return True
        await self._keeper.saved()
        best = self._folder.best_checkpoint()
        if decision.action is GuardAction.ROLL_BACK and best is not None:
            await self._roll_back(decision, *best)
            return False
        if decision.action is GuardAction.ROLL_BACK:
            why = f"{decision.message}; no checkpoint of the best step is kept that the run could go back to"
            decision = dataclasses.replace(decision, action=GuardAction.STOP, message=why)
        await self._stop(decision, best)
        return False

    async def _stop(self, decision: Decision, best: tuple[Path, dict[str, Any]] | None) -> None:
        """The best checkpoint is what will be exported, or the weights as they are where none is kept."""
        self._record.guard(decision, self._at.step, self._guards.coefficient_factor)
        if best is not None:
            path, state = best
            await self._team.run(self._team.load, path)
            self._at.step = state["step"]
        self.stopped_by = dataclasses.replace(
            decision, message=f"{decision.message}; the model of step {self._at.step} is exported"
        )

    async def _roll_back(self, decision: Decision, path: Path, saved: dict[str, Any]) -> None:
        """Goes on from a checkpoint, but with the prompts that come next: with those that led away from there, in the
        same order, it would be led away again (PaLM, arXiv 2204.02311, section 5.1)."""
        self._rollouts.cancel()
        # An engine that comes back gets the trainer's weights as they are: not these, under the old version.
        async with self._engines.updating_weights():
            await self._team.run(self._team.load, path)
            self._at.step = self._keeper.step = saved["step"]
            self._cursor.restore(self._at.cursor)
            self._guards.rolled_back(saved["guards"])
            self._record.rolled_back(saved, self._at.step)
            told = dataclasses.replace(decision, message=f"{decision.message}; back to step {self._at.step}")
            self._record.guard(told, self._at.step, self._guards.coefficient_factor)
            self._folder.roll_back(path, self._keeper.state())
            await self._engines.drain()
            await self._engines.push(self._team.weights, self._at.step)
            self._record.weights(self._at.step)
