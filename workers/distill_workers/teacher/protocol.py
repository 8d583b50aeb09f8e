"""What a teacher says of one response, and the checks that hold for every protocol. Pure."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ROUNDING_NATS = 1e-4
"""A log-probability may be this much above 0 by rounding."""


class BadScore(Exception):
    """An answer that cannot be used; `reason` is a word for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}: {self.args[1]}"


@dataclass(frozen=True, slots=True)
class Scores:
    """The teacher's view of one response, nats."""

    logprobs: list[float]
    """[response]"""
    top_ids: npt.NDArray[np.int32] | None
    """[response, k], likeliest first"""
    top_logprobs: npt.NDArray[np.float32] | None
    """[response, k]"""


@dataclass(frozen=True)
class TeacherRequest:
    """One request: where on the server, and the JSON that goes there."""

    path: str
    body: dict[str, Any]


class ScoringProtocol(Protocol):
    """How servers of one kind are asked, and what their answers mean. Readers raise BadScore."""

    vocabulary: int | None
    """Size of the teacher's embedding, where the protocol tells it."""
    shares_prefixes: bool
    """A prompt that the server has seen makes the scoring of its responses cheaper."""

    async def detect(self, send: Callable[[TeacherRequest], Awaitable[Any]]) -> None:
        """Finds out what must be known of the server, once it answers."""

    def score_request(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> TeacherRequest: ...

    def read_scores(self, answer: Any, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores: ...

    def cached_tokens(self, answer: Any) -> float:
        """Tokens of the request that the server had in its cache; infinite if it does not say."""

    def generation_request(self, prompt_ids: list[int], max_new_tokens: int) -> TeacherRequest: ...

    def read_generation(self, answer: Any) -> list[int]: ...

    def token_texts_request(self, ids: list[int]) -> TeacherRequest: ...

    def read_token_texts(self, answer: Any, ids: list[int]) -> list[str | None]:
        """What the server's own tokenizer makes of each id; None where it does not tell."""


class Observer(Protocol):
    """What is told about each request; distill_workers.metrics.Metrics is one."""

    def add(self, name: str, amount: float = 1, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...

    def change(self, name: str, amount: float) -> None: ...


def checked(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Log-probs, of which none may be above 0 by more than rounding; the result is at most 0. Raises BadScore."""
    if not np.isfinite(values).all():
        raise BadScore("not_finite", f"a log-probability is {values[~np.isfinite(values)][0]}")
    if values.max(initial=0.0) > ROUNDING_NATS:
        raise BadScore("positive", f"a log-probability is {values.max()}, above 0")
    clamped: npt.NDArray[Any] = np.minimum(values, 0.0, dtype=values.dtype)
    return clamped


def malformed(answer: Any) -> BadScore:
    return BadScore("malformed", f"the answer is not of the expected form: {str(answer)[:200]}")
