"""Kueue: what a job takes is what its pods will ask for, it has no pod without an admission, and none after it."""

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_fakes import EPOCH, SETTINGS, Simulation, job, manifest

from distill_api.job import DistillationJob, parse_job
from distill_api.status import Reason
from distill_api.teacher.kind import TeacherStatus, parse_teacher
from distill_operator.kinds import Kind
from distill_operator.kueue import admission, demand, workload
from distill_operator.kueue.admission import Request
from distill_operator.model.conditions import FALSE, TRUE, ConditionValue
from distill_operator.model.observed import Observed
from distill_operator.model.pod_sets import Placement
from distill_operator.model.queueing import Priority, Queueing
from distill_operator.model.reading import read_child
from distill_operator.resources import rendering
from distill_operator.runtime.effects import Apply, Delete, PatchStatus
from distill_operator.runtime.errors import ApiError, Refused
from distill_operator.teacher.plan import plan_teacher

Json = dict[str, Any]
GOLDEN = Path(__file__).parent / "golden" / "workload.yaml"
QUEUE = "kueue.x-k8s.io/queue-name"
POOL = {"pool": "gpus"}
KUEUE = replace(SETTINGS, kueue=True)
WORKLOAD = "distillationjob-job"
RESEARCH = Queueing("research")


# The Workload


def test_a_pod_set_for_each_kind_of_pod() -> None:
    of = job(teacher={"model": "/models/teacher", "replicas": 2}, rollout={"replicas": 4}, trainer={"nodes": 3})
    found = workload.owner_pod_sets(of, SETTINGS)
    assert [(p.name, p.count) for p in found] == [("teacher", 2), ("head", 1), ("engine", 4), ("trainer", 3)]


def test_pod_sets_are_the_templates_of_the_children_themselves() -> None:
    teacher, ray = rendering.serving(job(), SETTINGS)
    trainer = rendering.training(job(), SETTINGS, 1)
    assert [p.template for p in workload.owner_pod_sets(job(), SETTINGS)] == [
        teacher["spec"]["template"],
        ray["spec"]["headGroupSpec"]["template"],
        ray["spec"]["workerGroupSpecs"][0]["template"],
        trainer["spec"]["template"],
    ]


def test_the_workload_is_as_in_the_golden_file() -> None:
    of = job(
        accelerator="nvidia.com/gpu",
        teachers=[{"name": "math", "model": "/m", "tensorParallelSize": 4}, {"name": "code", "model": "/c"}],
        teacher=None,
        data={"prompts": {"path": "/data/train.jsonl"}, "defaultTeacher": "math"},
        rollout={"replicas": 2, "tensorParallelSize": 2},
        trainer={
            "nodes": 2,
            "gpusPerNode": 8,
            "template": {"metadata": {"annotations": {"kueue.x-k8s.io/podset-required-topology": "rack"}}},
        },
        podTemplate={"spec": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}},
    )
    made = workload.workload(of, SETTINGS, replace(RESEARCH, max_seconds=3600, priority=URGENT))
    assert made == yaml.safe_load(GOLDEN.read_text()), yaml.safe_dump(made, sort_keys=False, width=120)


URGENT = Priority("kueue.x-k8s.io", "WorkloadPriorityClass", "urgent", 1000)


def test_no_label_or_annotation_of_kueue_is_on_a_child() -> None:
    """Kueue would take the child for a job of its own, and admit the engines without the trainer."""
    raw = manifest(scheduling={"gang": "volcano", "scope": "job"})
    raw["metadata"] |= {"labels": {QUEUE: "research", "kueue.x-k8s.io/priority-class": "high"}}
    of = parse_job(raw)
    made = [
        *rendering.lasting(of, SETTINGS),
        *rendering.group(of, SETTINGS),
        *rendering.serving(of, SETTINGS),
        rendering.training(of, SETTINGS, 1),
    ]
    assert "kueue" not in yaml.safe_dump_all(made)


def test_an_admission_places_the_pods_of_its_set_and_no_others() -> None:
    there = Placement({"pool": "gpus"}, ({"key": "gpu", "operator": "Exists"},), {"l": "1"}, {"a": "2"}, gated=True)
    [_, ray] = rendering.serving(job(), SETTINGS, {"engine": there})
    head, engine = ray["spec"]["headGroupSpec"]["template"], ray["spec"]["workerGroupSpecs"][0]["template"]
    assert engine["spec"]["nodeSelector"] == POOL and engine["spec"]["tolerations"] == [*there.tolerations]
    assert engine["spec"]["schedulingGates"] == [{"name": "kueue.x-k8s.io/topology"}]
    assert engine["metadata"]["labels"]["l"] == "1" and engine["metadata"]["annotations"]["a"] == "2"
    [_, plain] = rendering.serving(job(), SETTINGS)
    assert head == plain["spec"]["headGroupSpec"]["template"]
    assert ray["metadata"]["annotations"] != plain["metadata"]["annotations"], "its hash tells"
    own = job(podTemplate={"spec": {"nodeSelector": {"zone": "a"}, "tolerations": [*there.tolerations]}})
    trainer = rendering.training(own, SETTINGS, 1, {"trainer": there})["spec"]["template"]["spec"]
    assert trainer["nodeSelector"] == {"zone": "a", "pool": "gpus"} and len(trainer["tolerations"]) == 1


