"""The status of a DistillationJob. Conditions and reasons are API: they are enums, in this one module."""

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
    """The summary: Unknown until the job ends, True when it is complete, False when it has failed."""
    COMPLETE = "Complete"
    """True once the job is complete, and absent before: what a batch Job has, for `kubectl wait` and others' tools."""
    FAILED = "Failed"
    """True once the job has failed, and absent before."""
    READY = "Ready"
    """All roles are ready: TeacherReady, RolloutReady and TrainerReady; or the job is complete, and needs none."""
    TEACHER_READY = "TeacherReady"
    ROLLOUT_READY = "RolloutReady"
    TRAINER_READY = "TrainerReady"
    SUSPENDED = "Suspended"
    QUOTA_RESERVED = "QuotaReserved"
    """Kueue has reserved quota for the job; absent of a job without a queue."""
    ADMITTED = "Admitted"
    """Kueue has admitted the job, so that it may have pods; absent of a job without a queue."""
    SPEC_VALID = "SpecValid"
    PREFLIGHT = "Preflight"
    """The checks of the workers before the first step, reported by the trainer."""
    STALLED = "Stalled"
    PUBLISHED = "Published"
    """The model is where spec.output.publish wants it; absent where that names no place."""


class Reason(StrEnum):
    # Succeeded
    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    """The job is suspended, and pods of it are still there."""
    WAITING_FOR_QUOTA = "WaitingForQuota"
    """The job waits in a queue of Kueue until it is admitted."""
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
    CONTAINER_REFUSED = "ContainerRefused"
    """The node cannot make a container as it is written, as where a Secret is missing."""
    CRASH_LOOPING = "CrashLooping"
    KUBERAY_NOT_INSTALLED = "KubeRayNotInstalled"
    GANG_NOT_INSTALLED = "GangSchedulerNotInstalled"
    VOLUME_NOT_BOUND = "VolumeNotBound"
    NAME_TAKEN = "NameTaken"
    QUOTA_EXCEEDED = "QuotaExceeded"
    PODS_REFUSED = "PodsRefused"
    """The API server refuses the pods, as by Pod Security or another admission policy."""
    RELEASED_AFTER_FINISH = "ReleasedAfterFinish"
    TRAINER_FAILED = "TrainerFailed"
    EARLIER_TRAINER_RUNS = "EarlierTrainerRuns"
    """A trainer of an earlier attempt, or of an earlier job of the same name, may still run."""
    POD_LOST = "PodLost"
    """A pod should have ended, and its node does not confirm it."""
    TEACHER_NOT_FOUND = "TeacherNotFound"
    """A Teacher that the job names does not exist."""
    SCALED_TO_ZERO = "ScaledToZero"
    """The Teacher is to have no server."""
    TEACHER_UNREACHABLE = "TeacherUnreachable"
    """The teacher was unreachable for longer than the trainer waits."""
    ENGINES_LOST = "EnginesLost"
    """The RayCluster's head, or every engine, was unreachable for longer than the trainer waits."""
    VOLUME_FULL = "VolumeFull"
    """The output volume had no room for what the trainer keeps."""
    OUT_OF_MEMORY = "OutOfMemory"
    EXTERNAL = "External"
    EVICTED = "Evicted"
    # QuotaReserved, Admitted
    QUOTA_RESERVED = "QuotaReserved"
    ADMITTED = "Admitted"
    KUEUE_NOT_INSTALLED = "KueueNotInstalled"
    # Stalled
    PROGRESSING = "Progressing"
    NO_STEP = "NoStep"
    # Published
    PUBLISHED = "Published"
    NOT_PUBLISHED = "NotPublished"
    """A place was not reached, or refused the model. The model is in the run folder all the same."""


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Model):
    """A condition, as metav1.Condition."""

    type: Annotated[str, Field(max_length=316)] = Field(description="Type of the condition.")
    status: ConditionStatus = Field(description="Status of the condition: True, False or Unknown.")
    reason: Annotated[str, Field(max_length=1024)] = Field(
        description="Reason of the status for programs: one CamelCase word."
    )
    message: Annotated[str, Field(max_length=32768)] = Field("", description="Message for people: a sentence.")
    observed_generation: StatusCount = Field(0, description="Generation of the spec that the condition was set from.")
    last_transition_time: Time = Field(description="Time of the last change of status.")


class RoleStatus(Model):
    """The pods of a role: how many are wanted and ready."""

    name: StatusText = Field(description="Name of the role: teacher, rollout or trainer.")
    desired: StatusCount = Field(0, description="Pods wanted; each Teacher that the job refers to counts as one.")
    ready: StatusCount = Field(0, description="Pods and Teachers that are ready.")
    reason: StatusText = Field("", description="Reason why the role is not ready; empty where it is.")
    disruption: Annotated[str, Field(max_length=512)] | None = Field(
        None,
        description="Newest eviction or preemption of a pod of the role, until the training has recovered from it.",
    )
    disruption_time: Time | None = Field(None, description="Time of the disruption.")


