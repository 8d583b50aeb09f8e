"""What the student is trained on: the divergence from its teacher, and a task reward."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.prompts import Prompts
from distill_api.rules import Rule, matching

FunctionName = Annotated[
    str,
    Field(max_length=253),
    matching(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", "must be module:function, such as my_rewards.code:score"),
]
Url = Annotated[
    str,
    Field(max_length=1024),
    matching(r"^https?://[^/\s]+[^\s]*$", "must be an address that begins with http:// or https://"),
]


class Divergence(StrEnum):
    REVERSE_KL = "reverse-kl"
    FORWARD_KL = "forward-kl"
    JSD = "jsd"


class Support(StrEnum):
    SAMPLED_TOKEN = "sampled-token"
    TOP_K = "top-k"


class RewardSource(StrEnum):
    NONE = "none"
    EXACT_MATCH = "exact-match"
    MATH = "math"
    REASONING_GYM = "reasoning-gym"
    PYTHON = "python"
    HTTP = "http"


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
    )
    source: RewardSource = Field(RewardSource.NONE, description="What computes the reward.")
    function: FunctionName | None = Field(
        None, description="module:function of source python; called with (response, answer, metadata), returns a float."
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


ANSWERED = "source math, or exact-match, compares with an answer"


def answered(reward: Reward, prompts: Prompts) -> bool:
    compares = reward.source in (RewardSource.MATH, RewardSource.EXACT_MATCH)
    return not compares or prompts.reasoning_gym is not None or prompts.answer_field is not None


def answered_cel(reward: str, prompts: str) -> str:
    compares = f"{reward}.source in ['math', 'exact-match']"
    return f"!({compares}) || has({prompts}.reasoningGym) || has({prompts}.answerField)"


class Objective(Model):
    """What the student is trained on: a divergence from the teacher on the student's own tokens."""

    rules = (
        Rule(
            "support sampled-token goes with divergence reverse-kl only; choose support top-k",
            "self.support != 'sampled-token' || self.divergence == 'reverse-kl'",
            lambda o: o.support is not Support.SAMPLED_TOKEN or o.divergence is Divergence.REVERSE_KL,
        ),
    )
    divergence: Divergence = Field(Divergence.REVERSE_KL, description="reverse-kl, forward-kl or jsd.")
    support: Support = Field(
        Support.SAMPLED_TOKEN,
        description="sampled-token: the divergence at the token drawn, as an advantage; "
        "top-k: over the teacher's top-k tokens and a tail bucket, differentiated.",
    )
    top_k: Annotated[int, Field(ge=1, le=256)] = Field(16, description="Tokens of support top-k.")
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Weight of the teacher in the mixture of divergence jsd (GKD, arXiv 2306.13649)."
    )
    coefficient: Annotated[float, Field(ge=0, le=1000)] = Field(1.0, description="Weight of the divergence.")
    advantage_clip: Annotated[float, Field(gt=0, le=1000)] = Field(
        10.0, description="Bound, in nats, of the sampled-token term of one token."
    )
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Clip range of the policy ratio (PPO, arXiv 1707.06347)."
    )
    importance_cap: Annotated[float, Field(ge=1, le=100)] = Field(
        2.0, description="Cap of the trainer-to-engine importance weight (truncated importance sampling)."
    )
    reward: Reward = Field(default_factory=Reward, description="A task reward added to the advantage.")
    reward_coefficient: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Weight of the group-normalised task reward."
    )
