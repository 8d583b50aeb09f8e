"""At most one trainer writes a run folder: no attempt begins while a trainer of before may still run."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from operator_fakes import EPOCH, SETTINGS, UID, Json, Simulation, job, manifest
from test_operator_plan import (
    NOTHING,
    applied,
    begun,
    failed_once,
    plan_at,
    pods,
    running,
    says,
    serving,
    trainer,
)

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import ConditionType, Status
from distill_operator.kinds import Kind
from distill_operator.model.observed import Claim, Observed, Outcome, Pod
from distill_operator.model.pod_owners import earlier_trainers, pods_of, servers_of
from distill_operator.model.reading import read_child, read_pod
from distill_operator.resources import rendering
from distill_operator.runtime.effects import Event

GROUP = "distillation-operator.io"
READY, SUMMARY = ConditionType.TRAINER_READY, ConditionType.SUCCEEDED
GOING = Pod("old-0", "old-0", Role.TRAINER, attempt=1, deleting=True, due=EPOCH + timedelta(seconds=120), node="n1")
"""A trainer that writes its last checkpoint."""


def resumed(of: DistillationJob) -> Status:
    """The status of a job that was suspended while it ran, and resumed while pods of it were still there."""
    suspended = plan_at(job(suspend=True), begun(of), running(of)).status
    return plan_at(of, suspended, running(of)).status


# 1. Suspend, resume


def test_a_resumed_job_waits_for_the_trainer_that_still_writes() -> None:
    of = job()
    status = resumed(of)
    found = plan_at(of, status, replace(NOTHING, pods=(GOING,)), seconds=2)
    assert (found.status.attempts, applied(found), found.requeue_after) == (1, [], 10.0)
    assert says(found.status, READY)[:2] == ("False", "EarlierTrainerRuns")
    assert "the trainer waits for the end of old-0" in says(found.status, SUMMARY)[2]
    assert plan_at(of, found.status, NOTHING, seconds=3).status.attempts == 2


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_trainer_has_gone_when_its_pod_has_ended(phase: str) -> None:
    """The pod itself may stay for long: a finalizer of the Job controller, or of a collector of logs, keeps it."""
    pod = read_pod({"metadata": {"name": "x", "labels": {f"{GROUP}/role": "trainer"}}, "status": {"phase": phase}})
    assert pod is not None and pod.ended
    assert plan_at(job(), resumed(job()), replace(NOTHING, pods=(pod,)), seconds=2).status.attempts == 2


def test_a_teacher_that_still_ends_holds_up_nothing() -> None:
    ending = Pod("t", "t", Role.TEACHER, deleting=True)
    assert plan_at(job(), resumed(job()), replace(NOTHING, pods=(ending,)), seconds=2).status.attempts == 2


# 2. The other ranks of a failed attempt


def test_the_next_attempt_waits_for_the_other_ranks_longer_than_its_delay() -> None:
    status, observed = failed_once(job())
    left = replace(observed, children=observed.children[:4], pods=(GOING,))
    found = plan_at(job(), status, left, seconds=100)
    assert (found.status.attempts, says(found.status, READY)[1]) == (1, "EarlierTrainerRuns")
    gone = replace(left, pods=(replace(GOING, ended=True),))
    assert plan_at(job(), found.status, gone, seconds=101).status.attempts == 2


# 3. Delete, apply


def test_the_first_attempt_waits_for_the_trainer_of_an_earlier_job_of_its_name() -> None:
    found = plan_at(job(), Status(), replace(NOTHING, earlier_trainers=(GOING,)))
    assert (found.status.attempts, [e for e in found.effects if not isinstance(e, Event)]) == (0, [])
    assert says(found.status, SUMMARY)[:2] == ("Unknown", "Pending")
    assert says(found.status, READY)[1] == "EarlierTrainerRuns"
    assert plan_at(job(), found.status, NOTHING, seconds=9).status.attempts == 1


def test_the_first_attempt_waits_for_a_job_that_may_still_make_a_trainer() -> None:
    """The garbage collector comes seconds after the deletion; of an orphan it never comes."""
    old = trainer(job(), 4, ours=False, content={})
    found = plan_at(job(), Status(), replace(NOTHING, children=(old,)))
    assert (found.status.attempts, says(found.status, READY)[1]) == (0, "EarlierTrainerRuns")
    assert "the Job job-trainer-4 is of an earlier job of this name" in says(found.status, SUMMARY)[2]
    ended = replace(old, outcome=Outcome.FAILED)
    assert plan_at(job(), found.status, replace(NOTHING, children=(ended,))).status.attempts == 1


def test_a_trainer_is_not_made_beside_another_though_its_attempt_has_begun() -> None:
    of = job()
    observed = Observed(children=serving(of), pods=pods(of), claim=Claim.BOUND)
    found = plan_at(of, begun(of), replace(observed, earlier_trainers=(GOING,)))
    assert applied(found) == []
    assert says(found.status, READY)[1] == "EarlierTrainerRuns"
    assert applied(plan_at(of, found.status, observed)) == ["Job/job-trainer-1"]


async def test_a_job_that_is_applied_again_at_once_reports_itself_and_makes_no_second_trainer() -> None:
    sim = Simulation()
    await sim.run_until_quiet(seconds=60)
    old = sim.cluster.objects[Kind.POD, "job-trainer-1-0"]
    sim.cluster.remove(Kind.DISTILLATION_JOB, "job")
    sim.play()
    left = {**old["metadata"], "name": "old-trainer", "uid": "uid-of-old-trainer"}
    sim.cluster.put(Kind.POD, "old-trainer", {**old, "metadata": left})
    again = manifest()
    again["metadata"]["uid"] = UID.replace("1", "2")
    sim.cluster.put(Kind.DISTILLATION_JOB, "job", again)
    for _ in range(5):
        await sim.reconcile()
        sim.play(collect=False)
    assert sim.cluster.of(Kind.JOB) == sim.cluster.of(Kind.DEPLOYMENT) == {}
    assert sim.condition("TrainerReady")[1] == "EarlierTrainerRuns"
    assert sim.job_status.get("active", 0) == 0, "the pods of another job are not its own"
    sim.cluster.remove(Kind.POD, "old-trainer")
    await sim.run_until_quiet(seconds=60)
    assert (sim.condition("Succeeded")[1], sim.job_status["active"]) == ("Running", 4)


# 4. A node that nobody hears of


@pytest.mark.parametrize("between", [True, False], ids=["between attempts", "before the first"])
def test_a_pod_on_a_lost_node_is_named_with_what_to_do(between: bool) -> None:
    status = resumed(job()) if between else Status()
    where: dict[str, Any] = {"pods": (GOING,)} if between else {"earlier_trainers": (GOING,)}
    observed = replace(NOTHING, **where)
    assert says(plan_at(job(), status, observed, seconds=179).status, READY)[1] == "EarlierTrainerRuns"
    found = plan_at(job(), status, observed, seconds=181)
    assert found.status.attempts == status.attempts
    words = (
        "old-0 should have ended by 2026-01-01T00:02:00Z, and its node n1 does not confirm it: it may still run. "
        "The job goes on when the node is back. If it is gone, make sure that it is off, then: "
        "kubectl delete pod old-0 -n default --force"
    )
    assert says(found.status, READY) == ("False", "PodLost", words)
    assert ("PodLost", True) in [(e.reason, e.warning) for e in found.effects if isinstance(e, Event)]
    assert plan_at(job(), found.status, observed, seconds=500).status == found.status, "nothing is written meanwhile"
    assert plan_at(job(), found.status, NOTHING, seconds=501).status.attempts == status.attempts + 1


# A deleted trainer Job


def test_an_attempt_whose_trainer_job_is_deleted_has_failed() -> None:
    of = job()
    status = plan_at(of, begun(of), running(of)).status
    assert status.trainer_job_uid == "uid-of-job-trainer-1"
    gone = Observed(children=serving(of), pods=(*pods(of), GOING), claim=Claim.BOUND)
    found = plan_at(of, status, gone)
    assert applied(found) == []
    assert says(found.status, SUMMARY)[1] == "Restarting"
    assert says(found.status, READY) == ("False", "TrainerFailed", "the Job job-trainer-1 was deleted")
    assert found.status.restarts == 1
    later = plan_at(of, found.status, replace(NOTHING, pods=(GOING,)), seconds=60)
    assert later.status.attempts == 1, "its pods still write"
    last = plan_at(of, later.status, NOTHING, seconds=90).status
    assert (last.attempts, last.trainer_job_uid) == (2, None)


def test_a_trainer_job_that_was_deleted_before_its_uid_was_recorded_is_known_by_its_pods() -> None:
    of = job()
    gone = Observed(children=serving(of), pods=(*pods(of), GOING), claim=Claim.BOUND)
    found = plan_at(of, begun(of), gone)
    assert (applied(found), found.status.restarts) == ([], 1)


@pytest.mark.parametrize("changes", [{"deleting": True}, {"uid": "another"}])
def test_a_trainer_job_that_is_going_or_was_made_by_somebody_else_ends_the_attempt(changes: dict[str, Any]) -> None:
    of = job()
    status = plan_at(of, begun(of), running(of)).status
    observed = running(of, children=(*serving(of), trainer(of, **changes)))
    assert plan_at(of, status, observed).status.restarts == 1


def test_a_trainer_that_its_job_left_behind_is_waited_for_and_named() -> None:
    """kubectl delete job --cascade=orphan."""
    orphan = replace(GOING, deleting=False, due=None)
    status, _ = failed_once(job())
    found = plan_at(job(), status, replace(NOTHING, pods=(orphan,)), seconds=600)
    assert found.status.attempts == 1
    assert "if nothing ends it: kubectl delete pod old-0 -n default" in says(found.status, SUMMARY)[2]


async def test_a_job_that_memory_alone_lacks_ends_no_attempt() -> None:
    sim = Simulation()
    await sim.run_until_quiet(seconds=60)
    uid = sim.job_status["trainerJobUid"]
    sim.cache.store.remove(Kind.JOB, "default", "job-trainer-1", uid)
    await sim.reconcile()
    assert (sim.condition("Succeeded")[1], sim.job_status.get("restarts", 0)) == ("Running", 0)


async def test_a_deleted_trainer_job_costs_one_attempt_and_none_is_made_twice() -> None:
    sim = Simulation()
    await sim.run_until_quiet(seconds=60)
    sim.cluster.remove(Kind.JOB, "job-trainer-1")
    await sim.run_until_quiet(seconds=120)
    assert (sim.condition("Succeeded")[1], sim.job_status["attempts"], sim.job_status["restarts"]) == ("Running", 2, 1)
    assert all(len(uids) == 1 for uids in sim.trainer_jobs.values())


# Suspended says the truth


def test_a_job_is_suspended_when_none_of_its_pods_is_left() -> None:
    of = job(suspend=True)
    observed = replace(NOTHING, pods=(GOING,))
    first = plan_at(of, begun(job()), running(of)).status
    assert (says(first, ConditionType.SUSPENDED)[:2], first.active) == (("False", "Suspending"), 3)
    second = plan_at(of, first, observed)
    assert (says(second.status, ConditionType.SUSPENDED)[:2], second.status.active) == (("False", "Suspending"), 1)
    late = plan_at(of, second.status, observed, seconds=200).status
    assert "kubectl delete pod old-0 -n default --force" in says(late, ConditionType.SUSPENDED)[2]
    third = plan_at(of, second.status, NOTHING, seconds=120).status
    assert (says(third, ConditionType.SUSPENDED)[:2], third.active) == (("True", "Suspended"), 0)


def test_a_job_without_pods_is_suspended_at_once() -> None:
    assert says(plan_at(job(suspend=True), Status(), NOTHING).status, ConditionType.SUSPENDED)[0] == "True"


def test_a_resumed_job_no_longer_says_that_it_is_suspended() -> None:
    status = resumed(job())
    for condition in (READY, ConditionType.TEACHER_READY, ConditionType.READY):
        assert says(status, condition) == ("False", "NotReady", "resumed: it starts with the next attempt")


def test_an_engine_that_was_evicted_holds_no_node() -> None:
    of = job()
    some = tuple(replace(p, ended=p.name == "e0") for p in pods(of))
    assert not applied(plan_at(of, begun(of), Observed(children=serving(of), pods=some, claim=Claim.BOUND)))


# Whose a pod is


def raw(name: str, role: str = "trainer", *, owner: Json | None = None, **labels: str) -> Json:
    more = {"distillation-operator.io/owner-uid" if key == "uid" else key: value for key, value in labels.items()}
    meta = {"name": name, "labels": {f"{GROUP}/role": role, f"{GROUP}/job": "job", **more}}
    owners = [{"controller": True, **owner}] if owner else []
    return {"metadata": {**meta, "ownerReferences": owners}, "status": {"phase": "Running"}}


def found(*raws: Json) -> tuple[list[str], list[str]]:
    """The names of the job's own pods, and of trainers of before."""
    made = [*rendering.serving(job(), SETTINGS), rendering.training(job(), SETTINGS, 1)]
    children = [
        read_child({**body, "metadata": {**body["metadata"], "uid": f"{body['kind']}-uid"}}, UID) for body in made
    ]
    own, before = pods_of(raws, UID, children), earlier_trainers(raws, UID, children)
    return [p.name for p in own], [p.name for p in before]


