"""The verifiable reward of a response, and which prompts it can grade."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import WITHOUT_CREDENTIALS, Rule, matching
from distill_api.spec.prompts import Prompts

FunctionName = Annotated[
    str,
    Field(max_length=253),
    matching(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", "must be module:function, such as my_rewards.code:score"),
]
Url = Annotated[
    str,
    Field(max_length=1024),
    matching(r"^https?://[^/\s]+[^\s]*$", "must be an address that begins with http:// or https://"),
    WITHOUT_CREDENTIALS,
]


class RewardSource(StrEnum):
    NONE = "none"
    EXACT_MATCH = "exact-match"
    MATH = "math"
    REASONING_GYM = "reasoning-gym"
    PYTHON = "python"
    HTTP = "http"
    ENVIRONMENT = "environment"


class Extract(StrEnum):
    BOXED = "boxed"
    FINAL = "final"
    ANYWHERE = "anywhere"


class Reward(Model):
    """A verifiable reward of a whole response."""

    rules = (
        Rule(
            "function goes with source python, and only with it",
            "(self.source == 'python') == has(self.function)",
            lambda reward: (reward.source is RewardSource.PYTHON) == (reward.function is not None),
        ),
        Rule(
            "url goes with source http, and only with it",
            "(self.source == 'http') == has(self.url)",
            lambda reward: (reward.source is RewardSource.HTTP) == (reward.url is not None),
        ),
        Rule(
            "extract goes with source math only",
            "self.source == 'math' || self.extract == 'final'",
            lambda reward: reward.source is RewardSource.MATH or reward.extract is Extract.FINAL,
        ),
    )
    source: RewardSource = Field(RewardSource.NONE, description="What computes the reward.")
    function: FunctionName | None = Field(
        None,
        description="module:function of source python; called with (response, answer, metadata) in a "
        "process of its own, returns a number.",
    )
    extract: Extract = Field(
        Extract.FINAL,
        description="The part of the response that source math compares, after the thinking has ended. boxed: the last "
        "box; final: the last box, else the answer that a sentence states, else the last expression; anywhere: any box "
        "or expression, so that a mention in passing scores too.",
    )
    url: Url | None = Field(
        None,
        description="Service of source http: it is sent {prompt, response, answer, metadata} as JSON by POST, and "
        'answers {"reward": NUMBER}.',
    )
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        30, description="A reward that takes longer fails its sample; of source http, each request."
    )
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        3, description="Times that source http asks again, after a lost connection, a timeout, a 429 or a 5xx."
    )


NEEDS_ANSWER = "source math, or exact-match, compares with an answer"


def has_needed_answer(reward: Reward, prompts: Prompts) -> bool:
    """Return whether the prompts bring the reference answer that the reward compares with, or need none."""
    compares = reward.source in (RewardSource.MATH, RewardSource.EXACT_MATCH)
    return not compares or prompts.reasoning_gym is not None or prompts.answer_field is not None


def has_needed_answer_cel(reward: str, prompts: str) -> str:
    """Return `has_needed_answer` as CEL, of two paths."""
    compares = f"{reward}.source in ['math', 'exact-match']"
    return f"!({compares}) || has({prompts}.reasoningGym) || has({prompts}.answerField)"
