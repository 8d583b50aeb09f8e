"""What the replicas of a teacher have said of one response: a replica that comes later must say the same."""

import statistics
from dataclasses import dataclass

from distill_workers.scores import Scores

ENOUGH_TOKENS = 16
"""Of a response: a longer one says no more about a replica's weights."""


@dataclass(frozen=True)
class Reference:
    """One scored response."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    """[response], nats"""

    def worse_than(self, response_ids: list[int]) -> bool:
        return len(self.response_ids) < min(len(response_ids), ENOUGH_TOKENS)

    def gap_nats(self, scores: Scores) -> float:
        """Mean over the tokens."""
        return statistics.fmean(abs(a - b) for a, b in zip(self.logprobs, scores.logprobs, strict=True))
