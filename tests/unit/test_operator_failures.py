"""What ends an attempt, what it is called, and whether it counts against backoffLimit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from operator_fakes import EPOCH, SETTINGS, FakeCluster, Json, Simulation, job
from test_operator_plan import applied, begun, plan_at, pods, running, says, serving, trainer

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.protocol import ProgressReport
from distill_api.status import ConditionType
from distill_operator.kinds import Kind
from distill_operator.model.observed import Claim, Observed, Outcome, Pod
from distill_operator.model.reading import read_child, read_pod
from distill_operator.resources import rendering
from distill_operator.runtime.effects import Event
from distill_operator.runtime.errors import NamespaceEnding, QuotaExceeded

LATER = EPOCH + timedelta(seconds=5)


def ended(reason: str, **changes: Any) -> Pod:
    message = json.dumps({"reason": reason, "message": "said so", "step": 3})
    return Pod("x", "x", Role.TRAINER, **{"attempt": 1, "exit_code": 75, "exit_message": message, **changes})


def taken(role: Role, **changes: Any) -> Pod:
    why = "Preempted in order to admit critical pod"
    fields = {"attempt": 1, "evicted": True, "disrupted_at": LATER, "eviction_message": why, "deleting": True}
    return Pod("gone", "gone", role, **{**fields, **changes})


def failed(of: DistillationJob, *more: Pod) -> Observed:
    return running(of, children=(*serving(of), trainer(of, outcome=Outcome.FAILED)), pods=(*pods(of), *more))


# What it is called


@pytest.mark.parametrize("reason", ["TeacherUnreachable", "EnginesLost", "VolumeFull"])
def test_an_outage_that_ends_an_attempt_is_called_by_its_name(reason: str) -> None:
    found = plan_at(job(), begun(job()), failed(job(), ended(reason)))
    assert says(found.status, ConditionType.TRAINER_READY) == ("False", reason, "said so")
    assert says(found.status, ConditionType.SUCCEEDED)[1] == "Restarting"
    assert found.status.restarts == 1
    assert reason in [e.reason for e in found.effects if isinstance(e, Event)]


def test_the_name_of_the_last_outage_stands_beside_the_limit_that_ended_the_job() -> None:
    of = job(backoffLimit=0)
    status = plan_at(of, begun(of), failed(of, ended("EnginesLost"))).status
    assert says(status, ConditionType.SUCCEEDED)[:2] == ("False", "BackoffLimitExceeded")
    assert says(status, ConditionType.TRAINER_READY)[1] == "EnginesLost"


def test_the_container_that_keeps_crashing_explains_its_pod() -> None:
    """KubeRay and webhooks add containers: an engine's pod may fail by one that is not ours."""
    ours = {"name": "engine", "state": {"waiting": {"reason": "PodInitializing"}}}
    last = {"terminated": {"exitCode": 3, "message": "no such host", "reason": "Error"}}
    loops = {"name": "wait-gcs-ready", "restartCount": 7, "lastState": last}
    loops |= {"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}}
    labels = {"distillation-operator.io/role": "rollout"}
    status = {"initContainerStatuses": [loops], "containerStatuses": [ours]}
    pod = read_pod({"metadata": {"name": "e0", "labels": labels}, "status": status})
    assert pod is not None
    of = job()
    observed = Observed(children=serving(of, ready=False), pods=(pod,), claim=Claim.BOUND)
    text = "e0 ended 7 times, the last time with exit code 3: no such host"
    assert says(plan_at(of, begun(of), observed).status, ConditionType.ROLLOUT_READY) == (
        "False",
        "CrashLooping",
        text,
    )


# What counts


@pytest.mark.parametrize(
    ("role", "reason", "called"),
    [
        (Role.TRAINER, "InternalError", "Evicted"),
        (Role.TEACHER, "TeacherUnreachable", "TeacherUnreachable"),
        (Role.ROLLOUT, "EnginesLost", "EnginesLost"),
    ],
)
def test_an_attempt_that_an_eviction_ended_does_not_count(role: Role, reason: str, called: str) -> None:
    of = job(backoffLimit=0)
    status = plan_at(of, begun(of), failed(of, taken(role), ended(reason))).status
    summary = says(status, ConditionType.SUCCEEDED)
    assert summary[:2] == ("Unknown", "Restarting")
    assert "(not counted, as the cluster took a pod away): gone was taken away: Preempted in order" in summary[2]
    assert says(status, ConditionType.TRAINER_READY)[1] == called
    assert (status.restarts, status.next_attempt_time is not None) == (0, True)


def test_an_eviction_is_remembered_after_its_pod_is_gone() -> None:
    of = job(backoffLimit=0)
    seen = plan_at(of, begun(of), running(of, pods=(*pods(of), taken(Role.TEACHER))), seconds=6).status
    status = plan_at(of, seen, failed(of, ended("TeacherUnreachable")), seconds=600).status
    assert says(status, ConditionType.SUCCEEDED)[1] == "Restarting"
    assert all(r.disruption is None for r in status.roles), "the next attempt begins with a clean sheet"


def test_an_eviction_that_the_training_got_over_excuses_nothing() -> None:
    of = job(backoffLimit=0)
    seen = plan_at(of, begun(of), running(of, pods=(*pods(of), taken(Role.TEACHER))), seconds=6).status
    step = {"step": 4, "lastStepTime": "2026-01-01T00:05:00Z"}
    report = ProgressReport.model_validate({"phase": "Training", "progress": step})
    for _ in range(2):
        seen = plan_at(of, seen, running(of, report=report), seconds=301).status
    assert all(r.disruption is None for r in seen.roles)
    status = plan_at(of, seen, failed(of, ended("TeacherUnreachable")), seconds=600).status
    assert says(status, ConditionType.SUCCEEDED)[:2] == ("False", "BackoffLimitExceeded")


def test_an_eviction_of_an_engine_does_not_excuse_a_lost_teacher() -> None:
    of = job(backoffLimit=0)
    status = plan_at(of, begun(of), failed(of, taken(Role.ROLLOUT), ended("TeacherUnreachable"))).status
    assert says(status, ConditionType.SUCCEEDED)[:2] == ("False", "BackoffLimitExceeded")


def test_a_pod_evicted_for_what_it_did_itself_counts() -> None:
    """As for a disk of its own that it filled: the kubelet sets no DisruptionTarget then."""
    of = job(backoffLimit=0)
    words = "Usage of EmptyDir volume tmp exceeds the limit"
    mine = Pod("x", "x", Role.TRAINER, attempt=1, evicted=True, eviction_message=words)
    status = plan_at(of, begun(of), failed(of, mine)).status
    assert says(status, ConditionType.SUCCEEDED)[:2] == ("False", "BackoffLimitExceeded")
    assert says(status, ConditionType.TRAINER_READY)[1:] == ("Evicted", f"x was evicted: {words}")


def test_memory_that_ran_out_counts_whatever_was_evicted_meanwhile() -> None:
    of = job(backoffLimit=0)
    killed = ended("InternalError", exit_reason="OOMKilled", exit_code=137)
    status = plan_at(of, begun(of), failed(of, taken(Role.TRAINER), killed)).status
    assert says(status, ConditionType.TRAINER_READY)[1] == "OutOfMemory"
    assert says(status, ConditionType.SUCCEEDED)[:2] == ("False", "BackoffLimitExceeded")


def test_a_configuration_error_is_final_whatever_was_evicted_meanwhile() -> None:
    wrong = ended("ConfigurationError", exit_code=78)
    status = plan_at(job(), begun(job()), failed(job(), taken(Role.TRAINER), wrong)).status
    assert says(status, ConditionType.SUCCEEDED) == ("False", "ConfigurationError", "said so")


def test_a_preempted_pod_is_told_from_an_evicted_one() -> None:
    labels = {"distillation-operator.io/role": "trainer"}
    meta = {"name": "x", "labels": labels}
    disrupted = {"type": "DisruptionTarget", "status": "True", "message": "preempted by default/y"}
    disrupted |= {"lastTransitionTime": "2026-01-01T00:00:05Z"}
    preempted = read_pod({"metadata": meta, "status": {"conditions": [disrupted]}})
    evicted = read_pod({"metadata": meta, "status": {"reason": "Evicted", "message": "disk"}})
    assert preempted is not None and evicted is not None
    assert (preempted.evicted, preempted.disrupted_at, preempted.eviction_message) == (
        True,
        LATER,
        "preempted by default/y",
    )
    assert (evicted.evicted, evicted.disrupted_at, evicted.eviction_message) == (True, None, "disk")


KUBELET = (
    "The node was low on resource: memory. Threshold quantity: 100Mi, available: 8Ki. Container trainer was using "
    "9Gi, request is 1Gi, has larger consumption of memory. "
)


def evicted_by_kubelet(message: str) -> Pod:
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": message}
    disrupted |= {"lastTransitionTime": "2026-01-01T00:00:05Z"}
    meta = {
        "name": "x",
        "labels": {"distillation-operator.io/role": "trainer", "distillation-operator.io/attempt": "1"},
    }
    pod = read_pod({"metadata": meta, "status": {"phase": "Failed", "reason": "Evicted", "conditions": [disrupted]}})
    assert pod is not None
    return pod


def test_a_trainer_that_took_a_nodes_memory_ends_its_attempt_though_its_job_goes_on() -> None:
    """The Job ignores evictions: it would make one pod after the other, and each would evict its neighbours."""
    of = job(backoffLimit=1)
    mine = evicted_by_kubelet(KUBELET)
    status = plan_at(of, begun(of), running(of, pods=(*pods(of), mine))).status
    assert (status.restarts, says(status, ConditionType.SUCCEEDED)[1]) == (1, "Restarting")
    words = f"x was evicted: {KUBELET.strip()}; raise resources.requests in trainer.template"
    assert says(status, ConditionType.TRAINER_READY)[1:] == ("OutOfMemory", words)
    last = plan_at(of, begun(of).model_copy(update={"restarts": 1}), failed(of, mine)).status
    assert says(last, ConditionType.SUCCEEDED)[:2] == ("False", "BackoffLimitExceeded")


@pytest.mark.parametrize(
    "message",
    [
        "Pod was terminated in response to imminent node shutdown.",
        "The node was low on resource: memory. Threshold quantity: 100Mi, available: 8Ki. ",
    ],
)
def test_a_trainer_that_others_put_out_does_not_count(message: str) -> None:
    of = job(backoffLimit=0)
    status = plan_at(of, begun(of), failed(of, evicted_by_kubelet(message))).status
    assert (status.restarts, says(status, ConditionType.SUCCEEDED)[1]) == (0, "Restarting")


def test_each_disruption_delays_longer_until_an_attempt_has_lasted() -> None:
    of = job(backoffLimit=0)
    observed, delays = failed(of, taken(Role.TRAINER)), []
    status = begun(of)
    for lasted in (60, 60, 60, 3601, 60):
        found = plan_at(of, status, observed, seconds=lasted).status
        next_time = datetime.fromisoformat(found.next_attempt_time or "")
        delays.append((next_time - EPOCH).total_seconds() - lasted)
        status = begun(of).model_copy(update={"disruptions": found.disruptions})
    for delay, least in zip(delays, (10, 20, 40, 10, 20), strict=True):
        assert least <= delay <= 1.2 * least
    assert (status.restarts, status.disruptions) == (0, 2)


@pytest.mark.parametrize("role", [Role.TEACHER, Role.TRAINER])
def test_a_pod_that_was_taken_away_is_an_event_also_where_the_training_goes_on(role: Role) -> None:
    of = job()
    observed = running(of, pods=(*pods(of), taken(role)))
    found = plan_at(of, begun(of), observed, seconds=6)
    events = [(e.reason, e.message) for e in found.effects if isinstance(e, Event) and e.warning]
    assert events == [("Evicted", f"{role.value}: gone was taken away: Preempted in order to admit critical pod")]
    again = plan_at(of, found.status, observed, seconds=7)
    assert [e for e in again.effects if isinstance(e, Event)] == []


# Quotas


FAILURE = {
    "type": "ReplicaFailure",
    "status": "True",
    "reason": "FailedCreate",
    "message": 'pods "x" is forbidden: exceeded quota: gpus, requested: limits.nvidia.com/gpu=8',
}


@pytest.mark.parametrize(("which", "condition"), [(0, "TeacherReady"), (1, "RolloutReady")])
def test_pods_that_a_quota_forbids_are_told_from_pods_that_are_slow(which: int, condition: str) -> None:
    of = job()
    full = read_child({**rendering.serving(of, SETTINGS)[which], "status": {"conditions": [FAILURE]}}, of.metadata.uid)
    others = [c for c in serving(of, ready=False) if c.kind is not full.kind]
    found = plan_at(of, begun(of), Observed(children=(*others, full), claim=Claim.BOUND))
    said = says(found.status, ConditionType(condition))
    assert said[:2] == ("False", "QuotaExceeded")
    assert "exceeded quota: gpus" in said[2]


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ('Error creating: pods "job-trainer-1-0" is forbidden: exceeded quota: gpus', "QuotaExceeded"),
        (
            'Error creating: pods "job-trainer-1-0" is forbidden: violates PodSecurity "restricted:latest"',
            "PodsRefused",
        ),
    ],
)
async def test_a_trainer_whose_pods_are_refused_says_why(note: str, reason: str) -> None:
    """A Job has no condition for it: Events alone tell."""

    class Refusing(Simulation):
        def _job(self, name: str, o: Json) -> None:
            regarding = {"uid": o["metadata"]["uid"]}
            old = {"reason": "FailedCreate", "regarding": regarding, "note": "an older one", "eventTime": "2026-01-01T"}
            self.cluster.put(Kind.EVENT, "old", old)
            self.cluster.put(Kind.EVENT, "new", {**old, "note": note, "eventTime": "2026-01-02T"})
            made = {**o["metadata"], "creationTimestamp": "2026-01-01T00:01:00Z"}
            if "creationTimestamp" not in o["metadata"]:
                self.cluster.put(Kind.JOB, name, {**o, "metadata": made})

    sim = Refusing()
    for _ in range(8):
        await sim.reconcile()
        sim.play()
        sim.pass_time(6)
    assert sim.condition("TrainerReady")[1] == "NotReady"
    assert (await sim.reconcile() or 99) <= 10, "it looks again by itself"
    for seconds in (30, 3):
        sim.pass_time(seconds)
        await sim.reconcile()
    assert sim.condition("TrainerReady") == ("False", reason, f"Job job-trainer-1: {note}")
    assert sim.condition("Succeeded")[2] == f"attempt 1 is starting; trainer: Job job-trainer-1: {note}"
    assert reason in [e["reason"] for e in sim.cluster.events.values()]


