"""plan(): what to do about a job, from its spec, its recorded status and what was observed. Pure.

A plan does one of two things: it records a transition of the job in the status and asks to be called again, or it
asks for the effects that belong to the transition recorded last. See lifecycle.py for why.
"""

from dataclasses import dataclass, replace
from datetime import datetime

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import ConditionType, Reason, Status
from distill_operator import policy
from distill_operator.distillationjob import handover, lifecycle, readiness, suspension, trainer_conditions, upkeep
from distill_operator.distillationjob.announcements import announcements
from distill_operator.distillationjob.failure import (
    image_replaced,
    no_room_in_time,
    not_ready_in_time,
    trainer_deleted,
    trainer_failure,
    trainer_outgrown,
    trainer_stalled,
)
from distill_operator.distillationjob.readiness import RoleState
from distill_operator.distillationjob.trainer_conditions import POLL_SECONDS
from distill_operator.kinds import Kind
from distill_operator.kueue.admission import Request
from distill_operator.model import conditions, deadlines
from distill_operator.model.conditions import FALSE, ROLE_CONDITIONS, UNKNOWN, ConditionValue
from distill_operator.model.observed import Observed, Outcome, Raw
from distill_operator.model.times import seconds_since
from distill_operator.resources import pinning, rendering
from distill_operator.runtime.effects import Check, Delete, Effect
from distill_operator.settings import Settings

GARBAGE_SECONDS = 30.0
"""For so long the garbage collector may take to delete the pods of what was deleted; then they are named."""


@dataclass(frozen=True)
class Plan:
    """The effects, to be done in order, and the status that is written after them."""

    effects: tuple[Effect, ...]
    status: Status
    requeue_after: float | None = None
    """Seconds until the next reconcile; None leaves it to the watches and the resync."""
    settled: bool = False
    """Whether every child was compared, and is as it should be."""


def plan(job: DistillationJob, status: Status, observed: Observed, settings: Settings, now: datetime) -> Plan:
    """Return what to do next about a job."""
    queued = suspension.request(job, status, observed, settings)
    found = _plan(job, status, observed, settings, now, queued)
    found = replace(found, status=suspension.with_queue_conditions(job, found.status, queued, now))
    if found.requeue_after != 0.0:
        of_queue = suspension.queue_effects(job, status, found.status, observed, queued, now)
        found = replace(found, effects=(*found.effects, *of_queue))
    if found.status.active != observed.active:
        found = replace(found, status=found.status.model_copy(update={"active": observed.active}))
    return replace(found, effects=(*found.effects, *announcements(job.metadata.uid, status, found.status)))


def refused(job: DistillationJob, status: Status, message: str, now: datetime) -> Plan:
    """Return the plan after the API server refused an object that the spec asks for."""
    return invalid(job.metadata.uid, status, [message], job.metadata.generation, now)


def over_quota(
    job: DistillationJob, status: Status, observed: Observed, body: Raw, message: str, now: datetime
) -> Plan:
    """Return the plan after a quota forbade the object `body`.

    Nothing is wrong with the job: others end, or somebody raises the quota.
    """
    attempt = max(1, lifecycle.current_attempt(status, observed))
    condition = ConditionValue(FALSE, Reason.QUOTA_EXCEEDED, message)
    found = _wait(job, status, observed, attempt, upkeep.role_of(body), condition, now)
    after = found.status
    if status.attempts and status.next_attempt_time is None:
        # An attempt that is under way keeps its summary, as its deadlines are counted by that.
        summary = conditions.value_of(status, ConditionType.SUCCEEDED, ConditionValue(UNKNOWN, Reason.PENDING, message))
        after = lifecycle.revised(job, after, now, {ConditionType.SUCCEEDED: summary})
    return replace(found, effects=announcements(job.metadata.uid, status, after), status=after)


