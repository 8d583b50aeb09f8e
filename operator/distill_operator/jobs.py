"""What the metrics show of the jobs: the last look at each, and nothing of those that are gone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_api.status import Status
from distill_operator.queue import Key


@dataclass(frozen=True)
class Snapshot:
    """One job at the last look."""

    uid: str
    student: str
    teacher: str
    status: Status


class Jobs:
    """By key."""

    def __init__(self) -> None:
        self._snapshots: dict[Key, Snapshot] = {}

    def put(self, key: Key, raw: Mapping[str, Any], status: Status) -> None:
        # An invalid spec has no model, so it is read as it came.
        spec = raw.get("spec") or {}
        uid = raw["metadata"]["uid"]
        self._snapshots[key] = Snapshot(uid, _model(spec, "student"), _model(spec, "teacher"), status)

    def remove(self, key: Key) -> str:
        """The uid that it had."""
        found = self._snapshots.pop(key, None)
        return found.uid if found else ""

    def all(self) -> dict[Key, Snapshot]:
        return dict(self._snapshots)


def _model(spec: Any, role: str) -> str:
    part = spec.get(role) if isinstance(spec, Mapping) else None
    return str(part.get("model", "")) if isinstance(part, Mapping) else ""
