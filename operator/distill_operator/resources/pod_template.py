"""The pod template that all roles have in common: security context, mounts of the contract, the user's overrides.

The root file system is read-only; /tmp, with HOME in it, is all that SGLang, Ray and Megatron need to write to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_api import accelerator_environment, names, protocol
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.pods import refusals
from distill_api.pods.agreement import main_environment
from distill_api.pods.refusals import MAIN
from distill_api.pods.template import PodTemplate, main_containers
from distill_api.teacher.kind import Teacher
from distill_operator.resources.strategic_merge import merged
from distill_operator.settings import Settings

Json = dict[str, Any]
Owner = DistillationJob | Teacher
"""The object that children are made for."""

USER = 1000
"""uid, gid and fsGroup of every pod."""
KEY_ENTRY = "key"
"""Entry of the Secret that holds the key (secret.py)."""
CPU_REQUESTS = {"cpu": "100m", "memory": "1Gi"}
"""Requests of a pod without accelerators: for a small model on a small machine; a template sizes anything larger."""
STOP_DELAY_SECONDS = 2
"""Time between a deletion and SIGTERM, which a container's first process never receives before it has a handler, and
would live on for its grace period. It is an exec, since the `sleep` of a hook needs Kubernetes 1.30."""
ACCELERATOR_CPU, ACCELERATOR_MEMORY_GIB = 2, 16
"""Requests per accelerator. There are no limits by default: an estimate must not end a pod that the node could hold."""


@dataclass(frozen=True)
class Container:
    """The main container of a role: what differs from the others'."""

    name: str
    command: Sequence[str] = ()
    ports: Sequence[tuple[str, int]] = ()
    environment: Sequence[Json] = ()
    accelerators: int = 0
    """Accelerators of one pod; ignored in the CPU mode."""
    accelerator: str | None = None
    """Their resource name, where it is not that of the owner's spec."""
    probes: Json = field(default_factory=dict)
    needs_output: bool = False
    secrets: Sequence[str] = ()
    """Secrets mounted in protocol.SECRETS_FOLDER. A missing one is an empty folder: the preflight says so at once."""
    needs_shared_memory: bool = False
    """Whether NCCL needs a /dev/shm above the runtime's 64 MB. KubeRay gives one to its pods by itself."""
    grace_seconds: int = 30
    handles_signals: bool = False
    """Whether the command handles SIGTERM: it has STOP_DELAY_SECONDS to begin to, out of the grace period."""