def invalid(uid: str, status: Status, problems: list[str], generation: int, now: datetime) -> Plan:
    """Return the plan for a spec that is wrong, of which nothing is made.

    What already runs is left alone: a job is not ended by an upgrade.
    """
    condition = ConditionValue(FALSE, Reason.INVALID_SPEC, "; ".join(problems))
    values = {ConditionType.SPEC_VALID: condition}
    if not status.attempts:
        waiting = ConditionValue(FALSE, Reason.INVALID_SPEC, "nothing is started, as the spec is invalid")
        values |= {
            # False would tell others that the job has ended: an edit of the spec, or of the installation, mends it.
            ConditionType.SUCCEEDED: replace(condition, status=UNKNOWN),
            ConditionType.READY: waiting,
            **{c: waiting for c in ROLE_CONDITIONS.values()},
            ConditionType.SUSPENDED: lifecycle.NOT_SUSPENDED,
            ConditionType.PREFLIGHT: lifecycle.PREFLIGHT_AHEAD,
            ConditionType.STALLED: lifecycle.NOT_STALLED,
        }
    after = status.model_copy(
        update={
            "observed_generation": generation,
            "conditions": conditions.merged(status.conditions, values, generation, now),
        }
    )
    return Plan(announcements(uid, status, after), after, 6 * POLL_SECONDS)


def _plan(
    job: DistillationJob, status: Status, observed: Observed, settings: Settings, now: datetime, queued: Request
) -> Plan:
    if conditions.is_finished(status):
        return _clean_up(job, status, observed, now)
    if job.spec.output.volume is None:
        text = "spec.output.volume: needed on a cluster; name a PersistentVolumeClaim for checkpoints and the model"
        return invalid(job.metadata.uid, status, [text], job.metadata.generation, now)
    attempt = lifecycle.current_attempt(status, observed)
    # What has begun goes on to its end; the next attempt is refused.
    if attempt == 0 and (problems := policy.problems(job.spec, settings)):
        return invalid(job.metadata.uid, status, problems, job.metadata.generation, now)
    trainer_job = observed.child(Kind.JOB, names.trainer_job(job.metadata.name, attempt))
    live = trainer_job if trainer_job and trainer_job.ours and not trainer_job.deleting else None
    between_attempts = status.next_attempt_time is not None

    if live and live.outcome is Outcome.COMPLETE and not between_attempts:
        return _transition(lifecycle.succeeded(job, status, observed.report, now))
    if why := suspension.of(job, queued):
        return Plan(*suspension.suspended(job, status, observed, why, now))
    if lifecycle.is_suspended(status):
        return _transition(lifecycle.resumed(job, status, now))
    left = deadlines.active_seconds_left(job.spec, status, now)
    if left is not None and left <= 0:
        return _transition(lifecycle.past_deadline(job, status, now))
    if between_attempts:
        return _between_attempts(job, status, observed, settings, attempt, now)
    if attempt == 0:
        return _begin(job, status, observed, settings, 1, now)
    if live and live.outcome is Outcome.FAILED:
        return _transition(lifecycle.failed(job, status, attempt, trainer_failure(job, status, observed, live), now))
    failure = trainer_deleted(job, status, observed, attempt) or trainer_outgrown(observed, attempt)
    if failure := failure or trainer_stalled(job, status, observed, now):
        return _transition(lifecycle.failed(job, status, attempt, failure, now))
    return _keep_running(job, status, observed, settings, attempt, now)


def _transition(status: Status) -> Plan:
    """Return the plan that records a transition; the next plan does what belongs to it."""
    return Plan((), status, 0.0)