@dataclass
class FullNamespace(FakeCluster):
    """Whose quota forbids objects with this in their name."""

    full: str = ""
    ending: bool = False

    async def apply(self, body: Mapping[str, Any], *, uid: str = "", dry_run: bool = False) -> Json:
        if self.full and self.full in body["metadata"]["name"]:
            raise QuotaExceeded(403, "exceeded quota: objects")
        if self.ending and not dry_run:
            raise NamespaceEnding(403, "it is being terminated")
        return await super().apply(body, uid=uid, dry_run=dry_run)


async def test_a_quota_delays_the_start_and_is_no_fault_of_the_spec() -> None:
    sim = Simulation(cluster=FullNamespace(full="rollout"))
    for _ in range(5):
        await sim.reconcile()
        sim.play()
    assert sim.condition("RolloutReady") == ("False", "QuotaExceeded", "exceeded quota: objects")
    assert sim.condition("Succeeded")[:2] == ("Unknown", "Pending")
    assert sim.condition("SpecValid")[0] == "True"
    assert sim.cluster.of(Kind.DEPLOYMENT) == {} and sim.job_status["attempts"] == 0
    assert [e["reason"] for e in sim.cluster.events.values()] == ["QuotaExceeded"]
    before = list(sim.cluster.writes)
    await sim.reconcile()
    assert sim.cluster.writes == before, "nothing is written while nothing changes"
    sim.cluster.full = ""
    await sim.run_until_quiet(seconds=60)
    assert sim.condition("Succeeded")[1] == "Running"


