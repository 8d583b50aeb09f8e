"""The status of a DistillationJob: conditions and reasons are API, so they are enums in this one file."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import ListMap

# Decimals are strings in status, as the Kubernetes API conventions ask.
Decimal = Annotated[str, Field(max_length=32)]
StatusText = Annotated[str, Field(max_length=253)]
Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
StatusCount = Annotated[int, Field(ge=0, le=9_007_199_254_740_991)]


class ConditionType(StrEnum):
    SUCCEEDED = "Succeeded"
    """The summary: Unknown while the job is on its way, True when it is complete, False when it has failed."""
    READY = "Ready"
    """All roles are up: TeacherReady and RolloutReady and TrainerReady."""
    TEACHER_READY = "TeacherReady"
    ROLLOUT_READY = "RolloutReady"
    TRAINER_READY = "TrainerReady"
    SUSPENDED = "Suspended"
    SPEC_VALID = "SpecValid"
    PREFLIGHT = "Preflight"
    """The workers' own checks before the first step, reported by the trainer."""
    STALLED = "Stalled"


class Reason(StrEnum):
    # Succeeded
    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    COMPLETED = "Completed"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    PRE_RUNNING_DEADLINE_EXCEEDED = "PreRunningDeadlineExceeded"
    INVALID_SPEC = "InvalidSpec"
    CONFIGURATION_ERROR = "ConfigurationError"
    PREFLIGHT_FAILED = "PreflightFailed"
    # SpecValid, Preflight
    VALID = "Valid"
    PASSED = "Passed"
    # roles
    READY = "Ready"
    NOT_READY = "NotReady"
    WAITING_FOR_ROLES = "WaitingForRoles"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CRASH_LOOPING = "CrashLooping"
    KUBERAY_NOT_INSTALLED = "KubeRayNotInstalled"
    GANG_NOT_INSTALLED = "GangSchedulerNotInstalled"
    VOLUME_NOT_BOUND = "VolumeNotBound"
    NAME_TAKEN = "NameTaken"
    QUOTA_EXCEEDED = "QuotaExceeded"
    RELEASED_AFTER_FINISH = "ReleasedAfterFinish"
    TRAINER_FAILED = "TrainerFailed"
    TEACHER_NOT_FOUND = "TeacherNotFound"
    """A Teacher that the job names does not exist."""
    TEACHER_UNREACHABLE = "TeacherUnreachable"
    """The teacher was away for longer than the trainer waits."""
    ENGINES_LOST = "EnginesLost"
    """The RayCluster's head, or every engine, was away for longer than the trainer waits."""
    VOLUME_FULL = "VolumeFull"
    """The output volume had no room for what the trainer keeps."""
    OUT_OF_MEMORY = "OutOfMemory"
    EXTERNAL = "External"
    EVICTED = "Evicted"
    # Stalled
    PROGRESSING = "Progressing"
    NO_STEP = "NoStep"


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Model):
    """metav1.Condition."""

    type: Annotated[str, Field(max_length=316)] = Field(description="Name of the condition.")
    status: ConditionStatus = Field(description="True, False or Unknown.")
    reason: Annotated[str, Field(max_length=1024)] = Field(description="One CamelCase word for programs.")
    message: Annotated[str, Field(max_length=32768)] = Field("", description="A sentence for people.")
    observed_generation: StatusCount = Field(0, description="Generation of the spec that it was made from.")
    last_transition_time: Time = Field(description="When status changed last.")


class RoleStatus(Model):
    """How many pods of a role are wanted and ready."""

    name: StatusText = Field(description="teacher, rollout or trainer.")
    desired: StatusCount = Field(0, description="Pods wanted; each Teacher that the job names counts as one.")
    ready: StatusCount = Field(0, description="Pods ready, and Teachers that answer.")
    reason: StatusText = Field("", description="Why it is not ready.")
    disruption: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="The eviction or preemption of one of its pods that the training has not got over yet."
    )
    disruption_time: Time | None = Field(None, description="When that was.")


