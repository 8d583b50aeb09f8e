"""All children of a job, each with the hash of its own content, and of what of it stays for an attempt."""

import hashlib
import json

from distill_api.job import DistillationJob
from distill_api.names import ANNOTATION_FIXED_HASH, ANNOTATION_SPEC_HASH
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


def lasting(job: DistillationJob, settings: Settings) -> list[Json]:
    """Children without pods: made at the start, kept until the job itself is deleted."""
    return [
        _marked(child)
        for child in (
            configmap.config_map(job),
            network_policy.network_policy(job, settings),
            *(teacher_deployment.service(job, each) for each in job.spec.served_teachers),
            trainer_job.service(job),
        )
    ]


def serving(job: DistillationJob, settings: Settings) -> list[Json]:
    """What must be up before the trainer: the job's own teachers and the engines."""
    teachers = [teacher_deployment.deployment(job, settings, each) for each in job.spec.served_teachers]
    return [_marked(pod_group.placed(job, child)) for child in (*teachers, ray_cluster.ray_cluster(job, settings))]


def training(job: DistillationJob, settings: Settings, attempt: int) -> Json:
    return _marked(pod_group.placed(job, trainer_job.trainer_job(job, settings, attempt)))


def group(job: DistillationJob, settings: Settings) -> list[Json]:
    """The group of pods that a gang scheduler places together, if any: before them, deleted with the attempt."""
    if pod_group.dialect(job) is None:
        return []
    made = pod_group.pod_group(job, [*serving(job, settings), training(job, settings, 1)])
    return [_marked(made)] if made else []


def key(job: DistillationJob) -> Json:
    """Made once, before the first pod that reads it; not among `lasting`, which are compared with what is there."""
    return hashed(secret.key_secret(job))


def hashed(child: Json) -> Json:
    return {**child, "metadata": {**child["metadata"], "annotations": {ANNOTATION_SPEC_HASH: _digest(child)}}}


def _marked(child: Json) -> Json:
    found = hashed(child)
    annotations, fixed = found["metadata"]["annotations"], scalable_fields.fixed(child)
    annotations[ANNOTATION_FIXED_HASH] = annotations[ANNOTATION_SPEC_HASH] if fixed is child else _digest(fixed)
    return found


def _digest(child: Json) -> str:
    return hashlib.sha256(json.dumps(child, sort_keys=True).encode()).hexdigest()[:16]
