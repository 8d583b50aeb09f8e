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
    """Return the one document of a YAML or JSON text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)