# What is decided


def queued(of: DistillationJob | None = None, **labels: str) -> DistillationJob:
    raw = (of or job()).model_dump(by_alias=True, mode="json", exclude_none=True)
    del raw["metadata"]
    raw.pop("status", None)
    raw["metadata"] = {**manifest()["metadata"], "labels": {QUEUE: "research", **labels}}
    return parse_job(raw)


def condition(kind: str, status: str = "True", reason: str = "Because", message: str = "Kueue's words") -> Json:
    at = {"lastTransitionTime": "2025-12-31T23:00:00Z"}
    return {"type": kind, "status": status, "reason": reason, "message": message, **at}


def live(*conditions: Json, admission: bool = True, of: DistillationJob | None = None, **changes: Any) -> Json:
    body = workload.workload(of or job(), SETTINGS, RESEARCH)
    body["metadata"] |= {"uid": "w", "resourceVersion": "7", "generation": 1}
    sets = [{"name": p["name"], "flavors": {"cpu": "gpus"}, "count": p["count"]} for p in body["spec"]["podSets"]]
    granted = {"admission": {"clusterQueue": "all", "podSetAssignments": sets}} if admission else {}
    body["status"] = {"conditions": list(conditions), **granted}
    body["spec"] |= changes
    return body


RESERVED, ADMITTED = condition("QuotaReserved"), condition("Admitted")
EVICTED = condition("Evicted", reason="Preempted", message="by a more urgent one")


def request(
    found: Json | None, of: DistillationJob | None = None, queueing: Queueing = RESEARCH, **flags: Any
) -> Request:
    of = of or job()
    child = read_child(found, of.metadata.uid) if found else None
    wanted = lambda: workload.workload(of, SETTINGS, queueing)  # noqa: E731
    return Request(queueing, child, wanted=wanted, generation=of.metadata.generation, **flags)


def effects(asked: Request, *, released: bool = False, ready: bool = False, ended: ConditionValue | None = None) -> Any:
    return admission.effects(asked, EPOCH, released=released, ready=ready, ended=ended)


def test_without_a_queue_nothing_is_held_and_nothing_done() -> None:
    nothing = request(None, queueing=Queueing())
    assert admission.hold(nothing) is None and effects(nothing, released=True) == []
    assert admission.conditions(nothing) == {}


def test_a_workload_is_made_once_no_pod_is_left_that_nobody_counts() -> None:
    asked = request(None)
    held = admission.hold(asked)
    assert held and "research" in held.message
    assert effects(asked) == []
    [made] = effects(asked, released=True)
    assert isinstance(made, Apply) and made.body["spec"]["queueName"] == "research"


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ((), "waits for quota in queue research: Kueue has not considered it yet"),
        ((condition("QuotaReserved", "False"),), "waits for quota in queue research: Kueue's words"),
    ],
)
def test_the_reason_of_a_wait_is_kueues_own(conditions: tuple[Json, ...], said: str) -> None:
    held = admission.hold(request(live(*conditions, admission=False)))
    assert held is not None and held.message == said


def test_a_check_that_is_not_ready_is_named() -> None:
    found = live(RESERVED)
    checks = [{"name": "machines", "state": "Pending", "message": "two come"}, {"name": "other", "state": "Ready"}]
    found["status"]["admissionChecks"] = checks
    asked = request(found)
    held = admission.hold(asked)
    assert held and held.message == "waits for quota in queue research: machines is Pending: two come"
    assert [v.status for v in admission.conditions(asked).values()] == [TRUE, FALSE]


def test_an_admitted_job_is_not_held_and_says_whether_its_pods_are_ready() -> None:
    asked = request(live(RESERVED, ADMITTED))
    assert admission.hold(asked) is None
    assert [v.status for v in admission.conditions(asked).values()] == [TRUE, TRUE]
    [waits] = effects(asked)
    assert patched(waits, "PodsReady")[:2] == ("False", "WaitForStart")
    [ready] = effects(asked, ready=True)
    assert patched(ready, "PodsReady")[:2] == ("True", "Started")
    started = request(live(RESERVED, ADMITTED, condition("PodsReady", "True", "Started")))
    assert effects(started, ready=True) == []
    [lost] = effects(started)
    assert patched(lost, "PodsReady")[:2] == ("False", "WaitForRecovery")
    recovering = request(live(RESERVED, ADMITTED, condition("PodsReady", "False", "WaitForRecovery")))
    assert effects(recovering) == []
    [again] = effects(recovering, ready=True)
    assert patched(again, "PodsReady")[:2] == ("True", "Recovered")


def patched(effect: Any, kind: str) -> tuple[str, str, str, str]:
    assert isinstance(effect, PatchStatus) and effect.patch["metadata"] == {"uid": "w", "resourceVersion": "7"}
    found = next(c for c in effect.patch["status"]["conditions"] if c["type"] == kind)
    return found["status"], found["reason"], found["message"], found["lastTransitionTime"]


