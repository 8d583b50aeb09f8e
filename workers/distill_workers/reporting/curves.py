"""The curves of a run, drawn."""

import io
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_api.job import DistillationJob
from distill_api.metrics import StepStage
from distill_workers.reporting.metrics_file import Evaluated, Run, Step

COLOURS = ("#3366aa", "#dd7733", "#449955", "#aa4466", "#888888", "#66aacc", "#ccaa33")
SMOOTHING = 0.9
"""Weight of the past in the moving average drawn over noisy curves."""


def draw(run: Run, job: DistillationJob) -> Figure:
    """Draw four panels: divergence, scores, seconds, lengths; a dashed line is where a phase begins."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for ax, panel in zip(axes.flat, (_divergence, _scores, _seconds, _lengths), strict=True):
        panel(ax, run)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        if ax.has_data():
            ax.set_xlim(0, max(1, job.spec.schedule.steps))
            for _, first, _ in run.phases[1:]:
                ax.axvline(first - 1, color="#999999", linestyle="--", linewidth=0.8)
            ax.legend(fontsize="small", framealpha=0.85, edgecolor="none")
        else:
            ax.text(0.5, 0.5, "nothing measured", transform=ax.transAxes, ha="center", va="center", color="#888888")
    return figure


def _divergence(ax: Axes, run: Run) -> None:
    ax.set_title("Reverse KL to the teacher, nats per token")
    noisy(ax, run, lambda s: s.reverse_kl, "rollouts", COLOURS[0])
    _held_out(ax, run, lambda e: e.reverse_kl)
    if ax.has_data():
        ax.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)


def _scores(ax: Axes, run: Run) -> None:
    ax.set_title("Evaluation and reward")
    noisy(ax, run, lambda s: s.reward, "reward of rollouts", COLOURS[0])
    _held_out(ax, run, lambda e: e.score)
    for number, (name, measured) in enumerate(run.evaluations.items(), 1):
        teacher = next((e.teacher_score for e in measured if e.teacher_score is not None), None)
        if teacher is not None:
            ax.axhline(teacher, color=COLOURS[number % len(COLOURS)], linestyle=":", label=f"{name}, teacher")


def _seconds(ax: Axes, run: Run) -> None:
    ax.set_title("Seconds of a step, by stage")
    stages = [stage for stage in StepStage if any(stage in s.stages for s in run.steps)]
    if stages:
        heights = [[s.stages.get(stage, 0.0) for s in run.steps] for stage in stages]
        labels = [stage.value.replace("_", " ") for stage in stages]
        ax.stackplot([s.step for s in run.steps], heights, labels=labels, colors=COLOURS, step="mid")


def _lengths(ax: Axes, run: Run) -> None:
    ax.set_title("Length of responses, tokens")
    noisy(ax, run, lambda s: s.response_tokens_mean, "mean length", COLOURS[0])
    cut = [s for s in run.steps if s.truncated_ratio]
    if cut:
        ax.plot([], [], color=COLOURS[1], label="share cut off (right)")
        right = ax.twinx()
        right.plot([s.step for s in run.steps], [s.truncated_ratio or 0.0 for s in run.steps], color=COLOURS[1])
        right.set_ylim(0, 1)


def noisy(ax: Axes, run: Run, value: Callable[[Step], float | None], label: str, colour: str) -> None:
    """Draw each step faintly, and their moving average."""
    points = [(s.step, y) for s in run.steps if (y := value(s)) is not None]
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    smooth, average, weight = [], 0.0, 0.0
    for y in ys:
        average = SMOOTHING * average + (1 - SMOOTHING) * y
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(average / weight)
    ax.plot(xs, ys, color=colour, alpha=0.3, linewidth=1)
    ax.plot(xs, smooth, color=colour, label=label)


def _held_out(ax: Axes, run: Run, value: Callable[[Evaluated], float | None]) -> None:
    for number, (name, measured) in enumerate(run.evaluations.items(), 1):
        points = [(e.step, y) for e in measured if (y := value(e)) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), "o-", color=COLOURS[number % len(COLOURS)], label=name)


def svg(figure: Figure) -> str:
    """Return the drawing as an <svg> element, equal for equal runs."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "distill", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
