"""The environment of multi-turn rollouts: what answers the student's messages."""

from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Argument, Model, preserve_unknown
from distill_api.rules import Rule, matching
from distill_api.spec.reward import RewardSource

ClassName = Annotated[
    str,
    Field(max_length=253),
    matching(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", "must be module:Class"),
]


BEGINS_WITH_A_PROGRAM = Rule(
    "must begin with a program, such as [python, -m, my_agent]",
    "self.size() > 0 && self[0] != ''",
    lambda command: bool(command and command[0]),
)


class Agent(Model):
    """A program of the user that speaks OpenAI's API with the student."""

    command: Annotated[list[Argument], Field(max_length=64), BEGINS_WITH_A_PROGRAM] = Field(
        description="Program and arguments, run once for each response."
    )


class Verifiers(Model):
    """An environment of the package verifiers, played by a Python that has it."""

    name: Annotated[
        str,
        Field(max_length=253),
        matching(r"^[A-Za-z0-9_][\w./-]*$", "must be a name that verifiers.load_environment takes"),
    ] = Field(description="Name of the environment, as load_environment takes it.")
    arguments: Annotated[dict[str, Any], Field(max_length=32, json_schema_extra=preserve_unknown())] | None = Field(
        None, description="Arguments of load_environment, by name."
    )
    python: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        "python", description="Python that has verifiers and the environment."
    )


class TurnCurriculum(Model):
    """Fewer turns at first (TCOD, arXiv 2604.24005)."""

    from_turns: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="Upper bound of the turns in the first step."
    )
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        description="Number of steps over which the bound grows evenly to maxTurns."
    )


class Environment(Model):
    """What answers the student: exactly one of a class of the user, an agent, and an environment of verifiers."""

    rules = (
        Rule(
            "set exactly one of function, agent and verifiers",
            "(has(self.function) ? 1 : 0) + (has(self.agent) ? 1 : 0) + (has(self.verifiers) ? 1 : 0) == 1",
            lambda e: sum(kind is not None for kind in (e.function, e.agent, e.verifiers)) == 1,
        ),
        Rule(
            "tools goes with function: agents and verifiers name their own in their requests",
            "!has(self.tools) || has(self.function)",
            lambda environment: environment.tools is None or environment.function is not None,
        ),
        Rule(
            "curriculum.fromTurns must be at most maxTurns",
            "!has(self.curriculum) || self.curriculum.fromTurns <= self.maxTurns",
            lambda e: e.curriculum is None or e.curriculum.from_turns <= e.max_turns,
        ),
    )
    function: ClassName | None = Field(None, description="module:Class with async reset(row) and step(message).")
    agent: Agent | None = Field(None, description="Agent that speaks OpenAI's API, instead of function.")
    verifiers: Verifiers | None = Field(None, description="Environment of the package verifiers, instead of function.")
    max_turns: Annotated[int, Field(ge=1, le=1000)] = Field(8, description="Upper bound of the student's turns.")
    curriculum: TurnCurriculum | None = Field(None, description="Curriculum on the turns of training; by default none.")
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        60, description="Upper bound in seconds of one call, or of an agent's time between two requests."
    )
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
