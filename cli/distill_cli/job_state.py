"""The state of a job on a cluster, read from the API server's objects: the job, its Events, its trainer's metrics."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from distill_api.protocol import ExitCode
from distill_api.status import ConditionStatus, ConditionType, Progress, Reason, Status
from distill_cli.failure import FAILED
from distill_cli.snapshot import End, JobEvent, RoleState

Json = dict[str, Any]
MAX_EVENTS = 4
"""Events that are shown, newest last."""
FINAL_REASONS = {Reason.CONFIGURATION_ERROR, Reason.PREFLIGHT_FAILED}
"""Reasons of a failure that another attempt at the same spec does not change."""


@dataclass(frozen=True)
class JobState:
    """A DistillationJob as `list` shows it; `end` is None while it is on its way, and set for an invalid spec."""

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
    """Return the state of a DistillationJob as the API server has it. Fields that another version added are ignored."""
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
    if summary.reason == Reason.INVALID_SPEC:
        # Its condition leaves it open, as somebody may mend it; who waits for it to run waits in vain until then.
        return End(ExitCode.CONFIGURATION, f"job {name} is not started, {summary.reason}: {summary.message}")
    if summary.status is ConditionStatus.UNKNOWN:
        return None
    if summary.status is ConditionStatus.TRUE:
        model = f": model {status.result.model_path}" if status.result else ""
        return End(ExitCode.DONE, f"job {name} is complete{model}")
    code = ExitCode.CONFIGURATION if summary.reason in FINAL_REASONS else FAILED
    return End(code, f"job {name} failed, {summary.reason}: {summary.message or 'see its events'}")


def newest_events(events: Iterable[Json]) -> tuple[JobEvent, ...]:
    """Return the newest MAX_EVENTS of core/v1 Events, oldest first."""
    found = [
        JobEvent(
            time=event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"],
            warning=event.get("type") == "Warning",
            reason=event.get("reason", ""),
            message=" ".join(event.get("message", "").split()),
        )
        for event in events
    ]
    return tuple(sorted(found, key=lambda event: event.time)[-MAX_EVENTS:])


def mean_stages(metrics: str) -> dict[str, float]:
    """Return the mean seconds by stage of a step, from the text of the trainer's /metrics."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for line in metrics.splitlines():
        for suffix, into in (("sum", sums), ("count", counts)):
            if line.startswith(f'distill_step_duration_seconds_{suffix}{{stage="'):
                stage, _, value = line.partition('stage="')[2].partition('"} ')
                into[stage] = float(value)
    return {stage: total / counts[stage] for stage, total in sums.items() if counts.get(stage)}


def now_utc() -> datetime:
    """Return the present time, with its time zone."""
    return datetime.now(UTC)
