"""Counts of observations by bucket, in the form of a Prometheus histogram."""

from bisect import bisect_left
from dataclasses import dataclass, field


@dataclass
class Histogram:
    """A histogram whose buckets are given by their upper bounds."""

    buckets: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.buckets) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.buckets, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return for each upper bound the number of values that it bounds."""
        bounds = [*(str(float(b)) for b in self.buckets), "+Inf"]
        return [(bound, float(sum(self.counts[: i + 1]))) for i, bound in enumerate(bounds)]
