"""Who gets which engine, and when."""

import asyncio

import pytest

from distill_workers.rollout.scheduler import Slots


def taken(waiting: list[asyncio.Task[int]]) -> list[int]:
    return [task.result() for task in waiting if task.done()]


async def line(slots: Slots, count: int, *, urgent: bool = False) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(slots.take(urgent=urgent)) for _ in range(count)]
    await asyncio.sleep(0.001)
    return tasks


async def test_requests_go_to_the_least_busy_engine_and_wait_when_all_are_full() -> None:
    slots = Slots(2)
    slots.add(0)
    slots.add(1)
    tasks = await line(slots, 6)
    assert sorted(taken(tasks)) == [0, 0, 1, 1]
    slots.free(1)
    await asyncio.sleep(0.001)
    assert sorted(taken(tasks)) == [0, 0, 1, 1, 1], "the free slot went to the next in line"


async def test_evaluation_goes_before_training() -> None:
    slots = Slots(1)
    slots.add(0)
    first, training = await line(slots, 2)
    [evaluation] = await line(slots, 1, urgent=True)
    slots.free(first.result())
    await asyncio.sleep(0.001)
    assert evaluation.done() and not training.done()


async def test_draining_waits_for_what_runs_and_lets_nothing_begin() -> None:
    slots = Slots(1)
    slots.add(0)
    running, waiting = await line(slots, 2)
    drained = asyncio.create_task(slots.drain())
    await asyncio.sleep(0.001)
    assert not drained.done()
    slots.free(running.result())
    await asyncio.sleep(0.001)
    assert drained.done() and not waiting.done()
    slots.release()
    assert await waiting == 0


async def test_an_engine_that_is_gone_gets_nothing_and_its_last_requests_are_still_waited_for() -> None:
    slots = Slots(1)
    slots.add(0)
    [running] = await line(slots, 1)
    slots.remove(0)
    [waiting] = await line(slots, 1)
    drained = asyncio.create_task(slots.drain())
    await asyncio.sleep(0.001)
    assert not drained.done() and not waiting.done()
    slots.free(running.result())
    await drained
    slots.release()
    slots.add(3)
    assert await waiting == 3


async def test_a_cancelled_wait_leaks_no_slot() -> None:
    slots = Slots(1)
    slots.add(0)
    running, cancelled, next_one = await line(slots, 3)
    cancelled.cancel()
    slots.free(running.result())
    assert await next_one == 0
    late = asyncio.create_task(slots.take())
    await asyncio.sleep(0.001)
    slots.free(0)  # hands the slot to `late`, which is cancelled before it could go on
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert await asyncio.wait_for(slots.take(), 1) == 0


async def test_those_in_line_hear_that_no_engine_will_come() -> None:
    slots = Slots(1)
    [waiting] = await line(slots, 1)
    slots.fail(RuntimeError("no engine came back"))
    with pytest.raises(RuntimeError, match="no engine came back"):
        await waiting
