"""The student and its trainer: pods, parallelism, the optimiser, and the weight sync to the engines."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model, Path, Tokens
from distill_api.pods.template import RoleTemplate
from distill_api.role_accelerators import DESCRIPTION, RoleAccelerator
from distill_api.rules import Rule


class Student(Model):
    """The model that is trained."""

    model: Path = Field(description="Hugging Face checkpoint of the student: a hub id, or a path on a mounted volume.")


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
    """Parallelism of the student over the trainer's ranks; what these sizes leave of the ranks is data parallel."""

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
        description="Sequence parallelism: tensor parallel ranks split, by tokens, the activations that each would "
        "hold whole. A mixture of experts with tensor parallelism always uses it.",
    )
    pipeline: Annotated[int, Field(ge=1, le=256)] = Field(
        1,
        description="Pipeline parallel size: number of pipeline stages, which must divide the number of the student's "
        "layers.",
    )
    context: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Context parallel size: the number of ranks over which the tokens of each sequence are split."
    )
    expert: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Expert parallel size: the number of data and context parallel ranks over which the experts of a "
        "mixture are split; it must divide the number of experts. All other weights stay on each rank.",
    )

    @property
    def ranks_of_replica(self) -> int:
        """Return the number of ranks that hold one replica of the student."""
        return self.tensor * self.pipeline * self.context

    @property
    def ranks_with_experts(self) -> int:
        """Return the number of ranks that together hold all experts once."""
        return self.tensor * self.pipeline * self.expert


class Optimizer(Model):
    """AdamW with decoupled weight decay, and the schedule of its learning rate."""

    rules = (
        Rule(
            "minLearningRate must not exceed learningRate",
            "self.minLearningRate <= self.learningRate",
            lambda optimizer: optimizer.min_learning_rate <= optimizer.learning_rate,
        ),
        Rule(
            "decayShare goes with schedule wsd only",
            "self.schedule == 'wsd' || self.decayShare == 0.1",
            lambda optimizer: optimizer.schedule is RateSchedule.WSD or optimizer.decay_share == 0.1,
        ),
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        1e-6, description="Learning rate after warm-up, before it decays."
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay rate of AdamW's first moment.")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.98, description="Decay rate of AdamW's second moment.")
    epsilon: Annotated[float, Field(gt=0, le=0.1)] = Field(
        1e-8, description="AdamW's epsilon, added to the denominator."
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.1, description="Decoupled weight decay of AdamW.")
    clip_grad: Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0, description="Gradient clipping: upper bound of the gradient's norm."
    )
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        0, description="Optimiser steps of linear warm-up from 0."
    )
    schedule: RateSchedule = Field(
        RateSchedule.CONSTANT,
        description="Learning rate schedule after warm-up: constant; linear or cosine decay to minLearningRate after "
        "the last step; wsd (warm-up, stable, decay), constant until the last decayShare of schedule.steps.",
    )
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Learning rate at the end of linear, cosine and wsd."
    )
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Share of schedule.steps in which the learning rate of schedule wsd decays."
    )
    distributed: bool = Field(
        False,
        description="Distributed optimiser: split AdamW's moments, and the fp32 master weights of bfloat16, over the "
        "data parallel ranks instead of holding them on each.",
    )


class LoRA(Model):
    """Low-rank adapters (arXiv 2106.09685) on every linear layer of the student; its own weights stay as they are."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank r of the adapters.")
    alpha: Annotated[float, Field(gt=0, le=4096)] = Field(
        32.0, description="Numerator of the adapters' scale, which is alpha / rank."
    )


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
    nodes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Number of trainer pods.")
    gpus_per_node: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="Accelerators of one pod, and so its ranks; with accelerator none, its processes."
    )
    accelerator: RoleAccelerator | None = Field(None, description=DESCRIPTION)
    parallelism: Parallelism = Field(default_factory=Parallelism, description="Parallelism of the student.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="Optimiser and learning rate schedule.")
    lora: LoRA | None = Field(
        None,
        description="Train low-rank adapters instead of all weights. Engines and the exported model get the merged "
        "weights; the adapters alone are exported beside the model, in the format of PEFT.",
    )
    max_tokens_per_micro_batch: Tokens = Field(
        16384,
        description="Token budget of a micro-batch per rank. With context parallelism a micro-batch has this many "
        "tokens on each rank.",
    )
    recompute: Recompute = Field(
        Recompute.AUTO,
        description="Activation recomputation in the backward pass: none, selective (of the MLPs) or full (of whole "
        "layers). auto is full with accelerators, none without.",
    )
    weight_sync: WeightSync = Field(
        WeightSync.DISTRIBUTED,
        description="How new weights reach the engines. distributed: by NCCL, or gloo without accelerators; disk: "
        "through the output volume.",
    )
    template: RoleTemplate = Field(default_factory=RoleTemplate, description="Pods of the trainer.")
