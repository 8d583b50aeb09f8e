"""The environment of multi-turn rollouts: what answers the student's messages."""

from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import matching
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


def problems(spec: Any) -> list[str]:
    """Return a sentence for each part of a job that goes with no environment, or with one only.

    No rules of the API server: the CRD, which a client-side apply must be able to carry, has no room for their CEL.
    """
    has_environment = spec.rollout.environment is not None
    graded = {"objective.reward": spec.objective.reward}
    graded |= {f"data.sources[{s.name}].reward": s.reward for s in spec.data.sources if s.reward is not None}
    evaluated = {f"evaluation[{e.name}]": e for e in spec.evaluation if e.reward.source is RewardSource.ENVIRONMENT}
    sources = {path: reward.source for path, reward in graded.items()}
    sources |= {f"{path}.reward": RewardSource.ENVIRONMENT for path in evaluated}
    found = []
    for path, source in sources.items():
        if source is RewardSource.ENVIRONMENT and not has_environment:
            found.append(f"{path}.source: environment goes with rollout.environment only")
        if source not in (RewardSource.NONE, RewardSource.ENVIRONMENT) and has_environment:
            found.append(
                f"{path}.source: {source.value} grades responses; rollout.environment goes with none or environment, "
                "its own reward"
            )
    if has_environment and spec.objective.dataset_share > 0:
        found.append("objective.datasetShare: a data set's response is no conversation with rollout.environment; set 0")
    for path, evaluation in evaluated.items():
        if evaluation.score_teacher:
            found.append(f"{path}.scoreTeacher: the teacher has no conversations with an environment; leave it out")
    return found
