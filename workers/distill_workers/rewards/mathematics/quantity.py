"""A value with its unit, and answers that are texts."""

import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Quantity:
    """A canonical answer in parts: its value, the words after it, and whether it is in percent."""

    value: str
    unit: str
    percent: bool


_UNIT_NAMES = {
    "cm": "centimeter centimetre cm",
    "mm": "millimeter millimetre mm",
    "m": "meter metre m",
    "km": "kilometer kilometre km",
    "in": "inch inches inche in",
    "ft": "foot feet ft",
    "yd": "yard yd",
    "mi": "mile mi",
    "g": "gram g",
    "kg": "kilogram kg",
    "mg": "milligram mg",
    "lb": "pound lb",
    "oz": "ounce oz",
    "t": "ton tonne",
    "s": "second sec s",
    "min": "minute min",
    "h": "hour hr h",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "l": "liter litre l",
    "ml": "milliliter millilitre ml",
    "degree": "degree deg",
    "radian": "radian rad",
    "dollar": "dollar usd buck",
    "cent": "cent",
    "mph": "mph",
    "am": "am",
    "pm": "pm",
    "newton": "newton n",
    "joule": "joule j",
    "watt": "watt w",
    "volt": "volt v",
    "dozen": "dozen",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MONTHS = re.compile(
    r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b", re.IGNORECASE
)
_MATHS_WORDS = frozenset(
    word
    for words in (
        "sin cos tan cot sec csc",
        "arcsin arccos arctan sinh cosh tanh log ln lg exp pi sqrt mod gcd lcm max min inf sup gamma",
        "lim det infty infinity and or in cup cap pmatrix bmatrix vmatrix matrix begin end array theta alpha beta",
    )
    for word in words.split()
)
_WITH_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]%])(?P<space>\s*)"
    r"(?P<unit>[A-Za-z][A-Za-z.']*(?:(?:\s+|\s*/\s*|-)[A-Za-z][A-Za-z.']*)*)\s*(?:\^\s*\{?\s*\d\s*\}?)?",
    re.DOTALL,
)
_COMMANDS = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")


@lru_cache(maxsize=4096)
def quantity_of(text: str) -> Quantity:
    """Return the parts of a canonical answer: 10 cm, 18 dollars per day, 50\\%, 2 million, 90 degrees."""
    unit = ""
    if match := _WITH_UNIT.fullmatch(text):
        words = match["unit"].split()
        known = _unit(match["unit"]) is not None
        stuck = not match["space"] and not known
        maths = words[0].lower() in _MATHS_WORDS and not known
        single = len(words[0]) == 1 and not (known and match["space"])
        if not (stuck or maths or single or _MONTHS.search(match["unit"]) or is_text(match["value"])):
            text, unit = match["value"].strip(), match["unit"]
            if words[0].lower() in _SCALES:
                text = rf"{text} \cdot 10^{{{_SCALES[words[0].lower()]}}}"
                unit = " ".join(words[1:])
    percent = unit.lower() in ("percent", "percentage", "pct", "per cent")
    bare = re.sub(r"\\?%\s*$", "", text)
    if bare != text:
        text, percent = bare.strip(), True
    return Quantity(text, "" if percent else unit, percent)


def units_differ(one: Quantity, other: Quantity) -> bool:
    """Return whether both have a unit of measure, and not the same: 10 cm is not 10 mm, but 10 is 10 cm."""
    first, second = _unit(one.unit), _unit(other.unit)
    return first is not None and second is not None and first != second


def is_text(text: str) -> bool:
    """Return whether a canonical answer is words rather than mathematics: Friday, no solution, June 20."""
    words = [word for word in _WORD.findall(_COMMANDS.sub(" ", text)) if word.lower() not in _MATHS_WORDS]
    if not words:
        return False
    letters = re.sub(r"[^A-Za-z]", "", text)
    # ab and 2xy are products of variables; so are no words of four letters.
    return any(len(word) >= 4 for word in words) or letters == re.sub(r"[\s.,]", "", text)


def same_text(reference: str, answer: str) -> bool:
    """Compare two texts without regard to case, articles, punctuation and white space."""
    return _plain(reference) == _plain(answer)


def _plain(text: str) -> str:
    text = re.sub(r"[^\w\s+\-*/^=<>.%]|\.(?!\d)", " ", text.casefold())
    return " ".join(word for word in text.split() if word not in ("the", "a", "an"))


def _unit(words: str) -> str | None:
    if not words:
        return None
    first = words.split()[0].replace(".", "").lower()
    if first in ("square", "cubic") and len(words.split()) > 1:
        first = words.split()[1].replace(".", "").lower()
    return _UNITS.get(first) or _UNITS.get(first.removesuffix("s"))