class EvaluationScore(Model):
    """The newest, first and best values of one evaluation."""

    name: StatusText = Field(description="Name of the evaluation.")
    step: StatusCount = Field(0, description="Step of the newest values.")
    score: Decimal | None = Field(None, description="Mean reward of the student's responses.")
    score_low: Decimal | None = Field(None, description="Lower bound of the score's 95 % confidence interval.")
    score_high: Decimal | None = Field(None, description="Upper bound of the score's 95 % confidence interval.")
    pass_at_k: Decimal | None = Field(
        None, description="Pass@k, k = samplesPerPrompt: share of the prompts that one of the responses solves."
    )
    reverse_kl: Decimal | None = Field(
        None, alias="reverseKL", description="Reverse KL to the teacher, nats per token."
    )
    first_score: Decimal | None = Field(None, description="Score at the first evaluation.")
    first_reverse_kl: Decimal | None = Field(
        None, alias="firstReverseKL", description="Reverse KL at the first evaluation."
    )
    best_score: Decimal | None = Field(None, description="Score at the best step.")
    best_reverse_kl: Decimal | None = Field(None, alias="bestReverseKL", description="Reverse KL at the best step.")
    best_step: StatusCount | None = Field(None, description="Step of the best score, or of the lowest KL without one.")
    teacher_score: Decimal | None = Field(None, description="Score of the teacher's own responses.")


class GuardEvent(Model):
    """One decision of a guard."""

    guard: StatusText = Field(description="Name of the guard.")
    step: StatusCount = Field(description="Optimiser steps done when it acted.")
    action: StatusText = Field(description="stop, lower-coefficient or roll-back.")
    message: Annotated[str, Field(max_length=512)] = Field(description="What was out of bounds, and what was done.")
    time: Time = Field(description="When.")


class TeacherRequests(Model):
    """What the trainer has for one of its teachers to do."""

    name: StatusText = Field(description="Name of the teacher in the job; teacher, where it has one.")
    requests: StatusCount = Field(0, description="Scoring requests, waiting and under way.")


class Progress(Model):
    """Headline numbers, read from GET /progress of trainer rank 0."""

    step: StatusCount = Field(0, description="Optimiser steps done.")
    total_steps: StatusCount = Field(0, description="Optimiser steps to do.")
    percent: StatusCount = Field(0, description="step of totalSteps.")
    reverse_kl: Decimal | None = Field(
        None, alias="reverseKL", description="Mean reverse KL of the last step's samples, nats per token (k1)."
    )
    reward: Decimal | None = Field(None, description="Mean task reward of the last step.")
    tokens_per_second: Decimal | None = Field(None, description="Response tokens trained per second.")
    estimated_remaining_seconds: StatusCount | None = Field(None, description="At the speed of the last steps.")
    policy_lag: Decimal | None = Field(None, description="Mean steps that the last samples lagged behind.")
    weight_version: StatusCount = Field(0, description="Version of the weights in the engines.")
    checkpoint_step: StatusCount | None = Field(None, description="Step of the newest complete checkpoint.")
    bottleneck: StatusText | None = Field(
        None, description="rollout, teacher, trainer or sync: what took most of the last ten steps."
    )
    advice: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="How much of a step the bottleneck takes, and what to change."
    )
    last_step_time: Time | None = Field(None, description="When the last step ended.")
    teachers: Annotated[list[TeacherRequests], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="The scoring that waits or is under way, by which a Teacher is scaled."
    )
    evaluations: Annotated[list[EvaluationScore], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Held-out measurements."
    )
    guard_events: Annotated[list[GuardEvent], Field(max_length=4)] = Field(
        default_factory=list, description="The last decisions of spec.guards, newest last."
    )


class Result(Model):
    """What a finished job left."""

    model_path: Annotated[str, Field(max_length=1024)] = Field(description="Folder of the Hugging Face model.")
    step: StatusCount = Field(description="Step of the exported weights.")
    best_step: StatusCount | None = Field(None, description="Best step by the first evaluation.")
    stopped_by: StatusText | None = Field(
        None, description="Name of the guard that ended the run before its last step."
    )


class Status(Model):
    """Status of a DistillationJob."""

    conditions: Annotated[list[Condition], Field(max_length=32), ListMap("type")] = Field(
        default_factory=list, description="Succeeded is the summary."
    )
    observed_generation: StatusCount = Field(0, description="Generation of the spec last acted on.")
    attempts: StatusCount = Field(0, description="Attempts begun.")
    restarts: StatusCount = Field(0, description="Failed attempts that count against backoffLimit.")
    next_attempt_time: Time | None = Field(None, description="When the next attempt begins, during back-off.")
    start_time: Time | None = Field(None, description="When the first attempt began.")
    attempt_start_time: Time | None = Field(None, description="When the current attempt began.")
    completion_time: Time | None = Field(None, description="When the job finished.")
    suspended_seconds: StatusCount = Field(
        0, description="Time spent suspended since startTime; activeDeadlineSeconds leaves it out."
    )
    roles: Annotated[list[RoleStatus], Field(max_length=8), ListMap("name")] = Field(
        default_factory=list, description="Pods by role."
    )
    progress: Progress | None = Field(None, description="How far the training is.")
    result: Result | None = Field(None, description="What the finished job left.")
