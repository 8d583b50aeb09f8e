"""YAML as the API server reads it, where PyYAML differs."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-6 as a number, and a date as the string that is written."""


_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_manifest(text: str) -> Any:
    """Return the one object of a YAML or JSON text, or its value. Raises yaml.YAMLError, also if there are several."""
    found = read_manifests(text)
    return found[0] if len(found) == 1 else yaml.load(text, Loader=_Loader)


def read_manifests(text: str) -> list[Any]:
    """Return the objects of a YAML or JSON text as kubectl does: of each document that is not empty, and of each List.

    Raises yaml.YAMLError.
    """
    documents = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    return [item for document in documents for item in _items(document)]


def _items(document: Any) -> list[Any]:
    if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
        return list(document["items"])
    return [document]