async def test_a_quota_that_comes_down_on_a_running_job_leaves_it_running() -> None:
    sim = Simulation(cluster=FullNamespace())
    await sim.run_until_quiet(seconds=60)
    sim.cluster.full = "rollout"
    sim.edit(rollout={"replicas": 3})
    await sim.reconcile()
    assert sim.condition("RolloutReady")[1] == "QuotaExceeded"
    assert sim.condition("Succeeded")[1] == "Running"
    sim.cluster.full = ""
    await sim.run_until_quiet(seconds=60)
    assert sim.condition("RolloutReady") == ("True", "Ready", "3 of 3 are ready")


async def test_what_a_namespace_on_its_way_out_refuses_is_no_fault_of_the_spec() -> None:
    sim = Simulation(cluster=FullNamespace())
    await sim.run_until_quiet(seconds=60)
    sim.cluster.remove(Kind.DEPLOYMENT, "job-teacher")
    sim.cluster.ending = True
    assert await sim.reconcile() is None
    assert sim.condition("SpecValid")[0] == "True"


# Other controllers


@pytest.mark.parametrize("spec", [{}, {"suspend": True}, {"schedule": "nonsense"}])
async def test_a_job_of_another_controller_is_left_alone_valid_or_not(spec: Any) -> None:
    sim = Simulation(spec={"managedBy": "kueue.x-k8s.io/multikueue", **spec})
    assert await sim.reconcile() is None
    assert sim.cluster.writes == []
    assert sim.reconciler.jobs.snapshots() == {}


# Replicas


def test_teachers_and_engines_of_a_running_job_follow_the_spec() -> None:
    before, after = job(), job(teacher={"model": "/models/teacher", "replicas": 2}, rollout={"replicas": 3})
    found = plan_at(after, begun(before), running(before))
    assert applied(found) == ["ConfigMap/job-job", "Deployment/job-teacher", "RayCluster/job-rollout"]
    assert [(r.name, r.desired, r.ready) for r in found.status.roles][:2] == [("teacher", 2, 1), ("rollout", 3, 1)]
    assert found.status.attempts == 1
