"""Scoring protocols: how a teacher is asked for log-probs, and the checks of its answers that hold for every protocol.

Nothing here does input or output: a protocol builds requests and reads answers, and pool.py sends them.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ROUNDING_NATS = 1e-4
"""A log-prob may exceed 0 by this much, by rounding."""


class BadScore(Exception):
    """Raised for an answer that cannot be used; `reason` is a label of metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}: {self.args[1]}"


class TeacherUnreachable(Exception):
    """Raised when no replica has answered for longer than the pool waits."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The teacher's log-probs of one response, nats."""

    logprobs: list[float]
    """[response]"""
    top_ids: npt.NDArray[np.int32] | None
    """[response, k], likeliest first"""
    top_logprobs: npt.NDArray[np.float32] | None
    """[response, k]"""
    span_ends: list[bool] | None = None
    """[response], by a teacher with a tokenizer of its own: where a run of tokens ends that is the same text to both,
    of which logprobs has equal shares. None where each token was scored by itself."""
    unscored: int = 0
    """Tokens at the end of the response that such a teacher did not score: their logprobs mean nothing."""
    version: int | None = None
    """Of the weights that scored, where the teacher is the student itself."""


@dataclass(frozen=True, slots=True)
class WrittenResponse:
    """A response that the teacher wrote itself."""

    ids: list[int]
    truncated: bool
    """Cut off at the limit of its tokens, and not ended by the teacher."""

    @classmethod
    def of(cls, ids: list[int], finish_reason: str) -> "WrittenResponse":
        """Return the response that ended by `finish_reason`, SGLang's word or OpenAI's. Raises BadScore."""
        if finish_reason not in ("stop", "length"):
            raise BadScore("failed", f"the teacher's response ended by {finish_reason!r}, not by 'stop' or 'length'")
        return cls(ids, finish_reason == "length")


@dataclass(frozen=True)
class TeacherRequest:
    """A request: its path on the server, and its JSON body."""

    path: str
    body: dict[str, Any]


class ScoringProtocol(Protocol):
    """The requests that servers of one kind take, and how their answers are read. Readers raise BadScore."""

    vocabulary: int | None
    """Ids that the teacher's embedding has rows for; None where neither the protocol nor the job tells."""
    shares_prefixes: bool
    """Whether a prompt that the server has cached makes the scoring of its responses cheaper."""

    async def detect(self, send: Callable[[TeacherRequest], Awaitable[Any]]) -> None:
        """Detect, once the server answers, which of the protocol's variants it has."""

    def score_request(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> TeacherRequest:
        """Return the request for the scores of a response, with the top-k tokens of each position if asked for."""

    def read_scores(self, answer: Any, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        """Return the scores in the answer to a `score_request`."""

    def text_request(self, text: str) -> TeacherRequest:
        """Return a request with a text in place of ids, to which the server answers with ids of its own tokenizer."""

    def read_text_ids(self, answer: Any) -> list[int]:
        """Return the ids that the server's tokenizer made of a text."""

    def cached_tokens(self, answer: Any) -> float:
        """Return how many tokens of the request the server had in its cache; infinity if it does not tell."""

    def generation_request(self, prompt_ids: list[int], max_new_tokens: int) -> TeacherRequest:
        """Return the request for a greedy response."""

    def read_generation(self, answer: Any) -> WrittenResponse:
        """Return the response in the answer to a `generation_request`."""

    def token_texts_request(self, ids: list[int]) -> TeacherRequest:
        """Return the request for the texts of token ids."""

    def read_token_texts(self, answer: Any, ids: list[int]) -> list[str | None]:
        """Return what the server's own tokenizer makes of each id; None where it does not tell."""


class Observer(Protocol):
    """The receiver of metrics about each request; distill_workers.metrics.Metrics is one."""

    def add(self, name: str, amount: float = 1, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...

    def change(self, name: str, amount: float) -> None: ...


def checked(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return log-probs, at most 0. Raises BadScore if one is not finite, or exceeds 0 by more than rounding."""
    if not np.isfinite(values).all():
        raise BadScore("not_finite", f"a log-probability is {values[~np.isfinite(values)][0]}")
    if values.max(initial=0.0) > ROUNDING_NATS:
        raise BadScore("positive", f"a log-probability is {values.max()}, above 0")
    clamped: npt.NDArray[Any] = np.minimum(values, 0.0, dtype=values.dtype)
    return clamped


def malformed(answer: Any) -> BadScore:
    """Return the error of an answer that lacks what the protocol promises."""
    return BadScore("malformed", f"the answer is not of the expected form: {str(answer)[:200]}")
