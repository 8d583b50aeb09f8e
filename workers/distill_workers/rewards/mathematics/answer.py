"""The final answer of a response: where it stands, as text. docs/guides/rewards.md states the same rule for users.

In order: the last box; else the answer that a sentence states ("the answer is 5", "#### 5", <answer>5</answer>); else
the last expression. What comes before the end of the thinking, sentences of the question, and questions are no answer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from distill_workers.rewards.mathematics.boxes import boxes


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
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_HASHES = re.compile(r"^\s*####\s*(\S.*?)\s*$", re.MULTILINE)

MATHS = r"\$\$.{1,2000}?\$\$|(?<![\\\d])\$[^$\n]{1,2000}\$|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]"
"""Mathematics between its delimiters."""
_DISPLAY = re.compile(r"\$\$.{1,2000}?\$\$|\\\[.{1,2000}?\\\]|\\begin\{(\w{1,20}\*?)\}.{1,2000}?\\end\{\1\}", re.DOTALL)
_NUMBER = (
    r"(?:[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:_\{?\d+\}?)?"
    r"|\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)|\\sqrt\s*(?:\{[^{}]*\}|\d)|\\pi\b|π)\s?(?:\\?%)?"
)
_TERM = rf"[-+−(\[]*{_NUMBER}(?:\s?(?:{_NUMBER}))*[)\]]*"
_PLAIN = rf"(?<![\w.\\]){_TERM}(?:\s*(?:[-+*/×÷^=:−]|,(?=[^()\[\]]{0, 200}[)\]])|\\cdot|\\times|\\div)+\s*{_TERM})*"
_EXPRESSION = re.compile(rf"(?P<maths>{MATHS})|(?P<plain>{_PLAIN})", re.DOTALL)

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'*)\]]*\s+|\n+")
_KEY = re.compile(r"\b(?:final answer|answers?|solutions?|results?|choice|option)\b", re.IGNORECASE)
_LINK = re.compile(r"\s*(?::|=>|\b(?:is|are|was|equals|be|becomes)\b)[\s:*]*", re.IGNORECASE)
_AFTERWARDS = re.compile(
    r"^(?P<value>.{1,80}?)\s+(?:is|are)\s+(?:the|my|our|a)?\s*(?:(?:final|correct|right)\s*)+(?:answer|solution|choice|option)?$"
    r"|^(?P<other>.{1,80}?)\s+(?:is|are)\s+(?:the|my|our)\s+(?:answer|solution|result)$",
    re.IGNORECASE,
)
_SUBORDINATE = re.compile(
    r",?\s+(?:which|because|since|so that|where|as (?:we|it|the)|and (?:this|that|it)|but)\b.*$",
    re.IGNORECASE | re.DOTALL,
)
_LEAD = re.compile(
    r"^(?:so|therefore|thus|hence|then|approximately|about|roughly|exactly|simply|just|equal to|given by|option|choice"
    r"|the number|the value)\b[,:]?\s*",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"^(?:not|no longer|neither|wrong|incorrect|unclear|unknown to me)\b", re.IGNORECASE)
_GIVES_UP = re.compile(
    r"\b(?:do not|don['’]?t|did not|didn['’]?t|cannot|can['’]?t|can not|could not|couldn['’]?t|unable to|not able to"
    r"|impossible to|hard to)\s+(?:really\s+|be\s+)?(?:know|known|determined?|solved?|answer(?:ed)?|find|found|figure"
    r"|tell|say|said|sure|certain|compute|calculate|remember|understand)\b"
    r"|\bnot (?:sure|certain|clear)\b|\bno idea\b|\bwho knows\b|\bunclear\b|\bnot enough information\b|\bI give up\b",
    re.IGNORECASE,
)
_INSTRUCTION = re.compile(
    r"^(?:please\s+)?(?:find|compute|determine|evaluate|express|enter|simplify|give|round|calculate|solve|convert|factor"
    r"|expand|write|what|how|which|who|when|where|name|list|put|state|suppose|let|assume|prove|show)\b",
    re.IGNORECASE,
)
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
    stated = _stated_answer(text)
    if stated:
        return Answer(stated, Origin.STATED)
    last = _last_expression(text)
    return Answer(last, Origin.LAST) if last else Answer("", Origin.NONE)


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


def expressions(text: str) -> list[str]:
    """Return the mathematical expressions of a text, in order, without their delimiters."""
    return [bare(match.group()) for match in _EXPRESSION.finditer(text)]


def expression_in(text: str) -> str:
    """Return the expression that an answer in words is about: the first where it begins with one, else the last."""
    found = list(_EXPRESSION.finditer(text))
    if not found:
        return ""
    return bare(found[0 if found[0].start() == 0 else -1].group())


def bare(text: str) -> str:
    """Return the text without emphasis, quotes, a final full stop and delimiters of mathematics around it."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip('*`"“”').strip()
        if text.endswith((".", ",", ";", ":", "!")) and not text.endswith(("\\,", "\\;", "\\:", "\\!")):
            text = text[:-1]
        for left, right in (("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]"), ("$", "$")):
            inner = text[len(left) : -len(right)]
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right) and left not in inner:
                text = inner
                break
    return text


