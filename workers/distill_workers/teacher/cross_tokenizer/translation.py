"""Translation: a response of the student as tokens of a teacher, whose scores are then told of the student's tokens.

Text stays text, and what has a role keeps its role: whatever ends the student's response ends it to the teacher too,
and another special token is the teacher's of the same name. One that the teacher lacks is the text that it is written
as, which the teacher will find unlikely. A text that merely looks like a special token stays a text.

A span's log-probability is chained: the sum of the log-probs of the teacher's tokens in it, each given all before. The
chain of the whole response is the probability of one of the teacher's tokenizations of the text, the one that its
tokenizer makes: a lower bound of the sum over all of them.

The last span of a response that was cut off is left out. Had more text come, the teacher's last token might have been
another: "Fr" is unlikely where "France" is a token. The rest of a character that was cut in two is left out with it. A
response that is one span keeps it: without it nothing would be scored, and another response, drawn in place of this
one, would more likely be one that ends.
"""

import codecs
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from distill_workers.teacher.cross_tokenizer.alignment import Span, align
from distill_workers.teacher.cross_tokenizer.token_bytes import NotReproduced, TokenBytes
from distill_workers.teacher.protocol import BadScore, Scores


@dataclass(frozen=True)
class Translation:
    """A response as the teacher is sent it."""

    ids: list[int]
    """The teacher's tokens, as many as its spans have."""
    spans: list[Span] | None = None
    """None where the teacher has the student's tokenizer, and the tokens are its own."""
    unscored: int = 0
    """Tokens of the student behind the last span."""

    def of_student(self, scores: Scores) -> Scores:
        """Return scores of the teacher's tokens as those of the student's.

        The log-prob of a span is shared equally among the student's tokens in it, so that they add up to it; which
        share is whose means nothing, and an objective takes whole spans (objective/spans.py).
        """
        if self.spans is None:
            return scores
        counts = [span.student for span in self.spans]
        begins = np.cumsum([0, *(span.teacher for span in self.spans)])[:-1]
        totals = np.add.reduceat(np.array(scores.logprobs, dtype=np.float64), begins)
        shares = np.repeat(totals / counts, counts)
        ends = np.zeros(len(shares) + self.unscored, dtype=bool)
        ends[np.cumsum(counts) - 1] = True
        return replace(
            scores, logprobs=[*shares.tolist(), *[0.0] * self.unscored], span_ends=ends.tolist(), unscored=self.unscored
        )


class Translator:
    """The translator of responses for one teacher."""

    def __init__(
        self,
        student: TokenBytes,
        teacher: TokenBytes,
        ends: Collection[int],
        end: int,
        *,
        student_lead: str = "",
        teacher_lead: str = "",
    ) -> None:
        """ends: ids that end a response of the student; end: the teacher's own end of a turn. The leads are the white
        space that stands in each model's tokens between a generation prompt and a response (Turn.lead)."""
        self.student, self.teacher = student, teacher
        self._ends, self._end = frozenset(ends), end
        self._leads = student_lead, teacher_lead

    def translate(self, response_ids: list[int]) -> Translation:
        """Return a response as the teacher's tokens. Raises BadScore for one that cannot be."""
        if not response_ids:
            raise BadScore("empty", "an empty response has no token to score")
        text = _Text(self.student, self.teacher, *self._leads)
        try:
            for token in response_ids:
                data = self.student.of(token)
                if data is None:
                    raise BadScore("outside_vocabulary", f"token {token} is none of the student's tokenizer")
                if token in self._ends:
                    text.add_special(self._end)
                elif self.student.is_special(token) and (same := self.teacher.special_id(data)) is not None:
                    text.add_special(same)
                else:
                    text.add(data)
            cut_off = response_ids[-1] not in self._ends
            text.close(cut_off=cut_off)
        except NotReproduced as error:
            raise BadScore("not_reproduced", f"the teacher's tokenizer changes the response: {error}") from None
        spans = align(text.student_ends, text.teacher_ends)
        if cut_off and len(spans) > 1:
            spans.pop()
        if not spans:
            raise BadScore("empty", "the response is a part of a character, and has no text to score")
        sent, scored = sum(span.teacher for span in spans), sum(span.student for span in spans)
        return Translation(text.ids[:sent], spans, len(response_ids) - scored)


class _Text:
    """A response that is put together: a position is bytes of text since its beginning, and one for a special token."""

    def __init__(self, student: TokenBytes, teacher: TokenBytes, student_lead: str, teacher_lead: str) -> None:
        self._student, self._teacher = student, teacher
        self._student_lead, self._teacher_lead = student_lead, teacher_lead
        self.ids: list[int] = []
        self.student_ends: list[int | None] = []
        self.teacher_ends: list[int] = []
        self._begin = 0  # of the text since the last special token
        self._renew()

    def _renew(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text, self._ends = "", list[int | None]()
        self._length = 0

    def add(self, data: bytes) -> None:
        """Add a token of text, or of a part of it."""
        more = self._decoder.decode(data)
        self._text += more
        self._length += len(more.encode())
        within_character = bool(self._decoder.getstate()[0])
        self._ends.append(None if within_character else self._length)

    def add_special(self, teacher_id: int) -> None:
        """Add a token that is special to both."""
        self.close(cut_off=False)
        self._begin += 1
        self.ids.append(teacher_id)
        self.student_ends.append(self._begin)
        self.teacher_ends.append(self._begin)

    def close(self, *, cut_off: bool) -> None:
        """Encode the text since the last special token. Of a response that was `cut_off`, the beginning of a character
        is dropped; elsewhere it is what its readers see, U+FFFD."""
        if not self._ends:
            return
        if not cut_off and (rest := self._decoder.decode(b"", final=True)):
            self._text += rest
            self._length += len(rest.encode())
            self._ends[-1] = self._length
        mine = theirs = ""
        if not self.student_ends:
            theirs = self._teacher_lead
            mine = self._student_lead if self._text.startswith(self._student_lead) else ""
        found = self._teacher.encode(theirs + self._text.removeprefix(mine))
        self.student_ends += [None if end is None else self._begin + max(0, end - len(mine)) for end in self._ends]
        ends = np.cumsum([len(self._teacher.of(i) or b"") for i in found]).tolist()
        self.teacher_ends += [self._begin + max(0, end - len(theirs)) for end in ends]
        self.ids += found
        self._begin += self._length - len(mine)
        self._renew()
