"""Names, labels and annotations of the Kubernetes objects of a job or a Teacher.

Names are deterministic functions of the owner's name, since a child is found by its name.
"""

from enum import StrEnum

from distill_api.base import GROUP

MAX_JOB_NAME = 40
"""The longest name of a job, in characters.

A RayCluster's name may have 53, and a trainer pod's 63: -rollout and -trainer-NNN-NNNN-xxxxx must fit.
"""
MAX_TEACHER_NAME = 63 - MAX_JOB_NAME - len("-teacher-")
"""The longest name of one of a job's teachers, in characters, since the name of a Service may have 63."""
ONLY_TEACHER = "teacher"
"""The name, in metrics and samples, of the teacher of a job that has one."""


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
"""The label with the name of the teacher, on the objects of a job that has several."""
LABEL_SHARED_TEACHER = f"{GROUP}/shared-teacher"
"""The label on the objects of a Teacher, in place of LABEL_JOB: a job may have the same name."""
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_OWNER_UID = f"{GROUP}/owner-uid"
"""The label with the uid of the owner, on pods alone.

The pods of an earlier object of the same name carry the same name, and may run for minutes after it. It is in no
selector, since that of a Deployment cannot be changed.
"""
ANNOTATION_SPEC_HASH = f"{GROUP}/spec-hash"
"""The annotation with the hash of the whole rendered spec of a child."""
ANNOTATION_FIXED_HASH = f"{GROUP}/fixed-hash"
"""The annotation with the hash of the rendered spec without its scalable fields, which may change while a job runs.

Releases before 0.2.0 did not write it.
"""
FIELD_MANAGER = "distillation-operator"
OPERATOR_LABELS = {"app.kubernetes.io/name": "distillation-operator"}
"""Labels of the operator's own pods, by which the NetworkPolicy of a job selects them; no pod of a job has them."""


def config_map(job: str) -> str:
    """Return the name of the ConfigMap with the job's manifest."""
    return f"{job}-job"


def teacher(job: str, name: str = ONLY_TEACHER) -> str:
    """Return the name of the Deployment and the headless Service of a teacher that the job itself serves."""
    return f"{job}-teacher" if name == ONLY_TEACHER else f"{job}-teacher-{name}"


def shared_teacher(name: str) -> str:
    """Return the name of all children of a Teacher except its key; no child of a job has such a name."""
    return f"{name}-scoring"


def ray_cluster(job: str) -> str:
    """Return the name of the RayCluster of the engines."""
    return f"{job}-rollout"


def ray_head_service(job: str) -> str:
    """Return the name of the Service of the Ray head, which KubeRay creates."""
    return f"{ray_cluster(job)}-head-svc"


def trainer(job: str) -> str:
    """Return the name of the trainer's headless Service."""
    return f"{job}-trainer"


def trainer_job(job: str, attempt: int) -> str:
    """Return the name of the batch Job of an attempt."""
    return f"{trainer(job)}-{attempt}"


def pod_group(job: str) -> str:
    """Return the name of the PodGroup of a gang."""
    return f"{job}-gang"


def network_policy(job: str) -> str:
    """Return the name of the NetworkPolicy."""
    return f"{job}-traffic"


def key_secret(job: str, uid: str) -> str:
    """Return the name of the Secret with the key, which has a part of the owner's uid.

    The operator reads no Secret, so the name alone must identify the owner: the Secret of an earlier job of this name
    may still exist until the garbage collector deletes it.
    """
    return f"{job}-key-{uid[:8]}"
