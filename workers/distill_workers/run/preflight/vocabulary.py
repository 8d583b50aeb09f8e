"""Whether student and teacher share one tokenizer."""

import random
from typing import Any

from distill_workers.run.preflight.check import Check
from distill_workers.run.preflight.teacher import named
from distill_workers.teacher.pool import BadScore, TeacherPool

PROBE_TOKENS = 384
"""Ids whose text is compared between the two tokenizers, besides the special ones."""
SAME_VOCABULARY = Check(
    "SameVocabulary",
    promise="The teacher decodes each probed token id to the text that the student's tokenizer decodes it to.",
    cost=f"the text of {PROBE_TOKENS} token ids and of the special ones",
)


async def same_vocabulary(tokenizer: Any, teacher: TeacherPool) -> None:
    """The teacher that serves, not its files, is asked what each probed id means."""
    size = len(tokenizer)
    special = [i for i in tokenizer.all_special_ids if i < size]
    ids = list(dict.fromkeys([*special, size - 1, *random.Random(0).sample(range(size), min(size, PROBE_TOKENS))]))
    try:
        texts = await teacher.token_texts(ids)
    except BadScore as error:
        raise SAME_VOCABULARY.failure(
            f"{named(teacher)} refused token ids that the student's tokenizer has ({size} tokens): {error}; "
            "teacher and student must share one tokenizer, so choose models of one family",
        ) from None
    for token, theirs in zip(ids, texts, strict=True):
        mine = tokenizer.decode([token])
        if "\ufffd" in mine and teacher.teacher.endpoint is not None:
            continue  # a part of a character, which servers write in ways of their own
        if theirs is not None and theirs != mine:
            raise SAME_VOCABULARY.failure(
                f"token {token} is {mine!r} to the student and {theirs!r} to {named(teacher)}; "
                "they must share one tokenizer, so choose models of one family",
            )