def metadata(owner: Owner, name: str, role: Role | None = None, attempt: int | None = None) -> Json:
    """Return the metadata of a child.

    Labels of the owner are never copied: Kueue would take the child for a job of its own.
    """
    return {
        "name": name,
        "namespace": owner.metadata.namespace,
        "labels": labels(owner, role, attempt),
        "ownerReferences": [
            {
                "apiVersion": owner.api_version,
                "kind": owner.kind,
                "name": owner.metadata.name,
                "uid": owner.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def labels(owner: Owner, role: Role | None = None, attempt: int | None = None) -> dict[str, str]:
    """Return the labels of a child."""
    found = {
        names.LABEL_PART_OF: names.PART_OF,
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        _owner_label(owner): owner.metadata.name,
    }
    if role is not None:
        found[names.LABEL_ROLE] = role.value
    if attempt is not None:
        found[names.LABEL_ATTEMPT] = str(attempt)
    return found


def pod_labels(owner: Owner, role: Role, attempt: int | None = None) -> dict[str, str]:
    """Return the labels of a pod: those of a child, and which object of the owner's name the owner is."""
    return {**labels(owner, role, attempt), names.LABEL_OWNER_UID: owner.metadata.uid}


def selector(owner: Owner, role: Role) -> dict[str, str]:
    """Return the labels that select the pods of one role of one owner."""
    return {_owner_label(owner): owner.metadata.name, names.LABEL_ROLE: role.value}


def _owner_label(owner: Owner) -> str:
    return names.LABEL_JOB if isinstance(owner, DistillationJob) else names.LABEL_SHARED_TEACHER


def pod_template(
    job: Owner,
    settings: Settings,
    template: PodTemplate,
    container: Container,
    own_labels: dict[str, str],
    *,
    metrics_port: int,
    **pod_fields: Any,
) -> Json:
    """Return a PodTemplateSpec that Pod Security `restricted` admits, with the user's templates merged over it."""
    patches = [_named(patch, container.name) for patch in user_patches(job, template)]
    found = _own_template(job, settings, patches, container, metrics_port, pod_fields)
    for patch in patches:
        found = merged(found, patch)
    # Our labels go before: a changed one would hide the pod from its Service and from the operator.
    found["metadata"]["labels"] = {**found["metadata"]["labels"], **own_labels}
    spec = found["spec"]
    for each in (*spec["containers"], *spec.get("initContainers", [])):
        if "resources" in each:
            each["resources"] = _as_text(each["resources"])
    if spec.get("hostNetwork") is True:
        # Names of Services are not known to the node's own resolver.
        spec.setdefault("dnsPolicy", "ClusterFirstWithHostNet")
    return found


def user_patches(job: Owner, template: PodTemplate) -> list[Json]:
    """Return what the user wants merged over the pods of a role, in this order: of all roles, then of this one."""
    of_all = job.spec.pod_template.patches() if isinstance(job, DistillationJob) else []
    return [*of_all, *template.patches()]


def names_image(job: Owner, template: PodTemplate, container: str) -> bool:
    """Return whether the user names the image of a role's main container."""
    return any("image" in each for each in main_containers(user_patches(job, template), container))


def _named(patch: Json, name: str) -> Json:
    """Return the patch with the main container by its name in the pods."""
    spec = patch.get("spec", {})
    if "containers" not in spec:
        return patch
    containers = [{**c, "name": name} if c["name"] == MAIN else c for c in spec["containers"]]
    return {**patch, "spec": {**spec, "containers": containers}}


def _as_text(resources: Json) -> Json:
    """Return resources with integers as the text that the API server makes of them."""
    return {
        kind: {name: str(n) if type(n) is int else n for name, n in amounts.items()}
        if isinstance(amounts, dict)
        else amounts
        for kind, amounts in resources.items()
    }


def _own_template(
    job: Owner, settings: Settings, patches: list[Json], container: Container, metrics_port: int, pod_fields: Json
) -> Json:
    """Return what the operator writes, yet without its labels."""
    volumes, mounts = _volumes(job, container)
    mine = main_containers(patches, container.name)
    spec: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": container.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # A large output volume is not walked file by file at each start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_main_container(job, settings, mine, container, mounts)],
        "volumes": volumes,
        "imagePullSecrets": [{"name": name} for name in settings.workers_image_pull_secrets],
        **pod_fields,
    }
    scrape = {"prometheus.io/scrape": "true", "prometheus.io/port": str(metrics_port), "prometheus.io/path": "/metrics"}
    return {
        "metadata": {"labels": {}, "annotations": scrape},
        "spec": {key: value for key, value in spec.items() if value not in (None, [], {})},
    }


def _main_container(job: Owner, settings: Settings, mine: list[Json], container: Container, mounts: list[Json]) -> Json:
    """Return the main container; `mine` is what the user's templates say of it."""
    policy = {} if any("image" in each for each in mine) else {"imagePullPolicy": settings.workers_image_pull_policy}
    spec: Json = {
        "name": container.name,
        "image": settings.workers_image,
        **policy,
        "command": list(container.command),
        "env": [*_environment(job), *container.environment],
        "ports": [{"name": name, "containerPort": port} for name, port in container.ports],
        "resources": _resources(job, mine, container),
        # The last lines of the log say why, where no exit report was written.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
        **container.probes,
        "lifecycle": _lifecycle(mine, container),
    }
    return {key: value for key, value in spec.items() if value not in (None, [], {})}


def _lifecycle(mine: list[Json], container: Container) -> Json:
    # Two handlers of one hook would be refused.
    if not container.handles_signals or any((each.get("lifecycle") or {}).get("preStop") for each in mine):
        return {}
    return {"preStop": {"exec": {"command": ["sleep", str(STOP_DELAY_SECONDS)]}}}


def _environment(job: Owner) -> list[Json]:
    spec = job.spec
    key = {"secretKeyRef": {"name": names.key_secret(job.metadata.name, job.metadata.uid), "key": KEY_ENTRY}}
    found: list[Json] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": protocol.Variable.POD_IP.value, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": protocol.Variable.JOB_FILE.value, "value": protocol.JOB_FILE},
        {"name": protocol.Variable.KEY.value, "valueFrom": key},
        # Whoever reaches Ray runs what he likes in its pods. All pods of a job must agree.
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": key},
        # An engine actor asks Ray for no accelerator, and uses those of its pod.
        {"name": "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "value": "0"},
    ]
    if not spec.needs_hub:
        found.append({"name": "HF_HUB_OFFLINE", "value": "1"})
    return [*found, *_accelerators(job)]


def _accelerators(job: Owner) -> list[Json]:
    """What the roles of a job agree about, whichever of them the user has set it for. A Teacher is in no group."""
    if not isinstance(job, DistillationJob):
        return []
    spec = job.spec
    ends = ((spec.trainer.template, refusals.TRAINER), (spec.rollout.template, refusals.ENGINE))
    of_user = [
        {name: entry["value"] for name, entry in main_environment(spec, *end).items() if "value" in entry}
        for end in ends
    ]
    shared = accelerator_environment.of_every_role(job.spec, of_user)
    return [{"name": name, "value": value} for name, value in shared.items()]


def _resources(job: Owner, mine: list[Json], container: Container) -> Json:
    count = 0 if job.spec.on_cpu else container.accelerators
    requests = dict(CPU_REQUESTS)
    limits: dict[str, str] = {}
    if count:
        requests = {"cpu": str(ACCELERATOR_CPU * count), "memory": f"{ACCELERATOR_MEMORY_GIB * count}Gi"}
        limits[container.accelerator or job.spec.accelerator] = str(count)
    # A limit that the user sets replaces the default request of its name: a request above its limit is refused.
    of_user = [(each.get("resources") or {}).get("limits") or {} for each in mine]
    limited = {name for limits_of_user in of_user for name, amount in limits_of_user.items() if amount is not None}
    requests = {name: amount for name, amount in requests.items() if name not in limited}
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _volumes(job: Owner, container: Container) -> tuple[list[Json], list[Json]]:
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}]
    volumes.append({"name": "job", "configMap": {"name": config_map_name(job)}})
    mounts: list[Json] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "job", "mountPath": protocol.JOB_FILE.rpartition("/")[0], "readOnly": True},
    ]
    if container.needs_output and isinstance(job, DistillationJob) and job.spec.output.volume is not None:
        volumes.append({"name": "output", "persistentVolumeClaim": {"claimName": job.spec.output.volume.claim_name}})
        mounts.append({"name": "output", "mountPath": job.spec.output.path})
    for volume, name in ((f"publish-{number}", name) for number, name in enumerate(container.secrets)):
        volumes.append({"name": volume, "secret": {"secretName": name, "optional": True}})
        mounts.append({"name": volume, "mountPath": f"{protocol.SECRETS_FOLDER}/{name}", "readOnly": True})
    if container.needs_shared_memory and not job.spec.on_cpu:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return volumes, mounts


def config_map_name(owner: Owner) -> str:
    """Return the name of the ConfigMap that shows the owner's manifest to its pods."""
    name = owner.metadata.name
    return names.config_map(name) if isinstance(owner, DistillationJob) else names.shared_teacher(name)
