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
        found = raw.get("spec")
        spec = found if isinstance(found, Mapping) else {}
        uid = raw["metadata"]["uid"]
        self._snapshots[key] = Snapshot(uid, _model(spec.get("student")), _teachers(spec), status)

    def remove(self, key: Key) -> str:
        """The uid that it had."""
        found = self._snapshots.pop(key, None)
        return found.uid if found else ""

    def all(self) -> dict[Key, Snapshot]:
        return dict(self._snapshots)


def _model(part: Any) -> str:
    return str(part.get("model", "")) if isinstance(part, Mapping) else ""


def _teachers(spec: Mapping[str, Any]) -> str:
    """What each teacher is called where people read, with commas."""
    several = spec.get("teachers")
    parts = several if isinstance(several, list) and several else [spec.get("teacher")]
    return ",".join(_title(part) for part in parts)


def _title(part: Any) -> str:
    if not isinstance(part, Mapping):
        return ""
    ref, endpoint = part.get("ref"), part.get("endpoint")
    if isinstance(ref, Mapping):
        return f"Teacher {ref.get('name', '')}"
    if isinstance(endpoint, Mapping):
        return str(endpoint.get("model") or endpoint.get("url", ""))
    return _model(part)