def test_a_pod_belongs_to_the_job_whose_uid_it_carries() -> None:
    assert found(raw("a", uid=UID), raw("b", uid="old"), raw("c", "rollout", uid="old")) == (["a"], ["b"])


def test_a_pod_that_has_two_of_our_labels_and_no_uid_is_nobodys() -> None:
    stranger = {"kind": "ReplicaSet", "name": "mine-5f", "uid": "x"}
    assert found(raw("a"), raw("b", "rollout"), raw("c", "teacher", owner=stranger)) == ([], [])


def test_pods_of_before_an_upgrade_are_known_by_their_controllers() -> None:
    assert found(
        raw("trainer", owner={"kind": "Job", "uid": "Job-uid"}),
        raw("engine", "rollout", owner={"kind": "RayCluster", "uid": "RayCluster-uid"}),
        raw("teacher", "teacher", owner={"kind": "ReplicaSet", "name": "job-teacher-5f7d", "uid": "any"}),
    ) == (["engine", "teacher", "trainer"], [])
    gone = {"batch.kubernetes.io/controller-uid": "gone"}
    before = (raw("b", owner={"kind": "Job", "uid": "gone"}), raw("c", **gone))
    assert found(*before) == ([], ["b", "c"]), "one of a Job that is gone, and one that its Job left behind"


