"""Checkpoints of a run: made whole or not at all, the right ones kept, and always one to go on from.

A checkpoint is a folder `step-NNNNNN`. It is written under another name, listed in files.json with the size of every
file, completed by state.json, renamed, and named by `latest`, in this order and each on disk before the next. So a
folder is complete when its state.json and all that files.json lists are there, whatever its name: wherever a process is
killed, the previous checkpoint or the new one can be found.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import Schedule
from distill_workers.run_folder.atomic_file import sync_folder, write_whole

STEP_FORMAT = "step-{:06d}"
LATEST, STATE, FILES = "latest", "state.json", "files.json"
WRITING, REPLACED = ".tmp", ".old"
"""Suffixes of a folder that is being written, and of one whose place a new one is taking."""

log = logging.getLogger(__name__)


class DamagedCheckpoints(ValueError):
    """There were checkpoints, and none of them is complete any more."""


def superfluous(steps: Iterable[int], newest: int, best: int | None, schedule: Schedule) -> set[int]:
    """The steps whose checkpoints go once `newest` is published; those after it are of a curve that was left."""
    past = sorted(step for step in steps if step <= newest)
    kept = set(past[-schedule.keep_last :])
    if schedule.keep_best and best is not None:
        kept.add(best)
    if schedule.keep_every is not None:
        kept |= {step for step in past if step % schedule.keep_every == 0}
    return set(steps) - kept


def best_step(state: dict[str, Any]) -> int | None:
    """The best step by the first evaluation, as a checkpoint's state knows it."""
    evaluations = state.get("progress", {}).get("evaluations", [])
    best: int | None = evaluations[0]["bestStep"] if evaluations else None
    return best


class Checkpoints:
    """The folder `checkpoints` of a run."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def aside(self, step: int) -> Path:
        """An empty folder for the ranks to write into. What earlier saves began and did not end goes: on a volume that
        was full, its room is what this one needs."""
        for left in self._folders():
            if left.suffix == WRITING:
                _remove(left)
        aside = self._root / (STEP_FORMAT.format(step) + WRITING)
        aside.mkdir(parents=True)
        return aside

    def publish(
        self, aside: Path, state: dict[str, Any], schedule: Schedule, check: Callable[[], None] = lambda: None
    ) -> Path:
        """Make what the ranks have written, all of them, the newest checkpoint; then remove those not to be kept.

        `check` raises once the folder is somebody else's: it is called before each step that others would see.
        """
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        write_whole(aside / FILES, json.dumps(sizes))
        write_whole(aside / STATE, json.dumps(state))
        check()
        final = aside.with_suffix("")
        replaced = aside.with_suffix(REPLACED)
        if final.exists():
            _remove(replaced)
            final.rename(replaced)
        aside.rename(final)
        sync_folder(self._root)
        check()
        self.name(final)
        check()
        self._remove_superfluous(_step(final), best_step(state), schedule)
        return final

    def named(self) -> Path | None:
        """The checkpoint that `latest` names, which was complete when that was written; None before the first."""
        mark = self._root / LATEST
        return self._root / mark.read_text(encoding="utf-8").strip() if mark.exists() else None

    def name(self, checkpoint: Path) -> None:
        """Make `latest` name a checkpoint."""
        write_whole(self._root / LATEST, checkpoint.name)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, and its state: the one that `latest` names, or else the newest complete one.

        None when the run has none yet. Raises DamagedCheckpoints when it had one, and none is complete.
        """
        mark = self._root / LATEST
        named = self.named()
        if named is not None and named.parent == self._root and _fault(named) is None:
            return named, _state(named)
        found = [path for path in self._folders() if _fault(path) is None]
        if not found:
            if named is None:
                return None
            raise DamagedCheckpoints(
                f"{mark} names {named.name}, which {_fault(named)}, and no other checkpoint there is complete: "
                f"bring it back, or remove {self._root} to begin anew"
            )
        newest = max(found, key=lambda path: (_step(path), path.suffix == "", path.suffix == WRITING))
        reason = f"{named.name}, which {_fault(named)}" if named is not None else "none"
        log.warning("%s names %s: going on from %s, the newest that is complete", mark, reason, newest.name)
        if newest.suffix:
            # The process that was about to rename it was killed.
            _remove(newest.with_suffix(""))
            newest = newest.rename(newest.with_suffix(""))
        self.name(newest)
        return newest, _state(newest)

    def complete(self) -> dict[int, Path]:
        """Every complete checkpoint by its step, oldest first. Changes nothing: the run may be under way."""
        found = {_step(path): path for path in self._folders() if not path.suffix and _fault(path) is None}
        return dict(sorted(found.items()))

    def steps(self) -> set[int]:
        """The steps of all checkpoints, complete or not, and of one that is being written."""
        return {_step(path) for path in self._folders()}

    def best(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint of the best step that the newest one knows of, and its state; None if it was not kept."""
        newest = self.latest()
        step = best_step(newest[1]) if newest is not None else None
        if step is None:
            return None
        folder = self._root / STEP_FORMAT.format(step)
        return (folder, _state(folder)) if _fault(folder) is None else None

    def roll_back(self, folder: Path, state: dict[str, Any]) -> None:
        """Makes an earlier checkpoint the newest, with another state; later ones go."""
        write_whole(folder / STATE, json.dumps(state))
        self.name(folder)
        for path in self._folders():
            if _step(path) > _step(folder):
                _remove(path)

    def _remove_superfluous(self, newest: int, best: int | None, schedule: Schedule) -> None:
        folders = self._folders()
        gone = superfluous({_step(path) for path in folders}, newest, best, schedule)
        for path in folders:
            if path.suffix or _step(path) in gone:
                _remove(path)

    def _folders(self) -> list[Path]:
        return [path for path in self._root.glob("step-*") if path.suffix in ("", WRITING, REPLACED)]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").split(".")[0])


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _fault(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, as the end of a sentence; None if it is one."""
    if not folder.is_dir():
        return "is not there"
    try:
        _state(folder)
        sizes = json.loads((folder / FILES).read_text(encoding="utf-8"))
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"is torn ({name} has {found} of {size} bytes)"
    except OSError as error:
        return f"is incomplete, or of an earlier version ({Path(error.filename).name}: {error.strerror})"
    except ValueError as error:
        return f"is damaged ({error})"
    return None


def _remove(folder: Path) -> None:
    # First what makes it complete: a removal that is cut short must not leave something to go on from.
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