def test_an_evicted_job_keeps_its_reservation_until_its_last_pod_is_gone() -> None:
    asked = request(live(RESERVED, ADMITTED, EVICTED, condition("PodsReady")))
    held = admission.hold(asked)
    assert held and held.message == "evicted from queue research: by a more urgent one"
    assert effects(asked) == []
    [given_back] = effects(asked, released=True)
    assert given_back.patch["status"]["admission"] is None
    now = "2026-01-01T00:00:00Z"
    assert patched(given_back, "QuotaReserved") == ("False", "Pending", "by a more urgent one", now)
    assert patched(given_back, "Requeued")[:2] == ("True", "Preempted"), "at once"
    assert patched(given_back, "Admitted")[:2] == ("False", "NoReservation")
    assert patched(given_back, "PodsReady")[:2] == ("False", "WaitForStart")
    assert patched(given_back, "Evicted")[3] == "2025-12-31T23:00:00Z", "as Kueue wrote it"
    assert given_back.patch["status"]["accumulatedPastExecutionTimeSeconds"] == 3600


@pytest.mark.parametrize("reason", ["PodsReadyTimeout", "AdmissionCheck", "Deactivated", "ClusterQueueStopped"])
def test_kueue_itself_queues_again_what_it_did_not_preempt(reason: str) -> None:
    asked = request(live(RESERVED, ADMITTED, condition("Evicted", reason=reason)))
    [given_back] = effects(asked, released=True)
    assert patched(given_back, "Requeued")[:2] == ("False", reason)


def test_more_pods_than_were_admitted_are_queued_anew_and_fewer_are_not() -> None:
    def edited(replicas: int, **more: Any) -> Request:
        spec = {"rollout": {"replicas": replicas, **more}}
        of = parse_job({**manifest(**spec), "metadata": {**manifest()["metadata"], "generation": 2}})
        return request(live(RESERVED, ADMITTED, of=job(rollout={"replicas": 2})), of)

    assert admission.hold(edited(1)) is None and admission.hold(edited(2)) is None
    more = edited(3)
    assert admission.hold(more) is not None
    assert effects(more) == []
    assert [type(e) for e in effects(more, released=True)] == [Delete]
    larger = edited(2, template={"spec": {"containers": [{"name": "main", "resources": {"requests": {"cpu": "9"}}}]}})
    assert admission.hold(larger) is not None


def test_an_edit_after_an_upgrade_that_renders_pods_differently_ends_no_reservation() -> None:
    found = live(RESERVED, ADMITTED, of=job(rollout={"replicas": 2}))
    found["metadata"]["annotations"]["distillation-operator.io/spec-hash"] = "another"
    for pod_set in found["spec"]["podSets"]:
        pod_set["template"]["spec"] |= {"restartPolicy": "Never", "nodeSelector": {"old": "1"}}
    for replicas, ends in ((1, False), (2, False), (3, True)):
        meta = {**manifest()["metadata"], "generation": 2}
        of = parse_job({**manifest(rollout={"replicas": replicas}), "metadata": meta})
        assert (admission.hold(request(found, of)) is not None) is ends


def test_a_pod_takes_what_its_containers_take_together_or_an_init_container_before_them() -> None:
    def container(cpu: Any, **more: Any) -> Json:
        return {"name": "c", "resources": {"requests": {"cpu": cpu}, "limits": {"cpu": "64", "gpu": 1}}, **more}

    two = {"containers": [container("500m"), container(1.5)]}
    assert demand.pod_size(two) == {"cpu": 2, "gpu": 2}
    first = {"initContainers": [container("1", restartPolicy="Always"), container("3")], **two}
    assert demand.pod_size(first) == {"cpu": 4, "gpu": 3}
    assert demand.pod_size({**two, "resources": {"requests": {"cpu": "8"}}, "overhead": {"cpu": "250m"}})["cpu"] == 8.25
    assert demand.pod_size({"containers": [{"name": "c", "resources": {"limits": {"memory": "1.5Gi"}}}]}) == {
        "memory": 1536 * 1024**2
    }


def test_another_operator_that_counts_differently_ends_no_reservation() -> None:
    found = live(RESERVED, ADMITTED)
    found["metadata"]["annotations"]["distillation-operator.io/spec-hash"] = "another"
    assert admission.hold(request(found)) is None
    waits = live(condition("QuotaReserved", "False"), admission=False)
    waits["metadata"]["annotations"]["distillation-operator.io/spec-hash"] = "another"
    assert [type(e) for e in effects(request(waits))] == [Apply], "what waits is counted anew"


def test_a_job_that_waits_may_change_its_queue_and_its_priority() -> None:
    waits = live(condition("QuotaReserved", "False"), admission=False)
    assert effects(request(waits)) == []
    [moved] = effects(request(waits, queueing=Queueing("other", priority=URGENT)))
    assert (moved.body["spec"]["queueName"], moved.body["spec"]["priority"]) == ("other", 1000)


