"""The student's own generation."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Argument, Model, Tokens
from distill_api.fields import Count
from distill_api.rules import Rule
from distill_api.template import PodTemplate


class Sampling(Model):
    """How tokens are drawn. The teacher's scores are taken at temperature 1, so the student's must be too."""

    temperature: Annotated[float, Field(ge=0, le=2)] = Field(1.0, description="0 is greedy (evaluation only).")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling; 1 is off.")


class Rollout(Model):
    """The student's own generation: SGLang engines in a RayCluster."""

    mutable = frozenset({"replicas"})
    rules = (
        # The teacher scores at temperature 1 over the whole vocabulary: any other draw is off-policy.
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
    replicas: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="SGLang engines = Ray workers.")
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Accelerators of one engine.")
    prompts_per_step: Count = Field(16, description="Prompts of one optimiser step.")
    samples_per_prompt: Annotated[int, Field(ge=1, le=1024)] = Field(4, description="Responses to each prompt.")
    max_prompt_tokens: Tokens = Field(2048, description="A longer prompt is left out, and counted.")
    max_response_tokens: Tokens = Field(4096, description="A longer response is cut off there.")
    sampling: Sampling = Field(default_factory=Sampling, description="How responses are drawn.")
    max_policy_lag: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Optimiser steps that a rollout may lag behind the trainer. 0 is strictly on-policy."
    )
    partial: bool = Field(
        False,
        description="A response under way when new weights come goes on under them, its tokens marked by version; "
        "false lets it end first. Goes with maxPolicyLag above 0.",
    )
    max_concurrent_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        256, description="Responses that one engine generates at once."
    )
    engine_args: Annotated[list[Argument], Field(max_length=64)] = Field(
        default_factory=list, description="More command line arguments for the SGLang engines."
    )
    template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the engines' pods.")
    head_template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the Ray head's pod.")
