"""The translators of a job, one for each teacher with a tokenizer of its own."""

from collections.abc import Collection, Mapping
from typing import Any

from distill_api.learning import mixed_templates
from distill_api.spec.job_spec import Spec
from distill_workers.failures import ConfigurationError
from distill_workers.teacher.cross_tokenizer.token_bytes import NotReproduced, TokenBytes
from distill_workers.teacher.cross_tokenizer.translation import Translator
from distill_workers.teacher.cross_tokenizer.turn import Turn, turn_of

PROBES = (
    "The quick Brown fox: 3.14 + 42 = 45.14!\n\n",
    "  def f(x):\n\t\treturn x ** 2   # a comment\n",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u2026 5 \u20ac",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f",
    "\U0001f600 x\u00b2 \u2264 \u00bd",
)
"""Texts that a normalisation changes: letters, white space, accents, full-width signs, and what NFKC writes otherwise.
"""


def translators(
    spec: Spec, tokenizer: Any, ends: Collection[int], tokenizers: Mapping[str, Any]
) -> dict[str, Translator]:
    """Return the translators by the teachers' names. Raises ConfigurationError for a tokenizer that cannot be used.

    tokenizer: the student's, whose responses end by one of the ids `ends`; tokenizers: the teachers' own, by name.
    """
    if not tokenizers:
        return {}
    if mixed := next(mixed_templates(spec), None):
        raise ConfigurationError(mixed)
    chat = spec.data.all_sources[0].prompts.apply_chat_template
    student = _token_bytes(tokenizer, "spec.student.model")
    lead = turn_of(tokenizer, student).lead if chat else ""
    found: dict[str, Translator] = {}
    for teacher in spec.all_teachers:
        if teacher.name in tokenizers:
            own, field = tokenizers[teacher.name], f"{teacher.path}.tokenizer"
            theirs = _token_bytes(own, field)
            turn = turn_of(own, theirs) if chat else Turn()
            end = own.eos_token_id if turn.end is None else turn.end
            if end is None:
                raise ConfigurationError(
                    f"{field}: {teacher.tokenizer} names no token that ends a response (eos_token, or the end of a "
                    "turn in its chat template), so the ends of the student's responses could not be scored"
                )
            _check_texts(student, theirs, field)
            found[teacher.name] = Translator(student, theirs, ends, end, student_lead=lead, teacher_lead=turn.lead)
    return found


def _token_bytes(tokenizer: Any, field: str) -> TokenBytes:
    try:
        return TokenBytes(tokenizer)
    except NotReproduced as error:
        raise ConfigurationError(
            f"{field}: the bytes of its tokens are not known: {error}; a teacher with a tokenizer of its own needs "
            "byte-level BPE or SentencePiece on both sides, as tokenizer.json"
        ) from None


def _check_texts(student: TokenBytes, teacher: TokenBytes, field: str) -> None:
    """Raise ConfigurationError where the teacher's tokenizer changes a text that the student can write."""
    for text in PROBES:
        try:
            student.encode(text)
        except NotReproduced:
            continue  # the student's vocabulary has no such text, so it never writes one
        try:
            teacher.encode(text)
        except NotReproduced as error:
            raise ConfigurationError(
                f"{field}: it normalises or lacks a text that the student can write: {error}; the teacher would score "
                "another text than the student's: choose a teacher whose tokenizer keeps every text as it is"
            ) from None
