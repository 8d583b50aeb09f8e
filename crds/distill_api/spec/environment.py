"""The environment of multi-turn rollouts: what answers the student's messages."""

from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import Rule, matching
from distill_api.spec.reward import RewardSource

ClassName = Annotated[
    str,
    Field(max_length=253),
    matching(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", "must be module:Class, as my_envs:Calculator"),
]


class Environment(Model):
    """What answers the student: a class of the user, whose object runs in a process of its own."""

    function: ClassName = Field(description="module:Class with async reset(row) and step(message).")
    max_turns: Annotated[int, Field(ge=1, le=1000)] = Field(8, description="Upper bound of the student's turns.")
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(60, description="Upper bound of one call in seconds.")
    tools: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Path of a JSON file: a list of OpenAI tool schemas."
    )


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
