"""Strategic merge of a patch over an object, as kubectl and kustomize merge pods. Pure.

Mappings are merged, scalars replaced, null removes. Lists of named things are merged by their key, others replaced, but
for tolerations, envFrom and readinessGates, whose new entries are appended: no template takes away what another needs.
The keys are those of `patchMergeKey` in Kubernetes' API (k8s.io/api/core/v1/types.go).
"""

from typing import Any

KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "protocol"),
    "imagePullSecrets": ("name",),
    "hostAliases": ("ip",),
    "resourceClaims": ("name",),
    "claims": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "schedulingGates": ("name",),
}
"""The keys by which the entries of a list are the same thing, by the name of the list."""
APPENDED = ("tolerations", "envFrom", "readinessGates")
ONE_OF = ("volumes", "resourceClaims", "env")
"""Lists whose entries hold one of several sources: what the patch does not name is dropped from an entry."""
REPLACED = ("valueFrom",)
"""Mappings that hold one of several sources."""


def merged(base: Any, patch: Any, field: str = "") -> Any:
    """Return a patch over a value; neither is changed. `field` is the name of the field that holds both."""
    if isinstance(patch, dict) and field not in REPLACED:
        found = dict(base) if isinstance(base, dict) else {}
        for key, value in patch.items():
            if value is None:
                found.pop(key, None)
            else:
                found[key] = merged(found.get(key), value, key)
        return found
    if isinstance(patch, list) and (field in KEYS or field in APPENDED):
        return _merged_list(base if isinstance(base, list) else [], patch, field)
    return patch


def _merged_list(base: list[Any], patch: list[Any], field: str) -> list[Any]:
    found = list(base)
    for entry in patch:
        at = _position(found, entry, KEYS.get(field, ()))
        if at is None:
            found.append(merged(None, entry))
        elif field in ONE_OF:
            kept = {key: value for key, value in found[at].items() if key in entry}
            found[at] = merged(kept, entry)
        else:
            found[at] = merged(found[at], entry)
    return found


def _position(entries: list[Any], entry: Any, keys: tuple[str, ...]) -> int | None:
    """Return where the same thing is: of the same keys, or equal where it has none of them."""
    if not isinstance(entry, dict) or not keys or keys[0] not in entry:
        return entries.index(entry) if entry in entries else None
    wanted = [entry.get(key) for key in keys]
    same = (n for n, e in enumerate(entries) if isinstance(e, dict) and [e.get(key) for key in keys] == wanted)
    return next(same, None)
