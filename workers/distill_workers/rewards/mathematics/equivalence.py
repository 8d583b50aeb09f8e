"""Whether two answers are the same mathematics: lists, pairs, units and texts by our rule, the rest by math-verify.

docs/guides/rewards.md states the same rule for users.
"""

import re
from functools import lru_cache
from typing import Any

from distill_workers.rewards.mathematics.collection import ASSIGNED, collection, in_order, is_list, names_of
from distill_workers.rewards.mathematics.expression import is_expression
from distill_workers.rewards.mathematics.notation import canonical, compact
from distill_workers.rewards.mathematics.number import is_value, numbers_equal
from distill_workers.rewards.mathematics.quantity import (
    MATHS_WORDS,
    Quantity,
    in_words,
    quantity_of,
    same_text,
    units_differ,
)
from distill_workers.rewards.mathematics.unit import is_counted

MATH_SECONDS = 10
"""The longest time that math-verify reads, or compares, an expression."""
LONGEST_ANSWER = 1000
"""A longer answer, in characters, is compared as text only."""
DEEPEST = 6
"""Lists in lists are compared to this depth."""

_CHOICE = re.compile(r"\(?([A-Z])\)?\.?")
_CHOSEN = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?\(?([A-Za-z])\)?[.:)]?|\(([A-Za-z])\)\s(.*)|([A-Za-z])[.:)]\s(.*)", re.DOTALL
)
_ANOTHER_CHOICE = re.compile(r"\([A-Z]\)|\b(?:or|and)\s+\(?[A-Z]\b")
_MARKED = re.compile(r"(?:\([A-Z]\)|[A-Z][.):])\s+")
_FUNCTION = re.compile(r"[A-Za-z]\([A-Za-z]\)=")
_MEASURED = re.compile(r"[\d.]+\s*[A-Za-z]")
_CONSTANTS = MATHS_WORDS | {"e", "i", "j"}
"""Letters and words of mathematics that are no variables."""
_OPERATION = re.compile(r"(?<=.)[-+*/^=]|\\(?:frac|sqrt|cdot|times|div|binom|log|sin|cos|tan)")


def equivalent(reference: str, answer: str) -> bool:
    """Return whether the answer is the reference, each LaTeX or plain text without delimiters around it."""
    return _equivalent(canonical(reference), canonical(answer), 0)


def is_quantity(answer: str) -> bool:
    """Return whether an answer is one value with its unit, which no other reading of it leaves out."""
    quantity = quantity_of(canonical(answer))
    return is_counted(quantity.unit) and is_expression(quantity.value)


def copied(answer: str, question: str, reference: str) -> bool:
    """Return whether an answer is an operation that the question asks for, such as 5 - 9 where the reference is -4.

    What the reference writes alike is an answer all the same, and so is a fraction in lowest terms.
    """
    written = _unsigned(answer)
    if written == _unsigned(reference) or not _OPERATION.search(written) or is_value(written):
        return False
    return re.search(rf"(?<![\d.]){re.escape(written)}(?!\.?\d)", _unsigned(question)) is not None


def _unsigned(text: str) -> str:
    return compact(canonical(text)).replace(r"\$", "")


def _equivalent(reference: str, answer: str, depth: int) -> bool:
    if not reference or not answer:
        return False
    if compact(reference) == compact(answer):
        return True
    if depth > DEEPEST or max(len(reference), len(answer)) > LONGEST_ANSWER:
        return False
    if choice := _CHOICE.fullmatch(reference):
        return _is_choice(choice[1], answer)
    wanted, given = quantity_of(reference), quantity_of(answer)
    if in_words(reference, wanted):
        texts = (answer, _MARKED.sub("", answer, count=1))
        return any(same_text(reference, text) for text in texts) or bool(_same_items(reference, answer, depth))
    if is_list(reference) or is_list(answer):
        return bool(_same_items(reference, answer, depth))
    if units_differ(wanted, given):
        return False
    reference, answer = _without_names(wanted.value, given.value)
    if answer != given.value and not (given.unit or given.percent):
        given = quantity_of(answer)  # the end of a calculation has its own unit: 3 cm + 7 cm = 10 cm
        answer = given.value
        if units_differ(wanted, given):
            return False
    if compact(reference) == compact(answer) and wanted.percent == given.percent:
        return True
    items = _same_items(reference, answer, depth)
    if items is not None:
        return items
    return _same_value(reference, wanted, answer, given)


def _is_choice(letter: str, answer: str) -> bool:
    chosen = _CHOSEN.fullmatch(answer)
    if chosen is None:
        return False
    if _ANOTHER_CHOICE.search(chosen[3] or chosen[5] or ""):
        return False
    found = chosen[1] or chosen[2] or chosen[4]
    # A lower-case letter alone may be a variable; no list of choices goes beyond J.
    return found == letter or (letter <= "J" and found.upper() == letter)


