"""Conversations of training and of an evaluation share the processes of environments, and neither waits for all of the
other's."""

import asyncio
from typing import Any

import pytest
from test_environments import ROW, modules, pool_of

from distill_workers.environments import pool as pool_module
from distill_workers.environments.fair_slots import FairSlots, Kind

__all__ = ["modules"]

TRAINING, EVALUATION = Kind.TRAINING, Kind.EVALUATION


class Work:
    """Holders of slots, each until it is told to end."""

    def __init__(self, slots: int) -> None:
        self.slots, self.running, self.begun = FairSlots(slots), dict[asyncio.Task[None], Kind](), list[Kind]()
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, kind: Kind, count: int) -> list[asyncio.Task[None]]:
        added = [asyncio.create_task(self._hold(kind)) for _ in range(count)]
        self._tasks += added
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return added

    async def end(self, kind: Kind) -> None:
        """End the one of a kind that has run longest."""
        await cancelled(next(task for task, whose in self.running.items() if whose is kind))

    def held(self) -> tuple[int, int]:
        kinds = list(self.running.values())
        return kinds.count(TRAINING), kinds.count(EVALUATION)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _hold(self, kind: Kind) -> None:
        async with self.slots.one(kind):
            task = asyncio.current_task()
            assert task is not None
            self.running[task] = kind
            self.begun.append(kind)
            try:
                await asyncio.Event().wait()
            finally:
                del self.running[task]


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@pytest.mark.parametrize("first", Kind)
async def test_who_comes_second_has_half_of_the_slots_as_soon_as_those_of_the_first_end(first: Kind) -> None:
    second = EVALUATION if first is TRAINING else TRAINING
    work = Work(4)
    await work.add(first, 100)
    await work.add(second, 100)
    for _ in range(2):
        await work.end(first)
    assert work.held() == (2, 2)
    for _ in range(3):
        await work.end(first)
        await work.end(second)
    assert work.held() == (2, 2), "long ones of either kind take no slot of the other's"
    await work.stop()


async def test_a_kind_that_is_alone_has_all_slots() -> None:
    work = Work(4)
    await work.add(EVALUATION, 5)
    assert work.held() == (0, 4)
    await work.add(TRAINING, 1)
    await work.end(EVALUATION)
    await work.end(EVALUATION)
    assert work.held() == (1, 3), "nobody else of training waits"
    await work.stop()


async def test_one_that_is_cancelled_while_it_waits_or_as_it_is_given_a_slot_keeps_none() -> None:
    work = Work(1)
    [holder] = await work.add(TRAINING, 1)
    waiting, given, last = await work.add(EVALUATION, 3)
    await cancelled(waiting)
    holder.cancel()
    await asyncio.sleep(0)  # its slot is given to the next, which has not run since
    await cancelled(given)
    assert work.running == {last: EVALUATION}
    await cancelled(last)
    await work.add(TRAINING, 1)
    assert work.held() == (1, 0)
    await work.stop()


async def test_a_conversation_of_training_begins_before_the_rest_of_an_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real processes, one at a time: three conversations of an evaluation wait before training's first."""
    monkeypatch.setattr(pool_module, "CONVERSATIONS", 1)
    pool, order = pool_of("Counter"), list[str]()

    async def one(kind: Kind, name: str) -> Any:
        async with pool.conversation(kind) as environment:
            order.append(name)
            return await environment.reset(ROW)

    evaluation = [asyncio.create_task(one(EVALUATION, f"evaluation {n}")) for n in range(4)]
    await asyncio.sleep(0.05)
    training = [asyncio.create_task(one(TRAINING, f"training {n}")) for n in range(2)]
    await asyncio.gather(*evaluation, *training)
    assert order[:4] == ["evaluation 0", "training 0", "evaluation 1", "training 1"]
    await pool.close()
