"""Admission of a teacher's replicas: what a change of all weights leaves of it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of

from distill_workers.metrics import Metrics
from distill_workers.teacher.protocol import Scores
from distill_workers.teacher.replica_admission import ReplicaAdmission
from distill_workers.teacher.replicas import Replica, Replicas

OLD, NEW = Scores([-1.0], None, None), Scores([-3.0], None, None)


def replica(address: str, **fields: Any) -> Replica:
    return Replica(address, asyncio.Semaphore(1), **fields)


def admission_of(score: Callable[..., Awaitable[Scores]], *known: Replica) -> ReplicaAdmission:
    replicas = Replicas([], 1)
    replicas._known = {each.address: each for each in known}
    spec = spec_of(Path("/s"), Path("/t"))
    return ReplicaAdmission(replicas, spec.all_teachers[0], score, Metrics())


async def admitted_in_time(admission: ReplicaAdmission, joined: Replica) -> None:
    async with asyncio.timeout(5):
        while not joined.admitted and not joined.rejected:
            admission.admit_pending()
            await asyncio.sleep(0)


@pytest.mark.parametrize("turns", [0, 1])
async def test_a_comparison_that_new_weights_end_is_made_again(turns: int) -> None:
    """Also one that has not begun when it is cancelled."""
    begun, hangs = list[str](), True

    async def score(of: Replica, prompt: list[int], response: list[int]) -> Scores:
        begun.append(of.address)
        if hangs:
            await asyncio.Event().wait()
        return NEW

    first, joined = replica("a"), replica("b", admitted=False)
    admission = admission_of(score, first, joined)
    admission.observe([1], [2], OLD)
    admission.admit_pending()
    for _ in range(turns):
        await asyncio.sleep(0)
    assert len(begun) == turns
    admission.reset()
    hangs = False
    admission.observe([1], [2], NEW)
    await admitted_in_time(admission, joined)
    assert joined.admitted and begun == ["b"] * (turns + 1)


async def test_a_replica_that_was_rejected_is_compared_anew_under_new_weights() -> None:
    async def score(of: Replica, prompt: list[int], response: list[int]) -> Scores:
        return NEW

    first, joined = replica("a"), replica("b", admitted=False)
    admission = admission_of(score, first, joined)
    admission.observe([1], [2], OLD)
    await admitted_in_time(admission, joined)
    assert joined.rejected
    admission.reset()
    admission.observe([1], [2], NEW)
    await admitted_in_time(admission, joined)
    assert joined.admitted and not joined.rejected


async def test_new_weights_admit_nobody_while_one_that_is_admitted_can_still_be_compared_with() -> None:
    async def score(of: Replica, prompt: list[int], response: list[int]) -> Scores:
        return OLD

    first, joined = replica("a"), replica("b", admitted=False)
    admission = admission_of(score, first, joined)
    admission.observe([1], [2], OLD)
    admission.reset()
    admission.admit_pending()
    assert not joined.admitted, "the others have yet to score by the new weights"
    admission.observe([1], [2], NEW)
    await admitted_in_time(admission, joined)
    assert joined.rejected
    admission.reset()
    del admission._replicas._known["a"]
    admission.admit_pending()
    assert joined.admitted, "there is no other"