def _without_names(reference: str, answer: str) -> tuple[str, str]:
    """Return both without what they are assigned to (x = 5, x in [1, 2]), where one has it alone or both the same."""
    left, right = ASSIGNED.match(reference), ASSIGNED.match(answer)
    names = {compact(name.group()) for name in (left, right) if name}
    if len(names) > 1 and not ("y=" in names and any(_FUNCTION.fullmatch(name) for name in names)):
        return reference, answer
    if left and (right or "=" not in answer):
        reference = reference[left.end() :]
    if right and (left or "=" not in reference):
        answer = answer[right.end() :]
    if "=" in answer and "=" not in reference:
        # The end of a calculation: 3 + 5 = 8.
        answer = re.split(r"(?<![<>!\\])=", answer)[-1].strip()
    return reference, answer


def _same_items(reference: str, answer: str, depth: int) -> bool | None:
    """Compare two collections item by item; None where the reference is none, or only mathematics can tell."""
    wanted, given = collection(reference), collection(answer)
    if wanted is None and given is None:
        return None
    kind, items = wanted or ("list", [reference])
    other, others = given or ("list", [answer])
    if wanted is None and (other not in ("list", r"\{\}") or len(others) != 1):
        if other == "list" and all(_equivalent(reference, one, depth + 1) for one in others):
            return True  # 3/4 or 0.75
        return False if len(others) > 1 else None
    if "list" in (kind, other) and (named := _same_by_name(kind, items, other, others, depth)) is not None:
        return named
    if kind == other or {kind, other} == {"list", r"\{\}"}:
        ordered = kind not in ("list", r"\{\}", "union")
    elif kind in ("()", "list") and other in ("()", "list"):
        ordered = True  # 1, 2 for the point (1, 2)
    elif kind == "list" and other == "[]" and len(items) != 2:
        ordered = False  # [1, 2, 3] as a program writes a list
    else:
        return False
    if len(items) != len(others):
        return False
    if ordered:
        return all(_equivalent(a, b, depth + 1) for a, b in zip(items, others, strict=True))
    left = list(others)
    for item in items:
        match = next((o for o in left if _equivalent(item, o, depth + 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_by_name(kind: str, items: list[str], other: str, others: list[str], depth: int) -> bool | None:
    """Compare values of different variables, as in x = 1, y = 2, also with a point; None where they have no names."""
    names, given = names_of(items), names_of(others)
    if not (names or given) or (given and not names and kind == "list"):
        return None
    if len(items) != len(others) or not {kind, other} <= {"list", "()"}:
        return False
    if names and given:
        by_name = dict(zip(given, others, strict=True))
        return set(names) == set(given) and all(
            _equivalent(item, by_name[name], depth + 1) for name, item in zip(names, items, strict=True)
        )
    items, others = in_order(items, names), in_order(others, given)
    return all(_equivalent(a, b, depth + 1) for a, b in zip(items, others, strict=True))


def _same_value(reference: str, wanted: Quantity, answer: str, given: Quantity) -> bool:
    """Compare two single values; a percentage is right as the number before the sign, and as the hundredth of it."""
    equal = numbers_equal(reference, answer, wanted.percent, given.percent)
    if equal is not None:
        return equal
    if re.match(r"^[\d:]+$", reference) and ":" in reference:
        return False  # a ratio, or a time of day
    if bool(_variables(reference)) != bool(_variables(answer)):
        return False  # math-verify takes the last variable of 2 \pi h for hours
    if wanted.percent == given.percent or wanted.percent:
        if _verified(reference, answer):
            return True
        return wanted.percent and not given.percent and _verified(rf"\frac{{{reference}}}{{100}}", answer)
    return _verified(reference, rf"\frac{{{answer}}}{{100}}") or _verified(reference, answer)


def _variables(text: str) -> set[str]:
    """Return the variables of an expression, but for a letter after a number alone, which may be a unit: 10m."""
    if _MEASURED.fullmatch(text):
        return set()
    return set(re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", " ", text))) - _CONSTANTS


def _verified(reference: str, answer: str) -> bool:
    from math_verify import verify

    wanted, given = _parsed(reference), _parsed(answer)
    if not wanted or not given:
        return False
    return bool(verify(wanted, given, timeout_seconds=MATH_SECONDS))


@lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[Any, ...] | list[Any]:
    """Return what math-verify reads; the responses to one prompt share its reference."""
    from math_verify import LatexExtractionConfig, parse

    found: list[Any] = parse(rf"\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=MATH_SECONDS)
    return found
