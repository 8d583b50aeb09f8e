"""Training prompts: of one source, or mixed from several."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.fields import Name
from distill_api.objective import Reward
from distill_api.prompts import Prompts
from distill_api.routing import ONE_ROUTE
from distill_api.rules import ListMap, Rule
from distill_api.teacher_source import TeacherName


class Source(Model):
    """One of several sources of training prompts."""

    rules = (ONE_ROUTE,)
    name: Name = Field(description="Name in metrics: lower-case letters, digits and dashes.")
    prompts: Prompts = Field(description="Where its prompts come from.")
    weight: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        1.0, description="Its share of the prompts, relative to the other sources' weights."
    )
    reward: Reward | None = Field(None, description="For its prompts instead of objective.reward.")
    teacher: TeacherName | None = Field(None, description="The one of spec.teachers that scores its prompts.")


class Data(Model):
    """Training prompts: of one source, or mixed from several."""

    rules = (
        Rule(
            "set exactly one of prompts and sources",
            "has(self.prompts) != (self.sources.size() > 0)",
            lambda data: (data.prompts is not None) != bool(data.sources),
        ),
    )
    prompts: Prompts | None = Field(None, description="Where the training prompts come from.")
    sources: Annotated[list[Source], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Several sources instead of prompts, mixed by weight."
    )
    default_teacher: TeacherName | None = Field(
        None,
        description="The one of spec.teachers that scores a prompt which names none, or none of them. Without it such "
        "a prompt ends the job before its first step.",
    )
    shuffle: bool = Field(True, description="Shuffle the prompts of a source anew in each epoch, by the job's seed.")

    @property
    def all_sources(self) -> list[Source]:
        """`sources`; or the one that `prompts` is, by the name prompts."""
        return self.sources if self.prompts is None else [Source(name="prompts", prompts=self.prompts)]
