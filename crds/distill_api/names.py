"""Names and labels of the objects of one job. A child is found by its name, so names are deterministic."""

from enum import StrEnum

from distill_api.base import GROUP

MAX_JOB_NAME = 40
"""A RayCluster's name may have 53 characters, and a trainer pod's 63: -rollout and -trainer-NNN-NNNN-xxxxx must fit."""
MAX_TEACHER_NAME = 63 - MAX_JOB_NAME - len("-teacher-")
"""The name of a Service may have 63 characters."""
ONLY_TEACHER = "teacher"
"""What the teacher of a job that has one is called in metrics and samples."""


class Role(StrEnum):
    TEACHER = "teacher"
    ROLLOUT = "rollout"
    TRAINER = "trainer"


PART_OF = "distillation-operator"
LABEL_PART_OF = "app.kubernetes.io/part-of"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_JOB = f"{GROUP}/job"
LABEL_ROLE = f"{GROUP}/role"
LABEL_TEACHER = f"{GROUP}/teacher"
"""Which of a job's teachers, where it has several."""
LABEL_SHARED_TEACHER = f"{GROUP}/shared-teacher"
"""On what is made for a Teacher, in place of LABEL_JOB: a job may have the same name."""
LABEL_ATTEMPT = f"{GROUP}/attempt"
ANNOTATION_SPEC_HASH = f"{GROUP}/spec-hash"
"""Of all that the operator wrote of a child."""
ANNOTATION_FIXED_HASH = f"{GROUP}/fixed-hash"
"""The same without the numbers that the user may change while the job runs; releases before 0.2.0 did not write it."""
FIELD_MANAGER = "distillation-operator"
OPERATOR_LABELS = {"app.kubernetes.io/name": "distillation-operator"}
"""Of the operator's own pods, by which the NetworkPolicy of a job knows them; no pod of a job has them."""


def config_map(job: str) -> str:
    return f"{job}-job"


def teacher(job: str, name: str = ONLY_TEACHER) -> str:
    """Of the Deployment and of the headless Service of a teacher that the job itself serves."""
    return f"{job}-teacher" if name == ONLY_TEACHER else f"{job}-teacher-{name}"


def shared_teacher(name: str) -> str:
    """Of all that is made for a Teacher, but for its key: no child of a job has such a name."""
    return f"{name}-scoring"


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


def key_secret(job: str, uid: str) -> str:
    """With a part of the job's uid: the operator reads no Secret, so the name alone must say whose key it is. That of
    an earlier job of this name may be there still, until the garbage collector takes it."""
    return f"{job}-key-{uid[:8]}"
