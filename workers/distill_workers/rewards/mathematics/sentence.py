"""The sentences of a response, and which of them say nothing about the answer's value."""

import re
from collections.abc import Iterator

from distill_workers.rewards.mathematics.expression import MATHS

_DISPLAY = re.compile(r"\$\$.{1,2000}?\$\$|\\\[.{1,2000}?\\\]|\\begin\{(\w{1,20}\*?)\}.{1,2000}?\\end\{\1\}", re.DOTALL)
_SENTENCE_END = re.compile("(?<=[.!?])(?<!\\\\!)(?<!\n[A-J]\\.)[\"'*)\\]]*\\s+|(?<=\x01)\\s+|(?<=\x01)(?=[A-Z])|\n+")
_DELIMITER = re.compile(r"(?:\$+|\\[)\]]|\\end\{\w+\*?\})$")
_HEADING = re.compile(
    r"^[ \t]*(?:#{1,6}|\*\*)[ \t]*(?:(?:the|my|final)[ \t]+)*(?:answer|result)[ \t]*:?[ \t]*\**[ \t]*\n\s*",
    re.IGNORECASE | re.MULTILINE,
)
_GIVES_UP = re.compile(
    r"\b(?:do not|don['’]?t|did not|didn['’]?t|cannot|can['’]?t|can not|could not|couldn['’]?t|unable to|not able to"
    r"|impossible to|hard to)\s+(?:really\s+|be\s+)?(?:know|known|determined?|solved?|answer(?:ed)?|find|found|figure"
    r"|tell|say|said|sure|certain|compute|calculate|remember|understand)\b"
    r"|\bnot (?:sure|certain|clear)\b|\bno idea\b|\bwho knows\b|\bunclear\b|\bnot enough information\b|\bI give up\b",
    re.IGNORECASE,
)
_REFUSES = re.compile(
    r"\banswers?\s+(?:(?:is|are|was|can|could|should|must|would|may)\s+not|(?:is|are|was|ca|could|should)n['’]t|cannot)"
    r"(?:\s+be)?\s+[^\w\s]*\d[^\s,;]*$"
    r"|\b(?:is|are|was)(?:\s+not|n['’]t)\s+(?:\w+\s+){0,2}?(?:answer|solution|choice|option|correct|right)\b[^\d$\\]*$"
    r"|\b(?:is|are|was)\s+(?:\w+\s+)?(?:wrong|incorrect)\b[^\d$\\]*$",
    re.IGNORECASE,
)
_INSTRUCTION = re.compile(
    r"^(?:please\s+)?(?:find|compute|determine|evaluate|express|enter|simplify|give|round|calculate|solve|convert|factor"
    r"|expand|write|what|how|which|who|when|where|name|list|put|state|suppose|let|assume|prove|show)\b",
    re.IGNORECASE,
)
_PRONOUN = r"(?:it|this|that|which|these|those|they|everything|all(?: of (?:it|this|that))?|he|she|we|I|there|here)"
_OPINION = r"(?:(?:and|so)\s+)?(?:I|we)\s+(?:hope|think|believe|know|trust|am sure|am confident)(?:\s+that)?\s+"
_QUALITY = (
    r"(?:correct|right|true|complete|completed|done|finished|clear|helpful|useful|valid|verified|confirmed|checked|fine"
    r"|good|obvious|simple|easy|unique|reasonable|plausible|consistent|sound|ready|boxed|below|above|as follows"
    r"|as (?:above|required|desired|expected|needed|shown|given)|(?:given|shown|stated|found|explained|written|listed"
    r"|boxed)(?: (?:above|below|here|next))?|in (?:the )?(?:box|boxes|simplest form|lowest terms|dollars|percent)"
    r"|an? (?:(?:positive|negative|whole|real|rational|prime|natural|single|simple)\s+)*"
    r"(?:integer|number|fraction|decimal|percentage|ratio|set|list|pair|interval|polynomial|expression|function))"
)
_MANNER = r"(?:indeed|definitely|certainly|therefore|thus|hence|now|also|all|both|very|quite|completely|already)"
_NOTHING_SAID = re.compile(
    rf"(?:{_OPINION})?{_PRONOUN}"
    rf"|(?:{_MANNER}\s+)*{_QUALITY}(?:,?\s+(?:here|above|below|now|too|as well|for you|to you|and \w+))*"
    r"|(?:obtained|derived|verified|confirmed|checked|based|supported|explained|consistent|due|because|added|computed"
    r"|calculated|reached|found (?:by|from|in|using|through))\s.*",
    re.IGNORECASE | re.DOTALL,
)
_CLOSING = re.compile(
    rf"(?:(?:{_OPINION})?{_PRONOUN}\s+(?:is|was|are)\s+(?:not\s+)?(?:{_MANNER}\s+)*{_QUALITY}(?:\s+\w+)?"
    r"|(?:I |we )?hope\b[^\d$\\]*"
    r"|(?:this|that|it|which|everything|all)\s+(?:works|helps|checks|matches|makes sense)\b[^\d$\\]*"
    r"|(?:that(?:'s| is) (?:it|all)|done|q\.?e\.?d|thanks?|thank you|great|good|well done|let me know|hence proved"
    r"|as (?:required|desired|expected|needed)|verified|checked)\b[^\d$]{0,40})",
    re.IGNORECASE,
)


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences and lines of a text.

    A displayed formula is part of its line; so is what follows a colon, or a heading such as `## Final Answer`.
    """
    text = _DISPLAY.sub(lambda match: match.group().replace("\n", " "), text)
    text = _HEADING.sub("Answer: ", text)
    text = re.sub(r"(:[*\s]*)\n+\s*", r"\1 ", text)
    text = "\n" + text  # "A. 5" on a line of its own is an option
    start, masked = 0, re.sub(MATHS, _mask, text)
    for end in [*_SENTENCE_END.finditer(masked), None]:
        part = text[start : end.start() if end else None].strip()
        start = end.end() if end else start
        if part.strip("-*_=#~. "):
            yield part


def _mask(maths: re.Match[str]) -> str:
    """Return as many signs, the last one telling whether the sentence ends within the mathematics: $x = 5.$"""
    ends = _DELIMITER.sub("", maths.group()).rstrip().endswith((".", "?"))
    return "\0" * (len(maths.group()) - 1) + ("\1" if ends else "\0")


def gives_up(sentence: str) -> bool:
    """Return whether the sentence says that there is no answer to give: I do not know."""
    return _GIVES_UP.search(sentence) is not None


def asks(sentence: str) -> bool:
    """Return whether the sentence is a question or an instruction, as a task has them."""
    return sentence.endswith("?") or is_instruction(sentence)


def is_instruction(sentence: str) -> bool:
    """Return whether the sentence begins as a task does: Find, Let, Which."""
    return _INSTRUCTION.match(sentence) is not None


def is_closing(sentence: str) -> bool:
    """Return whether the sentence only ends a response: This is correct, I hope it helps."""
    return _CLOSING.fullmatch(sentence) is not None


def refuses(sentence: str) -> bool:
    """Return whether the sentence says of a value that it is not the answer, and of none that it is."""
    return _REFUSES.search(sentence) is not None


def says_nothing(value: str) -> bool:
    """Return whether what a sentence says of an answer is no value of it: `correct`, `as follows`, `I hope it`."""
    return _NOTHING_SAID.fullmatch(value) is not None
