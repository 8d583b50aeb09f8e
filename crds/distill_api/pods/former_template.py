"""The template of a role as release 0.2.0 had it, a narrow struct, turned into a PodTemplateSpec.

Stored jobs may still have it; `distill migrate` rewrites manifests.
"""

from collections.abc import Iterator
from typing import Any

from distill_api.base import GROUP
from distill_api.pods.refusals import MAIN

PULL_POLICY = "IfNotPresent"
"""The default of imagePullPolicy, which release 0.2.0 stored in every template."""
OF_METADATA = ("labels", "annotations")
OF_CONTAINER = ("image", "imagePullPolicy", "resources", "env", "volumeMounts")
OF_SPEC = (
    "imagePullSecrets", "volumes", "nodeSelector", "tolerations", "affinity", "serviceAccountName", "priorityClassName",
    "schedulerName", "runtimeClassName",
)  # fmt: skip
FIELDS = (*OF_METADATA, *OF_CONTAINER, *OF_SPEC)
LISTS = ("imagePullSecrets", "env", "volumes", "volumeMounts", "tolerations")
MAPS = ("nodeSelector", "labels", "annotations")


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    """Return the PodTemplateSpec that says what the fields of release 0.2.0 in a template say; empty for none."""
    given = {key: value for key in FIELDS if (value := template.get(key)) not in (None, [], {})}
    if given.get("imagePullPolicy") == PULL_POLICY and "image" not in given:
        # The default did not go before the installation's policy for its own image.
        del given["imagePullPolicy"]
    if resources := given.pop("resources", None):
        given["resources"] = {kind: amounts for kind, amounts in resources.items() if amounts}
    if secrets := given.get("imagePullSecrets"):
        given["imagePullSecrets"] = [{"name": name} for name in secrets]
    container = {key: given[key] for key in OF_CONTAINER if given.get(key)}
    spec = {"containers": [{"name": MAIN, **container}]} if container else {}
    spec |= {key: given[key] for key in OF_SPEC if key in given}
    metadata = {key: given[key] for key in OF_METADATA if key in given}
    return {key: value for key, value in (("metadata", metadata), ("spec", spec)) if value}


def templates(manifest: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and template of each role whose template has fields of release 0.2.0.

    manifest: a DistillationJob, a Teacher, or an object that holds some, such as a List or an AppWrapper.
    """
    if isinstance(manifest, list):
        for number, entry in enumerate(manifest):
            yield from templates(entry, f"{path}[{number}]")
    elif isinstance(manifest, dict):
        ours = str(manifest.get("apiVersion", "")).startswith(f"{GROUP}/")
        yield from _of_roles(manifest.get("spec"), f"{path}.spec".lstrip(".")) if ours else ()
        for key, value in manifest.items() if not ours else ():
            yield from templates(value, f"{path}.{key}".lstrip("."))


def _of_roles(spec: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    parts = spec if isinstance(spec, dict) else {}
    teachers = parts.get("teachers")
    found = [(f"{path}.{part}", parts.get(part)) for part in ("trainer", "rollout", "teacher")]
    found += [(f"{path}.teachers[{n}]", t) for n, t in enumerate(teachers if isinstance(teachers, list) else [])]
    for role, holder in [(path, parts), *found]:
        for field in ("template", "headTemplate"):
            template = holder.get(field) if isinstance(holder, dict) else None
            if isinstance(template, dict) and set(template) & set(FIELDS):
                yield f"{role}.{field}", template
