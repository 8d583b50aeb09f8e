"""Units of measure, and other words that say what a number counts."""

import re
from dataclasses import dataclass
from functools import lru_cache

CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
"""Signs before an amount, as canonical text has them."""
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Words after a number, and the powers of ten that they multiply it by."""
_NAMES = {
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
    "pound": "pound lb",
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
    "celsius": "celsius",
    "fahrenheit": "fahrenheit",
    "radian": "radian rad",
    "dollar": "dollar usd buck",
    "cent": "cent",
    "euro": "euro eur",
    "yen": "yen",
    "rupee": "rupee",
    "mph": "mph",
    "kph": "kph",
    "am": "am",
    "pm": "pm",
    "newton": "newton n",
    "joule": "joule j",
    "watt": "watt w",
    "volt": "volt v",
    "dozen": "dozen",
}
_UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_RATES = {"mph": ("mi", "h^1"), "kph": ("km", "h^1")}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_DEGREES = {"c": "celsius", "celsius": "celsius", "f": "fahrenheit", "fahrenheit": "fahrenheit"}
_PER = re.compile(r"\s*/\s*|(?:^|\s+)(?:per|an?|each|every)\s+")
_POWER = re.compile(r"\s*\^\s*\{?\s*(\d)\s*\}?")
_SENTENCE = re.compile(
    r"\b(?:is|are|was|were|be|of|and|or|to|than|the|at|by|no|not|with|for|on|from|that|which|this|it|as|because|so|if"
    r"|when|in|times|more|less)\b",
    re.IGNORECASE,
)
"""Words of a sentence: what has one is no name of what is counted."""
_NO_UNIT = ("total", "altogether", "overall", "left", "remaining", "unit", "units", "exactly", "approximately", "about")
_SCALE = re.compile(rf"\s?(?:{'|'.join(SCALES)})\b")
_AFTER_NUMBER = re.compile(
    r"\s?(?P<unit>(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?P<name>[A-Za-z]+)(?:\^\{?\d\}?|[²³])?"
    r"(?:(?:\s*/\s*|\s+(?:per|an?|each|every)\s+)(?P<per>[A-Za-z]+)(?:\^\{?\d\}?|[²³])?)?)(?![\w'])"
)
_ENDS = re.compile(r"\s*(?:[.,;:!?)]|$)")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measure: its name and power, and what it is taken by (`h^1` of km/h; empty for none)."""

    name: str
    power: int
    per: str


@lru_cache(maxsize=4096)
def unit_of(words: str) -> Unit | None:
    """Return the unit of measure among the words after a number; None where we know none."""
    parts = _PER.split(words.lower().replace(".", ""), maxsplit=1)
    per = _per(parts[1]) if len(parts) > 1 else ""
    power = 1
    numerator = parts[0]
    if match := _POWER.search(numerator):
        power, numerator = int(match[1]), _POWER.sub("", numerator)
    found = numerator.replace("-", " ").split()
    for position, word in enumerate(found):
        power = _POWERS.get(word, power)
        last = position == len(found) - 1
        # "10 in total" are no inches, and the letters of a later word no metres.
        if word == "of" or (word == "in" and not last) or (len(word) == 1 and position and found[0] not in _POWERS):
            break
        if not (name := _name(word)):
            continue
        if name in _RATES:
            name, per = _RATES[name]
        if name == "degree" and not last:
            name = _DEGREES.get(found[position + 1], name)
        if not last:
            power = _POWERS.get(found[position + 1], power)
        return Unit(name, power, per)
    return None


def is_counted(words: str) -> bool:
    """Return whether the words after a number name what it counts, known to us or not: cm, apples, red apples."""
    return unit_of(words) is not None or (bool(_counted(words)) and not is_sentence(words))


def is_sentence(words: str) -> bool:
    """Return whether the words after a number say more than what it counts: `is even`, but not `apples` or `total`."""
    return unit_of(words) is None and (len(_counted(words)) > 2 or _SENTENCE.search(words) is not None)


def units_differ(one: str, other: str) -> bool:
    """Return whether both words name something, and not the same: 10 cm is not 10 mm, but 10 is 10 cm."""
    if not is_counted(one) or not is_counted(other):
        return False
    first, second = unit_of(one), unit_of(other)
    if first is None or second is None:
        return first is not second or not _counted(one) & _counted(other)
    names = {first.name, second.name}
    if len(names) > 1 and names not in ({"degree", "celsius"}, {"degree", "fahrenheit"}):
        return True
    if first.name in CURRENCIES.values() and not (first.per and second.per):
        return False  # $18 for 18 dollars per day
    return first.power != second.power or first.per != second.per


def measured_length(text: str) -> int:
    """Return how many characters of the text after a number are its scale (million) and a unit that we know."""
    scale = match.end() if (match := _SCALE.match(text)) else 0
    match = _AFTER_NUMBER.match(text, scale)
    if match is None or not _name(match["name"].lower()):
        return scale
    if match["per"] and not _name(match["per"].lower()):
        return match.end("name")
    # "5 in all", "7 a day" and "10 m long": short words are units at an end only.
    if (len(match["name"]) == 1 or match["name"].lower() == "in") and not _ENDS.match(text, match.end()):
        return scale
    return match.end()


def _name(word: str) -> str:
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or ""


def _per(words: str) -> str:
    power = match[1] if (match := _POWER.search(words)) else "1"
    first, *others = _POWER.sub("", words).split() or [""]
    power = str(_POWERS.get(others[0], power)) if others else power
    return f"{_name(first)}^{power}" if _name(first) else ""


def _counted(words: str) -> set[str]:
    numerator = _PER.split(words.lower(), maxsplit=1)[0]
    return {word.removesuffix("s") for word in re.findall(r"[a-z']+", numerator) if word not in _NO_UNIT}
