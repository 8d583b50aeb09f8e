"""The reader pod: what the trainer's pods are to Pod Security and to the volume, and nothing else of them."""

from collections.abc import Mapping
from typing import Any

from distill_api.base import API_VERSION, KIND
from distill_api.names import LABEL_JOB, LABEL_MANAGED_BY, LABEL_PART_OF, PART_OF

Json = dict[str, Any]
NAME = "distillation-reader"
LABEL_NAME = "app.kubernetes.io/name"
CONTAINER = "reader"
MANAGED_BY = "distill"
"""Not the operator's word, by which it knows its own pods."""
USER = 1000
"""The uid, gid and fsGroup of a job's pods, where its templates say nothing else."""
OF_THE_VOLUME = ("runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "supplementalGroups", "seLinuxOptions")
"""Fields of a security context by which the trainer reads and writes its files."""
RESOURCES = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}


def selector(job: str) -> str:
    """Return the label selector of the reader pods of a job."""
    return f"{LABEL_NAME}={NAME},{LABEL_JOB}={job}"


def reader_pod(
    job: Json, trainer: Mapping[str, Any], *, name: str, image: str, seconds: int, node: str | None = None
) -> Json:
    """Return the manifest of a pod that reads the output claim of a job for `seconds` at most.

    `trainer` is the spec of the trainer's pods, empty where it is not known; with `node` the pod runs there. It belongs
    to the job and goes with it. LABEL_JOB puts it under the job's NetworkPolicy; the operator does not see it.
    """
    meta, output = job["metadata"], job["spec"]["output"]
    mount = output.get("path", "/output")
    main = (trainer.get("containers") or [{}])[0]
    policy = (
        {"imagePullPolicy": main["imagePullPolicy"]} if main.get("image") == image and "imagePullPolicy" in main else {}
    )
    container = {
        "name": CONTAINER,
        "image": image,
        **policy,
        "command": ["sleep", str(seconds)],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": RESOURCES,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "output", "mountPath": mount, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    claim = {"claimName": output["volume"]["claimName"], "readOnly": True}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {
                LABEL_NAME: NAME,
                LABEL_PART_OF: PART_OF,
                LABEL_MANAGED_BY: MANAGED_BY,
                LABEL_JOB: meta["name"],
            },
            # Without blockOwnerDeletion, which needs a right to the job's finalizers.
            "ownerReferences": [
                {"apiVersion": API_VERSION, "kind": KIND, "name": meta["name"], "uid": meta["uid"]},
            ],
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": seconds,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": _security(trainer),
            **_placement(trainer, node),
            **{key: trainer[key] for key in ("imagePullSecrets",) if trainer.get(key)},
            "containers": [container],
            "volumes": [{"name": "output", "persistentVolumeClaim": claim}, {"name": "tmp", "emptyDir": {}}],
        },
    }


def _security(trainer: Mapping[str, Any]) -> Json:
    """Return the security context of the pod; a trainer that runs as root left root's files."""
    main = (trainer.get("containers") or [{}])[0].get("securityContext") or {}
    of_pod = trainer.get("securityContext") or {}
    own = {"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
    kept = {key: each[key] for each in (of_pod, main) for key in OF_THE_VOLUME if key in each}
    user = {**own, **kept}
    return {**user, "runAsNonRoot": user["runAsUser"] != 0, "seccompProfile": {"type": "RuntimeDefault"}}


def _placement(trainer: Mapping[str, Any], node: str | None) -> Json:
    if node is None:
        return {"tolerations": trainer["tolerations"]} if trainer.get("tolerations") else {}
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    term = {"nodeSelectorTerms": [{"matchFields": [field]}]}
    # By the scheduler, which knows whether there is room. The node may be cordoned, or for accelerators alone.
    return {
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": term}},
        "tolerations": [{"operator": "Exists", "effect": "NoSchedule"}],
    }
