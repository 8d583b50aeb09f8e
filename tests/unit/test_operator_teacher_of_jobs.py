"""A job that names a Teacher: what its TeacherReady says, what waits for it, and what becomes of it without one."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from operator_fakes import EPOCH, job
from test_operator_failures import ended, taken
from test_operator_plan import NOTHING, applied, deleted, plan_at, says, trainer
from test_operator_teachers import ROUTED, up

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import ConditionType, Progress, Status
from distill_api.teacher.kind import TeacherStatus
from distill_operator.model.observed import Observed, ObservedTeacher, Outcome, Pod
from distill_operator.runtime.effects import Check, Event

READY = ConditionType.TEACHER_READY
FULL = "poet-scoring-0: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
MISSING = "the Teacher poet does not exist in this namespace; create it, and the job goes on by itself"


def learner(**spec: Any) -> DistillationJob:
    return job(teacher={"ref": {"name": "poet"}}, **spec)


def teacher(
    name: str = "poet", reason: str = "Ready", message: str = "1 of 1 servers answer", *, placed: bool = True
) -> ObservedTeacher:
    """As its own status has it; `placed`: its server has a node."""
    condition = {
        "type": "Ready",
        "status": "True" if reason == "Ready" else "False",
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    server = Pod(f"{name}-scoring-0", "s", Role.TEACHER, scheduled=placed)
    return ObservedTeacher(name, False, TeacherStatus.model_validate({"conditions": [condition]}), (server,))


def begun(of: DistillationJob) -> Status:
    """An attempt began at EPOCH, as every Teacher was there."""
    shared = tuple(teacher(name) for name in of.spec.shared_teachers)
    return plan_at(of, Status(), replace(NOTHING, teachers=shared)).status


def seen(of: DistillationJob, *shared: ObservedTeacher, **ready: int) -> Observed:
    return replace(up(of, **ready), teachers=shared)


def warnings(found: Any) -> list[tuple[str, str]]:
    return [(e.reason, e.message) for e in found.effects if isinstance(e, Event) and e.warning]


# Before it is there


def test_a_job_whose_teacher_does_not_exist_starts_nothing_and_says_which_to_create() -> None:
    found = plan_at(learner(), Status(), NOTHING)
    assert not [e for e in found.effects if isinstance(e, Check)] and found.status.attempts == 0
    assert says(found.status, READY) == ("False", "TeacherNotFound", MISSING)
    assert says(found.status, ConditionType.SUCCEEDED)[1:] == ("Pending", MISSING)
    assert warnings(found) == [("TeacherNotFound", MISSING)]


def test_a_teacher_that_is_being_deleted_is_as_good_as_none() -> None:
    found = plan_at(learner(), Status(), replace(NOTHING, teachers=(replace(teacher(), deleting=True),)))
    assert found.status.attempts == 0
    assert says(found.status, READY)[1:] == (
        "TeacherNotFound",
        "the Teacher poet is being deleted; create it again, and the job goes on by itself",
    )


@pytest.mark.parametrize("reason", ["InvalidSpec", "NameTaken"])
def test_a_teacher_that_a_person_has_to_mend_is_waited_for_with_nothing_held(reason: str) -> None:
    found = plan_at(learner(), Status(), replace(NOTHING, teachers=(teacher("poet", reason, "it is wrong"),)))
    assert found.status.attempts == 0
    assert says(found.status, READY)[1:] == (reason, "Teacher poet: it is wrong")


def test_the_job_begins_when_its_teacher_is_there() -> None:
    waiting = plan_at(learner(), Status(), NOTHING).status
    assert plan_at(learner(), waiting, replace(NOTHING, teachers=(teacher(),))).status.attempts == 1


# While it gets ready


@pytest.mark.parametrize("reason", ["Unschedulable", "ImagePullFailed", "CrashLooping", "QuotaExceeded", "OutOfMemory"])
def test_what_a_teacher_lacks_is_passed_on_in_its_own_words_and_warned_of(reason: str) -> None:
    of = learner()
    before = plan_at(of, begun(of), seen(of, teacher())).status
    found = plan_at(of, before, seen(of, teacher("poet", reason, FULL, placed=False)))
    assert says(found.status, READY) == ("False", reason, f"Teacher poet: {FULL}")
    assert warnings(found) == [(reason, f"Teacher poet: {FULL}")]


def test_the_engines_come_up_beside_it_and_the_trainer_waits_until_it_has_a_node() -> None:
    of = learner()
    waits = plan_at(of, begun(of), Observed(teachers=(teacher("poet", "Unschedulable", FULL, placed=False),)))
    assert "RayCluster/job-rollout" in applied(waits)
    full = seen(of, teacher("poet", "Unschedulable", FULL, placed=False))
    assert not applied(plan_at(of, begun(of), full))
    loads = seen(of, teacher("poet", "NotReady", "0 of 1 servers answer"))
    found = plan_at(of, begun(of), loads)
    assert applied(found) == ["Job/job-trainer-1"], "as with a teacher of its own, models load side by side"
    assert says(found.status, READY)[:2] == ("False", "NotReady")


def test_no_member_of_a_gang_gets_a_node_before_its_teacher_has_one() -> None:
    of = learner(scheduling={"gang": "volcano", "scope": "job"})
    assert of.spec.scheduling.all_at_once
    full = replace(seen(of, teacher("poet", "Unschedulable", FULL, placed=False)), pods=())
    assert "Job/job-trainer-1" not in applied(plan_at(of, begun(of), full))
    assert "Job/job-trainer-1" in applied(plan_at(of, begun(of), replace(full, teachers=(teacher(),))))


def test_one_that_answers_is_ready_and_its_servers_that_come_and_go_change_nothing_of_the_job() -> None:
    of = learner()
    found = plan_at(of, begun(of), seen(of, teacher()))
    assert says(found.status, READY) == ("True", "Ready", "Teacher poet answers")
    assert [(r.desired, r.ready) for r in found.status.roles if r.name == "teacher"] == [(1, 1)]
    more = seen(of, teacher(message="4 of 4 servers answer"))
    assert plan_at(of, found.status, more).status == found.status


def test_among_own_shared_and_external_teachers_the_first_that_lacks_something_is_named() -> None:
    teachers = [
        {"name": "math", "model": "/models/math", "replicas": 2},
        {"name": "code", "ref": {"name": "coder"}},
        {"name": "poetry", "ref": {"name": "poet"}},
        {"name": "far", "endpoint": {"url": "http://far.example"}},
    ]
    of = job(teacher=None, teachers=teachers, data=ROUTED)

    def told(math: int, *shared: ObservedTeacher) -> tuple[Any, ...]:
        status = plan_at(of, begun(of), seen(of, *shared, math=math)).status
        return says(status, READY), [(r.ready, r.desired) for r in status.roles if r.name == "teacher"]

    assert told(2, teacher("coder"), teacher("poet")) == (
        (
            "True",
            "Ready",
            "2 of 2 are ready; Teacher coder answers; Teacher poet answers; "
            "http://far.example: not the job's own, so the trainer's preflight judges",
        ),
        [(4, 4)],
    )
    assert told(2, teacher("coder"))[0][1] == "TeacherNotFound"
    assert told(1, teacher("coder"))[0] == ("False", "NotReady", "1 of 2 are ready")
    assert told(2, teacher("coder"), teacher("poet", "CrashLooping", "boo")) == (
        ("False", "CrashLooping", "Teacher poet: boo"),
        [(3, 4)],
    )


# While the job runs


def run(of: DistillationJob) -> Status:
    found = plan_at(of, begun(of), with_trainer(of, seen(of, teacher()))).status
    assert says(found, ConditionType.SUCCEEDED)[1] == "Running"
    return found


def with_trainer(of: DistillationJob, observed: Observed, *pods: Pod, **changes: Any) -> Observed:
    return replace(observed, children=(*observed.children, trainer(of, **changes)), pods=(*observed.pods, *pods))


def test_a_teacher_that_goes_under_a_running_job_is_told_and_the_trainer_decides_for_how_long_it_waits() -> None:
    of = learner()
    found = plan_at(of, run(of), with_trainer(of, seen(of)))
    assert says(found.status, READY) == ("False", "TeacherNotFound", MISSING)
    assert warnings(found) == [("TeacherNotFound", MISSING)]
    assert says(found.status, ConditionType.SUCCEEDED)[1] == "Running"
    assert not deleted(found) and not applied(found)


def test_an_outage_beyond_the_trainers_limit_ends_the_attempt_and_the_next_begins_once_the_teacher_is_back() -> None:
    of = learner()
    over = with_trainer(of, seen(of), ended("TeacherUnreachable"), outcome=Outcome.FAILED)
    after = plan_at(of, run(of), over).status
    assert says(after, ConditionType.TRAINER_READY) == ("False", "TeacherUnreachable", "said so")
    assert (after.restarts, says(after, ConditionType.SUCCEEDED)[1]) == (1, "Restarting")
    waits = plan_at(of, after, replace(NOTHING), seconds=600)
    assert (waits.status.attempts, waits.status.restarts) == (1, 1), (
        "no attempt is spent on a Teacher that is not there"
    )
    assert says(waits.status, READY)[1] == "TeacherNotFound"
    assert plan_at(of, waits.status, replace(NOTHING, teachers=(teacher(),)), seconds=700).status.attempts == 2


def test_what_the_last_trainer_had_for_a_teacher_to_do_is_forgotten_when_the_next_attempt_begins() -> None:
    of = learner()
    said = Progress.model_validate({"step": 4, "teachers": [{"name": "teacher", "requests": 900}]})
    over = with_trainer(of, seen(of, teacher()), ended("TeacherUnreachable"), outcome=Outcome.FAILED)
    after = plan_at(of, run(of).model_copy(update={"progress": said}), over).status
    again = plan_at(of, after, replace(NOTHING, teachers=(teacher(),)), seconds=600).status
    assert again.attempts == 2 and again.progress
    assert (again.progress.step, again.progress.teachers) == (4, [])


def test_an_eviction_of_its_server_does_not_count_against_the_jobs_limit() -> None:
    of = learner(backoffLimit=0)
    evicted = replace(teacher("poet", "NotReady", "0 of 1 servers answer"), pods=(taken(Role.TEACHER),))
    recorded = plan_at(of, run(of), with_trainer(of, seen(of, evicted))).status
    over = with_trainer(of, seen(of), ended("TeacherUnreachable"), outcome=Outcome.FAILED)
    after = plan_at(of, recorded, over, seconds=600).status
    assert (after.restarts, says(after, ConditionType.SUCCEEDED)[1]) == (0, "Restarting")


def test_an_eviction_before_the_attempt_began_excuses_nothing() -> None:
    of = learner(backoffLimit=0)
    long_ago = taken(Role.TEACHER, disrupted_at=EPOCH - timedelta(hours=1))
    servers = replace(teacher(), pods=(*teacher().pods, long_ago))
    recorded = plan_at(of, run(of), with_trainer(of, seen(of, servers))).status
    over = with_trainer(of, seen(of, servers), ended("TeacherUnreachable"), outcome=Outcome.FAILED)
    assert plan_at(of, recorded, over, seconds=600).status.restarts == 1


def test_a_suspended_job_needs_no_teacher() -> None:
    of = learner(suspend=True)
    stopped = plan_at(of, Status(), NOTHING).status
    assert says(stopped, READY)[1] == "Suspended"
    assert plan_at(of, stopped, NOTHING).status == stopped
