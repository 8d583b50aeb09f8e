"""The reward `math`: 1 where the response's final answer is mathematically the reference, else 0."""

from functools import lru_cache

from distill_api.spec.job_spec import Extract
from distill_workers.data.sample import Prompt
from distill_workers.rewards.base import Grade, reference_of
from distill_workers.rewards.mathematics.answer import (
    Answer,
    Origin,
    answers_anywhere,
    boxed_answer,
    final_answer,
)
from distill_workers.rewards.mathematics.boxes import boxes
from distill_workers.rewards.mathematics.equivalence import copied, equivalent, is_quantity
from distill_workers.rewards.mathematics.expression import expression_in

CANDIDATES = 64
"""Expressions of one response that extract `anywhere` compares."""


def grade_mathematically(prompt: Prompt, response: str, extract: Extract = Extract.FINAL) -> Grade:
    """Grade the answer that `extract` takes from the response.

    Runs in the main thread of a process, since a comparison that takes too long is ended by a signal. Raises
    ValueError for a reference that is empty.
    """
    reference = mathematics_of(reference_of(prompt))
    if not reference:
        raise ValueError(f"the reference answer {prompt.answer!r} of prompt {prompt.index} is empty")
    found = _answers(response, prompt.text, extract)
    for answer in found:
        grade = _compare(reference, answer, prompt.text)
        if grade.score == 1.0:
            return grade
    return _compare(reference, found[0], prompt.text)


@lru_cache(maxsize=4096)
def mathematics_of(reference: str) -> str:
    r"""Return the part of a reference that is its answer.

    That is what follows `####` (GSM8K's solutions), else the content of the last box (MATH's solutions), else all.
    """
    if "####" in reference:
        return reference.rsplit("####", 1)[1].strip()
    boxed = [box.content for box in boxes(reference) if box.content and box.content.strip()]
    return boxed[-1].strip() if boxed else reference.strip()


def _answers(response: str, question: str, extract: Extract) -> list[Answer]:
    match extract:
        case Extract.BOXED:
            return [boxed_answer(response, question)]
        case Extract.FINAL:
            return [final_answer(response, question)]
        case Extract.ANYWHERE:
            return answers_anywhere(response, question, CANDIDATES)


def _compare(reference: str, answer: Answer, question: str) -> Grade:
    if not answer.text:
        return Grade(0.0, "", answer.origin)
    # A sentence may be the answer itself ("no solution"), or be about it ("18 dollars every day").
    readings = [answer.text]
    if answer.origin is not Origin.BOX and not is_quantity(answer.text):
        readings += [part for part in [expression_in(answer.text)] if part and part != answer.text]
    for text in readings:
        if equivalent(reference, text):
            if copied(text, question, reference):
                return Grade(0.0, text, Origin.COPIED)
            return Grade(1.0, text, answer.origin)
    return Grade(0.0, answer.text, answer.origin)
