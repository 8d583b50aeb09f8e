"""A comparison of runs as one page that needs no other file and no network."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_workers.reporting.curves import COLOURS, noisy, svg
from distill_workers.reporting.metrics_file import Evaluated
from distill_workers.reporting.report import STYLE
from distill_workers.results.comparison import ComparedRun, Section, sections

LINES = ("-", "--", ":", "-.")
"""Line styles of evaluations; colours are those of runs."""


def comparison_page(runs: Sequence[ComparedRun]) -> str:
    """Return the page: the curves of all runs over each other, then the tables."""
    names = html.escape(", ".join(run.name for run in runs))
    tables = "\n".join(map(_table, sections(runs)))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Comparison of {names}</title>
<style>{STYLE}</style></head><body>
<h1>Comparison of {names}</h1>
{svg(draw(runs))}
{tables}
</body></html>
"""


def draw(runs: Sequence[ComparedRun]) -> Figure:
    """Draw six panels: reverse KL, reward, evaluations, length and seconds, each with every run."""
    figure = Figure(figsize=(11, 10), layout="constrained")
    panels: list[tuple[str, Callable[[Axes, ComparedRun, Any], None]]] = [
        (
            "Reverse KL, nats per token",
            lambda ax, r, c: noisy(ax, r.run, lambda s: s.reverse_kl, r.name, c),
        ),
        ("Held-out reverse KL, nats per token", lambda ax, r, c: _held_out(ax, r, c, lambda e: e.reverse_kl)),
        ("Reward of rollouts", lambda ax, r, c: noisy(ax, r.run, lambda s: s.reward, r.name, c)),
        ("Score, with its 95 % interval", lambda ax, r, c: _held_out(ax, r, c, lambda e: e.score, _interval)),
        (
            "Length of responses, tokens",
            lambda ax, r, c: noisy(ax, r.run, lambda s: s.response_tokens_mean, r.name, c),
        ),
        ("Seconds of a step", lambda ax, r, c: noisy(ax, r.run, lambda s: s.seconds, r.name, c)),
    ]
    for ax, (title, panel) in zip(figure.subplots(3, 2).flat, panels, strict=True):
        ax.set_title(title)
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            panel(ax, run, colour)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        if ax.has_data():
            ax.legend(fontsize="small", framealpha=0.85, edgecolor="none")
        else:
            ax.text(0.5, 0.5, "nothing measured", transform=ax.transAxes, ha="center", va="center", color="#888888")
    return figure


def _colours(count: int) -> Sequence[Any]:
    if count <= len(COLOURS):
        return COLOURS[:count]
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _held_out(
    ax: Axes,
    run: ComparedRun,
    colour: Any,
    value: Callable[[Evaluated], float | None],
    interval: Callable[[Evaluated], tuple[float, float] | None] = lambda e: None,
) -> None:
    for number, (name, measured) in enumerate(run.run.evaluations.items()):
        points = [(e.step, y) for e in measured if (y := value(e)) is not None]
        if points:
            style = {"color": colour, "linestyle": LINES[number % len(LINES)], "marker": "o"}
            ax.plot(*zip(*points, strict=True), label=f"{run.name}, {name}", **style)
        for e in measured:
            if (bounds := interval(e)) is not None:
                ax.vlines(e.step, *bounds, color=colour, alpha=0.5)


def _interval(measured: Evaluated) -> tuple[float, float] | None:
    low, high = measured.score_low, measured.score_high
    return None if low is None or high is None else (low, high)


def _table(section: Section) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.head)
    rows = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in section.rows]
    return f"<h2>{html.escape(section.title)}</h2>\n<table><tr>{head}</tr>{''.join(rows)}</table>"
