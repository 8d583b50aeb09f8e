"""What is remembered of the cluster: the newest of what lists, watches and writes have shown, and who asks when."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from operator_fakes import KEY, SETTINGS, FakeCluster, Simulation, job

from distill_api.names import FIELD_MANAGER, LABEL_JOB, LABEL_MANAGED_BY
from distill_operator.kinds import Kind
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.resources import rendering
from distill_operator.runtime.cache import BOUND_CLAIM_SECONDS, DRY_RUN_SECONDS, Cache
from distill_operator.runtime.errors import Conflict
from distill_operator.runtime.store import Store

LABELS = {LABEL_MANAGED_BY: FIELD_MANAGER, LABEL_JOB: "job"}


def raw(version: int, uid: str = "a", name: str = "x", **more: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "default", "uid": uid, "resourceVersion": str(version), "labels": LABELS}
    return {"metadata": meta, **more}


def names(store: Store) -> list[str]:
    return [found["metadata"]["name"] for _, found in store.made_for(KEY, Kind)]


def test_the_newest_version_stays_whatever_comes_after() -> None:
    store = Store(OWNERSHIP)
    assert store.put(Kind.JOB, raw(5, status={"ready": 1}))
    assert not store.put(Kind.JOB, raw(4, status={"ready": 0}))
    assert not store.put(Kind.JOB, raw(5))
    found = store.get(Kind.JOB, "default", "x")
    assert found is not None and found["status"] == {"ready": 1}
    assert (found["kind"], found["apiVersion"]) == ("Job", "batch/v1")


def test_what_is_gone_does_not_come_back_by_a_late_event() -> None:
    store = Store(OWNERSHIP)
    store.put(Kind.JOB, raw(5))
    assert store.remove(Kind.JOB, "default", "x", "a")
    assert not store.put(Kind.JOB, raw(7))
    assert store.put(Kind.JOB, raw(8, uid="b")), "another of the same name does"
    assert not store.remove(Kind.JOB, "default", "x", "a")
    assert names(store) == ["x"]


def test_what_a_list_lacks_is_gone_unless_it_is_newer() -> None:
    store = Store(OWNERSHIP)
    store.put(Kind.JOB, raw(5, "a", "old"))
    store.put(Kind.JOB, raw(9, "b", "new"))
    assert store.keep_only(Kind.JOB, "", set(), 7, listed=0) == {KEY}
    assert names(store) == ["new"]


def test_a_list_overrules_what_was_known_before_it_also_backwards() -> None:
    store = Store(OWNERSHIP)
    store.put(Kind.JOB, raw(50, "a", "older"))
    store.put(Kind.JOB, raw(50, "b", "unmade"))
    store.put(Kind.JOB, raw(50, "c", "deleted"))
    store.remove(Kind.JOB, "default", "deleted", "c")
    listed = store.begin_list()
    assert store.put(Kind.JOB, raw(7, "a", "older", status={"ready": 0}), listed)
    assert store.put(Kind.JOB, raw(8, "c", "deleted"), listed)
    found = {("default", "older"), ("default", "deleted")}
    assert store.keep_only(Kind.JOB, "", found, 9, listed) == {KEY}
    assert names(store) == ["deleted", "older"]
    held = store.get(Kind.JOB, "default", "older")
    assert held is not None and held["status"] == {"ready": 0}
    assert store.went_back == 2


def test_what_was_learnt_while_a_list_was_under_way_stays() -> None:
    store = Store(OWNERSHIP)
    store.put(Kind.JOB, raw(5, "c", "deleted"))
    listed = store.begin_list()
    store.put(Kind.JOB, raw(9, "a", "changed"))
    store.put(Kind.JOB, raw(10, "b", "made"))
    store.remove(Kind.JOB, "default", "deleted", "c")
    assert not store.put(Kind.JOB, raw(6, "a", "changed"), listed)
    assert not store.put(Kind.JOB, raw(5, "c", "deleted"), listed)
    assert not store.keep_only(Kind.JOB, "", {("default", "changed"), ("default", "deleted")}, 8, listed)
    assert names(store) == ["changed", "made"]
    assert not store.went_back


def test_of_a_pod_only_what_is_read_is_kept() -> None:
    store = Store(OWNERSHIP)
    store.put(Kind.POD, raw(1, spec={"nodeName": "n", "containers": [{"name": "x" * 10_000}]}, status={"podIP": "i"}))
    found = store.get(Kind.POD, "default", "x")
    assert found is not None and (found["spec"], found["status"]) == ({"nodeName": "n"}, {"podIP": "i"})


def test_the_api_server_judges_the_same_object_of_two_jobs_once() -> None:
    cluster, now = FakeCluster(), [0.0]
    cache, asked = Cache(cluster, OWNERSHIP, clock=lambda: now[0]), []
    apply = cluster.apply

    async def counting(body: Any, **more: Any) -> Any:
        asked.append(body["metadata"]["name"])
        return await apply(body, **more)

    cluster.apply = counting  # type: ignore[method-assign]
    first, other, different = job(), job(), job(teacher={"model": "/models/teacher", "replicas": 2})
    first, other, different = (
        one.model_copy(update={"metadata": one.metadata.model_copy(update={"name": name, "uid": f"uid of {name}"})})
        for one, name in ((first, "mine"), (other, "another"), (different, "mine"))
    )

    async def run() -> None:
        for one in (first, other, first, different):
            await cache.check(rendering.serving(one, SETTINGS)[0])
            await cache.check(rendering.lasting(one, SETTINGS)[0])
        now[0] += DRY_RUN_SECONDS + 1
        await cache.check(rendering.serving(first, SETTINGS)[0])

    asyncio.run(run())
    assert asked == ["mine-teacher", "mine-job", "mine-teacher", "mine-teacher"], "what a ConfigMap says is not judged"


def test_an_object_that_memory_lacks_is_not_taken_over_but_looked_at() -> None:
    cluster = FakeCluster()
    cluster.put(Kind.CONFIG_MAP, "job-job", {"data": {"mine": "yes"}})
    cache = Cache(cluster, OWNERSHIP)

    async def run() -> list[Any]:
        with pytest.raises(Conflict):
            await cache.apply(rendering.lasting(job(), SETTINGS)[0])
        return await cache.children(KEY, "uid")

    (found,) = asyncio.run(run())
    assert found["data"] == {"mine": "yes"}
    assert cluster.objects[Kind.CONFIG_MAP, "job-job"]["data"] == {"mine": "yes"}


def test_a_bound_claim_is_asked_for_now_and_then() -> None:
    cluster, now, asked = FakeCluster(), [0.0], []
    cluster.put(Kind.CLAIM, "out", {"status": {"phase": "Bound"}})
    get = cluster.get

    async def counting(*where: Any) -> Any:
        asked.append(where)
        return await get(*where)

    cluster.get = counting  # type: ignore[method-assign]
    cache = Cache(cluster, OWNERSHIP, clock=lambda: now[0])

    async def run() -> None:
        for _ in range(3):
            await cache.claim("default", "out")
        now[0] += BOUND_CLAIM_SECONDS
        await cache.claim("default", "out")

    asyncio.run(run())
    assert len(asked) == 2


def test_kuberay_that_comes_later_is_looked_at_itself_until_its_watch_tells() -> None:
    cluster, now = FakeCluster(kuberay=False), [0.0]
    cache = Cache(cluster, OWNERSHIP, clock=lambda: now[0])

    async def run() -> None:
        await cache.sync()
        assert not await cache.serves(Kind.RAY_CLUSTER)
        cluster.kuberay = True
        now[0] += 6
        assert await cache.serves(Kind.RAY_CLUSTER)
        body = rendering.serving(job(), SETTINGS)[1]
        await cache.apply(body)
        cluster.status(Kind.RAY_CLUSTER, "job-rollout", {"readyWorkerReplicas": 1})
        (found,) = await cache.children(KEY, job().metadata.uid)
        assert found["status"] == {"readyWorkerReplicas": 1}

    asyncio.run(run())


def test_a_change_that_is_no_turn_is_written_once_it_is_two_seconds_old() -> None:
    sim = Simulation()

    async def run() -> None:
        await sim.run_until_quiet(seconds=60)
        sim.cluster.status(Kind.DEPLOYMENT, "job-teacher", {"readyReplicas": 0})
        before = len(sim.cluster.writes)
        again = await sim.reconcile()
        assert again is not None and 0 < again <= 2
        assert len(sim.cluster.writes) == before
        sim.now += timedelta(seconds=2)
        await sim.reconcile()
        assert sim.cluster.writes[before:] == ["status"]
        assert sim.condition("TeacherReady")[0] == "False"

    asyncio.run(run())
