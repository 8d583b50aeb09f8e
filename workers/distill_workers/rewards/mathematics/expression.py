"""The mathematical expressions of a text: what stands between delimiters, and plain numbers and operations."""

import re

from distill_workers.rewards.mathematics.notation import canonical
from distill_workers.rewards.mathematics.quantity import quantity_of
from distill_workers.rewards.mathematics.unit import measured_length

_ROWS = r"\{(?:align|aligned|alignat|equation|gather|gathered|eqnarray|multline|split)\*?\}"
MATHS = (
    r"\$\$.{1,2000}?\$\$|(?<![\\\d])\$(?:(?=\S)[^$\n]{1,2000}(?<=\S)|\s[^$\n]{1,2000}\s)\$(?!\d)"
    rf"|\\\(.{{1,2000}}?\\\)|\\\[.{{1,2000}}?\\\]|\\begin{_ROWS}.{{1,2000}}?\\end{_ROWS}"
)
"""Mathematics between its delimiters. Single dollars with a space on one side only are amounts: from $5 to $6."""
_ARGUMENT = r"(?:\{(?:[^{}]|\{[^{}]*\})*\}|\d)"
_NUMBER = (
    r"(?:(?:\\?\$|[€£¥₹])?(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:_\{?\d+\}?)?"
    rf"|\\[dt]?frac\s*{_ARGUMENT}\s*{_ARGUMENT}|\\sqrt\s*{_ARGUMENT}|\\pi\b|π|\\infty\b|∞)\s?(?:\\?%)?"
)
_TERM = rf"(?:[-+−(\[]|\\?\{{){{0,8}}{_NUMBER}(?:\s?(?:{_NUMBER}))*(?:[)\]]|\\?\}})*"
_WITHIN = r",(?=[^()\[\]{}]{0,200}[)\]}])"
"""A comma within brackets: the one of a pair, an interval or a set."""
_PLAIN = rf"(?<![\w.\\]){_TERM}(?:\s*(?:[-+*/×÷^=:−]|{_WITHIN}|\\cdot|\\times|\\div){{1,4}}\s*{_TERM})*"
_ENVIRONMENT = re.compile(rf"\\begin{_ROWS}(.*)\\end{_ROWS}", re.DOTALL)
_NESTED = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
_EXPRESSION = re.compile(rf"(?P<maths>{MATHS})|(?P<plain>{_PLAIN})", re.DOTALL)
_OR = r"\s*(?:[A-Za-z]+\s+){0,2}?[,(]?\s*\bor\b"
_SOFTENED = r"[,\s]*(?:(?:maybe|perhaps|possibly|probably|even|also|else|rather)\b[,\s]*)?"
_JOINED = re.compile(rf"(?:{_OR}|\s*,?\s*\band\b){_SOFTENED}|{_OR}\s*[A-Za-z](?:_\w+)?\s*=\s*")
_VARIABLE_BEFORE = re.compile(r"(?<![A-Za-z])\d*[A-Za-z]\s*[-+−*/^]\s*$")
_VARIABLE_AFTER = re.compile(r"[A-Za-z]|\s*[-+−*/^]\s*(?![aAI]\b)[A-Za-z]\b")
_AFTER_BRACKET = re.compile(r"[)\]}][)\]}\s*/×÷^=:,]*")
_NAME = re.compile(r"^[A-Za-z](?:_\w+)?\s*=")
_LISTED = re.compile(r"\s*[,;]\s*|\s*\bto\s+")


def expressions(text: str) -> list[str]:
    """Return the mathematical expressions of a text, in order, without their delimiters; each with its unit."""
    return [bare(text[start:end]) for start, end in _spans(text)]


def last_expression(text: str) -> str:
    """Return the last expression of a sentence; several that `or` or `and` joins are one list. Empty without any."""
    groups = _groups(text)
    return _as_list(text, groups[-1]) if groups else ""


def expression_in(text: str) -> str:
    """Return the expression that an answer in words is about: the first where it begins with one, else the last.

    Several that a comma, `or` or `and` joins are one list.
    """
    groups = _groups(text)
    if not groups:
        return ""
    return _as_list(text, groups[0] if groups[0][0][0] == 0 else groups[-1])


def is_expression(text: str) -> bool:
    """Return whether the text is one expression and nothing else."""
    return _spans(text) == [(0, len(text))]


def bare(text: str) -> str:
    """Return the text without emphasis, quotes, a final full stop and delimiters of mathematics around it.

    Of the rows of a displayed calculation only the last one remains.
    """
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
        if rows := _ENVIRONMENT.fullmatch(text):
            text = _last_row(rows[1])
    return text


def _last_row(rows: str) -> str:
    masked = _NESTED.sub(lambda match: "\0" * len(match.group()), rows.strip().removesuffix(r"\\").rstrip())
    start = masked.rfind(r"\\") + 2 if r"\\" in masked else 0
    return "".join(
        sign for sign, mask in zip(rows.strip()[start : len(masked)], masked[start:], strict=True) if mask != "&"
    )


def _spans(text: str) -> list[tuple[int, int]]:
    spans = []
    for match in _EXPRESSION.finditer(text):
        start, end = match.span()
        if match["plain"]:
            start, end = _balanced(text, start, start + len(match.group().rstrip()))
        measured = end + measured_length(text[end:])
        if match["plain"]:
            if _VARIABLE_BEFORE.search(text, max(start - 20, 0), start):
                start = max(text.rfind("=", start, end) + 1, start)
                if text[start - 1 : start] != "=":
                    continue  # 3 of x + 3
            if measured == end and _VARIABLE_AFTER.match(text, end):
                continue  # 2 of 2k
        spans.append((start, measured))
    return spans


def _balanced(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the part of the span whose brackets all belong together: 7 of `4) = 7` in f(3, 4) = 7."""
    depth, position = 0, start
    while position < end:
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth >= 0:
            position += 1
        elif (after := _AFTER_BRACKET.match(text, position, end)) and after.end() < end:
            start = position = after.end()
            depth = 0
        else:
            end = position - text.endswith("\\", start, position)
            depth = 0
    while start < end and depth > 0 and text[start] in "([{\\-+−":
        depth -= text[start] in "([{"
        start += 1
    return start, end


def _groups(text: str) -> list[list[tuple[int, int]]]:
    """Return the spans of the expressions, those together that are alternatives or items of one list."""
    groups: list[list[tuple[int, int]]] = []
    for start, end in _spans(text):
        if groups:
            between = text[groups[-1][-1][1] : start]
            # In a sentence a comma may part a condition from its value: "in 2020, 15 came".
            listed = groups[-1][0][0] == 0 and _LISTED.fullmatch(between)
            joined = listed or _JOINED.fullmatch(between)
            if joined and _is_numeric(text[slice(*groups[-1][-1])]) and _is_numeric(text[start:end]):
                groups[-1].append((start, end))
                continue
        groups.append([(start, end)])
    return groups


def _is_numeric(expression: str) -> bool:
    """Return whether an expression has neither variables, but for a name of its value, nor an equation to solve."""
    value = quantity_of(_NAME.sub("", canonical(expression))).value
    return "=" not in value and re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", value)) is None


def _as_list(text: str, spans: list[tuple[int, int]]) -> str:
    return ", ".join(bare(text[start:end]) for start, end in spans)
