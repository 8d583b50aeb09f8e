"""The story of a run on one page: curve.png, and report.html that needs no other file and no network.

Drawn from metrics.jsonl and samples.jsonl alone, so that a report can be made of a run that is still going, has failed,
or was resumed.
"""

import html
from pathlib import Path

import yaml

from distill_api.job import DistillationJob
from distill_workers.reporting.curves import draw, svg
from distill_workers.reporting.metrics_file import Run, read_run
from distill_workers.reporting.samples_file import Rollout, read_rollouts
from distill_workers.reporting.samples_page import ROLLOUT_STYLE, rollouts_html
from distill_workers.run_folder.run_folder import versions_of, write_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
"""


def write_report(run_folder: Path, job: DistillationJob, into: Path | None = None) -> None:
    """Writes curve.png and report.html into a folder, by default the run folder."""
    into = into or run_folder
    run = read_run(run_folder / "metrics.jsonl")
    figure = draw(run, job)
    aside = into / "curve.png.tmp"
    figure.savefig(aside, format="png", dpi=120)
    aside.replace(into / "curve.png")
    made = page(run, read_rollouts(run_folder), job, svg(figure), versions_of(run_folder))
    write_whole(into / "report.html", made)


def page(run: Run, rollouts: list[Rollout], job: DistillationJob, drawing: str, built_with: dict[str, str]) -> str:
    """Return the page; `drawing` is an <svg> element, `built_with` the versions of packages."""
    name, spec = html.escape(job.metadata.name), job.spec
    done = run.steps[-1].step if run.steps else 0
    teachers = ", ".join(t.title for t in spec.routed_teachers)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Distillation {name}</title>
<style>{STYLE}{ROLLOUT_STYLE}</style></head><body>
<h1>Distillation {name}</h1>
<p>Teacher <b>{html.escape(teachers)}</b>, student <b>{html.escape(spec.student.model)}</b>:
{done} of {spec.schedule.steps} steps.</p>
{_evaluation_table(run)}
{_phase_table(run)}
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
    """Return a table of before and after, for each evaluation."""
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


def _phase_table(run: Run) -> str:
    """Return a table of the phases and their steps, in order."""
    if not run.phases:
        return ""
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{a} – {b}</td></tr>" for name, a, b in run.phases)
    return f"<h2>Phases</h2><table><tr><th>phase</th><th>steps</th></tr>{rows}</table>"


def _guard_table(run: Run) -> str:
    """Return a table of what guards decided, in order."""
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
    """Return what differs from the defaults, as the user would write it."""
    manifest = job.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)
