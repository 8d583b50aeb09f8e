"""Whether student and teacher share one tokenizer, or how the tokens of the one are runs of the other's; and whether
the vocabulary has as many tokens as the objective looks at."""

import logging
import math
import random
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_api.training_phases import teacher_top_k
from distill_workers.data.sample import Sample
from distill_workers.run.preflight.check import Check
from distill_workers.run.preflight.model_limits import longest_response, teacher_limits
from distill_workers.run.preflight.teacher import named
from distill_workers.teacher.cross_tokenizer.alignment import Span
from distill_workers.teacher.pool import BadScore, TeacherPool

log = logging.getLogger(__name__)

PROBE_TOKENS = 384
"""Ids whose text is compared between the two tokenizers, besides the special ones."""
PROBE_TEXTS = 16
"""Of the student's last tokens, whose texts an endpoint is sent until it names the last id."""
SAME_VOCABULARY = Check(
    "SameVocabulary",
    promise="The teacher decodes each probed token id to the text that the student's tokenizer decodes it to, or the "
    "one that teacher.tokenizer names.",
    cost=f"the text of {PROBE_TOKENS} token ids and of the special ones",
)
TOP_K_FITS = Check(
    "TopKFits",
    promise="Student and teacher have as many tokens as objective.topK asks for.",
    cost="none",
)
TOKENS_ALIGN = Check(
    "TokensAlign",
    promise="The student's responses are the same text in the tokens of a teacher with a tokenizer of its own.",
    cost="none",
)
FEW_ALIGNED = 0.5
"""Share of the student's tokens that are one token to the teacher too below which that is a warning."""


async def top_k_fits(spec: Spec, student_tokens: int, teacher: TeacherPool) -> None:
    """A server refuses more likeliest tokens than it has, or answers with those of padding."""
    sizes = {"the student's tokenizer": student_tokens, named(teacher): teacher.vocabulary or student_tokens}
    model = min(sizes, key=lambda name: sizes[name])
    most = teacher_top_k(spec) or spec.objective.top_k
    if most > sizes[model]:
        raise TOP_K_FITS.failure(
            f"objective.topK is {most}, and {model} has {sizes[model]} tokens; take at most as many"
        )


async def same_vocabulary(tokenizer: Any, teacher: TeacherPool) -> None:
    """The teacher that serves, not its files, is asked what each probed id means.

    tokenizer: the student's, in place of which stands that of the teacher's own where it has one.
    """
    whose = "the student"
    if teacher.translator is not None:
        tokenizer, whose = teacher.translator.teacher.tokenizer, f"{teacher.teacher.path}.tokenizer"
    size = len(tokenizer)
    told = teacher.vocabulary is not None or teacher.teacher.endpoint is None
    end = size if told else await _end(tokenizer, teacher)
    special = [i for i in tokenizer.all_special_ids if i < end]
    last = list(range(end))[-1:]
    ids = list(dict.fromkeys([*special, *last, *random.Random(0).sample(range(end), min(end, PROBE_TOKENS))]))
    await _same_texts(tokenizer, teacher, ids, whose)
    if end < size:
        raise SAME_VOCABULARY.failure(
            f"{named(teacher)} names no token id above {end - 1} for the texts of the last tokens of {whose}, and "
            f"{whose} has {size}; an id that it lacks could end its servers, so state its vocab_size as "
            f"{teacher.teacher.path}.endpoint.vocabularySize"
        )


async def _same_texts(tokenizer: Any, teacher: TeacherPool, ids: list[int], whose: str) -> None:
    advice = (
        "they must share one tokenizer, so choose models of one family, or name the teacher's in "
        f"{teacher.teacher.path}.tokenizer"
        if teacher.translator is None
        else "it must be the tokenizer of the model that is served"
    )
    try:
        texts = await teacher.token_texts(ids) if ids else []
    except BadScore as error:
        raise SAME_VOCABULARY.failure(
            f"{named(teacher)} refused token ids that {whose} has ({len(tokenizer)} tokens): {error}; {advice}",
        ) from None
    for token, theirs in zip(ids, texts, strict=True):
        mine = tokenizer.decode([token])
        if "\ufffd" in mine and teacher.teacher.endpoint is not None:
            continue  # a part of a character, which servers write in ways of their own
        if theirs is not None and theirs != mine:
            raise SAME_VOCABULARY.failure(
                f"token {token} is {mine!r} to {whose} and {theirs!r} to {named(teacher)}; {advice}"
            )


async def tokens_align(spec: Spec, samples: list[Sample], tokenizer: Any, teacher: TeacherPool) -> float | None:
    """Return the share of the student's tokens that are one token to the teacher too, and log it; None for a teacher
    that has the student's tokenizer."""
    if (translator := teacher.translator) is None:
        return None
    spans: list[Span] = []
    unscored = 0
    for sample in samples:
        own = translator.student.joined(sample.response_ids).decode(errors="replace").strip()
        decoded = tokenizer.decode(sample.response_ids, clean_up_tokenization_spaces=False).strip()
        # Of a part of a character, as where the probe was cut off, decoders write one sign or one for each byte.
        if own != decoded and "\ufffd" not in own + decoded:
            raise TOKENS_ALIGN.failure(
                f"the student's tokens of a probe are the text {own[:80]!r} by their bytes and {decoded[:80]!r} to its "
                "decoder; its tokenizer.json is of a kind whose tokens cannot be aligned"
            )
        try:
            found = translator.translate(sample.response_ids)
        except BadScore as error:
            raise TOKENS_ALIGN.failure(f"{named(teacher)} cannot score a probe of the student's: {error}") from None
        assert found.spans is not None, "a translator aligns"
        spans += found.spans
        unscored += found.unscored
    mine, theirs = sum(span.student for span in spans), sum(span.teacher for span in spans)
    share = sum(span.is_one_to_one for span in spans) / mine
    log.log(
        logging.WARNING if share < FEW_ALIGNED else logging.INFO,
        "preflight: teacher %s: %.0f %% of %d tokens that the student wrote are one token to it too; all of them are "
        "%d of its own, in %d spans of one text; %d more, at the ends of responses that were cut off, are not scored",
        *(teacher.teacher.name, 100 * share, mine, theirs, len(spans), unscored),
    )
    _warn_of_positions(spec, teacher, theirs / mine)
    return share


def _warn_of_positions(spec: Spec, teacher: TeacherPool, ratio: float) -> None:
    """Warn where the longest response would be more tokens of a teacher than it has positions. `ratio` of its tokens to
    the student's is that of a few short responses, too few to refuse a job by."""
    found = teacher_limits(teacher.teacher)
    prompt, longest = spec.rollout.max_prompt_tokens, longest_response(spec)
    needed = prompt + math.ceil(ratio * longest) + 1
    if found is not None and found.positions is not None and needed > found.positions:
        log.warning(
            "preflight: ContextLength: %s has %.2f tokens for each of the student's, so rollout.maxPromptTokens %d and "
            "a response of up to %d tokens need some %d of its positions, and it has %d (max_position_embeddings); it "
            "refuses what is longer, and shorter responses are drawn instead: lower maxPromptTokens or "
            "maxResponseTokens",
            *(named(teacher), ratio, prompt, longest, needed, found.positions),
        )


async def _end(tokenizer: Any, teacher: TeacherPool) -> int:
    """Return the number of a tokenizer's ids that an endpoint surely has: it named the last of them itself.

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
