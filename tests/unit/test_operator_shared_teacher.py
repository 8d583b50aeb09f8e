"""A Teacher: what is made for it, how many servers, and what its status says."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from operator_fakes import SETTINGS, Json

from distill_api import names
from distill_api.job import InvalidManifest
from distill_api.names import Role
from distill_api.status import ConditionType
from distill_api.teacher.kind import Teacher, TeacherStatus, parse_teacher
from distill_operator.kinds import Kind, kind_of
from distill_operator.model.observed import Child, Observed, ObservedTeacher, Pod
from distill_operator.resources import teacher_servers
from distill_operator.runtime.effects import Apply, CreateSecret, Event
from distill_operator.teacher.plan import TeacherPlan, plan_teacher
from distill_operator.teacher.view import NEVER_SERVES, view

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCALED = {"minReplicas": 1, "maxReplicas": 8, "targetRequests": 10, "scaleDownSeconds": 300}


def teacher(**spec: Any) -> Teacher:
    return parse_teacher(
        {
            "apiVersion": "distillation-operator.io/v1alpha1",
            "kind": "Teacher",
            "metadata": {"name": "poet", "namespace": "lab", "uid": "u-1", "generation": 3},
            "spec": {"model": "/models/poet", "accelerator": "none", **spec},
        }
    )


def seen(of: Teacher, replicas: int, ready: int = 0, **changed: Any) -> Observed:
    """As after everything was applied."""
    children = [
        Child(
            kind=kind_of(body),
            name=body["metadata"]["name"],
            uid=body["kind"],
            ours=True,
            spec_hash=body["metadata"]["annotations"][names.ANNOTATION_SPEC_HASH],
            content=body,
            ready=ready,
        )
        for body in teacher_servers.children(of, SETTINGS, replicas)
    ]
    return replace(Observed(children=tuple(children)), **changed)


def planned(
    of: Teacher, observed: Observed, requests: tuple[int, ...] = (), status: TeacherStatus | None = None
) -> TeacherPlan:
    return plan_teacher(of, status or TeacherStatus(), observed, requests, SETTINGS, NOW)


def applied(found: TeacherPlan) -> list[Json]:
    return [dict(e.body) for e in found.effects if isinstance(e, Apply)]


def events(found: TeacherPlan) -> list[Event]:
    return [e for e in found.effects if isinstance(e, Event)]


def message_of(found: TeacherPlan) -> str:
    return next(c.message for c in found.status.conditions if c.type == ConditionType.READY)


def ready_of(found: TeacherPlan) -> tuple[str, str]:
    [condition] = [c for c in found.status.conditions if c.type == ConditionType.READY]
    return condition.status.value, condition.reason


def test_its_servers_and_what_they_need_are_made_and_the_key_comes_first() -> None:
    found = planned(teacher(replicas=2), Observed())
    assert isinstance(found.effects[0], CreateSecret)
    made = {body["kind"]: body for body in applied(found)}
    assert list(made) == ["ConfigMap", "NetworkPolicy", "Service", "Deployment"]
    assert {body["metadata"]["name"] for body in made.values()} == {"poet-scoring"}
    assert made["Deployment"]["spec"]["replicas"] == 2
    assert found.status.address == "poet-scoring.lab:30000"
    assert ready_of(found) == ("False", "NotReady")


def test_a_job_of_the_same_name_has_none_of_its_labels() -> None:
    for body in teacher_servers.children(teacher(), SETTINGS, 1):
        assert names.LABEL_JOB not in body["metadata"]["labels"]
        assert body["metadata"]["labels"][names.LABEL_SHARED_TEACHER] == "poet"
        [owner] = body["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("Teacher", "u-1", True)


def test_only_trainers_reach_its_servers() -> None:
    [policy] = [b for b in teacher_servers.children(teacher(), SETTINGS, 1) if b["kind"] == "NetworkPolicy"]
    [rule] = policy["spec"]["ingress"]
    [source] = rule["from"]
    assert source["podSelector"]["matchLabels"][names.LABEL_ROLE] == Role.TRAINER.value
    assert rule["ports"] == [{"protocol": "TCP", "port": 30000}]


def test_nothing_is_written_when_all_is_as_it_should_be() -> None:
    of = teacher(replicas=2)
    found = planned(of, seen(of, 2, ready=2))
    assert applied(found) == []
    assert ready_of(found) == ("True", "Ready")
    assert (found.status.ready_replicas, found.status.desired_replicas) == (2, 2)
    again = plan_teacher(of, found.status, seen(of, 2, ready=2), (), SETTINGS, NOW + timedelta(hours=1))
    assert (again.effects, again.status) == ((), found.status)


def test_a_teacher_that_is_scaled_to_zero_holds_nothing_and_says_so_without_a_warning() -> None:
    of = teacher(replicas=0)
    before = planned(teacher(), seen(teacher(), 1, ready=1)).status
    found = planned(of, seen(teacher(), 1, ready=1), status=before)
    [deployment] = [body for body in applied(found) if body["kind"] == "Deployment"]
    assert deployment["spec"]["replicas"] == 0
    assert ready_of(found) == ("False", "ScaledToZero")
    assert [(e.reason, e.warning) for e in events(found)] == [("ScaledToZero", False)]
    assert view("poet", ObservedTeacher("poet", status=found.status)).condition.reason in NEVER_SERVES


def test_the_pods_that_count_are_those_that_the_selector_finds_and_that_run() -> None:
    of = teacher(replicas=3)
    names_of = ("runs", "ended", "deleting")
    pods = tuple(Pod(n, n, Role.TEACHER, ended=n == "ended", deleting=n == "deleting") for n in names_of)
    found = planned(of, seen(of, 3, pods=pods))
    assert found.status.replicas == 1
    [made] = [b for b in teacher_servers.children(of, SETTINGS, 3) if b["kind"] == "Deployment"]
    labels = made["spec"]["template"]["metadata"]["labels"]
    wanted = dict(part.split("=") for part in str(found.status.selector).split(","))
    assert wanted == made["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= labels.items()


def test_what_somebody_changed_is_put_right() -> None:
    of = teacher()
    observed = seen(of, 3)
    assert [body["kind"] for body in applied(planned(of, observed))] == ["Deployment"]


def test_a_strangers_object_is_left_alone_and_named() -> None:
    of = teacher()
    strange = tuple(replace(c, ours=False, content={}) if c.kind is Kind.SERVICE else c for c in seen(of, 1).children)
    found = planned(of, Observed(children=strange))
    assert applied(found) == []
    assert [e.reason for e in events(found)] == ["NameTaken"]
    [condition] = [c for c in found.status.conditions if c.type == ConditionType.SPEC_VALID]
    assert condition.reason == "NameTaken"
    assert "Service poet-scoring" in condition.message


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        ({"unschedulable": "0/1 nodes are available"}, "Unschedulable"),
        ({"waiting_reason": "ImagePullBackOff", "waiting_message": "no such image"}, "ImagePullFailed"),
        ({"waiting_reason": "CrashLoopBackOff", "restarts": 4, "exit_code": 1}, "CrashLooping"),
        ({"exit_reason": "OOMKilled", "exit_code": 137}, "OutOfMemory"),
    ],
)
def test_a_server_that_cannot_start_says_why_as_a_jobs_own_does_and_an_event_warns_of_it(
    pod: Json, reason: str
) -> None:
    of = teacher()
    found = planned(of, seen(of, 1, pods=(Pod("poet-scoring-x", "p", Role.TEACHER, **pod),)))
    assert ready_of(found) == ("False", reason)
    [event] = events(found)
    assert (event.reason, event.warning, event.message) == (reason, True, message_of(found))
    assert events(planned(of, seen(of, 1, pods=(Pod("x", "p", Role.TEACHER, **pod),)), status=found.status)) == []


def test_pods_that_a_quota_forbids_are_named_so() -> None:
    of = teacher()
    words = 'pods "poet-scoring-x" is forbidden: exceeded quota: gpus'
    observed = seen(of, 1)
    children = tuple(replace(c, message=words if c.kind is Kind.DEPLOYMENT else "") for c in observed.children)
    found = planned(of, replace(observed, children=children))
    assert ready_of(found) == ("False", "QuotaExceeded")
    assert message_of(found) == f"Deployment poet-scoring: {words}"


def test_one_server_that_answers_is_enough_and_what_keeps_the_others_is_said_all_the_same() -> None:
    of = teacher(replicas=3)
    pod = Pod("poet-scoring-x", "p", Role.TEACHER, unschedulable="0/1 nodes are available")
    found = planned(of, seen(of, 3, ready=1, pods=(pod,)))
    assert ready_of(found) == ("True", "Ready")
    assert message_of(found) == "1 of 3 servers answer; poet-scoring-x: 0/1 nodes are available"


def test_events_tell_when_it_answers_and_when_it_no_longer_does_and_nothing_between() -> None:
    of = teacher()
    begun = planned(of, seen(of, 1))
    assert events(begun) == [], "no server yet is how each begins"
    up = planned(of, seen(of, 1, ready=1), status=begun.status)
    assert [(e.reason, e.warning) for e in events(up)] == [("Ready", False)]
    down = planned(of, seen(of, 1), status=up.status)
    assert [(e.reason, e.warning, e.message) for e in events(down)] == [("NotReady", True, "0 of 1 servers answer")]
    assert events(planned(of, seen(of, 1), status=down.status)) == []


def test_a_policy_that_comes_to_forbid_it_leaves_what_serves_alone_and_still_looks_whether_it_does() -> None:
    of = teacher(trustRemoteCode=True)
    serving = planned(of, seen(of, 1, ready=1))
    assert applied(serving) == []
    assert (ready_of(serving), serving.status.ready_replicas) == (("True", "Ready"), 1)
    gone = planned(of, seen(of, 1), status=serving.status)
    assert (ready_of(gone), gone.status.ready_replicas) == (("False", "InvalidSpec"), 0)


def test_a_new_operator_replaces_a_server_only_once_its_successor_answers() -> None:
    [deployment] = [b for b in teacher_servers.children(teacher(), SETTINGS, 2) if b["kind"] == "Deployment"]
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
    }
    of = teacher()
    newer = replace(SETTINGS, workers_image="registry.test/workers:2")
    found = plan_teacher(of, TeacherStatus(), seen(of, 1, ready=1), (), newer, NOW)
    assert [body["kind"] for body in applied(found)] == ["Deployment"]
    assert ready_of(found) == ("True", "Ready")


def test_the_requests_of_all_its_jobs_add_servers_at_once() -> None:
    of = teacher(autoscaling=SCALED)
    found = planned(of, seen(of, 1, ready=1), (18, 23))
    assert found.status.desired_replicas == 5
    assert (found.status.jobs, found.status.requests) == (2, 41)
    [body] = applied(found)
    assert body["spec"]["replicas"] == 5


def test_each_decision_to_scale_is_an_event_that_says_why() -> None:
    of = teacher(autoscaling=SCALED)
    first = planned(of, seen(of, 1))
    assert (first.scaled, events(first)) == (0, []), "how it begins is no decision"
    more = planned(of, seen(of, 1), (18, 23), first.status)
    assert [e.message for e in events(more)] == [
        "5 servers instead of 1, of 1 to 8: 41 requests of 2 jobs, 10 for each server"
    ]
    quiet = planned(of, seen(of, 5), (2,), more.status)
    fewer = plan_teacher(of, quiet.status, seen(of, 5), (2,), SETTINGS, NOW + timedelta(seconds=300))
    assert [(e.reason, e.message) for e in events(fewer)] == [
        ("Scaled", "1 server instead of 5, of 1 to 8: fewer were enough for 300 s")
    ]
    assert (more.scaled, quiet.scaled, fewer.scaled) == (4, 0, -4)


def test_what_is_remembered_of_a_quiet_time_survives_in_the_status() -> None:
    of = teacher(autoscaling=SCALED)
    status = TeacherStatus(desired_replicas=5)
    quiet = planned(of, seen(of, 5, ready=5), (12,), status)
    assert quiet.status.desired_replicas == 5
    assert quiet.requeue_after == 300
    later = plan_teacher(of, quiet.status, seen(of, 5, ready=5), (12,), SETTINGS, NOW + timedelta(seconds=300))
    assert later.status.desired_replicas == 2
    assert later.status.low_since is None


def test_code_of_a_model_repository_is_refused_by_policy() -> None:
    found = planned(teacher(trustRemoteCode=True), Observed())
    assert applied(found) == []
    assert [e.reason for e in events(found)] == ["InvalidSpec"]
    assert ready_of(found) == ("False", "InvalidSpec")


def test_a_teacher_that_is_refused_tells_its_autoscaler_how_many_pods_it_has() -> None:
    status = TeacherStatus(replicas=3, ready_replicas=3)
    pods = tuple(Pod(name=f"p{n}", uid=f"p{n}", role=Role.TEACHER, ended=n == 2) for n in range(3))
    found = planned(teacher(trustRemoteCode=True), Observed(pods=pods), status=status)
    assert found.status.replicas == 2
    assert found.status.selector == planned(teacher(), Observed()).status.selector != ""


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas must not exceed maxReplicas"),
        ({"autoscaling": {"maxReplicas": 4}, "replicas": 2}, "replicas is what autoscaling decides"),
        ({"modell": "/x"}, "did you mean model"),
    ],
)
def test_a_wrong_teacher_is_told_in_a_sentence(spec: Json, said: str) -> None:
    with pytest.raises(InvalidManifest, match=said):
        teacher(**spec)
