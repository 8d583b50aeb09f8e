"""`distill run --set spec.schedule.steps=10`: single values of a manifest, changed before it is validated.

A path has the names that the manifest has, and items of a list by their name or number:
spec.evaluation.math500.maxPrompts, spec.evaluation[0].maxPrompts. A value is read as YAML.
"""

import copy
import re
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from distill_api.job import DistillationJob
from distill_api.manifest import read_manifest

ROOTS = ("metadata", "spec")
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


class BadOverride(ValueError):
    """Raised for a --set that names no field of a job, with what was written and what is allowed there."""


def with_overrides(manifest: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Return the manifest with each PATH=VALUE set, in their order.

    Raises BadOverride for a path that does not exist; values are left to validation.
    """
    changed = copy.deepcopy(manifest)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise BadOverride(f"--set {setting}: has no value; write PATH=VALUE, such as spec.schedule.steps=10")
        try:
            value = read_manifest(text)
        except yaml.YAMLError as error:
            raise BadOverride(f"--set {setting}: the value is not YAML: {' '.join(str(error).split())}") from None
        _set(changed, parts_of(path), value, setting)
    return changed


def parts_of(path: str) -> list[str]:
    """Return ["spec", "evaluation", "0", "name"] of the path spec.evaluation[0].name. Raises BadOverride."""
    parts = [name or number for name, number in _PART.findall(path)]
    rebuilt = _PART.sub("", path)
    if not parts or rebuilt.strip("."):
        raise BadOverride(f"--set {path}: is no path; write names with dots between, such as spec.schedule.steps")
    return parts


def _set(manifest: dict[str, Any], parts: list[str], value: Any, setting: str) -> None:
    """Set a value by walking down the manifest and the models side by side: the models know which fields exist."""
    node: Any = manifest
    model: Any = DistillationJob
    so_far = ""
    for depth, part in enumerate(parts):
        where, last = so_far or "the manifest", depth == len(parts) - 1
        if isinstance(model, type) and issubclass(model, BaseModel):
            allowed = list(ROOTS) if model is DistillationJob else [f.alias or n for n, f in model.model_fields.items()]
            if part not in allowed:
                raise BadOverride(f"--set {setting}: {where} has no field {part}; {nearest(part, allowed)}")
            model = next(f.annotation for n, f in model.model_fields.items() if (f.alias or n) == part)
            model = _shape(model)
        elif get_origin(model) is list:
            part = _item(node, part, where, setting)
            model = _shape(get_args(model)[0])
        elif get_origin(model) is dict or model is Any:
            model = _shape(get_args(model)[1]) if get_origin(model) is dict else Any
        else:
            raise BadOverride(f"--set {setting}: {where} is a single value and has no field {part}")
        so_far = f"{so_far}.{part}" if so_far else part
        key: Any = int(part) if isinstance(node, list) else part
        if last:
            node[key] = value
            return
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = [] if get_origin(model) is list else {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise BadOverride(f"--set {setting}: {so_far} is a single value and has no field {parts[depth + 1]}")


def _item(items: Any, part: str, where: str, setting: str) -> str:
    """Return the index of an existing item of a list, from its index or its name. Raises BadOverride."""
    names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
    if part in names:
        return str(names.index(part))
    if part.isdigit() and int(part) < len(items):
        return part
    named = [name for name in names if name]
    if not items:
        raise BadOverride(f"--set {setting}: {where} has no items; set the whole list, as {where}=[...]")
    hint = nearest(part, named) if named else f"allowed are 0 to {len(items) - 1}"
    raise BadOverride(f"--set {setting}: {where} has no item {part}; {hint}")


def _shape(annotation: Any) -> Any:
    """Return the model, list[...] or dict[...] of an annotation, without bounds and None; else the annotation."""
    options = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) in (list, dict) or not options:
        return annotation
    return _shape(options[0])


def nearest(word: str, allowed: list[str]) -> str:
    """Return a hint: the names that are nearest to a misspelt one, else all that are allowed."""
    near = get_close_matches(word, allowed, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"allowed are {', '.join(allowed)}"
