"""Whether student and teacher share one tokenizer, and the vocabulary has as many tokens as the objective looks at."""

import random
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_workers.run.preflight.check import Check
from distill_workers.run.preflight.teacher import named
from distill_workers.teacher.pool import BadScore, TeacherPool

PROBE_TOKENS = 384
"""Ids whose text is compared between the two tokenizers, besides the special ones."""
PROBE_TEXTS = 16
"""Of the student's last tokens, whose texts an endpoint is sent until it names the last id."""
SAME_VOCABULARY = Check(
    "SameVocabulary",
    promise="The teacher decodes each probed token id to the text that the student's tokenizer decodes it to.",
    cost=f"the text of {PROBE_TOKENS} token ids and of the special ones",
)
TOP_K_FITS = Check(
    "TopKFits",
    promise="Student and teacher have as many tokens as objective.topK asks for.",
    cost="none",
)


async def top_k_fits(spec: Spec, student_tokens: int, teacher: TeacherPool) -> None:
    """A server refuses more likeliest tokens than it has, or answers with those of padding."""
    sizes = {"the student's tokenizer": student_tokens, named(teacher): teacher.vocabulary or student_tokens}
    model = min(sizes, key=lambda name: sizes[name])
    if spec.objective.top_k > sizes[model]:
        raise TOP_K_FITS.failure(
            f"objective.topK is {spec.objective.top_k}, and {model} has {sizes[model]} tokens; take at most as many"
        )


async def same_vocabulary(tokenizer: Any, teacher: TeacherPool) -> None:
    """The teacher that serves, not its files, is asked what each probed id means."""
    size = len(tokenizer)
    told = teacher.vocabulary is not None or teacher.teacher.endpoint is None
    end = size if told else await _end(tokenizer, teacher)
    special = [i for i in tokenizer.all_special_ids if i < end]
    last = list(range(end))[-1:]
    ids = list(dict.fromkeys([*special, *last, *random.Random(0).sample(range(end), min(end, PROBE_TOKENS))]))
    await _same_texts(tokenizer, teacher, ids)
    if end < size:
        raise SAME_VOCABULARY.failure(
            f"{named(teacher)} names no token id above {end - 1} for the texts of the student's last tokens, and the "
            f"student has {size}; an id that it lacks could end its servers, so state its vocab_size as "
            f"{teacher.teacher.path}.endpoint.vocabularySize"
        )


async def _same_texts(tokenizer: Any, teacher: TeacherPool, ids: list[int]) -> None:
    try:
        texts = await teacher.token_texts(ids) if ids else []
    except BadScore as error:
        raise SAME_VOCABULARY.failure(
            f"{named(teacher)} refused token ids that the student's tokenizer has ({len(tokenizer)} tokens): {error}; "
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


async def _end(tokenizer: Any, teacher: TeacherPool) -> int:
    """Return the number of the student's ids that an endpoint surely has: it named the last of them itself.

    An id that it lacks would end some servers, so none is sent to find out; a text has ids of its own tokenizer.
    """
    size, highest = len(tokenizer), -1
    texts = (tokenizer.decode([token]) for token in range(size - 1, max(-1, size - 1 - PROBE_TEXTS), -1))
    for text in texts:
        if not text or "\ufffd" in text:
            continue
        try:
            highest = max(highest, *await teacher.text_ids(text), -1)
        except BadScore:
            continue  # it takes no text, or not this one
        if highest >= size - 1:
            return size
    return highest + 1
