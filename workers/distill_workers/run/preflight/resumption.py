"""Whether a checkpoint is of one moment: its step, its prompts and its optimiser go together.

Prompts that begin anew after a restart are trained on twice as often as those that never come, and an optimiser that
begins anew takes its first steps at full length: neither ends a run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_workers.megatron.checkpoint.tensor_file import TensorFile
from distill_workers.run.preflight.check import Check

CURSOR_CONTINUES = Check(
    "CursorContinues",
    promise="A checkpoint of step n has used up the prompts of n steps.",
    cost="none",
)
OPTIMIZER_CONTINUES = Check(
    "OptimizerContinues",
    promise="A checkpoint of step n has an optimiser that has done n steps.",
    cost="the headers of a checkpoint's files",
)


def optimizer_continues(step: int, checkpoint: Path) -> None:
    """Raise PreflightFailed where the steps of a checkpoint's optimiser are not those of the run, by which its learning
    rate goes on."""
    files, steps = sorted(checkpoint.glob("rank-*.safetensors")), set[int]()
    for path in files:  # of several replicas one may have them all
        with TensorFile(path) as file:
            steps |= {int(n) for n in json.loads(file.metadata["steps"]).values()}
            steps |= {int(file.metadata["group_step"])} - {0}
    if steps - {step} or (files and step and not steps):
        done = ", ".join(map(str, sorted(steps))) or "none"
        raise OPTIMIZER_CONTINUES.failure(
            f"{checkpoint} is of step {step}, and the optimiser in it has done {done}; moments, warm-up and learning "
            "rate would not go on where they were: go on from an earlier checkpoint, or start in a new output folder"
        )


def cursor_continues(spec: Spec, step: int, cursor: Mapping[str, Any]) -> None:
    """Raise PreflightFailed for a checkpoint whose cursor stands before the prompts of its next step.

    It may stand behind them: a run that was sent back to an earlier step goes on with the prompts that come next.
    """
    states = cursor["sources"].values() if "sources" in cursor else [cursor]
    used = sum(state["epoch"] * state["prompts"] + state["position"] for state in states)
    needed = step * spec.rollout.prompts_per_step
    if used < needed:
        raise CURSOR_CONTINUES.failure(
            f"the checkpoint is of step {step}, which has used up {needed} prompts (promptsPerStep "
            f"{spec.rollout.prompts_per_step}), and its cursor stands behind {used}, so prompts would come again; go "
            "on from an earlier checkpoint, or start in a new output folder"
        )
