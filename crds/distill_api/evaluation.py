"""Held-out measurements."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model, Tokens
from distill_api.fields import Name
from distill_api.objective import NEEDS_ANSWER, Reward, RewardSource, has_needed_answer, has_needed_answer_cel
from distill_api.prompts import Prompts
from distill_api.rollout import Sampling
from distill_api.routing import ONE_ROUTE
from distill_api.rules import Rule
from distill_api.teacher_source import TeacherName


class Evaluation(Model):
    """Held-out prompts on which the student is measured."""

    rules = (
        Rule(
            "set a reward.source, or leave measureReverseKL true: nothing would be measured",
            "self.reward.source != 'none' || self.measureReverseKL",
            lambda e: e.reward.source is not RewardSource.NONE or e.measure_reverse_kl,
        ),
        Rule(
            f"prompts.answerField must be set: {NEEDS_ANSWER}",
            has_needed_answer_cel("self.reward", "self.prompts"),
            lambda e: has_needed_answer(e.reward, e.prompts),
        ),
        ONE_ROUTE,
    )
    name: Name = Field(description="Name in status and metrics: lower-case letters, digits and dashes.")
    prompts: Prompts = Field(description="Where the prompts come from.")
    max_prompts: Annotated[int, Field(ge=1, le=1_000_000)] = Field(256, description="Only the first so many.")
    reward: Reward = Field(default_factory=Reward, description="The score; source none measures the KL alone.")
    samples_per_prompt: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Responses to each prompt.")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=0.0),
        description="How scored responses are drawn; greedy by default.",
    )
    max_response_tokens: Tokens | None = Field(None, description="As rollout.maxResponseTokens if absent.")
    measure_reverse_kl: bool = Field(
        True,
        alias="measureReverseKL",
        description="Also draw one response a prompt as in training, and score its reverse KL to the teacher.",
    )
    score_teacher: bool = Field(False, description="Also score the teacher's own responses, once, at the start.")
    teacher: TeacherName | None = Field(
        None, description="The one of spec.teachers that the student is measured against on these prompts."
    )
