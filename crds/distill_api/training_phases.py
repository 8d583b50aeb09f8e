"""Phases: stretches of a run with objectives of their own, and the rules of a spec for them.

A phase has spec.objective with some fields changed. What is changed must be an objective by itself, and go with the
rest of the spec as spec.objective does: the rules of both are asked again, of each phase.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from distill_api.base import Model
from distill_api.fields import Name
from distill_api.rules import ListMap, Rule
from distill_api.spec.objective import Baseline, DiscountedReturn, Divergence, Objective, Support, Weighting
from distill_api.spec.schedule import CoefficientSchedule
from distill_api.teacher.control import ON_POLICY, ON_POLICY_OF_PHASE, Control, without_teacher
from distill_api.teacher.dataset_scores import DatasetResponses

if TYPE_CHECKING:
    from distill_api.spec.job_spec import Spec

Coefficient = Annotated[float, Field(ge=0, le=1000)]


def _as_in_objective(name: str) -> str:
    return str(Objective.model_fields[name].description)


class PhaseObjective(Model):
    """The fields of the objective that a phase changes. The others, the reward among them, are those of all phases."""

    divergence: Divergence | None = Field(None, description=_as_in_objective("divergence"))
    support: Support | None = Field(None, description=_as_in_objective("support"))
    top_k: Annotated[int, Field(ge=1, le=256)] | None = Field(None, description=_as_in_objective("top_k"))
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description=_as_in_objective("jsd_beta"))
    entry_clip: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description=_as_in_objective("entry_clip"))
    dataset_share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description=_as_in_objective("dataset_share")
    )
    dataset_responses: DatasetResponses | None = Field(None, description=_as_in_objective("dataset_responses"))
    coefficient: Coefficient | None = Field(None, description=_as_in_objective("coefficient"))
    coefficient_schedule: CoefficientSchedule | None = Field(
        None, description="Schedule of coefficient over the steps of the phase."
    )
    discount: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description=_as_in_objective("discount"))
    discounted_return: DiscountedReturn | None = Field(None, description=_as_in_objective("discounted_return"))
    baseline: Baseline | None = Field(None, description=_as_in_objective("baseline"))
    forward_kl_above_entropy: Annotated[float, Field(ge=0, le=20)] | None = Field(
        None, description=_as_in_objective("forward_kl_above_entropy")
    )
    weighting: Weighting | None = Field(None, description=_as_in_objective("weighting"))
    reward_coefficient: Coefficient | None = Field(None, description=_as_in_objective("reward_coefficient"))
    reward_coefficient_schedule: CoefficientSchedule | None = Field(
        None, description="Schedule of rewardCoefficient over the steps of the phase."
    )


class Plateau(Model):
    """An evaluation that no longer gains: the end of a phase."""

    evaluation: Name = Field(description="Name of the evaluation whose score, or reverse KL without one, is judged.")
    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="Evaluations in a row without a gain of minimumGain over the phase's best before the phase ends."
    )
    minimum_gain: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="Gain that counts must be more than this: of the score, or nats of reverse KL."
    )


class TrainingPhase(Model):
    """A stretch of the run with an objective of its own."""

    name: Name = Field(description="Name of the phase in metrics: lower-case letters, digits and dashes.")
    objective: PhaseObjective = Field(
        default_factory=PhaseObjective, description="Fields that differ from spec.objective in this phase."
    )
    until_step: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Optimiser steps of the run after which the phase ends."
    )
    until_flat: Plateau | None = Field(
        None, description="End of the phase where an evaluation no longer gains, 1 + maxPolicyLag steps after it."
    )


Phases = Annotated[list[TrainingPhase], Field(max_length=8), ListMap("name")]

RULES = (
    Rule(
        "phases: each but the last needs untilStep or untilFlat, or both, and the last has neither: it lasts to "
        "schedule.steps",
        "self.phases.all(p, (has(p.untilStep) || has(p.untilFlat)) == "
        "(p.name != self.phases[self.phases.size() - 1].name))",
        lambda spec: all(
            (phase.until_step is not None or phase.until_flat is not None) == (phase is not spec.phases[-1])
            for phase in spec.phases
        ),
    ),
    Rule(
        "phases: untilStep must rise from phase to phase",
        "self.phases.filter(p, has(p.untilStep)).map(p, p.untilStep).isSorted() && self.phases.all(p, "
        "!has(p.untilStep) || self.phases.exists_one(q, has(q.untilStep) && q.untilStep == p.untilStep))",
        lambda spec: (ends := _ends(spec)) == sorted(set(ends)),
    ),
    Rule(
        "phases: untilStep must be less than schedule.steps, or the phases after it have no steps",
        "self.phases.all(p, !has(p.untilStep) || p.untilStep < self.schedule.steps)",
        lambda spec: all(end < spec.schedule.steps for end in _ends(spec)),
    ),
    Rule(
        "phases: untilFlat.evaluation must be the name of one of spec.evaluation",
        "self.phases.all(p, !has(p.untilFlat) || self.evaluation.exists(e, e.name == p.untilFlat.evaluation))",
        lambda spec: (
            {p.until_flat.evaluation for p in spec.phases if p.until_flat} <= {e.name for e in spec.evaluation}
        ),
    ),
    # A store knows the scores of one support: what another phase needs would be missing in it.
    Rule(
        "phases go with objective.teacherLogprobs live only",
        "self.phases.size() == 0 || self.objective.teacherLogprobs == 'live'",
        lambda spec: not spec.phases or spec.objective.teacher_logprobs == "live",
    ),
)
"""The rules of a spec about its phases, but for their objectives."""


def objectives(spec: Spec) -> list[Objective]:
    """Return the objective of each phase; the one of the spec where it has no phases.

    Raises ValidationError for one that is none: a spec has no such phase.
    """
    return [_merged(spec, phase) for phase in spec.phases] or [spec.objective]


def _merged(spec: Spec, phase: TrainingPhase) -> Objective:
    """Return the objective of a phase: without the control where no teacher is in it that could be replaced, so that
    the job and its control have the phase in common."""
    merged = spec.objective.model_dump(exclude_none=True) | phase.objective.model_dump(exclude_none=True)
    taught = Objective.model_validate({**merged, "control": Control.NONE})
    return taught if without_teacher(taught) else Objective.model_validate(merged)


def teacher_top_k(spec: Spec) -> int | None:
    """Return the most of the teacher's likeliest tokens that a phase needs at each response token; None for none."""
    return max((k for o in objectives(spec) if (k := o.teacher_top_k) is not None), default=None)


