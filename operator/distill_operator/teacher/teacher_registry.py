"""The Teachers as they were reconciled last, for metrics, and to notice when their jobs see something else."""

from collections import Counter
from dataclasses import dataclass

from distill_api.teacher.kind import TeacherStatus
from distill_operator.runtime.ownership import Key
from distill_operator.teacher.view import View


@dataclass(frozen=True)
class TeacherSnapshot:
    """A Teacher as it was reconciled last."""

    uid: str
    status: TeacherStatus
    view: View


class TeacherRegistry:
    """The snapshots of all Teachers, by key."""

    def __init__(self) -> None:
        self._snapshots: dict[Key, TeacherSnapshot] = {}
        self._scalings: dict[Key, Counter[str]] = {}

    def put(self, key: Key, snapshot: TeacherSnapshot, scaled: int = 0) -> bool:
        """Record a Teacher, to which `scaled` servers were added, or taken away where that is below 0.

        Return whether its jobs must be reconciled, as they see something else than before.
        """
        before = self._snapshots.get(key)
        if before is None or before.uid != snapshot.uid:
            self._scalings[key] = Counter(up=0, down=0)
        if scaled:
            self._scalings[key]["up" if scaled > 0 else "down"] += 1
        self._snapshots[key] = snapshot
        return before is None or before.view != snapshot.view

    def remove(self, key: Key) -> str:
        """Forget a Teacher that is gone. Return the uid that it had; empty if it was not known."""
        self._scalings.pop(key, None)
        found = self._snapshots.pop(key, None)
        return found.uid if found else ""

    def snapshots(self) -> dict[Key, TeacherSnapshot]:
        """Return the snapshot of each Teacher."""
        return dict(self._snapshots)

    def scalings(self, key: Key) -> dict[str, int]:
        """Return how often servers were added (up) and taken away (down) since the process began."""
        return dict(self._scalings.get(key, {}))
