"""Evaluations: measurements of the student on held-out prompts."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model, Tokens
from distill_api.fields import Name
from distill_api.rules import Rule
from distill_api.spec.prompts import Prompts
from distill_api.spec.reward import NEEDS_ANSWER, Reward, RewardSource, has_needed_answer, has_needed_answer_cel
from distill_api.spec.rollout import Sampling
from distill_api.teacher.routing import ONE_ROUTE
from distill_api.teacher.source import TeacherName


class Evaluation(Model):
    """An evaluation: held-out prompts on which the student is measured."""

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
    name: Name = Field(
        description="Name of the evaluation in status and metrics: lower-case letters, digits and dashes."
    )
    prompts: Prompts = Field(description="Source of the held-out prompts.")
    max_prompts: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        256, description="Upper bound of the prompts used, from the first on."
    )
    reward: Reward = Field(
        default_factory=Reward, description="Reward whose mean is the score; source none measures the reverse KL alone."
    )
    samples_per_prompt: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="Number of scored responses for each prompt."
    )
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=0.0),
        description="Sampling parameters of the scored responses; greedy decoding by default.",
    )
    max_response_tokens: Tokens | None = Field(
        None, description="Upper bound of a response in tokens; by default rollout.maxResponseTokens."
    )
    measure_reverse_kl: bool = Field(
        True,
        alias="measureReverseKL",
        description="Also sample one response per prompt as in training, and measure its reverse KL to the teacher.",
    )
    score_teacher: bool = Field(
        False, description="Also score responses of the teacher itself, once, at the start of the run."
    )
    teacher: TeacherName | None = Field(
        None, description="Name of the one of spec.teachers to which the reverse KL on these prompts is measured."
    )
