"""The end that a guard has given a run, as the run folder remembers it: later attempts export and publish alone.

It is written before the model is exported. A run that has done all its steps needs none: its last checkpoint says so.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_api.spec.guards import Guard, GuardAction
from distill_workers.evaluation.guards import Decision
from distill_workers.run_folder.checkpoints import Checkpoints, DamagedCheckpoints
from distill_workers.run_folder.run_folder import RunFolder

FILE = "ended.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEnd:
    """A run that a guard has stopped."""

    decision: Decision
    step: int
    """The step whose checkpoint is exported."""
    progress: dict[str, Any]
    """What the recorder remembers of the run (`Recorder.state`)."""

    def record(self, folder: RunFolder, guards: list[Guard]) -> None:
        """Write the end into the run folder, with the guard as it stands in the job."""
        rule = _rule(guards, self.decision.guard)
        folder.replace(FILE, json.dumps({**asdict(self), "rule": rule}, indent=1))

    @classmethod
    def recorded(cls, folder: RunFolder, guards: list[Guard]) -> "RunEnd | None":
        """Return the end of the run in a folder; None for one that goes on.

        A run whose guard is another by now, or is gone, goes on from its newest checkpoint: its end is removed.
        """
        path = folder.root / FILE
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        decision = Decision(**{**found["decision"], "action": GuardAction(found["decision"]["action"])})
        if _rule(guards, decision.guard) == found["rule"]:
            return cls(decision, found["step"], found["progress"])
        folder.check_ownership()
        path.unlink()
        log.info("guard %s, which had stopped the run, is not the same any more: training goes on", decision.guard)
        return None

    def checkpoint(self, folder: RunFolder) -> Path:
        """Return the checkpoint that is exported. Raises DamagedCheckpoints where it is not complete any more."""
        found = Checkpoints(folder.checkpoints).complete().get(self.step)
        if found is None:
            raise DamagedCheckpoints(
                f"guard {self.decision.guard} stopped the run, and its checkpoint of step {self.step} in "
                f"{folder.checkpoints} is not complete any more: bring it back, or remove {folder.root / FILE} to "
                "train on"
            )
        return found


def _rule(guards: list[Guard], name: str) -> dict[str, Any] | None:
    """Return the fields of a guard that are no defaults; None where the job has no guard of that name."""
    found = (g.model_dump(mode="json", by_alias=True, exclude_defaults=True) for g in guards if g.name == name)
    return next(found, None)
