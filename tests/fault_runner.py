"""Brings about what a schedule says, in its order, and brings back what was taken away.

How a fault is made is another's: here is only when. Nothing of it waits, so that a run can be looked at meanwhile.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from fault_schedule import DAEMONS, Disturbance, FaultSchedule, Target

Revive = Callable[[], None]
RESTORE_SECONDS = 120.0


class NotYet(Exception):
    """Raised where a fault, or its end, cannot be brought about now: what it is about is not there."""


@dataclass(frozen=True)
class Fault:
    """What has just been done."""

    said: str
    revive: Revive | None = None
    """Brings back what is away; None where that is another's to do."""


@dataclass(frozen=True)
class _Revival:
    due: float
    target: Target
    revive: Revive


class FaultRunner:
    """The course of one schedule."""

    def __init__(
        self,
        schedule: FaultSchedule,
        happen: Callable[[Disturbance], Fault],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`happen` makes a disturbance happen, or raises NotYet."""
        self._left, self._happen, self._clock, self._sleep = list(schedule.disturbances), happen, clock, sleep
        self._began = clock()
        self._due: float | None = None
        """When the next disturbance is due; None while it waits for its step."""
        self._revivals: list[_Revival] = []
        self.said: list[str] = []
        """What was done, and when."""

    @property
    def missed(self) -> list[Disturbance]:
        """What has not happened."""
        return self._left

    def advance(self, step: int) -> None:
        """Do what is due, of a run that has done so many steps at most. Call it often."""
        now = self._clock()
        self._revive([revival for revival in self._revivals if revival.due <= now])
        if not self._left or step < self._left[0].step:
            return
        if self._due is None:
            self._due = now + self._left[0].delay_seconds
        # What is away cannot be taken away.
        if now < self._due or self._left[0].target in {revival.target for revival in self._revivals}:
            return
        try:
            fault = self._happen(self._left[0])
        except NotYet:
            return
        done, self._due = self._left.pop(0), None
        self.said.append(f"{now - self._began:.1f} s, step {step}: {fault.said}")
        if fault.revive is not None:
            # From now on: it may have taken a while.
            self._revivals.append(_Revival(self._clock() + done.away_seconds, done.target, fault.revive))

    def restore(self) -> None:
        """Bring everything back at once. Raises NotYet where that cannot be done."""
        end = self._clock() + RESTORE_SECONDS
        while self._revivals:
            # The daemons first: without them no run can be resumed.
            self._revive(sorted(self._revivals, key=lambda revival: revival.target not in DAEMONS))
            if not self._revivals:
                return
            if self._clock() > end:
                raise NotYet(f"{', '.join(revival.target for revival in self._revivals)} cannot be brought back")
            self._sleep(0.5)

    def _revive(self, due: list[_Revival]) -> None:
        for revival in due:
            try:
                revival.revive()
            except NotYet:
                continue
            self._revivals.remove(revival)
