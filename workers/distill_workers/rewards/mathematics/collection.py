"""Lists, sets, points and intervals: their brackets and items."""

import re

_WORDS_BETWEEN = re.compile(r"\s*,?\s*\b(?:and|or)\b\s*")
ASSIGNED = re.compile(
    r"^(?:[A-Za-z](?:_\w+)?(?:\([A-Za-z]\))?|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))\s*(?:=(?!=)|\\in\b|\\approx\b)\s*"
)
"""What a value is assigned to: x =, f(x) =, (x, y) =."""
_VARIABLE = re.compile(r"([A-Za-z])(?:_\w+)?\s*=(?!=)")


def is_list(text: str) -> bool:
    found = collection(text)
    return found is not None and found[0] == "list"


def collection(text: str) -> tuple[str, list[str]] | None:
    r"""Return the brackets and the items of a collection; a bare one is a `list`, with \pm as two items.

    None for anything else, also for one item in parentheses.
    """
    text = text.strip()
    if len(parts := _split(text, (r"\cup",))) > 1:
        return "union", parts
    opening = next((o for o in (r"\{", "{", "(", "[") if text.startswith(o)), None)
    closing = next((c for c in (r"\}", "}", ")", "]") if text.endswith(c)), None)
    if opening and closing and _encloses(text, opening, closing):
        items = _split(text[len(opening) : -len(closing)], (",", ";"))
        if opening == r"\{":
            return r"\{\}", _both_signs(items)
        if opening == "{":  # a set in plain text, or one value in braces
            return (r"\{\}", _both_signs(items)) if len(items) > 1 else None
        return (opening + closing, items) if len(items) > 1 else None
    items = _both_signs(_split(_WORDS_BETWEEN.sub(", ", text), (",", ";")))
    return ("list", items) if len(items) > 1 else None


def names_of(items: list[str]) -> list[str]:
    """Return the variables that the items are values of, empty unless each item has its own: x_1 and x_2 are both x."""
    names = [match[1] for item in items if (match := _VARIABLE.match(item))]
    return names if len(set(names)) == len(items) > 1 else []


def in_order(items: list[str], names: list[str]) -> list[str]:
    """Return the values in the order of their variables where these follow each other in the alphabet, as x, y do."""
    if not names:
        return items
    values = [ASSIGNED.sub("", item, count=1) for item in items]
    inorder = sorted(zip(names, values, strict=True))
    follow = ord(inorder[-1][0]) - ord(inorder[0][0]) == len(inorder) - 1
    return [value for _, value in inorder] if follow else values


def _encloses(text: str, opening: str, closing: str) -> bool:
    """Return whether the brackets at both ends belong together, of any two shapes: (2, 3] is an interval."""
    depth = 0
    for position, sign in enumerate(text):
        if sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if depth == 0 and position < len(text) - 1:
                return False
    return depth == 0 and len(text) >= len(opening) + len(closing)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Return the parts of a text between separators that stand in no bracket and no environment."""
    if r"\begin" in text:
        return [text]
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if text[position] in "([{":
            depth += 1
        elif text[position] in ")]}":
            depth -= 1
        found = next((s for s in separators if depth == 0 and text.startswith(s, position)), None)
        if found:
            parts.append(text[start:position])
            position += len(found)
            start = position
        else:
            position += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _both_signs(items: list[str]) -> list[str]:
    signed: list[str] = []
    for item in items:
        if item.count(r"\pm") == 1:
            signed += [item.replace(r"\pm", "+").removeprefix("+").strip(), item.replace(r"\pm", "-")]
        else:
            signed.append(item)
    return signed
