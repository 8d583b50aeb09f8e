"""The environment of multi-turn rollouts: what answers the student's messages."""

from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import Rule, matching
from distill_api.spec.reward import RewardSource

ClassName = Annotated[
    str,
    Field(max_length=253),
    matching(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", "must be module:Class"),
]


class Environment(Model):
    """What answers the student: a class of the user, whose object runs in a process of its own."""

    function: ClassName = Field(description="module:Class with async reset(row) and step(message).")
    max_turns: Annotated[int, Field(ge=1, le=1000)] = Field(8, description="Upper bound of the student's turns.")
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(60, description="Upper bound of one call in seconds.")
    tools: Annotated[str, Field(max_length=1024)] | None = Field(None, description="JSON file of OpenAI tool schemas.")


def _goes_with_rewards(spec: Any) -> bool:
    source, objective = spec.objective.reward.source, spec.objective
    if spec.rollout.environment is None:
        return source is not RewardSource.ENVIRONMENT
    return source in (RewardSource.NONE, RewardSource.ENVIRONMENT) and objective.dataset_share == 0


ENVIRONMENT_REWARD = Rule(
    "rollout.environment goes with reward.source none or environment and datasetShare 0, source environment with it",
    "has(self.rollout.environment) ? self.objective.reward.source in ['none', 'environment'] && "
    "self.objective.datasetShare == 0.0 : self.objective.reward.source != 'environment'",
    _goes_with_rewards,
)
"""The rule of a job's spec."""


def problems(spec: Any) -> list[str]:
    """Return a sentence for each reward of a source or an evaluation that goes with no environment, or with one only.

    `validate` and the operator say them; they are no rules of the API server.
    """
    found = []
    for path, reward in (
        *((f"data.sources[{s.name}]", s.reward) for s in spec.data.sources if s.reward is not None),
        *((f"evaluation[{e.name}]", e.reward) for e in spec.evaluation),
    ):
        if reward.source is RewardSource.ENVIRONMENT and spec.rollout.environment is None:
            found.append(f"{path}.reward.source: environment goes with rollout.environment only")
    if spec.rollout.environment is None:
        return found
    for source in spec.data.sources:
        if source.reward is not None and source.reward.source not in (RewardSource.NONE, RewardSource.ENVIRONMENT):
            found.append(
                f"data.sources[{source.name}].reward.source: {source.reward.source.value} grades responses; "
                "rollout.environment goes with none or environment, its own reward"
            )
    for evaluation in spec.evaluation:
        if evaluation.reward.source is RewardSource.ENVIRONMENT and evaluation.score_teacher:
            found.append(
                f"evaluation[{evaluation.name}].scoreTeacher: the teacher has no conversations with an environment; "
                "leave it out"
            )
    return found
