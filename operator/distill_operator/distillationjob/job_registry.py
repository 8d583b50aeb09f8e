"""The jobs as they were reconciled last, for metrics and Teachers: a snapshot of each, and how long phases lasted."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from distill_api.metrics.metric import PHASE_BUCKETS
from distill_api.names import ONLY_TEACHER
from distill_api.status import ConditionType, Reason, Status
from distill_api.teacher.dataset_scores import TeacherLogprobs
from distill_operator.kinds import Kind
from distill_operator.model import conditions
from distill_operator.model.times import parse_time
from distill_operator.runtime.histogram import Histogram
from distill_operator.runtime.ownership import Key

TIMED = (
    Reason.PENDING,
    Reason.STARTING,
    Reason.RUNNING,
    Reason.RESTARTING,
    Reason.SUSPENDED,
    Reason.WAITING_FOR_QUOTA,
)
"""Reasons of Succeeded that a job leaves again."""
STUDENT = "the student itself"
"""Title of a teacher that is the student."""


@dataclass(frozen=True)
class JobSnapshot:
    """A job as it was reconciled last."""

    uid: str
    student: str
    teacher: str
    status: Status
    phase: str
    """Reason of the condition Succeeded."""
    teacher_refs: tuple[tuple[str, str], ...]
    """Each Teacher that it asks: what the job calls it, and the Teacher's own name. None with precomputed scores."""
    since: datetime | None
    """When it came into the phase; None where that was before this process began."""


class JobRegistry:
    """The snapshots of all jobs, by key."""

    def __init__(self) -> None:
        self._snapshots: dict[Key, JobSnapshot] = {}
        self.phase_seconds = {reason.value: Histogram(PHASE_BUCKETS) for reason in TIMED}

    def put(self, key: Key, raw: Mapping[str, Any], status: Status, now: datetime) -> None:
        """Record a job with its status."""
        # An invalid spec has no model, so it is read as it came.
        found, meta = raw.get("spec"), raw["metadata"]
        spec = found if isinstance(found, Mapping) else {}
        phase = conditions.reason_of(status, ConditionType.SUCCEEDED) or Reason.PENDING.value
        before = self._snapshots.get(key)
        if before is None or before.uid != meta["uid"]:
            # Pending begins with the job itself.
            made = meta.get("creationTimestamp")
            since = parse_time(made) if made and phase == Reason.PENDING.value else None
        elif before.phase == phase:
            since = before.since
        else:
            since = now
            if before.since is not None and before.phase in self.phase_seconds:
                self.phase_seconds[before.phase].observe((now - before.since).total_seconds())
        student, teacher = _model(spec.get("student")), _teachers(spec)
        self._snapshots[key] = JobSnapshot(meta["uid"], student, teacher, status, phase, _teacher_refs(spec), since)

    def remove(self, key: Key) -> str:
        """Forget a job that is gone. Return the uid that it had; empty if it was not known."""
        found = self._snapshots.pop(key, None)
        return found.uid if found else ""

    def teachers_of(self, key: Key) -> set[Key]:
        """Return the Teachers that a job asks."""
        found = self._snapshots.get(key)
        return {Key(Kind.TEACHER, key.namespace, name) for _, name in found.teacher_refs} if found else set()

    def of_teacher(self, teacher: Key) -> list[Key]:
        """Return the jobs that ask a Teacher, running or not."""
        return [key for key in self._snapshots if teacher in self.teachers_of(key)]

    def requests_of(self, teacher: Key) -> list[int]:
        """Return for each running job how many requests to a Teacher wait or are under way.

        A job without a trainer has none, whatever its last trainer reported.
        """
        found = []
        for key in self.of_teacher(teacher):
            snapshot = self._snapshots[key]
            if snapshot.phase not in (Reason.STARTING, Reason.RUNNING):
                continue
            mine = {name for name, ref in snapshot.teacher_refs if ref == teacher.name}
            progress = snapshot.status.progress
            alive = progress is not None and conditions.is_true(snapshot.status, ConditionType.TRAINER_READY)
            found.append(sum(t.requests for t in progress.teachers if t.name in mine) if progress and alive else 0)
        return found

    def snapshots(self) -> dict[Key, JobSnapshot]:
        """Return the snapshot of each job."""
        return dict(self._snapshots)


def _model(part: Any) -> str:
    return str(part.get("model", "")) if isinstance(part, Mapping) else ""


def _teachers(spec: Mapping[str, Any]) -> str:
    """Return the titles of the teachers as people read them, separated by commas."""
    return ",".join(_title(part) for part in _parts(spec))


def _parts(spec: Mapping[str, Any]) -> list[Any]:
    several = spec.get("teachers")
    return several if isinstance(several, list) and several else [spec.get("teacher")]


def _teacher_refs(spec: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    objective = spec.get("objective")
    if isinstance(objective, Mapping) and objective.get("teacherLogprobs") == TeacherLogprobs.PRECOMPUTED.value:
        return ()  # a Teacher that is gone is no fault: nobody asks it
    found = [part for part in _parts(spec) if isinstance(part, Mapping) and isinstance(part.get("ref"), Mapping)]
    return tuple((str(part.get("name", ONLY_TEACHER)), str(part["ref"].get("name", ""))) for part in found)


def _title(part: Any) -> str:
    if not isinstance(part, Mapping):
        return ""
    ref, endpoint = part.get("ref"), part.get("endpoint")
    if isinstance(ref, Mapping):
        return f"Teacher {ref.get('name', '')}"
    if isinstance(endpoint, Mapping):
        return str(endpoint.get("model") or endpoint.get("url", ""))
    return STUDENT if isinstance(part.get("student"), Mapping) else _model(part)
