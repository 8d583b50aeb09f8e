"""The samples of a batch that failed: of what, and whether another attempt of the run would fare better."""

from collections import Counter

from distill_workers.engine.engine import EngineRefused
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.rewards.base import RewardError
from distill_workers.teacher.pool import BadScore

SHOWN = 300
"""Characters of an error in the sentence."""


class FailedSamples:
    """Counts of the tries of one batch that came to no sample, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._permanent = 0
        self._last = ""

    def add(self, reason: str, error: Exception | str) -> None:
        """Count one, whose sample is lost or is tried again."""
        self._counts[reason] += 1
        self._permanent += is_permanent(error)
        self._last = str(error)

    @property
    def permanent(self) -> bool:
        """Return whether some failed, and all of them would fail again."""
        return 0 < self._permanent == self._counts.total()

    def sentence(self) -> str:
        """Return what became of the samples, where none was left."""
        if not self._counts:
            return "the student answered every prompt with nothing"
        total = self._counts.total()
        reasons = ", ".join(f"{count} of {total} {reason}" for reason, count in self._counts.most_common())
        return f"{reasons}; the last: {self._last[:SHOWN]}"


def is_permanent(error: Exception | str) -> bool:
    """Return whether a failure is of the job as written: a refused request, or a function that fails by itself."""
    match error:
        case EngineRefused():
            return True
        case RewardError() | EnvironmentFailed():
            return error.permanent
        case BadScore():
            return error.reason == "refused"
    return False
