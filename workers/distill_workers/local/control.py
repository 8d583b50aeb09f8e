"""`distill run --control`: the control of a job, and what the two runs say beside each other."""

import copy
from pathlib import Path
from typing import Any

from distill_api.names import MAX_JOB_NAME
from distill_api.teacher.control import Control
from distill_workers.failures import ConfigurationError
from distill_workers.results.comparison import read_runs
from distill_workers.results.comparison_page import comparison_page
from distill_workers.results.control import NO_VERDICT, verdicts
from distill_workers.run_folder.atomic_file import write_whole

SUFFIX = "-control"
PAGE = "control.html"


def control_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a job's control: another name, and so a run folder beside it, and objective.control.

    Its model is not published: it would go where the job's goes. Raises ConfigurationError.
    """
    found = copy.deepcopy(manifest)
    name, spec = f"{found['metadata']['name']}{SUFFIX}", found["spec"]
    if len(name) > MAX_JOB_NAME:
        raise ConfigurationError(
            f"metadata.name: the control would be {name}, and a name has at most {MAX_JOB_NAME} characters; choose one "
            f"of at most {MAX_JOB_NAME - len(SUFFIX)}"
        )
    objective = spec.get("objective") or {}
    if objective.get("control", Control.NONE) != Control.NONE:
        raise ConfigurationError(
            f"spec.objective.control: is {objective['control']}, so that the job is a control itself; leave the field "
            "out, or --control"
        )
    found["metadata"]["name"] = name
    spec["objective"] = {**objective, "control": Control.FIXED_ADVANTAGE.value}
    spec.get("output", {}).pop("publish", None)
    return found


def compare_with_control(folder: Path, control: Path) -> list[str]:
    """Write control.html into the folder of a run, both curves over each other; return a sentence for each
    evaluation."""
    runs = read_runs([folder, control])
    write_whole(folder / PAGE, comparison_page(runs))
    return [verdict.sentence for verdict in verdicts(runs)] or [NO_VERDICT]
