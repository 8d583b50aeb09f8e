"""What is known of a job at one moment, whether a cluster or a run folder says it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill_api.protocol import ExitCode, ExitReason, ExitReport, Phase, ProgressReport
from distill_api.status import ConditionStatus, ConditionType, Progress, Reason, Status
from distill_cli.failure import FAILED, CommandFailed

Json = dict[str, Any]
TAIL_BYTES = 2**20
"""Of metrics.jsonl that are read for the curves: some hundred steps."""
EVENTS = 4
"""That are shown, newest last."""
HOPELESS = {Reason.CONFIGURATION_ERROR, Reason.PREFLIGHT_FAILED, Reason.INVALID_SPEC}
"""Ends of a job that trying again does not change."""


@dataclass(frozen=True)
class RoleState:
    """Pods of a role; `reason` says why not all are ready."""

    name: str
    ready: int
    desired: int
    reason: str


@dataclass(frozen=True)
class Happening:
    """An Event of the job."""

    time: str
    warning: bool
    reason: str
    message: str


@dataclass(frozen=True)
class End:
    """How a job ended: the exit code of `watch`, and a sentence."""

    code: int
    sentence: str


@dataclass(frozen=True)
class Curves:
    """Values of the steps so far, oldest first: nats per token, and mean reward."""

    reverse_kl: tuple[float, ...] = ()
    reward: tuple[float, ...] = ()


@dataclass(frozen=True)
class Moment:
    """All that `watch` shows."""

    state: str
    progress: Progress
    curves: Curves = Curves()
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    roles: tuple[RoleState, ...] = ()
    happenings: tuple[Happening, ...] = ()
    end: End | None = None


@dataclass(frozen=True)
class JobState:
    """A DistillationJob as `list` shows it."""

    namespace: str
    name: str
    state: str
    message: str
    age_seconds: float
    suspended: bool
    restarts: int
    progress: Progress
    roles: tuple[RoleState, ...]
    model_path: str | None
    end: End | None


def job_state(job: Json, now: datetime) -> JobState:
    """Of the object as the API server has it. Fields that another version added are passed over."""
    meta = job["metadata"]
    status = Status.model_validate(job.get("status") or {}, extra="ignore")
    summary = next((c for c in status.conditions if c.type == ConditionType.SUCCEEDED), None)
    state, message = (summary.reason, summary.message) if summary else ("New", "the operator has not seen it yet")
    return JobState(
        namespace=meta["namespace"],
        name=meta["name"],
        state="Deleting" if meta.get("deletionTimestamp") else state,
        message=message,
        age_seconds=(now - datetime.fromisoformat(meta["creationTimestamp"])).total_seconds(),
        suspended=bool(job["spec"].get("suspend")),
        restarts=status.restarts,
        progress=status.progress or Progress(total_steps=job["spec"].get("schedule", {}).get("steps", 0)),
        roles=tuple(RoleState(r.name, r.ready, r.desired, r.reason) for r in status.roles),
        model_path=status.result.model_path if status.result else None,
        end=_job_end(meta["name"], status) if summary else None,
    )


def _job_end(name: str, status: Status) -> End | None:
    summary = next(c for c in status.conditions if c.type == ConditionType.SUCCEEDED)
    if summary.status is ConditionStatus.UNKNOWN:
        return None
    if summary.status is ConditionStatus.TRUE:
        model = f": model {status.result.model_path}" if status.result else ""
        return End(ExitCode.DONE, f"job {name} is complete{model}")
    code = ExitCode.CONFIGURATION if summary.reason in HOPELESS else FAILED
    return End(code, f"job {name} failed, {summary.reason}: {summary.message or 'see its events'}")


def happenings(events: Iterable[Json]) -> tuple[Happening, ...]:
    """The newest EVENTS of core/v1 Events."""
    found = [
        Happening(
            time=event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"],
            warning=event.get("type") == "Warning",
            reason=event.get("reason", ""),
            message=" ".join(event.get("message", "").split()),
        )
        for event in events
    ]
    return tuple(sorted(found, key=lambda h: h.time)[-EVENTS:])


def mean_stages(metrics: str) -> dict[str, float]:
    """Mean seconds by stage, from the text of the trainer's /metrics."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for line in metrics.splitlines():
        for suffix, into in (("sum", sums), ("count", counts)):
            if line.startswith(f'distill_step_duration_seconds_{suffix}{{stage="'):
                stage, _, value = line.partition('stage="')[2].partition('"} ')
                into[stage] = float(value)
    return {stage: total / counts[stage] for stage, total in sums.items() if counts.get(stage)}


def extended(curves: Curves, before: Progress | None, now: Progress) -> Curves:
    """The curves with the values of a step that is new."""
    if before is not None and now.step <= before.step:
        return curves
    kl = () if now.reverse_kl is None else (float(now.reverse_kl),)
    reward = () if now.reward is None else (float(now.reward),)
    return Curves(curves.reverse_kl + kl, curves.reward + reward)


def run_folder(folder: Path) -> Path:
    """The folder itself. Raises CommandFailed if it is none."""
    if not (folder / "run.json").is_file():
        raise CommandFailed(
            f"{folder} is no run folder (no run.json there): give spec.output.path/metadata.name of the job, which is "
            "on the claim spec.output.volume where it runs on a cluster"
        )
    return folder


def folder_moment(folder: Path, report: ProgressReport | None = None) -> Moment:
    """Of a run folder; `report` where a newer one is at hand than its state.json."""
    state = folder / "state.json"
    if report is None and state.exists():
        report = ProgressReport.model_validate(json.loads(state.read_text(encoding="utf-8")), extra="ignore")
    report = report or ProgressReport(phase=Phase.STARTING, progress=Progress())
    curves, stages = tail_of(folder / "metrics.jsonl")
    return Moment(report.phase.value, report.progress, curves, stages, end=folder_end(folder))


def tail_of(metrics: Path) -> tuple[Curves, dict[str, float]]:
    """The last steps' curves, and the seconds by stage of the last; nothing before the first step."""
    kl: list[float] = []
    reward: list[float] = []
    stages: dict[str, float] = {}
    if metrics.exists():
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        for text in lines:
            try:
                line: Json = json.loads(text)
                if line["kind"] != "step":
                    continue
            except (ValueError, KeyError, TypeError):
                continue  # being written, or cut off at the beginning
            kl += [line["reverse_kl"]] if line.get("reverse_kl") is not None else []
            reward += [line["reward"]] if line.get("reward") is not None else []
            stages = dict(line.get("stages", {}))
    return Curves(tuple(kl), tuple(reward)), stages


def folder_end(folder: Path) -> End | None:
    """How the run in the folder ended; None while it goes on. A run that was resumed has written its state anew."""
    left, state = folder / "exit.json", folder / "state.json"
    if not left.exists() or (state.exists() and state.stat().st_mtime_ns > left.stat().st_mtime_ns):
        return None
    report = ExitReport.model_validate(json.loads(left.read_text(encoding="utf-8")), extra="ignore")
    if report.reason is ExitReason.COMPLETED:
        return End(ExitCode.DONE, f"done: model {folder / 'model'}")
    hopeless = report.reason in (ExitReason.CONFIGURATION_ERROR, ExitReason.PREFLIGHT_FAILED)
    code = ExitCode.CONFIGURATION if hopeless else ExitCode.TEMPORARY
    return End(code, f"ended, {report.reason.value}: {report.message}")


def now_utc() -> datetime:
    return datetime.now(UTC)
