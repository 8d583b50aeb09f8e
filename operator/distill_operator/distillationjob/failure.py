"""Why an attempt ended without success: one reason and one message, from its pods, else from the Job. Pure."""

import re
from dataclasses import dataclass
from datetime import datetime

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.protocol import ExitCode, ExitReason
from distill_api.spec.schedule import StallPolicy
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob.readiness import disruption
from distill_operator.kinds import Kind
from distill_operator.model import conditions
from distill_operator.model.deadlines import ROOM_SECONDS
from distill_operator.model.observed import Child, Observed, Pod
from distill_operator.model.reading import exit_report
from distill_operator.model.times import seconds_since
from distill_operator.settings import Settings

STACKS_SECONDS = 60.0
"""How long a stalled attempt goes on: a rank that hangs writes its stacks to its log before it is ended."""


@dataclass(frozen=True)
class Failure:
    """The end of an attempt."""

    summary: Reason
    """Reason of the job's condition Succeeded, if it is not tried again."""
    trainer: Reason
    """Reason of the condition TrainerReady."""
    message: str
    retry: bool = True
    counts: bool = True
    """Whether it counts against backoffLimit."""
    uncounted: str = "the cluster took a pod away"
    """Why it does not count, where it does not."""


OUTAGES = {
    ExitReason.TEACHER_UNREACHABLE: (Role.TEACHER, Reason.TEACHER_UNREACHABLE),
    ExitReason.ENGINES_LOST: (Role.ROLLOUT, Reason.ENGINES_LOST),
    ExitReason.VOLUME_FULL: (Role.TRAINER, Reason.VOLUME_FULL),
}
"""Reasons for which a trainer gives up: whose outage each is, and what it is called."""
_EXIT_CODE_IN_JOB_MESSAGE = re.compile(r"failed with exit code (\d+)")


def trainer_failure(job: DistillationJob, status: Status, observed: Observed, trainer_job: Child) -> Failure:
    """Return why a trainer Job failed."""
    pod = _culprit(observed, trainer_job.attempt)
    code = pod.exit_code if pod and pod.exit_code is not None else _exit_code_of(trainer_job)
    report = exit_report(pod.exit_message) if pod else None
    message = _message(trainer_job, pod, code, report.message if report else "")
    if code == ExitCode.CONFIGURATION:
        preflight = report is not None and report.reason is ExitReason.PREFLIGHT_FAILED
        summary = Reason.PREFLIGHT_FAILED if preflight else Reason.CONFIGURATION_ERROR
        return Failure(summary, Reason.TRAINER_FAILED, message, retry=False)
    role, reason = Role.TRAINER, _role_reason(pod)
    if report is not None and report.reason in OUTAGES and reason is Reason.TRAINER_FAILED:
        role, reason = OUTAGES[report.reason]
    disrupted = _disruption(status, observed, role, trainer_job.attempt)
    if disrupted and reason is not Reason.OUT_OF_MEMORY:
        text = f"{disrupted} ({message})" if message else disrupted
        # What an outage is called says more than why it came about.
        named = Reason.EVICTED if role is Role.TRAINER else reason
        return Failure(Reason.BACKOFF_LIMIT_EXCEEDED, named, text, counts=False)
    return Failure(Reason.BACKOFF_LIMIT_EXCEEDED, reason, message)


def _disruption(status: Status, observed: Observed, role: Role, attempt: int) -> str:
    """Return the eviction that explains why the role was away, observed or recorded: its pod may be gone by now."""
    if now := disruption(observed, role, attempt):
        return now.message
    return next((r.disruption for r in status.roles if r.name == role.value and r.disruption), "")


def trainer_deleted(job: DistillationJob, status: Status, observed: Observed, attempt: int) -> Failure | None:
    """Return the failure of an attempt whose trainer Job somebody deleted; None where it is there, or was never made.

    A second Job of its name would make pods of the same names beside those that still run.
    """
    name = names.trainer_job(job.metadata.name, attempt)
    child = observed.child(Kind.JOB, name)
    own = child if child is not None and child.ours else None
    if own is not None and not own.deleting and status.trainer_job_uid in (None, own.uid):
        return None
    pods_left = any(p.role is Role.TRAINER and p.attempt == attempt for p in observed.pods)
    if own is None and status.trainer_job_uid is None and not pods_left:
        return None
    return Failure(Reason.BACKOFF_LIMIT_EXCEEDED, Reason.TRAINER_FAILED, f"the Job {name} was deleted")


def trainer_outgrown(observed: Observed, attempt: int) -> Failure | None:
    """Return the failure of an attempt whose trainer was evicted for what it used itself; None where none was.

    Its Job would go on: it replaces every pod that was evicted, which would be evicted again.
    """
    pod = next((p for p in observed.pods if p.role is Role.TRAINER and p.attempt == attempt and p.outgrew), None)
    if pod is None:
        return None
    message = f"{pod.name} was evicted: {pod.eviction_message.strip()}; raise resources.requests in trainer.template"
    return Failure(Reason.BACKOFF_LIMIT_EXCEEDED, _role_reason(pod), message)


