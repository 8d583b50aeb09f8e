"""What an attempt under way is held to: it keeps what it began with. Pure.

An operator of another version, or with other settings, would write the children of a job differently. It leaves those
that it finds as they are, but for the numbers that the user asks for: pods that run are not restarted by an upgrade.
Its own words come with the next attempt, or where a child has to be made because it is gone.
"""

from dataclasses import replace

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import ANNOTATION_FIXED_HASH, ANNOTATION_SPEC_HASH
from distill_operator.model.observed import Child, Observed
from distill_operator.resources import pod_group, scalable_fields
from distill_operator.resources.drift import COMPARED, is_of
from distill_operator.resources.pod_template import Json
from distill_operator.runtime.kinds import Kind
from distill_operator.settings import Settings

WITH_PODS = frozenset({Kind.DEPLOYMENT, Kind.RAY_CLUSTER, Kind.JOB})


def children(job: DistillationJob, observed: Observed) -> list[Child]:
    """What goes with an attempt: ours, with pods; those on their way out too."""
    teachers = {names.teacher(job.metadata.name, t.name) for t in job.spec.served_teachers}
    serving = teachers | {names.ray_cluster(job.metadata.name)}
    kinds = (Kind.DEPLOYMENT, Kind.RAY_CLUSTER)
    found = [c for c in observed.children if c.ours and c.kind in kinds and c.name in serving]
    groups = [c for c in observed.children if c.ours and c.kind in pod_group.KINDS]
    # The trainer first, so that it ends by its own signal handler and not by the loss of an engine; the group last.
    return [*observed.trainer_jobs(), *found, *groups]


def is_under_way(job: DistillationJob, observed: Observed, attempt: int) -> bool:
    """Whether anything is there that runs, or is to run, its pods."""
    return bool(_with_pods(job, observed, attempt))


def settings_of(job: DistillationJob, observed: Observed, attempt: int, settings: Settings) -> Settings:
    """The operator's, with the workers' image that the attempt began with: what is made in the middle of it must
    understand the others, and Ray lets no client of another version in."""
    templates = {
        names.trainer_job(job.metadata.name, attempt): job.spec.trainer.template,
        names.ray_cluster(job.metadata.name): job.spec.rollout.head_template,
        **{names.teacher(job.metadata.name, t.name): t.template for t in job.spec.served_teachers},
    }
    for child in _with_pods(job, observed, attempt):
        template = templates.get(child.name)
        if child.image and template is not None and template.image is None:
            return replace(settings, workers_image=child.image)
    return settings


def held_to(desired: Json, child: Child) -> Json:
    """What the child should say while the attempt is under way: this operator's words where they were its own, else
    those that it has, with the numbers that the user asks for."""
    if is_of(desired, child):
        return desired
    kept = scalable_fields.with_numbers(dict(child.content), desired)
    hashes = {ANNOTATION_SPEC_HASH: child.spec_hash, ANNOTATION_FIXED_HASH: child.fixed_hash}
    annotations = {key: value for key, value in hashes.items() if value}
    return {
        **desired,
        "metadata": {**desired["metadata"], "annotations": annotations},
        **{part: kept[part] for part in COMPARED if part in kept},
    }


def _with_pods(job: DistillationJob, observed: Observed, attempt: int) -> list[Child]:
    return [
        c for c in children(job, observed) if c.kind in WITH_PODS and (c.kind is not Kind.JOB or c.attempt == attempt)
    ]
