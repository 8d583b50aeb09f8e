"""Runs laid over each other: what each reached, what it took, and what was different about it."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.job import DistillationJob, InvalidManifest, parse_job
from distill_api.metrics import StepStage
from distill_workers.failures import ConfigurationError
from distill_workers.reporting.cost import accelerators
from distill_workers.reporting.metrics_file import Evaluated, Run, read_run
from distill_workers.results import control
from distill_workers.results.public_job import secretive

LAST_STEPS = 10
"""Steps whose mean stands for the end of a curve."""
ABSENT = "–"


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs, as its folder tells."""

    name: str
    """Of its job; its folder where two jobs have one name."""
    job: DistillationJob
    run: Run
    versions: dict[str, str]

    @property
    def seconds(self) -> float:
        """Of all steps: what was spent before the first one, or between two attempts, is no step's."""
        return sum(step.seconds or 0.0 for step in self.run.steps)

    @property
    def accelerators(self) -> int:
        """Held by all roles, with as many engines as the spec has; without accelerators, processes."""
        return sum(accelerators(self.job.spec, self.job.spec.rollout.replicas).values())

    @property
    def accelerator_hours(self) -> float:
        return self.accelerators * self.seconds / 3600

    @property
    def response_tokens(self) -> int:
        return sum(step.response_tokens or 0 for step in self.run.steps)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of all steps by stage, in the order of StepStage."""
        found = {stage.value: sum(s.stages.get(stage.value, 0.0) for s in self.run.steps) for stage in StepStage}
        return {stage: seconds for stage, seconds in found.items() if seconds}


@dataclass(frozen=True)
class Section:
    """A table: a title, the cells of its head, and rows of as many cells."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Return the runs of run folders. Raises ConfigurationError for one whose run.json cannot be read."""
    found = [(folder, *_read(folder)) for folder in folders]
    names = [job.metadata.name for _, job, _ in found]
    return [
        ComparedRun(name if names.count(name) == 1 else str(folder), job, read_run(folder / "metrics.jsonl"), versions)
        for name, (folder, job, versions) in zip(names, found, strict=True)
    ]


def _read(folder: Path) -> tuple[DistillationJob, dict[str, str]]:
    try:
        mark = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return parse_job(mark["job"]), mark.get("versions", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error) if isinstance(error, OSError | InvalidManifest) else "it is damaged"
        raise ConfigurationError(
            f"{folder / 'run.json'} cannot be read as the job of a run by this release ({why}); leave the folder out"
        ) from None


def sections(runs: Sequence[ComparedRun]) -> list[Section]:
    """Return the tables of a comparison; one that would have no row is left out."""
    names = tuple(run.name for run in runs)
    found = [
        Section("Runs", ("", *names), _summary(runs)),
        Section("With its teacher and with the control", control.HEAD, control.verdict_rows(runs)),
        Section("Evaluations, first → last with the 95 % interval", ("evaluation", *names), _evaluations(runs)),
        Section("Seconds of a step by stage", ("stage", *names), _stages(runs)),
        Section("What differs", ("field", *names), differences(runs)),
    ]
    return [section for section in found if section.rows]