def test_a_label_that_is_removed_while_quota_is_held_changes_nothing_until_the_end_of_that() -> None:
    none = Queueing()
    assert admission.hold(request(live(RESERVED, ADMITTED), queueing=none)) is None
    assert admission.hold(request(live(RESERVED, ADMITTED, EVICTED), queueing=none)) is not None
    free = request(live(condition("QuotaReserved", "False"), admission=False), queueing=none)
    assert admission.hold(free) is None and [type(e) for e in effects(free)] == [Delete]


def test_a_strangers_workload_is_left_alone_and_named() -> None:
    found = live(RESERVED, ADMITTED)
    found["metadata"]["ownerReferences"][0]["uid"] = "another"
    asked = request(found)
    held = admission.hold(asked)
    assert held and WORKLOAD in held.message and effects(asked, released=True) == []


def test_an_end_is_told_once_no_pod_is_left() -> None:
    for status, reason in ((TRUE, "Succeeded"), (FALSE, "Failed")):
        ended = ConditionValue(status, Any, "all steps are done")  # type: ignore[arg-type]
        asked = request(live(RESERVED, ADMITTED))
        assert effects(asked, ended=ended) == []
        [told] = effects(asked, released=True, ended=ended)
        assert patched(told, "Finished")[:3] == ("True", reason, "all steps are done")
    assert effects(request(live(RESERVED, ADMITTED, condition("Finished"))), released=True, ended=ended) == []


def test_what_cannot_be_read_holds_what_has_no_pod_and_ends_nothing_that_runs() -> None:
    lost = replace(RESEARCH, obstacle=ConditionValue(FALSE, Any, "no flavor"))  # type: ignore[arg-type]
    held = admission.hold(request(live(RESERVED, ADMITTED), queueing=lost))
    assert held and held.message == "no flavor"
    assert admission.hold(request(live(RESERVED, ADMITTED), queueing=lost, running=True)) is None
    assert admission.hold(request(None, queueing=lost, running=True)) is None


# A job's life in memory


def life(**spec: Any) -> Simulation:
    sim = Simulation(spec=spec, settings=KUEUE)
    label(sim, **{QUEUE: "research"})
    flavor = {"spec": {"nodeLabels": POOL, "tolerations": [{"key": "gpu", "operator": "Exists"}]}}
    sim.cluster.put(Kind.RESOURCE_FLAVOR, "gpus", flavor)
    return sim


def label(sim: Simulation, **labels: str) -> None:
    found = copy.deepcopy(sim.cluster.objects[Kind.DISTILLATION_JOB, "job"])
    found["metadata"]["labels"] = labels
    sim.cluster.put(Kind.DISTILLATION_JOB, "job", found)


def says(sim: Simulation, kind: str) -> str:
    conditions = sim.cluster.objects[Kind.WORKLOAD, WORKLOAD].get("status", {}).get("conditions", [])
    return next((c["status"] for c in conditions if c["type"] == kind), "")


def write(sim: Simulation, *changes: Json, **status: Any) -> None:
    """As Kueue does."""
    body = sim.cluster.objects[Kind.WORKLOAD, WORKLOAD]
    before = body.get("status", {})
    kept = {c["type"]: c for c in before.get("conditions", [])}
    kept |= {c["type"]: c for c in changes}
    sim.cluster.status(Kind.WORKLOAD, WORKLOAD, {**before, "conditions": list(kept.values()), **status})


def admit(sim: Simulation) -> None:
    body = sim.cluster.objects[Kind.WORKLOAD, WORKLOAD]
    sets = [{"name": p["name"], "flavors": {"cpu": "gpus"}, "count": p["count"]} for p in body["spec"]["podSets"]]
    granted = {"clusterQueue": "all", "podSetAssignments": sets}
    write(sim, RESERVED, ADMITTED, condition("Evicted", "False"), admission=granted)


async def turn(sim: Simulation) -> None:
    """The next thing that happens."""
    sim.deliver()
    await sim.reconcile_if_due()
    if not sim.play() and not sim.cluster.stream:
        sim.now = max(sim.now, min(sim.due, sim.next_resync))


