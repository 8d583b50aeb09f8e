"""plan(): what to do about a job, from what its spec says, what its status recorded and what is. Pure.

It does one of two things: it records a turn of the job's life in the status and asks to be called again, or it asks
for the effects that belong to the turn recorded last. See lifecycle.py for why.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import ConditionType, Reason, Status
from distill_operator import policy
from distill_operator.distillationjob import lifecycle, liveness, readiness
from distill_operator.distillationjob.failure import image_replaced, not_ready_in_time, trainer_failure
from distill_operator.distillationjob.lifecycle import ROLE_CONDITIONS
from distill_operator.distillationjob.liveness import POLL_SECONDS
from distill_operator.distillationjob.readiness import RoleState
from distill_operator.model import conditions
from distill_operator.model.announcements import announcements
from distill_operator.model.conditions import FALSE, TRUE, UNKNOWN, Verdict
from distill_operator.model.observed import Child, Observed, Outcome, Raw
from distill_operator.resources import pinning, rendering
from distill_operator.resources.drift import has_drifted
from distill_operator.resources.pod_template import KEY_ENTRY, Json
from distill_operator.runtime.effects import Apply, Check, CreateSecret, Delete, Effect
from distill_operator.runtime.kinds import Kind, kind_of
from distill_operator.runtime.times import seconds_since
from distill_operator.settings import Settings

SERVING = frozenset({Kind.DEPLOYMENT, Kind.RAY_CLUSTER})


@dataclass(frozen=True)
class Plan:
    """Effects in order, then the status."""

    effects: tuple[Effect, ...]
    status: Status
    requeue_after: float | None = None
    """Seconds; None leaves it to the watches and the resync."""
    settled: bool = False
    """Every child was compared, and is as it should be."""


def plan(job: DistillationJob, status: Status, observed: Observed, settings: Settings, now: datetime) -> Plan:
    """The next thing to do."""
    found = _plan(job, status, observed, settings, now)
    return replace(found, effects=(*found.effects, *announcements(job.metadata.uid, status, found.status)))


def refused(job: DistillationJob, status: Status, message: str, now: datetime) -> Plan:
    """After the API server refused an object that the spec asks for."""
    return invalid(job.metadata.uid, status, [message], job.metadata.generation, now)


def over_quota(
    job: DistillationJob, status: Status, observed: Observed, body: Raw, message: str, now: datetime
) -> Plan:
    """After a quota forbade an object. Nothing is wrong with the job: others end, or somebody raises the quota."""
    attempt = max(1, lifecycle.current_attempt(status, observed))
    verdict = Verdict(FALSE, Reason.QUOTA_EXCEEDED, message)
    found = _wait(job, status, observed, attempt, _role_of(body), verdict, now)
    after = found.status
    if status.attempts and status.next_attempt_time is None:
        # An attempt that is under way keeps its summary, as its deadlines are counted by that.
        summary = conditions.verdict_of(status, ConditionType.SUCCEEDED, Verdict(UNKNOWN, Reason.PENDING, message))
        after = lifecycle.revised(job, after, now, {ConditionType.SUCCEEDED: summary})
    return replace(found, effects=announcements(job.metadata.uid, status, after), status=after)


def invalid(uid: str, status: Status, problems: list[str], generation: int, now: datetime) -> Plan:
    """Nothing is made of a spec that is wrong. What already runs is left alone: a job is not ended by an upgrade."""
    verdict = Verdict(FALSE, Reason.INVALID_SPEC, "; ".join(problems))
    verdicts = {ConditionType.SPEC_VALID: verdict}
    if not status.attempts:
        waiting = Verdict(FALSE, Reason.INVALID_SPEC, "nothing is started, as the spec is invalid")
        verdicts |= {
            ConditionType.SUCCEEDED: verdict,
            ConditionType.READY: waiting,
            **{c: waiting for c in ROLE_CONDITIONS.values()},
            ConditionType.SUSPENDED: lifecycle.NOT_SUSPENDED,
            ConditionType.PREFLIGHT: lifecycle.PREFLIGHT_AHEAD,
            ConditionType.STALLED: lifecycle.NOT_STALLED,
        }
    after = status.model_copy(
        update={
            "observed_generation": generation,
            "conditions": conditions.merged(status.conditions, verdicts, generation, now),
        }
    )
    return Plan(announcements(uid, status, after), after, 6 * POLL_SECONDS)


def _plan(job: DistillationJob, status: Status, observed: Observed, settings: Settings, now: datetime) -> Plan:
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
        return _turn(lifecycle.succeeded(job, status, observed.report, now))
    if job.spec.suspend:
        return _suspend(job, status, observed, now)
    if conditions.is_true(status, ConditionType.SUSPENDED):
        return _turn(lifecycle.resumed(job, status, now))
    left = lifecycle.active_seconds_left(job.spec, status, now)
    if left is not None and left <= 0:
        return _turn(lifecycle.past_deadline(job, status, now))
    if between_attempts:
        return _between_attempts(job, status, observed, settings, attempt, now)
    if attempt == 0:
        return _begin(job, status, observed, settings, 1, now)
    if live and live.outcome is Outcome.FAILED:
        return _turn(lifecycle.failed(job, status, attempt, trainer_failure(job, status, observed, live), now))
    return _keep_running(job, status, observed, settings, attempt, now)


def _turn(status: Status) -> Plan:
    """Recorded first; what belongs to it is done by the plan after this."""
    return Plan((), status, 0.0)


def _begin(
    job: DistillationJob, status: Status, observed: Observed, settings: Settings, attempt: int, now: datetime
) -> Plan:
    """Starts an attempt, if the installation allows it and nothing is known that would leave its pods waiting."""
    if problems := policy.problems(job.spec, settings):
        return invalid(job.metadata.uid, status, problems, job.metadata.generation, now)
    wanted = [
        *rendering.lasting(job, settings),
        *rendering.group(job, settings),
        *rendering.serving(job, settings),
        rendering.training(job, settings, attempt),
    ]
    if obstacle := _name_taken(wanted, observed) or readiness.obstacle(job, observed):
        return _wait(job, status, observed, attempt, *obstacle, now)
    states = readiness.roles(job, observed, attempt)
    begun = lifecycle.with_roles(job, lifecycle.begun(job, status, attempt, now), states, now)
    # In the words of the next look, which then has nothing to write.
    begun = lifecycle.revised(job, begun, now, {ConditionType.SUCCEEDED: _starting(attempt, states)})
    return Plan(tuple(Check(body) for body in wanted), begun, 0.0)


def _wait(
    job: DistillationJob,
    status: Status,
    observed: Observed,
    attempt: int,
    role: Role,
    verdict: Verdict,
    now: datetime,
) -> Plan:
    """For somebody to remove an obstacle. Nothing is started meanwhile."""
    states = [
        replace(state, verdict=verdict) if state.role is role else state
        for state in readiness.roles(job, observed, attempt)
    ]
    after = lifecycle.with_roles(job, status, states, now)
    summary = Verdict(UNKNOWN, Reason.PENDING, verdict.message)
    found = {ConditionType.SUCCEEDED: summary, ConditionType.SUSPENDED: lifecycle.NOT_SUSPENDED}
    if not status.attempts:
        found |= {ConditionType.PREFLIGHT: lifecycle.PREFLIGHT_AHEAD, ConditionType.STALLED: lifecycle.NOT_STALLED}
    return Plan((), lifecycle.revised(job, after, now, found), POLL_SECONDS)


def _between_attempts(
    job: DistillationJob, status: Status, observed: Observed, settings: Settings, attempt: int, now: datetime
) -> Plan:
    """Everything of the last attempt goes, then the delay passes, then the next attempt begins."""
    leftovers = pinning.children(job, observed)
    effects = _deletions(leftovers)
    unchanged = lifecycle.revised(job, status, now, {})
    left = -seconds_since(status.next_attempt_time, now)
    # Pods without an owner are on their way out, but the garbage collector may not have come to them yet.
    if leftovers or any(not p.deleting for p in observed.pods):
        return Plan(effects, unchanged, max(1.0, min(left, POLL_SECONDS)))
    if left > 0:
        return Plan(effects, unchanged, left)
    return _begin(job, status, observed, settings, attempt + 1, now)


def _keep_running(
    job: DistillationJob, status: Status, observed: Observed, settings: Settings, attempt: int, now: datetime
) -> Plan:
    """Holds the attempt's children as they should be."""
    effects: list[Effect] = list(_deletions(c for c in observed.trainer_jobs() if c.attempt != attempt))
    trainer_made = observed.child(Kind.JOB, names.trainer_job(job.metadata.name, attempt)) is not None
    own = pinning.settings_of(job, observed, attempt, settings)
    if not (observed.settled and (trainer_made or not readiness.trainer_may_start(job, observed))):
        wanted = [*rendering.lasting(job, own), *rendering.group(job, own), *rendering.serving(job, own)]
        trainer = rendering.training(job, own, attempt)
        if obstacle := _name_taken([*wanted, trainer], observed):
            return _wait(job, status, observed, attempt, *obstacle, now)
        effects += _repairs(job, observed, wanted, trainer, under_way=pinning.is_under_way(job, observed, attempt))

    states = readiness.roles(job, observed, attempt)
    after = lifecycle.with_roles(job, status, states, now)
    not_ready = next((s for s in states if s.verdict.status is not TRUE), None)
    was_running = conditions.reason_of(status, ConditionType.SUCCEEDED) == Reason.RUNNING
    if not_ready is None or was_running:
        summary = Verdict(UNKNOWN, Reason.RUNNING, f"attempt {attempt} is running")
    else:
        summary = _starting(attempt, states)
        if own != settings and not_ready.verdict.reason is Reason.IMAGE_PULL_FAILED:
            text = not_ready.verdict.message
            return _turn(lifecycle.failed(job, status, attempt, image_replaced(own, settings, text), now))
        left = lifecycle.pre_running_seconds_left(job.spec, status, now)
        if left is not None and left <= 0:
            return _turn(lifecycle.failed(job, status, attempt, not_ready_in_time(job, summary.message), now))
    found = {ConditionType.SUCCEEDED: summary, ConditionType.SUSPENDED: lifecycle.NOT_SUSPENDED}
    found |= liveness.reported(job, status, observed, states, now)
    after = lifecycle.revised(job, after, now, found, attempts=attempt)
    if observed.report is not None:
        after = after.model_copy(update={"progress": observed.report.progress})
    return Plan(tuple(effects), after, liveness.next_look(job, after, observed, now), settled=not effects)


