"""The wire of scoring: the request, and the checks that its answer must pass. Pure.

With prompt length P and response length R the answer covers positions P-1 ... P+R-1: R+1 entries [log p, id, text], the
first without a log p. Starting at P-1 keeps the prompt's cached prefix usable and the answer short.
"""

import math
from dataclasses import dataclass
from typing import Any

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
    top_ids: list[list[int]] | None
    """[response][k], likeliest first"""
    top_logprobs: list[list[float]] | None


def scoring_request(prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input_ids": prompt_ids + response_ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": max(0, len(prompt_ids) - 1),
    }
    if top_k is not None:
        body["top_logprobs_num"] = top_k
    return body


def read_scores(
    answer: Any, prompt_tokens: int, response_ids: list[int], top_k: int | None, vocabulary: int | None = None
) -> Scores:
    """The response's part of an answer. Raises BadScore."""
    try:
        info = answer["meta_info"]
        entries = info["input_token_logprobs"][1:]
        logprobs, ids = [e[0] for e in entries], [e[1] for e in entries]
        tops = info["input_top_logprobs"][1:] if top_k is not None else None
        top_ids = [[e[1] for e in row] for row in tops] if tops is not None else None
        top_logprobs = [[e[0] for e in row] for row in tops] if tops is not None else None
    except (LookupError, TypeError):
        raise BadScore("malformed", f"the answer is not of the expected form: {str(answer)[:200]}") from None
    if len(ids) != len(response_ids):
        raise BadScore("wrong_count", f"{len(ids)} scores came for {len(response_ids)} tokens after {prompt_tokens}")
    # SGLang 0.5.23 echoes the last id of the vocabulary as 0; its log p is right.
    quirk = None if vocabulary is None else vocabulary - 1
    for place, (sent, seen) in enumerate(zip(response_ids, ids, strict=True)):
        if sent != seen and not (sent == quirk and seen == 0):
            raise BadScore("wrong_tokens", f"token {place} of the response was sent as {sent} and scored as {seen}")
    check_logprobs(logprobs)
    if top_ids is not None and top_logprobs is not None:
        if len(top_ids) != len(response_ids) or any(len(row) != top_k for row in top_ids):
            raise BadScore("wrong_count", f"not {top_k} likeliest tokens for each of {len(response_ids)}")
        for row in top_logprobs:
            check_logprobs(row)
        top_logprobs = [[min(x, 0.0) for x in row] for row in top_logprobs]
    return Scores([min(x, 0.0) for x in logprobs], top_ids, top_logprobs)


def check_logprobs(values: list[Any]) -> None:
    for value in values:
        # NaN and infinities come as null.
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise BadScore("not_finite", f"a log-probability is {value}")
        if value > ROUNDING_NATS:
            raise BadScore("positive", f"a log-probability is {value}, above 0")