async def test_a_job_in_a_queue_runs_while_it_is_admitted_and_only_then() -> None:
    sim = life(preRunningDeadlineSeconds=600)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[:2] == ("Unknown", "WaitingForQuota")
    assert "queue research" in sim.condition("Succeeded")[2]
    assert sim.job_status.get("attempts", 0) == 0 and not sim.cluster.of(Kind.POD)
    sim.pass_time(7200)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "WaitingForQuota", "no deadline runs while it waits"

    admit(sim)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "Running" and sim.job_status["attempts"] == 1
    assert sim.condition("Admitted")[0] == sim.condition("QuotaReserved")[0] == "True"
    [trainer] = sim.cluster.of(Kind.JOB).values()
    assert trainer["spec"]["template"]["spec"]["nodeSelector"] == POOL
    assert trainer["spec"]["template"]["spec"]["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert says(sim, "PodsReady") == "True"

    write(sim, EVICTED)
    while says(sim, "QuotaReserved") == "True":
        await turn(sim)
    assert not sim.cluster.of(Kind.POD), "the reservation ended before the last pod was gone"
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "WaitingForQuota" and sim.condition("Suspended")[0] == "True"

    admit(sim)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "Running"
    assert (sim.job_status["attempts"], sim.job_status.get("restarts", 0)) == (2, 0)
    sim.trainers[2] = (0, "")
    await sim.run_until_quiet()
    assert sim.condition("Complete")[0] == "True" and says(sim, "Finished") == "True"


async def test_pods_get_what_a_topology_and_admission_checks_ask_of_them() -> None:
    sim = life()
    await sim.run_until_quiet()
    admit(sim)
    granted = copy.deepcopy(sim.cluster.objects[Kind.WORKLOAD, WORKLOAD]["status"]["admission"])
    for each in granted["podSetAssignments"]:
        if each["name"] == "engine":
            each["topologyAssignment"] = {"levels": ["rack"], "slices": []}
    update = {
        "name": "trainer",
        "labels": {"l": "1"},
        "annotations": {"a": "2"},
        "nodeSelector": {"claim": "c1"},
        "tolerations": [{"key": "new", "operator": "Exists"}],
    }
    checks = [{"name": "machines", "state": "Ready", "podSetUpdates": [update]}]
    write(sim, admission=granted, admissionChecks=checks)
    await sim.run_until_quiet()
    [trainer] = [j["spec"]["template"] for j in sim.cluster.of(Kind.JOB).values()]
    assert trainer["spec"]["nodeSelector"] == {**POOL, "claim": "c1"} and len(trainer["spec"]["tolerations"]) == 2
    assert trainer["metadata"]["labels"]["l"] == "1" and trainer["metadata"]["annotations"]["a"] == "2"
    assert "schedulingGates" not in trainer["spec"]
    [ray] = sim.cluster.of(Kind.RAY_CLUSTER).values()
    engine = ray["spec"]["workerGroupSpecs"][0]["template"]
    assert engine["spec"]["schedulingGates"] == [{"name": "kueue.x-k8s.io/topology"}]
    assert engine["metadata"]["labels"]["kueue.x-k8s.io/podset"] == "engine"
    assert engine["metadata"]["annotations"]["kueue.x-k8s.io/workload"] == WORKLOAD
    assert engine["metadata"]["annotations"]["kueue.x-k8s.io/podset-unconstrained-topology"] == "true"


async def test_an_edit_of_a_flavor_leaves_the_pods_that_it_has_placed_alone() -> None:
    sim = life()
    await sim.run_until_quiet()
    admit(sim)
    await sim.run_until_quiet()
    before = {name: d["spec"] for name, d in sim.cluster.of(Kind.DEPLOYMENT).items()}
    sim.cluster.put(Kind.RESOURCE_FLAVOR, "gpus", {"spec": {"nodeLabels": {"pool": "others"}}})
    sim.upgrade()
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "Running" and sim.job_status["attempts"] == 1
    assert {name: d["spec"] for name, d in sim.cluster.of(Kind.DEPLOYMENT).items()} == before


@pytest.mark.parametrize("crash_after", range(40))
async def test_a_crash_after_any_write_loses_no_quota_and_makes_no_pod_without_it(crash_after: int) -> None:
    sim = life()
    sim.cluster.crash_after = crash_after
    await sim.run_until_quiet()
    for attempt in (1, 2):
        admit(sim)
        await sim.run_until_quiet()
        assert sim.condition("Succeeded")[1] == "Running" and sim.job_status["attempts"] == attempt
        write(sim, EVICTED)
        while says(sim, "QuotaReserved") == "True":
            await turn(sim)
        assert not sim.cluster.of(Kind.POD)
        await sim.run_until_quiet()
        assert sim.condition("Succeeded")[1] == "WaitingForQuota" and sim.job_status.get("restarts", 0) == 0


async def test_a_restart_keeps_the_reservation() -> None:
    sim = life(backoffLimit=3)
    await sim.run_until_quiet()
    admit(sim)
    sim.trainers[1] = (75, "")
    await sim.run_until_quiet()
    assert sim.job_status["attempts"] == 2 and sim.job_status["restarts"] == 1
    assert sim.condition("Admitted")[0] == "True" and says(sim, "PodsReady") == "True"


async def test_a_suspended_job_leaves_its_queue_and_comes_back_to_it() -> None:
    sim = life()
    await sim.run_until_quiet()
    admit(sim)
    await sim.run_until_quiet()
    sim.edit(suspend=True)
    await sim.run_until_quiet()
    assert sim.condition("Suspended")[:2] == ("True", "Suspended") and not sim.cluster.of(Kind.WORKLOAD)
    sim.edit(suspend=False)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "WaitingForQuota" and len(sim.cluster.of(Kind.WORKLOAD)) == 1
    admit(sim)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "Running"


async def test_a_workload_that_somebody_deletes_is_made_again_once_the_pods_are_gone() -> None:
    sim = life()
    await sim.run_until_quiet()
    admit(sim)
    await sim.run_until_quiet()
    first = sim.cluster.objects[Kind.WORKLOAD, WORKLOAD]["metadata"]["uid"]
    sim.cluster.remove(Kind.WORKLOAD, WORKLOAD)
    while Kind.WORKLOAD not in {kind for kind, _ in sim.cluster.objects}:
        await turn(sim)
    assert not sim.cluster.of(Kind.POD)
    assert sim.cluster.objects[Kind.WORKLOAD, WORKLOAD]["metadata"]["uid"] != first
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "WaitingForQuota"


async def test_the_workloads_priority_is_that_of_its_class() -> None:
    sim = life()
    label(sim, **{QUEUE: "research", "kueue.x-k8s.io/priority-class": "urgent"})
    await sim.run_until_quiet()
    assert "WorkloadPriorityClass urgent does not exist" in sim.condition("Succeeded")[2]
    sim.cluster.put(Kind.WORKLOAD_PRIORITY_CLASS, "urgent", {"value": 1000})
    sim.pass_time(60)
    await sim.run_until_quiet()
    spec = sim.cluster.objects[Kind.WORKLOAD, WORKLOAD]["spec"]
    assert spec["priority"] == 1000 and spec["priorityClassRef"]["kind"] == "WorkloadPriorityClass"


async def test_an_installation_without_kueue_says_so_and_starts_nothing() -> None:
    sim = Simulation()
    label(sim, **{QUEUE: "research"})
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[:2] == ("Unknown", "KueueNotInstalled"), "the alert counts it"
    assert "(kueue of the chart)" in sim.condition("Succeeded")[2] and not sim.cluster.of(Kind.POD)
    label(sim)
    sim.pass_time(60)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "Running" and sim.condition("Admitted") == ("", "", "")


@pytest.mark.parametrize("lost", ["flavor", "kueue"])
async def test_no_pod_is_made_without_the_place_that_was_admitted(lost: str) -> None:
    sim = life()
    await sim.run_until_quiet()
    admit(sim)
    await sim.run_until_quiet()
    before = pod_uids(sim)
    if lost == "flavor":
        sim.cluster.remove(Kind.RESOURCE_FLAVOR, "gpus")
    sim.upgrade(kueue=lost == "flavor")
    await sim.run_until_quiet(limit=200)
    assert pod_uids(sim) == before and sim.condition("Succeeded")[1] == "Running", "what runs is left alone"
    sim.cluster.remove(Kind.RAY_CLUSTER, "job-rollout")
    await sim.run_until_quiet(limit=200)
    assert not sim.cluster.of(Kind.RAY_CLUSTER) and sim.job_status["attempts"] == 1
    sim.cluster.put(Kind.RESOURCE_FLAVOR, "gpus", {"spec": {"nodeLabels": POOL}})
    sim.upgrade(kueue=True)
    await sim.run_until_quiet(limit=200)
    [ray] = sim.cluster.of(Kind.RAY_CLUSTER).values()
    assert ray["spec"]["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"] == POOL


async def test_a_priority_class_is_read_once_for_all_that_wait() -> None:
    sim = life()
    label(sim, **{QUEUE: "research", "kueue.x-k8s.io/priority-class": "urgent"})
    sim.cluster.put(Kind.WORKLOAD_PRIORITY_CLASS, "urgent", {"value": 1000})
    reads: list[str] = []
    get = sim.cluster.get

    async def counted(kind: Kind, namespace: str, name: str) -> Any:
        reads.append(name)
        return await get(kind, namespace, name)

    sim.cluster.get = counted  # type: ignore[method-assign]
    await sim.run_until_quiet()
    reads.clear()
    for seconds in (0, 0, 0, 60, 0):
        sim.pass_time(seconds)
        await sim.reconciler.reconcile(sim.key)
    assert reads.count("urgent") == 1


@pytest.mark.parametrize("error", [ApiError(500, "failed calling webhook"), Refused(422, "status.conditions: no")])
async def test_a_jobs_status_does_not_wait_for_kueue(error: ApiError) -> None:
    sim = life()
    await sim.run_until_quiet()
    admit(sim)
    sim.cluster.workloads = error
    for _ in range(60):
        await turn(sim)
    assert sim.condition("Succeeded")[1] == "Running" and sim.condition("SpecValid")[0] == "True"
    assert says(sim, "PodsReady") == ""
    with pytest.raises(ApiError):
        # So that the work queue tries again.
        await sim.reconciler.reconcile(sim.key)
    sim.cluster.workloads = None
    await sim.run_until_quiet()
    assert says(sim, "PodsReady") == "True"


async def test_a_new_job_says_that_it_waits_while_kueues_webhooks_refuse_everything() -> None:
    sim = life()
    sim.cluster.workloads = ApiError(500, "failed calling webhook")
    for _ in range(30):
        await turn(sim)
    assert sim.condition("Succeeded")[1] == "WaitingForQuota" and not sim.cluster.of(Kind.WORKLOAD)


def pod_uids(sim: Simulation) -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in sim.cluster.of(Kind.POD).items()}


