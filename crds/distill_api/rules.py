"""Validation rules beyond the types, each written once: the API server runs their CEL, pydantic their Python.

Both refuse with the same message, so that `kubectl apply` and `distill validate` read the same. What is here is
independent of any model: base.py builds on it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

VALIDATIONS = "x-kubernetes-validations"
LIST_TYPE = "x-kubernetes-list-type"
LIST_MAP_KEYS = "x-kubernetes-list-map-keys"
INT_OR_STRING = "x-kubernetes-int-or-string"
PRESERVE_UNKNOWN = "x-kubernetes-preserve-unknown-fields"


def add_validation(schema: JsonSchemaValue, cel: str, message: str) -> None:
    """Add a CEL rule to a schema, in place."""
    schema.setdefault(VALIDATIONS, []).append({"rule": cel, "message": message})


@dataclass(frozen=True)
class Rule:
    """A validation rule of a value: in a model's `rules`, or in the Annotated of a field.

    `cel` and `holds` must say the same; tests/manifests has a refused manifest for each rule.
    """

    message: str
    cel: str
    holds: Callable[[Any], bool]

    def check(self, value: Any) -> Any:
        """Return the value. Raises ValueError where the rule does not hold."""
        if not self.holds(value):
            raise ValueError(self.message)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        add_validation(json_schema, self.cel, self.message)
        return json_schema


def matching(pattern: str, message: str) -> Rule:
    """Return the rule that a text matches a pattern, with a message that reads better than a regular expression."""
    compiled = re.compile(pattern, re.ASCII)  # as in RE2, \w is ASCII
    return Rule(message, f"self.matches(r'{pattern}')", lambda text: compiled.fullmatch(text) is not None)


WITHOUT_CREDENTIALS = Rule(
    "must have no user:password@ in a URL, which logs and status show; take credentials from a Secret",
    "!self.matches(r'://[^/?#]*@')",
    lambda text: re.search("://[^/?#]*@", text) is None,
)
"""The rule of a text that may be, or contain, a URL."""


@dataclass(frozen=True)
class ListMap:
    """The annotation of a list whose items differ in one field, by which server-side apply merges them."""

    key: str

    def check(self, items: list[Any]) -> list[Any]:
        """Return the items. Raises ValueError where two have the same key."""
        keys = [getattr(item, self.key) for item in items]
        repeated = sorted({k for k in keys if keys.count(k) > 1})
        if repeated:
            raise ValueError(f"duplicate {self.key} {', '.join(repeated)}: each {self.key} may stand once")
        return items

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), LIST_TYPE: "map", LIST_MAP_KEYS: [self.key]}