def test_every_pod_carries_the_uid_of_its_owner_and_no_selector_does() -> None:
    label = f"{GROUP}/owner-uid"
    teacher, ray = (body["spec"] for body in rendering.serving(job(), SETTINGS))
    trainer_job = rendering.training(job(), SETTINGS, 1)["spec"]
    templates = [s["template"] for s in (teacher, trainer_job, ray["headGroupSpec"], *ray["workerGroupSpecs"])]
    assert [t["metadata"]["labels"][label] for t in templates] == [UID] * 4
    services = [b["spec"]["selector"] for b in rendering.lasting(job(), SETTINGS) if b["kind"] == "Service"]
    assert all(label not in s for s in (*services, teacher["selector"]["matchLabels"]))


def test_the_servers_of_a_teacher_are_those_of_its_uid_and_of_before() -> None:
    assert [
        p.name for p in servers_of([raw("a", "teacher", uid="t"), raw("b", "teacher"), raw("c", uid="o")], "t")
    ] == [
        "a",
        "b",
    ]


async def test_a_pod_made_by_hand_with_the_labels_of_a_job_holds_up_nothing() -> None:
    sim = Simulation()
    labels = {
        f"{GROUP}/job": "job",
        f"{GROUP}/role": "rollout",
        "app.kubernetes.io/managed-by": "distillation-operator",
    }
    meta = {"labels": labels, "annotations": {"owner": UID}}
    sim.cluster.put(Kind.POD, "mine", {"metadata": meta, "status": {"phase": "Running"}})
    await sim.run_until_quiet(seconds=60)
    sim.edit(suspend=True)
    await sim.run_until_quiet(seconds=60)
    assert sim.condition("Suspended")[0] == "True"
    sim.edit(suspend=False)
    await sim.run_until_quiet(seconds=60)
    assert (sim.condition("Succeeded")[1], sim.job_status["attempts"]) == ("Running", 2)