def restart_seconds_left(job: DistillationJob, status: Status, now: datetime) -> float | None:
    """Return the seconds until a stalled attempt is ended; None where it has not stalled, or only is reported."""
    stalled = conditions.find(status, ConditionType.STALLED)
    if job.spec.stall_policy is not StallPolicy.RESTART or stalled is None or stalled.status is not conditions.TRUE:
        return None
    return STACKS_SECONDS - seconds_since(stalled.last_transition_time, now)


def trainer_stalled(job: DistillationJob, status: Status, observed: Observed, now: datetime) -> Failure | None:
    """Return the failure of an attempt that has stalled; None where it has not.

    The condition alone does not tell: steps may have ended while no operator ran, and the trainer is not asked yet.
    """
    left = restart_seconds_left(job, status, now)
    if left is None or left > 0:
        return None
    last_step = observed.report.progress.last_step_time if observed.report else None
    if observed.report is None and not observed.trainer_silent:
        return None
    if last_step and seconds_since(last_step, now) < job.spec.stall_timeout_seconds:
        return None
    message = (
        f"no step has ended for {job.spec.stall_timeout_seconds} s (stallTimeoutSeconds); the log of a rank that hangs "
        "has its stacks. If a step takes so long, raise it, or set stallPolicy: Report"
    )
    return Failure(Reason.BACKOFF_LIMIT_EXCEEDED, Reason.NO_STEP, message)


def not_ready_in_time(job: DistillationJob, waiting_for: str) -> Failure:
    """Return the failure of an attempt whose preRunningDeadlineSeconds have passed."""
    seconds = job.spec.pre_running_deadline_seconds
    message = f"not every role was ready {seconds} s after the attempt began (preRunningDeadlineSeconds): {waiting_for}"
    return Failure(Reason.PRE_RUNNING_DEADLINE_EXCEEDED, Reason.NOT_READY, message)


def no_room_in_time(waiting_for: str) -> Failure:
    """Return the failure of an attempt that releases its nodes, as some of its pods found none in ROOM_SECONDS."""
    message = f"some pods found no node for {ROOM_SECONDS} s, so the others are released: {waiting_for}"
    return Failure(Reason.BACKOFF_LIMIT_EXCEEDED, Reason.UNSCHEDULABLE, message, counts=False, uncounted="it never ran")


def image_replaced(before: Settings, after: Settings, waiting_for: str) -> Failure:
    """Return the failure of an attempt whose workers image cannot be pulled, and was replaced since it began.

    Nothing of the attempt is lost, and with the image of today it may start.
    """
    why = f"the operator's workers image was {before.workers_image} and is {after.workers_image}"
    message = f"the image of the attempt cannot be pulled ({waiting_for}), and {why}"
    return Failure(
        Reason.BACKOFF_LIMIT_EXCEEDED, Reason.IMAGE_PULL_FAILED, message, counts=False, uncounted="it never ran"
    )


def _culprit(observed: Observed, attempt: int) -> Pod | None:
    """Return the pod that explains most: a configuration error over all, else the first that ended by itself.

    The other ranks end right after it, by SIGTERM or by a broken collective.
    """
    ended = [p for p in observed.pods if p.role is Role.TRAINER and p.attempt == attempt and (p.exit_code or p.evicted)]
    if not ended:
        return None

    def explains(pod: Pod) -> tuple[bool, bool, float, int]:
        time = pod.finished_at.timestamp() if pod.finished_at else float("inf")
        return pod.exit_code != ExitCode.CONFIGURATION, pod.deleting, time, pod.index

    return min(ended, key=explains)


def _exit_code_of(job: Child) -> int | None:
    """Return the exit code in a Job's condition, for when its pods are gone."""
    match = _EXIT_CODE_IN_JOB_MESSAGE.search(job.message)
    return int(match.group(1)) if match else None


def _role_reason(pod: Pod | None) -> Reason:
    if pod is not None and (pod.exit_reason == "OOMKilled" or pod.outgrew == "memory"):
        return Reason.OUT_OF_MEMORY
    if pod is not None and pod.evicted:
        return Reason.EVICTED
    return Reason.TRAINER_FAILED


def _message(trainer_job: Child, pod: Pod | None, code: int | None, reported: str) -> str:
    if reported:
        return reported
    if pod is None:
        return trainer_job.message or f"the Job {trainer_job.name} failed and its pods are gone"
    if pod.exit_reason == "OOMKilled":
        return f"{pod.name} ran out of memory; raise resources in trainer.template or lower maxTokensPerMicroBatch"
    if pod.evicted and code is None:
        return f"{pod.name} was evicted: {pod.eviction_message or 'the node does not say why'}"
    said = f": {pod.exit_message.strip()}" if pod.exit_message.strip() else ""
    return f"{pod.name} ended with exit code {code}{said}"
