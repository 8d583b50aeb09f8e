"""The wire of scoring: the request, and the checks that its answer must pass. Pure.

With prompt length P and response length R the answer covers positions P-1 ... P+R-1: R+1 entries [log p, id, text], the
first without a log p. Starting at P-1 keeps the prompt's cached prefix usable and the answer short. The k likeliest
tokens come as two binary arrays (SGLang's return_flat_raw_top_logprobs_b64): a third of the bytes of nested lists, and
no Python object for each of R x k pairs on either side.
"""

import binascii
import math
from dataclasses import dataclass
from typing import Any

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


def scoring_request(prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input_ids": prompt_ids + response_ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": max(0, len(prompt_ids) - 1),
    }
    if top_k is not None:
        body |= {
            "top_logprobs_num": top_k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    return body


def read_scores(
    answer: Any, prompt_tokens: int, response_ids: list[int], top_k: int | None, vocabulary: int | None = None
) -> Scores:
    """The response's part of an answer. Raises BadScore."""
    try:
        entries = answer["meta_info"]["input_token_logprobs"][1:]
        # NaN and infinities come as null, which becomes NaN here.
        logprobs = np.array([e[0] for e in entries], dtype=np.float64)
        ids = [e[1] for e in entries]
    except (LookupError, TypeError, ValueError):
        raise BadScore("malformed", f"the answer is not of the expected form: {str(answer)[:200]}") from None
    if len(ids) != len(response_ids):
        raise BadScore("wrong_count", f"{len(ids)} scores came for {len(response_ids)} tokens after {prompt_tokens}")
    if ids != response_ids:
        # SGLang 0.5.23 echoes the last id of the vocabulary as 0; its log p is right.
        quirk = None if vocabulary is None else vocabulary - 1
        for place, (sent, seen) in enumerate(zip(response_ids, ids, strict=True)):
            if sent != seen and not (sent == quirk and seen == 0):
                raise BadScore("wrong_tokens", f"token {place} of the response was sent as {sent} and scored as {seen}")
    top_ids, top_logprobs = None, None
    if top_k is not None:
        top_ids, top_logprobs = _read_top(answer["meta_info"], len(response_ids), top_k, vocabulary)
    return Scores(_checked(logprobs).tolist(), top_ids, top_logprobs)


def cached_tokens(answer: Any) -> float:
    """Tokens of the request that the server had in its cache; infinite if it does not say."""
    try:
        return float(answer["meta_info"]["cached_tokens"])
    except (LookupError, TypeError, ValueError):
        return math.inf


def _read_top(
    info: dict[str, Any], tokens: int, top_k: int, vocabulary: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The ids and log-probs [tokens, k] of the likeliest tokens. Raises BadScore."""
    try:
        shape = [info["input_top_logprobs_null_prefix"], *info["input_top_logprobs_shape"]]
        if shape != [1, tokens, top_k]:
            raise BadScore(
                "wrong_count",
                f"not {top_k} likeliest tokens for each of {tokens}, but [skipped, tokens, k] = {shape}",
            )
        ids = _decoded(info, "idx", "int32").reshape(tokens, top_k)
        logprobs = _decoded(info, "val", "float32").reshape(tokens, top_k)
    except (LookupError, TypeError, ValueError) as error:
        raise BadScore(
            "malformed",
            f"no likeliest tokens as flat arrays ({type(error).__name__}: {error}); the teacher must be an SGLang "
            "that knows return_flat_raw_top_logprobs_b64, as 0.5.23 does",
        ) from None
    if ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary):
        raise BadScore(
            "wrong_tokens", f"likeliest tokens {ids.min()} to {ids.max()} are outside the vocabulary of {vocabulary}"
        )
    return ids, _checked(logprobs)


def _decoded(info: dict[str, Any], side: str, dtype: str) -> npt.NDArray[Any]:
    name = f"input_top_logprobs_{side}_flat_b64"
    if info[f"{name}_dtype"] != dtype:
        raise ValueError(f"{name} is {info[f'{name}_dtype']}, not {dtype}")
    return np.frombuffer(binascii.a2b_base64(info[name], strict_mode=True), np.dtype(dtype).newbyteorder("<"))


def _checked(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Log-probs, of which none may be above 0 by more than rounding; the result is at most 0. Raises BadScore."""
    if not np.isfinite(values).all():
        raise BadScore("not_finite", f"a log-probability is {values[~np.isfinite(values)][0]}")
    if values.max(initial=0.0) > ROUNDING_NATS:
        raise BadScore("positive", f"a log-probability is {values.max()}, above 0")
    clamped: npt.NDArray[Any] = np.minimum(values, 0.0, dtype=values.dtype)
    return clamped
