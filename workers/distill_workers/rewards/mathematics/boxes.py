r"""The boxes of a response: \\boxed{...} and \\fbox{...}."""

import re
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\w\\-])")


@dataclass(frozen=True, slots=True)
class Box:
    """One box of a text; `content` is None where it is not closed."""

    content: str | None
    start: int
    end: int


def boxes(text: str) -> list[Box]:
    """Return the boxes of the text that stand in no other box, in order."""
    found: list[Box] = []
    position = 0
    while match := _BOX.search(text, position):
        begin = match.end()
        if text[begin] != "{":
            end = begin + 1
            content: str | None = text[begin:end]
            if one := re.match(r"-?[\w.]+|\\\w+", text[begin:]):
                content, end = one.group(), begin + one.end()
        else:
            close = _closing_brace(text, begin)
            content, end = (None, len(text)) if close is None else (text[begin + 1 : close], close + 1)
        found.append(Box(content, match.start(), end))
        position = end
    return found


def _closing_brace(text: str, opening: int) -> int | None:
    depth, escaped = 0, False
    for position in range(opening, len(text)):
        sign = text[position]
        if escaped:
            escaped = False
        elif sign == "\\":
            escaped = True
        elif sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if depth == 0:
                return position
    return None
