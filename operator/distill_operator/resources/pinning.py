"""Pinning: an attempt under way keeps the rendered children that it began with. Pure.

An operator of another version, or with other settings, would render the children of a job differently. It leaves those
that it finds as they are, but for their scalable fields (scalable_fields.py): pods that run are not restarted by an
upgrade. Its own rendering comes with the next attempt, or where a child has to be made because it is gone.
"""

from dataclasses import replace

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import ANNOTATION_FIXED_HASH, ANNOTATION_SPEC_HASH
from distill_api.pods import refusals
from distill_operator.kinds import Kind
from distill_operator.model.observed import Child, Observed
from distill_operator.resources import pod_group, scalable_fields
from distill_operator.resources.drift import COMPARED, same_but_for_scalable_fields
from distill_operator.resources.pod_template import Json, names_image
from distill_operator.settings import Settings

WITH_PODS = frozenset({Kind.DEPLOYMENT, Kind.RAY_CLUSTER, Kind.JOB})


def attempt_children(job: DistillationJob, observed: Observed) -> list[Child]:
    """Return the children that go with an attempt: those with pods, and their group; those being deleted too."""
    teachers = {names.teacher(job.metadata.name, t.name) for t in job.spec.served_teachers}
    serving = teachers | {names.ray_cluster(job.metadata.name)}
    kinds = (Kind.DEPLOYMENT, Kind.RAY_CLUSTER)
    found = [c for c in observed.children if c.ours and c.kind in kinds and c.name in serving]
    groups = [c for c in observed.children if c.ours and c.kind in pod_group.KINDS]
    # The trainer first, so that it ends by its own signal handler and not by the loss of an engine; the group last.
    return [*observed.trainer_jobs(), *found, *groups]


def is_under_way(job: DistillationJob, observed: Observed, attempt: int) -> bool:
    """Return whether a child exists that has pods of the attempt, or is to have them."""
    return bool(_with_pods(job, observed, attempt))


def pinned_settings(job: DistillationJob, observed: Observed, attempt: int, settings: Settings) -> Settings:
    """Return the operator's settings with the workers' image that the attempt began with.

    What is made in the middle of it must understand the others, and Ray lets no client of another version in.
    """
    templates = {
        names.trainer_job(job.metadata.name, attempt): (job.spec.trainer.template, refusals.TRAINER),
        names.ray_cluster(job.metadata.name): (job.spec.rollout.head_template, refusals.HEAD),
        **{names.teacher(job.metadata.name, t.name): (t.template, refusals.TEACHER) for t in job.spec.served_teachers},
    }
    for child in _with_pods(job, observed, attempt):
        role = templates.get(child.name)
        if child.image and role is not None and not names_image(job, *role):
            return replace(settings, workers_image=child.image)
    return settings


def pinned(desired: Json, child: Child) -> Json:
    """Return what a child should be while the attempt is under way.

    That is `desired` where this operator rendered the child, else the live child with the scalable fields of `desired`.
    """
    if same_but_for_scalable_fields(desired, child):
        return desired
    kept = scalable_fields.with_scalable_fields_of(dict(child.content), desired)
    hashes = {ANNOTATION_SPEC_HASH: child.spec_hash, ANNOTATION_FIXED_HASH: child.fixed_hash}
    annotations = {key: value for key, value in hashes.items() if value}
    return {
        **desired,
        "metadata": {**desired["metadata"], "annotations": annotations},
        **{part: kept[part] for part in COMPARED if part in kept},
    }


def _with_pods(job: DistillationJob, observed: Observed, attempt: int) -> list[Child]:
    return [
        c
        for c in attempt_children(job, observed)
        if c.kind in WITH_PODS and (c.kind is not Kind.JOB or c.attempt == attempt)
    ]
