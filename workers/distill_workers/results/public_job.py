"""A job as it may be shown to everybody: what says how the model was made, without where and by whose credentials."""

from typing import Any
from urllib.parse import urlsplit

import yaml

from distill_api.job import DistillationJob

PRIVATE_SPEC = {"pod_template", "scheduling", "tracking", "output", "managed_by", "suspend"}
"""Fields of the spec that say where a run was held and who was told of it."""
PRIVATE_FIELDS = {"template", "headTemplate", "engineArgs", "keySecret"}
"""Fields at any depth that may hold a credential, such as an environment variable or an argument with a key, or that
name a Secret."""
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
        "spec": _public(spec),
    }
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: item if key in FREE_FORM else _without_query(item) if key == "url" else _public(item)
        for key, item in value.items()
        if key not in PRIVATE_FIELDS
    }


def _without_query(url: str) -> str:
    return urlsplit(url)._replace(query="", fragment="").geturl()
