"""Which folder of a run holds the model that is asked for: the exported one, or a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path

from distill_workers.failures import ConfigurationError
from distill_workers.run_folder.checkpoints import STATE, Checkpoints, best_step


@dataclass(frozen=True)
class Source:
    """What is exported: the folder of a model or of a checkpoint."""

    folder: Path
    step: int | None
    """Of a checkpoint; None for the model that the run has exported itself."""


def chosen(folder: Path, *, step: int | None, best: bool) -> Source:
    """The checkpoint that is named, else the exported model, else the newest checkpoint."""
    if step is None and not best and (folder / "model" / "config.json").is_file():
        return Source(folder / "model", None)
    there = Checkpoints(folder / "checkpoints").complete()
    if not there:
        raise ConfigurationError(f"{folder} has no model and no complete checkpoint yet: wait for the first")
    listed = ", ".join(map(str, there))
    if best:
        state = json.loads((there[max(there)] / STATE).read_text(encoding="utf-8"))
        step = best_step(state)
        if step not in there:
            raise ConfigurationError(
                f"{folder} keeps no best checkpoint (spec.schedule.keepBest, and an evaluation to tell it by): "
                f"--step names one of {listed}"
            )
    wanted = max(there) if step is None else step
    if wanted not in there:
        raise ConfigurationError(f"{folder} has no complete checkpoint of step {wanted}: there are those of {listed}")
    return Source(there[wanted], wanted)
