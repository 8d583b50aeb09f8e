"""Tools: the schemas of OpenAI's API that a job gives to its student, in a JSON file."""

import json
import re
from pathlib import Path
from typing import Any

from distill_workers.failures import ConfigurationError

Tool = dict[str, Any]
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
EXAMPLE = '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]'


def read_tools(path: str) -> list[Tool]:
    """Return the tools in a file. Raises ConfigurationError for one that has none, or has what is no schema."""
    where = f"rollout.environment.tools {path}"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{where}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where}: is no JSON: {error}") from None
    if not isinstance(found, list) or not found:
        raise ConfigurationError(f"{where}: is no list of tools; it must be such as {EXAMPLE}")
    names: set[str] = set()
    for number, tool in enumerate(found, start=1):
        if wrong := what_is_wrong(tool):
            raise ConfigurationError(f"{where}: tool {number} {wrong}; a tool is such as {EXAMPLE}")
        name = tool["function"]["name"]
        if name in names:
            raise ConfigurationError(f"{where}: tool {number} has the name of another, {name}")
        names.add(name)
    return found


def what_is_wrong(tool: Any) -> str:
    """Return what keeps a value from being a tool, as the end of a sentence; empty where nothing does."""
    if not isinstance(tool, dict):
        return "is no object"
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        return 'is not {"type": "function", "function": {…}}'
    name = function.get("name")
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        return "has no name of letters, digits, _ and -, of at most 64 characters"
    if not isinstance(function.get("description", ""), str):
        return f"({name}) has a description that is no text"
    parameters = function.get("parameters", {})
    # Without any, OpenAI's API takes a function for one that has no parameters.
    if not isinstance(parameters, dict) or (parameters and parameters.get("type") != "object"):
        return f'({name}) has parameters that are no JSON schema of the type "object"'
    properties = parameters.get("properties", {})
    if not isinstance(properties, dict) or not all(isinstance(value, dict) for value in properties.values()):
        return f"({name}) has properties that are no schemas by name"
    return ""
