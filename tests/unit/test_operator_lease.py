"""Who leads: one at a time, whatever their clocks say."""

import asyncio
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from distill_operator import __main__
from distill_operator.kinds import Kind
from distill_operator.runtime.errors import AlreadyExists, ApiError, Conflict
from distill_operator.runtime.health_server import Hearts
from distill_operator.runtime.leader_election import Election, LeaseLost, LeaseNotRenewed, Terms
from distill_operator.settings import InvalidSettings, Settings

Json = dict[str, Any]


@dataclass
class Store:
    """One lease on an API server, with optimistic locking."""

    lease: Json | None = None
    down: bool = False
    writes: int = 0
    requests: int = 0
    held: asyncio.Event = field(default_factory=asyncio.Event)

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        self.requests += 1
        if self.down:
            raise ApiError(0, "no answer")
        return copy.deepcopy(self.lease)

    async def create(self, body: Mapping[str, Any]) -> None:
        if self.lease is not None:
            raise AlreadyExists(409, "there is one")
        self._store(body)

    async def replace(self, body: Mapping[str, Any]) -> None:
        assert self.lease is not None
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict(409, "changed")
        self._store(body)

    def _store(self, body: Mapping[str, Any]) -> None:
        self.writes += 1
        self.lease = {**copy.deepcopy(dict(body))}
        self.lease["metadata"] = {**self.lease["metadata"], "resourceVersion": str(self.writes)}


class Clock:
    """Of one machine."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def candidate(store: Store, name: str, clock: Clock, **terms: Any) -> Election:
    return Election(store, "system", "operator", name, Terms(**terms), clock)


async def test_the_first_to_ask_leads_and_the_second_waits() -> None:
    store, clock = Store(), Clock()
    a, b = candidate(store, "a", clock), candidate(store, "b", clock)
    assert (await a.attempt(), await b.attempt(), await a.attempt()) == (True, False, True)
    assert store.lease is not None
    assert store.lease["spec"]["holderIdentity"] == "a"
    assert (store.lease["spec"]["leaseDurationSeconds"], store.lease["spec"]["leaseTransitions"]) == (15, 0)


async def test_a_lease_that_is_not_renewed_is_taken_over_after_its_duration_and_not_before() -> None:
    store, clock = Store(), Clock()
    a, b = candidate(store, "a", clock), candidate(store, "b", clock)
    await a.attempt()
    assert not await b.attempt()
    clock.now = 14.9
    assert not await b.attempt()
    clock.now = 15.1
    assert await b.attempt()
    assert store.lease is not None and store.lease["spec"]["leaseTransitions"] == 1
    assert not await a.attempt() and a.holder == "b"


async def test_a_renewal_that_was_seen_begins_the_wait_anew() -> None:
    store, clock = Store(), Clock()
    a, b = candidate(store, "a", clock), candidate(store, "b", clock)
    await a.attempt()
    for _ in range(5):
        clock.now += 10
        assert await a.attempt() and not await b.attempt()


async def test_clocks_that_are_hours_apart_change_nothing() -> None:
    """renewTime is the other machine's, and is never read."""
    store, here, there = Store(), Clock(1e6), Clock(5.0)
    a, b = candidate(store, "a", here), candidate(store, "b", there)
    await a.attempt()
    assert store.lease is not None
    store.lease["spec"]["renewTime"] = "2001-01-01T00:00:00.000000Z"
    assert not await b.attempt()
    there.now += 14
    assert not await b.attempt()


async def test_of_two_that_see_the_lease_free_one_gets_it() -> None:
    store, clock = Store(), Clock()
    a, b, gone = (candidate(store, name, clock) for name in ("a", "b", "gone"))
    await gone.attempt()
    assert not await a.attempt() and not await b.attempt()
    clock.now = 20
    stale = await store.get(Kind.LEASE, "", "")
    assert await a.attempt()
    assert stale is not None
    assert not await b._replace(stale, b._claim(stale["spec"]))
    assert not await b.attempt()


