"""The curve of a run: curve.png, and report.html that carries it with the numbers and the configuration.

Reads metrics.jsonl, so it can be drawn again at any time, also of a run that is under way or has failed.
"""

import base64
import html
import io
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from distill_api.job import DistillationJob
from distill_api.metrics import Stage
from distill_workers.runfolder import write_whole

Line = dict[str, Any]
PACKAGES = ("torch", "megatron-core", "sglang", "ray", "transformers")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
"""


def read_lines(folder: Path) -> tuple[list[Line], list[Line]]:
    """The steps and the evaluations of a run; a last line that a kill cut short is left out."""
    steps: list[Line] = []
    evaluations: list[Line] = []
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        (steps if line["kind"] == "step" else evaluations).append(line)
    return steps, evaluations


def write_report(folder: Path, job: DistillationJob) -> None:
    """Writes curve.png and report.html into the run folder."""
    steps, evaluations = read_lines(folder)
    image = draw(steps, evaluations)
    aside = folder / "curve.png.tmp"
    aside.write_bytes(image)
    aside.replace(folder / "curve.png")
    write_whole(folder / "report.html", page(job, steps, evaluations, image))


def draw(steps: list[Line], evaluations: list[Line]) -> bytes:
    """Four plots over the steps, as PNG: reverse KL, score, lengths, seconds by stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((kl, score), (length, time)) = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    x = [s["step"] for s in steps]
    names = list(dict.fromkeys(e["name"] for e in evaluations))
    kl.plot(x, [s["reverse_kl"] for s in steps], label="training samples", color="#9ab", linewidth=1)
    for name in names:
        of_name = [e for e in evaluations if e["name"] == name]
        kl.plot(*_points(of_name, "reverse_kl"), marker="o", label=name)
        score.plot(*_points(of_name, "score"), marker="o", label=name)
        if teacher := next((e["teacher_score"] for e in of_name if e.get("teacher_score") is not None), None):
            score.axhline(teacher, linestyle="--", color="#888", linewidth=1, label=f"teacher on {name}")
    score.plot(*_points(steps, "reward"), label="training reward", color="#9ab", linewidth=1)
    length.plot(x, [s["response_tokens"] / s["samples"] for s in steps], color="#567")
    time.stackplot(x, *[[s["stages"].get(stage, 0.0) for s in steps] for stage in Stage], labels=list(Stage))
    for axes, title in (
        (kl, "reverse KL, nats per token"),
        (score, "score"),
        (length, "response length, tokens"),
        (time, "seconds of a step, by stage"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes is not length:
            axes.legend(fontsize=8)
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=110)
    pyplot.close(figure)
    return found.getvalue()


def page(job: DistillationJob, steps: list[Line], evaluations: list[Line], image: bytes) -> str:
    """One file without links to the outside."""
    spec = job.model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]
    title = html.escape(f"Distillation of {job.spec.student.model} by {job.spec.teacher.model}")
    seconds = sum(s["seconds"] for s in steps)
    tokens = sum(s["response_tokens"] for s in steps)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(job.metadata.name)}</h1>
<p>{title}: {len(steps)} steps, {tokens:,} response tokens, {seconds:,.0f} s of steps.</p>
<img alt="curves" src="data:image/png;base64,{base64.b64encode(image).decode()}">
<h2>Evaluation</h2>
{_table(["evaluation", "step", "score", "reverse KL", "teacher's score"], [_row(e) for e in evaluations])}
<h2>Where the time went</h2>
{_table(["stage", "seconds", "share"], _stage_rows(steps))}
<h2>Configuration</h2>
<pre>{html.escape(yaml.safe_dump(spec, sort_keys=False))}</pre>
<h2>Versions</h2>
{_table(["package", "version"], [[name, _version(name)] for name in PACKAGES])}
</body></html>
"""


def _points(lines: list[Line], key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _row(evaluation: Line) -> list[str]:
    values = (evaluation.get(key) for key in ("score", "reverse_kl", "teacher_score"))
    return [evaluation["name"], str(evaluation["step"]), *("" if v is None else f"{v:.4f}" for v in values)]


def _stage_rows(steps: list[Line]) -> list[list[str]]:
    sums = {stage.value: sum(s["stages"].get(stage, 0.0) for s in steps) for stage in Stage}
    whole = sum(sums.values()) or 1.0
    return [[name, f"{value:.1f}", f"{value / whole:.0%}"] for name, value in sums.items() if value]


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(tag: str, values: list[str]) -> str:
        return "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
