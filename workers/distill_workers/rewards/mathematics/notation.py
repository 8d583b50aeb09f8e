"""One way of writing what LaTeX, Unicode and plain text write in several."""

import re
from functools import lru_cache

_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∪": r"\cup ",
        "∅": r"\emptyset ",
        "±": r"\pm ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "\u00a0": " ",
        "\u202f": " ",
    }
)
_DELIMITERS = re.compile(r"\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]|\$")
_DOLLAR = "¤"
"""The sign of an amount, while dollars that delimit mathematics are taken away."""
_AMOUNT = re.compile(r"\$(?=\s*[-−.\d])")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?")
_SPACES = re.compile(r"(?<!\\)\\[!,;: ]|\\(?:quad|qquad|thinspace)(?![A-Za-z])|~")
_TEXTS = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|bf|rm|operatorname\*?)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)")
_MIXED = re.compile(r"(?<![\w.}])(-?)(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}")
_PLAIN_MIXED = re.compile(r"(?<![\w.}/])(-?)(\d+)\s+(\d+)/(\d+)(?![\w/])")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)")
_BRACED = re.compile(r"([_^])\{(\w)\}")
_BRACES_OF_NUMBER = re.compile(r"_\{(\d+)\}")
_EMPTY = re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])")
_NAMES = (
    (re.compile(r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\leq(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\geq(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\{,\}"), ","),
)


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """Return the text without what only places or sizes it: `\\left`, thin spaces, `\\text`, delimiters.

    An amount in dollars keeps its sign, as `\\$`.
    """
    text = text.translate(_SIGNS).replace(r"\$", _DOLLAR)
    if text.count("$") == 1:
        text = _AMOUNT.sub(_DOLLAR, text)
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    text = _SIZES.sub("", _DELIMITERS.sub("", text))
    for _ in range(2):  # \text in \textbf
        text = _TEXTS.sub(r" \1 ", text)
    text = _DEGREES.sub(" degrees ", _EMPTY.sub(r"\\emptyset", text))
    grouped = re.sub(r",\s*\\!\s*", ",", text)
    text = _SPACES.sub(" ", grouped)
    text = re.sub(r"\s+", " ", text).strip()
    if text.endswith(".") or text.endswith(","):
        text = text[:-1].rstrip()
    if not (text.startswith(("(", "[", "{", "\\{")) and text.endswith((")", "]", "}"))):
        text = _THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)
    text = _FRACTION.sub(lambda match: r"\frac" + _braces(match[1]) + _braces(match[2]), text)
    text = _MIXED.sub(r"\1(\2+\\frac{\3}{\4})", text)
    text = _PLAIN_MIXED.sub(r"\1(\2+\\frac{\3}{\4})", text)
    text = _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text)
    return text.replace(_DOLLAR, r"\$")


def compact(text: str) -> str:
    """Return the canonical text without white space, and with `x^{2}` as `x^2`."""
    text = _BRACES_OF_NUMBER.sub(r"_\1", _BRACED.sub(r"\1\2", re.sub(r"\s", "", text)))
    return text.removeprefix("+")


def _braces(part: str) -> str:
    return part if part.startswith("{") else f"{{{part}}}"