async def test_a_released_lease_is_free_at_once() -> None:
    store, clock = Store(), Clock()
    a, b = candidate(store, "a", clock), candidate(store, "b", clock)
    await a.attempt()
    assert not await b.attempt()
    await a.release()
    assert store.lease is not None and "holderIdentity" not in store.lease["spec"]
    assert await b.attempt()
    await a.release()
    assert b.holder == "b" and await b.attempt(), "what is not ours is not released"


async def test_a_holder_that_cannot_renew_gives_up_before_another_may_begin() -> None:
    terms = {"duration_seconds": 1, "renew_deadline_seconds": 0.2, "retry_seconds": 0.05}
    for _ in range(3):  # the best of three: another process may have had the processors meanwhile
        store = Store()
        a = Election(store, "system", "operator", "a", Terms(**terms))
        await a.acquire()
        store.down = True
        began = asyncio.get_running_loop().time()
        with pytest.raises(LeaseNotRenewed, match="was not renewed"):
            await a.hold()
        took = asyncio.get_running_loop().time() - began
        if took < 0.8:
            break
    assert took < 0.8


async def test_a_process_that_stands_again_after_an_outage_has_the_lease_at_once() -> None:
    store, clock = Store(), Clock()
    await candidate(store, "a", clock).attempt()
    assert not await candidate(store, "b", clock).attempt()
    assert await candidate(store, "a", clock).attempt(), "the lease that is left is its own"
    settings, nobody = Settings("workers", leader_election=True, lease_namespace="system"), cast(Any, None)
    one, another = (__main__._election(settings, nobody, Hearts()) for _ in range(2))
    assert one is not None and another is not None and one.identity == another.identity


async def test_while_the_api_server_is_away_a_candidate_says_so_ever_less_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    store.down = True
    waiting = asyncio.ensure_future(Election(store, "system", "operator", "a", Terms(retry_seconds=0.001)).acquire())
    while store.requests < 100:
        await asyncio.sleep(0.001)
    store.down = False
    await asyncio.wait_for(waiting, 5)
    said = [record for record in caplog.records if "cannot be had" in record.message]
    assert 7 <= len(said) <= 12


async def test_a_holder_whose_lease_was_taken_ends_at_once() -> None:
    terms = {"retry_seconds": 0.05}
    store = Store()
    a = Election(store, "system", "operator", "a", Terms(**terms))
    await a.acquire()
    assert store.lease is not None
    await store.replace({**store.lease, "spec": {**store.lease["spec"], "holderIdentity": "b"}})
    with pytest.raises(LeaseLost, match="b took the lease"):
        await a.hold()


async def test_one_who_waits_is_in_contact_and_takes_over() -> None:
    terms = {"duration_seconds": 1, "retry_seconds": 0.05}
    store, contacts = Store(), []
    a = Election(store, "system", "operator", "a", Terms(**terms))
    b = Election(store, "system", "operator", "b", Terms(**terms), heart=lambda _: lambda: contacts.append(1))
    await a.acquire()
    await asyncio.wait_for(b.acquire(), 3)
    assert len(contacts) > 3 and b.holder == "b"


def test_an_election_needs_a_namespace() -> None:
    with pytest.raises(InvalidSettings, match="DISTILL_LEASE_NAMESPACE"):
        Settings.from_environment({"DISTILL_WORKERS_IMAGE": "w", "DISTILL_LEADER_ELECTION": "true"})


def test_a_leader_that_an_outage_cost_its_lease_stands_again_and_one_that_was_replaced_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = [LeaseNotRenewed("away"), LeaseNotRenewed("away"), LeaseLost("b took it"), None]

    async def operate(settings: Settings) -> None:
        if end := ends.pop(0):
            raise end

    monkeypatch.setattr(__main__, "operate", operate)
    settings = Settings(workers_image="registry.test/workers:1")
    assert __main__.run(settings) == 1
    assert __main__.run(settings) == 0
