"""What the sentences of a response state as its answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from distill_workers.rewards.mathematics.expression import MATHS, bare, expressions, is_expression
from distill_workers.rewards.mathematics.sentence import gives_up, is_instruction, refuses, says_nothing, sentences

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_KEY = re.compile(r"\b(?:final answer|answers?|solutions?|results?|choice|option)\b", re.IGNORECASE)
_RESULT = re.compile(r"\b(?:solutions?|results?)\b", re.IGNORECASE)
_ANSWER = re.compile(r"\b(?:answers?|choice|option)\b", re.IGNORECASE)
_LINK = re.compile(r"\s*(?:(?<!\d):|:(?!\d)|=>|\b(?:is|are|was|equals|be|becomes)\b)[\s:*]*", re.IGNORECASE)
_LETTER = r"(?:\((?-i:[A-Z])\)|(?-i:[A-Z])\b(?!['’]))"
_CHOICE = re.compile(rf"{_LETTER}[.:)]?")
_OPTION = re.compile(r"(?:\([A-Z]\)|[A-Z][.:)])\s")
_OF_A_CHOICE = re.compile(
    rf"(?:(?:so|therefore|thus|hence|then|the|my|final|correct|right)\b[,\s]+)*(?:option|choice|answer)\s+"
    rf"(?P<choice>{_LETTER})(?::|\s+(?:is|was|seems|looks|must be)\b)\s*(?P<said>.+)",
    re.IGNORECASE | re.DOTALL,
)
_SAID_RIGHT = re.compile(
    r"(?:(?:the|also|indeed|therefore|thus|only|one|that is)\s+)*(?:correct|right|true|best|answer|choice)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_PICKED = re.compile(
    r"\b(?:I|we)(?:['’](?:d|ll)|\s+would|\s+will|\s+should|\s+must)?\s+"
    r"(?:choose|chose|pick|picked|select|go with|go for)"
    rf"\s+(?:the\s+)?(?:(?:option|choice|answer)\s+)?(?P<choice>{_LETTER})(?!\s*,?\s*(?:or|and)\b)"
)
_AFTERWARDS = re.compile(
    r"^(?P<value>.{1,80}?)\s+(?:is|are)\s+(?:the|my|our|a)?\s*(?:(?:final|correct|right)\s*)+(?:answer|solution|choice|option)?$"
    r"|^(?P<other>.{1,80}?)\s+(?:is|are)\s+(?:the|my|our)\s+(?:answer|solution|result)$",
    re.IGNORECASE,
)
_SUBORDINATE = re.compile(
    r",?\s+(?:which|because|since|so that|where|as (?:we|it|the)|and (?:this|that|it)|but)\b.*$",
    re.IGNORECASE | re.DOTALL,
)
_CORRECTION = re.compile(
    r"(?<![\s,;.–—-])[\s,;.–—-]+(?:no|wait|sorry|actually|I mean|correction|make that)\b[\s,:]+", re.IGNORECASE
)
_LEAD = re.compile(
    r"^(?:(?:I|we)\s+(?:would\s+)?(?:think|say|believe|guess|conclude|find)(?:\s+that)?|solution(?=\s*:)|so|therefore|thus"
    r"|hence|then|approximately|about|roughly|exactly|simply|just|equal to|given by|option|choice|the number|the value)"
    r"\b[,:]?\s*",
    re.IGNORECASE,
)
_NO_SOLUTION = re.compile(
    r"\b(?:there\s+(?:is|are|exists?)|(?:equation|system|inequality|it)\s+has)\s+(?P<none>no\s+(?:\w+\s+){0,2}solutions?)$",
    re.IGNORECASE,
)
_NAMED = re.compile(r"^(?:(?:the|my|our)\s+)?(?:final\s+)?(?:answer|solution|result)\s+(?:of\s+)?", re.IGNORECASE)
_NEGATED = re.compile(r"^(?:not|no longer|neither|wrong|incorrect|unclear|unknown to me)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Statement:
    """What a text states as its answer; a vague one may be about something else: The solution is unique."""

    value: str
    vague: bool


def statements(text: str) -> Iterator[Statement]:
    """Yield what the text states as its answer, the last statement first.

    Statements are `<answer>5</answer>`, a line `#### 5`, and sentences about the answer.
    """
    marked = _last_marked(text)
    if marked is None:
        yield from _in_sentences(text)
        return
    value, start, end = marked
    yield from _in_sentences(text[end:])
    yield Statement(value, vague=False)
    yield from _in_sentences(text[:start])


def stated_in(sentence: str) -> str:
    """Return what one sentence states as the answer, empty where it states none."""
    if sentence.endswith("?"):
        return ""
    sentence = re.sub(r"[*_]{2,}", "", sentence).rstrip(".! ")
    if about := _OF_A_CHOICE.fullmatch(sentence):
        return about["choice"] if _SAID_RIGHT.fullmatch(about["said"]) else ""
    if refuses(_SUBORDINATE.sub("", sentence)):
        return ""
    if none := _NO_SOLUTION.search(sentence):
        return none["none"]
    if picked := _PICKED.search(sentence):
        return picked["choice"]
    if after := _AFTERWARDS.match(sentence):
        subject = value_of(after["value"] or after["other"])
        value = value_of(_NAMED.sub("", subject))  # "The answer 5 is correct", not "The answer to it is correct"
        if not _KEY.search(value) and (value == subject or _one(value)):
            return value
    key = _KEY.search(sentence)
    if key is None or (is_instruction(sentence) and ":" not in sentence[key.end() :]):
        return ""
    rest = sentence[key.end() :]
    hidden = re.sub(MATHS, lambda match: "\0" * len(match.group()), rest)
    link = _LINK.search(hidden)
    if link is None:
        equal = hidden.rfind("=")
        return value_of(rest[equal + 1 :]) if equal >= 0 else ""
    if key.group().lower() == "solution" and not hidden[: link.start()].strip() and ":" in link.group():
        return ""  # a heading, with the steps below it
    value, masked = rest[link.end() :], hidden[link.end() :]
    if cut := _SUBORDINATE.search(masked):
        value, masked = value[: cut.start()], masked[: cut.start()]
    # "The answer to 3 + 5 is 8" and "Answer: the sum is 8", but not "(C) Paris is the capital".
    further = [m for m in _LINK.finditer(masked) if m.group().strip(" *") != ""]
    if further and not _OPTION.match(value) and expressions(value[further[-1].end() :]):
        value = value[further[-1].end() :]
    corrected = _CORRECTION.split(value)[-1]
    value = value_of(corrected if expressions(corrected) else value)
    # "Final answer: the correct answer is B"
    named = None if _OPTION.match(value) else _KEY.search(value)
    return (named and _LINK.search(value, named.end()) and stated_in(value)) or value


def names_the_answer(sentence: str) -> bool:
    """Return whether a sentence speaks of an answer or a choice by this word; results are also in tasks."""
    return _ANSWER.search(sentence) is not None


def value_of(text: str) -> str:
    """Return a stated value without what leads to it ("approximately", "option"); empty where it is refused."""
    text = bare(text)
    while lead := _LEAD.match(text):
        text = bare(text[lead.end() :])
    return "" if _NEGATED.match(text) or gives_up(text) else text


def _in_sentences(text: str) -> Iterator[Statement]:
    for sentence in reversed(list(sentences(text))):
        if value := stated_in(sentence):
            elsewhere = bool(_RESULT.search(sentence)) and not names_the_answer(sentence) and not expressions(value)
            yield Statement(value, vague=elsewhere or says_nothing(value))


def _last_marked(text: str) -> tuple[str, int, int] | None:
    """Return the last value that a tag or hashes mark, and where the mark begins and ends. A heading is none."""
    found = [(bare(m[1]), *m.span()) for m in _TAGGED.finditer(text) if m[1].strip()]
    for match in _HASHES.finditer(text):
        if _one(bare(match[1])) or not text[match.end() :].strip():
            found.append((bare(match[1]), *match.span()))
    return max(found, key=lambda mark: mark[2], default=None)


def _one(value: str) -> bool:
    return is_expression(value) or _CHOICE.fullmatch(value) is not None
