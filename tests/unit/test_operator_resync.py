"""The lists of each namespace: one that is gone, forbidden or broken touches no other."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from operator_fakes import FakeCluster, Json, manifest

from distill_operator import resync as resync_module
from distill_operator import selected_namespaces
from distill_operator.kinds import Kind
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.resync import Resync
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.errors import ApiError
from distill_operator.runtime.health_server import no_heart
from distill_operator.runtime.ownership import Key
from distill_operator.selected_namespaces import SelectedNamespaces

A, B = (Key(Kind.DISTILLATION_JOB, namespace, f"job-{namespace}") for namespace in "ab")
FORBIDDEN = ApiError(403, "forbidden")


class Namespaces(FakeCluster):
    """An API server of namespaces, each of which may fail."""

    failing: dict[str, Exception]

    async def pages(self, kind: Kind, namespace: str, *, labels: str = "") -> AsyncIterator[tuple[list[Json], int]]:
        if error := self.failing.get(namespace):
            raise error
        async for page, version in super().pages(kind, namespace, labels=labels):
            yield [raw for raw in page if namespace in ("", raw["metadata"]["namespace"])], version


class Always(random.Random):
    """Makes every request fail, and counts them."""

    failures = 0

    def random(self) -> float:
        self.failures += 1
        return 0.0


class World:
    def __init__(self, *namespaces: str) -> None:
        self.cluster = Namespaces()
        self.cluster.failing = {}
        for key in (A, B):
            self.put(key)
        self.cache = Cache(self.cluster, OWNERSHIP, namespaces)
        self.woken: Counter[Key] = Counter()
        self.filled: list[str] = []
        self.renewed: list[str] = []
        self.beats: Counter[str] = Counter()
        self.ended: list[str] = []
        self.remembered: set[Key] = set()
        self.resync = Resync(
            self.cache,
            0.05,
            known=lambda: self.cache.store.owners() | self.remembered,
            on_listed=self.filled.append,
            wake=lambda key, _: self.woken.update([key]),
            renew_watches=self.renewed.append,
            heart=lambda part: lambda: self.beats.update([part]),
            end_heart=self.ended.append,
            jitter=lambda: 0.0,
        )

    def put(self, key: Key, **meta: Any) -> None:
        body = manifest()
        names = {"name": key.name, "namespace": key.namespace, "uid": f"uid-of-{key.name}"}
        self.cluster.put(key.kind, key.name, {**body, "metadata": {**body["metadata"], **names, **meta}})

    async def write_status(self, key: Key) -> None:
        version = self.cluster.objects[key.kind, key.name]["metadata"]["resourceVersion"]
        await self.cache.patch_status(key, {"metadata": {"resourceVersion": version}, "status": {"attempts": 1}})

    async def run(self, act: Callable[[], Any]) -> None:
        running = asyncio.create_task(self.resync.run())
        try:
            await act()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("error", [FORBIDDEN, ApiError(500, "etcd"), ApiError(0, "cut"), KeyError("metadata")])
async def test_a_namespace_that_cannot_be_listed_touches_no_other(error: Exception) -> None:
    world = World("a", "b")
    world.cluster.failing["b"] = error

    async def act() -> None:
        await world.until(lambda: world.woken[A] > 2)
        assert not world.woken[B] and world.resync.failing == {"b"}
        assert world.resync.may_reconcile(A) and not world.resync.may_reconcile(B)
        assert not world.resync.all_failing
        del world.cluster.failing["b"]
        await world.until(lambda: world.woken[B])
        assert world.resync.may_reconcile(B) and not world.resync.failing

    await world.run(act)


async def test_nothing_is_reconciled_before_the_statuses_of_its_namespace_are_known() -> None:
    world = World("a", "b")
    assert not world.resync.may_reconcile(A)

    async def act() -> None:
        await world.until(lambda: world.woken[A] and world.woken[B])
        assert sorted(world.filled) == ["a", "b"], "once each"

    await world.run(act)


async def test_jobs_of_a_namespace_that_stays_forbidden_are_forgotten_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resync_module, "LONGEST_DELAY_SECONDS", 0.01)
    world = World("a", "b")

    async def act() -> None:
        await world.until(lambda: world.woken[A] and world.woken[B])
        world.cluster.failing["b"] = FORBIDDEN
        world.remembered = {B}
        await world.until(lambda: world.cache.owner(B) is None)
        assert world.resync.may_reconcile(B), "to be forgotten"
        assert world.cache.owner(A) is not None
        world.woken.clear()
        del world.cluster.failing["b"]
        await world.until(lambda: world.woken[B])
        assert world.cache.owner(B) is not None
        assert world.filled.count("b") == 2

    await world.run(act)


async def test_a_namespace_that_is_let_go_is_forgotten_and_one_that_is_taken_up_is_listed() -> None:
    world = World("a")

    async def act() -> None:
        await world.until(lambda: world.woken[A])
        world.resync.turn_to(["a", "b"])
        await world.until(lambda: world.woken[B])
        assert world.resync.may_reconcile(B)
        world.resync.turn_to(["a"])
        await world.until(lambda: world.cache.owner(B) is None)
        assert world.ended == ["lists of b"], "what is over is not waited for by /healthz"
        assert world.resync.may_reconcile(B), "to be forgotten"
        assert world.cache.owner(A) is not None and world.resync.may_reconcile(A)
        world.woken.clear()
        world.resync.turn_to(["a", "b"])
        await world.until(lambda: world.woken[B])
        assert world.filled.count("b") == 2 and world.filled.count("a") == 1

    await world.run(act)


async def test_an_owner_that_the_answer_to_a_write_brings_back_after_its_namespace_was_let_go_is_forgotten() -> None:
    world = World("a", "b")
    answer, patch_status = asyncio.Event(), world.cluster.patch_status

    async def late(*arguments: Any) -> Json:
        found = await patch_status(*arguments)
        await answer.wait()
        return found

    async def act() -> None:
        await world.until(lambda: world.woken[A] and world.woken[B])
        world.cluster.patch_status = late  # type: ignore[method-assign]
        writing = asyncio.create_task(world.write_status(B))
        await asyncio.sleep(0)
        world.resync.turn_to(["a"])
        await world.until(lambda: world.cache.owner(B) is None)
        answer.set()
        await writing
        assert world.cache.owner(B) is not None
        assert world.resync.may_reconcile(B), "to be forgotten"
        assert world.cache.owner(B) is None

    await world.run(act)


async def test_an_owner_in_a_namespace_that_is_taken_up_again_is_not_forgotten_before_its_first_list_is_whole() -> None:
    world = World("a", "b")

    async def act() -> None:
        await world.until(lambda: world.woken[A] and world.woken[B])
        world.resync.turn_to(["a"])
        await world.until(lambda: world.cache.owner(B) is None)
        world.cluster.failing["b"] = ApiError(500, "etcd")
        world.resync.turn_to(["a", "b"])
        await world.until(lambda: world.resync.failing == {"b"})
        await world.write_status(B)
        assert not world.resync.may_reconcile(B)
        assert world.cache.owner(B) is not None

    await world.run(act)


async def test_what_need_not_be_known_any_more_is_forgotten_also_while_namespaces_come_and_go() -> None:
    world = World("a")
    expired: list[None] = []
    world.cache.expire = lambda: expired.append(None)  # type: ignore[method-assign]

    async def act() -> None:
        for turn in range(40):
            world.resync.turn_to(["a", "b"] if turn % 2 else ["a"])
            await asyncio.sleep(0.01)
        assert len(expired) >= 2

    await world.run(act)


async def test_a_namespace_that_is_let_go_while_it_failed_does_not_count_as_failing() -> None:
    world = World("a", "b")
    world.cluster.failing["b"] = FORBIDDEN

    async def act() -> None:
        await world.until(lambda: world.resync.failing == {"b"})
        world.resync.turn_to(["a"])
        await world.until(lambda: not world.resync.failing)

    await world.run(act)


async def test_the_label_says_which_namespaces_are_watched_and_a_failure_leaves_them_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("INTERVAL", "FIRST_DELAY", "LONGEST_DELAY"):
        monkeypatch.setattr(selected_namespaces, f"{name}_SECONDS", 0.005)
    cluster, turns = FakeCluster(), [["a"]]
    found = SelectedNamespaces(cluster, "team=x", ["a"], turn_to=lambda n: turns.append(list(n)), heart=no_heart)

    def labelled(name: str, **labels: str) -> None:
        cluster.put(Kind.NAMESPACE, name, {"metadata": {"name": name, "namespace": "", "labels": labels}})

    async def until(names: list[str]) -> None:
        async with asyncio.timeout(10):
            while turns[-1] != names:
                await asyncio.sleep(0.005)

    running = asyncio.create_task(found.run())
    labelled("b", team="x")
    labelled("c", team="y")
    await until(["a", "b"])
    labelled("c", team="x")
    await until(["a", "b", "c"])
    assert not found.failing
    cluster.fail = Always()
    async with asyncio.timeout(10):
        while cluster.fail.failures < 2:
            await asyncio.sleep(0.005)
    assert found.failing
    cluster.fail = None
    labelled("b")
    await until(["a", "c"])
    assert turns == [["a"], ["a", "b"], ["a", "b", "c"], ["a", "c"]]
    assert not found.failing
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_jobs_are_not_forgotten_when_everything_is_forbidden_or_a_namespace_fails_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resync_module, "LONGEST_DELAY_SECONDS", 0.005)
    for namespaces, error in ((("",), FORBIDDEN), (("a", "b"), FORBIDDEN), (("a", "b"), ApiError(503, "away"))):
        world = World(*namespaces)

        async def act(world: World = world, error: ApiError = error) -> None:
            await world.until(lambda: world.woken[A] and world.woken[B])
            world.cluster.failing = dict.fromkeys(world.cache.namespaces, error)
            await asyncio.sleep(0.3)
            assert world.cache.owner(B) is not None and world.resync.may_reconcile(B)
            assert world.resync.all_failing

        await world.run(act)


async def test_the_heart_beats_while_the_api_server_is_away_but_not_when_it_does_not_know_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resync_module, "LONGEST_DELAY_SECONDS", 0.01)
    world = World("a", "b")
    world.cluster.failing = {"a": ApiError(503, "away"), "b": ApiError(401, "who are you")}

    async def act() -> None:
        await world.until(lambda: world.beats["lists of a"] > 3)
        assert not world.beats["lists of b"]

    await world.run(act)


async def test_what_vanished_while_nobody_watched_is_noticed() -> None:
    world = World()

    async def act() -> None:
        await world.until(lambda: world.woken[B])
        world.cluster.remove(*B[::2])
        await world.until(lambda: world.cache.owner(B) is None)

    await world.run(act)


async def test_watches_are_renewed_when_the_api_server_shows_an_older_state() -> None:
    world = World()

    async def act() -> None:
        await world.until(lambda: world.woken[A])
        raw = world.cluster.objects[A.kind, A.name]
        old = {**raw, "metadata": {**raw["metadata"], "resourceVersion": "0"}, "spec": {**raw["spec"], "suspend": True}}
        world.cluster.objects[A.kind, A.name] = old
        await world.until(lambda: world.renewed)
        found = world.cache.owner(A)
        assert found is not None and found["spec"]["suspend"]
        await asyncio.sleep(0.2)
        assert len(world.renewed) == 1, "once"

    await world.run(act)