class EvaluationScore(Model):
    """The newest, first and best values of an evaluation."""

    name: StatusText = Field(description="Name of the evaluation.")
    step: StatusCount = Field(0, description="Optimiser step of the newest values.")
    score: Decimal | None = Field(None, description="Mean reward of the student's responses.")
    score_low: Decimal | None = Field(None, description="Lower bound of the score's 95 % confidence interval.")
    score_high: Decimal | None = Field(None, description="Upper bound of the score's 95 % confidence interval.")
    pass_at_k: Decimal | None = Field(
        None, description="Pass@k with k = samplesPerPrompt: share of the prompts that at least one response solves."
    )
    reverse_kl: Decimal | None = Field(
        None, alias="reverseKL", description="Reverse KL to the teacher, in nats per token."
    )
    first_score: Decimal | None = Field(None, description="Score at the first evaluation.")
    first_reverse_kl: Decimal | None = Field(
        None, alias="firstReverseKL", description="Reverse KL at the first evaluation."
    )
    best_score: Decimal | None = Field(None, description="Score at the best step.")
    best_reverse_kl: Decimal | None = Field(None, alias="bestReverseKL", description="Reverse KL at the best step.")
    best_step: StatusCount | None = Field(
        None, description="Step of the best score or, without a score, of the lowest reverse KL."
    )
    teacher_score: Decimal | None = Field(None, description="Score of the teacher's own responses.")


class GuardEvent(Model):
    """An action of a guard."""

    guard: StatusText = Field(description="Name of the guard.")
    step: StatusCount = Field(description="Optimiser steps done when the guard acted.")
    action: StatusText = Field(description="Action of the guard: stop, lower-coefficient or roll-back.")
    message: Annotated[str, Field(max_length=512)] = Field(
        description="Value that was out of bounds, and what the guard did."
    )
    time: Time = Field(description="Time of the action.")


class TeacherRequests(Model):
    """The load of a trainer on one of its teachers."""

    name: StatusText = Field(description="Name of the teacher in the job; teacher where there is one.")
    requests: StatusCount = Field(0, description="Scoring requests, waiting and in flight.")


class Progress(Model):
    """The progress of the training, read from GET /progress of trainer rank 0."""

    step: StatusCount = Field(0, description="Optimiser steps done.")
    total_steps: StatusCount = Field(0, description="Optimiser steps to do.")
    percent: StatusCount = Field(0, description="Share of totalSteps that is done, in percent.")
    objective_phase: StatusText | None = Field(
        None, description="Name of the phase (spec.phases) of the last step, where there are phases."
    )
    reverse_kl: Decimal | None = Field(
        None,
        alias="reverseKL",
        description="Mean reverse KL of the last step's samples, in nats per token, by the k1 estimator.",
    )
    reward: Decimal | None = Field(None, description="Mean task reward of the last step.")
    tokens_per_second: Decimal | None = Field(None, description="Response tokens trained per second.")
    estimated_remaining_seconds: StatusCount | None = Field(
        None, description="Estimated seconds to the end, at the speed of the last steps."
    )
    policy_lag: Decimal | None = Field(
        None, description="Mean policy lag of the last step's samples, in optimiser steps."
    )
    weight_version: StatusCount = Field(0, description="Version of the weights that the engines have loaded.")
    checkpoint_step: StatusCount | None = Field(None, description="Step of the newest complete checkpoint.")
    bottleneck: StatusText | None = Field(
        None,
        description="Bottleneck of the last ten steps, where most time was spent: rollout, environment, teacher, "
        "trainer or sync.",
    )
    advice: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Share of a step that the bottleneck takes, and a remedy."
    )
    last_step_time: Time | None = Field(None, description="Time at which the last step ended.")
    teachers: Annotated[list[TeacherRequests], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Scoring requests by teacher; Teachers are autoscaled by them."
    )
    evaluations: Annotated[list[EvaluationScore], Field(max_length=16), ListMap("name")] = Field(
        default_factory=list, description="Newest, first and best values of each evaluation."
    )
    guard_events: Annotated[list[GuardEvent], Field(max_length=4)] = Field(
        default_factory=list, description="Last actions of guards, newest last."
    )


class Result(Model):
    """The result of a finished job."""

    model_path: Annotated[str, Field(max_length=1024)] = Field(description="Folder of the exported Hugging Face model.")
    step: StatusCount = Field(description="Optimiser step of the exported weights.")
    best_step: StatusCount | None = Field(None, description="Best step by the first evaluation, where there is one.")
    stopped_by: StatusText | None = Field(
        None, description="Name of the guard that stopped the run before its last step."
    )


class Status(Model):
    """The status of a DistillationJob."""

    conditions: Annotated[list[Condition], Field(max_length=32), ListMap("type")] = Field(
        default_factory=list, description="Conditions of the job; Succeeded is the summary."
    )
    observed_generation: StatusCount = Field(0, description="Generation of the spec that the operator acted on last.")
    attempts: StatusCount = Field(0, description="Number of attempts that have begun.")
    active: StatusCount = Field(
        0, description="Number of pods of the job that exist and have not ended; those that are terminating count."
    )
    trainer_job_uid: StatusText | None = Field(
        None,
        description="Uid of the trainer Job of the current attempt, once it was seen. The attempt fails with its Job.",
    )
    restarts: StatusCount = Field(0, description="Number of failed attempts that count against backoffLimit.")
    disruptions: StatusCount = Field(
        0,
        description="Number of attempts in a row that ended within an hour and do not count against backoffLimit, "
        "such as by a preemption; the delay before the next attempt doubles with each.",
    )
    next_attempt_time: Time | None = Field(None, description="Time at which the next attempt begins, during back-off.")
    start_time: Time | None = Field(None, description="Time at which the first attempt began.")
    attempt_start_time: Time | None = Field(None, description="Time at which the current attempt began.")
    completion_time: Time | None = Field(None, description="Time at which the job finished.")
    suspended_seconds: StatusCount = Field(
        0, description="Seconds spent suspended since startTime; they do not count against activeDeadlineSeconds."
    )
    roles: Annotated[list[RoleStatus], Field(max_length=8), ListMap("name")] = Field(
        default_factory=list, description="Pods wanted and ready, by role."
    )
    progress: Progress | None = Field(None, description="Progress of the training.")
    result: Result | None = Field(None, description="Result of the finished job.")
