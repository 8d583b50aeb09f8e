"""The trainer's pods: how the student is split over them, its optimiser, and how its weights reach the engines."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model, Tokens
from distill_api.rules import Rule
from distill_api.template import PodTemplate


class WeightSync(StrEnum):
    DISTRIBUTED = "distributed"
    DISK = "disk"


class RateSchedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "wsd"


class Recompute(StrEnum):
    AUTO = "auto"
    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class Parallelism(Model):
    """How the student is split over the trainer's ranks; the rest is data parallel."""

    rules = (
        Rule(
            "sequence needs a tensor parallel size above 1",
            "!self.sequence || self.tensor > 1",
            lambda parallelism: not parallelism.sequence or parallelism.tensor > 1,
        ),
    )
    tensor: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Tensor parallel size.")
    sequence: bool = Field(
        False,
        description="Sequence parallel: tensor parallel ranks split what they would each keep whole, by tokens. A "
        "mixture of experts is trained so in any case.",
    )
    pipeline: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="Pipeline stages; they must divide the student's layers."
    )
    context: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Context parallel size: so many ranks split each sequence, and so each micro-batch."
    )
    expert: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Expert parallel size: so many replicas (data x context) split the experts of a mixture; it must "
        "divide their number. Everything else stays on each of them.",
    )

    @property
    def ranks_of_replica(self) -> int:
        """Ranks of one replica of the student."""
        return self.tensor * self.pipeline * self.context

    @property
    def ranks_with_experts(self) -> int:
        """Ranks that hold all experts together once."""
        return self.tensor * self.pipeline * self.expert


class Optimizer(Model):
    """AdamW with decoupled weight decay, and the schedule of its learning rate."""

    rules = (
        Rule(
            "minLearningRate must not exceed learningRate",
            "self.minLearningRate <= self.learningRate",
            lambda optimizer: optimizer.min_learning_rate <= optimizer.learning_rate,
        ),
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-6, description="Learning rate after warm-up.")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the first moment.")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.98, description="Decay of the second moment.")
    epsilon: Annotated[float, Field(gt=0, le=0.1)] = Field(1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.1, description="Decoupled weight decay.")
    clip_grad: Annotated[float, Field(gt=0, le=1e6)] = Field(1.0, description="Largest norm of the gradient.")
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = Field(0, description="Steps of linear warm-up.")
    schedule: RateSchedule = Field(
        RateSchedule.CONSTANT,
        description="After warm-up: constant; linear or cosine, down to minLearningRate after the last step; wsd, "
        "constant until it falls in the last decayShare of schedule.steps.",
    )
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Where linear, cosine and wsd end.")
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="wsd only: share of schedule.steps in which the rate decays."
    )
    distributed: bool = Field(
        False,
        description="Split the moments, and bfloat16's fp32 weights, over data parallel ranks instead of "
        "holding them on each.",
    )


class LoRA(Model):
    """Low-rank adapters (arXiv 2106.09685) on every linear layer of the student; its own weights stay as they are."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank of the adapters.")
    alpha: Annotated[float, Field(gt=0, le=4096)] = Field(32.0, description="Their scale is alpha / rank.")


class Trainer(Model):
    """Megatron trainer pods."""

    rules = (
        Rule(
            "parallelism.tensor x pipeline x context must divide nodes x gpusPerNode",
            "(self.nodes * self.gpusPerNode) % "
            "(self.parallelism.tensor * self.parallelism.pipeline * self.parallelism.context) == 0",
            lambda trainer: trainer.nodes * trainer.gpus_per_node % trainer.parallelism.ranks_of_replica == 0,
        ),
        Rule(
            "parallelism.tensor x pipeline x expert must divide nodes x gpusPerNode",
            "(self.nodes * self.gpusPerNode) % "
            "(self.parallelism.tensor * self.parallelism.pipeline * self.parallelism.expert) == 0",
            lambda trainer: trainer.nodes * trainer.gpus_per_node % trainer.parallelism.ranks_with_experts == 0,
        ),
    )
    nodes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Pods.")
    gpus_per_node: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="Accelerators, and so ranks, of one pod; with accelerator none: processes."
    )
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How the model is split.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimiser.")
    lora: LoRA | None = Field(
        None,
        description="Train low-rank adapters instead of all weights. Engines and the exported model get the weights "
        "with the adapters added in; the adapters alone are exported beside it, as PEFT reads them.",
    )
    max_tokens_per_micro_batch: Tokens = Field(
        16384, description="Token budget of one micro-batch of a rank; of ranks that split sequences, each has so many."
    )
    recompute: Recompute = Field(
        Recompute.AUTO,
        description="Activations made again in the backward pass: none, selective (those of the MLPs), full (of whole "
        "layers). auto is full with accelerators, none without.",
    )
    weight_sync: WeightSync = Field(
        WeightSync.DISTRIBUTED,
        description="distributed: NCCL, or gloo without accelerators; disk: through the output volume.",
    )
    template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the trainer's pods.")
