"""Sentences from pydantic's errors: which field, what was wrong, what is allowed."""

from pydantic import ValidationError
from pydantic_core import ErrorDetails


def field_path(location: tuple[int | str, ...]) -> str:
    """spec.evaluation[0].name from ("spec", "evaluation", 0, "name")."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def sentence(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    shown = error["input"]
    where = field_path(error["loc"])
    if isinstance(shown, dict | list) or error["type"] == "missing":
        return f"{where}: {message}"
    return f"{where}: {message} (got {shown!r})"


def sentences(error: ValidationError) -> list[str]:
    return [sentence(e) for e in error.errors(include_url=False, include_context=False)]
