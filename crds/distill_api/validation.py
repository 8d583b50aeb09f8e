"""Messages for people from pydantic's errors: which field, what is wrong, what is allowed."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Context = Mapping[str, Any]
Location = tuple[int | str, ...]

_MESSAGES: dict[str, Callable[[Context], str]] = {
    "missing": lambda _: "required value is missing",
    "bool_type": lambda _: "must be true or false",
    "int_type": lambda _: "must be an integer",
    "int_from_float": lambda _: "must be an integer",
    "float_type": lambda _: "must be a number",
    "string_type": lambda _: "must be a string; put it in quotes",
    "list_type": lambda _: "must be a list",
    "dict_type": lambda _: "must be a mapping",
    "model_type": lambda _: "must be a mapping",
    "model_attributes_type": lambda _: "must be a mapping",
    "string_too_long": lambda context: f"must be at most {context['max_length']} characters long",
    "string_too_short": lambda context: f"must be at least {context['min_length']} characters long",
    "too_long": lambda context: f"must have at most {context['max_length']} entries",
}


def field_path(location: Location) -> str:
    """Return spec.evaluation[0].name for ("spec", "evaluation", 0, "name")."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _fields_at(root: type[BaseModel], location: Location) -> list[str]:
    """Return the names, as in a manifest, of the fields of the model at a location."""
    model = root
    for part in location:
        if isinstance(part, str):
            field = next((f for n, f in model.model_fields.items() if (f.alias or n) == part), None)
            inner = _models_in(field.annotation) if field else []
            if not inner:
                return []
            model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown(root: type[BaseModel], location: Location) -> str:
    """Return the message for an unknown field, with the nearest field that exists, else all of them."""
    *parents, name = location
    allowed = _fields_at(root, tuple(parents))
    near = get_close_matches(str(name), allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(allowed)}"
    return f'unknown field "{field_path(location)}": {hint}'


def sentence(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Return the message for an error in reading the model `root`."""
    kind, where, shown = error["type"], field_path(error["loc"]), error["input"]
    if kind == "extra_forbidden":
        return _unknown(root, error["loc"])
    if kind in _MESSAGES:
        message = _MESSAGES[kind](error.get("ctx", {}))
    else:
        message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    got = "" if isinstance(shown, dict | list | BaseModel) else f" (got {shown!r})"
    return f"{where}: {message}{got}"


def sentences(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a message for each error in reading the model `root`."""
    return [sentence(e, root) for e in error.errors(include_url=False)]
