"""SGLang's own protocol: /generate with max_new_tokens 0.

With prompt length P and response length R the answer covers positions P-1 ... P+R-1: R+1 entries [log-prob, id, text],
the first without a log-prob. Starting at P-1 keeps the prompt's cached prefix usable and the answer short. The k
likeliest tokens come as two binary arrays (SGLang's return_flat_raw_top_logprobs_b64): a third of the bytes of nested
lists, and no Python object for each of R x k pairs on either side.
"""

import binascii
import logging
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_workers.teacher.protocol import BadScore, Scores, TeacherRequest, WrittenResponse, checked, malformed

log = logging.getLogger(__name__)
PATH = "/generate"
SEPARATOR = "-"
"""Between the version of weights and what else their name has."""


class SGLangProtocol:
    """The ScoringProtocol of SGLang's /generate."""

    shares_prefixes = True

    def __init__(self, *, ours: bool = True, vocabulary: int | None = None) -> None:
        """ours: served by this project's image, whose SGLang refuses an impossible token id. Older ones end by it, so
        an endpoint's `vocabulary` is what the job says."""
        self.vocabulary = vocabulary
        self._ours = ours

    async def detect(self, send: Callable[[TeacherRequest], Awaitable[Any]]) -> None:
        """Detect the embedding's size of a server of ours: SGLang tells it only when it refuses an impossible id."""
        body = scoring_request([1], [1], None)
        if self._ours:
            body["token_ids_logprob"] = [2**31 - 1]
        try:
            await send(TeacherRequest(PATH, body))
        except BadScore as refused:
            if match := re.search(r"valid range is \[0, (\d+)\)", str(refused)):
                self.vocabulary = int(match[1])
                return
        if self._ours:
            log.warning("the teacher did not tell the size of its vocabulary; token ids are sent unchecked")

    def score_request(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> TeacherRequest:
        return TeacherRequest(PATH, scoring_request(prompt_ids, response_ids, top_k))

    def read_scores(self, answer: Any, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        return read_scores(answer, len(prompt_ids), response_ids, top_k, self.vocabulary)

    def text_request(self, text: str) -> TeacherRequest:
        request = {key: value for key, value in scoring_request([], [], None).items() if key != "input_ids"}
        return TeacherRequest(PATH, {**request, "text": text, "return_prompt_token_ids": True})

    def read_text_ids(self, answer: Any) -> list[int]:
        try:
            # Older servers name the ids only where they are scored.
            ids = answer.get("prompt_token_ids") or [e[1] for e in answer["meta_info"]["input_token_logprobs"]]
            return [int(i) for i in ids]
        except (AttributeError, LookupError, TypeError, ValueError):
            raise malformed(answer) from None

    def cached_tokens(self, answer: Any) -> float:
        try:
            return float(answer["meta_info"]["cached_tokens"])
        except (LookupError, TypeError, ValueError):
            return math.inf

    def generation_request(self, prompt_ids: list[int], max_new_tokens: int) -> TeacherRequest:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0}
        return TeacherRequest(PATH, {"input_ids": prompt_ids, "sampling_params": sampling})

    def read_generation(self, answer: Any) -> WrittenResponse:
        try:
            ids, reason = [int(i) for i in answer["output_ids"]], str(answer["meta_info"]["finish_reason"]["type"])
        except (LookupError, TypeError, ValueError):
            raise BadScore("malformed", f"no output_ids or finish_reason in {str(answer)[:200]}") from None
        return WrittenResponse.of(ids, reason)

    def token_texts_request(self, ids: list[int]) -> TeacherRequest:
        request = scoring_request(ids[:1], ids[1:], None)
        return TeacherRequest(PATH, {**request, "return_text_in_logprobs": True, "logprob_start_len": 0})

    def read_token_texts(self, answer: Any, ids: list[int]) -> list[str | None]:
        try:
            entries = answer["meta_info"]["input_token_logprobs"]
            # SGLang gives the last id of the vocabulary as 0; the text would be that of token 0.
            return [text if seen == sent else None for sent, (_, seen, text) in zip(ids, entries, strict=True)]
        except (LookupError, TypeError, ValueError):
            raise malformed(answer) from None


class VersionedSGLangProtocol(SGLangProtocol):
    """That of servers that hold the student's weights: scores have the version, with which their name begins."""

    def read_scores(self, answer: Any, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        scores = super().read_scores(answer, prompt_ids, response_ids, top_k)
        try:
            return replace(scores, version=int(weights_name(answer).partition(SEPARATOR)[0]))
        except ValueError:
            raise malformed(answer) from None


def weights_name(answer: Any) -> str:
    """Return the name of the weights that gave an answer. Raises BadScore."""
    try:
        return str(answer["meta_info"]["weight_version"])
    except (LookupError, TypeError):
        raise malformed(answer) from None


def scoring_request(prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> dict[str, Any]:
    """Return the body of /generate for the log-probs of a response."""
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
    """Return the scores of the response in an answer of /generate. Raises BadScore."""
    try:
        entries = answer["meta_info"]["input_token_logprobs"][1:]
        # NaN and infinities come as null, which becomes NaN here.
        logprobs = np.array([e[0] for e in entries], dtype=np.float64)
        ids = [e[1] for e in entries]
    except (LookupError, TypeError, ValueError):
        raise malformed(answer) from None
    if len(ids) != len(response_ids):
        raise BadScore("wrong_count", f"{len(ids)} scores came for {len(response_ids)} tokens after {prompt_tokens}")
    if ids != response_ids:
        # SGLang 0.5.23 gives the last id of the vocabulary as 0; its log-prob is right.
        quirk = None if vocabulary is None else vocabulary - 1
        for position, (sent, seen) in enumerate(zip(response_ids, ids, strict=True)):
            if sent != seen and not (sent == quirk and seen == 0):
                raise BadScore(
                    "wrong_tokens", f"token {position} of the response was sent as {sent} and scored as {seen}"
                )
    top_ids, top_logprobs = None, None
    if top_k is not None:
        top_ids, top_logprobs = _read_top(answer["meta_info"], len(response_ids), top_k, vocabulary)
    return Scores(checked(logprobs).tolist(), top_ids, top_logprobs)


def _read_top(
    info: dict[str, Any], tokens: int, top_k: int, vocabulary: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return ids and log-probs [tokens, k] of the likeliest tokens. Raises BadScore."""
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
    return ids, checked(logprobs)


def _decoded(info: dict[str, Any], side: str, dtype: str) -> npt.NDArray[Any]:
    name = f"input_top_logprobs_{side}_flat_b64"
    if info[f"{name}_dtype"] != dtype:
        raise ValueError(f"{name} is {info[f'{name}_dtype']}, not {dtype}")
    return np.frombuffer(binascii.a2b_base64(info[name], strict_mode=True), np.dtype(dtype).newbyteorder("<"))
