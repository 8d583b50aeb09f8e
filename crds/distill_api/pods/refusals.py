"""What a template of pods may not say, as the operator alone may set it; each is refused by name, in one sentence.

The CRD leaves the spec of pods open, so these rules are checked by `distill validate` and by the operator (SpecValid).
"""

import re
from collections.abc import Iterator
from typing import Any

from distill_api import protocol

Json = dict[str, Any]

MAIN = "main"
"""The name by which every template may call the main container of its role."""
TRAINER, TEACHER, ENGINE, HEAD = "trainer", "teacher", "engine", "ray-head"
"""The names of the main containers in the pods."""
ROLES = (TRAINER, TEACHER, ENGINE, HEAD)

POD_FIELDS = {
    "restartPolicy": "an attempt is retried as a whole",
    "activeDeadlineSeconds": "set spec.activeDeadlineSeconds of the job",
    "automountServiceAccountToken": "no pod of a job has a token of a ServiceAccount",
    "serviceAccount": "the name is serviceAccountName",
    "hostname": "the trainer's ranks find each other by the names that the Job gives them",
    "subdomain": "the trainer's ranks find each other by the names that the Job gives them",
    "ephemeralContainers": "`kubectl debug` adds them to a pod that runs",
}
CONTAINER_FIELDS = {
    "command": "it is the operator's; a file of your own goes in by a volume",
    "args": "arguments of SGLang are engineArgs",
    "ports": "Services, probes and metrics know the operator's",
    "terminationMessagePath": "the operator reads there why a pod ended",
    "terminationMessagePolicy": "the operator reads there why a pod ended",
    "restartPolicy": "an attempt is retried as a whole",
}
"""Fields of the main container."""
OWN_VARIABLES = {v.value for v in protocol.Variable} - {protocol.Variable.WANDB_KEY.value} | {
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
}
OWN_VOLUMES = {
    "job": "it is the job's own file",
    "output": "set spec.output.volume",
    **{f"publish-{number}": "it is the Secret of spec.output.publish" for number in range(4)},
}
JOB_FOLDER = protocol.JOB_FILE.rpartition("/")[0]

_LISTS = ("containers", "initContainers", "volumes", "tolerations", "imagePullSecrets", "resourceClaims")
_LISTS_OF_CONTAINER = ("env", "envFrom", "volumeMounts")
_MAPS = ("nodeSelector", "affinity", "securityContext")
_MAPS_OF_CONTAINER = ("resources", "securityContext", "lifecycle")
_AMOUNTS = ("requests", "limits")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?")


def check(spec: Json) -> Json:
    """Return the spec of a pod. Raises ValueError that names everything in it that is refused."""
    found = list(_misshapen("", spec, _LISTS, _MAPS)) or list(_refused(spec))
    if found:
        raise ValueError("; ".join(found))
    return spec


def extra_containers(spec: Json | None) -> list[str]:
    """Return the names of the containers beside the main one."""
    return [c["name"] for c in (spec or {}).get("containers", []) if c["name"] not in (MAIN, *ROLES)]


def named_roles(spec: Json | None) -> list[str]:
    """Return the names of main containers that a spec calls by the name in the pods, not by `main`."""
    return [c["name"] for c in (spec or {}).get("containers", []) if c["name"] in ROLES]


def _misshapen(path: str, part: Json, lists: tuple[str, ...], maps: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence for each list or mapping that is none, so that what follows can read them."""
    for key in lists:
        entries = part.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield f"{path}{key} must be a list of mappings"
        elif path == "" and key.lower().endswith("containers"):
            for number, entry in enumerate(entries):
                if not isinstance(entry.get("name"), str):
                    yield f"{key}[{number}].name must be a string"
                else:
                    at = f"{key}[{entry['name']}]."
                    yield from _misshapen(at, entry, _LISTS_OF_CONTAINER, _MAPS_OF_CONTAINER)
                    if isinstance(entry.get("resources"), dict):
                        yield from _misshapen(f"{at}resources.", entry["resources"], ("claims",), _AMOUNTS)
    for key in maps:
        if not isinstance(part.get(key) or {}, dict):
            yield f"{path}{key} must be a mapping"


def _refused(spec: Json) -> Iterator[str]:
    for name, why in POD_FIELDS.items():
        if name in spec:
            yield f"{name} may not be set: {why}"
    for volume in spec.get("volumes", []):
        if (name := str(volume.get("name"))) in OWN_VOLUMES:
            yield f"volumes[{name}] may not be set: {OWN_VOLUMES[name]}"
    containers = spec.get("containers", [])
    mains = [c["name"] for c in containers if c["name"] in (MAIN, *ROLES)]
    if len(mains) > 1:
        yield f"containers {' and '.join(mains)} are the same one: give it once"
    for container in containers:
        if container["name"] in mains:
            yield from _refused_of_main(container)
    for container in spec.get("initContainers", []):
        if container["name"] in (MAIN, *ROLES):
            yield f"initContainers[{container['name']}] has the name of a main container: give it another"


def _refused_of_main(container: Json) -> Iterator[str]:
    at = f"containers[{container['name']}]"
    for name, why in CONTAINER_FIELDS.items():
        if name in container:
            yield f"{at}.{name} may not be set: {why}"
    for entry in container.get("env", []):
        name = str(entry.get("name", ""))
        if name in OWN_VARIABLES or name.startswith(protocol.TEACHER_KEY):
            yield f"{at}.env[{name}] may not be set: it is between the operator and the workers"
    for mount in container.get("volumeMounts", []):
        path = str(mount.get("mountPath", ""))
        if path.rstrip("/") == JOB_FOLDER or path.startswith(f"{JOB_FOLDER}/"):
            yield f"{at}.volumeMounts[{path}] may not be set: the job's own file is there"
    resources = container.get("resources") or {}
    for kind in _AMOUNTS:
        for name, amount in (resources.get(kind) or {}).items():
            if amount is not None and (isinstance(amount, bool) or not _QUANTITY.fullmatch(str(amount))):
                yield (
                    f"{at}.resources.{kind}.{name} must be a quantity: a number and a unit, such as 500m, 2, 16Gi or "
                    f"1.5G (got {amount!r})"
                )