def _begin(
    job: DistillationJob, status: Status, observed: Observed, settings: Settings, attempt: int, now: datetime
) -> Plan:
    """Begin an attempt, if the installation allows it and nothing is known that would leave its pods waiting."""
    if problems := policy.problems(job.spec, settings):
        return invalid(job.metadata.uid, status, problems, job.metadata.generation, now)
    wanted = [
        *rendering.lasting(job, settings),
        *rendering.group(job, settings),
        *rendering.serving(job, settings, observed.queueing.placements),
        rendering.training(job, settings, attempt, observed.queueing.placements),
    ]
    if obstacle := upkeep.name_taken(wanted, observed) or readiness.obstacle(job, observed):
        return _wait(job, status, observed, attempt, *obstacle, now)
    if other := handover.obstacle(job, observed, now):
        return _wait(job, status, observed, attempt, Role.TRAINER, other, now)
    states = readiness.roles(job, observed, attempt)
    begun = lifecycle.with_roles(job, lifecycle.begun(job, status, attempt, now), states, now)
    # Worded as the next reconcile does, which then has nothing to write.
    begun = lifecycle.revised(job, begun, now, {ConditionType.SUCCEEDED: _starting(attempt, states)})
    return Plan(tuple(Check(body) for body in wanted), begun, 0.0)


def _wait(
    job: DistillationJob,
    status: Status,
    observed: Observed,
    attempt: int,
    role: Role,
    condition: ConditionValue,
    now: datetime,
) -> Plan:
    """Wait for somebody to remove an obstacle, which `role` has. Nothing is started meanwhile."""
    states = [
        replace(state, condition=condition) if state.role is role else state
        for state in readiness.roles(job, observed, attempt)
    ]
    after = lifecycle.with_roles(job, status, states, now)
    summary = ConditionValue(UNKNOWN, Reason.PENDING, condition.message)
    found = {ConditionType.SUCCEEDED: summary, ConditionType.SUSPENDED: lifecycle.NOT_SUSPENDED}
    if not status.attempts:
        found |= {ConditionType.PREFLIGHT: lifecycle.PREFLIGHT_AHEAD, ConditionType.STALLED: lifecycle.NOT_STALLED}
    return Plan((), lifecycle.revised(job, after, now, found), POLL_SECONDS)


def _between_attempts(
    job: DistillationJob, status: Status, observed: Observed, settings: Settings, attempt: int, now: datetime
) -> Plan:
    """Remove everything of the last attempt, let the delay pass, then begin the next attempt."""
    leftovers = pinning.attempt_children(job, observed)
    effects = upkeep.deletions(leftovers)
    unchanged = lifecycle.revised(job, status, now, {})
    left = -seconds_since(status.next_attempt_time, now)
    # Pods without an owner are on their way out, but the garbage collector may not have come to them yet.
    remaining = next((p for p in observed.pods if not p.deleting and not p.ended), None)
    if left <= 0 and (other := handover.obstacle(job, observed, now)):
        return replace(_wait(job, status, observed, attempt, Role.TRAINER, other, now), effects=effects)
    if remaining is not None and left < -GARBAGE_SECONDS:
        text = f"the pod {remaining.name} of the last attempt has not gone; delete it if nothing else does"
        stays = ConditionValue(FALSE, Reason.NOT_READY, text)
        return replace(_wait(job, status, observed, attempt, remaining.role, stays, now), effects=effects)
    if leftovers or remaining is not None:
        return Plan(effects, unchanged, max(1.0, min(left, POLL_SECONDS)))
    if left > 0:
        return Plan(effects, unchanged, left)
    return _begin(job, status, observed, settings, attempt + 1, now)


