"""A value with its unit, and answers that are texts."""

import re
from dataclasses import dataclass
from functools import lru_cache

from distill_workers.rewards.mathematics import unit
from distill_workers.rewards.mathematics.unit import CURRENCIES, SCALES, is_sentence, unit_of


@dataclass(frozen=True, slots=True)
class Quantity:
    """A canonical answer in parts: its value, the words after it, and whether it is in percent."""

    value: str
    unit: str
    percent: bool


_MONTHS = re.compile(
    r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b", re.IGNORECASE
)
MATHS_WORDS = frozenset(
    word
    for words in (
        "sin cos tan cot sec csc",
        "arcsin arccos arctan sinh cosh tanh log ln lg exp pi sqrt mod gcd lcm max min inf sup gamma",
        "lim det infty infinity and or in cup cap pmatrix bmatrix vmatrix matrix begin end array theta alpha beta",
    )
    for word in words.split()
)
"""Words that mathematics writes as words."""
_NAME = r"[A-Za-z][A-Za-z.']*(?:\s*\^\s*\{?\s*\d\s*\}?)?"
_WITH_UNIT = re.compile(
    rf"(?P<value>.*(?:[\d)}}\]%]|\\pi(?=\s+[A-Za-z]{{2}})))(?P<space>\s*)(?P<unit>{_NAME}(?:(?:\s+|\s*/\s*|-){_NAME})*)",
    re.DOTALL,
)
_MONEY = re.compile("|".join(re.escape(sign) for sign in CURRENCIES))
_PERCENT = re.compile(r"(?:percent|percentage|pct|per cent)\b\s*", re.IGNORECASE)
_COMMANDS = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")


@lru_cache(maxsize=4096)
def quantity_of(text: str) -> Quantity:
    """Return the parts of a canonical answer: 10 cm, 18 dollars per day, 50\\%, 2 million, 90 degrees."""
    money = _MONEY.search(text)
    text, words = _MONEY.sub("", text).strip(), ""
    if match := _WITH_UNIT.fullmatch(text):
        first, *others = match["unit"].split()
        name = re.split(r"[\^/.-]", first)[0].lower()
        known = unit_of(match["unit"]) is not None
        stuck = not known and (not match["space"] or match["value"].endswith("pi"))  # 2 \pi rh is a product
        maths = name in MATHS_WORDS - {"in"} and not known
        single = len(name) == 1 and not (known and match["space"])
        if not (stuck or maths or single or _MONTHS.search(match["unit"]) or is_text(match["value"])):
            text, words = match["value"].strip(), match["unit"]
            if name in SCALES:
                text, words = rf"{text} \cdot 10^{{{SCALES[name]}}}", " ".join(others)
    percent = _PERCENT.match(words) is not None
    bare = re.sub(r"\\?%\s*$", "", text)
    if bare != text:
        text, percent = bare.strip(), True
    if money and (unit_of(words) is None):
        words = f"{CURRENCIES[money.group()]} {words}".strip()
    return Quantity(text, _PERCENT.sub("", words, count=1), percent)


def units_differ(one: Quantity, other: Quantity) -> bool:
    """Return whether both have a unit, and not the same: 10 cm is not 10 mm, 5 % not 5 dollars, but 10 is 10 cm."""
    if one.percent != other.percent:
        return unit_of((other if one.percent else one).unit) is not None
    return unit.units_differ(one.unit, other.unit)


def in_words(text: str, quantity: Quantity) -> bool:
    """Return whether a canonical answer, of the given parts, is words: Friday, 20 June, but not 20 apples."""
    return is_text(quantity.value) or (is_text(text) and not quantity.percent and is_sentence(quantity.unit))


def is_text(text: str) -> bool:
    """Return whether a canonical text is words rather than mathematics: Friday, no solution, June 20."""
    words = [word for word in _WORD.findall(_COMMANDS.sub(" ", text)) if word.lower() not in MATHS_WORDS]
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
