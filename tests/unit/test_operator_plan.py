"""Decisions of plan(), one situation each."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from operator_fakes import EPOCH, SETTINGS, job

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.protocol import Phase, ProgressReport
from distill_api.status import ConditionType, Progress, Reason, Result, Status
from distill_operator.distillationjob.lifecycle import delay_seconds
from distill_operator.distillationjob.plan import Plan, plan
from distill_operator.kinds import Kind, kind_of
from distill_operator.model import conditions
from distill_operator.model.observed import Child, Claim, Observed, Outcome, Pod
from distill_operator.resources import rendering
from distill_operator.runtime.effects import Apply, Check, Delete, Event

NOTHING = Observed(claim=Claim.BOUND)
PUBLISHED = {"volume": {"claimName": "out"}, "publish": [{"to": "hf://team/sums"}, {"to": "s3://models/sums"}]}
"""The output of a job that publishes its model."""


def plan_at(of: DistillationJob, status: Status, observed: Observed, seconds: float = 0.0) -> Plan:
    return plan(of, status, observed, SETTINGS, EPOCH + timedelta(seconds=seconds))


def begun(of: DistillationJob, attempt: int = 1) -> Status:
    """The status after an attempt began at EPOCH."""
    status = plan_at(of, Status(), NOTHING).status
    return status.model_copy(update={"attempts": attempt})


def child(body: Any, **changes: Any) -> Child:
    """As it is after it was applied."""
    found = Child(
        kind=kind_of(body),
        name=body["metadata"]["name"],
        uid=f"uid-of-{body['metadata']['name']}",
        ours=True,
        spec_hash=body["metadata"]["annotations"]["distillation-operator.io/spec-hash"],
        fixed_hash=body["metadata"]["annotations"]["distillation-operator.io/fixed-hash"],
        content=body,
    )
    return replace(found, **changes)


def serving(of: DistillationJob, *, ready: bool = True) -> tuple[Child, ...]:
    teacher, rollout = rendering.serving(of, SETTINGS)
    counts = (of.spec.teacher.replicas, of.spec.rollout.replicas) if ready else (0, 0)
    return (
        *(child(body) for body in rendering.lasting(of, SETTINGS)),
        child(teacher, ready=counts[0]),
        child(rollout, ready=counts[1]),
    )


def trainer(of: DistillationJob, attempt: int = 1, **changes: Any) -> Child:
    return child(rendering.training(of, SETTINGS, attempt), **{"attempt": attempt, "ready": 1, **changes})


def pods(of: DistillationJob, **changes: Any) -> tuple[Pod, ...]:
    teachers = [Pod(f"t{i}", f"t{i}", Role.TEACHER, scheduled=True) for i in range(of.spec.teacher.replicas)]
    engines = [Pod(f"e{i}", f"e{i}", Role.ROLLOUT, scheduled=True) for i in range(of.spec.rollout.replicas)]
    head = Pod("h", "h", Role.ROLLOUT, head=True, scheduled=True)
    return tuple(replace(p, **changes) for p in (*teachers, *engines, head))


def running(of: DistillationJob, **changes: Any) -> Observed:
    found = Observed(children=(*serving(of), trainer(of)), pods=pods(of), claim=Claim.BOUND)
    return replace(found, **changes)


def applied(found: Plan) -> list[str]:
    return [f"{e.body['kind']}/{e.body['metadata']['name']}" for e in found.effects if isinstance(e, Apply)]


def deleted(found: Plan) -> list[str]:
    return [f"{e.kind.value.kind}/{e.name}" for e in found.effects if isinstance(e, Delete)]


def says(status: Status, kind: ConditionType) -> tuple[str, str, str]:
    found = conditions.find(status, kind)
    assert found is not None, f"{kind} is missing"
    return found.status.value, found.reason, found.message


# The start


def test_the_first_look_records_the_attempt_and_makes_nothing_yet() -> None:
    found = plan_at(job(), Status(), NOTHING)
    assert not applied(found)
    assert all(isinstance(e, Check | Event) for e in found.effects)
    assert (found.status.attempts, found.requeue_after) == (1, 0.0)


def test_the_first_look_has_the_api_server_judge_every_child() -> None:
    found = plan_at(job(), Status(), NOTHING)
    kinds = [e.body["kind"] for e in found.effects if isinstance(e, Check)]
    assert {"Deployment", "RayCluster", "Job"} < set(kinds)


def test_every_condition_is_there_from_the_first_look() -> None:
    found = plan_at(job(output=PUBLISHED), Status(), NOTHING).status
    absent = {ConditionType.COMPLETE, ConditionType.FAILED, ConditionType.QUOTA_RESERVED, ConditionType.ADMITTED}
    assert {c.type for c in found.conditions} == {t.value for t in ConditionType} - absent


def test_teacher_and_engines_start_at_once_and_the_trainer_does_not() -> None:
    found = plan_at(job(), begun(job()), NOTHING)
    assert applied(found) == [
        "ConfigMap/job-job",
        "NetworkPolicy/job-traffic",
        "Service/job-teacher",
        "Service/job-trainer",
        "Deployment/job-teacher",
        "RayCluster/job-rollout",
    ]


@pytest.mark.parametrize("waiting", ["t1", "e2", "h"])
def test_the_trainer_waits_for_the_last_pod_to_have_a_node(waiting: str) -> None:
    of = job(teacher={"model": "m", "replicas": 2}, rollout={"replicas": 3})
    some = tuple(replace(p, scheduled=p.name != waiting) for p in pods(of))
    observed = Observed(children=serving(of, ready=False), pods=some, claim=Claim.BOUND)
    assert not applied(plan_at(of, begun(of), observed))
    assert applied(plan_at(of, begun(of), replace(observed, pods=pods(of)))) == ["Job/job-trainer-1"]


def test_a_pod_that_is_going_away_holds_no_node() -> None:
    of = job()
    observed = Observed(children=serving(of), pods=pods(of, deleting=True), claim=Claim.BOUND)
    assert not applied(plan_at(of, begun(of), observed))


def test_a_child_that_is_going_away_is_not_written_to() -> None:
    of = job()
    going = tuple(replace(c, deleting=True, spec_hash="other") for c in serving(of))
    assert not applied(plan_at(of, begun(of), Observed(children=going, claim=Claim.BOUND)))


def test_all_roles_ready_is_running() -> None:
    found = plan_at(job(), begun(job()), running(job()))
    assert says(found.status, ConditionType.SUCCEEDED)[:2] == ("Unknown", "Running")
    assert says(found.status, ConditionType.READY)[0] == "True"
    assert [(r.name, r.desired, r.ready) for r in found.status.roles] == [
        ("teacher", 1, 1),
        ("rollout", 1, 1),
        ("trainer", 1, 1),
    ]


def test_a_running_job_stays_running_while_an_engine_comes_back() -> None:
    of = job()
    status = plan_at(of, begun(of), running(of)).status
    lost = running(of, children=(*serving(of, ready=False), trainer(of)))
    found = plan_at(of, status, lost)
    assert says(found.status, ConditionType.SUCCEEDED)[1] == "Running"
    assert says(found.status, ConditionType.READY)[0] == "False"


@pytest.mark.parametrize(
    ("head", "ready"), [({"ready": True}, "True"), ({"ready": False}, "False"), ({"deleting": True}, "False")]
)
def test_engines_whose_pods_are_ready_are_ready_before_kuberay_says_so(head: dict[str, bool], ready: str) -> None:
    of = job()
    late = [replace(c, ready=0) if c.kind is Kind.RAY_CLUSTER else c for c in serving(of)]
    of_pods = [replace(p, **{"ready": True, **(head if p.head else {})}) for p in pods(of)]
    observed = running(of, children=(*late, trainer(of)), pods=tuple(of_pods))
    assert says(plan_at(of, begun(of), observed).status, ConditionType.ROLLOUT_READY)[0] == ready


def test_a_second_look_at_the_same_changes_nothing() -> None:
    of = job()
    first = plan_at(of, begun(of), running(of))
    second = plan_at(of, first.status, running(of), seconds=60)
    assert second.status == first.status
    assert not second.effects


# Obstacles: nothing is started, and the message says what to do


@pytest.mark.parametrize(
    ("observed", "condition", "reason", "advice"),
    [
        (Observed(claim=Claim.ABSENT), ConditionType.TRAINER_READY, "VolumeNotBound", "create it"),
        (
            Observed(claim=Claim.DELETING),
            ConditionType.TRAINER_READY,
            "VolumeNotBound",
            "is being deleted; create it again",
        ),
        (Observed(claim=Claim.PENDING), ConditionType.TRAINER_READY, "VolumeNotBound", "kubectl describe pvc out"),
        (
            Observed(claim=Claim.BOUND, kuberay_installed=False),
            ConditionType.ROLLOUT_READY,
            "KubeRayNotInstalled",
            "install the KubeRay operator",
        ),
    ],
)
def test_an_obstacle_that_is_known_starts_nothing(
    observed: Observed, condition: ConditionType, reason: str, advice: str
) -> None:
    found = plan_at(job(), Status(), observed)
    assert not applied(found)
    assert says(found.status, condition)[:2] == ("False", reason)
    assert advice in says(found.status, condition)[2]
    assert says(found.status, ConditionType.SUCCEEDED)[:2] == ("Unknown", "Pending")
    assert found.status.attempts == 0
    assert found.requeue_after == 10.0


def test_a_claim_that_waits_for_its_first_consumer_is_no_obstacle() -> None:
    assert plan_at(job(), Status(), Observed(claim=Claim.WAITS_FOR_CONSUMER)).status.attempts == 1


def test_a_spec_without_an_output_volume_is_invalid_on_a_cluster() -> None:
    found = plan_at(job(output={}), Status(), NOTHING)
    assert says(found.status, ConditionType.SUCCEEDED)[:2] == ("Unknown", "InvalidSpec"), "it may still be mended"
    assert "spec.output.volume" in says(found.status, ConditionType.SPEC_VALID)[2]
    assert not applied(found) and found.status.attempts == 0


def test_a_strangers_object_is_never_taken_over() -> None:
    of = job()
    foreign = child(rendering.serving(of, SETTINGS)[0], ours=False, content={})
    found = plan_at(of, Status(), Observed(children=(foreign,), claim=Claim.BOUND))
    assert not applied(found) and not deleted(found)
    assert says(found.status, ConditionType.TEACHER_READY)[1] == "NameTaken"
    assert "Deployment job-teacher" in says(found.status, ConditionType.TEACHER_READY)[2]


def test_what_an_earlier_job_of_the_name_left_is_no_strangers() -> None:
    """kubectl delete, apply: nobody has to delete anything, as the garbage collector will in a moment."""
    of = job()
    left = child(rendering.serving(of, SETTINGS)[0], ours=False)
    found = plan_at(of, Status(), Observed(children=(left,), claim=Claim.BOUND))
    words = "the Deployment job-teacher is of an earlier job of this name, and goes with it"
    assert says(found.status, ConditionType.TEACHER_READY) == ("False", "NotReady", words)
    assert (found.effects, found.status.attempts) == ((), 0)


# What is wrong with a role


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"unschedulable": "0/3 nodes", "scheduled": False}, "Unschedulable", "0/3 nodes"),
        ({"waiting_reason": "ImagePullBackOff", "waiting_message": "no such tag"}, "ImagePullFailed", "no such tag"),
        (
            {"waiting_reason": "CrashLoopBackOff", "restarts": 4, "exit_code": 2, "exit_message": "no model"},
            "CrashLooping",
            "no model",
        ),
        ({"waiting_reason": "CrashLoopBackOff", "exit_reason": "OOMKilled"}, "OutOfMemory", "out of memory"),
        (
            {"waiting_reason": "CreateContainerConfigError", "waiting_message": "no secret"},
            "ContainerRefused",
            "no secret",
        ),
        ({}, "NotReady", "0 of 1"),
    ],
)
def test_a_role_says_why_it_is_not_ready(changes: dict[str, Any], reason: str, words: str) -> None:
    of = job()
    observed = Observed(children=serving(of, ready=False), pods=pods(of, **changes), claim=Claim.BOUND)
    for condition in (ConditionType.TEACHER_READY, ConditionType.ROLLOUT_READY):
        said = says(plan_at(of, begun(of), observed).status, condition)
        assert said[:2] == ("False", reason)
        assert words in said[2]


# Ends


def test_a_run_that_a_guard_stopped_is_complete_and_says_which_guard_and_which_step() -> None:
    of = job()
    result = Result(model_path="/output/job/model", step=20, best_step=20, stopped_by="diverges")
    report = ProgressReport(phase=Phase.DONE, progress=Progress(step=37, total_steps=100), result=result)
    done = running(of, children=(*serving(of), trainer(of, outcome=Outcome.COMPLETE, ready=0)), report=report)
    status = plan_at(of, begun(of), done).status
    steps = of.spec.schedule.steps
    words = f"guard diverges ended the run before its {steps} steps; step 20 is exported"
    assert says(status, ConditionType.SUCCEEDED) == ("True", "Completed", words)
    assert status.result == result and status.progress == report.progress


def test_a_complete_trainer_is_success_recorded_before_anything_is_released() -> None:
    of = job()
    done = running(of, children=(*serving(of), trainer(of, outcome=Outcome.COMPLETE, ready=0)))
    first = plan_at(of, begun(of), done)
    assert says(first.status, ConditionType.SUCCEEDED)[:2] == ("True", "Completed")
    assert not deleted(first)
    assert first.status.result is not None and first.status.result.model_path == "/output/job/model"
    second = plan_at(of, first.status, done)
    assert deleted(second) == ["Deployment/job-teacher", "RayCluster/job-rollout"]
    assert second.status == first.status


def test_the_trainers_last_words_are_the_result() -> None:
    of = job()
    report = ProgressReport.model_validate(
        {
            "phase": "Done",
            "preflightPassed": True,
            "progress": {"step": 10, "totalSteps": 10, "percent": 100, "reverseKL": "0.1"},
            "result": {"modelPath": "/output/job/model", "step": 10, "bestStep": 8},
        }
    )
    children = (*serving(of), trainer(of, outcome=Outcome.COMPLETE))
    found = plan_at(of, begun(of), running(of, children=children, report=report)).status
    assert found.result is not None and found.result.best_step == 8
    assert found.progress is not None and found.progress.reverse_kl == "0.1"


@pytest.mark.parametrize(("reason", "summary"), [("PreflightFailed",) * 2, ("ConfigurationError",) * 2])
def test_exit_78_is_never_tried_again(reason: str, summary: str) -> None:
    of = job()
    message = f'{{"reason": "{reason}", "message": "do this", "step": 0}}'
    ended = Pod("x", "x", Role.TRAINER, attempt=1, exit_code=78, exit_message=message)
    observed = running(of, children=(*serving(of), trainer(of, outcome=Outcome.FAILED)), pods=(*pods(of), ended))
    found = plan_at(of, begun(of), observed).status
    assert says(found, ConditionType.SUCCEEDED) == ("False", summary, "do this")
    assert found.restarts == 0 and found.completion_time


def test_exit_78_is_known_from_the_job_when_its_pods_are_gone() -> None:
    of = job()
    words = "Container trainer for pod default/x failed with exit code 78 matching FailJob rule at index 1"
    observed = running(of, children=(*serving(of), trainer(of, outcome=Outcome.FAILED, message=words)))
    assert says(plan_at(of, begun(of), observed).status, ConditionType.SUCCEEDED)[1] == "ConfigurationError"


def test_the_rank_that_failed_first_explains_the_failure() -> None:
    of = job(trainer={"nodes": 3})
    ranks = [
        Pod(f"r{i}", f"r{i}", Role.TRAINER, attempt=1, index=i, exit_code=1, finished_at=EPOCH + timedelta(seconds=s))
        for i, s in enumerate((9, 3, 6))
    ]
    observed = running(of, children=(*serving(of), trainer(of, outcome=Outcome.FAILED)), pods=(*pods(of), *ranks))
    assert "r1 ended with exit code 1" in says(plan_at(of, begun(of), observed).status, ConditionType.TRAINER_READY)[2]


@pytest.mark.parametrize(
    ("changes", "reason"), [({"exit_reason": "OOMKilled"}, "OutOfMemory"), ({"evicted": True}, "Evicted")]
)
def test_a_failure_of_the_machine_is_told_from_one_of_the_program(changes: dict[str, Any], reason: str) -> None:
    of = job()
    ended = Pod("x", "x", Role.TRAINER, **{"attempt": 1, "exit_code": 137, **changes})
    observed = running(of, children=(*serving(of), trainer(of, outcome=Outcome.FAILED)), pods=(*pods(of), ended))
    found = plan_at(of, begun(of), observed).status
    assert says(found, ConditionType.TRAINER_READY)[1] == reason
    assert says(found, ConditionType.SUCCEEDED)[1] == "Restarting"


def failed_once(of: DistillationJob) -> tuple[Status, Observed]:
    observed = running(of, children=(*serving(of), trainer(of, outcome=Outcome.FAILED)))
    return plan_at(of, begun(of), observed).status, observed


def test_a_failed_attempt_is_counted_once_however_often_it_is_seen() -> None:
    status, observed = failed_once(job())
    assert (status.restarts, status.attempts) == (1, 1)
    again = plan_at(job(), status, observed)
    assert again.status.restarts == 1


def test_everything_of_a_failed_attempt_goes_and_the_rest_stays() -> None:
    status, observed = failed_once(job())
    assert deleted(plan_at(job(), status, observed)) == [
        "Job/job-trainer-1",
        "Deployment/job-teacher",
        "RayCluster/job-rollout",
    ]


def test_the_next_attempt_waits_for_its_time_and_for_the_last_one_to_be_gone() -> None:
    status, observed = failed_once(job())
    lasting = replace(observed, children=observed.children[:4], pods=())
    assert plan_at(job(), status, lasting, seconds=5).status.attempts == 1
    assert plan_at(job(), status, replace(lasting, pods=pods(job())), seconds=60).status.attempts == 1
    found = plan_at(job(), status, lasting, seconds=60).status
    assert (found.attempts, found.next_attempt_time, found.restarts) == (2, None, 1)


def test_delays_double_up_to_a_bound_and_are_the_same_for_every_observer() -> None:
    delays = [delay_seconds("uid", n, n) for n in range(1, 9)]
    assert delays == [delay_seconds("uid", n, n) for n in range(1, 9)]
    for n, delay in enumerate(delays):
        least = min(10 * 2**n, 300)
        assert least <= delay <= 1.2 * least
    assert delay_seconds("other", 1, 1) != delays[0]
    assert delay_seconds("uid", 2, 1) != delays[0], "each attempt has a spread of its own"
    assert delay_seconds("uid", 3, 0) <= 12


def test_the_backoff_limit_ends_the_job() -> None:
    of = job(backoffLimit=0)
    status, _ = failed_once(of)
    assert says(status, ConditionType.SUCCEEDED)[:2] == ("False", "BackoffLimitExceeded")


def test_a_finished_job_is_not_started_again_by_anything() -> None:
    of = job(backoffLimit=0)
    status, _ = failed_once(of)
    for other in (of, job(suspend=True), job(output={})):
        found = plan_at(other, status, NOTHING, seconds=100)
        assert found.status == status.model_copy(update={"active": 0}) and not applied(found)


def test_a_finished_job_has_observed_an_edit_of_its_spec() -> None:
    """Argo CD and kstatus take a job for unfinished whose observedGeneration is behind."""
    status, _ = failed_once(job(backoffLimit=0))
    edited = job(backoffLimit=5)
    edited = edited.model_copy(update={"metadata": edited.metadata.model_copy(update={"generation": 2})})
    found = plan_at(edited, status, NOTHING)
    assert (found.status.observed_generation, applied(found)) == (2, [])
    assert says(found.status, ConditionType.SUCCEEDED) == says(status, ConditionType.SUCCEEDED)


def test_a_trainer_that_ended_stays_for_its_log_and_one_that_runs_does_not() -> None:
    of = job(backoffLimit=0)
    status, observed = failed_once(of)
    assert "Job/job-trainer-1" not in deleted(plan_at(of, status, observed))
    assert "Job/job-trainer-1" in deleted(plan_at(of, status, running(of)))


def test_the_active_deadline_does_not_count_suspension() -> None:
    of = job(activeDeadlineSeconds=100)
    status = begun(of).model_copy(update={"suspended_seconds": 50})
    assert says(plan_at(of, status, running(of), seconds=149).status, ConditionType.SUCCEEDED)[1] == "Running"
    late = plan_at(of, status, running(of), seconds=150)
    assert says(late.status, ConditionType.SUCCEEDED)[:2] == ("False", "DeadlineExceeded")


def test_the_deadline_is_looked_at_when_it_comes() -> None:
    of = job(activeDeadlineSeconds=100)
    assert plan_at(of, begun(of), running(of), seconds=40).requeue_after == 60


def test_an_attempt_that_is_not_ready_in_time_gives_its_nodes_back() -> None:
    of = job(preRunningDeadlineSeconds=30, backoffLimit=1)
    observed = Observed(children=serving(of, ready=False), pods=pods(of), claim=Claim.BOUND)
    late = plan_at(of, begun(of), observed, seconds=31).status
    assert (late.restarts, says(late, ConditionType.SUCCEEDED)[1]) == (1, "Restarting")
    last = plan_at(of, begun(of).model_copy(update={"restarts": 1}), observed, seconds=31).status
    assert says(last, ConditionType.SUCCEEDED)[:2] == ("False", "PreRunningDeadlineExceeded")


def test_an_attempt_for_which_there_is_no_room_gives_its_nodes_back_and_is_tried_again_uncounted() -> None:
    of = job(backoffLimit=0)
    homeless = tuple(
        replace(p, scheduled=False, unschedulable="0/1 nodes") if p.role is Role.ROLLOUT else p for p in pods(of)
    )
    observed = Observed(children=serving(of, ready=False), pods=homeless, claim=Claim.BOUND)
    waiting = plan_at(of, begun(of), observed, seconds=1799)
    assert says(waiting.status, ConditionType.ROLLOUT_READY)[1] == "Unschedulable"
    assert (waiting.status.next_attempt_time, waiting.requeue_after) == (None, 1)
    late = plan_at(of, begun(of), observed, seconds=1800).status
    assert late.next_attempt_time is not None and late.restarts == 0
    state, reason, message = says(late, ConditionType.SUCCEEDED)
    assert (state, reason) == ("Unknown", "Restarting") and "found no node for 1800 s" in message


def test_an_attempt_whose_pods_all_have_a_node_may_take_as_long_as_it_wants_to_start() -> None:
    observed = Observed(children=serving(job(), ready=False), pods=pods(job()), claim=Claim.BOUND)
    assert plan_at(job(), begun(job()), observed, seconds=100_000).status.next_attempt_time is None


def test_the_deadline_before_running_is_over_once_the_attempt_ran() -> None:
    of = job(preRunningDeadlineSeconds=30)
    status = plan_at(of, begun(of), running(of), seconds=10).status
    lost = running(of, children=(*serving(of, ready=False), trainer(of)))
    assert plan_at(of, status, lost, seconds=1000).status.restarts == 0


def test_the_job_is_deleted_after_its_ttl_by_uid() -> None:
    of = job(backoffLimit=0, ttlSecondsAfterFinished=60)
    status, _ = failed_once(of)
    assert plan_at(of, status, NOTHING, seconds=59).requeue_after == pytest.approx(1)
    found = plan_at(of, status, NOTHING, seconds=60)
    assert found.effects == (Delete(Kind.DISTILLATION_JOB, "job", of.metadata.uid),)


# Suspension


def test_suspension_is_recorded_first_and_then_releases_every_pod() -> None:
    of = job(suspend=True)
    first = plan_at(of, begun(job()), running(of))
    assert not deleted(first)
    assert says(first.status, ConditionType.SUSPENDED)[:2] == ("False", "Suspending")
    second = plan_at(of, first.status, running(of))
    assert deleted(second) == ["Job/job-trainer-1", "Deployment/job-teacher", "RayCluster/job-rollout"]
    assert says(second.status, ConditionType.SUCCEEDED)[:2] == ("Unknown", "Suspended")


def test_resuming_begins_the_next_attempt_and_counts_no_restart() -> None:
    of = job(suspend=True)
    status = plan_at(of, plan_at(of, begun(job()), running(of)).status, NOTHING).status
    resumed = plan_at(job(), status, NOTHING, seconds=70).status
    assert resumed.suspended_seconds == 70
    found = plan_at(job(), resumed, NOTHING, seconds=70).status
    assert (found.attempts, found.restarts, found.suspended_seconds) == (2, 0, 70)


def test_a_job_that_is_born_suspended_makes_nothing_and_its_first_attempt_is_the_first() -> None:
    status = plan_at(job(suspend=True), Status(), NOTHING).status
    assert not applied(plan_at(job(suspend=True), status, NOTHING))
    resumed = plan_at(job(), status, NOTHING, seconds=9).status
    assert (resumed.attempts, resumed.suspended_seconds) == (0, 0)
    assert plan_at(job(), resumed, NOTHING, seconds=9).status.attempts == 1


# What the trainer says


def test_no_step_for_long_is_stalled_and_a_step_ends_it() -> None:
    of = job(stallTimeoutSeconds=100)
    status = begun(of)
    stalled = plan_at(of, status, running(of), seconds=100)
    assert says(stalled.status, ConditionType.STALLED)[:2] == ("True", "NoStep")
    step = {"step": 1, "lastStepTime": "2026-01-01T00:01:40Z"}
    report = ProgressReport.model_validate({"phase": "Training", "progress": step})
    found = plan_at(of, stalled.status, running(of, report=report), seconds=101)
    assert says(found.status, ConditionType.STALLED)[0] == "False"


def test_a_stalled_attempt_is_ended_once_its_stacks_are_written_unless_it_is_only_reported() -> None:
    of, reported = job(stallTimeoutSeconds=100), job(stallTimeoutSeconds=100, stallPolicy="Report")
    status = begun(of)
    stalled = plan_at(of, status, running(of), seconds=100)
    assert stalled.requeue_after == 60
    waiting = plan_at(of, stalled.status, running(of), seconds=159)
    assert says(waiting.status, ConditionType.SUCCEEDED)[1] == "Running" and waiting.requeue_after == 1
    unasked = plan_at(of, stalled.status, running(of), seconds=9999).status
    assert says(unasked, ConditionType.SUCCEEDED)[1] == "Running", "this process has not asked the trainer yet"
    ended = plan_at(of, stalled.status, running(of, trainer_silent=True), seconds=160).status
    assert says(ended, ConditionType.SUCCEEDED)[1] == "Restarting" and ended.restarts == 1
    assert "stallPolicy: Report" in says(ended, ConditionType.SUCCEEDED)[2]
    assert says(ended, ConditionType.TRAINER_READY)[1] == "NoStep"
    assert says(plan_at(reported, stalled.status, running(of), seconds=9999).status, ConditionType.STALLED)[0] == "True"
    step = {"step": 1, "lastStepTime": "2026-01-01T00:02:39Z"}
    late = ProgressReport.model_validate({"phase": "Training", "progress": step})
    found = plan_at(of, stalled.status, running(of, report=late), seconds=160).status
    assert says(found, ConditionType.SUCCEEDED)[1] == "Running" and says(found, ConditionType.STALLED)[0] == "False"


def test_a_trainer_that_starts_again_does_not_set_the_step_back() -> None:
    of = job()
    status = begun(of).model_copy(update={"progress": Progress(step=481, reverse_kl="0.4", checkpoint_step=480)})
    load = [{"name": "teacher", "requests": 7}]
    starting = {"phase": "Starting", "progress": {"step": 0, "teachers": load}}
    found = plan_at(of, status, running(of, report=ProgressReport.model_validate(starting))).status.progress
    assert found is not None and (found.step, found.reverse_kl, found.teachers[0].requests) == (481, "0.4", 7)
    stepped = {"phase": "Training", "progress": {"step": 100, "lastStepTime": "2026-01-01T00:01:00Z"}}
    after = plan_at(of, status, running(of, report=ProgressReport.model_validate(stepped))).status.progress
    assert after is not None and after.step == 100, "from another checkpoint, and by what it has done itself"


def test_the_summary_names_the_role_that_has_a_problem_and_not_the_first_that_takes_its_time() -> None:
    of = job()
    stuck = Pod("x", "x", Role.TRAINER, attempt=1, waiting_reason="ImagePullBackOff", waiting_message="no such image")
    observed = running(of, children=(*serving(of, ready=False), trainer(of, ready=0)), pods=(*pods(of), stuck))
    status = plan_at(of, begun(of), observed).status
    words = "trainer: x: ImagePullBackOff: no such image"
    assert says(status, ConditionType.READY)[1:] == ("ImagePullFailed", words)
    assert says(status, ConditionType.SUCCEEDED)[2] == f"attempt 1 is starting; {words}"


def test_progress_outlives_the_answer() -> None:
    of = job()
    report = ProgressReport.model_validate({"phase": "Training", "preflightPassed": True, "progress": {"step": 4}})
    status = plan_at(of, begun(of), running(of, report=report)).status
    found = plan_at(of, status, running(of)).status
    assert found.progress is not None and found.progress.step == 4
    assert says(found, ConditionType.PREFLIGHT)[0] == "True"


def test_the_preflights_notes_stand_in_its_condition() -> None:
    """What is unusual and may be meant: the run goes on."""
    of, note = job(), "TeacherIsLarger: the student has 8 parameters and teacher a has 4"
    told = {"phase": "Training", "preflightPassed": True, "notes": [note, "x" * 3000], "progress": {"step": 4}}
    status = plan_at(of, begun(of), running(of, report=ProgressReport.model_validate(told))).status
    state, reason, message = says(status, ConditionType.PREFLIGHT)
    assert (state, reason) == ("True", "Passed") and message.startswith(f"{note}; xxx") and len(message) == 2000


def publications(**second: Any) -> ProgressReport:
    """What a trainer that is done reports of both places."""
    first = {"to": "hf://team/sums", "step": 10, "done": True, "message": "commit 1a2b3c"}
    told = [first, {"to": "s3://models/sums", "step": 10, "done": True, "message": "7 files, 2.0 MiB", **second}]
    report = {"phase": "Done", "progress": {"step": 10}, "result": {"modelPath": "/output/job/model", "step": 10}}
    return ProgressReport.model_validate({**report, "publications": told})


def done(of: DistillationJob, report: ProgressReport | None, status: Status | None = None) -> Plan:
    ended = (*serving(of), trainer(of, outcome=Outcome.COMPLETE))
    return plan_at(of, status or begun(of), running(of, children=ended, report=report))


def test_a_published_model_is_said_with_its_places() -> None:
    of = job(output=PUBLISHED)
    assert says(begun(of), ConditionType.PUBLISHED)[:2] == ("Unknown", "Pending")
    found = done(of, publications())
    text = "hf://team/sums: step 10, commit 1a2b3c; s3://models/sums: step 10, 7 files, 2.0 MiB"
    assert says(found.status, ConditionType.PUBLISHED) == ("True", "Published", text)
    assert [e.warning for e in found.effects if isinstance(e, Event) and e.reason == "Published"] == [False]


def test_a_place_that_was_not_reached_fails_the_condition_and_not_the_job() -> None:
    found = done(job(output=PUBLISHED), publications(done=False, message="503 busy"))
    state, reason, message = says(found.status, ConditionType.PUBLISHED)
    assert (state, reason) == ("False", "NotPublished")
    assert message.endswith("s3://models/sums: not published: step 10, 503 busy")
    assert says(found.status, ConditionType.SUCCEEDED)[0] == says(found.status, ConditionType.COMPLETE)[0] == "True"
    assert [e.warning for e in found.effects if isinstance(e, Event) and e.reason == "NotPublished"] == [True]


def test_what_a_poll_has_told_of_the_places_outlives_a_last_report_that_is_lost() -> None:
    of = job(output=PUBLISHED)
    polled = plan_at(of, begun(of), running(of, report=publications())).status
    assert says(done(of, None, polled).status, ConditionType.PUBLISHED)[0] == "True"
    state, _, message = says(done(of, None).status, ConditionType.PUBLISHED)
    assert state == "Unknown" and "published.json in the run folder" in message


def test_a_job_that_publishes_nothing_has_no_condition_of_it() -> None:
    assert conditions.find(done(job(), publications()).status, ConditionType.PUBLISHED) is None


# Recovering


def test_a_lost_status_does_not_use_an_attempts_number_again() -> None:
    of = job()
    observed = running(of, children=(*serving(of), trainer(of, attempt=5)))
    found = plan_at(of, Status(), observed)
    assert found.status.attempts == 5
    assert not applied(found) and not deleted(found)


def test_a_trainer_of_an_earlier_attempt_is_removed() -> None:
    of = job()
    observed = running(of, children=(*serving(of), trainer(of, 1), trainer(of, 2)))
    assert deleted(plan_at(of, begun(of, attempt=2), observed)) == ["Job/job-trainer-1"]


def test_what_was_changed_by_hand_is_written_again() -> None:
    of = job()
    children = list(running(of).children)
    index = next(i for i, c in enumerate(children) if c.kind is Kind.DEPLOYMENT)
    content = {**children[index].content, "spec": {**children[index].content["spec"], "replicas": 9}}
    children[index] = replace(children[index], content=content)
    assert applied(plan_at(of, begun(of), running(of, children=tuple(children)))) == ["Deployment/job-teacher"]


def test_a_trainer_scaled_by_hand_is_put_right_and_one_of_another_version_is_left_alone() -> None:
    of = job(trainer={"nodes": 2})
    made = trainer(of, ready=2)
    scaled = replace(made, content={**made.content, "spec": {**made.content["spec"], "parallelism": 0}})
    for child_, wanted in ((made, []), (scaled, ["Job/job-trainer-1"]), (replace(scaled, fixed_hash="other"), [])):
        assert applied(plan_at(of, begun(of), running(of, children=(*serving(of), child_)))) == wanted


def test_every_reason_of_the_api_that_the_operator_may_give_is_one_of_the_enum() -> None:
    status, _ = failed_once(job())
    assert all(c.reason in {r.value for r in Reason} for c in status.conditions)


def test_an_event_tells_each_turn_once() -> None:
    of = job()
    first = plan_at(of, Status(), NOTHING)
    assert not [e.reason for e in first.effects if isinstance(e, Event)], "when it began stands in the status"
    second = plan_at(of, first.status, running(of))
    assert [e.reason for e in second.effects if isinstance(e, Event)] == ["Running"]
    third = plan_at(of, second.status, running(of))
    assert not third.effects
