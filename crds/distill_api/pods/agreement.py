"""The templates of a job's pods together: what each may say beside the others and beside the rest of the spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distill_api.accelerator_environment import NCCL_AGREED
from distill_api.pods import refusals
from distill_api.pods.template import PodTemplate, main_containers

if TYPE_CHECKING:
    from distill_api.spec.job_spec import Spec

AS_SIDECAR = (
    "the trainer's Job ends when every container has ended: put it in initContainers, with restartPolicy Always"
)


def problems(spec: Spec) -> list[str]:
    """Return a sentence for each thing that the templates of a job may not say."""
    found = [
        f"podTemplate.spec: containers[{name}] must be main, as the main container has another name in each role"
        for name in refusals.named_roles(spec.pod_template.spec)
    ]
    for path, role, template in _templates(spec):
        found += named_otherwise(path, role, template)
    for path, template in (("podTemplate", spec.pod_template), ("trainer.template", spec.trainer.template)):
        found += [
            f"{path}.spec: containers[{name}] may not be set: {AS_SIDECAR}"
            for name in refusals.extra_containers(template.spec)
        ]
    return [*found, *_disagreements(spec), *_over_output(spec)]


def named_otherwise(path: str, role: str, template: PodTemplate) -> list[str]:
    """Return a sentence for each main container of another role that the template at a path names."""
    return [
        f"{path}.spec: containers[{name}] must be main or {role}, the main container of this role"
        for name in refusals.named_roles(template.spec)
        if name != role
    ]


def main_environment(spec: Spec, template: PodTemplate, role: str) -> dict[str, dict[str, Any]]:
    """Return what the user sets in the environment of a role's main container, by the variables' names."""
    containers = main_containers([*spec.pod_template.patches(), *template.patches()], role)
    return {str(entry["name"]): entry for c in containers for entry in c.get("env", []) if "name" in entry}


def _templates(spec: Spec) -> Iterator[tuple[str, str, PodTemplate]]:
    yield "trainer.template", refusals.TRAINER, spec.trainer.template
    yield "rollout.template", refusals.ENGINE, spec.rollout.template
    yield "rollout.headTemplate", refusals.HEAD, spec.rollout.head_template
    for teacher in spec.all_teachers:
        yield f"{teacher.path.removeprefix('spec.')}.template", refusals.TEACHER, teacher.template


def _disagreements(spec: Spec) -> Iterator[str]:
    """Yield a sentence for each variable of which both ends of a NCCL group would have a value of their own."""
    trainer = main_environment(spec, spec.trainer.template, refusals.TRAINER)
    engine = main_environment(spec, spec.rollout.template, refusals.ENGINE)
    for name in NCCL_AGREED:
        given = [entry for entry in (trainer.get(name), engine.get(name)) if entry is not None]
        if any("value" not in entry for entry in given):
            yield f"{name} must have a value in the template itself: trainer and engines must agree about it"
        elif len({str(entry["value"]) for entry in given}) > 1:
            yield (
                f"{name} is {trainer[name]['value']} in trainer.template and {engine[name]['value']} in "
                "rollout.template: both must agree, so set it in podTemplate"
            )


def _over_output(spec: Spec) -> Iterator[str]:
    trainer = [*spec.pod_template.patches(), *spec.trainer.template.patches()]
    for container in main_containers(trainer, refusals.TRAINER):
        for mount in container.get("volumeMounts", []):
            if spec.output.volume is not None and mount.get("mountPath") == spec.output.path:
                yield f"volumeMounts[{spec.output.path}] may not be set for the trainer: spec.output.volume is there"