def _repairs(
    job: DistillationJob, observed: Observed, wanted: list[Json], trainer: Json, *, under_way: bool
) -> list[Effect]:
    """What makes the children as they should be."""
    effects: list[Effect] = []
    for body in wanted:
        if kind_of(body) is Kind.RAY_CLUSTER and not observed.kuberay_installed:
            continue
        effects += _upkeep(body, observed, under_way)
    if any(isinstance(e, Apply) and kind_of(e.body) in SERVING for e in effects):
        # Nobody looks whether it is there: it is asked for whenever pods are made that read it.
        effects.insert(0, CreateSecret(rendering.key(job), KEY_ENTRY))
    if _existing(trainer, observed) or readiness.trainer_may_start(job, observed):
        # A Job's pods cannot be changed; what somebody changed by hand of one of ours can be put right.
        effects += _upkeep(trainer, observed, under_way)
    return effects


def _upkeep(body: Json, observed: Observed, under_way: bool) -> list[Apply]:
    """At most one: of a child that is missing, or is not what it should be."""
    child = _existing(body, observed)
    if child is None:
        return [Apply(body)]
    words = pinning.held_to(body, child) if under_way else body
    return [Apply(words)] if not child.deleting and has_drifted(words, child) else []


def _starting(attempt: int, states: list[RoleState]) -> Verdict:
    waits = [f"; {s.role.value}: {s.verdict.message}" for s in states if s.verdict.status is not TRUE]
    return Verdict(UNKNOWN, Reason.STARTING, f"attempt {attempt} is starting{''.join(waits[:1])}")


