"""Who gets which engine, and when."""

import asyncio

import pytest

from distill_workers.rollout.scheduler import EngineAffinity, SlotScheduler


def taken(waiting: list[asyncio.Task[int]]) -> list[int]:
    return [task.result() for task in waiting if task.done()]


async def line(scheduler: SlotScheduler, count: int, *, urgent: bool = False) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(scheduler.acquire(urgent=urgent)) for _ in range(count)]
    await asyncio.sleep(0.001)
    return tasks


async def test_requests_go_to_the_least_busy_engine_and_wait_when_all_are_full() -> None:
    scheduler = SlotScheduler(2)
    scheduler.add(0)
    scheduler.add(1)
    tasks = await line(scheduler, 6)
    assert sorted(taken(tasks)) == [0, 0, 1, 1]
    scheduler.release(1)
    await asyncio.sleep(0.001)
    assert sorted(taken(tasks)) == [0, 0, 1, 1, 1], "the free slot went to the next in line"


async def test_evaluation_goes_before_training() -> None:
    scheduler = SlotScheduler(1)
    scheduler.add(0)
    first, training = await line(scheduler, 2)
    [evaluation] = await line(scheduler, 1, urgent=True)
    scheduler.release(first.result())
    await asyncio.sleep(0.001)
    assert evaluation.done() and not training.done()


async def test_draining_waits_for_what_runs_and_lets_nothing_begin() -> None:
    scheduler = SlotScheduler(1)
    scheduler.add(0)
    running, waiting = await line(scheduler, 2)
    drained = asyncio.create_task(scheduler.drain())
    await asyncio.sleep(0.001)
    assert not drained.done()
    scheduler.release(running.result())
    await asyncio.sleep(0.001)
    assert drained.done() and not waiting.done()
    scheduler.resume()
    assert await waiting == 0


async def turn(scheduler: SlotScheduler, after: int) -> asyncio.Task[int]:
    task = asyncio.create_task(scheduler.acquire(affinity=EngineAffinity(after)))
    await asyncio.sleep(0.001)
    return task


async def test_the_next_turn_of_a_conversation_waits_for_its_engine_and_lets_others_go_on() -> None:
    scheduler = SlotScheduler(1)
    scheduler.add(0)
    scheduler.add(1)
    first, _ = await line(scheduler, 2)
    next_turn, [new] = await turn(scheduler, first.result()), await line(scheduler, 1)
    scheduler.release(1 - first.result())
    await asyncio.sleep(0.001)
    assert new.done() and not next_turn.done()
    scheduler.release(first.result())
    assert await next_turn == first.result()


async def test_the_next_turn_goes_before_what_has_not_begun_and_after_evaluations() -> None:
    scheduler = SlotScheduler(1)
    scheduler.add(0)
    [_, new], next_turn = await line(scheduler, 2), await turn(scheduler, 0)
    [evaluation] = await line(scheduler, 1, urgent=True)
    for task, others in ((evaluation, (next_turn, new)), (next_turn, (new,)), (new, ())):
        scheduler.release(0)
        await asyncio.sleep(0.001)
        assert task.done() and not any(other.done() for other in others)


async def test_the_next_turn_goes_to_another_engine_when_its_own_is_gone() -> None:
    scheduler = SlotScheduler(1)
    for number in (0, 1):
        scheduler.add(number)
    full, _ = await line(scheduler, 2)
    waiting = await turn(scheduler, full.result())
    scheduler.release(1 - full.result())
    await asyncio.sleep(0.001)
    assert not waiting.done()
    scheduler.remove(full.result())
    assert await asyncio.wait_for(waiting, 1) == 1 - full.result()


async def test_a_conversation_learns_its_engine_from_its_first_turn() -> None:
    scheduler, affinity = SlotScheduler(1), EngineAffinity()
    scheduler.add(3)
    assert await scheduler.acquire(affinity=affinity) == 3 and affinity.engine == 3


async def test_turns_hear_too_that_no_engine_will_come() -> None:
    scheduler = SlotScheduler(1)
    waiting = await turn(scheduler, 0)
    scheduler.fail(RuntimeError("no engine came back"))
    with pytest.raises(RuntimeError, match="no engine came back"):
        await waiting


async def test_an_engine_that_is_gone_gets_nothing_and_its_last_requests_are_still_waited_for() -> None:
    scheduler = SlotScheduler(1)
    scheduler.add(0)
    [running] = await line(scheduler, 1)
    scheduler.remove(0)
    [waiting] = await line(scheduler, 1)
    drained = asyncio.create_task(scheduler.drain())
    await asyncio.sleep(0.001)
    assert not drained.done() and not waiting.done()
    scheduler.release(running.result())
    await drained
    scheduler.resume()
    scheduler.add(3)
    assert await waiting == 3


async def test_a_cancelled_wait_leaks_no_slot() -> None:
    scheduler = SlotScheduler(1)
    scheduler.add(0)
    running, cancelled, next_one = await line(scheduler, 3)
    cancelled.cancel()
    scheduler.release(running.result())
    assert await next_one == 0
    late = asyncio.create_task(scheduler.acquire())
    await asyncio.sleep(0.001)
    scheduler.release(0)  # hands the slot to `late`, which is cancelled before it could go on
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert await asyncio.wait_for(scheduler.acquire(), 1) == 0


async def test_those_in_line_hear_that_no_engine_will_come() -> None:
    scheduler = SlotScheduler(1)
    [waiting] = await line(scheduler, 1)
    scheduler.fail(RuntimeError("no engine came back"))
    with pytest.raises(RuntimeError, match="no engine came back"):
        await waiting
