"""The accelerator of a role, where it is not the job's, and what the roles of a job must have in common."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from distill_api.rules import Rule, matching

if TYPE_CHECKING:
    from distill_api.spec.job_spec import Spec

RoleAccelerator = Annotated[
    str,
    Field(max_length=253),
    matching(
        r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$",
        "must be a resource name, such as nvidia.com/mig-3g.40gb",
    ),
]
DESCRIPTION = "Resource name of the accelerator that these pods request, instead of spec.accelerator."

ACCELERATOR_IS_IMMUTABLE = (
    "accelerator is immutable: make a new job",
    "has(self.accelerator) == has(oldSelf.accelerator)",
)
"""The transition of a part of a job where it comes or goes."""


def _named(spec: "Spec") -> bool:
    teachers = (teacher.accelerator for teacher in spec.all_teachers)
    return any(name is not None for name in (spec.trainer.accelerator, spec.rollout.accelerator, *teachers))


def _of_one_vendor(spec: "Spec") -> bool:
    ends = (spec.trainer.accelerator, spec.rollout.accelerator)
    return len({(name or spec.accelerator).partition("/")[0] for name in ends}) == 1


_TRAINER, _ENGINE = (
    f"(has(self.{part}.accelerator) ? self.{part}.accelerator : self.accelerator).split('/')[0]"
    for part in ("trainer", "rollout")
)
ACCELERATOR_RULES = (
    Rule(
        "accelerator of a role goes with an accelerator of the job: none is the CPU mode of every role",
        "self.accelerator != 'none' || !(has(self.trainer.accelerator) || has(self.rollout.accelerator) || "
        "(has(self.teacher) && has(self.teacher.accelerator)) || self.teachers.exists(t, has(t.accelerator)))",
        lambda spec: not spec.on_cpu or not _named(spec),
    ),
    Rule(
        "trainer and rollout need accelerators of one vendor with weightSync distributed: choose weightSync disk",
        f"self.trainer.weightSync == 'disk' || {_TRAINER} == {_ENGINE}",
        lambda spec: spec.trainer.weight_sync == "disk" or _of_one_vendor(spec),
    ),
)
"""Rules of Spec."""
