"""The spec of a DistillationJob. Names are the contract; each field has a description, bounds and a sane default."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Argument, Model, Path, ShortText, Text, preserve_unknown
from distill_api.rules import ListMap, Rule, matching
from distill_api.template import PodTemplate

Count = Annotated[int, Field(ge=1, le=4096)]
Tokens = Annotated[int, Field(ge=1, le=1_048_576)]
Seconds = Annotated[int, Field(ge=1, le=31_536_000)]
FunctionName = Annotated[
    str,
    Field(max_length=253),
    matching(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", "must be module:function, such as my_rewards.code:score"),
]
AcceleratorName = Annotated[
    str,
    Field(max_length=253),
    matching(
        r"^(none|[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?)$",
        "must be none, or a resource name such as nvidia.com/gpu",
    ),
]
EvaluationName = Annotated[
    str,
    Field(max_length=40),
    matching(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "must be lower-case letters, digits and dashes, with no dash at an end"
    ),
]
AbsolutePath = Annotated[
    str, Field(max_length=1024), matching(r"^/[^\x00]*$", "must be an absolute path: it must begin with /")
]


class Precision(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


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


class WeightSync(StrEnum):
    DISTRIBUTED = "distributed"
    DISK = "disk"


class Student(Model):
    """The model that is trained."""

    model: Path = Field(description="Hub id, or a path on a mounted volume, of a Hugging Face checkpoint.")


class Teacher(Model):
    """The model that scores every token of the student, served by SGLang."""

    model: Path = Field(description="Hub id, or a path on a mounted volume, of a Hugging Face checkpoint.")
    replicas: Annotated[int, Field(ge=1, le=256)] = Field(1, description="SGLang servers behind one Service.")
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Accelerators of one server.")
    max_concurrent_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="Scoring requests in flight per replica."
    )
    request_timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        120, description="A scoring request that takes longer is sent again."
    )
    engine_args: Annotated[list[Argument], Field(max_length=64)] = Field(
        default_factory=list, description="More command line arguments for the SGLang server."
    )
    template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the teacher's pods.")


class ReasoningGym(Model):
    """Prompts made by reasoning-gym, with a seed, instead of read from a file."""

    task: ShortText = Field(description="Name of the task, such as chain_sum.")
    size: Annotated[int, Field(ge=1, le=10_000_000)] = Field(1000, description="Number of prompts.")
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = Field(0, description="Seed of the generator.")
    options: Annotated[dict[str, Any], Field(max_length=32, json_schema_extra=preserve_unknown())] = Field(
        default_factory=dict, description="Options of the task, such as max_terms."
    )


class Prompts(Model):
    """Where prompts come from: exactly one of path and reasoningGym."""

    rules = (
        Rule(
            "set exactly one of path and reasoningGym",
            "has(self.path) != has(self.reasoningGym)",
            lambda prompts: (prompts.path is None) != (prompts.reasoning_gym is None),
        ),
    )
    path: Path | None = Field(None, description="A JSONL file, or a folder of them, on a mounted volume.")
    reasoning_gym: ReasoningGym | None = Field(None, description="A generated task instead of a file.")
    prompt_field: ShortText = Field(
        "prompt", description="Field of a line that holds the prompt: a string, or a list of chat messages."
    )
    answer_field: ShortText | None = Field(None, description="Field of a line that holds the reference answer.")
    apply_chat_template: bool = Field(True, description="Put the prompt through the student's chat template.")
    system_prompt: Text | None = Field(None, description="System message, when the chat template is applied.")


class Data(Model):
    """Training prompts."""

    prompts: Prompts = Field(description="Where the training prompts come from.")
    shuffle: bool = Field(True, description="Shuffle the prompts anew in each epoch, by the job's seed.")


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
    engine_args: Annotated[list[Argument], Field(max_length=64)] = Field(
        default_factory=list, description="More command line arguments for the SGLang engines."
    )
    template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the engines' pods.")
    head_template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the Ray head's pod.")


class Reward(Model):
    """A verifiable reward of a whole response."""

    rules = (
        Rule(
            "function goes with source python, and only with it",
            "(self.source == 'python') == has(self.function)",
            lambda reward: (reward.source is RewardSource.PYTHON) == (reward.function is not None),
        ),
    )
    source: RewardSource = Field(RewardSource.NONE, description="What computes the reward.")
    function: FunctionName | None = Field(
        None, description="module:function of source python; called with (response, answer, metadata), returns a float."
    )


ANSWERED = "source math, or exact-match, compares with an answer"


def answered(reward: Reward, prompts: Prompts) -> bool:
    compares = reward.source in (RewardSource.MATH, RewardSource.EXACT_MATCH)
    return not compares or prompts.path is None or prompts.answer_field is not None


def answered_cel(reward: str, prompts: str) -> str:
    return f"!({reward}.source in ['math', 'exact-match']) || !has({prompts}.path) || has({prompts}.answerField)"


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


class Parallelism(Model):
    """How the student is split over the trainer's ranks; the rest is data parallel."""

    tensor: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Tensor parallel size.")
    pipeline: Annotated[int, Field(ge=1, le=1)] = Field(1, description="Pipeline parallel size; only 1 so far.")
    context: Annotated[int, Field(ge=1, le=1)] = Field(1, description="Context parallel size; only 1 so far.")
    expert: Annotated[int, Field(ge=1, le=1)] = Field(1, description="Expert parallel size; only 1 so far.")


