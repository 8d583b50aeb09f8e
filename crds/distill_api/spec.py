"""The spec of a DistillationJob. Names are the contract; each field has a description, bounds and a sane default."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model, Path
from distill_api.data import Data, Source
from distill_api.endpoint import Endpoint, Protocol
from distill_api.evaluation import Evaluation
from distill_api.fields import AbsolutePath, AcceleratorName, ControllerName, ObjectName, Precision, Seconds
from distill_api.guards import Guard, GuardAction, Watch
from distill_api.names import ONLY_TEACHER
from distill_api.objective import (
    ANSWERED,
    Advantage,
    CoefficientSchedule,
    Correction,
    Decay,
    Divergence,
    Extract,
    ImportanceWeight,
    Objective,
    Reward,
    RewardSource,
    Support,
    answered,
    answered_cel,
)
from distill_api.prompts import Dataset, Prompts, ReasoningGym
from distill_api.rollout import Rollout, Sampling
from distill_api.routing import RULES as ROUTING_RULES
from distill_api.rules import ListMap, Rule
from distill_api.scheduling import Gang, GangScope, Scheduling
from distill_api.teacher_source import NamedTeacherSource, Serving, TeacherSource
from distill_api.tracking import Tracking
from distill_api.training import LoRA, Optimizer, Parallelism, RateSchedule, Recompute, Trainer, WeightSync

__all__ = [
    "Advantage",
    "CoefficientSchedule",
    "Correction",
    "Data",
    "Dataset",
    "Decay",
    "Divergence",
    "Endpoint",
    "Evaluation",
    "Extract",
    "Gang",
    "GangScope",
    "Guard",
    "GuardAction",
    "ImportanceWeight",
    "LoRA",
    "NamedTeacherSource",
    "Objective",
    "Optimizer",
    "Output",
    "OutputVolume",
    "Parallelism",
    "Precision",
    "Prompts",
    "Protocol",
    "RateSchedule",
    "ReasoningGym",
    "Recompute",
    "Reward",
    "RewardSource",
    "Rollout",
    "Sampling",
    "Schedule",
    "Scheduling",
    "Serving",
    "Source",
    "Spec",
    "Student",
    "Support",
    "TeacherSource",
    "Tracking",
    "Trainer",
    "Watch",
    "WeightSync",
]


class Student(Model):
    """The model that is trained."""

    model: Path = Field(description="Hub id, or a path on a mounted volume, of a Hugging Face checkpoint.")


class Schedule(Model):
    """How long, and how often."""

    rules = (
        Rule(
            "keepEvery must be a multiple of checkpointEverySteps: there is no checkpoint between them",
            "!has(self.keepEvery) || self.keepEvery % self.checkpointEverySteps == 0",
            lambda s: s.keep_every is None or s.keep_every % s.checkpoint_every_steps == 0,
        ),
    )
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(description="Optimiser steps.")
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(20, description="Checkpoint period.")
    keep_last: Annotated[int, Field(ge=1, le=1000)] = Field(2, description="Newest checkpoints kept.")
    keep_best: bool = Field(
        True,
        description="A new best step by the first evaluation is checkpointed at once, and kept until a better one.",
    )
    keep_every: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Checkpoints of every so many steps are kept for ever: a multiple of checkpointEverySteps."
    )
    evaluate_every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        20, description="Evaluation period; step 0 and the last step are always evaluated."
    )


class OutputVolume(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    claim_name: ObjectName = Field(description="Name of the claim; ReadWriteMany if several pods must mount it.")


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
            "teacher",
            "teachers",
            "backoff_limit",
            "active_deadline_seconds",
            "pre_running_deadline_seconds",
            "stall_timeout_seconds",
            "ttl_seconds_after_finished",
        }
    )
    transitions = (
        (
            "teacher and teachers are immutable but for their replicas: make a new job",
            "has(self.teacher) == has(oldSelf.teacher) && self.teachers.size() == oldSelf.teachers.size() && "
            "self.teachers.all(t, oldSelf.teachers.exists(o, o.name == t.name))",
        ),
    )
    rules = (
        *ROUTING_RULES,
        Rule(
            "deterministic goes with rollout.maxPolicyLag 0 only",
            "!self.deterministic || self.rollout.maxPolicyLag == 0",
            lambda spec: not spec.deterministic or spec.rollout.max_policy_lag == 0,
        ),
        Rule(
            "deterministic goes with teachers that the job itself serves: the scores of others change with their load",
            "!self.deterministic || ((!has(self.teacher) || has(self.teacher.model)) && "
            "self.teachers.all(t, has(t.model)))",
            lambda spec: not spec.deterministic or all(t.model is not None for t in spec.all_teachers),
        ),
        Rule(
            f"data.prompts.answerField must be set: objective.reward: {ANSWERED}",
            f"!has(self.data.prompts) || {answered_cel('self.objective.reward', 'self.data.prompts')}",
            lambda spec: spec.data.prompts is None or answered(spec.objective.reward, spec.data.prompts),
        ),
        Rule(
            f"prompts.answerField of each of data.sources must be set: its reward, or objective.reward: {ANSWERED}",
            f"self.data.sources.all(s, has(s.reward) ? {answered_cel('s.reward', 's.prompts')} : "
            f"{answered_cel('self.objective.reward', 's.prompts')})",
            lambda spec: all(answered(s.reward or spec.objective.reward, s.prompts) for s in spec.data.sources),
        ),
        Rule(
            "objective.datasetShare above 0 needs prompts.responseField, of each source: what is learned from there",
            "self.objective.datasetShare == 0.0 || (has(self.data.prompts) ? has(self.data.prompts.responseField) : "
            "self.data.sources.all(s, has(s.prompts.responseField)))",
            lambda spec: (
                spec.objective.dataset_share == 0
                or all(s.prompts.response_field is not None for s in spec.data.all_sources)
            ),
        ),
        Rule(
            "trainer.optimizer.warmupSteps must be less than schedule.steps, unless its schedule is constant",
            "self.trainer.optimizer.schedule == 'constant' || self.trainer.optimizer.warmupSteps < self.schedule.steps",
            lambda spec: (
                spec.trainer.optimizer.schedule is RateSchedule.CONSTANT
                or spec.trainer.optimizer.warmup_steps < spec.schedule.steps
            ),
        ),
        Rule(
            "guards: evaluation must be the name of one of spec.evaluation",
            "self.guards.all(g, !has(g.evaluation) || self.evaluation.exists(e, e.name == g.evaluation))",
            lambda spec: {g.evaluation for g in spec.guards} - {None} <= {e.name for e in spec.evaluation},
        ),
        Rule(
            "guards: action roll-back needs spec.evaluation, which says what the best checkpoint is",
            "!self.guards.exists(g, g.action == 'roll-back') || self.evaluation.size() > 0",
            lambda spec: bool(spec.evaluation) or all(g.action is not GuardAction.ROLL_BACK for g in spec.guards),
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
    teacher: TeacherSource | None = Field(None, description="What scores every token of the student.")
    teachers: Annotated[list[NamedTeacherSource], Field(max_length=8), ListMap("name")] = Field(
        default_factory=list, description="Several teachers instead of teacher: each prompt is scored by one of them."
    )
    data: Data = Field(description="Training prompts.")
    rollout: Rollout = Field(default_factory=Rollout, description="The student's generation.")
    objective: Objective = Field(default_factory=Objective, description="What is minimised.")
    trainer: Trainer = Field(default_factory=Trainer, description="The trainer.")
    schedule: Schedule = Field(description="How long, and how often.")
    evaluation: Annotated[list[Evaluation], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Held-out measurements."
    )
    guards: Annotated[list[Guard], Field(max_length=8), ListMap("name")] = Field(
        default_factory=list, description="What must not happen to the training, and what is done when it does."
    )
    output: Output = Field(default_factory=Output, description="Where results go.")
    scheduling: Scheduling = Field(default_factory=Scheduling, description="Where and when the pods are placed.")
    managed_by: ControllerName = Field(
        "distillation-operator.io/operator",
        description="The controller that looks after the job. With any other name this operator leaves the job alone "
        "entirely, as a dispatcher to other clusters wants: kueue.x-k8s.io/multikueue.",
    )
    tracking: Tracking = Field(default_factory=Tracking, description="Copies of the numbers for other tools.")
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
    def all_teachers(self) -> list[NamedTeacherSource]:
        """`teachers`; or the one that `teacher` is, by the name teacher."""
        if self.teacher is None:
            return self.teachers
        return [NamedTeacherSource.model_construct(**dict(self.teacher), name=ONLY_TEACHER, coefficient=1.0)]

    @property
    def served_teachers(self) -> list[NamedTeacherSource]:
        """Those that the job itself serves."""
        return [t for t in self.all_teachers if t.model is not None]

    @property
    def shared_teachers(self) -> list[str]:
        """Names of the Teachers that it learns from, each once."""
        return sorted({t.ref.name for t in self.all_teachers if t.ref is not None})

    @property
    def needs_hub(self) -> bool:
        """Whether something is downloaded from the Hugging Face hub."""
        prompts = [s.prompts for s in self.data.all_sources] + [e.prompts for e in self.evaluation]
        models = [self.student.model, *(t.model for t in self.served_teachers if t.model is not None)]
        return not all(m.startswith("/") for m in models) or any(p.dataset is not None for p in prompts)

    @property
    def on_cpu(self) -> bool:
        return self.accelerator == "none"

    @property
    def dtype(self) -> str:
        """The torch name of the precision that auto stands for."""
        return self.precision.dtype(self.on_cpu)