def _keep_running(
    job: DistillationJob, status: Status, observed: Observed, settings: Settings, attempt: int, now: datetime
) -> Plan:
    """Keep the attempt's children as they should be, and say how it stands."""
    effects: list[Effect] = list(upkeep.deletions(c for c in observed.trainer_jobs() if c.attempt != attempt))
    trainer_job = observed.child(Kind.JOB, names.trainer_job(job.metadata.name, attempt))
    trainer_made = trainer_job is not None
    own = pinning.pinned_settings(job, observed, attempt, settings)
    # An attempt without the condition began without a queue, and what becomes of one is nothing to it.
    unplaced = observed.queueing.obstacle if conditions.find(status, ConditionType.ADMITTED) else None
    if not (observed.settled and (trainer_made or not readiness.trainer_may_start(job, observed))):
        where = observed.queueing.placements
        wanted = [*rendering.lasting(job, own), *rendering.group(job, own), *rendering.serving(job, own, where)]
        trainer = rendering.training(job, own, attempt, where)
        if obstacle := upkeep.name_taken([*wanted, trainer], observed):
            return _wait(job, status, observed, attempt, *obstacle, now)
        begun = pinning.is_under_way(job, observed, attempt)
        effects += upkeep.repairs(job, observed, wanted, trainer, under_way=begun, unplaced=unplaced is not None)

    states = readiness.roles(job, observed, attempt)
    if not trainer_made and (other := unplaced or handover.obstacle(job, observed, now)):
        states = [replace(s, condition=other) if s.role is Role.TRAINER else s for s in states]
    after = lifecycle.with_roles(job, status, states, now)
    not_ready = readiness.at_fault(states)
    was_running = conditions.reason_of(status, ConditionType.SUCCEEDED) == Reason.RUNNING
    if not_ready is None or was_running:
        summary = ConditionValue(UNKNOWN, Reason.RUNNING, f"attempt {attempt} is running")
    else:
        summary = _starting(attempt, states)
        if own != settings and not_ready.condition.reason is Reason.IMAGE_PULL_FAILED:
            text = not_ready.condition.message
            return _transition(lifecycle.failed(job, status, attempt, image_replaced(own, settings, text), now))
        left = deadlines.pre_running_seconds_left(job.spec, status, now)
        if left is not None and left <= 0:
            return _transition(lifecycle.failed(job, status, attempt, not_ready_in_time(job, summary.message), now))
        room = deadlines.room_seconds_left(job.spec, after, now)
        if room is not None and room <= 0:
            return _transition(lifecycle.failed(job, status, attempt, no_room_in_time(summary.message), now))
    found = {ConditionType.SUCCEEDED: summary, ConditionType.SUSPENDED: lifecycle.NOT_SUSPENDED}
    found |= trainer_conditions.reported(job, status, observed, states, now)
    uid = trainer_job.uid if trainer_job and trainer_job.ours else status.trainer_job_uid
    after = lifecycle.revised(job, after, now, found, attempts=attempt, trainer_job_uid=uid)
    if observed.report is not None:
        after = after.model_copy(update={"progress": trainer_conditions.progress(status, observed.report)})
    again = trainer_conditions.seconds_to_next_change(job, after, observed, now)
    if unplaced is not None:
        # Nothing tells of its end.
        again = min(again or POLL_SECONDS, POLL_SECONDS)
    return Plan(tuple(effects), after, again, settled=not effects and unplaced is None)


def _starting(attempt: int, states: list[RoleState]) -> ConditionValue:
    """Return the summary of an attempt that starts: what it waits for first."""
    fault = readiness.at_fault(states)
    waits = f"; {fault.role.value}: {fault.condition.message}" if fault else ""
    return ConditionValue(UNKNOWN, Reason.STARTING, f"attempt {attempt} is starting{waits}")


def _clean_up(job: DistillationJob, status: Status, observed: Observed, now: datetime) -> Plan:
    """Release the accelerators of a finished job. A trainer Job that has ended stays for its log, holding nothing."""
    if status.observed_generation != job.metadata.generation:
        # An edit changes nothing any more, and that is all there is to say about it.
        status = lifecycle.revised(job, status, now, {})
    left = deadlines.ttl_seconds_left(job.spec, status, now)
    if left is not None and left <= 0:
        return Plan((Delete(Kind.DISTILLATION_JOB, job.metadata.name, job.metadata.uid),), status)
    holding = [
        c for c in pinning.attempt_children(job, observed) if c.kind is not Kind.JOB or c.outcome is Outcome.ACTIVE
    ]
    return Plan(upkeep.deletions(holding), status, left)
