"""The spec of a DistillationJob: each field has a description, bounds and, where possible, a default."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distill_api import training_phases
from distill_api.base import Model
from distill_api.fields import AcceleratorName, ControllerName, Precision, Seconds
from distill_api.names import ONLY_TEACHER
from distill_api.pods import agreement
from distill_api.pods.template import PodTemplate
from distill_api.role_accelerators import ACCELERATOR_RULES
from distill_api.rules import ListMap, Rule
from distill_api.spec import environment
from distill_api.spec.data import Data, Source
from distill_api.spec.evaluation import Evaluation
from distill_api.spec.guards import Guard, GuardAction
from distill_api.spec.objective import Advantage, Correction, Divergence, ImportanceWeight, Objective, Support
from distill_api.spec.output import Output
from distill_api.spec.prompts import Prompts, ReasoningGym
from distill_api.spec.reward import (
    NEEDS_ANSWER,
    Extract,
    Reward,
    RewardSource,
    has_needed_answer,
    has_needed_answer_cel,
)
from distill_api.spec.rollout import Rollout, Sampling, Truncated
from distill_api.spec.schedule import CoefficientSchedule, Decay, Schedule, StallPolicy
from distill_api.spec.scheduling import Scheduling
from distill_api.spec.tracking import Tracking
from distill_api.spec.training import Optimizer, Parallelism, RateSchedule, Recompute, Student, Trainer, WeightSync
from distill_api.teacher.dataset_scores import RULES as DATASET_SCORES_RULES
from distill_api.teacher.dataset_scores import TeacherLogprobs
from distill_api.teacher.endpoint import Protocol
from distill_api.teacher.routing import RULES as ROUTING_RULES
from distill_api.teacher.source import OWN_WHERE_DETERMINISTIC, NamedTeacherSource, Serving, TeacherSource
from distill_api.teacher.student import RULES as STUDENT_RULES
from distill_api.teacher.student import engines_score, teaches_itself
from distill_api.teacher.tokenizer import RULES as TOKENIZER_RULES

__all__ = [
    "Advantage",
    "CoefficientSchedule",
    "Correction",
    "Decay",
    "Divergence",
    "Evaluation",
    "Extract",
    "ImportanceWeight",
    "NamedTeacherSource",
    "Objective",
    "Optimizer",
    "Parallelism",
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
    "Serving",
    "Source",
    "Spec",
    "Support",
    "TeacherSource",
    "Truncated",
    "WeightSync",
]


class Spec(Model):
    """An on-policy distillation: a student is trained on its own samples, scored by a teacher."""

    mutable = frozenset(
        {
            "suspend",
            "rollout",  # its own model says which of its fields may change
            "teacher",
            "teachers",
            "backoff_limit",
            "active_deadline_seconds",
            "pre_running_deadline_seconds",
            "stall_timeout_seconds",
            "stall_policy",
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
    cluster_rules = (
        (
            "output.volume must be set: name a PersistentVolumeClaim for checkpoints and the model",
            "has(self.output.volume)",
        ),
        training_phases.cluster_rule([environment.ENVIRONMENT_REWARD, *DATASET_SCORES_RULES, *TOKENIZER_RULES]),
    )
    rules = (
        *ROUTING_RULES,
        *DATASET_SCORES_RULES,
        *TOKENIZER_RULES,
        *STUDENT_RULES,
        *ACCELERATOR_RULES,
        *training_phases.RULES,
        environment.ENVIRONMENT_REWARD,
        Rule(
            "deterministic goes with rollout.maxPolicyLag 0 only",
            "!self.deterministic || self.rollout.maxPolicyLag == 0",
            lambda spec: not spec.deterministic or spec.rollout.max_policy_lag == 0,
        ),
        OWN_WHERE_DETERMINISTIC,
        Rule(
            f"data.prompts.answerField must be set: objective.reward: {NEEDS_ANSWER}",
            f"!has(self.data.prompts) || {has_needed_answer_cel('self.objective.reward', 'self.data.prompts')}",
            lambda spec: spec.data.prompts is None or has_needed_answer(spec.objective.reward, spec.data.prompts),
        ),
        Rule(
            f"prompts.answerField of each of data.sources must be set: its reward, or objective.reward: {NEEDS_ANSWER}",
            f"self.data.sources.all(s, has(s.reward) ? {has_needed_answer_cel('s.reward', 's.prompts')} : "
            f"{has_needed_answer_cel('self.objective.reward', 's.prompts')})",
            lambda spec: all(
                has_needed_answer(s.reward or spec.objective.reward, s.prompts) for s in spec.data.sources
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
            "scheduling.topologyKey goes with trainer.nodes above 1 only: it brings the trainer's pods together",
            "!has(self.scheduling.topologyKey) || self.trainer.nodes > 1",
            lambda spec: spec.scheduling.topology_key is None or spec.trainer.nodes > 1,
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
        Rule(
            "output.publish: step best needs spec.evaluation and schedule.keepBest",
            "!has(self.output.publish) || !self.output.publish.exists(p, has(p.step) && p.step == 'best') || "
            "(self.evaluation.size() > 0 && self.schedule.keepBest)",
            lambda spec: not spec.output.publishes_best or (bool(spec.evaluation) and spec.schedule.keep_best),
        ),
    )
    accelerator: AcceleratorName = Field(
        "nvidia.com/gpu",
        description="Resource name of the accelerator of all roles that name none of their own, or none for the CPU "
        "mode.",
    )
    precision: Precision = Field(
        Precision.AUTO,
        description="Data type of weights and computation; auto is bfloat16 with accelerators, float32 without.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code from a model's repository, such as modeling files. It is a security risk: leave "
        "it off.",
    )
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = Field(
        0, description="Random seed of the data order and of sampling."
    )
    deterministic: bool = Field(
        False,
        description="Deterministic mode: seeded sampling, one request at a time, no prefix cache. It is slow; a run "
        "without accelerators is then reproducible to the last bit.",
    )
    student: Student = Field(description="Student, the model that is trained.")
    teacher: TeacherSource | None = Field(
        None, description="Teacher, which scores every token of the student's samples."
    )
    teachers: Annotated[list[NamedTeacherSource], Field(max_length=8), ListMap("name")] = Field(
        default_factory=list,
        description="Several teachers to use instead of teacher; each prompt is routed to one of them.",
    )
    data: Data = Field(description="Training prompts.")
    rollout: Rollout = Field(default_factory=Rollout, description="Generation of samples by the student.")
    objective: Objective = Field(default_factory=Objective, description="Training objective.")
    phases: training_phases.Phases = Field(default_factory=list, description="Phases of the run, in their order.")
    trainer: Trainer = Field(default_factory=Trainer, description="Trainer pods, parallelism and optimiser.")
    schedule: Schedule = Field(description="Length of the run, and periods of checkpoints and evaluations.")
    evaluation: Annotated[list[Evaluation], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Evaluations on held-out prompts; the first decides which step is best."
    )
    guards: Annotated[list[Guard], Field(max_length=8), ListMap("name")] = Field(
        default_factory=list, description="Guards: bounds on measured values, and actions where one is broken."
    )
    output: Output = Field(default_factory=Output, description="Volume of checkpoints, metrics and the exported model.")
    pod_template: PodTemplate = Field(
        default_factory=PodTemplate, description="Pods of all roles; the template of a role is merged over it."
    )
    scheduling: Scheduling = Field(
        default_factory=Scheduling, description="Gang scheduling, queue, priority and topology of the pods."
    )
    managed_by: ControllerName = Field(
        "distillation-operator.io/operator",
        description="Name of the controller that reconciles the job. With any other value this operator ignores the "
        "job, as MultiKueue needs: kueue.x-k8s.io/multikueue.",
    )
    tracking: Tracking = Field(default_factory=Tracking, description="Experiment trackers to which metrics are copied.")
    suspend: bool = Field(
        False,
        description="Suspend the job: checkpoint, then delete every pod; false resumes from the newest checkpoint.",
    )
    backoff_limit: Annotated[int, Field(ge=0, le=100)] = Field(
        3,
        description="Number of retries before the job fails; each is a new attempt, from the last checkpoint. "
        "Attempts that end by eviction or preemption do not count.",
    )
    active_deadline_seconds: Seconds | None = Field(
        None,
        description="Deadline of the whole job in seconds since its first attempt, time suspended not counted; by "
        "default none.",
    )
    pre_running_deadline_seconds: Seconds | None = Field(
        None,
        description="Deadline in seconds for all roles of an attempt to become ready, after which it fails. By "
        "default an attempt some of whose pods find no node for half an hour releases the others, and is tried again "
        "without counting against backoffLimit.",
    )
    stall_timeout_seconds: Seconds = Field(
        3600, description="Seconds without a completed step after which the condition Stalled is True."
    )
    stall_policy: StallPolicy = Field(
        StallPolicy.RESTART, description="Whether a stalled attempt is ended, as one that counts against backoffLimit."
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = Field(
        None, description="Time to live of the finished job in seconds, after which it is deleted; absent keeps it."
    )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if problems := [p for part in (agreement, environment, training_phases) for p in part.problems(self)]:
            raise ValueError("; ".join(problems))
        return self

    @property
    def all_teachers(self) -> list[NamedTeacherSource]:
        """Return `teachers`, or `teacher` as the one of the name teacher, with its model where it is the student's."""
        if self.teacher is None:
            return self.teachers
        served = teaches_itself(self) and not engines_score(self)
        fields = dict(self.teacher) | ({"model": self.student.model} if served else {})
        return [NamedTeacherSource.model_construct(**fields, name=ONLY_TEACHER, coefficient=1.0)]

    @property
    def routed_teachers(self) -> list[NamedTeacherSource]:
        """Return the teachers that training prompts are routed to: all but the reference."""
        return [t for t in self.all_teachers if t.name != self.objective.reference]

    @property
    def live_teachers(self) -> list[NamedTeacherSource]:
        """Return the teachers that are asked while the job runs: none where all their scores are precomputed."""
        return [] if self.objective.teacher_logprobs is TeacherLogprobs.PRECOMPUTED else self.all_teachers

    @property
    def served_teachers(self) -> list[NamedTeacherSource]:
        """Return the teachers that the job itself serves."""
        return [t for t in self.live_teachers if t.model is not None]

    @property
    def shared_teachers(self) -> list[str]:
        """Return the names of the Teachers that the job uses, each once, sorted."""
        return sorted({t.ref.name for t in self.live_teachers if t.ref is not None})

    @property
    def needs_hub(self) -> bool:
        """Return whether something is downloaded from the Hugging Face hub."""
        prompts = [s.prompts for s in self.data.all_sources] + [e.prompts for e in self.evaluation]
        named = [self.student.model, *(name for t in self.all_teachers for name in (t.model, t.tokenizer) if name)]
        return not all(m.startswith("/") for m in named) or any(p.dataset is not None for p in prompts)

    @property
    def on_cpu(self) -> bool:
        return self.accelerator == "none"

    @property
    def dtype(self) -> str:
        """Return the torch name of the precision, with auto resolved."""
        return self.precision.dtype(self.on_cpu)