def differences(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """Return rows of field and value of each run, for every field of the spec and every version that is not equal in
    all. Of pods, arguments of servers and what follows the path of a URL it is said that they differ, and not how."""
    specs = [flat(secretive(run.job.spec.model_dump(mode="json", by_alias=True))) for run in runs]
    known = [
        {f"spec.{path}": value for path, value in spec.items()}
        | {f"version of {package}": number for package, number in run.versions.items()}
        for run, spec in zip(runs, specs, strict=True)
    ]
    paths = list(dict.fromkeys(path for one in known for path in one))
    rows = [(path, *(one.get(path, ABSENT) for one in known)) for path in paths]
    return [row for row in rows if len(set(row[1:])) > 1]


def flat(value: Any, path: str = "") -> dict[str, str]:
    """Return everything in a tree by its path, as text; items of a list that have a name stand under it."""
    if isinstance(value, dict) and value:
        items = [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, dict) and item.get("name") for item in value):
        items = [(f"{path}[{item['name']}]", item) for item in value]
    elif value is None or value in ([], {}):
        return {}
    else:
        return {path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    return {name: text for where, item in items for name, text in flat(item, where).items()}


def as_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return the comparison for programs: numbers as they are, seconds, nats per token."""
    return {
        "runs": [
            {
                "name": run.name,
                "steps": len(run.run.steps),
                "plannedSteps": run.job.spec.schedule.steps,
                "seconds": run.seconds,
                "stageSeconds": run.stages,
                "responseTokens": run.response_tokens,
                "accelerators": run.accelerators,
                "acceleratorHours": run.accelerator_hours,
                "evaluations": {name: _as_json(found[-1]) for name, found in run.run.evaluations.items()},
            }
            for run in runs
        ],
        "controls": control.as_json(runs),
        "differences": {
            path: dict(zip([run.name for run in runs], values, strict=True)) for path, *values in differences(runs)
        },
    }


def _as_json(one: Evaluated) -> dict[str, Any]:
    passes = {str(k): {"value": e.value, "low": e.low, "high": e.high} for k, e in one.pass_at.items()}
    score = {"score": one.score, "scoreLow": one.score_low, "scoreHigh": one.score_high}
    return {"step": one.step, **score, "passAt": passes, "reverseKL": one.reverse_kl}


def _summary(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    rows = {
        "steps": [f"{len(r.run.steps)} of {r.job.spec.schedule.steps}" for r in runs],
        "hours of all steps": [f"{r.seconds / 3600:.4g}" for r in runs],
        "seconds of a step, median": [
            _number(statistics.median(s.seconds or 0.0 for s in r.run.steps) if r.run.steps else None) for r in runs
        ],
        "response tokens": [f"{r.response_tokens:,}" for r in runs],
        "accelerators": [str(r.accelerators) if not r.job.spec.on_cpu else f"{r.accelerators} processes" for r in runs],
        "accelerator hours": [f"{r.accelerator_hours:.4g}{' of processes' if r.job.spec.on_cpu else ''}" for r in runs],
        f"reverse KL, last {LAST_STEPS} steps": [_end([s.reverse_kl for s in r.run.steps]) for r in runs],
        f"reward, last {LAST_STEPS} steps": [_end([s.reward for s in r.run.steps]) for r in runs],
    }
    return [(name, *cells) for name, cells in rows.items()]


def _evaluations(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    found: dict[str, dict[int, str]] = {}
    for number, run in enumerate(runs):
        for name, measured in run.run.evaluations.items():
            for measure, cell in _cells(measured[0], measured[-1]).items():
                found.setdefault(f"{name}, {measure}", {})[number] = cell
    return [(name, *(cells.get(number, ABSENT) for number in range(len(runs)))) for name, cells in found.items()]


def _cells(first: Evaluated, last: Evaluated) -> dict[str, str]:
    """Return what was measured of a run, by measure."""
    found = {"step": f"{first.step} → {last.step}"}
    if last.score is not None:
        found["score"] = _change(first.score, last.score, last.score_low, last.score_high)
    for k, estimate in last.pass_at.items():
        begun = first.pass_at[k].value if k in first.pass_at else None
        found[f"pass@{k}"] = _change(begun, estimate.value, estimate.low, estimate.high)
    if last.reverse_kl is not None:
        found["reverse KL"] = _change(first.reverse_kl, last.reverse_kl)
    return found


def _change(first: float | None, last: float, low: float | None = None, high: float | None = None) -> str:
    interval = "" if low is None or high is None else f" ({_number(low)} to {_number(high)})"
    return f"{_number(first)} → {_number(last)}{interval}"


def _stages(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    rows = []
    for stage in StepStage:
        if any(stage.value in run.stages for run in runs):
            rows.append((stage.value.replace("_", " "), *(_stage(run, stage) for run in runs)))
    return rows


def _stage(run: ComparedRun, stage: StepStage) -> str:
    """Return the mean seconds of a step, and their share of all stages."""
    seconds = run.stages.get(stage.value)
    if seconds is None:
        return ABSENT
    return f"{seconds / len(run.run.steps):.3g} ({seconds / sum(run.stages.values()):.0%})"


def _end(values: Sequence[float | None]) -> str:
    known = [value for value in values[-LAST_STEPS:] if value is not None]
    return _number(statistics.fmean(known) if known else None)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"
