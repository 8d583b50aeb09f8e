"""The curves of several runs on a terminal, on one scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distill_cli.views.progress import CURVE_CELLS, blocks, cell_means

if TYPE_CHECKING:
    from distill_workers.reporting.metrics_file import Step
    from distill_workers.results.comparison import ComparedRun


def curve_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """Return the cells of a table with the curves of reverse KL and of the reward, a row for each run; its head first.

    All runs have one scale: a step is as wide, and a value as high, in each row.
    """
    rows: list[tuple[str, ...]] = [("curve", "run", "", "lowest", "highest")]
    curves: list[tuple[str, Callable[[Step], float | None]]] = [
        ("reverse KL", lambda step: step.reverse_kl),
        ("reward", lambda step: step.reward),
    ]
    longest = max((len(run.run.steps) for run in runs), default=0)
    for name, value in curves:
        drawn: list[tuple[str, list[float]]] = []
        for run in runs:
            values = [y for step in run.run.steps if (y := value(step)) is not None]
            if values:
                drawn.append((run.name, cell_means(values, max(1, round(CURVE_CELLS * len(values) / longest)))))
        found = [mean for _, means in drawn for mean in means]
        for run_name, means in drawn:
            curve = blocks(means, min(found), max(found))
            rows.append((name, run_name, curve, f"{min(means):.4g}", f"{max(means):.4g}"))
    return rows
