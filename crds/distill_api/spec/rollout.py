"""The rollout: generation by the student's SGLang engines, and its sampling."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Argument, Model, Tokens
from distill_api.fields import Count
from distill_api.pods.template import RoleTemplate
from distill_api.role_accelerators import ACCELERATOR_IS_IMMUTABLE, DESCRIPTION, RoleAccelerator
from distill_api.rules import Rule
from distill_api.spec.environment import Environment

# Strict, as the API server is: no text becomes a number in a list.
TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]


class Truncated(StrEnum):
    KEEP = "keep"
    MASK = "mask"
    DROP = "drop"


class Sampling(Model):
    """Sampling parameters. The teacher scores at temperature 1, so the student samples at 1 in training."""

    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="Sampling temperature; 0 is greedy decoding, in evaluations only."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Probability mass of nucleus sampling; 1 is off."
    )


class Rollout(Model):
    """Generation by the student: SGLang engines in a RayCluster."""

    mutable = frozenset({"replicas"})
    transitions = (
        (
            "accelerator and environment are immutable: make a new job",
            f"{ACCELERATOR_IS_IMMUTABLE[1]} && has(self.environment) == has(oldSelf.environment)",
        ),
    )
    rules = (
        # The teacher scores at temperature 1 over the whole vocabulary: any other sampling is off-policy.
        Rule(
            "sampling must be temperature 1.0 and topP 1.0, as the teacher scores",
            "self.sampling.temperature == 1.0 && self.sampling.topP == 1.0",
            lambda rollout: rollout.sampling.temperature == 1.0 and rollout.sampling.top_p == 1.0,
        ),
        Rule(
            "partial goes with maxPolicyLag above 0 only: without lag nothing is under way when new weights come",
            "!self.partial || self.maxPolicyLag > 0",
            lambda rollout: not rollout.partial or rollout.max_policy_lag > 0,
        ),
    )
    replicas: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="Number of SGLang engines, each in a Ray worker pod. It may change while the job runs."
    )
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Tensor parallel size: accelerators of one engine, all in one pod."
    )
    accelerator: RoleAccelerator | None = Field(None, description=DESCRIPTION)
    prompts_per_step: Count = Field(16, description="Number of prompts per optimiser step.")
    samples_per_prompt: Annotated[int, Field(ge=1, le=1024)] = Field(
        4, description="Number of responses sampled for each prompt."
    )
    max_prompt_tokens: Tokens = Field(
        2048,
        description="Upper bound of a prompt in tokens; a longer one is left out, and counted in "
        "distill_prompts_overlong.",
    )
    max_response_tokens: Tokens = Field(
        4096, description="Upper bound of a response in tokens, where generation is cut off."
    )
    environment: Environment | None = Field(
        None,
        description="Environment of multi-turn responses.",
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16)] = Field(
        default_factory=list,
        description="Token ids that end a response, besides those of the student's own files. With none given, the end "
        "of turn of the student's chat template does too, where a teacher's files name it as an end.",
    )
    truncated: Truncated = Field(
        Truncated.KEEP,
        description="What becomes of a response that was cut off at maxResponseTokens. keep: it is trained on like the "
        "others; mask: its reward counts in its group, and none of its tokens is trained on; drop: it is neither "
        "scored nor graded, as if it had not been sampled, and counted in distill_samples_failed.",
    )
    sampling: Sampling = Field(default_factory=Sampling, description="Sampling parameters of the responses.")
    max_policy_lag: Annotated[int, Field(ge=0, le=64)] = Field(
        0,
        description="Upper bound of the policy lag: optimiser steps by which the weights that generate a response may "
        "be behind the trainer. 0 is strictly on-policy.",
    )
    partial: bool = Field(
        False,
        description="Partial rollouts: a response in flight when new weights arrive continues under them, each token "
        "marked with its weight version; false lets it finish first. Needs maxPolicyLag above 0.",
    )
    max_concurrent_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        256, description="Upper bound of the responses that one engine generates at once."
    )
    engine_args: Annotated[list[Argument], Field(max_length=64)] = Field(
        default_factory=list, description="Additional command-line arguments of the SGLang engines."
    )
    template: RoleTemplate = Field(default_factory=RoleTemplate, description="Pods of the engines.")
    head_template: RoleTemplate = Field(default_factory=RoleTemplate, description="Pod of the Ray head.")