@pytest.mark.parametrize("label_first", [True, False])
async def test_an_attempt_that_began_without_a_queue_keeps_its_pods_and_the_next_is_queued(label_first: bool) -> None:
    sim = Simulation(spec={"backoffLimit": 3})
    await sim.run_until_quiet()
    before = pod_uids(sim)
    assert before and sim.condition("Succeeded")[1] == "Running"
    for step in (0, 1):
        if label_first == (step == 0):
            label(sim, **{QUEUE: "research"})
        else:
            sim.upgrade(kueue=True)
        await sim.run_until_quiet()
        assert sim.condition("Succeeded")[1] == "Running" and pod_uids(sim) == before
        assert not sim.cluster.of(Kind.WORKLOAD) and sim.condition("Admitted") == ("", "", "")
    sim.cluster.put(Kind.RESOURCE_FLAVOR, "gpus", {"spec": {"nodeLabels": POOL}})
    sim.trainers[1] = (75, "")
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "WaitingForQuota" and not sim.cluster.of(Kind.POD)
    admit(sim)
    await sim.run_until_quiet()
    assert sim.condition("Succeeded")[1] == "Running" and sim.job_status["attempts"] == 2
    assert sim.condition("Admitted")[0] == "True"


async def test_a_job_of_another_cluster_has_no_workload() -> None:
    sim = life(managedBy="kueue.x-k8s.io/multikueue")
    await sim.run_until_quiet()
    assert not sim.cluster.of(Kind.WORKLOAD) and not sim.job_status


