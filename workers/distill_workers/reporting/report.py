"""The story of a run on one page: curve.png, and report.html that needs no other file and no network.

Drawn from metrics.jsonl and samples.jsonl alone, so that a report can be made of a run that is still going, has failed,
or was resumed.
"""

import html
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_api.job import DistillationJob
from distill_api.metrics import StepStage
from distill_workers.reporting.rollout_page import ROLLOUT_STYLE, Rollout, read_rollouts, rollouts_html
from distill_workers.run_folder.run_folder import versions, write_whole

COLOURS = ("#3366aa", "#dd7733", "#449955", "#aa4466", "#888888", "#66aacc")
SMOOTHING = 0.9
"""Weight of the past in the moving average drawn over noisy curves."""


@dataclass(frozen=True)
class Step:
    """A line of kind step; times in seconds, divergences in nats per token."""

    step: int
    reverse_kl: float | None
    reward: float | None
    response_tokens_mean: float | None
    truncated_ratio: float | None
    stages: dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """A line of kind evaluation."""

    name: str
    step: int
    score: float | None
    reverse_kl: float | None
    teacher_score: float | None


@dataclass(frozen=True)
class Guarded:
    """A line of kind guard: decided after `at_step`; the run went on from `step`."""

    guard: str
    action: str
    at_step: int
    step: int
    message: str


@dataclass
class Run:
    """What metrics.jsonl tells."""

    steps: list[Step] = field(default_factory=list)
    evaluations: dict[str, list[Evaluated]] = field(default_factory=dict)
    guarded: list[Guarded] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """A missing file is an empty run; a last line that a kill cut short is left out."""
    run = Run()
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["kind"] == "step":
            run.steps.append(_step(line))
        elif line["kind"] == "evaluation":
            keys = ("name", "step", "score", "reverse_kl", "teacher_score")
            run.evaluations.setdefault(line["name"], []).append(Evaluated(**{key: line.get(key) for key in keys}))
        elif line["kind"] == "guard":
            run.guarded.append(Guarded(**{name: line[name] for name in Guarded.__dataclass_fields__}))
    return run


def _step(line: dict[str, Any]) -> Step:
    tokens, samples = line.get("response_tokens"), line.get("samples")
    return Step(
        step=line["step"],
        reverse_kl=line.get("reverse_kl"),
        reward=line.get("reward"),
        response_tokens_mean=tokens / samples if tokens is not None and samples else None,
        truncated_ratio=line.get("truncated_ratio"),
        stages=line.get("stages", {}),
    )


def write_report(run_folder: Path, job: DistillationJob) -> None:
    """Writes curve.png and report.html into the run folder."""
    run = read_run(run_folder / "metrics.jsonl")
    figure = draw(run, job)
    aside = run_folder / "curve.png.tmp"
    figure.savefig(aside, format="png", dpi=120)
    aside.replace(run_folder / "curve.png")
    made = page(run, read_rollouts(run_folder), job, svg(figure), versions_of(run_folder))
    write_whole(run_folder / "report.html", made)


def draw(run: Run, job: DistillationJob) -> Figure:
    """Four panels: divergence, scores, seconds, lengths."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for ax, panel in zip(axes.flat, (_divergence, _scores, _seconds, _lengths), strict=True):
        panel(ax, run)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        if ax.has_data():
            ax.set_xlim(0, max(1, job.spec.schedule.steps))
            ax.legend(fontsize="small", framealpha=0.85, edgecolor="none")
        else:
            ax.text(0.5, 0.5, "nothing measured", transform=ax.transAxes, ha="center", va="center", color="#888888")
    return figure


def _divergence(ax: Axes, run: Run) -> None:
    ax.set_title("Reverse KL to the teacher, nats per token")
    _noisy(ax, run, lambda s: s.reverse_kl, "rollouts", COLOURS[0])
    _held_out(ax, run, lambda e: e.reverse_kl)
    if ax.has_data():
        ax.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)


def _scores(ax: Axes, run: Run) -> None:
    ax.set_title("Evaluation and reward")
    _noisy(ax, run, lambda s: s.reward, "reward of rollouts", COLOURS[0])
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
    _noisy(ax, run, lambda s: s.response_tokens_mean, "mean length", COLOURS[0])
    cut = [s for s in run.steps if s.truncated_ratio]
    if cut:
        ax.plot([], [], color=COLOURS[1], label="share cut off (right)")
        right = ax.twinx()
        right.plot([s.step for s in run.steps], [s.truncated_ratio or 0.0 for s in run.steps], color=COLOURS[1])
        right.set_ylim(0, 1)


def _noisy(ax: Axes, run: Run, value: Callable[[Step], float | None], label: str, colour: str) -> None:
    """Each step faintly, and their moving average."""
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
    """The drawing as an <svg> element, equal for equal runs."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "distill", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
"""


def page(run: Run, rollouts: list[Rollout], job: DistillationJob, drawing: str, built_with: dict[str, str]) -> str:
    name, spec = html.escape(job.metadata.name), job.spec
    done = run.steps[-1].step if run.steps else 0
    teachers = ", ".join(t.title for t in spec.all_teachers)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Distillation {name}</title>
<style>{STYLE}{ROLLOUT_STYLE}</style></head><body>
<h1>Distillation {name}</h1>
<p>Teacher <b>{html.escape(teachers)}</b>, student <b>{html.escape(spec.student.model)}</b>:
{done} of {spec.schedule.steps} steps.</p>
{_evaluation_table(run)}
{_guard_table(run)}
{drawing}
{rollouts_html(rollouts)}
<h2>Configuration</h2>
<pre>{html.escape(_configuration(job))}</pre>
<h2>Versions</h2>
<p>{html.escape(", ".join(f"{package} {number}" for package, number in built_with.items()))}</p>
</body></html>
"""


def _evaluation_table(run: Run) -> str:
    """Before and after, for each evaluation."""
    if not run.evaluations:
        return ""
    titles = ("evaluation", "steps", "score", "", "teacher's score", "reverse KL", "")
    rows = [f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"]
    for name, measured in run.evaluations.items():
        first, last = measured[0], measured[-1]
        teacher = next((e.teacher_score for e in measured if e.teacher_score is not None), None)
        cells = (
            html.escape(name),
            f"{first.step} → {last.step}",
            f"{_number(first.score)} → {_number(last.score)}",
            _change(first.score, last.score),
            _number(teacher),
            f"{_number(first.reverse_kl)} → {_number(last.reverse_kl)}",
            _change(first.reverse_kl, last.reverse_kl),
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _guard_table(run: Run) -> str:
    """What guards decided, in order."""
    if not run.guarded:
        return ""
    rows = ["<tr><th>guard</th><th>after step</th><th>action</th><th>goes on from</th><th>why</th></tr>"]
    for g in run.guarded:
        cells = (g.guard, str(g.at_step), g.action, str(g.step), g.message)
        rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<h2>Guards</h2><table>{''.join(rows)}</table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _change(first: float | None, last: float | None) -> str:
    return "" if first is None or last is None else f"{last - first:+.3f}"


def _configuration(job: DistillationJob) -> str:
    """What differs from the defaults, as the user would write it."""
    manifest = job.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)


def versions_of(run_folder: Path) -> dict[str, str]:
    """What the run was last begun with; of a folder without a run, what is installed here."""
    mark = run_folder / "run.json"
    recorded: dict[str, str] = json.loads(mark.read_text(encoding="utf-8")).get("versions", {}) if mark.exists() else {}
    return recorded or versions()
