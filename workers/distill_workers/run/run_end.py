"""The end that a guard has given a run, as the run folder remembers it: later attempts export and publish alone.

It is written before the checkpoint that is exported, where that is yet to be made. A run that has done all its steps
needs none: its last checkpoint says so.
"""

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distill_api.spec.guards import Guard, GuardAction
from distill_api.status import Progress
from distill_workers.evaluation.guards import Decision
from distill_workers.failures import ConfigurationError
from distill_workers.run_folder.checkpoints import STEP_FORMAT, Checkpoints, DamagedCheckpoints
from distill_workers.run_folder.run_folder import RunFolder

FILE = "ended.json"

log = logging.getLogger(__name__)


class DamagedEnd(ConfigurationError):
    """Raised where the file of a run's end cannot be read: no attempt can tell whether the run goes on."""


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

        A run whose guard is another by now, or is gone, goes on from its newest checkpoint, as does one whose process
        was killed before the checkpoint of the end was whole: their ends are removed. Raises DamagedEnd,
        DamagedCheckpoints.
        """
        path = folder.root / FILE
        if not path.exists():
            return None
        end, rule = _read(path)
        if _rule(guards, end.decision.guard) != rule:
            why = "is not the same any more"
        elif end._is_saved(folder):
            return end
        else:
            why = f"did so at step {end.step}, whose checkpoint was not whole yet"
        folder.check_ownership()
        path.unlink()
        log.info("guard %s, which had stopped the run, %s: training goes on", end.decision.guard, why)
        return None

    def _is_saved(self, folder: RunFolder) -> bool:
        """Return whether the checkpoint of the end is complete, or was: `latest` names it then, or a later one is.

        `latest` goes on naming it where it is damaged.
        """
        checkpoints = Checkpoints(folder.checkpoints)
        named = checkpoints.named()
        newest = folder.latest_checkpoint()  # which completes one that was about to be renamed
        if self.step in checkpoints.complete():
            return True
        if named is not None and named.name == STEP_FORMAT.format(self.step):
            checkpoints.name(named)  # for the next attempt, which must not train on either
            return True
        return newest is not None and newest[1]["step"] > self.step

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


def _read(path: Path) -> tuple[RunEnd, dict[str, Any] | None]:
    """Return an end, and the guard as it stood then. Fields of a newer release are left out. Raises DamagedEnd."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: found["decision"][field.name] for field in fields(Decision)}
        decision = Decision(**{**known, "action": GuardAction(known["action"])})
        Progress.model_validate(found["progress"]["progress"])
        return RunEnd(decision, int(found["step"]), found["progress"]), found["rule"]
    except (ValueError, TypeError, LookupError) as error:
        raise DamagedEnd(
            f"{path} is damaged, or of a newer release ({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
            "bring it back, or remove it to train on from the newest checkpoint"
        ) from None


def _rule(guards: list[Guard], name: str) -> dict[str, Any] | None:
    """Return the fields of a guard that are no defaults; None where the job has no guard of that name."""
    found = (g.model_dump(mode="json", by_alias=True, exclude_defaults=True) for g in guards if g.name == name)
    return next(found, None)
