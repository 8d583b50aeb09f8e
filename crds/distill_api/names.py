"""Names and labels of the objects of one job. A child is found by its name, so names are deterministic."""

from enum import StrEnum

from distill_api.base import GROUP

MAX_JOB_NAME = 40
"""A RayCluster's name may have 53 characters, and a trainer pod's 63: -rollout and -trainer-NNN-NNNN-xxxxx must fit."""


class Role(StrEnum):
    TEACHER = "teacher"
    ROLLOUT = "rollout"
    TRAINER = "trainer"


PART_OF = "distillation-operator"
LABEL_PART_OF = "app.kubernetes.io/part-of"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_JOB = f"{GROUP}/job"
LABEL_ROLE = f"{GROUP}/role"
LABEL_ATTEMPT = f"{GROUP}/attempt"
ANNOTATION_SPEC_HASH = f"{GROUP}/spec-hash"
FIELD_MANAGER = "distillation-operator"


def config_map(job: str) -> str:
    return f"{job}-job"


def teacher(job: str) -> str:
    """Of the teacher's Deployment and of its headless Service."""
    return f"{job}-teacher"


def ray_cluster(job: str) -> str:
    return f"{job}-rollout"


def ray_head_service(job: str) -> str:
    """KubeRay makes it."""
    return f"{ray_cluster(job)}-head-svc"


def trainer(job: str) -> str:
    """Of the trainer's headless Service."""
    return f"{job}-trainer"


def trainer_job(job: str, attempt: int) -> str:
    return f"{trainer(job)}-{attempt}"


def pod_group(job: str) -> str:
    return f"{job}-gang"


def network_policy(job: str) -> str:
    return f"{job}-traffic"
