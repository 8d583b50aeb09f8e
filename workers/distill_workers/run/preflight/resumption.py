"""Whether a checkpoint is of one moment: its step, its prompts and its optimiser go together.

Prompts that begin anew after a restart are trained on twice as often as those that never come, and an optimiser that
begins anew takes its first steps at full length: neither ends a run.
"""

from collections.abc import Mapping
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_workers.run.preflight.check import Check

CURSOR_CONTINUES = Check(
    "CursorContinues",
    promise="A checkpoint of step n has used up the prompts of n steps.",
    cost="none",
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
