"""The bounds of token ids: which may be sent to a teacher's servers, and which of those that come back the student has.

Teachers of one family pad their embeddings differently (Qwen2.5: 152,064 and 151,936 rows), and an id without a row
ends some servers (SGLang before 0.5.13, and its /v1/completions), which may be somebody else's.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from distill_workers.teacher.protocol import BadScore, Scores

log = logging.getLogger(__name__)

NOBODY = -1
"""In place of a likeliest token that the student lacks: it belongs to nobody's support."""


def check_sent(ids: Sequence[int], size: int | None) -> None:
    """Raise BadScore for an id outside the teacher's `size` ids, before it is sent; with None nothing is known."""
    if (wrong := _outside(ids, size)) is not None:
        raise BadScore("outside_vocabulary", f"token {wrong} is outside the teacher's vocabulary of {size}")


def check_received(ids: Sequence[int], size: int | None) -> None:
    """Raise BadScore for an id of an answer that is outside the teacher's `size` ids."""
    if (wrong := _outside(ids, size)) is not None:
        raise BadScore("wrong_tokens", f"token {wrong} came back from a teacher with a vocabulary of {size}")


def of_student(scores: Scores, tokens: int | None) -> Scores:
    """Return scores with NOBODY in place of each likeliest token that a student of so many tokens lacks."""
    if tokens is None or scores.top_ids is None or (scores.top_ids < tokens).all():
        return scores
    return replace(scores, top_ids=np.where(scores.top_ids < tokens, scores.top_ids, np.int32(NOBODY)))


class AbsentTokens:
    """The likeliest tokens of one teacher that the student lacks, of which the log has a line once."""

    def __init__(self, teacher: str) -> None:
        self._teacher, self._said = teacher, False

    def left_out(self, scores: Scores, tokens: int | None) -> Scores:
        """Return scores `of_student`."""
        found = of_student(scores, tokens)
        if found is not scores and not self._said:
            assert found.top_ids is not None and found.top_logprobs is not None, "only likeliest tokens are replaced"
            self._said = True
            absent = found.top_ids == NOBODY
            log.info(
                "teacher %s: the first response with tokens that the student lacks has %d of %d likeliest ones, with "
                "%.2g of the teacher's probability a token; that is in the tail, and theirs are padded rows if it is "
                "small",
                self._teacher,
                absent.sum(),
                absent.size,
                np.exp(found.top_logprobs[absent]).sum() / len(absent),
            )
        return found


def _outside(ids: Sequence[int], size: int | None) -> int | None:
    """Return the first id that is not one of `size`; None without one."""
    return None if size is None else next((i for i in ids if not 0 <= i < size), None)
