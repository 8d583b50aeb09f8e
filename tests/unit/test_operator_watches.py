"""kopf is kept watching: whatever ends it, or one of its watches, it begins anew."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import kopf
import pytest
from operator_fakes import SETTINGS, FakeCluster

from distill_operator.kinds import Kind
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.runtime import kopf_thread, watcher
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.kopf_thread import KopfThread, watch_name
from distill_operator.runtime.watcher import Watches

ALL = frozenset(watch_name(kind, "") for kind in (*OWNERSHIP.owner_labels, *OWNERSHIP.watched))
RAY = watch_name(Kind.RAY_CLUSTER, "")


class Life:
    """A KopfThread that does what the test says."""

    def __init__(self, *_: Any) -> None:
        self.ended: Future[str] = Future()
        self.watching = ALL
        self.alive_at = time.monotonic()
        self.ends = True
        """Whether it ends when it is asked to."""
        lives.append(self)

    def start(self) -> None:
        pass

    def stop(self) -> None:
        if self.ends and not self.ended.done():
            self.ended.set_result("kopf ended")

    def cancel(self) -> None:
        pass


lives: list[Life] = []
beats: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    lives.clear()
    beats.clear()
    monkeypatch.setattr(watcher, "KopfThread", Life)
    for name, seconds in (("CHECK", 0.005), ("MISSING", 0.1), ("FIRST_DELAY", 0.001), ("LONGEST_DELAY", 10.0)):
        monkeypatch.setattr(watcher, f"{name}_SECONDS", seconds)


def heart(part: str) -> Callable[[], None]:
    return lambda: beats.update([part])


def watches(excused: Callable[[], bool] = lambda: False, cache: Cache | None = None) -> Watches:
    cache = cache or Cache(FakeCluster(), OWNERSHIP)
    return Watches(SETTINGS, cache, lambda _: None, heart=heart, excused=excused, jitter=lambda: 1.0)


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


async def ended(of: Watches, running: asyncio.Task[None]) -> None:
    of.stop()
    await asyncio.wait_for(running, 5)


async def test_kopf_that_ended_begins_anew_and_that_is_counted() -> None:
    found = watches()
    running = asyncio.create_task(found.run())
    for n in range(1, 4):
        await until(lambda n=n: len(lives) == n)
        lives[-1].ended.set_result("kopf failed: WatchingError")
    await until(lambda: len(lives) == 4)
    assert found.restarts == 3
    await ended(found, running)
    assert found.restarts == 3, "an end that was wanted is none"


def test_the_delay_grows_with_each_failure_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    async def delays() -> list[float]:
        return [watches().delay_seconds(n) for n in (1, 2, 3, 4, 5, 6, 1000)]

    assert asyncio.run(delays()) == [0.5, 1, 2, 4, 5, 5, 5]


async def test_a_watch_that_is_missing_makes_the_heart_stop_and_kopf_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = watches()
    running = asyncio.create_task(found.run())
    await until(lambda: beats["watches"])
    monkeypatch.setattr(watcher, "FIRST_DELAY_SECONDS", 1.0)
    lives[0].watching = ALL - {watch_name(Kind.POD, "")}
    await asyncio.sleep(0.02)
    before = beats["watches"]
    await until(lambda: found.restarts)
    assert beats["watches"] == before
    await until(lambda: beats["watches"] > before)
    assert len(lives) == 2
    await ended(found, running)


async def test_no_watch_is_missed_while_the_api_server_is_away() -> None:
    found = watches(excused=lambda: True)
    running = asyncio.create_task(found.run())
    await until(lambda: lives)
    lives[0].watching = frozenset()
    await asyncio.sleep(0.3)
    assert len(lives) == 1 and beats["watches"], "kopf tries again by itself"
    await ended(found, running)


async def test_a_loop_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(watcher, "END_SECONDS", 0.02)
    found = watches()
    running = asyncio.create_task(found.run())
    await until(lambda: lives)
    lives[0].ends = False
    await until(lambda: len(lives) > 1)
    await ended(found, running)


async def test_watches_are_renewed_when_there_is_a_reason() -> None:
    found = watches()
    running = asyncio.create_task(found.run())
    await until(lambda: beats["watches"])
    found.renew("the past has changed")
    await until(lambda: len(lives) == 2)
    await asyncio.sleep(0.05)
    assert len(lives) == 2, "once"
    await ended(found, running)


async def test_a_kind_is_watched_once_the_api_server_knows_it() -> None:
    now = [0.0]
    cluster = FakeCluster(kuberay=False)
    cache = Cache(cluster, OWNERSHIP, clock=lambda: now[0])
    await cache.sync()
    found = watches(cache=cache)
    running = asyncio.create_task(found.run())
    await until(lambda: lives)
    lives[0].watching = ALL - {RAY}
    await asyncio.sleep(0.2)
    assert len(lives) == 1
    cluster.kuberay = True
    now[0] += 10
    assert await cache.serves(Kind.RAY_CLUSTER)
    await until(lambda: len(lives) == 2)
    await ended(found, running)


# One life of kopf


async def real(operator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> KopfThread:
    monkeypatch.setattr(kopf, "operator", operator)
    found = KopfThread(replace(SETTINGS, watch_namespaces=("a",)), OWNERSHIP, lambda *_: None)
    found.start()
    return found


async def test_an_error_of_kopf_ends_its_life_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def operator(*, stop_flag: asyncio.Event, **_: Any) -> None:
        # As kopf does: what waits for the flag must not hold up the end.
        waiting = asyncio.ensure_future(stop_flag.wait())
        assert not waiting.done()
        raise RuntimeError("no scan")

    life = await real(operator, monkeypatch)
    assert "no scan" in await asyncio.wait_for(asyncio.wrap_future(life.ended), 5)
    life.stop()


async def test_kopf_ends_when_it_is_asked_to_or_else_when_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def operator(*, stop_flag: asyncio.Event, **_: Any) -> None:
        await stop_flag.wait()
        await asyncio.sleep(60)

    life = await real(operator, monkeypatch)
    waiting = asyncio.wrap_future(life.ended)
    life.stop()
    await asyncio.wait({waiting}, timeout=0.1)
    assert not waiting.done()
    life.cancel()
    await asyncio.wait_for(waiting, 5)


async def test_the_watches_are_known_by_their_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kopf_thread, "REPORT_SECONDS", 0.01)

    async def operator(*, stop_flag: asyncio.Event, **_: Any) -> None:
        name = f"watcher for {watch_name(Kind.POD, 'a')}"
        watch = asyncio.create_task(asyncio.sleep(60), name=name)
        await stop_flag.wait()
        watch.cancel()

    life = await real(operator, monkeypatch)
    await until(lambda: life.watching == {"pods.v1@a"})
    life.stop()
    await asyncio.wait_for(asyncio.wrap_future(life.ended), 5)


def test_kopf_never_kills_the_process() -> None:
    assert kopf_thread.kopf_settings(SETTINGS, OWNERSHIP).process.ultimate_exiting_timeout is None
