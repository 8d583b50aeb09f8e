"""Sentences from pydantic's errors: which field, what was wrong, what is allowed."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distill_api.base import model_of

_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than": lambda c: f"must be greater than {c['gt']:g}",
    "greater_than_equal": lambda c: f"must be greater than or equal to {c['ge']:g}",
    "less_than": lambda c: f"must be less than {c['lt']:g}",
    "less_than_equal": lambda c: f"must be less than or equal to {_plain(c['le'])}",
}