def _suspend(job: DistillationJob, status: Status, observed: Observed, now: datetime) -> Plan:
    if not conditions.is_true(status, ConditionType.SUSPENDED):
        return _turn(lifecycle.suspended(job, status, now))
    effects = _deletions(pinning.children(job, observed))
    return Plan(effects, lifecycle.revised(job, status, now, {}))


def _clean_up(job: DistillationJob, status: Status, observed: Observed, now: datetime) -> Plan:
    """Accelerators are released at once. A trainer Job that has ended stays for its log, holding nothing."""
    left = lifecycle.ttl_seconds_left(job.spec, status, now)
    if left is not None and left <= 0:
        return Plan((Delete(Kind.DISTILLATION_JOB, job.metadata.name, job.metadata.uid),), status)
    holding = [c for c in pinning.children(job, observed) if c.kind is not Kind.JOB or c.outcome is Outcome.ACTIVE]
    return Plan(_deletions(holding), status, left)


def _deletions(children: Iterable[Child]) -> tuple[Delete, ...]:
    return tuple(Delete(c.kind, c.name, c.uid) for c in children if not c.deleting)


def _existing(body: Json, observed: Observed) -> Child | None:
    return observed.child(kind_of(body), body["metadata"]["name"])


def _role_of(body: Raw) -> Role:
    """Whose object it is; what belongs to all is told of with the trainer."""
    return Role(body["metadata"]["labels"].get(names.LABEL_ROLE, Role.TRAINER.value))


def _name_taken(wanted: list[Json], observed: Observed) -> tuple[Role, Verdict] | None:
    """Server-side apply would take a stranger's object over, so it is never asked to."""
    for body in wanted:
        child = _existing(body, observed)
        if child is not None and not child.ours:
            role = _role_of(body)
            what = f"{body['kind']} {body['metadata']['name']}"
            text = f"the {what} exists and belongs to something else; delete it, or name this job differently"
            return role, Verdict(FALSE, Reason.NAME_TAKEN, text)
    return None