def without_quota(sim: Simulation) -> list[str]:
    """Pods that have not ended, where no quota is reserved for them."""
    live_pods = [n for n, p in sim.cluster.of(Kind.POD).items() if p["status"]["phase"] not in ("Succeeded", "Failed")]
    if (Kind.WORKLOAD, WORKLOAD) in sim.cluster.objects and says(sim, "QuotaReserved") == "True":
        return []
    return live_pods


def act(sim: Simulation, rng: random.Random) -> None:
    """What Kueue, the user and the cluster may do next."""
    action = rng.choice(("admit", "admit", "evict", "evict", "user", "edit", "trainer", "crash", "time"))
    workload_exists = (Kind.WORKLOAD, WORKLOAD) in sim.cluster.objects
    if (
        action == "admit"
        and workload_exists
        and says(sim, "QuotaReserved") != "True"
        and says(sim, "Finished") != "True"
    ):
        admit(sim)
    elif action == "evict" and workload_exists and says(sim, "QuotaReserved") == "True":
        write(sim, EVICTED)
    elif action == "user":
        sim.edit(suspend=rng.random() < 0.5)
    elif action == "edit":
        sim.edit(rollout={"replicas": rng.choice([1, 2, 3])})
    elif action == "trainer":
        sim.trainers[sim.job_status.get("attempts", 0)] = (75, "")
    elif action == "crash":
        sim.cluster.crash_after = rng.randrange(5)
    elif action == "time":
        sim.pass_time(rng.choice([5, 70]))


@pytest.mark.parametrize("block", range(4))
async def test_in_no_life_is_there_a_pod_without_quota(block: int) -> None:
    for seed in range(block * 30, (block + 1) * 30):
        rng = random.Random(seed)
        sim = life(backoffLimit=50)
        sim.chaos = rng
        for _ in range(60):
            if rng.random() < 0.25:
                act(sim, rng)
            sim.deliver()
            await sim.reconcile_if_due()
            assert not without_quota(sim), f"seed {seed}"
            sim.play(collect=rng.random() < 0.5)
            assert not without_quota(sim), f"seed {seed}"
            for name, pod in sim.cluster.of(Kind.POD).items():
                # Those that end gracefully do so at last.
                if "deletionTimestamp" in pod["metadata"] and rng.random() < 0.3:
                    sim.cluster.remove(Kind.POD, name)
            if rng.random() < 0.3:
                sim.pass_time(rng.choice([1, 5, 15]))
        sim.chaos = None
        sim.cluster.crash_after = -1
        sim.edit(suspend=False)
        for _ in range(4):
            for name, pod in sim.cluster.of(Kind.POD).items():
                if "deletionTimestamp" in pod["metadata"]:
                    sim.cluster.remove(Kind.POD, name)
            sim.trainers = {n: t for n, t in sim.trainers.items() if n < sim.job_status.get("attempts", 0)}
            await sim.run_until_quiet(limit=400, seconds=2000)
            if (Kind.WORKLOAD, WORKLOAD) in sim.cluster.objects and says(sim, "QuotaReserved") != "True":
                admit(sim)
        assert sim.condition("Succeeded")[1] == "Running", f"seed {seed}: {sim.condition('Succeeded')}"


# Teachers


