"""The environment of multi-turn rollouts: what answers the student's messages."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model, Path
from distill_api.rules import matching

ClassName = Annotated[
    str,
    Field(max_length=253),
    matching(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", "must be module:Class, such as my_envs.calculator:Calculator"),
]


class Environment(Model):
    """What answers the student: a class of the user, whose object runs in a process of its own."""

    function: ClassName = Field(
        description="module:Class with async reset(row) and step(message); docs/guides/environments.md shows one. What "
        "it raises, answers wrongly or takes too long for fails its sample."
    )
    max_turns: Annotated[int, Field(ge=1, le=1000)] = Field(
        8, description="Upper bound of the student's turns in a conversation."
    )
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        60, description="Upper bound of one call of the environment in seconds."
    )
    tools: Path | None = Field(
        None, description="Path of a JSON file: a list of OpenAI tool schemas, which the chat template renders."
    )
