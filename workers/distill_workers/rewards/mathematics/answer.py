"""The final answer of a response: where it stands, as text. docs/guides/rewards.md states the same rule for users.

In order: the last box; else the answer that a sentence states ("the answer is 5", "#### 5", <answer>5</answer>); else
the last expression. What comes before the end of the thinking, sentences of the question, and questions are no answer.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from distill_workers.rewards.mathematics.boxes import boxes
from distill_workers.rewards.mathematics.expression import bare, expressions, last_expression
from distill_workers.rewards.mathematics.sentence import asks, gives_up, is_closing, refuses, sentences
from distill_workers.rewards.mathematics.statement import names_the_answer, stated_in, statements, value_of


class Origin(StrEnum):
    """Where the answer of a response was found."""

    BOX = "last box"
    STATED = "stated answer"
    LAST = "last expression"
    ANYWHERE = "anywhere"
    NONE = "no answer"
    THINKING = "no answer: the thinking has not ended"
    COPIED = "no answer: copied from the question"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as the response writes it, without delimiters of mathematics around it."""

    text: str
    origin: Origin


_TAGS = r"(?:<{0}(?:think|thinking|thought|reasoning)>|\[{0}THINK\])"
_OPEN, _CLOSE = (re.compile(_TAGS.format(slash), re.IGNORECASE) for slash in ("", "/"))
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.]|\\[,;()\[\]]|\\quad|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b|\b[A-Za-z]\w?\s*=)*(?P<joint>)"
)
_JOINT = re.compile(r"\band\b|\bor\b|[,;]")
_CALCULATED = re.compile(r"=|\$.*\$|\\[(\[]")
_OPTION = re.compile(r"(?:\([A-Z]\)|[A-Z][.)])\s")
_COPY_LETTERS = 12
"""A sentence with fewer letters may stand in the question by chance."""


def final_answer(response: str, question: str) -> Answer:
    """Return the final answer of the response to the question; its text is empty where there is none."""
    text = after_thinking(response, question)
    if text is None:
        return Answer("", Origin.THINKING)
    text = _without_question(text, question)
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    stated = list(statements(text))
    if clear := next((statement for statement in stated if not statement.vague), None):
        return Answer(clear.value, Origin.STATED)
    last = _last_expression(text)
    if last:
        return Answer(last, Origin.LAST)
    # "The answer is correct" is an answer where nothing else is.
    return Answer(stated[0].value, Origin.STATED) if stated else Answer("", Origin.NONE)


def boxed_answer(response: str, question: str) -> Answer:
    """Return the content of the last box after the thinking; its text is empty where there is none."""
    text = after_thinking(response, question)
    if text is None:
        return Answer("", Origin.THINKING)
    return last_box(_without_question(text, question)) or Answer("", Origin.NONE)


def answers_anywhere(response: str, question: str, limit: int) -> list[Answer]:
    """Return the final answer and then every other box and expression after the thinking, last ones first."""
    first = final_answer(response, question)
    text = after_thinking(response, question)
    found = [first] if first.text else []
    if text is not None:
        text = _without_question(text, question)
        others = [box.content for box in boxes(text) if box.content] + expressions(text)
        found += [Answer(other, Origin.ANYWHERE) for other in reversed(others)]
    return found[:limit] or [first]


def after_thinking(response: str, question: str) -> str | None:
    """Return what follows the thinking, the whole response without any; None where the thinking has not ended.

    A chat template may itself open the thinking at the end of the prompt.
    """
    closed = list(_CLOSE.finditer(response))
    rest = re.sub(r"[ \t]+", " ", response[closed[-1].end() :] if closed else response)
    if _OPEN.search(rest):
        return None
    opened = list(_OPEN.finditer(question))
    if not closed and opened and not question[opened[-1].end() :].strip():
        return None
    return rest


def is_thinking_tag(text: str) -> bool:
    """Return whether a text is a tag that begins or ends the thinking, and nothing else."""
    return any(tag.fullmatch(text) for tag in (_OPEN, _CLOSE))


def last_box(text: str) -> Answer | None:
    r"""Return the last box that is not empty; boxes joined by commas, `and` or `or` are one list. None without a box.

    A last box that is not closed is a box without an answer: the response was cut off while it answered.
    """
    found = [box for box in boxes(text) if box.content is None or box.content.strip()]
    if not found:
        return None
    last = found.pop()
    if last.content is None:
        return Answer("", Origin.BOX)
    contents, start = [last.content], last.start
    while found and found[-1].content is not None:
        between = text[found[-1].end : start]
        if not _BETWEEN_BOXES.fullmatch(between) or not _JOINT.search(between):
            break
        box = found.pop()
        contents.insert(0, str(box.content))
        start = box.start
    return Answer(", ".join(dict.fromkeys(c.strip() for c in contents)), Origin.BOX)


def _without_question(text: str, question: str) -> str:
    """Return the text without the sentences that the question has too.

    One that answers is kept, unless it is copied together with its neighbour: a demonstration, or one of the options,
    may say what this answer says.
    """
    known = _flat(question)
    found = list(sentences(text))
    copied = [_is_copy(sentence, known) for sentence in found]
    if not any(copied):
        return text
    kept = [s for i, s in enumerate(found) if not copied[i] or (_answers(s, found) and not _in_a_row(i, found, known))]
    return "\n".join(kept)


def _is_copy(sentence: str, known: str) -> bool:
    letters = sum(c.isalpha() for c in sentence)
    return letters >= _COPY_LETTERS and " " in sentence and _flat(sentence) in known


def _answers(sentence: str, found: list[str]) -> bool:
    alone = len(found) == 1 and not expressions(sentence) and not asks(sentence)
    states = names_the_answer(sentence) and stated_in(sentence)
    return alone or bool(boxes(sentence) or _OPTION.match(sentence) or states)


def _in_a_row(index: int, found: list[str], known: str) -> bool:
    pairs = (found[max(index - 1, 0) : index + 1], found[index : index + 2])
    return any(len(pair) > 1 and _flat(" ".join(pair)) in known for pair in pairs)


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _last_expression(text: str) -> str:
    found = list(sentences(text))
    options = sum(_OPTION.match(sentence) is not None for sentence in found)
    for sentence in reversed(found):
        if gives_up(sentence):
            return ""
        if asks(sentence) or is_closing(bare(sentence)) or refuses(sentence):
            continue
        plain = bare(sentence)
        if _OPTION.match(plain) and (sentence is found[-1] or options == 1):
            return plain
        # A text answer, or a choice, stands alone at the end.
        short = len(plain) <= 60 and len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}", plain)) <= 3
        if sentence is found[-1] and short and not _CALCULATED.search(sentence):
            if value := value_of(plain):
                return value
        elif last := last_expression(sentence) or (plain if sentence is found[-1] and short else ""):
            return last
    return ""