def problems(spec: Spec) -> list[str]:
    """Return a sentence for each rule that the objective of a phase breaks; the API server says `cluster_rule`."""
    found = []
    for phase in spec.phases:
        one = spec.model_copy(update={"phases": [phase]})
        try:
            alone = spec.model_copy(update={"objective": objectives(one)[0], "phases": []})
        except ValidationError as error:
            said = [str(e["msg"]).removeprefix("Value error, ") for e in error.errors(include_url=False)]
        else:
            said = [rule.message for rule in spec.rules if not rule.holds(alone)]
        found += [f"phases[{phase.name}].objective: {sentence}" for sentence in said]
    return found


def cluster_rule(of_spec: Sequence[Rule]) -> tuple[str, str]:
    """Return message and CEL of what `problems` says; `of_spec` are the rules of a spec about its objective."""
    own = [ON_POLICY_OF_PHASE if rule is ON_POLICY else rule for rule in Objective.rules]
    parts = [*_of_phase("self", own), *_of_phase("self.objective", of_spec)]
    return (
        "phases: the objective of each, which is spec.objective with what the phase changes, must be valid by itself; "
        "`distill validate` says what is not",
        f"self.phases.all(p, {' && '.join(f'({cel})' for cel in parts)})",
    )


def _of_phase(objective: str, rules: Sequence[Rule]) -> Iterator[str]:
    """Yield the CEL of rules about the objective at a path, about that of phase p instead, where a phase may
    change what they are about."""
    changeable = {field.alias for field in PhaseObjective.model_fields.values()}

    def effective(found: re.Match[str]) -> str:
        name, below = found["name"], found["below"] or ""
        own, common = f"p.objective.{name}", f"self.objective.{name}"
        if name not in changeable:
            return f"has({common})" if found["has"] else common + below
        if found["has"]:
            return f"(has({own}) || has({common}))"
        # To CEL the two weightings are of two types, and their fields of one.
        return f"(has({own}) ? {own}{below} : {common}{below})"

    field = re.compile(rf"(?P<has>has\()?\b{re.escape(objective)}\.(?P<name>\w+)(?(has)\)|(?P<below>(\.\w+)*))")
    for rule in rules:
        if any(found["name"] in changeable for found in field.finditer(rule.cel)):  # else it says nothing of a phase
            yield field.sub(effective, rule.cel)


def _ends(spec: Spec) -> list[int]:
    return [phase.until_step for phase in spec.phases if phase.until_step is not None]
