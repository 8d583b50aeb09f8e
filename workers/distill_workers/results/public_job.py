"""A job as it may be shown to everybody: what says how the model was made, without where and by whose credentials."""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import yaml

from distill_api.job import DistillationJob

PRIVATE_SPEC = {"pod_template", "scheduling", "tracking", "output", "managed_by", "suspend"}
"""Fields of the spec that say where a run was held and who was told of it."""
PRIVATE_FIELDS = {"podTemplate", "template", "headTemplate", "engineArgs", "keySecret", "secret"}
"""Fields at any depth that may hold a credential, such as an environment variable or an argument with a key, or that
name a Secret."""
SALT = os.urandom(16)
"""Of this process: nobody can try values against a mark."""
FREE_FORM = {"options", "chatTemplateArguments"}
"""Fields whose own fields are the user's, by whatever names."""


def public_yaml(job: DistillationJob) -> str:
    """Return what differs from the defaults of the API, as YAML; without pods, arguments of servers, names of Secrets,
    and what follows the path of a URL."""
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=PRIVATE_SPEC)
    manifest = {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {"name": job.metadata.name},
        "spec": _without_private(spec, None),
    }
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)


def secretive(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a spec with a mark in place of each value that may hold a credential: the same mark for the same value, in
    this process alone."""
    marked: dict[str, Any] = _without_private(spec, _mark)
    return marked


def _without_private(value: Any, mark: Callable[[Any], Any] | None) -> Any:
    """Return a value without what may hold a credential, or with a mark in its place."""
    if isinstance(value, list):
        return [_without_private(item, mark) for item in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key in PRIVATE_FIELDS:
            if mark is not None:
                found[key] = mark(item)
        elif key in FREE_FORM:
            found[key] = item
        elif key == "url" and isinstance(item, str):
            address = urlsplit(item)
            found[key] = address._replace(query="", fragment="").geturl()
            if mark is not None and address.query:
                found["query of url"] = mark(address.query)
        else:
            found[key] = _without_private(item, mark)
    return found


def _mark(value: Any) -> Any:
    if value in (None, [], {}):
        return value
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return f"not shown, {hashlib.blake2b(text, key=SALT, digest_size=3).hexdigest()}"
