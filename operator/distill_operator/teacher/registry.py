"""What the metrics show of the Teachers, and what their jobs know of each: nothing of those that are gone."""

from collections import Counter
from dataclasses import dataclass

from distill_api.teacher import TeacherStatus
from distill_operator.runtime.work_queue import Key
from distill_operator.teacher.view import View


@dataclass(frozen=True)
class Shown:
    """One Teacher at the last look."""

    uid: str
    status: TeacherStatus
    view: View


class Teachers:
    """By key."""

    def __init__(self) -> None:
        self._shown: dict[Key, Shown] = {}
        self._scalings: dict[Key, Counter[str]] = {}

    def put(self, key: Key, shown: Shown, scaled: int = 0) -> bool:
        """`scaled` servers were added, or taken away. True when its jobs have to be looked at: they see something
        else than before."""
        before = self._shown.get(key)
        if before is None or before.uid != shown.uid:
            self._scalings[key] = Counter(up=0, down=0)
        if scaled:
            self._scalings[key]["up" if scaled > 0 else "down"] += 1
        self._shown[key] = shown
        return before is None or before.view != shown.view

    def remove(self, key: Key) -> str:
        """The uid that it had; empty if nothing was known of it."""
        self._scalings.pop(key, None)
        found = self._shown.pop(key, None)
        return found.uid if found else ""

    def all(self) -> dict[Key, Shown]:
        return dict(self._shown)

    def scalings(self, key: Key) -> dict[str, int]:
        """Decisions to have more servers, or fewer, since the operator began: up and down."""
        return dict(self._scalings.get(key, {}))
