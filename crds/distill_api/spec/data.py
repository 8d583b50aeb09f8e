"""The training prompts: of one source, or mixed from several."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.fields import Name
from distill_api.rules import ListMap, Rule
from distill_api.spec.prompts import Prompts
from distill_api.spec.reward import Reward
from distill_api.teacher.routing import ONE_ROUTE
from distill_api.teacher.source import TeacherName


class Source(Model):
    """A source of training prompts, one of several."""

    rules = (ONE_ROUTE,)
    name: Name = Field(description="Name of the source in metrics: lower-case letters, digits and dashes.")
    prompts: Prompts = Field(description="Prompts of the source.")
    weight: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        1.0, description="Weight of the source: its share of the prompts, relative to the other sources' weights."
    )
    reward: Reward | None = Field(None, description="Reward of responses to its prompts; by default objective.reward.")
    teacher: TeacherName | None = Field(
        None, description="Name of the one of spec.teachers that scores responses to its prompts."
    )


class Data(Model):
    """The training prompts: of one source, or mixed from several."""

    rules = (
        Rule(
            "set exactly one of prompts and sources",
            "has(self.prompts) != (self.sources.size() > 0)",
            lambda data: (data.prompts is not None) != bool(data.sources),
        ),
    )
    prompts: Prompts | None = Field(None, description="Source of the training prompts, where there is one.")
    sources: Annotated[list[Source], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Several sources instead of prompts, mixed by weight."
    )
    default_teacher: TeacherName | None = Field(
        None,
        description="Name of the one of spec.teachers that scores prompts which name none, or an unknown one. Without "
        "it such a prompt fails the job before its first step.",
    )
    shuffle: bool = Field(
        True, description="Shuffle the prompts of each source in every epoch, by the seed of the job."
    )

    @property
    def all_sources(self) -> list[Source]:
        """Return `sources`, or `prompts` as the one source of the name prompts."""
        return self.sources if self.prompts is None else [Source(name="prompts", prompts=self.prompts)]