class Optimizer(Model):
    """AdamW with decoupled weight decay, and a linear warm-up."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-6, description="Learning rate after warm-up.")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the first moment.")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.98, description="Decay of the second moment.")
    epsilon: Annotated[float, Field(gt=0, le=0.1)] = Field(1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.1, description="Decoupled weight decay.")
    clip_grad: Annotated[float, Field(gt=0, le=1e6)] = Field(1.0, description="Largest norm of the gradient.")
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = Field(0, description="Steps of linear warm-up.")


class Trainer(Model):
    """Megatron trainer pods."""

    rules = (
        Rule(
            "parallelism.tensor must divide nodes x gpusPerNode",
            "(self.nodes * self.gpusPerNode) % self.parallelism.tensor == 0",
            lambda trainer: trainer.nodes * trainer.gpus_per_node % trainer.parallelism.tensor == 0,
        ),
    )
    nodes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Pods.")
    gpus_per_node: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="Accelerators, and so ranks, of one pod; with accelerator none: processes."
    )
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How the model is split.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimiser.")
    max_tokens_per_micro_batch: Tokens = Field(16384, description="Token budget of one micro-batch of a rank.")
    weight_sync: WeightSync = Field(
        WeightSync.DISTRIBUTED,
        description="distributed: NCCL, or gloo without accelerators; disk: through the output volume.",
    )
    template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the trainer's pods.")


class Schedule(Model):
    """How long, and how often."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(description="Optimiser steps.")
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(20, description="Checkpoint period.")
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = Field(2, description="Newest checkpoints kept.")
    evaluate_every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        20, description="Evaluation period; step 0 and the last step are always evaluated."
    )


class Evaluation(Model):
    """Held-out prompts on which the student is measured."""

    rules = (
        Rule(
            "set a reward.source, or leave measureReverseKl true: nothing would be measured",
            "self.reward.source != 'none' || self.measureReverseKl",
            lambda e: e.reward.source is not RewardSource.NONE or e.measure_reverse_kl,
        ),
        Rule(
            f"prompts.answerField must be set: {ANSWERED}",
            answered_cel("self.reward", "self.prompts"),
            lambda e: answered(e.reward, e.prompts),
        ),
    )
    name: EvaluationName = Field(description="Name in status and metrics: lower-case letters, digits and dashes.")
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
        True, description="Also draw one response a prompt as in training, and score its reverse KL to the teacher."
    )
    score_teacher: bool = Field(False, description="Also score the teacher's own responses, once, at the start.")


class OutputVolume(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    claim_name: ShortText = Field(description="Name of the claim; ReadWriteMany if several pods must mount it.")


class Output(Model):
    """Where checkpoints, the exported model and metrics.jsonl go: the folder path/NAME of the volume."""

    volume: OutputVolume | None = Field(
        None, description="The claim mounted at path. Needed on a cluster; `distill run` uses the local folder."
    )
    path: AbsolutePath = Field("/output", description="Where it is mounted.")


class Spec(Model):
    """One on-policy distillation: a student that learns from a teacher on its own samples."""

    mutable = frozenset(
        {
            "suspend",
            "rollout",  # it says itself what of it may change
            "backoff_limit",
            "active_deadline_seconds",
            "pre_running_deadline_seconds",
            "stall_timeout_seconds",
            "ttl_seconds_after_finished",
        }
    )
    rules = (
        Rule(
            "deterministic goes with rollout.maxPolicyLag 0 only",
            "!self.deterministic || self.rollout.maxPolicyLag == 0",
            lambda spec: not spec.deterministic or spec.rollout.max_policy_lag == 0,
        ),
        Rule(
            f"data.prompts.answerField must be set: objective.reward: {ANSWERED}",
            answered_cel("self.objective.reward", "self.data.prompts"),
            lambda spec: answered(spec.objective.reward, spec.data.prompts),
        ),
    )
    accelerator: AcceleratorName = Field(
        "nvidia.com/gpu", description="Resource name of the accelerator, or none for the CPU mode."
    )
    precision: Precision = Field(
        Precision.AUTO, description="Of weights and computation; auto is bfloat16, and float32 without accelerators."
    )
    trust_remote_code: bool = Field(False, description="Run code that a model's repository brings. Leave it off.")
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = Field(0, description="Seed of data order and sampling.")
    deterministic: bool = Field(
        False,
        description="Seeded sampling, one request at a time, no prefix cache: slow, but a run without accelerators "
        "repeats to the last bit.",
    )
    student: Student = Field(description="The model that is trained.")
    teacher: Teacher = Field(description="The model that scores.")
    data: Data = Field(description="Training prompts.")
    rollout: Rollout = Field(default_factory=Rollout, description="The student's generation.")
    objective: Objective = Field(default_factory=Objective, description="What is minimised.")
    trainer: Trainer = Field(default_factory=Trainer, description="The trainer.")
    schedule: Schedule = Field(description="How long, and how often.")
    evaluation: Annotated[list[Evaluation], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Held-out measurements."
    )
    output: Output = Field(default_factory=Output, description="Where results go.")
    suspend: bool = Field(False, description="Release every pod and keep the checkpoints; false resumes.")
    backoff_limit: Annotated[int, Field(ge=0, le=100)] = Field(
        3, description="Times the whole job is started again, from the last checkpoint, before it has failed."
    )
    active_deadline_seconds: Seconds | None = Field(None, description="Fail after so long, suspension not counted.")
    pre_running_deadline_seconds: Seconds | None = Field(
        None, description="Fail an attempt whose roles are not all ready after so long."
    )
    stall_timeout_seconds: Seconds = Field(3600, description="Stalled is True when no step ends for so long.")
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = Field(
        None, description="Delete the finished job after so long; absent keeps it."
    )

    @property
    def on_cpu(self) -> bool:
        return self.accelerator == "none"

    @property
    def dtype(self) -> str:
        """The torch name of the precision that auto stands for."""
        if self.precision is Precision.AUTO:
            return "float32" if self.on_cpu else "bfloat16"
        return self.precision.value
