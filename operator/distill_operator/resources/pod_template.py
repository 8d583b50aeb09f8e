"""The pod template that all roles have in common: security context, mounts of the contract, the user's overrides.

The root file system is read-only; /tmp, with HOME in it, is all that SGLang, Ray and Megatron need to write to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_api import accelerator_environment, names, protocol
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.spec.job_spec import WeightSync
from distill_api.spec.template import PodTemplate
from distill_api.teacher.kind import Teacher
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
ACCELERATOR_CPU = 2
ACCELERATOR_MEMORY_GIB = 16
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
    probes: Json = field(default_factory=dict)
    needs_output: bool = False
    needs_shared_memory: bool = False
    """Whether NCCL needs a /dev/shm above the runtime's 64 MB. KubeRay gives one to its pods by itself."""
    grace_seconds: int = 30


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
    """Return a PodTemplateSpec that Pod Security `restricted` admits; the user's template goes before where it may."""
    volumes, mounts = _volumes(job, container)
    secrets = template.image_pull_secrets or settings.workers_image_pull_secrets
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
        "containers": [_main_container(job, settings, template, container, mounts)],
        "volumes": _merged(volumes, template.volumes, "name"),
        "imagePullSecrets": [{"name": name} for name in secrets],
        "nodeSelector": dict(template.node_selector),
        "tolerations": list(template.tolerations),
        "affinity": template.affinity,
        "serviceAccountName": template.service_account_name,
        "priorityClassName": template.priority_class_name,
        "schedulerName": template.scheduler_name,
        "runtimeClassName": template.runtime_class_name,
        **pod_fields,
    }
    scrape = {"prometheus.io/scrape": "true", "prometheus.io/port": str(metrics_port), "prometheus.io/path": "/metrics"}
    return {
        # Our labels go before: a changed one would hide the pod from its Service and from the operator.
        "metadata": {"labels": {**template.labels, **own_labels}, "annotations": {**scrape, **template.annotations}},
        "spec": {key: value for key, value in spec.items() if value not in (None, [], {})},
    }


def _main_container(
    job: Owner, settings: Settings, template: PodTemplate, container: Container, mounts: list[Json]
) -> Json:
    spec: Json = {
        "name": container.name,
        "image": template.image or settings.workers_image,
        "imagePullPolicy": _pull_policy(settings, template),
        "command": list(container.command),
        "env": _merged([*_environment(job), *container.environment], template.env, "name"),
        "ports": [{"name": name, "containerPort": port} for name, port in container.ports],
        "resources": _resources(job, template, container),
        # The last lines of the log say why, where no exit report was written.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _merged(mounts, template.volume_mounts, "mountPath"),
        **container.probes,
    }
    return {key: value for key, value in spec.items() if value not in (None, [], {})}


def _pull_policy(settings: Settings, template: PodTemplate) -> str:
    """Return the installation's policy for its own image, unless the user asks for another than the API's default."""
    default = PodTemplate.model_fields["image_pull_policy"].default
    if template.image is None and template.image_pull_policy == default:
        return settings.workers_image_pull_policy
    return template.image_pull_policy


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
    templates = (job.spec.trainer.template, job.spec.rollout.template)
    of_user = [{e["name"]: e["value"] for e in t.env if "name" in e and "value" in e} for t in templates]
    shared = accelerator_environment.of_every_role(job.spec, of_user)
    return [{"name": name, "value": value} for name, value in shared.items()]


def _resources(job: Owner, template: PodTemplate, container: Container) -> Json:
    count = 0 if job.spec.on_cpu else container.accelerators
    requests = dict(CPU_REQUESTS)
    limits: dict[str, str] = {}
    if count:
        requests = {"cpu": str(ACCELERATOR_CPU * count), "memory": f"{ACCELERATOR_MEMORY_GIB * count}Gi"}
        limits[job.spec.accelerator] = str(count)
    # A limit that the user sets replaces the default request of its name: a request above its limit is refused.
    requests = {name: amount for name, amount in requests.items() if name not in template.resources.limits}
    found = {
        "requests": {**requests, **template.resources.requests},
        "limits": {**limits, **template.resources.limits},
    }
    return {key: value for key, value in found.items() if value}


def _volumes(job: Owner, container: Container) -> tuple[list[Json], list[Json]]:
    volumes: list[Json] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "job", "configMap": {"name": config_map_name(job)}},
    ]
    mounts: list[Json] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "job", "mountPath": protocol.JOB_FILE.rpartition("/")[0], "readOnly": True},
    ]
    if container.needs_output and isinstance(job, DistillationJob) and job.spec.output.volume is not None:
        volumes.append({"name": "output", "persistentVolumeClaim": {"claimName": job.spec.output.volume.claim_name}})
        mounts.append({"name": "output", "mountPath": job.spec.output.path})
    if container.needs_shared_memory and not job.spec.on_cpu:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return volumes, mounts


def config_map_name(owner: Owner) -> str:
    """Return the name of the ConfigMap that shows the owner's manifest to its pods."""
    name = owner.metadata.name
    return names.config_map(name) if isinstance(owner, DistillationJob) else names.shared_teacher(name)


def shares_weights_by_disk(job: DistillationJob) -> bool:
    """Return whether engines read the weights from the output volume."""
    return job.spec.trainer.weight_sync is WeightSync.DISK


def _merged(ours: list[Json], theirs: Sequence[Json], key: str) -> list[Json]:
    """Return both lists with each `key` once, the user's instead of ours: the API server refuses one that is twice."""
    found = {entry[key]: entry for entry in ours}
    found.update({entry[key]: entry for entry in theirs if key in entry})
    return list(found.values())