def _sentences(text: str) -> Iterator[str]:
    """Yield the sentences and lines of a text. A displayed formula, and what follows a colon, is part of its line."""
    text = _DISPLAY.sub(lambda match: match.group().replace("\n", " "), text)
    text = re.sub(r"(:[*\s]*)\n+\s*", r"\1 ", text)
    for part in _SENTENCE_END.split(text):
        if part and part.strip():
            yield part.strip()


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _without_question(text: str, question: str) -> str:
    """Return the text without the sentences that the question has too."""
    known = _flat(question)
    kept, copied = [], False
    for sentence in _sentences(text):
        letters = sum(c.isalpha() for c in sentence)
        if letters >= _COPY_LETTERS and " " in sentence and _flat(sentence) in known:
            copied = True
        else:
            kept.append(sentence)
    return "\n".join(kept) if copied else text


def _stated_answer(text: str) -> str:
    """Return what the last statement of an answer says, or an empty text."""
    tagged = [t for t in _TAGGED.findall(text) if t.strip()]
    if tagged:
        return bare(tagged[-1])
    hashes: list[str] = _HASHES.findall(text)
    if hashes:
        return bare(hashes[-1])
    for sentence in reversed(list(_sentences(text))):
        value = _stated_in(sentence)
        if value:
            return value
    return ""


def _stated_in(sentence: str) -> str:
    if sentence.endswith("?"):
        return ""
    sentence = re.sub(r"[*_]{2,}", "", sentence).rstrip(".! ")
    after = _AFTERWARDS.match(sentence)
    if after and not _KEY.search(after["value"] or after["other"]):
        return _value(_LEAD.sub("", after["value"] or after["other"]))
    key = _KEY.search(sentence)
    if key is None or (_INSTRUCTION.match(sentence) and ":" not in sentence[key.end() :]):
        return ""
    rest = sentence[key.end() :]
    hidden = re.sub(MATHS, lambda match: "\0" * len(match.group()), rest)
    link = _LINK.search(hidden)
    if link is None:
        equal = hidden.rfind("=")
        return _value(rest[equal + 1 :]) if equal >= 0 else ""
    value, masked = rest[link.end() :], hidden[link.end() :]
    if cut := _SUBORDINATE.search(masked):
        value, masked = value[: cut.start()], masked[: cut.start()]
    # "The answer to 3 + 5 is 8" and "Answer: the sum is 8", but not "(C) Paris is the capital".
    further = [m for m in _LINK.finditer(masked) if m.group().strip(" *") != ""]
    if further and _EXPRESSION.search(value[further[-1].end() :]):
        value = value[further[-1].end() :]
    return _value(value)


def _value(text: str) -> str:
    text = bare(text)
    while lead := _LEAD.match(text):
        text = bare(text[lead.end() :])
    return "" if _NEGATED.match(text) or _GIVES_UP.search(text) else text


def _last_expression(text: str) -> str:
    sentences = list(_sentences(text))
    for sentence in reversed(sentences):
        if _GIVES_UP.search(sentence):
            return ""
        if sentence.endswith("?"):
            continue
        if _INSTRUCTION.match(sentence):
            continue
        plain = bare(sentence)
        if sentence is sentences[-1] and len(plain) <= 60 and len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}", plain)) <= 3:
            return plain
        found = expressions(sentence)
        if found:
            return found[-1]
    return ""
