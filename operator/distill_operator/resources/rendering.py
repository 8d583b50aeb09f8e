"""Rendering of a job's children, each with two hashes: of its content, and of what of it an attempt keeps. Pure."""

import hashlib
import json
from collections.abc import Mapping

from distill_api.job import DistillationJob
from distill_api.names import ANNOTATION_FIXED_HASH, ANNOTATION_SPEC_HASH
from distill_operator.model.pod_sets import Placement, placed
from distill_operator.resources import (
    configmap,
    network_policy,
    pod_group,
    ray_cluster,
    scalable_fields,
    secret,
    teacher_deployment,
    trainer_job,
)
from distill_operator.resources.pod_template import Json
from distill_operator.settings import Settings

Placements = Mapping[str, Placement]
"""By the name of a pod set; empty where nothing but the scheduler places pods."""
NOWHERE: Placements = {}


def lasting(job: DistillationJob, settings: Settings) -> list[Json]:
    """Return the children without pods: made at the start, kept until the job itself is deleted."""
    return [
        _marked(child)
        for child in (
            configmap.config_map(job),
            network_policy.network_policy(job, settings),
            *(teacher_deployment.service(job, each) for each in job.spec.served_teachers),
            trainer_job.service(job),
        )
    ]


def serving(job: DistillationJob, settings: Settings, placements: Placements = NOWHERE) -> list[Json]:
    """Return the children that must be up before the trainer: the job's own teachers and the engines."""
    teachers = [teacher_deployment.deployment(job, settings, each) for each in job.spec.served_teachers]
    made = (*teachers, ray_cluster.ray_cluster(job, settings))
    return [_marked(placed(pod_group.placed(job, child), placements)) for child in made]


def training(job: DistillationJob, settings: Settings, attempt: int, placements: Placements = NOWHERE) -> Json:
    """Return the trainer Job of an attempt."""
    return _marked(placed(pod_group.placed(job, trainer_job.trainer_job(job, settings, attempt)), placements))


def group(job: DistillationJob, settings: Settings) -> list[Json]:
    """Return the group of pods that a gang scheduler places together, if any: made before them, deleted with them."""
    if pod_group.dialect(job) is None:
        return []
    made = pod_group.pod_group(job, [*serving(job, settings), training(job, settings, 1)])
    return [_marked(made)] if made else []


def key(job: DistillationJob) -> Json:
    """Return the Secret, which is created once, before the first pod that reads it.

    It is not among `lasting`, which are compared with what is there.
    """
    return hashed(secret.key_secret(job))


def hashed(child: Json) -> Json:
    """Return the child with the hash of its content."""
    return {**child, "metadata": {**child["metadata"], "annotations": {ANNOTATION_SPEC_HASH: digest(child)}}}


def _marked(child: Json) -> Json:
    """Return the child with both hashes."""
    found = hashed(child)
    annotations, fixed = found["metadata"]["annotations"], scalable_fields.without_scalable_fields(child)
    annotations[ANNOTATION_FIXED_HASH] = annotations[ANNOTATION_SPEC_HASH] if fixed is child else digest(fixed)
    return found


def digest(child: Json) -> str:
    """Return a hash of the content of a child."""
    return hashlib.sha256(json.dumps(child, sort_keys=True).encode()).hexdigest()[:16]
