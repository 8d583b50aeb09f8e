"""A teacher that is the student itself, asked with privileged context: which weights it scores with, and its rules."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import Rule


class StudentWeights(StrEnum):
    LIVE = "live"


class StudentAsTeacher(Model):
    """The student as its own teacher, which is asked with what the student does not see (OPSD, arXiv 2601.18734)."""

    weights: StudentWeights = Field(
        StudentWeights.LIVE,
        description="Weights that score. live: those that the rollout engines hold, which score in slots of "
        "rollout.maxConcurrentRequests.",
    )


_OTHER = "(!has(self.teacher) || !has(self.teacher.student))"
_PRIVILEGED = "(has({0}.prompts.teacherPrompt) || has({0}.prompts.teacherSystemPrompt))"


def _is_student(spec: Any) -> bool:
    return spec.teacher is not None and spec.teacher.student is not None


def _is_privileged(part: Any) -> bool:
    return part.prompts.teacher_prompt is not None or part.prompts.teacher_system_prompt is not None


RULES = (
    Rule(
        "student goes with spec.teacher only, which is the one teacher of a job: teachers must be other models",
        "self.teachers.all(t, !has(t.student))",
        lambda spec: all(t.student is None for t in spec.teachers),
    ),
    Rule(
        "teacher.student needs prompts.teacherPrompt or teacherSystemPrompt, in data of each source and in each "
        "evaluation with measureReverseKL: asked the same as the student it says the same, and the divergence is 0",
        f"{_OTHER} || ((!has(self.data.prompts) || {_PRIVILEGED.format('self.data')}) && "
        f"self.data.sources.all(s, {_PRIVILEGED.format('s')}) && "
        f"self.evaluation.all(e, !e.measureReverseKL || {_PRIVILEGED.format('e')}))",
        lambda spec: (
            not _is_student(spec)
            or (
                all(map(_is_privileged, spec.data.all_sources))
                and all(_is_privileged(e) for e in spec.evaluation if e.measure_reverse_kl)
            )
        ),
    ),
    Rule(
        "teacher.student goes with evaluations whose scoreTeacher is false: it changes with the student, so give its "
        "hint to an evaluation as the prompt",
        f"{_OTHER} || self.evaluation.all(e, !e.scoreTeacher)",
        lambda spec: not _is_student(spec) or not any(e.score_teacher for e in spec.evaluation),
    ),
    Rule(
        "teacher.student goes with objective.teacherLogprobs live only: what it says of a response changes with it",
        f"{_OTHER} || self.objective.teacherLogprobs == 'live'",
        lambda spec: not _is_student(spec) or spec.objective.teacher_logprobs == "live",
    ),
    Rule(
        "teacher.student goes without rollout.partial: new weights could come in the middle of a score",
        f"{_OTHER} || !self.rollout.partial",
        lambda spec: not _is_student(spec) or not spec.rollout.partial,
    ),
)
"""The rules of a spec."""
