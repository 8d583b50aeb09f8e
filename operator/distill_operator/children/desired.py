"""All children of a job, each with the hash of its own content."""

import hashlib
import json

from distill_api.job import DistillationJob
from distill_api.names import ANNOTATION_SPEC_HASH
from distill_operator.children import configmap, gang, network, rollout, secret, teacher, trainer
from distill_operator.children.pod import Json
from distill_operator.settings import Settings


def lasting(job: DistillationJob, settings: Settings) -> list[Json]:
    """Children without pods: made at the start, kept until the job itself is deleted."""
    return [
        hashed(child)
        for child in (
            configmap.config_map(job),
            network.network_policy(job, settings),
            *(teacher.service(job, each) for each in job.spec.served_teachers),
            trainer.service(job),
        )
    ]


def serving(job: DistillationJob, settings: Settings) -> list[Json]:
    """What must be up before the trainer: the job's own teachers and the engines."""
    teachers = [teacher.deployment(job, settings, each) for each in job.spec.served_teachers]
    return [hashed(gang.placed(job, child)) for child in (*teachers, rollout.ray_cluster(job, settings))]


def training(job: DistillationJob, settings: Settings, attempt: int) -> Json:
    return hashed(gang.placed(job, trainer.trainer_job(job, settings, attempt)))


def group(job: DistillationJob, settings: Settings) -> list[Json]:
    """The group of pods that a gang scheduler places together, if any: before them, deleted with the attempt."""
    if gang.dialect(job) is None:
        return []
    made = gang.pod_group(job, [*serving(job, settings), training(job, settings, 1)])
    return [hashed(made)] if made else []


def key(job: DistillationJob) -> Json:
    """Made once, before the first pod that reads it; not among `lasting`, which are compared with what is there."""
    return hashed(secret.key_secret(job))


def hashed(child: Json) -> Json:
    digest = hashlib.sha256(json.dumps(child, sort_keys=True).encode()).hexdigest()[:16]
    return {**child, "metadata": {**child["metadata"], "annotations": {ANNOTATION_SPEC_HASH: digest}}}
