"""Plain numbers compared exactly: most answers are such, and need no computer algebra."""

import re
from fractions import Fraction
from math import gcd

TOLERANCE = Fraction(101, 10**8)
"""Of a number that is written with decimals, relative below 1 and absolute above: 0.333333 is 1/3, 0.33 is not."""
LONGEST = 400
"""A longer number, in characters, or a larger exponent, is left to math-verify."""

_DECIMAL = re.compile(r"([-+]?)\s*(\d*)(\.\d*)?")
_RATIO = re.compile(r"([-+]?)\s*(?:\\frac\{\s*(-?[\d.]+)\s*\}\{\s*(-?[\d.]+)\s*\}|([\d.]+)\s*/\s*([\d.]+))")
_MIXED = re.compile(r"(-?)\((\d+)\+\\frac\{(\d+)\}\{(\d+)\}\)")
_SCIENTIFIC = re.compile(r"([-+]?[\d.]+)\s*(?:\\cdot|\\times|\*)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")


def number_of(text: str) -> Fraction | None:
    """Return the number that a canonical text is; None for anything but one number or fraction."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    while text.startswith("(") and text.endswith(")") and not _MIXED.fullmatch(text) and "(" not in text[1:]:
        text = text[1:-1].strip()
    try:
        if (match := _DECIMAL.fullmatch(text)) and (match[2] or (match[3] and len(match[3]) > 1)):
            return Fraction(match[1] + (match[2] or "0") + (match[3] or "").rstrip("."))
        if match := _RATIO.fullmatch(text):
            ratio = Fraction(match[2] or match[4]) / Fraction(match[3] or match[5])
            return -ratio if match[1] == "-" else ratio
        if match := _MIXED.fullmatch(text):
            mixed = Fraction(match[2]) + Fraction(int(match[3]), int(match[4]))
            return -mixed if match[1] else mixed
        if (match := _SCIENTIFIC.fullmatch(text)) and abs(int(match[2])) <= LONGEST:
            return Fraction(match[1]) * Fraction(10) ** int(match[2])
    except (ValueError, ZeroDivisionError):
        return None
    return None


def is_value(text: str) -> bool:
    """Return whether a compact text is a fraction in lowest terms or a mixed number, no operation."""
    if match := _MIXED.fullmatch(text):
        return gcd(int(match[3]), int(match[4])) == 1
    match = _RATIO.fullmatch(text)
    if match is None:
        return False
    above, below = (match[2] or match[4]).removeprefix("-"), (match[3] or match[5]).removeprefix("-")
    return above.isdigit() and below.isdigit() and int(below) > 1 and gcd(int(above), int(below)) == 1


def numbers_equal(reference: str, answer: str, reference_percent: bool, answer_percent: bool) -> bool | None:
    """Compare two numbers, each perhaps in percent; None where one of them is no plain number.

    50 % is 50, as the question may ask for percent, and 0.5. 0.5 is 50 %, but 0.5 % only where it is in percent too.
    """
    wanted, given = number_of(reference), number_of(answer)
    if wanted is None or given is None:
        return None
    exact = "." not in reference and "." not in answer
    if reference_percent == answer_percent:
        return _close(wanted, given, exact)
    if reference_percent:
        return _close(wanted, given, exact) or _close(wanted / 100, given, exact)
    return _close(wanted, given / 100, exact) or (abs(wanted) >= 1 and _close(wanted, given, exact))


def _close(wanted: Fraction, given: Fraction, exact: bool) -> bool:
    if exact:
        return wanted == given
    return abs(wanted - given) <= TOLERANCE * min(Fraction(1), abs(wanted))
