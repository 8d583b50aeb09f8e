"""What the metrics show of the jobs: the last look at each, how long they stayed in each phase, and nothing of those
that are gone."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from distill_api.metrics import PHASE_BUCKETS
from distill_api.names import ONLY_TEACHER
from distill_api.status import ConditionType, Reason, Status
from distill_operator.model import conditions
from distill_operator.runtime.histogram import Histogram
from distill_operator.runtime.times import parse_time
from distill_operator.runtime.work_queue import Key

TIMED = (Reason.PENDING, Reason.STARTING, Reason.RUNNING, Reason.RESTARTING, Reason.SUSPENDED)
"""Reasons of Succeeded that a job leaves again."""


@dataclass(frozen=True)
class Snapshot:
    """One job at the last look."""

    uid: str
    student: str
    teacher: str
    status: Status
    phase: str
    """Reason of Succeeded."""
    shared: tuple[tuple[str, str], ...]
    """Name in the job and name of each Teacher that it learns from."""
    since: datetime | None
    """When it came into the phase; unknown of one that was there before this operator."""


class Jobs:
    """By key."""

    def __init__(self) -> None:
        self._snapshots: dict[Key, Snapshot] = {}
        self.phase_seconds = {reason.value: Histogram(PHASE_BUCKETS) for reason in TIMED}

    def put(self, key: Key, raw: Mapping[str, Any], status: Status, now: datetime) -> None:
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
        self._snapshots[key] = Snapshot(meta["uid"], student, teacher, status, phase, _shared(spec), since)

    def remove(self, key: Key) -> str:
        """The uid that it had."""
        found = self._snapshots.pop(key, None)
        return found.uid if found else ""

    def teachers_of(self, key: Key) -> set[Key]:
        """The Teachers that a job learns from."""
        found = self._snapshots.get(key)
        return {Key.of_teacher(key.namespace, name) for _, name in found.shared} if found else set()

    def of_teacher(self, teacher: Key) -> list[Key]:
        """The jobs that name a Teacher, running or not."""
        return [key for key in self._snapshots if teacher in self.teachers_of(key)]

    def requests_of(self, teacher: Key) -> list[int]:
        """What each running job has for a Teacher to do: requests that wait or are under way.

        A trainer that is not there has nothing to do, whatever the last one said: its job's last words are of before.
        """
        found = []
        for key in self.of_teacher(teacher):
            snapshot = self._snapshots[key]
            if snapshot.phase not in (Reason.STARTING, Reason.RUNNING):
                continue
            mine = {name for name, shared in snapshot.shared if shared == teacher.teacher}
            progress = snapshot.status.progress
            alive = progress is not None and conditions.is_true(snapshot.status, ConditionType.TRAINER_READY)
            found.append(sum(t.requests for t in progress.teachers if t.name in mine) if progress and alive else 0)
        return found

    def all(self) -> dict[Key, Snapshot]:
        return dict(self._snapshots)


def _model(part: Any) -> str:
    return str(part.get("model", "")) if isinstance(part, Mapping) else ""


def _teachers(spec: Mapping[str, Any]) -> str:
    """What each teacher is called where people read, with commas."""
    return ",".join(_title(part) for part in _parts(spec))


def _parts(spec: Mapping[str, Any]) -> list[Any]:
    several = spec.get("teachers")
    return several if isinstance(several, list) and several else [spec.get("teacher")]


def _shared(spec: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
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
    return _model(part)
