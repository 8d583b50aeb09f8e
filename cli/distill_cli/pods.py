"""The pods of a job, found by its labels, and the ports of a trainer's pod, reached through the API server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill_api.names import LABEL_ATTEMPT, LABEL_JOB, LABEL_OWNER_UID, LABEL_ROLE
from distill_api.protocol import TRAINER_PORT

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

Json = dict[str, Any]
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
"""The label that numbers the pods of a trainer; rank 0, which serves, is in the first."""


def pods_of_role(cluster: Cluster, job: str, role: str, *, uid: str | None = None) -> list[Json]:
    """Return the pods of a role of a job, of every attempt.

    With the job's `uid`, pods of an earlier job of its name, which may still run, are left out.
    """
    found = cluster.core("pods", labelSelector=f"{LABEL_JOB}={job},{LABEL_ROLE}={role}")
    return [pod for pod in found if uid is None or pod["metadata"]["labels"].get(LABEL_OWNER_UID, uid) == uid]


def newest_attempt(pods: Sequence[Json]) -> list[Json]:
    """Return the pods of the newest attempt, by name. Pods of teacher and rollout have no attempt: all are returned."""

    def attempt(pod: Json) -> int:
        return int(pod["metadata"]["labels"].get(LABEL_ATTEMPT, 0))

    last = max((attempt(pod) for pod in pods), default=0)
    return sorted((pod for pod in pods if attempt(pod) == last), key=lambda pod: str(pod["metadata"]["name"]))


def running(pods: Sequence[Json]) -> list[Json]:
    """Return the pods whose phase is Running."""
    return [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]


def rank_0(pods: Sequence[Json]) -> Json | None:
    """Return the pod that holds rank 0 of the trainer, or None where it is not among them."""
    return next((pod for pod in pods if pod["metadata"]["labels"].get(INDEX_LABEL, "0") == "0"), None)


def main_container(pod: Json) -> str:
    """Return the name of the role's own container, which is the first; others are the user's."""
    return str(pod["spec"]["containers"][0]["name"])


def trainer_path(cluster: Cluster, pod: str, path: str) -> str:
    """Return the API server's path that proxies `path` of the HTTP port of a trainer's pod."""
    return f"/api/v1/namespaces/{cluster.namespace}/pods/{pod}:{TRAINER_PORT}/proxy{path}"
