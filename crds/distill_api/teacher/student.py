"""A teacher that is the student itself, asked with privileged context: which weights it scores with, and its rules."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import Rule


class StudentWeights(StrEnum):
    LIVE = "live"
    LAGGED = "lagged"
    EMA = "ema"


class StudentAsTeacher(Model):
    """The student as its own teacher, which is asked with what the student does not see (OPSD, arXiv 2601.18734)."""

    rules = (
        Rule(
            "everySteps goes with weights other than live only, which are those of the last step anyway",
            "self.weights != 'live' || self.everySteps == 10",
            lambda student: student.weights is not StudentWeights.LIVE or student.every_steps == 10,
        ),
        Rule(
            "decay goes with weights ema only",
            "self.weights == 'ema' || self.decay == 0.99",
            lambda student: student.weights is StudentWeights.EMA or student.decay == 0.99,
        ),
    )
    weights: StudentWeights = Field(
        StudentWeights.LIVE,
        description="Weights that score. live: those that the rollout engines hold, which score in slots of "
        "rollout.maxConcurrentRequests; lagged: servers of the job's own, which get the student's every everySteps, "
        "over the output volume; ema: the same, with the exponential moving average of the student's.",
    )
    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        10,
        description="Optimiser steps after which the servers get new weights; before, they have the student's start.",
    )
    decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="Decay of the average of weights ema, at each optimiser step."
    )


_OTHER = "(!has(self.teacher) || !has(self.teacher.student))"
_PRIVILEGED = "(has({0}.prompts.teacherPrompt) || has({0}.prompts.teacherSystemPrompt))"


def teaches_itself(spec: Any) -> bool:
    """Return whether the teacher of a job's spec is its student."""
    return spec.teacher is not None and spec.teacher.student is not None


def engines_score(spec: Any) -> bool:
    """Return whether the rollout engines score too: the teacher is the student with the weights that they hold."""
    return teaches_itself(spec) and spec.teacher.student.weights is StudentWeights.LIVE


def average_decay(spec: Any) -> float | None:
    """Return the decay of the average that the trainer keeps of its weights for the teacher; None without one."""
    if not teaches_itself(spec) or spec.teacher.student.weights is not StudentWeights.EMA:
        return None
    return float(spec.teacher.student.decay)


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
            not teaches_itself(spec)
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
        lambda spec: not teaches_itself(spec) or not any(e.score_teacher for e in spec.evaluation),
    ),
    Rule(
        "teacher.student goes with objective.teacherLogprobs live only: what it says of a response changes with it",
        f"{_OTHER} || self.objective.teacherLogprobs == 'live'",
        lambda spec: not teaches_itself(spec) or spec.objective.teacher_logprobs == "live",
    ),
    Rule(
        "teacher.student with weights live goes without rollout.partial: new weights could come in the middle of a "
        "score",
        f"{_OTHER} || self.teacher.student.weights != 'live' || !self.rollout.partial",
        lambda spec: not engines_score(spec) or not spec.rollout.partial,
    ),
    Rule(
        "teacher.student with weights ema goes without trainer.lora: the average of two factors is not that of their "
        "product; take lagged",
        f"{_OTHER} || self.teacher.student.weights != 'ema' || !has(self.trainer.lora)",
        lambda spec: average_decay(spec) is None or spec.trainer.lora is None,
    ),
)
"""The rules of a spec."""