def teacher_plan(
    found: Json | None,
    wanted: int = 2,
    *,
    serves: Json | None = None,
    status: TeacherStatus | None = None,
    queueing: Queueing | None = None,
    **spec: Any,
) -> Any:
    """The plan of a Teacher with a Workload of status `found`, and with the Deployment `serves`."""
    meta = {"name": "poet", "namespace": "default", "uid": "t", "generation": 1, "labels": {QUEUE: "research"}}
    body = {"model": "/m", "accelerator": "none", **(spec or {"replicas": wanted})}
    of = parse_teacher(
        {"apiVersion": "distillation-operator.io/v1alpha1", "kind": "Teacher", "metadata": meta, "spec": body}
    )
    if found is not None:
        found = {**workload.workload(of, SETTINGS, RESEARCH), "status": found}
        found["metadata"] |= {"uid": "w", "resourceVersion": "7"}
    children = tuple(read_child(child, "t") for child in (found, serves) if child is not None)
    placed = replace(RESEARCH, placements={"teacher": Placement(POOL)})
    observed = Observed(children=children, queueing=queueing or placed)
    return plan_teacher(of, status or TeacherStatus(), observed, [], SETTINGS, EPOCH)


def deployment(decided: Any) -> Json:
    [found] = [e.body for e in decided.effects if isinstance(e, Apply) and e.body["kind"] == "Deployment"]
    return dict(found["spec"])


def made(decided: Any) -> Json:
    """The Deployment that a plan makes, as it is then."""
    [found] = [e.body for e in decided.effects if isinstance(e, Apply) and e.body["kind"] == "Deployment"]
    return {**found, "metadata": {**found["metadata"], "uid": "d", "generation": 1}}


def reservation(count: int) -> Json:
    granted = {"clusterQueue": "all", "podSetAssignments": [{"name": "teacher", "count": count}]}
    return {"conditions": [RESERVED, ADMITTED], "admission": granted}


def test_a_teacher_has_no_server_until_it_is_admitted() -> None:
    waits = teacher_plan(None)
    assert deployment(waits)["replicas"] == 0
    [made] = [e.body for e in waits.effects if isinstance(e, Apply) and e.body["kind"] == "Workload"]
    assert [(p["name"], p["count"]) for p in made["spec"]["podSets"]] == [("teacher", 2)]
    assert made["metadata"]["name"] == "teacher-poet"
    ready = next(c for c in waits.status.conditions if c.type == "Ready")
    assert (ready.status.value, ready.reason) == ("False", "WaitingForQuota")
    admitted = teacher_plan(reservation(2))
    assert deployment(admitted)["replicas"] == 2
    assert deployment(admitted)["template"]["spec"]["nodeSelector"] == POOL


def test_a_teacher_that_serves_without_a_queue_goes_on_and_is_queued_once_it_is_scaled_to_zero() -> None:
    serves = made(teacher_plan(None, queueing=Queueing(), status=TeacherStatus()))
    labelled = teacher_plan(None, serves=serves, queueing=RESEARCH)
    assert not [e for e in labelled.effects if isinstance(e, Apply) and e.body["kind"] in ("Deployment", "Workload")]
    assert not [c for c in labelled.status.conditions if c.type == "Admitted"]
    stopped = made(teacher_plan(None, wanted=0, serves=serves, queueing=RESEARCH))
    again = teacher_plan(None, serves=stopped, queueing=RESEARCH)
    assert [e.body["kind"] for e in again.effects if isinstance(e, Apply)][-1] == "Workload"
    assert not [e for e in again.effects if isinstance(e, Apply) and e.body["kind"] == "Deployment"]


def test_a_teacher_that_serves_keeps_its_pods_while_their_place_cannot_be_read() -> None:
    serves = made(teacher_plan(reservation(2)))
    admitted = teacher_plan(reservation(2)).status
    lost = replace(RESEARCH, obstacle=ConditionValue(FALSE, Reason.WAITING_FOR_QUOTA, "no flavor"))
    for found in (reservation(2), None):
        blind = teacher_plan(found, serves=serves, status=admitted, queueing=lost)
        assert not [e for e in blind.effects if isinstance(e, Apply) and e.body["kind"] == "Deployment"]
        assert blind.requeue_after is not None, "no watch tells when it can be read"
    fewer = teacher_plan(reservation(2), wanted=1, serves=serves, status=admitted, queueing=lost)
    assert deployment(fewer)["replicas"] == 1
    assert deployment(fewer)["template"]["spec"]["nodeSelector"] == POOL


def test_a_teacher_with_an_autoscaler_reserves_the_most_that_it_may_have() -> None:
    scaled = teacher_plan(None, autoscaling={"maxReplicas": 5})
    [made] = [e.body for e in scaled.effects if isinstance(e, Apply) and e.body["kind"] == "Workload"]
    assert made["spec"]["podSets"][0]["count"] == 5


def test_an_evicted_teacher_gives_its_quota_back_once_its_servers_are_gone() -> None:
    evicted = reservation(2)
    evicted["conditions"].append(EVICTED)
    decided = teacher_plan(evicted)
    assert deployment(decided)["replicas"] == 0
    [given_back] = [e for e in decided.effects if isinstance(e, PatchStatus)]
    assert given_back.patch["status"]["admission"] is None


def test_a_teacher_that_is_scaled_to_zero_leaves_its_queue() -> None:
    assert [e.name for e in teacher_plan(reservation(2), wanted=0).effects if isinstance(e, Delete)] == ["teacher-poet"]
