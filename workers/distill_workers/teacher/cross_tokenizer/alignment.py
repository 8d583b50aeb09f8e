"""The alignment of two tokenizations of one text: spans, the smallest runs of tokens that cover the same text in both.

Pure: positions in, counts out. A span ends wherever a token of either side does, so that the spans partition both
tokenizations, and a log-probability that is chained over a span is that of its text, given all text before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of both sides that cover the same text, at least one of each."""

    student: int
    """Tokens of the student."""
    teacher: int
    """Tokens of the teacher."""

    @property
    def is_one_to_one(self) -> bool:
        """Whether the text is one token to both."""
        return self.student == self.teacher == 1


def align(student_ends: Sequence[int | None], teacher_ends: Sequence[int]) -> list[Span]:
    """Return the spans of a text in order, up to the last position at which a token of both sides ends.

    student_ends [student tokens], teacher_ends [teacher tokens]: position in the text at which each token ends,
    ascending; None for one that ends within a character. A token without text of its own ends where the one before it
    does, and belongs to that one's span; the first ones to the span that follows.
    """
    student_last = {end: count for count, end in enumerate(student_ends, start=1) if end is not None}
    teacher_last = {end: count for count, end in enumerate(teacher_ends, start=1)}
    spans: list[Span] = []
    student, teacher = 0, 0
    for end in sorted(student_last.keys() & teacher_last.keys()):
        spans.append(Span(student_last[end] - student, teacher_last[end] - teacher))
        student, teacher = student_last[end], teacher_last[end]
    return spans
